"The rows of the ablation table beyond their page: names, training tasks, files, seeds, what is left alone."
from copy import deepcopy
from itertools import islice

import pytest
import torch
import torch.nn.functional as F

from mtl_nb.core import BadInput
from mtl_nb.data.augment import AugmentConfig
from mtl_nb.data.episodes import TaskSampler, TaskShape
from mtl_nb.data.hard_tasks import HardTaskSampler
from mtl_nb.evaluation.exam import evaluate, evaluate_path, features, make_exam
from mtl_nb.methods.ablations import ABLATIONS, BatchStatistics, finetune, task_features
from mtl_nb.methods.base import evaluate_images, get_method, trained
from mtl_nb.models.base_learner import BaseLearner
from mtl_nb.models.scale_shift import scale_shift
from mtl_nb.train.checkpoints import load, save
from mtl_nb.train.distributed import Team
from mtl_nb.train.meta_train import MTL, MetaTrainConfig, meta_state, meta_train

ROWS = {m.label: m for m in ABLATIONS}
shape = TaskShape(5, 1, 2)


class Part(Team):
    "A rank whose share is not gathered with the others'."
    def all_gather(self, x, n): return x


def base(): return BaseLearner(8, 5, 0.1, 5)

def build(label, net, head, centre=None): return get_method(label).build(net, head, centre)

def outer(label, net, bank, seed=0, tasks=32, lr=None):
    row, model = get_method(label), build(label, net, base())
    cfg = MetaTrainConfig(tasks=tasks, batch=4, lr=lr or row.lr, augment=AugmentConfig(pad=1), seed=seed)
    source = row.task_sampler(bank.by_class, shape, 4, seed, hard_count=4)
    return model, source, list(meta_train(meta_state(model, cfg), source, bank, cfg))


@pytest.mark.parametrize("name", ["", "FT", "FT [Θ5;θ]", "mtl ", "MTL+HT", "ss [Θ;θ]"])
def test_unknown_row_is_refused_with_the_choices(name):
    with pytest.raises(BadInput) as e: get_method(name)
    assert "\n" not in str(e.value)
    assert f"no method '{name}'" in str(e.value)
    assert all(m.slug in str(e.value) for m in ABLATIONS)


def test_names_are_distinct_and_lead_to_their_row():
    names = [n for m in ABLATIONS for n in {m.label, m.slug, *m.aliases}]
    assert len(ABLATIONS) == 17 and len(names) == len(set(names))
    assert all(get_method(n) is m for m in ABLATIONS for n in (m.label, m.slug, m.paper_name))
    slugs = [m.slug for m in ABLATIONS]
    assert all(o.isascii() and o.replace("-", "").isalnum() and o == o.lower() for o in slugs)
    names = "SS [Θ;θ]", "SS [Θ;θ] + HT", "FT [Θ4;θ] + HT"
    assert [get_method(o).slug for o in names] == ["mtl", "mtl-ht", "ft-theta4-ht"]


def test_ht_rows_differ_from_their_twins_in_the_source_alone():
    names = dict.fromkeys(("label", "aliases", "slug", "hard"))
    hard = [m for m in ABLATIONS if m.hard]
    assert len(hard) == 5
    for row in hard:
        twin = ROWS[row.label.removesuffix(" + HT")]
        assert vars(row) | names == vars(twin) | names and type(row) is type(twin) and not twin.hard


def test_training_tasks_of_ht_rows():
    by_class, label = list(torch.arange(200).split(10)), torch.arange(20).repeat_interleave(10)
    for row in (m for m in ABLATIONS if m.meta):
        tasks, kinds = row.task_sampler(by_class, shape, 4, 3, hard_count=10), []
        twin = TaskSampler(by_class, shape, 4, 3)
        if row.hard: twin = HardTaskSampler(by_class, shape, 4, 3, 20, 10)
        for a, b in islice(zip(tasks, twin), 16):
            assert torch.equal(a, b)
            kinds += [tasks.hard]*len(a)
            classes = label[a[:, :, 0]]
            for o in tasks, twin: o.feedback(classes, (classes*7 % 5).float())
        assert kinds == ([False]*20 + [True]*10)*2 if row.hard else not any(kinds)


@pytest.mark.parametrize("label", [m.label for m in ABLATIONS if m.meta])
def test_trained_rows_through_a_file(label, net, bank, tmp_path):
    kept = {k: v.clone() for k, v in net.state_dict().items()}
    model, _, records = outer(label, net, bank)
    assert any(r["hard"] for r in records) == ROWS[label].hard
    save(tmp_path/"w.safetensors", trained(model), {"row": label})
    tensors, record = load(tmp_path/"w.safetensors")
    again = build(record["row"], net, base())
    assert {k: v.shape for k, v in trained(again).items()} == {k: v.shape for k, v in tensors.items()}
    assert not again.load_state_dict(tensors, strict=False).unexpected_keys
    exam = make_exam(bank, shape, tasks=5)
    assert torch.equal(evaluate_images(again, bank, exam), evaluate_images(model, bank, exam))
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(v, kept[k]) for k, v in net.state_dict().items())


