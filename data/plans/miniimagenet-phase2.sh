#!/usr/bin/env bash
# Phase 2 alone at full width, on the published backbone of miniImageNet and then of FC100, in order of worth.
# About half an hour on one H100 or H200, estimated from recorded runs. Both sets must be there: pass on --root FOLDER.
# MINUTES is the limit of one run (60 unless set); a run that meets it goes on when the plan is started again.
# LR is the outer learning rate of the long runs (0.0001 unless set): take the one that was best on val.
# Options after the plan's name go to every run: bash data/plans/miniimagenet-phase2.sh --device cuda --compile
set -u

# the outer learning rate at 1-shot, by the validation checks (0.7 GPU minutes each, estimated)
mtl run --data miniimagenet --preset strong --seed 0 --shots 1 --methods mtl --eval-split val --size 84 --tta.support-copies 0 --phase2.tasks 1000 --phase2.lr 0.0001 --phase2.head-lr 0.0001 --patience 0 --backbone data/weights/miniimagenet-strong-turns-s0/pretrain.safetensors --out data/runs/miniimagenet-phase2-rate4-s0 --resume --minutes "${MINUTES:-60}" "$@"
mtl run --data miniimagenet --preset strong --seed 0 --shots 1 --methods mtl --eval-split val --size 84 --tta.support-copies 0 --phase2.tasks 1000 --phase2.lr 0.0003 --phase2.head-lr 0.0001 --patience 0 --backbone data/weights/miniimagenet-strong-turns-s0/pretrain.safetensors --out data/runs/miniimagenet-phase2-rate3-s0 --resume --minutes "${MINUTES:-60}" "$@"
mtl run --data miniimagenet --preset strong --seed 0 --shots 1 --methods mtl --eval-split val --size 84 --tta.support-copies 0 --phase2.tasks 1000 --phase2.lr 0.00003 --phase2.head-lr 0.0001 --patience 0 --backbone data/weights/miniimagenet-strong-turns-s0/pretrain.safetensors --out data/runs/miniimagenet-phase2-rate5-s0 --resume --minutes "${MINUTES:-60}" "$@"

# Figure 4 at 1-shot: 8,000 tasks, a check every 200, no early stopping (4 GPU minutes a method, estimated)
mtl run --data miniimagenet --preset strong --seed 0 --shots 1 --methods mtl,mtl-ht --eval-split val --size 84 --tta.support-copies 0 --phase2.tasks 8000 --phase2.lr "${LR:-0.0001}" --phase2.head-lr 0.0001 --patience 0 --backbone data/weights/miniimagenet-strong-turns-s0/pretrain.safetensors --out data/runs/miniimagenet-phase2-1shot-s0 --resume --minutes "${MINUTES:-60}" "$@"

# the same at 5-shot (3 to 6 GPU minutes a method, estimated)
mtl run --data miniimagenet --preset strong --seed 0 --shots 5 --methods mtl,mtl-ht --eval-split val --size 84 --tta.support-copies 0 --phase2.tasks 8000 --phase2.lr "${LR:-0.0001}" --phase2.head-lr 0.0001 --patience 0 --backbone data/weights/miniimagenet-strong-turns-s0/pretrain.safetensors --out data/runs/miniimagenet-phase2-5shot-s0 --resume --minutes "${MINUTES:-60}" "$@"

# FC100: MTL and MTL + HT with early stopping on val (4 GPU minutes, estimated)
mtl run --data fc100 --preset strong --seed 0 --shots 1,5,10 --methods mtl,mtl-ht --eval-split val --size 84 --tta.support-copies 0 --phase2.lr "${LR:-0.0001}" --phase2.head-lr 0.0001 --backbone data/weights/fc100-strong-turns-84-s0/pretrain.safetensors --out data/runs/fc100-phase2-s0 --resume --minutes "${MINUTES:-60}" "$@"
