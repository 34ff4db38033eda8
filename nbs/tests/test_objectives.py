"What phase 1 minimises beyond cross-entropy: rotations that can be learnt, resuming, a teacher, input validation."
from itertools import islice

import pytest
import torch

from mtl_nb.core import BadInput
from mtl_nb.data.augment import AugmentConfig
from mtl_nb.data.bank import ImageBank
from mtl_nb.models.heads import Classifier
from mtl_nb.models.resnet12 import ResNet12
from mtl_nb.train.checkpoints import load_state, save_state
from mtl_nb.train.objectives import (DropBlock, ObjectiveConfig, make_objective, mix_images, rotate_some,
                                     use_dropblock)
from mtl_nb.train.pretrain import PretrainConfig, pretrain, pretrain_state

WIDTHS, ALL = (4, 4, 4, 8), ObjectiveConfig(rotation=.5, mixup=.4, dropblock=3, cosine=True)


@pytest.fixture(scope="module")
def bank(): # noise over a gradient from dark to bright: which way is up can be seen
    g = torch.Generator().manual_seed(0)
    ramp = torch.linspace(0, 200, 16)[:, None].expand(16, 16)
    x = (ramp + 55*torch.rand(64, 3, 16, 16, generator=g)).to(torch.uint8)
    return ImageBank(x, torch.arange(64) % 4, list("abcd"))


def start(cfg, objective, seed=0):
    net = use_dropblock(ResNet12(WIDTHS, .1, seed), objective.dropblock)
    return pretrain_state(net, 4, cfg, make=lambda *o: Classifier(*o, objective.cosine, objective.rotation > 0))


def same(a, b):
    return all(torch.equal(v, b.model.state_dict()[k]) for k, v in a.model.state_dict().items())


def test_the_rotation_is_learnt_where_it_can_be_seen(bank):
    objective, cfg = ObjectiveConfig(rotation=.75), PretrainConfig(epochs=30, batch=32, lr=.1, augment=None)
    state = start(cfg, objective)
    list(pretrain(state, bank, cfg, objective=make_objective(objective, 4)))
    x, r = rotate_some(bank.take(torch.arange(64)), .75, torch.Generator().manual_seed(1))
    with torch.no_grad(): predicted = state.model.eval()(x)[:, 4:].argmax(1)
    assert (predicted == r).float().mean() > .9


def test_resumed_is_never_stopped_with_everything_on(bank, tmp_path):
    cfg = PretrainConfig(epochs=3, batch=16, lr=.02, augment=AugmentConfig(2))
    teacher = start(cfg, ALL, 5).model.eval()
    def go(state): return pretrain(state, bank, cfg, objective=make_objective(ALL, 4, teacher))
    whole, part, rest = (start(cfg, ALL) for _ in range(3))
    records, first = list(go(whole)), list(islice(go(part), 1))
    save_state(tmp_path/"s", train=part)
    rest.load_state_dict(load_state(tmp_path/"s")["train"])
    before = torch.random.get_rng_state()
    assert first + list(go(rest)) == records and same(whole, rest)
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_teacher_is_not_trained(bank):
    cfg, objective = PretrainConfig(epochs=1, batch=16, lr=.1), ObjectiveConfig(rounds=2)
    teacher = start(cfg, objective, 1).model.eval()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    list(pretrain(start(cfg, objective), bank, cfg, objective=make_objective(objective, 4, teacher)))
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())


def test_gradient_of_the_mixture_is_the_mixture_of_gradients(bank):
    cfg, objective = PretrainConfig(smoothing=0.), ObjectiveConfig(mixup=1.)
    x, y = bank.take(torch.arange(16)), bank.y[:16]
    def g(): return torch.Generator().manual_seed(3)
    out = torch.randn(16, 4, requires_grad=True)
    loss, _ = make_objective(objective, 4)(lambda x: out, x, y, cfg, g())
    _, other, lam = mix_images(x, 1., g())
    aim = lam*torch.nn.functional.one_hot(y, 4) + (1 - lam)*torch.nn.functional.one_hot(y[other], 4)
    assert torch.allclose(torch.autograd.grad(loss, out)[0], (out.softmax(1) - aim).detach()/16, atol=1e-6)


@pytest.mark.parametrize("kw", [dict(rotation=-.1), dict(rotation=1.5), dict(mixup=-1.), dict(dropblock=-1),
    dict(rounds=0), dict(distill=2.), dict(temperature=0.)], ids=str)
def test_values_that_cannot_be(kw):
    with pytest.raises(BadInput, match=f"^objective: {next(iter(kw))} must be "): ObjectiveConfig(**kw)


def test_images_that_are_not_square():
    with pytest.raises(BadInput, match="square"): rotate_some(torch.rand(2, 3, 16, 20), .5, torch.Generator())


def test_drop_block_without_a_rate():
    with pytest.raises(BadInput, match="set dropout, too"): use_dropblock(ResNet12(WIDTHS), 3)


def test_drop_block_on_another_backbone():
    with pytest.raises(BadInput, match="this backbone has none"): use_dropblock(torch.nn.Flatten(), 3)
    net = torch.nn.Flatten()
    assert use_dropblock(net, 0) is net


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_drop_block_on_small_maps(size):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        out = DropBlock(.3, 5).train()(torch.ones(500, 2, size, size))
    assert out.shape == (500, 2, size, size) and out.isfinite().all()
    assert abs(out.mean() - 1) < 1e-3 and (out == 0).any()
