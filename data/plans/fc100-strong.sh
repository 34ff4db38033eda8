#!/usr/bin/env bash
# The search for the best linear head on FC100 at full width, on val, in order of worth; then MTL with what helped, on
# test.
# About 3 hours on one H100 or H200, estimated. FC100 must be there: pass on --root FOLDER, and --download the first
# time.
# MINUTES is the limit of one run (60 unless set); a run that meets it goes on when the plan is started again.
# Options after the plan's name go to every run: bash data/plans/fc100-strong.sh --device cuda
set -u

# the preset as it is, full width at 32x32 pixels (6 GPU minutes, measured)
mtl run --data fc100 --preset strong --seed 0 --shots 1,5 --methods none --eval-split val --out data/runs/fc100-strong-s0 --resume --minutes "${MINUTES:-60}" "$@"

# rotated images and a second head that predicts the rotation; the changes below start from here (6 GPU minutes,
# measured)
mtl run --data fc100 --preset strong --seed 0 --shots 1,5 --methods none --eval-split val --objective.rotation 0.5 --out data/runs/fc100-strong-rotation-s0 --resume --minutes "${MINUTES:-60}" "$@"

# the same images enlarged to 84x84, shifted by as large a part of them (6 GPU minutes, measured)
mtl run --data fc100 --preset strong --seed 0 --shots 1,5 --methods none --eval-split val --objective.rotation 0.5 --size 84 --phase1.augment.pad 10 --out data/runs/fc100-strong-rotation-84-s0 --resume --minutes "${MINUTES:-60}" "$@"

# stronger augmentation: zoom and colour (6 GPU minutes, estimated)
mtl run --data fc100 --preset strong --seed 0 --shots 1,5 --methods none --eval-split val --objective.rotation 0.5 --phase1.augment.zoom 0.6 --phase1.augment.jitter 0.4 --out data/runs/fc100-strong-rotation-augment-s0 --resume --minutes "${MINUTES:-60}" "$@"

# half the epochs: the preset was at its best on val after a fifth of them (3 GPU minutes, estimated)
mtl run --data fc100 --preset strong --seed 0 --shots 1,5 --methods none --eval-split val --objective.rotation 0.5 --phase1.epochs 30 --out data/runs/fc100-strong-rotation-short-s0 --resume --minutes "${MINUTES:-60}" "$@"

# a third of the epochs, without the rotations: is it the length as much as the width? (2 GPU minutes, estimated)
mtl run --data fc100 --preset strong --seed 0 --shots 1,5 --methods none --eval-split val --phase1.epochs 20 --out data/runs/fc100-strong-short-s0 --resume --minutes "${MINUTES:-60}" "$@"

# four times the weight decay (6 GPU minutes, estimated)
mtl run --data fc100 --preset strong --seed 0 --shots 1,5 --methods none --eval-split val --objective.rotation 0.5 --phase1.weight-decay 0.002 --out data/runs/fc100-strong-rotation-decay-s0 --resume --minutes "${MINUTES:-60}" "$@"

# mixup (6 GPU minutes, estimated)
mtl run --data fc100 --preset strong --seed 0 --shots 1,5 --methods none --eval-split val --objective.rotation 0.5 --objective.mixup 0.2 --out data/runs/fc100-strong-rotation-mixup-s0 --resume --minutes "${MINUTES:-60}" "$@"

# DropBlock, which needs a rate of dropout (6.5 GPU minutes, estimated)
mtl run --data fc100 --preset strong --seed 0 --shots 1,5 --methods none --eval-split val --objective.rotation 0.5 --dropout 0.1 --objective.dropblock 3 --out data/runs/fc100-strong-rotation-dropblock-s0 --resume --minutes "${MINUTES:-60}" "$@"

# self-distillation: a second network with the first as its teacher (14 GPU minutes, estimated)
mtl run --data fc100 --preset strong --seed 0 --shots 1,5 --methods none --eval-split val --objective.rotation 0.5 --objective.rounds 2 --out data/runs/fc100-strong-rotation-distill-s0 --resume --minutes "${MINUTES:-60}" "$@"

# a wider network (7.5 GPU minutes, estimated)
mtl run --data fc100 --preset strong --seed 0 --shots 1,5 --methods none --eval-split val --objective.rotation 0.5 --widths 64,160,320,640 --out data/runs/fc100-strong-rotation-wide-s0 --resume --minutes "${MINUTES:-60}" "$@"

