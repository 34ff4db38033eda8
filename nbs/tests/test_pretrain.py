"Phase 1: stopped anywhere and resumed, random numbers of dropout, odd sizes, values that cannot be."
from dataclasses import replace
from itertools import islice

import pytest
import torch

from mtl_nb.core import BadInput
from mtl_nb.data.bank import ImageBank
from mtl_nb.models.heads import Classifier
from mtl_nb.models.resnet12 import ResNet12
from mtl_nb.train.checkpoints import load_state, save_state
from mtl_nb.train.pretrain import PretrainConfig, kept_weights, learning_rate, pretrain, pretrain_state

WIDTHS = (4, 4, 4, 8)


@pytest.fixture(scope="module")
def bank():
    x = torch.randint(0, 256, (48, 3, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    return ImageBank(x, torch.arange(48) % 4, list("abcd"))


def start(cfg, dropout=0.): return pretrain_state(ResNet12(WIDTHS, dropout), 4, cfg)


def same(a, b):
    return all(torch.equal(v, b.model.state_dict()[k]) for k, v in a.model.state_dict().items())


@pytest.mark.parametrize("adam, ema", [(False, 0.), (True, 0.), (False, .9)])
@pytest.mark.parametrize("stop", [0, 1, 3])
def test_resumed_is_never_stopped(bank, tmp_path, adam, ema, stop):
    cfg = PretrainConfig(epochs=3, batch=16, lr=.01, adam=adam, ema=ema)
    whole, part, rest = (start(cfg, .2) for _ in range(3))
    records = list(pretrain(whole, bank, cfg))
    first = list(islice(pretrain(part, bank, cfg), stop))
    save_state(tmp_path/"s", train=part)
    rest.load_state_dict(load_state(tmp_path/"s")["train"])
    assert first + list(pretrain(rest, bank, cfg)) == records and same(whole, rest)
    a, b = (kept_weights(o).state_dict() for o in (whole, rest))
    assert all(torch.equal(v, b[k]) for k, v in a.items())


def test_the_running_mean(bank):
    cfg = PretrainConfig(epochs=3, batch=48, lr=.1, ema=.75) # one step an epoch
    state, weights = start(cfg), []
    for _ in pretrain(state, bank, cfg): weights.append(state.model.net.blocks[0].conv1.weight.detach().clone())
    mean = weights[0]
    for w in weights[1:]: mean = .75*mean + .25*w
    kept = kept_weights(state)
    assert torch.allclose(kept.net.blocks[0].conv1.weight, mean, atol=1e-6) and not torch.equal(mean, weights[-1])
    assert not kept.training and not any(p.requires_grad for p in kept.parameters())
    with pytest.raises(BadInput, match="ema must be"): PretrainConfig(ema=1.)


def test_the_running_mean_changes_nothing_in_training(bank):
    cfg = PretrainConfig(epochs=2, batch=16, lr=.1)
    plain, averaged = start(cfg), start(replace(cfg, ema=.9))
    assert list(pretrain(plain, bank, cfg)) == list(pretrain(averaged, bank, replace(cfg, ema=.9)))
    assert same(plain, averaged)


def test_the_global_generator_plays_no_part(bank):
    cfg, states = PretrainConfig(epochs=1, batch=16, lr=.1), []
    for seed in 0, 1:
        torch.manual_seed(seed)
        states.append(start(cfg, .5))
        before = torch.random.get_rng_state()
        list(pretrain(states[-1], bank, cfg))
        assert torch.equal(torch.random.get_rng_state(), before)
    assert same(*states)


def test_seed_matters(bank):
    cfg = PretrainConfig(epochs=1, batch=48, lr=.1, augment=None) # one step on all images: only dropout is drawn
    a, b = start(cfg, .5), start(replace(cfg, seed=1), .5)
    b.model.load_state_dict(a.model.state_dict())
    (one,), (two,) = (list(pretrain(s, bank, c)) for s, c in ((a, cfg), (b, replace(cfg, seed=1))))
    assert one["loss"] != two["loss"]


def test_without_dropout_it_does_not(bank):
    cfg, losses = PretrainConfig(epochs=1, batch=48, lr=.1, augment=None), []
    for seed in 0, 1:
        s = start(replace(cfg, seed=seed))
        s.model.load_state_dict(start(cfg).model.state_dict())
        losses.append(next(pretrain(s, bank, replace(cfg, seed=seed)))["loss"])
    assert abs(losses[0] - losses[1]) < 1e-4


@pytest.mark.parametrize("batch,steps", [(48, 1), (20, 2), (500, 1)])
def test_odd_batches(bank, batch, steps):
    cfg = PretrainConfig(epochs=1, batch=batch, lr=.01)
    state = start(cfg)
    record, = pretrain(state, bank, cfg)
    assert 0 <= record["accuracy"] <= 1 and not state.model.training
    assert state.model.net.blocks[0].bn1.num_batches_tracked == steps


def test_done_is_done(bank):
    cfg = PretrainConfig(epochs=1, batch=16)
    state = start(cfg)
    assert len(list(pretrain(state, bank, cfg))) == 1 and list(pretrain(state, bank, cfg)) == []


def test_loss_that_is_nan(bank):
    cfg = PretrainConfig(epochs=2, batch=16)
    state = start(cfg)
    with torch.no_grad(): state.model.head.bias.fill_(float("nan"))
    with pytest.raises(BadInput, match="^phase 1 has diverged: in epoch 1, at rates up to 0.2, .* lower phase1.lr"):
        list(pretrain(state, bank, cfg))
    assert state.done == 0


@pytest.mark.parametrize("warmup", [0., .25, 1.])
def test_one_cycle(warmup):
    cfg = PretrainConfig(lr=.4, warmup=warmup)
    rates = [learning_rate(cfg, i, 100) for i in range(100)]
    peak = rates.index(max(rates))
    assert 0 < min(rates) and max(rates) <= .4
    assert rates[:peak + 1] == sorted(rates[:peak + 1]) and rates[peak:] == sorted(rates[peak:], reverse=True)
    assert learning_rate(cfg, 0, 1) > 0 # a run of one step still learns


def test_head_from_its_own_seed():
    net = ResNet12(WIDTHS)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    a, b, c = Classifier(net, 4, 0), Classifier(net, 4, 0), Classifier(net, 4, 1)
    assert torch.equal(a.head.weight, b.head.weight) and not torch.equal(a.head.weight, c.head.weight)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_compiled_model_gives_the_same(bank):
    cfg, plain, other = PretrainConfig(epochs=2, batch=16, lr=.01), start(PretrainConfig()), start(PretrainConfig())
    compiled = torch.compile(other.model, backend="eager")
    assert list(pretrain(plain, bank, cfg)) == list(pretrain(other, bank, cfg, call=compiled))
    assert same(plain, other)


@pytest.mark.parametrize("kw,says", [
    (dict(epochs=-1), "epochs must not be negative, got -1"), (dict(batch=1), "batch must be at least 2, got 1"),
    (dict(lr=0.), "lr must be above 0"), (dict(lr=float("nan")), "lr must be above 0 and at most 1000, got nan"),
    (dict(lr=float("inf")), "lr must be above 0"), (dict(weight_decay=-1.), "weight_decay must be from 0 to 1000"),
    (dict(lr=1e38), "lr must be above 0 and at most 1000, got 1e\\+38"), (dict(weight_decay=1e38), "weight_decay must"),
    (dict(smoothing=1.), "smoothing must be at least 0 and below 1"), (dict(warmup=1.5), "warmup must be from 0 to 1"),
    (dict(halve=0), "halve must be at least 1"), (dict(bn_splits=0), "bn_splits must be at least 1"),
    (dict(augment=dict(pad=4)), "augment must be an AugmentConfig or None, got {'pad': 4}"),
], ids=str)
def test_values_that_cannot_be(kw, says):
    with pytest.raises(BadInput, match=f"^phase1: {says}") as e: PretrainConfig(**kw)
    assert "\n" not in str(e.value)
