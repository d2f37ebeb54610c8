#!/usr/bin/env bash
# 2D navigation, an untrained policy (paper, figure 4).
exec "${PYTHON:-python}" "$(dirname "$0")/../rl/row.py" "$0" --env=point --baseline=random --logdir=logs/rl "$@"
