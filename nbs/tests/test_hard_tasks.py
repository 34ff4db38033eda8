"The hard-task sampler beyond its page: odd sizes, ties, files, long runs."
import pytest
import torch

from mtl_nb.core import BadInput
from mtl_nb.data.episodes import TaskSampler, TaskShape
from mtl_nb.data.hard_tasks import HardTaskConfig, HardTaskSampler
from mtl_nb.train.checkpoints import load_state, save_state

shape = TaskShape(5, 1, 3)
by_class = list(torch.arange(200).split(10)) # 20 classes of 10
label = torch.arange(20).repeat_interleave(10)
def classes(idx): return label[idx[:, :, 0]]

@pytest.mark.parametrize("batch", [1, 2, 3, 4, 7, 20, 50])
@pytest.mark.parametrize("random,hard", [(20, 10), (20, 4), (5, 5), (1, 1)])
def test_cycles_and_what_they_are_made_of(batch, random, hard):
    tasks, noise = HardTaskSampler(by_class, shape, batch, 1, random, hard), torch.Generator().manual_seed(0)
    kinds, noted, failures = [], [], set()
    while len(kinds) < 10*(random + hard):
        idx = next(tasks)
        assert 1 <= len(idx) <= batch
        kinds += [tasks.hard]*len(idx)
        c = classes(idx)
        assert (label[idx] == c[..., None]).all() and (c.sort(1).values.diff(dim=1) > 0).all()
        if tasks.hard:
            noted, failures = (noted or failures), set()
            assert set(c.flatten().tolist()) <= noted if len(noted) >= 5 else all(noted <= set(o) for o in c.tolist())
        else: noted = set()
        accuracy = torch.rand(c.shape, generator=noise) # no ties
        tasks.feedback(c, accuracy)
        if not tasks.hard:
            failures |= set(c.gather(1, accuracy.argmin(1)[:, None]).flatten().tolist())
            assert set(tasks.failed) == failures
    assert kinds == ([False]*random + [True]*hard)*10

def test_the_feedback_of_the_last_random_task_is_in_the_set():
    tasks = HardTaskSampler(by_class, shape, 4, 0, random=8, hard_count=4)
    for _ in range(2): idx = next(tasks)
    tasks.feedback(classes(idx)[3:], torch.tensor([[1., 1, 0, 1, 1]])) # only of the last task
    hard = classes(next(tasks))
    assert tasks.hard and tasks.failed == [classes(idx)[3, 2].item()]
    assert (hard == tasks.failed[0]).any(1).all()

def test_ties_are_fair_and_repeatable():
    c, a = torch.tensor([4, 9, 2, 7, 11]), torch.tensor([.5, .2, .2, .9, .2])
    counts = [HardTaskSampler(by_class, shape, seed=s).failure(c, a) for s in range(600)]
    assert counts == [HardTaskSampler(by_class, shape, seed=s).failure(c, a) for s in range(600)]
    assert set(counts) == {9, 2, 11} and all(150 < counts.count(m) < 250 for m in (9, 2, 11))

def test_without_a_tie_nothing_is_drawn():
    tasks = HardTaskSampler(by_class, shape)
    before = tasks.g.get_state()
    tasks.feedback(torch.tensor([[4, 9, 2, 7, 11]]), torch.tensor([[.5, .2, .3, .9, .4]]))
    assert tasks.failed == [9] and torch.equal(tasks.g.get_state(), before)

def test_no_hard_tasks_is_the_plain_sampler_without_feedback():
    plain, none = TaskSampler(by_class, shape, 4, 3), HardTaskSampler(by_class, shape, 4, 3, hard_count=0)
    for _ in range(30):
        a, b = next(plain), next(none)
        assert torch.equal(a, b)
        none.feedback(classes(b), torch.zeros(4, 5))
    assert none.failed == [] and not none.hard

