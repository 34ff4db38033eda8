"""Properties that hold for any input, tried on inputs that hypothesis makes up: samplers, banks, the inner loop, folders.

Always a few examples, the same each time; with `--nbflags=slow` many."""
import tempfile
import unicodedata
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from mtl_nb.core import BadInput
from mtl_nb.data.bank import ImageBank
from mtl_nb.data.episodes import TaskSampler, TaskShape, sample_tasks
from mtl_nb.data.folders import _is_junk, class_files
from mtl_nb.data.hard_tasks import HardTaskSampler
from mtl_nb.models.base_learner import fit_head, fit_heads, head_path, head_path_primal

SEEDS = st.integers(0, 2**32 - 1)
SHAPES = st.builds(TaskShape, st.integers(2, 6), st.integers(1, 5), st.integers(1, 5))
SIZES = st.lists(st.integers(1, 14), min_size=1, max_size=9) # images of each class


def generator(seed): return torch.Generator().manual_seed(seed)


def class_lists(sizes, seed):
    "Image numbers of each class, in no order."
    return list(torch.randperm(sum(sizes), generator=generator(seed)).split(sizes))


# --- tasks ---------------------------------------------------------------------------------------------------------
def check_tasks(tasks, by_class, shape, n, classes=None):
    "Right shape, classes that differ, images that differ, each of its class."
    assert tasks.shape == (n, shape.n_way, shape.k_shot + shape.n_query) and tasks.dtype == torch.int64
    owner = {int(i): c for c, images in enumerate(by_class) for i in images}
    for task in tasks.tolist():
        found = [{owner[i] for i in row} for row in task]
        assert all(len(o) == 1 for o in found) and len(set.union(*found)) == shape.n_way
        assert len({i for row in task for i in row}) == shape.n_way*(shape.k_shot + shape.n_query)
        assert classes is None or set.union(*found) <= set(classes)


