"The exam list pinned, its fingerprint, and the scoring runtime against a loop that anybody can check."
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mtl_nb.core import BadInput
from mtl_nb.data.augment import AugmentConfig
from mtl_nb.data.bank import ImageBank
from mtl_nb.data.episodes import TaskShape, sample_tasks
from mtl_nb.evaluation.exam import (RATES, STEPS, accuracy, augmented_features, evaluate, evaluate_head, evaluate_path,
                                    features, make_exam, tune)
from mtl_nb.evaluation.stats import mean_ci, paired_diff
from mtl_nb.models.base_learner import BaseLearner
from mtl_nb.models.heads import Prototypes
from mtl_nb.train.distributed import Team

def noise(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

def bank_of(classes=6, each=20, side=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (classes*each, 3, side, side), generator=g, dtype=torch.uint8)
    return ImageBank(x, torch.arange(classes).repeat_interleave(each), [f"class {i}" for i in range(classes)])

SHAPE = TaskShape(5, 1, 5)
@pytest.fixture(scope="module")
def bank(): return bank_of()
@pytest.fixture(scope="module")
def exam(bank): return make_exam(bank, SHAPE)
@pytest.fixture(scope="module")
def feats(bank): return F.one_hot(bank.y, 6) + .8*noise(len(bank), 6)

def refused(f, match):
    with pytest.raises(BadInput, match=match) as e: f()
    assert "\n" not in str(e.value)

# --- the exam ------------------------------------------------------------------------------------------------------
def test_the_list_and_its_fingerprint_are_pinned(exam):
    "If this fails, results recorded before can no longer be compared with new ones."
    assert exam.fingerprint == "cc9b94e98f891f34"
    assert exam.idx.shape == (10_000, 5, 6) and exam.idx[0, :, 0].tolist() == [36, 106, 14, 92, 69]

def test_tasks_are_tasks(bank, exam):
    cls = bank.y[exam.idx]
    assert (cls == cls[..., :1]).all()
    assert all(len(set(c.tolist())) == 5 for c in cls[:200, :, 0])
    assert all(len(set(t.flatten().tolist())) == 30 for t in exam.idx[:200])

def test_longer_lists_begin_alike(bank, exam):
    long = make_exam(bank, SHAPE, tasks=10_700)
    assert len(long) == 10_700 and torch.equal(long.idx, exam.idx) and long.fingerprint == exam.fingerprint
    assert torch.equal(make_exam(bank, SHAPE, tasks=7).idx, exam.idx[:7])
    longer = torch.cat([*make_exam(bank, SHAPE, tasks=12_300).chunks(1000)])
    assert len(longer) == 12_300 and torch.equal(longer[:10_000], exam.idx)
    assert torch.equal(torch.cat([*long.chunks(300)]), longer[:10_700])
    want = sample_tasks(bank.by_class, 12_500, SHAPE, torch.Generator().manual_seed(0))[:12_300]
    assert torch.equal(longer, want) # one stream of random numbers

@pytest.mark.parametrize("tasks", [3, 10_000, 10_001, 11_500])
@pytest.mark.parametrize("size", [1, 3])
def test_a_team_shares_a_list_of_any_length(bank, tasks, size):
    long = make_exam(bank, SHAPE, tasks=tasks)
    parts = [[*long.chunks(1000, Team(rank, size))] for rank in range(size)]
    assert all(len(o) <= 1000 for p in parts for o in p)
    assert torch.equal(torch.cat(sum(parts, [])), torch.cat([*long.chunks(500)])) and len(torch.cat(sum(parts, []))) == tasks

@pytest.mark.parametrize("tasks", [1, 10_000, 10_250, 11_000])
def test_the_beginning_of_a_long_list(bank, tasks):
    long = make_exam(bank, SHAPE, tasks=11_000)
    assert len(long.first(tasks)) == tasks and long.first(tasks).fingerprint == long.fingerprint
    assert torch.equal(torch.cat([*long.first(tasks).chunks(1000)]), torch.cat([*long.chunks(1000)])[:tasks])

def test_a_long_list_is_evaluated_to_its_end(bank, exam, feats):
    "As many results as tasks were asked for; on the tasks that a shorter list has they are the same."
    base, long = BaseLearner(6, 5, .3, 5), make_exam(bank, SHAPE, tasks=10_700)
    all_of_them, known = evaluate(feats, long, base), evaluate(feats, exam, base)
    assert len(all_of_them) == 10_700 and torch.equal(all_of_them[:10_000], known)
    assert torch.equal(evaluate_head(feats, long, Prototypes(5))[:10_000], evaluate_head(feats, exam, Prototypes(5)))
    some = torch.cat([*long.chunks(1000)])[10_690:]
    want = [by_hand(feats, bank, t, .3, 5, None, (base.weight.data, base.bias.data)) for t in some]
    assert all_of_them[10_690:].tolist() == want

def test_drawing_leaves_the_global_generator_alone(bank):
    torch.manual_seed(0)
    want = torch.rand(3)
    torch.manual_seed(0)
    make_exam(bank, SHAPE, tasks=5)
    assert torch.equal(torch.rand(3), want)

def test_hashes_of_the_originals_keep_the_fingerprint(bank, exam):
    small = ImageBank(bank.x[..., :4, :4].clone(), bank.y, bank.names, bank.hashes)
    assert make_exam(small, SHAPE).fingerprint == exam.fingerprint
    alone = ImageBank(bank.x[..., :4, :4].clone(), bank.y, bank.names)
    assert make_exam(alone, SHAPE).fingerprint != exam.fingerprint

@pytest.mark.parametrize("change", ["move", "swap names", "drop", "double", "seed"])
def test_fingerprint_sees(bank, exam, change):
    x, y, names = bank.x, bank.y.clone(), list(bank.names)
    if change == "move": y[19] = 1  # one image of class 0 is said to be of class 1
    if change == "swap names": names[:2] = names[1::-1]
    if change == "drop": x, y = x[1:], y[1:]
    if change == "double": x, y = torch.cat([x, x[:1]]), torch.cat([y, y[:1]])
    other = bank_of(seed=1) if change == "seed" else ImageBank(x, y, names)
    assert make_exam(other, SHAPE).fingerprint != exam.fingerprint

def test_exams_that_cannot_be_drawn(bank):
    for tasks in 0, -5, 10**6 + 1: refused(lambda: make_exam(bank, SHAPE, tasks=tasks), "at least 1 task")
    refused(lambda: make_exam(bank, TaskShape(7, 1, 5)), "7-way needs 7 classes, but 'val' has only 6")
    refused(lambda: make_exam(bank, TaskShape(5, 1, 20), split="test"), "'class 0' in 'test' has 20 images")

def test_repr_is_short(exam): assert len(repr(exam)) < 200 and exam.fingerprint in repr(exam)

# --- features ------------------------------------------------------------------------------------------------------
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.drop = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(.5)
        for p in self.parameters(): p.data = noise(*p.shape)
    def forward(self, x): return self.drop(self.bn(self.conv(x))).mean((2, 3))
    def embed(self, x): return 2*self(x)

@pytest.mark.parametrize("batch", [1, 7, 120, 1000])
def test_features_do_not_depend_on_the_batch(bank, batch):
    net = Net().eval()
    with torch.no_grad(): want = net(bank.take(torch.arange(len(bank))))
    got = features(net, bank, batch)
    assert not got.requires_grad and got.dtype == torch.float32 and torch.allclose(got, want, atol=1e-5)

def test_mirrored_features(bank):
    net = Net().eval()
    flipped = ImageBank(bank.x.flip(-1), bank.y, bank.names, bank.hashes)
    assert torch.allclose(features(net, bank, mirror=True), features(net, flipped), atol=1e-5)

@pytest.mark.parametrize("batch", [64, 7])
def test_copies_are_augmented_as_one_batch(bank, batch, monkeypatch):
    net, augment = Net().eval(), AugmentConfig(pad=2)
    monkeypatch.setattr("mtl_nb.evaluation.exam.features", lambda *a, **k: features(*a, batch=batch, **k))
    got = augmented_features(net, bank, 2, augment, seed=3)
    for c in range(2):
        x = augment(bank.take(torch.arange(len(bank))), torch.Generator().manual_seed(10_007*3 + c))
        with torch.no_grad(): assert torch.allclose(got[c], net(x), atol=1e-5)

def test_training_mode_is_refused_and_nothing_moves(bank):
    net = Net()
    before = net.bn.running_mean.clone()
    for embed in net, net.embed:
        with pytest.raises(BadInput, match="training mode"): features(embed, bank)
    net.eval()
    net.drop.train()
    with pytest.raises(BadInput, match="training mode"): features(net, bank)
    assert torch.equal(net.bn.running_mean, before)
    features(net.eval().embed, bank)
    features(lambda x: x.mean((2, 3)), bank)
    assert torch.equal(net.bn.running_mean, before)

# --- scoring -------------------------------------------------------------------------------------------------------
def by_hand(feats, bank, task, lr, steps, extra=None, theta=None):
    "One task with torch.optim.SGD in float64."
    head = nn.Linear(feats.shape[1], 5).double()
    with torch.no_grad():
        for p, o in zip((head.weight, head.bias), theta or (0, 0)): p.copy_(torch.as_tensor(o))
    sup = feats[task[:, :1].flatten()]
    y = torch.arange(5)
    if extra is not None: sup, y = torch.cat([sup, extra[task[:, :1].flatten()]]), torch.cat([y, y])
    opt = torch.optim.SGD(head.parameters(), lr)
    for _ in range(steps):
        opt.zero_grad()
        F.cross_entropy(head(sup.double()), y).backward()
        opt.step()
    logits = head(feats[task[:, 1:].flatten()].double())
    return int((logits.argmax(1) == torch.arange(5).repeat_interleave(5)).sum())

@pytest.mark.parametrize("steps,with_extra,start",
                         [(0, False, True), (1, False, False), (30, False, True), (30, True, False)])
def test_equals_sgd_task_by_task(bank, exam, feats, steps, with_extra, start):
    extra = feats + .5*noise(*feats.shape, seed=3) if with_extra else None
    base = BaseLearner(6, 5, .3, steps)
    if start: base.weight.data, base.bias.data = noise(5, 6, seed=4), noise(5, seed=5)
    want = [by_hand(feats, bank, t, .3, steps, extra, (base.weight.data, base.bias.data)) for t in exam.idx[:20]]
    assert evaluate(feats, exam.first(20), base, extra).tolist() == want

def test_primal_and_dual_agree():
    "Few features make the head walk in its other form."
    bank = bank_of(each=30)
    wide = F.one_hot(bank.y, 6) + .8*noise(len(bank), 6)
    e = make_exam(bank, TaskShape(5, 8, 5), tasks=50)  # n = 40 > 2D = 12: primal
    padded = F.pad(wide, (0, 40))  # the same numbers, D = 46: dual
    primal, dual = evaluate(wide, e, BaseLearner(6, 5, .1, 40)), evaluate(padded, e, BaseLearner(46, 5, .1, 40))
    assert (primal - dual).abs().sum() <= 2

@pytest.mark.parametrize("chunk", [1, 7, 50, 1000])
def test_chunks_change_nothing(exam, feats, chunk):
    e, base = exam.first(50), BaseLearner(6, 5)
    want = evaluate_path(feats, e, base, .3, [3, 20])
    assert torch.equal(evaluate_path(feats, e, base, .3, [3, 20], chunk=chunk), want)

def test_many_steps_in_one_walk(exam, feats):
    e, base = exam.first(40), BaseLearner(6, 5)
    path = evaluate_path(feats, e, base, .3, [0, 5, 5, 60])
    assert torch.equal(path[1], path[2])
    for row, n in zip(path, (0, 5, 5, 60)): assert torch.equal(row, evaluate(feats, e, BaseLearner(6, 5, .3, n)))
    for steps in ([20, 5], []):
        with pytest.raises(BadInput, match="ascend"): evaluate_path(feats, e, base, .3, steps)
    with pytest.raises(BadInput, match="a head of 4 classes cannot predict 5-way tasks"):
        evaluate(feats, e, BaseLearner(6, 4))

def test_any_head(exam, feats):
    e, base = exam.first(230), BaseLearner(6, 5, .3, 20)
    assert (evaluate_head(feats, e, base) - evaluate(feats, e, base)).abs().sum() <= 2
    extra = torch.stack([feats, feats + .5*noise(*feats.shape, seed=3)])
    assert (evaluate_head(feats, e, base, extra) - evaluate(feats, e, base, extra)).abs().sum() <= 2

@pytest.mark.parametrize("shape", [TaskShape(2, 1, 1), TaskShape(5, 5, 7), TaskShape(6, 3, 15)], ids=str)
def test_oracle_and_constant_at_any_shape(bank, shape):
    e = make_exam(bank, shape, tasks=300)
    all_right, q = shape.n_way*shape.n_query, shape.n_query
    assert (evaluate(F.one_hot(bank.y).float(), e, BaseLearner(6, shape.n_way)) == all_right).all()
    assert (evaluate(torch.zeros(len(bank), 6), e, BaseLearner(6, shape.n_way)) == q).all()

def test_nothing_is_trained_and_no_graph_is_kept(exam, feats):
    f, base = feats.clone().requires_grad_(), BaseLearner(6, 5)
    out = evaluate(f, exam.first(9), base)
    assert out.dtype == torch.int64 and not out.requires_grad and f.grad is None and not base.weight.any()

def test_scores_fit_in_two_bytes(exam, feats):
    out = evaluate(feats, exam.first(100), BaseLearner(6, 5))
    assert torch.equal(torch.from_numpy(out.numpy().astype("<u2").astype("int64")), out)

# --- numbers -------------------------------------------------------------------------------------------------------
def test_accuracy_takes_labels_of_each_task():
    logits, labels = noise(4, 10, 5), torch.randint(0, 5, (4, 10), generator=torch.Generator().manual_seed(0))
    want = [sum(logits[e, i].argmax() == labels[e, i] for i in range(10))/10 for e in range(4)]
    assert torch.allclose(accuracy(logits, labels), torch.stack(want))
    assert torch.equal(accuracy(logits, labels[0])[0], accuracy(logits, labels)[0])

def test_mean_ci_by_arithmetic():
    m, ci = mean_ci(torch.tensor([1., 2., 3., 4.]))
    assert m == 2.5 and abs(ci - 1.96*(5/3)**.5/2) < 1e-12
    assert mean_ci(torch.tensor([3])) == pytest.approx((3, float("nan")), nan_ok=True)
    assert mean_ci(torch.tensor([1, 0, 1, 1]))[0] == .75  # integers are numbers too

def test_paired_interval_covers():
    g, hits = torch.Generator().manual_seed(0), 0
    for _ in range(1000):
        task = torch.randn(200, generator=g)  # what makes a task easy for both
        a, b = (task + .3*torch.randn(200, generator=g) + m for m in (.05, 0.))
        m, ci = paired_diff(a, b)
        hits += abs(m - .05) <= ci
    assert .93 < hits/1000 < .97

def test_pairs_on_the_common_prefix():
    a, b = noise(100), noise(60, seed=1)
    assert paired_diff(a, b) == mean_ci(a[:60].double() - b.double()) and paired_diff(b, a)[0] == -paired_diff(a, b)[0]

def test_tune_is_the_grid_of_evaluate(exam, feats):
    e, rates, steps = exam.first(60), (.01, .3), (2, 10, 40)
    lr, n, table = tune(feats, e, BaseLearner(6, 5), rates, steps)
    want = torch.tensor([[evaluate(feats, e, BaseLearner(6, 5, r, s)).double().mean()/25 for s in steps]
                         for r in rates])
    assert torch.allclose(table, want.double()) and table[rates.index(lr), steps.index(n)] == table.max()
    assert list(STEPS) == sorted(STEPS) and tune(feats, e, BaseLearner(6, 5))[2].shape == (len(RATES), len(STEPS))

