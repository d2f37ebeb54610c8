#!/usr/bin/env bash
# 2D navigation, a policy that observes the goal, trained on batches of 1,000 transitions as in the authors' trpo_point.py.
exec "${PYTHON:-python}" "$(dirname "$0")/../rl/row.py" "$0" --env=point --baseline=oracle --iterations=100 --meta_batch_size=10 --num_rollouts=1 --logdir=logs/rl "$@"
