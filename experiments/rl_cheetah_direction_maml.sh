#!/usr/bin/env bash
# Half-cheetah, forward or backward, MAML (paper, figure 5).
exec "${PYTHON:-python}" "$(dirname "$0")/../rl/row.py" "$0" --env=cheetah_direction --iterations=100 --logdir=logs/rl "$@"
