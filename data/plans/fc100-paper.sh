#!/usr/bin/env bash
# Tables 1 and 3 on FC100 with the paper's schedule, in order of worth: about 6 hours on one H100 or H200, estimated.
# FC100 must be there: pass on --root FOLDER, and --download the first time.
# MINUTES is the limit of one run (60 unless set); a run that meets it goes on when the plan is started again.
# Options after the plan's name go to every run: bash data/plans/fc100-paper.sh --device cuda
set -u

# the linear head alone after the paper's phase 1; the runs below stand on these backbones (3 GPU minutes each,
# measured)
mtl run --data fc100 --preset paper --seed 0 --shots 1,5,10 --methods none --out data/runs/fc100-paper-s0 --resume --minutes "${MINUTES:-60}" "$@"
mtl run --data fc100 --preset paper --seed 1 --shots 1,5,10 --methods none --out data/runs/fc100-paper-s1 --resume --minutes "${MINUTES:-60}" "$@"
mtl run --data fc100 --preset paper --seed 2 --shots 1,5,10 --methods none --out data/runs/fc100-paper-s2 --resume --minutes "${MINUTES:-60}" "$@"

# on val: MTL + HT and MTL at 1-shot with a tenth of the paper's outer rates; with the full ones MTL + HT fell apart
# at 5-shot (6 GPU minutes, estimated)
mtl run --data fc100 --preset paper --seed 0 --shots 1 --methods mtl-ht,mtl --eval-split val --phase2.lr 0.0001 --phase2.head-lr 0.0001 --backbone data/runs/fc100-paper-s0/pretrain.safetensors --out data/runs/fc100-paper-slow-1shot-s0 --resume --minutes "${MINUTES:-60}" "$@"

# the same at 5-shot (6 GPU minutes, estimated)
mtl run --data fc100 --preset paper --seed 0 --shots 5 --methods mtl-ht,mtl --eval-split val --phase2.lr 0.0001 --phase2.head-lr 0.0001 --backbone data/runs/fc100-paper-s0/pretrain.safetensors --out data/runs/fc100-paper-slow-5shot-s0 --resume --minutes "${MINUTES:-60}" "$@"

# the same at 10-shot (6 GPU minutes, estimated)
mtl run --data fc100 --preset paper --seed 0 --shots 10 --methods mtl-ht,mtl --eval-split val --phase2.lr 0.0001 --phase2.head-lr 0.0001 --backbone data/runs/fc100-paper-s0/pretrain.safetensors --out data/runs/fc100-paper-slow-10shot-s0 --resume --minutes "${MINUTES:-60}" "$@"

# MTL + HT at 5-shot as in the paper (3 GPU minutes, measured)
mtl run --data fc100 --preset paper --seed 0 --shots 5 --methods mtl-ht --backbone data/runs/fc100-paper-s0/pretrain.safetensors --out data/runs/fc100-paper-ht-5shot-s0 --resume --minutes "${MINUTES:-60}" "$@"

# the linear head, MTL and MTL + HT with the paper's schedule: the main rows of Tables 1 and 3, three seeds; each
# trains its own backbone, as the compute-matched baseline needs the time of phase 1 (21 GPU minutes each, estimated)
mtl run --data fc100 --preset paper --seed 0 --shots 1,5,10 --methods mtl,mtl-ht --out data/runs/fc100-paper-whole-s0 --resume --minutes "${MINUTES:-60}" "$@"
mtl run --data fc100 --preset paper --seed 1 --shots 1,5,10 --methods mtl,mtl-ht --out data/runs/fc100-paper-whole-s1 --resume --minutes "${MINUTES:-60}" "$@"
mtl run --data fc100 --preset paper --seed 2 --shots 1,5,10 --methods mtl,mtl-ht --out data/runs/fc100-paper-whole-s2 --resume --minutes "${MINUTES:-60}" "$@"

# the compute-matched baseline: the time of phase 2 goes into a longer phase 1 (6 GPU minutes, estimated)
mtl run --data fc100 --compute-matched data/runs/fc100-paper-whole-s0/results.json --out data/runs/fc100-paper-matched-s0 --resume --minutes "${MINUTES:-60}" "$@"

