"The methods of other papers beyond their pages: refusals, seeds, resume, training tasks, evaluations, files."
from copy import deepcopy
from itertools import islice

import pytest
import torch
import torch.nn.functional as F

from mtl_nb.core import BadInput
from mtl_nb.data.augment import AugmentConfig
from mtl_nb.data.episodes import TaskSampler, TaskShape
from mtl_nb.data.hard_tasks import HardTaskSampler
from mtl_nb.evaluation.exam import evaluate, evaluate_head, features, make_exam
from mtl_nb.methods.base import METHODS, evaluate_images, get_method
from mtl_nb.methods.maml import MAML
from mtl_nb.methods.tadam import TADAM, co_train
from mtl_nb.models.base_learner import BaseLearner
from mtl_nb.models.convnet4 import ConvNet4
from mtl_nb.models.heads import Cosine, Prototypes
from mtl_nb.train.checkpoints import load_state, save_state
from mtl_nb.train.distributed import Team
from mtl_nb.train.meta_train import MTL, MetaTrainConfig, meta_state, meta_train

OTHERS = {m.label: m for m in METHODS.values() if m.group == "others"}
shape = TaskShape(5, 1, 2)
TRAINED = [k for k, m in OTHERS.items() if m.meta]

@pytest.fixture()
def images(bank): return bank.take(next(TaskSampler(bank.by_class, shape, 3)))

def build(label, net, **more): return get_method(label).build(net, BaseLearner(net.num_features, 5), classes=8, **more)

def config(tasks=8): return MetaTrainConfig(tasks=tasks, batch=4, lr=1e-3, augment=AugmentConfig(pad=1))

def outer(label, net, bank, source=None, tasks=8):
    model, cfg = build(label, net), config(tasks)
    tasks = source or TaskSampler(bank.by_class, shape, 4)
    return model, list(get_method(label).train(meta_state(model, cfg), tasks, bank, cfg))

@pytest.mark.parametrize("call, words", [
    (lambda: Prototypes(0), "at least one class"),
    (lambda: Cosine(0), "at least one class"),
    (lambda: MAML(ConvNet4(4), 0), "n_way must be at least 1"),
    (lambda: MAML(ConvNet4(4), 5, steps=-1), "not negative"),
    (lambda: MAML(ConvNet4(4), 5, lr=-1.), "not negative"),
    (lambda: MAML(ConvNet4(4), 5, order=3), "order must be 1 or 2"),
    (lambda: TADAM(ConvNet4(4), 5, 8), "blocks of a ResNet12, got ConvNet4"),
    (lambda: ConvNet4(4, size=8), "at least 16 pixels"),
    (lambda: ConvNet4(4)(torch.zeros(2, 1, 16, 16)), "got [2, 1, 16, 16]"),
    (lambda: ConvNet4(4)(torch.zeros(2, 3, 16, 15)), "at least 16"),
    (lambda: ConvNet4(4, size=32)(torch.zeros(2, 3, 16, 16)), "made for 32 pixels a side, got [16, 16]")])
def test_what_does_not_fit_is_refused_in_words(call, words):
    with pytest.raises(ValueError) as e: call()
    assert words in str(e.value) and "\n" not in str(e.value)

def test_labels_and_slugs_are_distinct():
    slugs = [m.slug for m in OTHERS.values()]
    assert len(OTHERS) == 8 and len(set(slugs)) == len(OTHERS)
    assert all(o.isascii() and o.replace("-", "").isalnum() and o == o.lower() for o in slugs)
    assert OTHERS["MAML 4-conv, first order"].slug == "maml-4-conv-first-order"
    assert OTHERS["Meta-Baseline"].slug == "meta-baseline"

def test_nothing_touches_the_global_generator(net, bank, images):
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    for label in OTHERS: build(label, net)(images, shape)
    outer("TADAM", net, bank)
    assert torch.equal(torch.rand(3), want)

