#!/usr/bin/env bash
# Half-cheetah, forward or backward, an untrained policy (paper, figure 5).
exec "${PYTHON:-python}" "$(dirname "$0")/../rl/row.py" "$0" --env=cheetah_direction --baseline=random --update_lr=0.5 --logdir=logs/rl "$@"