# other methods on the same backbone that cost no more than MTL (26 GPU minutes, estimated)
mtl run --data fc100 --preset paper --seed 0 --shots 1,5,10 --methods cosine-classifier,protonet,tadam --backbone data/runs/fc100-paper-s0/pretrain.safetensors --out data/runs/fc100-paper-others --resume --minutes "${MINUTES:-60}" "$@"

# the other rows of Table 1 at 5-shot, on the same backbone and the same tasks (27 GPU minutes, estimated)
mtl run --data fc100 --preset paper --seed 0 --shots 5 --methods ft-head,ft-head-ht,ft-theta4,ft-theta4-ht,ss-theta4,ss-theta4-ht,ft-theta,ft-theta-ht --backbone data/runs/fc100-paper-s0/pretrain.safetensors --out data/runs/fc100-paper-rows-5shot --resume --minutes "${MINUTES:-60}" "$@"

# the same at 1-shot (25 GPU minutes, estimated)
mtl run --data fc100 --preset paper --seed 0 --shots 1 --methods ft-head,ft-head-ht,ft-theta4,ft-theta4-ht,ss-theta4,ss-theta4-ht,ft-theta,ft-theta-ht --backbone data/runs/fc100-paper-s0/pretrain.safetensors --out data/runs/fc100-paper-rows-1shot --resume --minutes "${MINUTES:-60}" "$@"

# the same at 10-shot (29 GPU minutes, estimated)
mtl run --data fc100 --preset paper --seed 0 --shots 10 --methods ft-head,ft-head-ht,ft-theta4,ft-theta4-ht,ss-theta4,ss-theta4-ht,ft-theta,ft-theta-ht --backbone data/runs/fc100-paper-s0/pretrain.safetensors --out data/runs/fc100-paper-rows-10shot --resume --minutes "${MINUTES:-60}" "$@"

# update [Θ;θ] at 1-shot: all weights adapted to each task; its evaluation is not saved half-way, so MINUTES must
# cover it (2 GPU minutes, estimated)
mtl run --data fc100 --preset paper --seed 0 --shots 1 --methods update-theta --backbone data/runs/fc100-paper-s0/pretrain.safetensors --out data/runs/fc100-paper-update-1shot --resume --minutes "${MINUTES:-60}" "$@"

# the same at 5-shot (6 GPU minutes, estimated)
mtl run --data fc100 --preset paper --seed 0 --shots 5 --methods update-theta --backbone data/runs/fc100-paper-s0/pretrain.safetensors --out data/runs/fc100-paper-update-5shot --resume --minutes "${MINUTES:-60}" "$@"

# MAML on the same backbone at 1-shot, without and with hard tasks: the rows that take longest (22 GPU minutes,
# estimated)
mtl run --data fc100 --preset paper --seed 0 --shots 1 --methods maml-resnet-12,maml-resnet-12-ht --backbone data/runs/fc100-paper-s0/pretrain.safetensors --out data/runs/fc100-paper-maml-1shot --resume --minutes "${MINUTES:-60}" "$@"

# the same at 5-shot (40 GPU minutes, estimated)
mtl run --data fc100 --preset paper --seed 0 --shots 5 --methods maml-resnet-12,maml-resnet-12-ht --backbone data/runs/fc100-paper-s0/pretrain.safetensors --out data/runs/fc100-paper-maml-5shot --resume --minutes "${MINUTES:-60}" "$@"

# the same at 10-shot (61 GPU minutes, estimated)
mtl run --data fc100 --preset paper --seed 0 --shots 10 --methods maml-resnet-12,maml-resnet-12-ht --backbone data/runs/fc100-paper-s0/pretrain.safetensors --out data/runs/fc100-paper-maml-10shot --resume --minutes "${MINUTES:-60}" "$@"

# update [Θ;θ] at 10-shot: not saved half-way either (12 GPU minutes, estimated)
mtl run --data fc100 --preset paper --seed 0 --shots 10 --methods update-theta --backbone data/runs/fc100-paper-s0/pretrain.safetensors --out data/runs/fc100-paper-update-10shot --resume --minutes "${MINUTES:-60}" "$@"
