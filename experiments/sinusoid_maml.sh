#!/usr/bin/env bash
# Sinusoid, MAML trained 10-shot with alpha 0.001, as in the original's documentation; tested 5-, 10- and 20-shot.
exec "${PYTHON:-python}" "$(dirname "$0")/row.py" "$0" \
    --datasource=sinusoid --logdir=logs/sine/ --metatrain_iterations=70000 --norm=None --update_batch_size=10 "$@" \
    -- --update_batch_size=5 --train_update_batch_size=10 \
    -- \
    -- --update_batch_size=20 --train_update_batch_size=10
