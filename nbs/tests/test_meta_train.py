"Phase 2 beyond its page: resume, budgets, rates, what must stay untouched."
import pytest
import torch
from torch import nn

from mtl_nb.core import BadInput
from mtl_nb.data.augment import AugmentConfig
from mtl_nb.data.bank import ImageBank
from mtl_nb.data.episodes import TaskSampler, TaskShape
from mtl_nb.data.hard_tasks import HardTaskSampler
from mtl_nb.models.base_learner import BaseLearner
from mtl_nb.models.resnet12 import ResNet12
from mtl_nb.models.scale_shift import scale_shift
from mtl_nb.train.checkpoints import load_state, save_state
from mtl_nb.train.meta_train import MTL, MetaTrainConfig, meta_state, meta_train

shape = TaskShape(3, 1, 2)
CROP = AugmentConfig(2, jitter=.2)

@pytest.fixture(scope="module")
def bank():
    x = torch.randint(0, 256, (48, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return ImageBank(x, torch.arange(8).repeat_interleave(6), [f"c{i}" for i in range(8)])

def new(cfg, backbone=None, order=2, centre=None):
    net = backbone or scale_shift(ResNet12((4, 4, 4, 8)).eval())
    return meta_state(MTL(net, BaseLearner(8, 3, 0.1, 5, order), centre), cfg)

def random_tasks(bank, batch=2, source=TaskSampler): return source(bank.by_class, shape, batch, 0)
def hard(bank, batch=2, seed=0): return HardTaskSampler(bank.by_class, shape, batch, seed, random=4, hard_count=3)
def tensors(state): return {k: v.clone() for k, v in state.model.state_dict().items()}
def same(a, b): return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)
def changed(state, before): return {k for k, v in state.model.state_dict().items() if not torch.equal(v, before[k])}

def plain(records):
    return [{k: v.tolist() if torch.is_tensor(v) else v for k, v in r.items()} for r in records]

@pytest.mark.parametrize("stop", [2, 4, 7, 11])
def test_killed_and_resumed_is_never_killed(bank, tmp_path, stop):
    cfg = MetaTrainConfig(tasks=21, batch=2, halve=6, augment=CROP, seed=3)
    whole, tasks = new(cfg), hard(bank)
    all_of_it = plain(meta_train(whole, tasks, bank, cfg))
    first, tasks = new(cfg), hard(bank)
    records = []
    for r in meta_train(first, tasks, bank, cfg):
        records.append(r)
        if len(records) == stop: break
    save_state(tmp_path/"s.safetensors", train=first, tasks=tasks)
    second, again, saved = new(cfg), hard(bank, seed=99), load_state(tmp_path/"s.safetensors")
    second.load_state_dict(saved["train"])
    again.load_state_dict(saved["tasks"])
    assert plain(records) + plain(meta_train(second, again, bank, cfg)) == all_of_it
    assert same(tensors(second), tensors(whole))
    assert torch.equal(again.g.get_state(), tasks_state(all_of_it, bank))

def tasks_state(records, bank):
    "Where the generator of a hard-task sampler stands after the feedback of these records."
    tasks = hard(bank)
    for r in records:
        idx = next(tasks)[:len(r["by_class"])]
        tasks.feedback(bank.y[idx[:, :, 0]], torch.tensor(r["by_class"]))
    return tasks.g.get_state()

@pytest.mark.parametrize("source", [TaskSampler, HardTaskSampler])
@pytest.mark.parametrize("tasks", [1, 9, 25])
def test_a_budget_is_kept_to_the_task(bank, source, tasks):
    cfg = MetaTrainConfig(tasks=tasks, batch=4)
    state = new(cfg)
    records = list(meta_train(state, random_tasks(bank, 4, source), bank, cfg))
    assert state.done == tasks == sum(len(r["by_class"]) for r in records)
    assert [r["tasks"] for r in records] == torch.tensor([len(r["by_class"]) for r in records]).cumsum(0).tolist()
    assert list(meta_train(state, random_tasks(bank, 4, source), bank, cfg)) == []

def test_rates_are_halved_by_tasks_down_to_the_floor(bank):
    cfg = MetaTrainConfig(tasks=24, batch=2, lr=1e-2, head_lr=4e-3, halve=4, floor=.1)
    state = new(cfg)
    seen = [[g["lr"] for g in state.opt.param_groups] for _ in meta_train(state, random_tasks(bank), bank, cfg)]
    share = [max(.1, .5**(t//4)) for t in range(0, 24, 2)]
    assert torch.allclose(torch.tensor(seen), torch.tensor([[1e-2*s, 4e-3*s] for s in share]))
    assert share[-1] == .1

@pytest.mark.parametrize("spoilt", ["base.weight", "backbone.blocks.3.conv3.shift"])
def test_no_step_on_a_loss_that_is_nan(bank, spoilt):
    cfg = MetaTrainConfig(tasks=4, batch=2)
    state = new(cfg)
    state.model.get_parameter(spoilt).data[0] = float("nan")
    before = tensors(state)
    with pytest.raises(BadInput, match="^phase 2 has diverged: after 0 tasks, at rates 0.001 and 0.001") as e:
        next(meta_train(state, random_tasks(bank), bank, cfg))
    assert "\n" not in str(e.value) and state.done == 0
    assert all(torch.equal(v.nan_to_num(), state.model.state_dict()[k].nan_to_num()) for k, v in before.items())

def test_statistics_stay_even_if_somebody_calls_train(bank):
    cfg = MetaTrainConfig(tasks=4, batch=2)
    state = new(cfg)
    before = tensors(state)
    for _ in meta_train(state, random_tasks(bank), bank, cfg):
        for mode in (True, False, True): state.model.train(mode)
    expected = {k for k in before if k.endswith((".scale", ".shift")) or k.startswith("base.")}
    assert changed(state, before) == expected and not state.model.training

def test_a_backbone_with_nothing_to_train_leaves_the_head(bank):
    cfg = MetaTrainConfig(tasks=4, batch=2)
    state = new(cfg, ResNet12((4, 4, 4, 8)).requires_grad_(False))
    before = tensors(state)
    list(meta_train(state, random_tasks(bank), bank, cfg))
    assert changed(state, before) == {"base.weight", "base.bias"}

def test_any_backbone(bank):
    cfg = MetaTrainConfig(tasks=4, batch=2)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for backbone in (scale_shift(net), net):
        state = new(cfg, backbone)
        before = tensors(state)
        list(meta_train(state, random_tasks(bank), bank, cfg))
        assert changed(state, before) == {k for k, p in state.model.named_parameters() if p.requires_grad}

def test_rates_of_zero_and_orders(bank):
    out = {}
    for order in 1, 2:
        cfg = MetaTrainConfig(tasks=6, batch=2, head_lr=0.)
        state = new(cfg, order=order)
        list(meta_train(state, random_tasks(bank), bank, cfg))
        assert not state.model.base.weight.any() and not state.model.base.bias.any()
        out[order] = tensors(state)
    assert not same(out[1], out[2])

def test_centred_features_have_length_4_and_the_centre_stays(bank):
    cfg, centre = MetaTrainConfig(tasks=4, batch=2), torch.full((8,), .1)
    state = new(cfg, centre=centre)
    list(meta_train(state, random_tasks(bank), bank, cfg))
    assert torch.equal(state.model.centre, torch.full((8,), .1))
    assert torch.allclose(state.model.embed(bank.take(torch.arange(5))).norm(dim=1), torch.tensor(4.), atol=1e-5)

def test_nothing_touches_the_global_generator(bank):
    cfg = MetaTrainConfig(tasks=8, batch=2, augment=CROP)
    torch.manual_seed(0)
    want = torch.rand(3)
    torch.manual_seed(0)
    list(meta_train(new(cfg), hard(bank), bank, cfg))
    assert torch.equal(torch.rand(3), want)

def test_augmentation_comes_from_the_state_alone(bank):
    def losses(seed, augment):
        cfg = MetaTrainConfig(tasks=4, batch=2, augment=augment, seed=seed)
        return [r["loss"] for r in meta_train(new(cfg), random_tasks(bank), bank, cfg)]
    some = AugmentConfig(2)
    assert losses(0, some) == losses(0, some) != losses(1, some)
    assert losses(0, None) == losses(1, None) != losses(0, some)

def test_a_compiled_model_gives_the_same(bank):
    cfg = MetaTrainConfig(tasks=8, batch=2)
    one, other = new(cfg), new(cfg)
    a = plain(meta_train(one, hard(bank), bank, cfg))
    b = plain(meta_train(other, hard(bank), bank, cfg, call=torch.compile(other.model, backend="eager")))
    assert a == b and same(tensors(one), tensors(other))

@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_compiled_model_on_a_gpu(bank):
    cfg = MetaTrainConfig(tasks=4, batch=2)
    state = new(cfg)
    state.model.to("cuda")
    compiled = torch.compile(state.model, backend="eager")
    records = list(meta_train(state, random_tasks(bank), bank.to("cuda"), cfg, call=compiled))
    assert [r["tasks"] for r in records] == [2, 4] and all(0 < r["loss"] < 10 for r in records)

@pytest.mark.parametrize("parts", [1, 2, 3])
def test_parts_are_augmented_as_the_whole_batch(bank, parts):
    def go(tasks_at_once):
        cfg = MetaTrainConfig(tasks=10, batch=4, augment=CROP)
        state = new(cfg)
        records = list(meta_train(state, random_tasks(bank, 4), bank, cfg, tasks_at_once))
        return [r["loss"] for r in records], state.g.get_state()
    (whole, g), (split, h) = go(0), go(parts)
    assert torch.allclose(torch.tensor(whole), torch.tensor(split), atol=1e-4) and torch.equal(g, h)

@pytest.mark.parametrize("kw,says", [
    (dict(tasks=0), "tasks must be at least 1, got 0"), (dict(batch=0), "batch must be at least 1"),
    (dict(lr=-1.), "lr must be from 0 to 1000"), (dict(lr=1e38), "lr must be from 0 to 1000, got 1e\\+38"),
    (dict(head_lr=float("nan")), "head_lr must be from 0 to 1000, got nan"), (dict(head_lr=1e38), "head_lr must be"),
    (dict(halve=0), "halve must be at least 1"), (dict(floor=2.), "floor must be from 0 to 1, got 2.0"),
    (dict(augment=dict(pad=4)), "augment must be an AugmentConfig or None"),
], ids=str)
def test_values_that_cannot_be(kw, says):
    with pytest.raises(BadInput, match=f"^phase2: {says}") as e: MetaTrainConfig(**kw)
    assert "\n" not in str(e.value)
