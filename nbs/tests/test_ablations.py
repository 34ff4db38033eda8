"The rows of the ablation table beyond their page: names, streams, files, seeds, what is left alone."
from copy import deepcopy
from itertools import islice

import pytest
import torch
import torch.nn.functional as F

from mtl_nb.methods.ablations import ALIASES, ROWS, BatchStatistics, build, evaluate_images, find_row, finetune, slug, task_features, trained
from mtl_nb.models.base_learner import BaseLearner
from mtl_nb.train.checkpoints import load, save
from mtl_nb.core import BadInput
from mtl_nb.train.distributed import Team
from mtl_nb.data.episodes import TaskSampler, TaskShape
from mtl_nb.evaluation.exam import evaluate, evaluate_path, features, make_exam
from mtl_nb.data.hard_tasks import HardTaskSampler
from mtl_nb.train.meta_train import MTL, MetaTrainConfig, meta_state, meta_train
from mtl_nb.models.resnet12 import ResNet12
from mtl_nb.models.scale_shift import scale_shift

shape = TaskShape(5, 1, 2)

def base(): return BaseLearner(8, 5, 0.1, 5)

def outer(label, net, bank, seed=0, tasks=32, lr=None):
    row, model = find_row(label), build(label, net, base())
    cfg = MetaTrainConfig(tasks=tasks, batch=4, lr=lr or row.lr, augment=dict(pad=1), seed=seed)
    source = row.source(bank.by_class, shape, 4, seed, hard_count=4)
    return model, source, list(meta_train(meta_state(model, cfg), source, bank, cfg))

@pytest.mark.parametrize("name", ["", "FT", "FT [Θ5;θ]", "mtl ", "MTL+HT", "ss [Θ;θ]"])
def test_unknown_row_is_refused_with_the_choices(name, net):
    for call in (lambda: find_row(name), lambda: build(name, net, base())):
        with pytest.raises(BadInput) as e: call()
        assert "\n" not in str(e.value) and all(k in str(e.value) and slug(k) in str(e.value) for k in ROWS)

def test_names_are_distinct_and_lead_to_their_row():
    names = [n for k in ROWS for n in {k, slug(k), ALIASES.get(k, k)}]
    assert len(names) == len(set(names)) and all(find_row(n).label in ROWS for n in names)
    assert all(slug(k).isascii() and slug(k).replace("-", "").isalnum() and slug(k) == slug(k).lower() for k in ROWS)
    assert (slug("SS [Θ;θ]"), slug("SS [Θ;θ] + HT"), slug("FT [Θ4;θ] + HT")) == ("mtl", "mtl-ht", "ft-theta4-ht")
    assert all(k == r.label for k, r in ROWS.items())

def test_ht_rows_differ_from_their_twins_in_the_source_alone():
    for k, r in ROWS.items():
        if r.hard:
            twin = ROWS[k.removesuffix(" + HT")]
            assert (r.blocks, r.parts, r.lr, r.head, r.order) == (twin.blocks, twin.parts, twin.lr, twin.head, twin.order) and not twin.hard

def test_stream_of_ht_rows():
    by_class, label = list(torch.arange(200).split(10)), torch.arange(20).repeat_interleave(10)
    for r in (r for r in ROWS.values() if r.meta):
        tasks, kinds = r.source(by_class, shape, 4, 3, hard_count=10), []
        twin = HardTaskSampler(by_class, shape, 4, 3, 20, 10) if r.hard else TaskSampler(by_class, shape, 4, 3)
        for a, b in islice(zip(tasks, twin), 16):
            assert torch.equal(a, b)
            kinds += [tasks.hard]*len(a)
            for o in (tasks, twin): o.feedback(label[a[:, :, 0]], (label[a[:, :, 0]]*7 % 5).float())
        assert kinds == ([False]*20 + [True]*10)*2 if r.hard else not any(kinds)

@pytest.mark.parametrize("label", [k for k, r in ROWS.items() if r.meta])
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
    flat = lambda seed: torch.cat([v.flatten() for v in trained(outer("SS [Θ;θ] + HT", net, bank, seed)[0]).values()])
    torch.manual_seed(1); a = flat(0)
    torch.manual_seed(2); b = flat(0)
    assert torch.equal(a, b) and not torch.equal(a, flat(1))

def test_trained_is_a_copy(net):
    model = build("FT θ", net, base())
    before = trained(model)
    model.base.weight.data += 1
    assert before["base.weight"].abs().max() == 0

def test_the_lower_order_counts(net):
    orders = lambda label: [build(label, net, BaseLearner(8, 5, 0.1, 5, order)).base.order for order in (1, 2)]
    assert (orders("SS [Θ;θ]"), orders("SS [Θ;θ], first order")) == ([1, 2], [1, 1])

def test_building_shares_nothing(net):
    b = base()
    one, two = build("FT [Θ;θ]", net, b), build("FT [Θ;θ]", net, b)
    for p in one.parameters(): p.data += 1
    assert not any(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters()))
    assert b.weight.abs().max() == 0 and b.order == 2 and build("SS [Θ;θ], first order", net, b).base.order == 1 and b.order == 2
    assert net.blocks[0].bn1.running_mean is not None and build("update θ, batch statistics", net, b) and net.blocks[0].bn1.running_mean is not None