@given(SIZES, SHAPES, st.integers(0, 12), SEEDS)
@example([6]*2, TaskShape(2, 1, 5), 501, 0)
def test_tasks(sizes, shape, n, seed):
    by_class = class_lists(sizes, seed)
    possible = len(sizes) >= shape.n_way and min(sizes) >= shape.k_shot + shape.n_query
    if not possible:
        with pytest.raises(BadInput): sample_tasks(by_class, n, shape, generator(seed))
        return
    tasks = sample_tasks(by_class, n, shape, generator(seed))
    check_tasks(tasks, by_class, shape, n)
    assert torch.equal(tasks, sample_tasks(by_class, n, shape, generator(seed)))
    chosen = torch.randperm(len(sizes), generator=generator(seed))[:max(shape.n_way, len(sizes)//2)]
    check_tasks(sample_tasks(by_class, n, shape, generator(seed), chosen), by_class, shape, n, chosen.tolist())


@given(SHAPES, st.integers(1, 5), st.integers(0, 6), SEEDS)
def test_a_task_sampler_goes_on_from_its_state(shape, batch, before, seed):
    by_class = class_lists([shape.k_shot + shape.n_query + 1]*(shape.n_way + 1), seed)
    first, other = TaskSampler(by_class, shape, batch, seed), TaskSampler(by_class, shape, batch, seed + 1)
    for _ in range(before): next(first)
    other.load_state_dict(first.state_dict())
    for _ in range(3): assert torch.equal(next(first), next(other))


@given(SHAPES, st.integers(1, 5), st.integers(1, 9), st.integers(0, 5), st.integers(0, 30), SEEDS)
def test_cycles_of_hard_tasks(shape, batch, random, hard_count, moment, seed):
    "Random tasks, then hard ones of classes that failed; as many as asked, never mixed; the same after a restart."
    by_class = class_lists([shape.k_shot + shape.n_query]*(2*shape.n_way), seed)
    owner, g = {int(i): c for c, o in enumerate(by_class) for i in o}, generator(seed)
    def sampler(): return HardTaskSampler(by_class, shape, batch, seed, random, hard_count)
    tasks, kinds, failed = sampler(), [], set()
    for step in range(40):
        if step == moment: # a restart: another sampler takes its place
            state, tasks = tasks.state_dict(), sampler()
            tasks.load_state_dict(state)
        now = next(tasks)
        assert 1 <= len(now) <= batch
        check_tasks(now, by_class, shape, len(now))
        classes = torch.tensor([[owner[int(row[0])] for row in task] for task in now])
        if tasks.hard and len(failed) >= shape.n_way: assert set(classes.flatten().tolist()) <= failed
        elif tasks.hard: assert all(len(failed & set(o)) == len(failed) for o in classes.tolist())
        if not tasks.hard and kinds and kinds[-1]: failed = set()
        accuracy = torch.randint(3, classes.shape, generator=g)/2
        before = tasks.state_dict()
        tasks.feedback(classes, accuracy)
        if not tasks.hard:
            worst = [set(c[a == a.min()].tolist()) for c, a in zip(classes, accuracy)]
            new = set(tasks.failed) - failed
            assert all(w & set(tasks.failed) for w in worst if hard_count) and len(new) <= len(worst)
            assert new <= set.union(*worst)
            failed |= new
        else: assert str(before) == str(tasks.state_dict()) # hard tasks give no feedback
        kinds += [tasks.hard]*len(now)
    text = "".join("h" if o else "r" for o in kinds)
    cycle = "r"*random + "h"*hard_count
    assert (cycle*len(text)).startswith(text)


# --- banks ---------------------------------------------------------------------------------------------------------
@given(st.lists(st.integers(1, 5), min_size=2, max_size=6), st.integers(1, 3), SEEDS)
def test_banks(sizes, side, seed):
    "The order in which images come makes no difference; subsets keep what they take, and can be undone."
    g, n = generator(seed), sum(sizes)
    x = torch.randint(0, 3, (n, 3, side, side), generator=g, dtype=torch.uint8)
    y, names = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)), [f"c{i}" for i in range(len(sizes))]
    bank, order = ImageBank(x, y, names), torch.randperm(n, generator=g)
    assert ImageBank(x[order], y[order], names).digest == bank.digest
    assert [len(o) for o in bank.by_class] == sizes
    p = torch.randperm(len(sizes), generator=g).tolist()
    turned = bank.subset(p)
    assert turned.names == [names[c] for c in p] and turned.subset([p.index(c) for c in range(len(p))]).digest == bank.digest
    for new, old in enumerate(p):
        assert torch.equal(turned.x[turned.by_class[new]], bank.x[bank.by_class[old]])
    few = bank.first(2)
    assert [len(o) for o in few.by_class] == [min(2, s) for s in sizes]
    assert all(torch.equal(few.x[a], bank.x[b[:2]]) for a, b in zip(few.by_class, bank.by_class))
    drawn = torch.randint(n, (2, 3), generator=g)
    assert torch.equal(bank.take(drawn)[1, 2], bank.take(drawn[1, 2])) and bank.take(drawn).shape == (2, 3, 3, side, side)


# --- the inner loop ------------------------------------------------------------------------------------------------
def close(a, b, tolerance=1e-8):
    size = max(1, a.abs().max().item(), b.abs().max().item())
    assert a.isfinite().all() and b.isfinite().all() and (a - b).abs().max().item() <= tolerance*size


@given(st.integers(2, 5), st.integers(1, 12), st.integers(1, 8), st.sampled_from([1e-12, 1e-3, .1, 1, 10, 1e6]),
       st.sampled_from([1e-8, 1, 1e3, 1e8]), st.booleans(), st.sampled_from([1, 2]), SEEDS)
