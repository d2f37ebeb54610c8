#!/usr/bin/env bash
# Sinusoid, the pretrained baseline (paper, section 5.1), tested 5-, 10- and 20-shot with alpha 0.001 and 0.01.
exec "${PYTHON:-python}" "$(dirname "$0")/row.py" "$0" \
    --datasource=sinusoid --logdir=logs/sine/ --pretrain_iterations=70000 --metatrain_iterations=0 --norm=None \
    --update_batch_size=10 "$@" \
    -- --update_batch_size=5 --train_update_batch_size=10 \
    -- \
    -- --update_batch_size=20 --train_update_batch_size=10 \
    -- --update_lr=0.01 --train_update_lr=0.001 --update_batch_size=5 --train_update_batch_size=10 \
    -- --update_lr=0.01 --train_update_lr=0.001 \
    -- --update_lr=0.01 --train_update_lr=0.001 --update_batch_size=20 --train_update_batch_size=10