@pytest.mark.parametrize("label", OTHERS)
def test_seed_decides_the_start_and_the_network_given_is_untouched(label, net, images):
    kept = {k: v.clone() for k, v in net.state_dict().items()}
    a, b, c = (build(label, net, seed=s) for s in (0, 0, 1))
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    pretrained = "4-conv" not in label
    random = "TADAM" in label or not pretrained
    assert random == any(not torch.equal(v, c.state_dict()[k]) for k, v in a.state_dict().items())
    for p in a.parameters(): p.data += 1
    assert all(torch.equal(v, kept[k]) for k, v in net.state_dict().items())
    assert not any(p.requires_grad for p in net.parameters())
    same = {k.removeprefix("backbone."): v for k, v in b.state_dict().items() if k.removeprefix("backbone.") in kept}
    assert any(torch.equal(v, kept[k]) for k, v in same.items()) == pretrained

@pytest.mark.parametrize("label", TRAINED)
def test_training_moves_all_that_it_may_and_no_statistics(label, net, bank):
    was, (model, records) = build(label, net).state_dict(), outer(label, net, bank)
    assert [r["tasks"] for r in records] == [4, 8] and not model.training
    free = {k for k, p in model.named_parameters() if p.requires_grad}
    still = {k for k, v in model.state_dict().items() if torch.equal(v, was[k])}
    # a bias before batch statistics: rounding may move it, or not
    idle = {k for k in free if k.endswith(".0.bias")} if "4-conv" in label else set()
    assert not (free - idle) & still and still | free == set(was)

@pytest.mark.parametrize("label", TRAINED)
def test_resumed_is_never_stopped(label, net, bank, tmp_path):
    whole, _ = outer(label, net, bank)
    model, cfg, tasks = build(label, net), config(), TaskSampler(bank.by_class, shape, 4)
    state = meta_state(model, cfg)
    next(get_method(label).train(state, tasks, bank, cfg))
    save_state(tmp_path/"state", train=state, tasks=tasks)
    again, source = build(label, net, seed=9), TaskSampler(bank.by_class, shape, 4, seed=9)
    kept = load_state(tmp_path/"state")
    after = meta_state(again, cfg)
    after.load_state_dict(kept["train"])
    source.load_state_dict(kept["tasks"])
    assert len(list(get_method(label).train(after, source, bank, cfg))) == 1
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in whole.state_dict().items())

@pytest.mark.parametrize("label", TRAINED)
def test_hard_tasks_as_a_source(label, net, bank):
    source = HardTaskSampler(bank.by_class, shape, 4, 0, random=4, hard_count=4)
    _, records = outer(label, net, bank, source)
    assert [r["hard"] for r in records] == [False, True] and source.failed

def test_part_by_part_is_the_whole(net, bank):
    for label in "MAML ResNet-12", "TADAM", "Meta-Baseline":
        models = [build(label, net) for _ in range(2)]
        for model, tasks_at_once in zip(models, (0, 1)):
            cfg = MetaTrainConfig(tasks=4, batch=4)
            with torch.no_grad(): model.base.weight += .3 if model.base.weight.dim() < 2 else torch.eye(5, 8)
            tasks = TaskSampler(bank.by_class, shape, 4)
            list(meta_train(meta_state(model, cfg), tasks, bank, cfg, tasks_at_once=tasks_at_once))
        grads = [torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None]) for m in models]
        assert (grads[0] - grads[1]).norm() < 1e-4*grads[0].norm()

@pytest.mark.parametrize("label", OTHERS)
def test_exams(label, net, bank):
    exam, model = make_exam(bank, shape, tasks=7), build(label, net)
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    got, yq = evaluate_images(model, bank, exam, chunk=3), shape.labels(shape.n_query)
    alone = [(model(bank.take(idx)[None], shape)[0].argmax(-1) == yq).sum() for idx in exam.idx] # task by task
    assert got.dtype == torch.int64 and got.shape == (7,) and torch.equal(got, torch.stack(alone))
    assert torch.equal(got, evaluate_images(model, bank, exam, chunk=7))
    assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items())
    assert not any(p.grad is not None for p in model.parameters())
    if get_method(label).caches_features:
        assert torch.equal(evaluate_head(features(model.embed, bank), exam, model.base), got)

