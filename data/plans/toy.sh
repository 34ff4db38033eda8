#!/usr/bin/env bash
# A toy plan on the glyphs: every kind of run in miniature, about a minute on a CPU.
# MINUTES is the limit of one run (60 unless set); a run that meets it goes on when the plan is started again.
# Options after the plan's name go to every run: bash data/plans/toy.sh --device cpu
set -u

# phases 1 to 3 with two seeds
mtl run --data glyphs --preset quick --seed 0 --shots 1 --methods mtl,mtl-ht --widths 4,4,8,8 --phase1.epochs 2 --phase2.tasks 8 --eval-tasks 50 --select-tasks 30 --eval-every 4 --inner 0.2,5 --out data/runs/toy-s0 --resume --minutes "${MINUTES:-60}" "$@"
mtl run --data glyphs --preset quick --seed 1 --shots 1 --methods mtl,mtl-ht --widths 4,4,8,8 --phase1.epochs 2 --phase2.tasks 8 --eval-tasks 50 --select-tasks 30 --eval-every 4 --inner 0.2,5 --out data/runs/toy-s1 --resume --minutes "${MINUTES:-60}" "$@"

# the compute-matched baseline: the time of phase 2 goes into a longer phase 1
mtl run --data glyphs --compute-matched data/runs/toy-s0/results.json --out data/runs/toy-matched --resume --minutes "${MINUTES:-60}" "$@"

# more methods on a backbone that is there
mtl run --data glyphs --preset quick --seed 0 --shots 1 --methods ft-head,protonet --phase2.tasks 8 --eval-tasks 50 --select-tasks 30 --eval-every 4 --inner 0.2,5 --backbone data/runs/toy-s0/pretrain.safetensors --out data/runs/toy-rows-s0 --resume --minutes "${MINUTES:-60}" "$@"

# no early stopping and many validation checks, for curves
mtl run --data glyphs --preset quick --seed 0 --shots 1 --methods mtl-ht --phase2.tasks 8 --eval-tasks 50 --select-tasks 30 --eval-every 2 --inner 0.2,5 --patience 0 --backbone data/runs/toy-s0/pretrain.safetensors --out data/runs/toy-curve-s0 --resume --minutes "${MINUTES:-60}" "$@"
mtl run --data glyphs --preset quick --seed 1 --shots 1 --methods mtl-ht --phase2.tasks 8 --eval-tasks 50 --select-tasks 30 --eval-every 2 --inner 0.2,5 --patience 0 --backbone data/runs/toy-s1/pretrain.safetensors --out data/runs/toy-curve-s1 --resume --minutes "${MINUTES:-60}" "$@"
