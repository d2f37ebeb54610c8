#!/usr/bin/env bash
# Omniglot 5-way 1-shot (paper, table 1). The same model is also tested 5-shot, with 5 queries per class and with 1.
exec "${PYTHON:-python}" "$(dirname "$0")/row.py" "$0" \
    --datasource=omniglot --metatrain_iterations=60000 --meta_batch_size=32 --update_batch_size=1 --update_lr=0.4 \
    --num_updates=1 --logdir=logs/omniglot5way/ "$@" \
    -- \
    -- --update_batch_size=5 --train_update_batch_size=1 \
    -- --update_batch_size=5 --train_update_batch_size=1 --num_query=1