def test_feedback_makes_a_difference_only_after_the_random_tasks():
    plain, told = TaskSampler(by_class, shape, 4, 3), HardTaskSampler(by_class, shape, 4, 3)
    for _ in range(5):
        idx = next(told)
        assert torch.equal(next(plain), idx)
        told.feedback(classes(idx), torch.tensor([.1, .2, .3, .4, .5]).expand(4, -1))
    assert not torch.equal(next(plain), next(told)) and told.hard

@pytest.mark.parametrize("failed", [[], [3], [3, 8], [0, 1, 2, 3], [0, 1, 2, 3, 4], list(range(12))])
def test_the_pool_holds_the_failures_and_at_least_n(failed):
    tasks = HardTaskSampler(by_class, shape)
    tasks.failed = list(failed)
    before = tasks.g.get_state()
    pool = tasks.pool().tolist()
    assert pool[:len(failed)] == failed and len(pool) == len(set(pool)) == max(5, len(failed))
    assert torch.equal(before, tasks.g.get_state()) == (len(failed) >= 5)
    assert tasks.failed == failed

@pytest.mark.parametrize("stop", range(0, 13))
def test_state_through_a_file(tmp_path, stop):
    def go(tasks, n):
        out = []
        for _ in range(n):
            idx = next(tasks)
            tasks.feedback(classes(idx), (classes(idx)*7 % 5).float()) # ties among them
            out.append(idx)
        return out
    tasks, again = HardTaskSampler(by_class, shape, 4, 5), HardTaskSampler(by_class, shape, 4, 77)
    go(again, 4)
    go(tasks, stop)
    save_state(tmp_path/"t.safetensors", tasks=tasks)
    again.load_state_dict(load_state(tmp_path/"t.safetensors")["tasks"])
    assert all(torch.equal(a, b) for a, b in zip(go(tasks, 20), go(again, 20), strict=True))

def test_a_saved_state_does_not_change_with_the_sampler():
    tasks = HardTaskSampler(by_class, shape)
    tasks.failed = [1]
    state = tasks.state_dict()
    tasks.failed.append(2)
    next(tasks)
    assert state["failed"] == [1] and state["left"] == 20

@pytest.mark.parametrize("bad", [dict(random=0), dict(random=-3), dict(hard_count=-1), dict(batch=0)])
def test_wrong_counts_are_rejected(bad):
    with pytest.raises(BadInput) as e: HardTaskSampler(by_class, shape, **bad)
    assert "\n" not in str(e.value)

def test_a_class_with_too_few_images_is_rejected():
    with pytest.raises(BadInput, match="3 images"): next(HardTaskSampler([*by_class[:-1], torch.arange(3)], shape))

def test_the_config_counts_by_shots_and_is_validated():
    config = HardTaskConfig(shot1=20, shot5=10, other=7)
    assert [config.count(k) for k in (1, 2, 5, 10, 20)] == [20, 7, 10, 4, 7]
    assert HardTaskConfig(shot1=0).count(1) == 0
    with pytest.raises(BadInput, match="random must be at least 1, got 0"): HardTaskConfig(random=0)
    with pytest.raises(BadInput, match="shot5 must not be negative, got -1"): HardTaskConfig(shot5=-1)

def test_exactly_n_classes():
    tasks = HardTaskSampler(by_class[:5], shape, 4, 0)
    for _ in range(16):
        idx = next(tasks)
        assert classes(idx).sort(1).values.tolist() == [[0, 1, 2, 3, 4]]*len(idx)
        tasks.feedback(classes(idx), torch.zeros(len(idx), 5))

def test_two_samplers_do_not_share_anything():
    a, b = HardTaskSampler(by_class, shape, 4, 0), HardTaskSampler(by_class, shape, 4, 0)
    torch.manual_seed(0)
    want = torch.rand(2)
    torch.manual_seed(0)
    idx = next(a)
    a.feedback(classes(idx), torch.zeros(4, 5))
    assert a.failed and b.failed == [] and torch.equal(torch.rand(2), want)
    assert torch.equal(next(b), idx)