def test_same_seed_same_row_another_seed_another(net, bank):
    def flat(seed):
        model, *_ = outer("SS [Θ;θ] + HT", net, bank, seed)
        return torch.cat([v.flatten() for v in trained(model).values()])
    torch.manual_seed(1)
    a = flat(0)
    torch.manual_seed(2)
    b = flat(0)
    assert torch.equal(a, b) and not torch.equal(a, flat(1))


def test_trained_is_a_copy(net):
    model = build("FT θ", net, base())
    before = trained(model)
    model.base.weight.data += 1
    assert before["base.weight"].abs().max() == 0


def test_the_lower_order_counts(net):
    def orders(label): return [build(label, net, BaseLearner(8, 5, 0.1, 5, order)).base.order for order in (1, 2)]
    assert (orders("SS [Θ;θ]"), orders("SS [Θ;θ], first order")) == ([1, 2], [1, 1])


def test_building_shares_nothing(net):
    head = base()
    one, two = (build("FT [Θ;θ]", net, head) for _ in range(2))
    for p in one.parameters(): p.data += 1
    assert not any(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters()))
    assert head.weight.abs().max() == 0 and head.order == 2
    assert build("SS [Θ;θ], first order", net, head).base.order == 1 and head.order == 2
    assert net.blocks[0].bn1.running_mean is not None
    assert build("update θ, batch statistics", net, head)
    assert net.blocks[0].bn1.running_mean is not None


class Foreign(torch.nn.Module):
    "A network whose layers have other names than those of our own."
    num_features = 8
    def __init__(self):
        super().__init__()
        self.stem, self.norm = torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)
    def forward(self, x): return self.norm(self.stem(x)).relu().mean((2, 3))


def test_any_backbone_is_trained_whatever_its_layers_are_called():
    trained = {o: {k for k, p in build(o, Foreign(), base()).named_parameters() if p.requires_grad}
               for o in ("MTL", "FT [Θ;θ]", "FT θ", "SS [Θ;θ], scale only")}
    head = {"base.weight", "base.bias"}
    assert trained["MTL"] == head | {"backbone.stem.scale", "backbone.stem.shift"}
    assert trained["FT [Θ;θ]"] == head | {f"backbone.{a}.{b}" for a in ("stem", "norm") for b in ("weight", "bias")}
    assert trained["FT θ"] == head and trained["SS [Θ;θ], scale only"] == head | {"backbone.stem.scale"}
    for label in "FT [Θ4;θ]", "SS [Θ4;θ]":
        with pytest.raises(BadInput, match="this backbone has no blocks"): build(label, Foreign(), base())


@pytest.mark.parametrize("label", ROWS)
def test_training_mode_leaves_the_backbone_in_evaluation_mode(label, net):
    model = build(label, net, base()).train()
    assert not any(m.training for m in model.backbone.modules())


def test_batch_statistics_against_a_network_in_training_mode(net, bank):
    model, g = build("SS [Θ;θ], batch statistics", net, base()), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.backbone.parameters():
            if p.requires_grad: p += .1*torch.randn(p.shape, generator=g)
    images = bank.take(next(TaskSampler(bank.by_class, shape, 3)))
    twin = scale_shift(net)
    for a, b in zip(twin.parameters(), model.backbone.parameters()): a.data = b.data.clone()
    for m in twin.modules():
        if isinstance(m, torch.nn.BatchNorm2d): m.train()
    for x, got in zip(images, model(images, shape)):
        f, q = twin(x[:, :1].flatten(0, 1)), twin(x[:, 1:].flatten(0, 1))
        assert torch.allclose(model.base(f[None], torch.arange(5)[None], q[None])[0], got, atol=1e-4)
    with pytest.raises(ValueError, match="no features of its own"): features(model.embed, bank)


@pytest.mark.parametrize("mirrored", [False, True])
def test_exams_by_images_agree_with_those_by_features(net, bank, mirrored):
    exam, model = make_exam(bank, shape, tasks=7), outer("SS [Θ;θ]", net, bank, lr=.01)[0]
    extra = features(model.embed, bank, mirror=True) if mirrored else None
    want = evaluate(features(model.embed, bank), exam, model.base, extra)
    assert torch.equal(evaluate_images(model, bank, exam, chunk=3, mirrored=mirrored), want)
    odd = build("update θ, batch statistics", net, base())
    f, own = task_features(odd, bank, exam, 3, mirrored)
    assert own.fingerprint == exam.fingerprint and len(own) == 7 and f.dtype == torch.float32
    assert torch.equal(evaluate(f, own, odd.base), evaluate_images(odd, bank, exam, mirrored=mirrored))