def test_answers_with_mirror_images_and_in_shares(net, bank):
    class Part(Team):   # each rank's share, uncut
        def all_gather(self, x, n): return x
    exam, model = make_exam(bank, shape, tasks=7), build("ProtoNet", net)
    f, m = features(model.embed, bank), features(model.embed, bank, mirror=True)
    assert torch.equal(evaluate_head(f, exam, model.base, m), evaluate_images(model, bank, exam, mirrored=True))
    parts = [evaluate_head(f, exam, model.base, team=Part(r, 3)) for r in range(3)]
    assert torch.equal(torch.cat(parts), evaluate_head(f, exam, model.base))
    base = BaseLearner(8, 5, 0.1, 5)
    assert (evaluate_head(f, exam, base) - evaluate(f, exam, base)).abs().sum() <= 1

def test_prototypes_are_means_whatever_the_order(net):
    g = torch.Generator().manual_seed(0)
    support, query = torch.randn(2, 6, 4, generator=g), torch.randn(2, 3, 4, generator=g)
    labels = torch.tensor([[0, 1, 2, 1, 0, 1], [2, 2, 0, 1, 2, 0]])
    means = torch.stack([torch.stack([s[l == k].mean(0) for k in range(3)]) for s, l in zip(support, labels)])
    assert torch.allclose(Prototypes(3).means(support, labels), means, atol=1e-6)
    want = (-torch.cdist(query, means)**2).log_softmax(-1)
    assert torch.allclose(Prototypes(3)(support, labels, query).log_softmax(-1), want, atol=1e-4)
    want = 2*F.cosine_similarity(query[:, :, None], means[:, None], dim=-1)
    assert torch.allclose(Cosine(3, 2.)(support, labels, query), want, atol=1e-6)

@pytest.mark.parametrize("batch_stats", [False, True])
def test_maml_against_finite_differences_on_a_resnet(batch_stats, net, images):
    g, model = torch.Generator().manual_seed(0), MAML(deepcopy(net), 5, 0.05, 2, batch_stats=batch_stats)
    model = model.double().requires_grad_(True)
    with torch.no_grad(): model.base.weight.normal_(0, .2, generator=g)
    def loss(): return F.cross_entropy(model(images.double(), shape).flatten(0, 1), shape.labels(2).repeat(3))
    params = list(model.parameters())
    slopes = torch.autograd.grad(loss(), params)
    for _ in range(3):
        way = [torch.randn(p.shape, generator=g, dtype=torch.float64) for p in params]
        with torch.no_grad():
            at = []
            for step in 1e-7, -2e-7:
                for p, w in zip(params, way): p += step*w
                at.append(loss().item())
            for p, w in zip(params, way): p += 1e-7*w
        want = sum((s*w).sum() for s, w in zip(slopes, way)).item()
        assert abs((at[0] - at[1])/2e-7 - want) < 1e-4*abs(want) + 1e-6

def test_maml_is_a_loop_of_sgd(net, images):
    model = MAML(deepcopy(net), 5, 0.05, 3, batch_stats=False)
    for e, got in enumerate(model(images, shape)):
        twin = torch.nn.Sequential(deepcopy(model.backbone), deepcopy(model.base)).requires_grad_(True).eval()
        sgd = torch.optim.SGD(twin.parameters(), 0.05)
        for _ in range(3):
            sgd.zero_grad()
            F.cross_entropy(twin(images[e, :, 0]), torch.arange(5)).backward()
            sgd.step()
        assert torch.allclose(twin(images[e, :, 1:].flatten(0, 1)), got, atol=1e-4)

def test_maml_keeps_no_graph_at_the_exam(net, images):
    model = build("MAML ResNet-12", net)
    with torch.no_grad(): assert not model(images, shape).requires_grad
    assert model(images, shape).requires_grad and model.path(images, shape, [0, 0, 2]).shape == (3, 3, 10, 5)
    assert torch.equal(model.path(images, shape, [model.steps])[0], model(images, shape))

def test_batch_statistics_of_a_task_are_its_own(net, images):
    model = MAML(ConvNet4(4), 5, steps=2)
    with torch.no_grad(): model.base.weight += torch.eye(5, 4)
    z = model(images, shape)
    assert all(torch.allclose(model(x[None], shape)[0], o, atol=1e-5) for x, o in zip(images, z))
    fewer = model(images[:, :, :2], TaskShape(5, 1, 1))
    assert not torch.allclose(fewer, z[:, ::2], atol=1e-3)   # a query's answers depend on the other images of the batch
    calm = MAML(deepcopy(net), 5, steps=2, batch_stats=False)
    assert torch.allclose(calm(images[:, :, :2], TaskShape(5, 1, 1)), calm(images, shape)[:, ::2], atol=1e-5)

