#!/usr/bin/env bash
# mmfewshot's MAML on MiniImagenet with conv4: trained 5-shot, tested 5-shot and 1-shot (differences: docs/fidelity.md).
exec "${PYTHON:-python}" "$(dirname "$0")/row.py" "$0" \
    --datasource=miniimagenet --data_path=data/miniImagenet_photographs --augment --network=conv4_affine --num_filters=64 --loss=mean \
    --metatrain_iterations=12500 --meta_batch_size=8 --update_batch_size=5 --num_query=16 --update_lr=0.01 \
    --num_updates=2 --val_tasks=100 --logdir=logs/mmfewshot/ "$@" \
    -- --test_iter=best --num_query=15 --test_updates=5 --test_tasks=2000 \
    -- --test_iter=best --num_query=15 --test_updates=5 --test_tasks=2000 --update_batch_size=1 \
    --train_update_batch_size=5