@example(2, 1, 1, .1, 1, False, 2, 0) # one picture
@example(5, 12, 3, 1, 1e3, True, 2, 0) # one picture, many times; extreme logits
def test_the_dual_loop_is_the_primal_loop(n_way, n, d, lr, scale, copies, order, seed):
    "Tiny and huge rates, extreme logits, one picture, copies; the order of the pictures makes no difference."
    g, steps = generator(seed), [0, 1, 2]
    support = scale*torch.randn(2, n, d, generator=g, dtype=torch.float64)
    if copies: support = support[:, :1].expand(-1, n, -1)
    labels = torch.randint(n_way, (2, n), generator=g)
    query, weight = (torch.randn(*o, d, generator=g, dtype=torch.float64) for o in ((2, 4), (n_way,)))
    bias, p = torch.randn(n_way, generator=g, dtype=torch.float64), torch.randperm(n, generator=g)
    head = dict(weight=weight, bias=bias, lr=lr)
    dual, primal = (f(support, labels, query, steps=steps, order=order, **head) for f in (head_path, head_path_primal))
    mixed = head_path(support[:, p], labels[:, p], query, steps=steps, order=order, **head)
    for a, b, c in zip(dual, primal, mixed):
        close(a, b)
        close(a, c)
    close(dual[0], (query @ weight.T + bias).expand_as(dual[0]))
    close(fit_head(support, labels, query, steps=2, order=order, **head), dual[-1])
    w, b = fit_heads(support, labels, steps=steps, **head)
    close(query @ w[:, -1].mT + b[:, -1, None], dual[-1])


# --- folders -------------------------------------------------------------------------------------------------------
LETTERS = st.characters(exclude_categories=("Cs",), exclude_characters="/\0")
NAMES = st.one_of(st.text(LETTERS, min_size=1, max_size=20), st.sampled_from(
    ["-rf", "a b", "a'b", 'a"b', "a\nb", "🙂", "é", "e\u0301", "猫"*60, "x"*200, ".hidden", "Thumbs.db", "train", "%s", "$HOME", "~"]))
FILES = st.tuples(NAMES, st.sampled_from([".png", ".JPG", ".txt", "", ".webp", ".h5"]))
INSIDE = st.tuples(st.lists(FILES, max_size=4), st.lists(NAMES, max_size=2), st.sampled_from([True]*5 + [False]))
CLASSES = st.one_of(st.text(st.characters(categories=["L", "N", "P", "S", "Zs"], exclude_characters="/"), min_size=1,
                            max_size=20), NAMES)
TREES = st.dictionaries(CLASSES, INSIDE, min_size=2, max_size=4) # its files, its folders, and whether it has a picture more


def written(root, tree):
    "The tree on disk."
    for folder, (files, folders, picture) in tree.items():
        (root/folder).mkdir(exist_ok=True)
        for name in folders: (root/folder/name).mkdir(exist_ok=True)
        for name, suffix in [*files, *[("picture", ".png")]*picture]:
            if not (root/folder/f"{name}{suffix}").is_dir(): (root/folder/f"{name}{suffix}").touch()


@given(TREES)
@example({"a": ([("x", ".txt")], ["deep"], True), "-b '🙂\"": ([("é", ".JPG")], [], True)})
def test_folders_are_listed_or_passed_over_with_a_line(tree):
    assume(all(len(f"{o}.webp".encode()) < 255 and o not in (".", "..") for o in
               [*tree, *(n for files, folders, _ in tree.values() for n in [*(f for f, _ in files), *folders])]))
    said = StringIO()
    with tempfile.TemporaryDirectory() as place, redirect_stdout(said):
        root = Path(place)
        written(root, tree)
        try: found = class_files(root)
        except BadInput as e:
            assert e.args[0] and "\n" not in e.args[0]
            return
        seen = [o for o in root.glob("*/*") if not any(map(_is_junk, o.relative_to(root).parts))]
        listed = {o for paths in found.values() for o in paths}
        assert listed <= {str(o) for o in seen if o.is_file()}
        assert set(found) == {unicodedata.normalize("NFC", o.parent.name) for o in seen} and all(found.values())
        left = [o for o in seen if str(o) not in listed]
        assert not any(o.suffix.lower() in (".png", ".jpg", ".webp") and o.is_file() for o in left)
        lines = said.getvalue().splitlines()
        assert len(lines) == bool(left)
        counts = [sum(o.is_dir() for o in left), sum(o.is_file() for o in left)]
        words = [f"{counts[0]} folder", f"{counts[1]} file"]
        assert all(word in lines[0] for word, n in zip(words, counts) if n)