@pytest.mark.parametrize("centred", [False, True])
def test_tadam_at_its_start_is_a_protonet(centred, net, images):
    centre = torch.full((8,), .1) if centred else None
    model = TADAM(deepcopy(net), 5, 8, centre, scale=0.7)
    assert torch.equal(model(images, shape), MTL(net, Prototypes(5, 0.7), centre)(images, shape))

def test_tadam_conditions_by_the_support_alone(net, images):
    model = TADAM(deepcopy(net), 5, 8)
    for ten in model.base.ten: ten.post.data += .5
    other = images.clone()
    other[:, :, 1] += 1 # another first query of each class
    a, b = model(images, shape), model(other, shape)
    assert torch.equal(a[:, 1::2], b[:, 1::2]) and not torch.allclose(a[:, ::2], b[:, ::2])

def test_tadam_against_its_blocks_written_out(net, images):
    "One task at a time, each block scaled and shifted by hand after its batch norms."
    model = TADAM(deepcopy(net), 5, 8, seed=3)
    with torch.no_grad():
        for ten in model.base.ten: ten.post.normal_(0, .5, generator=torch.Generator().manual_seed(1))
    k = shape.k_shot
    def at(v): return v[:, None, None]
    def embed(x, about):
        for block, ten in zip(net.blocks, model.base.ten):
            scales, shifts = ten.last(F.relu(ten.first(about))).view(2, 3, -1)
            u = x
            layers = (block.conv1, block.bn1), (block.conv2, block.bn2), (block.conv3, block.bn3)
            for i, (conv, norm) in enumerate(layers):
                u = norm(conv(u))*at(1 + ten.post[0, i]*scales[i]) + at(ten.post[1, i]*shifts[i])
                if i < 2: u = F.leaky_relu(u, .1)
            x = F.max_pool2d(F.leaky_relu(u + block.bn0(block.short(x)), .1), 2)
        return x.mean((2, 3))
    with torch.no_grad():
        z = model(images, shape)
        for task, ours in zip(images, z):
            about = torch.stack([net(c[:k]).mean(0) for c in task]).mean(0)
            prototypes = torch.stack([embed(c[:k], about).mean(0) for c in task])
            distances = embed(task[:, k:].flatten(0, 1), about)[:, None] - prototypes
            theirs = -model.base.weight*(distances**2).sum(-1)
            assert torch.allclose(ours.log_softmax(-1), theirs.log_softmax(-1), atol=1e-3)
        for ten in model.base.ten: ten.post.zero_()
        assert (model(images, shape).log_softmax(-1) - z.log_softmax(-1)).abs().max() > 1e-2

def test_co_training(net, bank):
    records = outer("TADAM", net, bank, tasks=40)[1]
    assert {"auxiliary", "loss", "by_class"} <= set(records[0]) and any(r["auxiliary"] for r in records)
    model, twin, cfg = build("TADAM", net), build("TADAM", net), config()
    def train(model, start):
        list(co_train(meta_state(model, cfg), TaskSampler(bank.by_class, shape, 4), bank, cfg, start=start))
    train(model, 0.) # never an auxiliary step
    assert torch.equal(model.base.auxiliary.weight, twin.base.auxiliary.weight)
    train(twin, 2.) # always one, at first
    assert not torch.equal(model.base.auxiliary.weight, twin.base.auxiliary.weight)
    other = get_method("TADAM").build(net, BaseLearner(net.num_features, 5), classes=64)
    with pytest.raises(BadInput, match="knows 64 classes, the base classes are 8"): train(other, .9)

def test_the_same_loop_twice_gives_the_same(net, bank):
    for label in "MAML 4-conv", "TADAM":
        a, b = (outer(label, net, bank)[0].state_dict() for _ in range(2))
        assert all(torch.equal(v, b[k]) for k, v in a.items())

def test_a_flattened_small_network(net, bank):
    model = build("MAML 4-conv", net, size=16)
    assert model.backbone.num_features == 32
    tasks = TaskSampler(bank.by_class, shape, 4)
    assert list(islice(meta_train(meta_state(model, config()), tasks, bank, config()), 1))
