#!/usr/bin/env bash
# Omniglot 5-way 5-shot without convolutions, trained 5-shot; tested with 5 queries per class and with 1.
exec "${PYTHON:-python}" "$(dirname "$0")/row.py" "$0" \
    --datasource=omniglot --metatrain_iterations=60000 --meta_batch_size=32 --update_batch_size=5 --update_lr=0.4 \
    --num_updates=1 --logdir=logs/omniglot5way/ --conv=False "$@" \
    -- \
    -- --num_query=1
