"A stranger's method, backbone and data set, each registered in at most twenty lines, together in one experiment."
import inspect
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mtl_nb.data.datasets import DATASETS, load_data, register_dataset
from mtl_nb.data.glyphs import glyphs
from mtl_nb.experiments.config import preset
from mtl_nb.experiments.run import run
from mtl_nb.methods.base import METHODS, Method, get_method, parse_methods, register_method
from mtl_nb.models.backbones import BACKBONES, register_backbone
from mtl_nb.train.checkpoints import load_backbone
from mtl_nb.train.meta_train import MTL


def add_method():
    class Nearest(nn.Module):
        def __init__(self, n_way):
            super().__init__()
            self.n_way, self.weight = n_way, nn.Parameter(torch.ones(()), requires_grad=False)
        def forward(self, support, labels, query): # [E,n,D], [E,n], [E,m,D] -> [E,m,N]
            cosine = F.normalize(query, dim=-1) @ F.normalize(support, dim=-1).mT
            other = F.one_hot(labels, self.n_way)[:, None] == 0 # [E,1,n,N]
            return cosine[..., None].masked_fill(other, -1.).amax(2)

    @register_method
    class NearestImage(Method):
        label, meta = "nearest support image", False
        def build(self, net, base, centre=None, size=0, classes=1, seed=0):
            return MTL(deepcopy(net).requires_grad_(False), Nearest(len(base.weight)), centre)


def add_backbone():
    @register_backbone("two-layers")
    class TwoLayers(nn.Module):
        num_features = 16
        def __init__(self, seed=0):
            super().__init__()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.ReLU())
        def forward(self, x): return self.layers(x).mean((2, 3))


def add_dataset():
    @register_dataset("six-glyphs", "Six glyphs", native=32, mirror=False)
    def six_glyphs(): return {split: bank.subset(range(6)) for split, bank in glyphs(0).items()}


@pytest.fixture()
def registries(clean_registries):
    "What is registered within the test is forgotten after it."
    for add in add_method, add_backbone, add_dataset: add()


@pytest.mark.parametrize("add", [add_method, add_backbone, add_dataset])
def test_twenty_lines_are_enough(add):
    code = inspect.getsource(add).splitlines()[1:]
    assert len([line for line in code if line.strip()]) <= 20


def test_an_experiment_with_all_three(registries, tmp_path):
    banks = load_data("six-glyphs")
    config = preset("quick", data="six-glyphs", arch="two-layers", methods=("nearest support image",), eval_tasks=20,
                    select_tasks=20, shots=(1,), inner=(0.2, 3), query=3)
    config = replace(config, phase1=replace(config.phase1, epochs=1))
    results = run(config, banks, tmp_path/"run")
    assert [r["method"] for r in results["rows"]] == ["head only", "nearest support image"]
    assert results["data"]["name"] == "six-glyphs"
    assert results["recipe"]["arch"] == "two-layers"
    row = results["rows"][1]
    assert row["lr"] is None and row["steps"] is None and "paired" in row
    net, centre, record = load_backbone(tmp_path/"run/pretrain.safetensors")
    assert (type(net).__name__, record["arch"], centre.shape) == ("TwoLayers", "two-layers", (16,))
    assert parse_methods("mtl,nearest-support-image") == ("MTL", "nearest support image")


def test_nothing_is_left_of_it():
    assert "nearest support image" not in METHODS
    assert "two-layers" not in BACKBONES
    assert "six-glyphs" not in DATASETS
    assert len(METHODS) == 32 and get_method("mtl").label == "MTL"
