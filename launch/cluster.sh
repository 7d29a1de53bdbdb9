#!/usr/bin/env bash
# Several nodes over ssh (pdsh): launch/cluster.sh CONFIG HOSTFILE [key.subkey=value ...]
# HOSTFILE has a line `host slots=GPUS` for each node; repository, virtual environment, model and run_dir are at the
# same paths on all of them.
set -euo pipefail
config=${1:?usage: cluster.sh CONFIG HOSTFILE [key.subkey=value ...]}
hostfile=${2:?usage: cluster.sh CONFIG HOSTFILE [key.subkey=value ...]}
shift 2
exec python -m deepspeed.launcher.runner --hostfile "$hostfile" --module linearard.train --config "$config" "$@"