# twice the epochs (12 GPU minutes, estimated)
mtl run --data fc100 --preset strong --seed 0 --shots 1,5 --methods none --eval-split val --objective.rotation 0.5 --phase1.epochs 120 --out data/runs/fc100-strong-rotation-long-s0 --resume --minutes "${MINUTES:-60}" "$@"

# three images of four are rotated: each rotation as often as none (6 GPU minutes, estimated)
mtl run --data fc100 --preset strong --seed 0 --shots 1,5 --methods none --eval-split val --objective.rotation 0.75 --out data/runs/fc100-strong-rotation-more-s0 --resume --minutes "${MINUTES:-60}" "$@"

# without the augmented copies of support images that the preset has; no training, as in all runs with --backbone (0.5
# GPU minutes, estimated)
mtl run --data fc100 --preset strong --seed 0 --shots 1,5 --methods none --eval-split val --tta.support-copies 0 --backbone data/runs/fc100-strong-rotation-s0/pretrain.safetensors --out data/runs/fc100-strong-rotation-no-copies-s0 --resume --minutes "${MINUTES:-60}" "$@"

# four augmented views of every image, averaged with it, in place of the copies (0.5 GPU minutes, estimated)
mtl run --data fc100 --preset strong --seed 0 --shots 1,5 --methods none --eval-split val --tta.support-copies 0 --tta.views 4 --backbone data/runs/fc100-strong-rotation-s0/pretrain.safetensors --out data/runs/fc100-strong-rotation-views-s0 --resume --minutes "${MINUTES:-60}" "$@"

# and every image in four rotations, side by side (0.5 GPU minutes, estimated)
mtl run --data fc100 --preset strong --seed 0 --shots 1,5 --methods none --eval-split val --tta.support-copies 0 --tta.views 4 --tta.rotations true --backbone data/runs/fc100-strong-rotation-s0/pretrain.safetensors --out data/runs/fc100-strong-rotation-views-rotations-s0 --resume --minutes "${MINUTES:-60}" "$@"

# the same at 84x84; this backbone is published (1 GPU minute, estimated)
mtl run --data fc100 --preset strong --seed 0 --shots 1,5 --methods none --eval-split val --size 84 --tta.support-copies 0 --tta.views 4 --tta.rotations true --backbone data/runs/fc100-strong-rotation-84-s0/pretrain.safetensors --out data/runs/fc100-strong-rotation-84-views-rotations-s0 --resume --minutes "${MINUTES:-60}" "$@"

# the maximum of each channel beside its mean, where 84x84 pixels leave five by five places (0.5 GPU minutes,
# estimated)
mtl run --data fc100 --preset strong --seed 0 --shots 1,5 --methods none --eval-split val --size 84 --tta.support-copies 0 --tta.max-pool true --backbone data/runs/fc100-strong-rotation-84-s0/pretrain.safetensors --out data/runs/fc100-strong-rotation-84-max-pool-s0 --resume --minutes "${MINUTES:-60}" "$@"

# rotations and maxima (0.5 GPU minutes, estimated)
mtl run --data fc100 --preset strong --seed 0 --shots 1,5 --methods none --eval-split val --size 84 --tta.support-copies 0 --tta.rotations true --tta.max-pool true --backbone data/runs/fc100-strong-rotation-84-s0/pretrain.safetensors --out data/runs/fc100-strong-rotation-84-rotations-max-pool-s0 --resume --minutes "${MINUTES:-60}" "$@"

# views, rotations, maxima and whitening (1 GPU minute, estimated)
mtl run --data fc100 --preset strong --seed 0 --shots 1,5 --methods none --eval-split val --size 84 --tta.support-copies 0 --tta.views 4 --tta.rotations true --tta.max-pool true --tta.whitening true --backbone data/runs/fc100-strong-rotation-84-s0/pretrain.safetensors --out data/runs/fc100-strong-rotation-84-all-s0 --resume --minutes "${MINUTES:-60}" "$@"

