#!/usr/bin/env bash
# CIFAR-FS 5-way 1-shot. Bertinetto et al., ICLR 2019, ran MAML on it with the MiniImagenet settings.
exec "${PYTHON:-python}" "$(dirname "$0")/row.py" "$0" \
    --datasource=cifarfs --metatrain_iterations=60000 --update_batch_size=1 --logdir=logs/cifarfs1shot/ "$@" \
    -- --test_iter=best
