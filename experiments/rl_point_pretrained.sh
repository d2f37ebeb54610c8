#!/usr/bin/env bash
# 2D navigation, one policy trained on all goals (paper, figure 4).
exec "${PYTHON:-python}" "$(dirname "$0")/../rl/row.py" "$0" --env=point --baseline=pretrained --iterations=100 --logdir=logs/rl "$@"
