#!/usr/bin/env bash
# MiniImagenet 5-way 1-shot, first order (paper, table 1).
exec "${PYTHON:-python}" "$(dirname "$0")/row.py" "$0" \
    --datasource=miniimagenet --metatrain_iterations=60000 --meta_batch_size=4 --update_batch_size=1 --update_lr=0.01 \
    --num_updates=5 --num_classes=5 --logdir=logs/miniimagenet1shot/ --num_filters=32 --max_pool=True \
    --stop_grad=True "$@" \
    --
