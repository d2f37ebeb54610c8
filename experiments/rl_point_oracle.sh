#!/usr/bin/env bash
# 2D navigation, a policy that observes the goal (paper, figure 4).
exec "${PYTHON:-python}" "$(dirname "$0")/../rl/row.py" "$0" --env=point --baseline=oracle --iterations=100 --logdir=logs/rl "$@"
