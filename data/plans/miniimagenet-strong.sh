#!/usr/bin/env bash
# miniImageNet at full width: the runs on val that are recorded, and then what they suggest, in order of worth.
# About 1 hour on one H100 or H200, estimated. Both sets must be there: pass on --root FOLDER.
# MINUTES is the limit of one run (60 unless set); a run that meets it goes on when the plan is started again.
# Options after the plan's name go to every run: bash data/plans/miniimagenet-strong.sh --device cuda --compile
set -u

# recorded: phase 1 against overfitting, then MTL on it (7 GPU minutes, estimated)
mtl run --data miniimagenet --preset strong --seed 0 --shots 1,5 --methods mtl --objective.rotation 0.5 --phase1.augment.pad 8 --phase1.augment.jitter 0.4 --phase1.augment.zoom 0.35 --phase1.ema 0.999 --phase1.keep-best true --phase1.epochs 60 --phase2.tasks 6000 --patience 0 --eval-split val --size 84 --tta.support-copies 0 --phase2.head-lr 0.0001 --out data/runs/miniimagenet-strong-zoom-s0 --resume --minutes "${MINUTES:-60}" "$@"

# twice as long, with and without hard tasks (11 GPU minutes, estimated)
mtl run --data miniimagenet --preset strong --seed 0 --shots 1,5 --methods mtl,mtl-ht --objective.rotation 0.5 --phase1.augment.pad 8 --phase1.augment.jitter 0.4 --phase1.augment.zoom 0.35 --phase1.ema 0.999 --phase1.keep-best true --phase1.epochs 120 --phase2.tasks 4000 --patience 8 --eval-split val --size 84 --tta.support-copies 0 --phase2.head-lr 0.0001 --out data/runs/miniimagenet-strong-zoom120-s0 --resume --minutes "${MINUTES:-60}" "$@"

# a second round, with the first network as its teacher (12 GPU minutes, estimated)
mtl run --data miniimagenet --preset strong --seed 0 --shots 1,5 --methods mtl --objective.rotation 0.5 --phase1.augment.pad 8 --phase1.augment.jitter 0.4 --phase1.augment.zoom 0.35 --phase1.ema 0.999 --phase1.keep-best true --objective.rounds 2 --phase1.epochs 60 --phase2.tasks 4000 --patience 8 --eval-split val --size 84 --tta.support-copies 0 --phase2.head-lr 0.0001 --out data/runs/miniimagenet-strong-zoom-rounds2-s0 --resume --minutes "${MINUTES:-60}" "$@"

# two more seeds of the recorded run (7 GPU minutes each, estimated)
mtl run --data miniimagenet --preset strong --seed 1 --shots 1,5 --methods mtl --objective.rotation 0.5 --phase1.augment.pad 8 --phase1.augment.jitter 0.4 --phase1.augment.zoom 0.35 --phase1.ema 0.999 --phase1.keep-best true --phase1.epochs 60 --phase2.tasks 6000 --patience 0 --eval-split val --size 84 --tta.support-copies 0 --phase2.head-lr 0.0001 --out data/runs/miniimagenet-strong-zoom-s1 --resume --minutes "${MINUTES:-60}" "$@"
mtl run --data miniimagenet --preset strong --seed 2 --shots 1,5 --methods mtl --objective.rotation 0.5 --phase1.augment.pad 8 --phase1.augment.jitter 0.4 --phase1.augment.zoom 0.35 --phase1.ema 0.999 --phase1.keep-best true --phase1.epochs 60 --phase2.tasks 6000 --patience 0 --eval-split val --size 84 --tta.support-copies 0 --phase2.head-lr 0.0001 --out data/runs/miniimagenet-strong-zoom-s2 --resume --minutes "${MINUTES:-60}" "$@"

# FC100 with the same phase 1 (7 GPU minutes, estimated)
mtl run --data fc100 --preset strong --seed 0 --shots 1,5,10 --methods mtl --objective.rotation 0.5 --phase1.augment.pad 8 --phase1.augment.jitter 0.4 --phase1.augment.zoom 0.35 --phase1.ema 0.999 --phase1.keep-best true --phase1.epochs 60 --phase2.tasks 2000 --phase2.lr 0.0001 --eval-split val --size 84 --tta.support-copies 0 --phase2.head-lr 0.0001 --out data/runs/fc100-strong-zoom-84-s0 --resume --minutes "${MINUTES:-60}" "$@"

# recorded: three outer rates on the published backbone (1 GPU minute each)
mtl run --data miniimagenet --preset strong --seed 0 --shots 1 --methods mtl --phase2.tasks 1000 --phase2.lr 0.0001 --patience 0 --backbone data/weights/miniimagenet-strong-turns-s0/pretrain.safetensors --eval-split val --size 84 --tta.support-copies 0 --phase2.head-lr 0.0001 --out data/runs/miniimagenet-strong-turns-rate0.0001-s0 --resume --minutes "${MINUTES:-60}" "$@"
mtl run --data miniimagenet --preset strong --seed 0 --shots 1 --methods mtl --phase2.tasks 1000 --phase2.lr 0.0003 --patience 0 --backbone data/weights/miniimagenet-strong-turns-s0/pretrain.safetensors --eval-split val --size 84 --tta.support-copies 0 --phase2.head-lr 0.0001 --out data/runs/miniimagenet-strong-turns-rate0.0003-s0 --resume --minutes "${MINUTES:-60}" "$@"
mtl run --data miniimagenet --preset strong --seed 0 --shots 1 --methods mtl --phase2.tasks 1000 --phase2.lr 0.001 --patience 0 --backbone data/weights/miniimagenet-strong-turns-s0/pretrain.safetensors --eval-split val --size 84 --tta.support-copies 0 --phase2.head-lr 0.0001 --out data/runs/miniimagenet-strong-turns-rate0.001-s0 --resume --minutes "${MINUTES:-60}" "$@"

# recorded: the paper's budget at the best of them, a check every 200 tasks (10 GPU minutes)
mtl run --data miniimagenet --preset strong --seed 0 --shots 1,5 --methods mtl,mtl-ht --phase2.tasks 8000 --phase2.lr 0.001 --patience 0 --backbone data/weights/miniimagenet-strong-turns-s0/pretrain.safetensors --eval-split val --size 84 --tta.support-copies 0 --phase2.head-lr 0.0001 --out data/runs/miniimagenet-strong-turns-rate3-s0 --resume --minutes "${MINUTES:-60}" "$@"

# recorded: FC100, MTL with early stopping on val (3 GPU minutes)
mtl run --data fc100 --preset strong --seed 0 --shots 1,5 --methods mtl,mtl-ht --phase2.tasks 2000 --phase2.lr 0.0001 --backbone data/weights/fc100-strong-turns-84-s0/pretrain.safetensors --eval-split val --size 84 --tta.support-copies 0 --phase2.head-lr 0.0001 --out data/runs/fc100-strong-turns-84-mtl-s0 --resume --minutes "${MINUTES:-60}" "$@"
