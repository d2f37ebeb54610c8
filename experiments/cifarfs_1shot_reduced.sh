#!/usr/bin/env bash
# CIFAR-FS 5-way 1-shot, trained on 100 of the 600 images per class: those of CIFAR-100's test part. The tests use the best
# checkpoint on validation, with 1 and 15 queries per class, and the last one, with 15. In data/cifar_fs/reduced only train
# is reduced; val and test are complete. To create it:
# python data/cifar_fs/prepare.py --archive <a folder of these images> --out data/cifar_fs/reduced --allow_missing
exec "${PYTHON:-python}" "$(dirname "$0")/row.py" "$0" \
    --datasource=cifarfs --metatrain_iterations=20000 --update_batch_size=1 --data_path=data/cifar_fs/reduced \
    --logdir=logs/cifarfs1shot_reduced/ "$@" \
    -- --test_iter=best \
    -- --test_iter=best --num_query=15 \
    -- --num_query=15
