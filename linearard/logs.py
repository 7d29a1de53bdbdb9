"""Logging with the rank in every record."""

from __future__ import annotations

import logging
import os
import sys
import warnings


def get_logger(name: str) -> logging.Logger:
    """A logger below "linearard"; `configure` decides where records go."""
    return logging.getLogger(name if name.startswith("linearard") else f"linearard.{name}")


def configure(level: int = logging.INFO) -> None:
    """Sends records to standard error as `[rank R] LEVEL message`; ranks other than 0 only from WARNING up."""
    rank = int(os.environ.get("RANK", "0"))
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"[rank {rank}] %(levelname)s %(message)s"))
    root = logging.getLogger("linearard")
    root.handlers[:] = [handler]
    root.propagate = False
    root.setLevel(level if rank == 0 else max(level, logging.WARNING))
    # DeepSpeed calls collectives by names that newer versions of torch rename, once a rank.
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.distributed.*")
    # DeepSpeed and transformers report every group and cast at INFO; their warnings carry no rank.
    for name in ("DeepSpeed", "deepspeed", "transformers"):
        logging.getLogger(name).setLevel(logging.WARNING if rank == 0 else logging.ERROR)
