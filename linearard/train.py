"""Entry point: `deepspeed --num_gpus N --module linearard.train --config FILE [key.subkey=value ...]`."""

from __future__ import annotations

import argparse
import atexit
import os
import sys
import textwrap
import time
from typing import NoReturn

from linearard import config as configuration
from linearard.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """Runs the training; returns the exit status: 0 for success, 2 for a user's mistake."""
    parser = argparse.ArgumentParser(prog="linearard.train", description=__doc__)
    parser.add_argument("--config", required=True, help="YAML file, see launch/*.yaml")
    parser.add_argument("--dry-run", action="store_true", help="check, print configuration and plan, start nothing")
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)  # the launcher adds it
    parser.add_argument("overrides", nargs="*", metavar="key.subkey=value", help="override of a configuration value")
    options = parser.parse_intermixed_args(arguments)  # overrides may stand on both sides of --dry-run
    try:
        return _run(options)
    except UserError as error:
        # Rank 0 speaks first; the launcher ends the others before they repeat it.
        if os.environ.get("RANK", "0") != "0":
            time.sleep(5)
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2


def _run(options: argparse.Namespace) -> int:
    config = configuration.load_config(options.config, options.overrides)
    from linearard import logs  # imports of torch and transformers take seconds: after the cheap checks
    from linearard.models.student import load_model_config
    from linearard.trainer import check_run, run

    logs.configure()
    native = load_model_config(config.model)
    check_run(config, native)
    from linearard import parallel, plan

    if options.dry_run:
        print(configuration.dump(config), end="")
        planned = plan.ForDryRun.of(config, native)
        print(textwrap.indent(planned.table(), "# ", lambda line: True))  # the output stays YAML
        planned.refuse_what_cannot_fit()
        return 0
    context = parallel.initialize(config.parallel.sequence_parallel_size)
    try:
        run(config, native, context)
    finally:
        parallel.finalize()
    return 0


def leave(status: int) -> NoReturn:
    """Ends the process with `status`: runs what is registered at exit and flushes, but does not finalize Python.

    DeepSpeed's classes keep process groups for ever, so that `destroy_process_group` does not end gloo's threads. One
    that gives a tensor back while Python is being finalized would abort the process ("terminate called without an
    active exception", SIGABRT), and the launcher would report a run as failed that has saved all it had to.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    leave(main())