@pytest.mark.parametrize("mirrored", [False, True])
def test_finetune_is_a_loop_over_tasks(net, bank, mirrored):
    exam, model = make_exam(bank, shape, tasks=3), build("update [Θ;θ]", net, base(), torch.full((8,), .1))
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    got, again = (finetune(model, bank, exam, 0.05, [0, 2, 4], chunk=c, mirrored=mirrored) for c in (2, 3))
    assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items())
    assert torch.equal(got, again) # the same query twice, the same answer
    for t, idx in enumerate(exam.idx):
        twin, x = deepcopy(model).requires_grad_(True), bank.take(idx)
        head, backbone = dict(params=twin.base.parameters(), lr=twin.base.lr), dict(params=twin.backbone.parameters())
        sgd = torch.optim.SGD([head, backbone], lr=0.05)
        def answer(o): return twin.embed(o.flatten(0, 1)) @ twin.base.weight.T + twin.base.bias
        support = torch.cat([x[:, :1], x[:, :1].flip(-1)], 1) if mirrored else x[:, :1]
        for s in range(5):
            if s % 2 == 0: assert (answer(x[:, 1:]).argmax(1) == shape.labels(2)).sum() == got[s//2, t]
            sgd.zero_grad()
            F.cross_entropy(answer(support), shape.labels(support.shape[1])).backward()
            sgd.step()


def test_finetune_at_rate_zero_is_head_only(net, bank):
    exam, model = make_exam(bank, shape, tasks=6), build("update [Θ;θ]", net, base())
    want = evaluate_path(features(model.embed, bank), exam, model.base, model.base.lr, [1, 5])
    assert torch.equal(finetune(model, bank, exam, 0., [1, 5]), want)
    with pytest.raises(ValueError, match="ascend"): finetune(model, bank, exam, 0., [5, 1])


def test_processes_share_the_tasks(net, bank):
    exam, whole = make_exam(bank, shape, tasks=7), build("update [Θ;θ]", net, base())
    odd, parts = build("update θ, batch statistics", net, base()), [Part(r, 3) for r in range(3)]
    got = torch.cat([finetune(whole, bank, exam, .01, [1, 2], team=p) for p in parts], 1)
    assert torch.equal(got, finetune(whole, bank, exam, .01, [1, 2]))
    got = torch.cat([evaluate_images(odd, bank, exam, team=p) for p in parts])
    assert torch.equal(got, evaluate_images(odd, bank, exam))
    got = torch.cat([task_features(odd, bank, exam, team=p)[0] for p in parts])
    assert torch.equal(got, task_features(odd, bank, exam)[0])
    one = exam.first(1) # more processes than tasks
    assert finetune(whole, bank, one, .01, [1], team=parts[0]).shape == (1, 0)
    def twice(x, shape): return torch.stack([odd(x, shape)]*2)
    assert torch.equal(evaluate_images(odd, bank, exam, call=twice), evaluate_images(odd, bank, exam).expand(2, -1))
    shapes = [evaluate_images(odd, bank, one, team=parts[0], call=c).shape for c in (None, twice)]
    assert shapes == [(0,), (2, 0)]


def test_batch_statistics_is_an_mtl(net):
    assert isinstance(build("SS [Θ;θ], batch statistics", net, base()), BatchStatistics)
    assert issubclass(BatchStatistics, MTL)


def adapted_by_autograd(model, task, order, ys):
    "The head after four steps at rate 0.3 on one task's support set, and the query features."
    fs, fq = (model.backbone(x.flatten(0, 1)) for x in (task[:, :2], task[:, 2:]))
    if order == 1: fs = fs.detach()
    w, b = model.base.weight, model.base.bias
    for _ in range(4):
        steps = torch.autograd.grad(F.cross_entropy(fs @ w.T + b, ys), [w, b], create_graph=True)
        if order == 1: steps = [o.detach() for o in steps]
        w, b = w - 0.3*steps[0], b - 0.3*steps[1]
    return w, b, fq


@pytest.mark.parametrize("label", [m.label for m in ABLATIONS if m.meta and m.caches_features and not m.hard])
def test_outer_gradient_against_a_loop_written_out(label, net, bank):
    "Everything that a row may move, against steps of gradient descent in plain autograd, one task after the other."
    row, shape, moved = get_method(label), TaskShape(3, 2, 4), BaseLearner(net.num_features, 3, 0.3, 4)
    with torch.no_grad():
        for p in moved.parameters(): p.normal_(0, .2, generator=torch.Generator().manual_seed(1))
    model, images = build(label, deepcopy(net), moved), bank.take(next(TaskSampler(bank.by_class, shape, 2)))
    free, (ys, yq), total = [p for p in model.parameters() if p.requires_grad], (shape.labels(o) for o in (2, 4)), 0.
    loss = sum(F.cross_entropy(z, yq) for z in model(images, shape))
    for task in images:
        w, b, fq = adapted_by_autograd(model, task, row.order, ys)
        total = total + F.cross_entropy(fq @ w.T + b, yq)
    pairs = list(zip(*(torch.autograd.grad(o, free) for o in (loss, total))))
    most = max(b.abs().max() for _, b in pairs)
    assert most > 1e-3 and all((a - b).abs().max() < 1e-4*most for a, b in pairs)