@pytest.mark.parametrize("label", ROWS)
def test_training_mode_leaves_the_backbone_calm(label, net):
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
    want = evaluate(features(model.embed, bank), exam, model.base, features(model.embed, bank, mirror=True) if mirrored else None)
    assert torch.equal(evaluate_images(model, bank, exam, chunk=3, mirrored=mirrored), want)
    odd = build("update θ, batch statistics", net, base())
    f, own = task_features(odd, bank, exam, 3, mirrored)
    assert own.fingerprint == exam.fingerprint and len(own) == 7 and f.dtype == torch.float32
    assert torch.equal(evaluate(f, own, odd.base), evaluate_images(odd, bank, exam, mirrored=mirrored))

@pytest.mark.parametrize("mirrored", [False, True])
def test_finetune_is_a_loop_over_tasks(net, bank, mirrored):
    exam, model = make_exam(bank, shape, tasks=3), build("update [Θ;θ]", net, base(), torch.full((8,), .1))
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    got = finetune(model, bank, exam, 0.05, [0, 2, 4], chunk=2, mirrored=mirrored)
    assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items())
    assert torch.equal(got, finetune(model, bank, exam, 0.05, [0, 2, 4], chunk=3, mirrored=mirrored)) # the same query twice, the same answer
    for t, idx in enumerate(exam.idx):
        twin, x = deepcopy(model).requires_grad_(True), bank.take(idx)
        sgd = torch.optim.SGD([dict(params=twin.base.parameters(), lr=twin.base.lr), dict(params=twin.backbone.parameters(), lr=0.05)])
        answer = lambda o: twin.embed(o.flatten(0, 1)) @ twin.base.weight.T + twin.base.bias
        support = torch.cat([x[:, :1], x[:, :1].flip(-1)], 1) if mirrored else x[:, :1]
        for s in range(5):
            if s % 2 == 0: assert (answer(x[:, 1:]).argmax(1) == shape.labels(2)).sum() == got[s//2, t]
            sgd.zero_grad(); torch.nn.functional.cross_entropy(answer(support), shape.labels(support.shape[1])).backward(); sgd.step()

def test_finetune_at_rate_zero_is_head_only(net, bank):
    exam, model = make_exam(bank, shape, tasks=6), build("update [Θ;θ]", net, base())
    want = evaluate_path(features(model.embed, bank), exam, model.base, model.base.lr, [1, 5])
    assert torch.equal(finetune(model, bank, exam, 0., [1, 5]), want)
    with pytest.raises(ValueError, match="ascend"): finetune(model, bank, exam, 0., [5, 1])

def test_processes_share_the_tasks(net, bank):
    class Part(Team):   # each rank's share, uncut
        def cat(self, x, n): return x
    exam, all_w, odd = make_exam(bank, shape, tasks=7), build("update [Θ;θ]", net, base()), build("update θ, batch statistics", net, base())
    parts = [Part(r, 3) for r in range(3)]
    assert torch.equal(torch.cat([finetune(all_w, bank, exam, .01, [1, 2], team=p) for p in parts], 1), finetune(all_w, bank, exam, .01, [1, 2]))
    assert torch.equal(torch.cat([evaluate_images(odd, bank, exam, team=p) for p in parts]), evaluate_images(odd, bank, exam))
    assert torch.equal(torch.cat([task_features(odd, bank, exam, team=p)[0] for p in parts]), task_features(odd, bank, exam)[0])
    assert finetune(all_w, bank, exam.first(1), .01, [1], team=Part(0, 3)).shape == (1, 0)   # more processes than tasks
    twice = lambda x, shape: torch.stack([odd(x, shape)]*2)
    assert torch.equal(evaluate_images(odd, bank, exam, call=twice), evaluate_images(odd, bank, exam).expand(2, -1))
    assert [evaluate_images(odd, bank, exam.first(1), team=Part(0, 3), call=c).shape for c in (None, twice)] == [(0,), (2, 0)]

def test_batch_statistics_is_an_mtl(net): assert isinstance(build("SS [Θ;θ], batch statistics", net, base()), BatchStatistics) and issubclass(BatchStatistics, MTL)

@pytest.mark.parametrize("label", [k for k, r in ROWS.items() if r.meta and not r.batch_norm and not r.hard])
def test_outer_gradient_against_a_loop_written_out(label, net, bank):
    "Everything that a row may move, against steps of gradient descent in plain autograd, one task after the other."
    row, shape, moved = find_row(label), TaskShape(3, 2, 4), BaseLearner(net.num_features, 3, 0.3, 4)
    with torch.no_grad():
        for p in moved.parameters(): p.normal_(0, .2, generator=torch.Generator().manual_seed(1))
    model, images = build(label, deepcopy(net), moved), bank.take(next(TaskSampler(bank.by_class, shape, 2)))
    free, (ys, yq), total = [p for p in model.parameters() if p.requires_grad], (shape.labels(o) for o in (2, 4)), 0.
    loss = sum(F.cross_entropy(z, yq) for z in model(images, shape))
    for task in images:
        fs, fq = (model.backbone(x.flatten(0, 1)) for x in (task[:, :2], task[:, 2:]))
        if row.order == 1: fs = fs.detach()
        w, b = model.base.weight, model.base.bias
        for _ in range(4):
            steps = torch.autograd.grad(F.cross_entropy(fs @ w.T + b, ys), [w, b], create_graph=True)
            if row.order == 1: steps = [o.detach() for o in steps]
            w, b = w - 0.3*steps[0], b - 0.3*steps[1]
        total = total + F.cross_entropy(fq @ w.T + b, yq)
    pairs = list(zip(*(torch.autograd.grad(o, free) for o in (loss, total))))
    most = max(b.abs().max() for _, b in pairs)
    assert most > 1e-3 and all((a - b).abs().max() < 1e-4*most for a, b in pairs)
