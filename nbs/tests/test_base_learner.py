"The base learner beyond its page: hostile input, edges, symmetries, and that the hot path never waits for a GPU."
import os
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import torch.nn.functional as F

from mtl_nb.core import BadInput
from mtl_nb.models.base_learner import BaseLearner, fit_head, fit_heads, head_path, head_path_primal

paths = pytest.mark.parametrize("path", [head_path, head_path_primal])

def task(E=3, n=4, m=5, D=6, N=3, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    def r(*s): return torch.randn(*s, generator=g, dtype=dtype)
    support, labels = r(E, n, D), torch.randint(N, (E, n), generator=g)
    return dict(support=support, labels=labels, query=r(E, m, D), weight=r(N, D), bias=r(N))

bad = [
    (dict(support=torch.randn(4, 6).double()), r"support must be \[E,n,6\]"),
    (dict(support=torch.randn(3, 0, 6).double(), labels=torch.zeros(3, 0, dtype=torch.int64)), "at least one picture"),
    (dict(support=torch.randn(3, 4, 7).double()), r"support must be \[E,n,6\]"),
    (dict(query=torch.randn(2, 5, 6).double()), r"query must be \[3,m,6\]"),
    (dict(query=torch.randn(3, 6).double()), r"query must be \[3,m,6\]"),
    (dict(labels=torch.zeros(4, dtype=torch.int64)), r"labels must be int64 \[3, 4\]"),
    (dict(labels=torch.zeros(3, 4)), r"labels must be int64"),
    (dict(labels=torch.full((3, 4), 3)), r"labels must lie in 0\.\.2 for this head of 3 classes, got 3\.\.3"),
    (dict(labels=torch.full((3, 4), -1)), r"labels must lie in 0\.\.2"),
    (dict(weight=torch.randn(6).double()), "the head must be"),
    (dict(bias=torch.randn(4).double()), "the head must be"),
    (dict(support=torch.randn(3, 4, 6)), "one dtype, got float32 and float64"),
    (dict(query=torch.randn(3, 5, 6).bfloat16()), "one dtype, got bfloat16 and float64"),
    (dict(order=3), "order must be 1 or 2"),
    (dict(steps=[-1]), "steps must be 0 or more"),
    (dict(steps=[5, 2]), "steps must be 0 or more and ascending"),
]

@paths
@pytest.mark.parametrize("change,message", bad)
def test_what_does_not_fit_is_rejected(path, change, message):
    with pytest.raises(BadInput, match=message): path(**(task() | dict(lr=.1, steps=[1]) | change))

def test_the_module_validates_its_input():
    t = task(dtype=torch.float32)
    with pytest.raises(BadInput, match="labels must lie in"):
        BaseLearner(6, 3)(t["support"], t["labels"] + 3, t["query"])
    for kw in dict(lr=-1), dict(steps=-1), dict(order=0), dict(d=0), dict(n_way=0):
        with pytest.raises(BadInput): BaseLearner(**(dict(d=6, n_way=3) | kw))

@pytest.mark.parametrize("n,D", [(1, 1), (1, 6), (4, 2), (12, 6), (13, 6)])
@pytest.mark.parametrize("order", [1, 2])
def test_both_forms_agree(n, D, order):
    t = task(n=n, D=D)
    got = []
    for path in head_path, head_path_primal:
        leaves = {k: v.clone().requires_grad_() for k, v in t.items() if k != "labels"}
        z = path(labels=t["labels"], lr=.5, steps=[0, 3, 3, 20], order=order, **leaves)
        assert torch.equal(z[1], z[2])
        grads = torch.autograd.grad(sum(o.square().sum() for o in z), list(leaves.values()), allow_unused=True)
        got.append((z, grads))
    (za, ga), (zb, gb) = got
    for a, b in zip(za, zb): assert torch.allclose(a, b, rtol=0, atol=1e-11)
    for a, b in zip(ga, gb): assert (a is None and b is None) or torch.allclose(a, b, rtol=1e-9, atol=1e-9)
    assert (ga[0] is None) == (order == 1)
    assert torch.equal(fit_head(**t, lr=.5, steps=20), (za if n < 2*D else zb)[-1].detach())

@paths
def test_second_derivatives(path):
    t = task(E=1, n=2, m=2, D=2, N=2)
    leaves = tuple(t[k].requires_grad_() for k in ("support", "query", "weight", "bias"))
    assert torch.autograd.gradgradcheck(lambda s, q, w, b: path(s, t["labels"], q, w, b, .5, [3])[0], leaves)

@paths
def test_a_batch_is_its_tasks(path):
    t = task(E=4)
    all_, = path(**t, lr=.3, steps=[30])
    for e in range(4):
        one, = path(**t | {k: t[k][e:e+1] for k in ("support", "labels", "query")}, lr=.3, steps=[30])
        assert torch.allclose(one[0], all_[e], rtol=0, atol=1e-12)

@paths
def test_order_of_support_does_not_matter(path):
    t = task()
    p = torch.tensor([2, 0, 3, 1])
    a, = path(**t, lr=.3, steps=[30])
    b, = path(**t | dict(support=t["support"][:, p], labels=t["labels"][:, p]), lr=.3, steps=[30])
    assert torch.allclose(a, b, rtol=0, atol=1e-12)

@paths
def test_empty_batch_and_one_class(path):
    t = task()
    none, = path(**t | {k: t[k][:0] for k in ("support", "labels", "query")}, lr=.1, steps=[2])
    assert none.shape == (0, 5, 3)
    z, = path(**task(N=1), lr=.1, steps=[5])
    assert torch.allclose(z, task(N=1)["query"] @ task(N=1)["weight"].T + task(N=1)["bias"]) # P = Y: nothing to learn
    assert path(**t, lr=.1, steps=[]) == []

@paths
def test_stays_finite(path):
    t = task()
    for lr, size in ((1e6, 1.), (.1, 1e3)):
        z, = path(**t | dict(support=t["support"]*size), lr=lr, steps=[100])
        assert z.isfinite().all()

@paths
def test_first_order_keeps_no_steps(path):
    def nodes(order, steps):
        t = task()
        for k in ("support", "query", "weight", "bias"): t[k].requires_grad_()
        seen, todo = set(), [path(**t, lr=.1, steps=[steps], order=order)[0].grad_fn]
        while todo:
            f = todo.pop()
            if f is None or f in seen: continue
            seen.add(f)
            todo += [o for o, _ in f.next_functions]
        return len(seen)
    assert nodes(1, 2) == nodes(1, 50) < nodes(2, 2) < nodes(2, 50)

@paths
def test_inputs_and_global_randomness_are_left_alone(path):
    t, state = task(), torch.get_rng_state()
    before = {k: v.clone() for k, v in t.items()}
    path(**t, lr=.1, steps=[10])
    BaseLearner(6, 3)
    assert all(torch.equal(before[k], t[k]) for k in t) and torch.equal(state, torch.get_rng_state())

@paths
@pytest.mark.parametrize("order", [1, 2])
def test_reads_no_value(path, order): # meta tensors have none: reading one fails here, and would wait on a GPU
    t = {k: v.to("meta") for k, v in task().items()}
    z, = path(**t, lr=.1, steps=[3], order=order)
    assert z.shape == (3, 5, 3) and z.device.type == "meta"

@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@paths
def test_never_waits_for_the_gpu(path):
    t = task(E=4, dtype=torch.float32)
    want, = path(**t, lr=.1, steps=[20])
    t = {k: v.cuda() for k, v in t.items()}
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try: z, = path(**t, lr=.1, steps=[20])
    finally: torch.cuda.set_sync_debug_mode("default")
    assert torch.allclose(z.cpu(), want, atol=1e-4)

def test_saved_and_loaded():
    t, a, b = task(dtype=torch.float32), BaseLearner(6, 3, .1, 5), BaseLearner(6, 3, .1, 5)
    with torch.no_grad():
        a.weight.add_(t["weight"])
        a.bias.add_(t["bias"])
    b.load_state_dict(a.state_dict())
    x = t["support"], t["labels"], t["query"]
    assert torch.equal(a(*x), b(*x)) and torch.equal(a(*x), fit_head(*x, t["weight"], t["bias"], .1, 5))
    loss = F.cross_entropy(a(*x).mT, torch.zeros(3, 5, dtype=torch.int64))
    loss.backward()
    assert a.weight.grad is not None and b.weight.grad is None

@pytest.mark.parametrize("E, n, N", [(1, 1, 3), (1, 1, 1), (1, 5, 5), (3, 1, 4), (3, 10, 5), (3, 11, 5), (1, 25, 5)])
def test_heads_of_every_size_on_the_way(E, n, N):
    "Also where an array of one task or one picture is contiguous in any order of its axes."
    t, steps = task(E, n, N=N), [0, 1, 1, 20]
    weights, biases = fit_heads(t["support"], t["labels"], t["weight"], t["bias"], 0.1, steps)
    for i, z in enumerate(head_path(**t, lr=0.1, steps=steps)):
        logits = t["query"] @ weights[:, i].mT + biases[:, i, None]
        assert torch.allclose(logits, z, rtol=0, atol=1e-12)
