#!/usr/bin/env bash
# 2D navigation, MAML (paper, figure 4).
exec "${PYTHON:-python}" "$(dirname "$0")/../rl/row.py" "$0" --env=point --iterations=100 --logdir=logs/rl "$@"
