"Tasks: hostile shapes, uneven classes, samplers that stop and go on."
import sys

import pytest
import torch

from mtl_nb.core import BadInput
from mtl_nb.data.bank import ImageBank
from mtl_nb.data.episodes import TaskShape, TaskSampler, sample_tasks, show_task, task_explorer

def gen(seed=0): return torch.Generator().manual_seed(seed)
def classes(*sizes): return list(torch.arange(sum(sizes)).split(list(sizes)))

def bank(*sizes):
    x = torch.randint(0, 256, (sum(sizes), 3, 8, 8), generator=gen(), dtype=torch.uint8)
    y = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return ImageBank(x, y, [f"c{i}" for i in range(len(sizes))])

@pytest.mark.parametrize("kw, message", [
    (dict(n_way=1), "way must be at least 2, got 1"), (dict(n_way=-5), "way"),
    (dict(k_shot=0), "shot must be at least 1, got 0"), (dict(k_shot=-1), "shot"),
    (dict(n_query=0), "query must be at least 1, got 0"), (dict(n_way=655, n_query=101), "below 65,536, got 66,155")])
def test_a_shape_is_validated(kw, message):
    with pytest.raises(BadInput, match=message): TaskShape(**kw)

def test_check_names_the_class_and_the_split():
    shape = TaskShape(3, 2, 4)
    shape.check(bank(6, 6, 6))
    few = "class 'c1' in 'val' has 5 images, but 2-shot with 4 queries needs 6: add images, or lower the shots"
    with pytest.raises(BadInput, match=few): shape.check(bank(6, 5, 6), "'val'")
    with pytest.raises(BadInput, match="3-way needs 3 classes, but 'val' has only 2"): shape.check(bank(6, 6), "'val'")

def test_sampling_validates_its_input():
    shape = TaskShape(3, 1, 4)
    with pytest.raises(BadInput, match="3-way needs 3 classes, got 2"): sample_tasks(classes(9, 9), 1, shape, gen())
    small = classes(9, 4, 9, 9)
    with pytest.raises(BadInput, match="has 4 images, but a task needs 5"): sample_tasks(small, 1, shape, gen())
    with pytest.raises(BadInput, match="-1 tasks"): sample_tasks(classes(9, 9, 9), -1, shape, gen())
    with pytest.raises(BadInput, match="got 2"): sample_tasks(classes(9, 9, 9), 1, shape, gen(), torch.tensor([0, 2]))
    sample_tasks(small, 1, shape, gen(), torch.tensor([0, 2, 3])) # the small class is not asked for

def test_no_tasks_and_odd_numbers_of_tasks():
    shape = TaskShape(2, 1, 1)
    for n in (0, 1, 499, 500, 501, 1000, 1003):
        idx = sample_tasks(classes(5, 5, 5), n, shape, gen())
        assert idx.shape == (n, 2, 2) and idx.dtype == torch.int64

def test_classes_of_very_different_size():
    by_class, shape = classes(4, 300, 5, 40), TaskShape(4, 1, 3)
    idx = sample_tasks(by_class, 2000, shape, gen())
    owner = torch.bucketize(idx, torch.tensor([3, 303, 308, 348]))
    assert (owner == owner[..., :1]).all() and (owner[..., 0].sort(1).values == torch.arange(4)).all()
    assert (idx.flatten(1).sort(1).values.diff(dim=1) > 0).all()
    n = idx.flatten().bincount(minlength=349)
    assert (n[:4] == 2000).all() and n.min() > 0
    assert (n[309:].float() - 200).abs().max() < 6*200**.5 # all 40 images of a class as often

def test_support_and_query_are_exchangeable():
    idx = sample_tasks(classes(10, 10, 10), 6000, TaskShape(3, 1, 4), gen())
    for slot in range(5):
        counts = idx[..., slot].flatten().bincount(minlength=30)
        assert (counts - 600).abs().max() < 6*600**.5

def test_indices_need_not_be_contiguous():
    by_class = [torch.tensor([7, 100, 3, 55]), torch.tensor([8, 9, 10]), torch.tensor([1, 2, 4, 5, 6])]
    idx = sample_tasks(by_class, 300, TaskShape(2, 1, 2), gen())
    assert set(idx.flatten().tolist()) == set(torch.cat(by_class).tolist())

def test_tasks_are_pinned():
    idx = sample_tasks(classes(5, 6, 7), 2, TaskShape(2, 1, 2), gen())
    assert idx.tolist() == [[[6, 8, 5], [4, 3, 2]], [[17, 12, 14], [9, 7, 8]]]

def test_the_global_generator_is_left_alone():
    state = torch.get_rng_state()
    next(TaskSampler(classes(9, 9), TaskShape(2, 1, 1), seed=3))
    assert torch.equal(torch.get_rng_state(), state)

def test_a_sampler_stops_and_goes_on():
    sampler = TaskSampler(classes(9, 9, 9), TaskShape(2, 1, 2), batch=3, seed=1)
    for _ in range(5): next(sampler)
    state = sampler.state_dict()
    later = [next(sampler) for _ in range(4)]
    again = TaskSampler(classes(9, 9, 9), TaskShape(2, 1, 2), batch=3)
    again.load_state_dict(state)
    assert all(torch.equal(a, next(again)) for a in later)

def test_samplers_of_different_seeds_differ_and_batches_are_checked():
    a, b = (next(TaskSampler(classes(9, 9, 9), TaskShape(2, 1, 2), seed=s)) for s in (0, 1))
    assert not torch.equal(a, b)
    with pytest.raises(BadInput, match="at least 1 task, got 0"): TaskSampler(classes(9), TaskShape(), batch=0)

def test_a_task_is_shown_whatever_its_shape():
    for n, k, q, shown in ((2, 1, 1, 4), (3, 4, 5, 2)):
        task = sample_tasks(classes(9, 9, 9), 1, TaskShape(n, k, q), gen())[0]
        fig = show_task(bank(9, 9, 9), task, k, shown)
        left, right = (ax.images[0].get_array().shape for ax in fig.axes)
        assert left == (10*n, 10*k, 3) and right == (10*n, 10*min(q, shown), 3)

def test_the_explorer_of_a_bank_with_two_classes():
    pytest.importorskip("ipywidgets")
    box = task_explorer(bank(40, 40))
    assert bytes(box.children[5].value).startswith(b"\x89PNG") and box.children[0].max == 2
    assert "2-way 1-shot" in box.children[4].value

def test_the_explorer_without_ipywidgets(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(BadInput, match=r'pip install "mtl_nb\[nb\]"'): task_explorer(bank(40, 40))

def test_the_explorer_says_what_cannot_be_drawn():
    pytest.importorskip("ipywidgets")
    box = task_explorer(bank(12, 12, 12))
    assert "has 12 images" in box.children[4].value and bytes(box.children[5].value) == b""
    box.children[2].value = 5
    assert "3-way 1-shot" in box.children[4].value
