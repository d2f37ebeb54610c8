#!/usr/bin/env bash
# CIFAR-FS 5-way 1-shot (Bertinetto et al., ICLR 2019, who ran MAML as on MiniImagenet).
exec "${PYTHON:-python}" "$(dirname "$0")/row.py" "$0" \
    --datasource=cifarfs --metatrain_iterations=60000 --meta_batch_size=4 --update_batch_size=1 --update_lr=0.01 \
    --num_updates=5 --num_classes=5 --logdir=logs/cifarfs1shot/ --num_filters=32 --max_pool=True "$@" \
    --
