"The small glyph backbone that pages 06 and on start from, made anew: `pytest nbs/tests/test_weights.py --nbflags slow`."
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mtl_nb.models.base_learner import BaseLearner
from mtl_nb.data.episodes import TaskShape
from mtl_nb.evaluation.exam import evaluate, features, make_exam
from mtl_nb.experiments.run import save_backbone
from mtl_nb.experiments.config import preset
from mtl_nb.data.glyphs import glyphs
from mtl_nb.train.checkpoints import load_backbone
from mtl_nb.train.meta_train import MTL
from mtl_nb.train.pretrain import pretrain, pretrain_state
from mtl_nb.models.resnet12 import ResNet12

FILE = Path(__file__).parents[2]/"data/weights/glyphs-small.safetensors"


def make(path):
    "Phase 1 of `quick` at half the width, with mirror images: about a minute on two cores."
    recipe, base = preset("quick", widths=(8, 16, 32, 64)), glyphs(0)["train"]
    recipe = replace(recipe, phase1=replace(recipe.phase1, augment=dict(pad=2, flip=True, jitter=0.)))
    net = ResNet12(recipe.widths, seed=0)
    for _ in pretrain(pretrain_state(net, len(base.names), recipe.phase1), base, recipe.phase1): pass
    save_backbone(path, net, base, recipe, 0.)


def accuracy(path):
    net, centre, _ = load_backbone(path)
    bank = glyphs(0)["val"]
    right = evaluate(features(MTL(net, BaseLearner(net.num_features, 5), centre).embed, bank), make_exam(bank, TaskShape(), 1, 500), BaseLearner(net.num_features, 5, 0.2, 50))
    return right.double().mean().item()/75


def test_it_knows_something(): assert accuracy(FILE) > 0.5


def test_made_anew(request, tmp_path):
    if "slow" not in request.config.getoption("--nbflags"): pytest.skip("a minute of training: add --nbflags slow")
    make(tmp_path/"new.safetensors")
    assert abs(accuracy(tmp_path/"new.safetensors") - accuracy(FILE)) < 0.02


if __name__ == "__main__":
    torch.set_num_threads(2)
    make(FILE)
