#!/usr/bin/env bash
# CIFAR-FS 5-way 1-shot with 100 of the 600 images of each training class, those of CIFAR-100's test part. Tested are the
# best on validation, with one query a class and with 15, and the last checkpoint, with 15. In data/cifar_fs/reduced the
# folders val and test are whole, and train holds only those images:
# python data/cifar_fs/prepare.py --archive <a folder of these images> --out data/cifar_fs/reduced --allow_missing
exec "${PYTHON:-python}" "$(dirname "$0")/row.py" "$0" \
    --datasource=cifarfs --metatrain_iterations=20000 --update_batch_size=1 --data_path=data/cifar_fs/reduced \
    --logdir=logs/cifarfs1shot_reduced/ "$@" \
    -- --test_iter=best \
    -- --test_iter=best --num_query=15 \
    -- --num_query=15
