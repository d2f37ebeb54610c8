#!/usr/bin/env bash
# First-order MAML on Omniglot 20-way 1-shot (Nichol, Achiam, Schulman 2018, table 2).
# The same model is also tested 5-shot, with 5 queries per class and with 1.
exec "${PYTHON:-python}" "$(dirname "$0")/row.py" "$0" \
    --datasource=omniglot --metatrain_iterations=60000 --meta_batch_size=16 --update_batch_size=1 --num_classes=20 \
    --update_lr=0.1 --num_updates=5 --stop_grad=True --logdir=logs/omniglot20way/ "$@" \
    -- \
    -- --update_batch_size=5 --train_update_batch_size=1 \
    -- --update_batch_size=5 --train_update_batch_size=1 --num_query=1