# rotations, maxima and whitening (0.5 GPU minutes, estimated)
mtl run --data fc100 --preset strong --seed 0 --shots 1,5 --methods none --eval-split val --size 84 --tta.support-copies 0 --tta.rotations true --tta.max-pool true --tta.whitening true --backbone data/runs/fc100-strong-rotation-84-s0/pretrain.safetensors --out data/runs/fc100-strong-rotation-84-rotations-max-pool-whitening-s0 --resume --minutes "${MINUTES:-60}" "$@"

# the published backbone on test, once, with the augmentation that was best on val (1 GPU minute, estimated)
mtl run --data fc100 --preset strong --seed 0 --shots 1,5,10 --methods none --eval-split test --size 84 --tta.support-copies 0 --tta.rotations true --tta.max-pool true --tta.whitening true --backbone data/runs/fc100-strong-rotation-84-s0/pretrain.safetensors --out data/runs/fc100-strong-rotation-84-test-s0 --resume --minutes "${MINUTES:-60}" "$@"

# MTL + HT and MTL on test with what helped on val, three seeds; EDIT these lines after the search above (13 GPU
# minutes each, estimated)
mtl run --data fc100 --preset strong --seed 0 --shots 1,5,10 --methods mtl-ht,mtl --size 84 --phase1.augment.pad 10 --objective.rotation 0.5 --tta.support-copies 0 --tta.views 4 --tta.rotations true --tta.max-pool true --tta.whitening true --phase2.lr 0.0001 --phase2.head-lr 0.0001 --out data/runs/fc100-strong-best-s0 --resume --minutes "${MINUTES:-60}" "$@"
mtl run --data fc100 --preset strong --seed 1 --shots 1,5,10 --methods mtl-ht,mtl --size 84 --phase1.augment.pad 10 --objective.rotation 0.5 --tta.support-copies 0 --tta.views 4 --tta.rotations true --tta.max-pool true --tta.whitening true --phase2.lr 0.0001 --phase2.head-lr 0.0001 --out data/runs/fc100-strong-best-s1 --resume --minutes "${MINUTES:-60}" "$@"
mtl run --data fc100 --preset strong --seed 2 --shots 1,5,10 --methods mtl-ht,mtl --size 84 --phase1.augment.pad 10 --objective.rotation 0.5 --tta.support-copies 0 --tta.views 4 --tta.rotations true --tta.max-pool true --tta.whitening true --phase2.lr 0.0001 --phase2.head-lr 0.0001 --out data/runs/fc100-strong-best-s2 --resume --minutes "${MINUTES:-60}" "$@"

# its compute-matched baseline (8 GPU minutes, estimated)
mtl run --data fc100 --compute-matched data/runs/fc100-strong-best-s0/results.json --out data/runs/fc100-strong-best-matched-s0 --resume --minutes "${MINUTES:-60}" "$@"

# Figure 4: no early stopping, a validation check every 100 tasks, with and without hard tasks, three seeds (5 GPU
# minutes each, estimated)
mtl run --data fc100 --preset strong --seed 0 --shots 1,5 --methods mtl-ht,mtl --size 84 --tta.support-copies 0 --tta.views 4 --tta.rotations true --tta.max-pool true --tta.whitening true --phase2.lr 0.0001 --phase2.head-lr 0.0001 --patience 0 --eval-every 100 --backbone data/runs/fc100-strong-best-s0/pretrain.safetensors --out data/runs/fc100-strong-figure4-s0 --resume --minutes "${MINUTES:-60}" "$@"
mtl run --data fc100 --preset strong --seed 1 --shots 1,5 --methods mtl-ht,mtl --size 84 --tta.support-copies 0 --tta.views 4 --tta.rotations true --tta.max-pool true --tta.whitening true --phase2.lr 0.0001 --phase2.head-lr 0.0001 --patience 0 --eval-every 100 --backbone data/runs/fc100-strong-best-s1/pretrain.safetensors --out data/runs/fc100-strong-figure4-s1 --resume --minutes "${MINUTES:-60}" "$@"
mtl run --data fc100 --preset strong --seed 2 --shots 1,5 --methods mtl-ht,mtl --size 84 --tta.support-copies 0 --tta.views 4 --tta.rotations true --tta.max-pool true --tta.whitening true --phase2.lr 0.0001 --phase2.head-lr 0.0001 --patience 0 --eval-every 100 --backbone data/runs/fc100-strong-best-s2/pretrain.safetensors --out data/runs/fc100-strong-figure4-s2 --resume --minutes "${MINUTES:-60}" "$@"
