"What is added to phase 1: turns that can be learnt, shares, stops, a teacher, words for what cannot be."
from itertools import islice

import pytest
import torch

from mtl_nb.train.checkpoints import load_state, save_state
from mtl_nb.core import BadInput
from mtl_nb.data.bank import ImageBank
from mtl_nb.train.pretrain import PretrainConfig, pretrain, pretrain_state
from mtl_nb.models.resnet12 import ResNet12
from mtl_nb.train.objectives import DropBlock, ObjectiveConfig, RotationClassifier, mix_images, make_objective, rotate_some, use_dropblock

WIDTHS, ALL = (4, 4, 4, 8), ObjectiveConfig(turns=.5, mixup=.4, block=3, cosine=True)


@pytest.fixture(scope="module")
def bank(): # noise over a slope from dark to bright: which way is up can be seen
    g = torch.Generator().manual_seed(0)
    slope = torch.linspace(0, 200, 16)[:, None].expand(16, 16)
    return ImageBank((slope + 55*torch.rand(64, 3, 16, 16, generator=g)).to(torch.uint8), torch.arange(64) % 4, list("abcd"))


def start(cfg, extras, seed=0): return pretrain_state(use_dropblock(ResNet12(WIDTHS, .1, seed), objective.dropblock), 4, cfg, make=lambda *o: RotationClassifier(*o, extras))
def same(a, b): return all(torch.equal(v, b.model.state_dict()[k]) for k, v in a.model.state_dict().items())


def test_the_turn_is_learnt_where_it_can_be_seen(bank):
    extras, cfg = ObjectiveConfig(turns=.75), PretrainConfig(epochs=30, batch=32, lr=.1, augment=None)
    state = start(cfg, extras)
    list(pretrain(state, bank, cfg, objective=make_objective(extras, 4)))
    x, r = rotate_some(bank.take(torch.arange(64)), .75, torch.Generator().manual_seed(1))
    with torch.no_grad(): said = state.model.eval()(x)[:, 4:].argmax(1)
    assert (said == r).float().mean() > .9


def test_resumed_is_never_stopped_with_everything_on(bank, tmp_path):
    cfg = PretrainConfig(epochs=3, batch=16, lr=.02, augment=dict(pad=2, flip=True))
    teacher = start(cfg, ALL, 5).model.eval()
    go = lambda s: pretrain(s, bank, cfg, objective=make_objective(ALL, 4, teacher))
    whole, part, rest = (start(cfg, ALL) for _ in range(3))
    records, first = list(go(whole)), list(islice(go(part), 1))
    save_state(tmp_path/"s", train=part)
    rest.load_state_dict(load_state(tmp_path/"s")["train"])
    before = torch.random.get_rng_state()
    assert first + list(go(rest)) == records and same(whole, rest)
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_teacher_is_not_trained(bank):
    cfg, extras = PretrainConfig(epochs=1, batch=16, lr=.1), ObjectiveConfig(generations=2)
    teacher = start(cfg, extras, 1).model.eval()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    list(pretrain(start(cfg, extras), bank, cfg, objective=make_objective(extras, 4, teacher)))
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items()) and all(p.grad is None for p in teacher.parameters())


def test_gradient_of_the_mixture_is_the_mixture_of_gradients(bank):
    cfg, extras = PretrainConfig(smoothing=0.), ObjectiveConfig(mixup=1.)
    x, y, g = bank.take(torch.arange(16)), bank.y[:16], lambda: torch.Generator().manual_seed(3)
    out = torch.randn(16, 4, requires_grad=True)
    loss, _ = make_objective(extras, 4)(lambda x: out, x, y, cfg, g())
    _, other, lam = mix_images(x, 1., g())
    aim = lam*torch.nn.functional.one_hot(y, 4) + (1 - lam)*torch.nn.functional.one_hot(y[other], 4)
    assert torch.allclose(torch.autograd.grad(loss, out)[0], (out.softmax(1) - aim).detach()/16, atol=1e-6)


@pytest.mark.parametrize("kw", [dict(turns=-.1), dict(turns=1.5), dict(mixup=-1.), dict(block=-1), dict(generations=0), dict(distill=2.), dict(temperature=0.)])
def test_refused_in_words(kw):
    with pytest.raises(BadInput, match=next(iter(kw))): ObjectiveConfig(**kw)


def test_images_that_are_not_square():
    with pytest.raises(BadInput, match="square"): rotate_some(torch.rand(2, 3, 16, 20), .5, torch.Generator())


def test_drop_block_without_a_rate():
    with pytest.raises(BadInput, match="drop"): use_dropblock(ResNet12(WIDTHS), 3)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_drop_block_on_small_maps(size):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        out = DropBlock(.3, 5).train()(torch.ones(500, 2, size, size))
    assert out.shape == (500, 2, size, size) and out.isfinite().all() and abs(out.mean() - 1) < 1e-3 and (out == 0).any()
