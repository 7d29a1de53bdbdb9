#!/usr/bin/env bash
# One node: launch/one_node.sh CONFIG NUM_GPUS [key.subkey=value ...]
set -euo pipefail
config=${1:?usage: one_node.sh CONFIG NUM_GPUS [key.subkey=value ...]}
gpus=${2:?usage: one_node.sh CONFIG NUM_GPUS [key.subkey=value ...]}
shift 2
exec python -m deepspeed.launcher.runner --num_gpus "$gpus" --module linearard.train --config "$config" "$@"
