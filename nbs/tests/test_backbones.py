"Backbones: the contract, the registry, and a stranger's network from its name to features, scales and shifts."
import inspect
import subprocess
import sys

import pytest
import torch
from torch import nn

from mtl_nb.core import BadInput
from mtl_nb.models.backbones import BACKBONES, backbone_names, build_backbone, check_backbone, register_backbone
from mtl_nb.models.convnet4 import ConvNet4
from mtl_nb.models.heads import Classifier
from mtl_nb.models.resnet12 import ResNet12
from mtl_nb.models.scale_shift import scale_shift, ss_parameters

@pytest.fixture
def registry():
    "The registry, as it was before once the test is over."
    backbone_names()
    before = dict(BACKBONES)
    yield BACKBONES
    BACKBONES.clear()
    BACKBONES.update(before)

class Net(nn.Module):
    def __init__(self, forward=lambda x: x.mean((2, 3)), num_features=3):
        super().__init__()
        self.forward, self.num_features = forward, num_features

def test_the_package_finds_its_own_backbones():
    code = "from mtl_nb.models.backbones import backbone_names; print(*backbone_names())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(out.stdout.split()) == {"resnet12", "convnet4"}

@pytest.mark.parametrize("net, message", [
    (lambda x: x, "must be a torch.nn.Module, got function"),
    (Net(num_features=None), "has no num_features"),
    (Net(num_features=True), "has no num_features"),
    (Net(num_features=0), "has no num_features"),
    (Net(num_features=4), r"must return \[2, 4\] for \[2, 3, 32, 32\], got \[2, 3\]"),
    (Net(lambda x: x), r"got \[2, 3, 32, 32\]"),
    (Net(lambda x: (x.mean((2, 3)),)), "got tuple"),
    (Net(lambda x: x.mean((2, 3)).squeeze()), r"must return \[1, 3\] for \[1, 3, 32, 32\], got \[3\]"),
    (Net(lambda x: x.mean((2, 3)).long()), "floating-point features, got torch.int64"),
    (Net(lambda x: x.mean((2, 3))/0), "not finite"),
    (Net(lambda x: x.mean((2, 3)) - x.mean((0, 2, 3))), "must not depend on the others of its batch"),
    (nn.Sequential(), "has no num_features"),
    (Net(lambda x: x @ torch.zeros(5, 5)), r"cannot take pictures of shape .* \(RuntimeError: "),
])
def test_what_breaks_the_contract(net, message):
    with pytest.raises(BadInput, match=message) as e: check_backbone(net, 32, "backbone 'mine'")
    assert str(e.value).startswith("backbone 'mine'") and "\n" not in str(e.value)

def test_the_check_changes_nothing():
    net = ResNet12((4, 4, 4, 8), dropout=.5)
    net.blocks[1].eval()
    modes, before = [m.training for m in net.modules()], {k: v.clone() for k, v in net.state_dict().items()}
    state = torch.get_rng_state()
    assert check_backbone(net) == 8
    assert [m.training for m in net.modules()] == modes and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert torch.is_grad_enabled() and all(p.requires_grad and p.grad is None for p in net.parameters())

def test_modes_are_restored_after_a_failure():
    net = Net(lambda x: x).train()
    with pytest.raises(BadInput): check_backbone(net)
    assert net.training and torch.is_grad_enabled()

def test_built_as_by_hand():
    state = torch.get_rng_state()
    net = build_backbone("resnet12", widths=(4, 4, 4, 8), dropout=.1, size=32, seed=3)
    same = ResNet12((4, 4, 4, 8), .1, 3)
    assert net.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), same.state_dict().values(), strict=True))
    assert build_backbone("convnet4", widths=(4, 4, 4, 8), size=48, seed=3).num_features == 32*3*3
    assert build_backbone("convnet4", size=None).num_features == build_backbone("convnet4", size=0).num_features == 32

def test_an_unknown_name():
    with pytest.raises(BadInput, match=r"no backbone 'resnet-12' \(did you mean resnet12\?\): choose one of"):
        build_backbone("resnet-12")

def test_a_name_is_used_once(registry):
    with pytest.raises(BadInput, match="there is a backbone 'resnet12' already"):
        @register_backbone("resnet12")
        class Other(ResNet12): pass
    assert registry["resnet12"] is ResNet12
    assert register_backbone("resnet12")(ResNet12) is ResNet12 # the same once more, as when a cell is run again

def test_a_maker_gets_what_it_takes_and_no_more(registry):
    @register_backbone("mine")
    def mine(seed=0, *, size=0, **rest):
        assert (seed, size, rest) == (5, 40, {})
        return Net()
    assert isinstance(build_backbone("mine", widths=(1, 2), dropout=.1, size=40, seed=5), Net)
    registry["mine"] = lambda depth: Net()
    with pytest.raises(BadInput, match="backbone 'mine': its parameter 'depth' needs a default"): build_backbone("mine")
    registry["mine"] = lambda: Net(num_features=4)
    with pytest.raises(BadInput, match="backbone 'mine' must return"): build_backbone("mine")

def test_a_strangers_backbone_in_twenty_lines(registry):
    @register_backbone("mixer")
    class Mixer(nn.Module):
        def __init__(self, dropout=0., seed=0):
            super().__init__()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.stem, self.mix = nn.Conv2d(3, 12, 4, 4), nn.Conv2d(12, 12, 3, padding=1)
            self.drop, self.num_features = nn.Dropout(dropout), 12
        def forward(self, x):
            x = self.stem(x).relu()
            return self.drop(x + self.mix(x).relu()).mean((2, 3))
    assert len(inspect.getsource(Mixer).splitlines()) <= 20 and "mixer" in backbone_names()
    net = build_backbone("mixer", widths=(1,), dropout=.2, size=32, seed=1)
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert Classifier(net, 7)(x).shape == (4, 7)
    ss = scale_shift(net)
    assert torch.equal(ss(x), net.eval()(x)) and len(list(ss_parameters(ss))) == 4

@pytest.mark.parametrize("shape", [(2, 3, 15, 16), (2, 1, 32, 32), (3, 32, 32)])
def test_convnet4_rejects_other_shapes(shape):
    with pytest.raises(BadInput, match="ConvNet4 takes"): ConvNet4(4)(torch.zeros(shape))

def test_convnet4_of_one_size():
    with pytest.raises(BadInput, match="at least 16 pixels a side, got 8"): ConvNet4(4, size=8)
    with pytest.raises(BadInput, match="made for 32 pixels a side"): ConvNet4(4, size=32)(torch.zeros(1, 3, 16, 16))
    assert list(ConvNet4(4).state_dict())[:3] == ["blocks.0.0.weight", "blocks.0.0.bias", "blocks.0.1.weight"]
