"Intervals over classes: the lists that are drawn again, the jackknife against its closed form, seeds, refusals."
import pytest
import torch

from mtl_nb.experiments.records import read_results
from mtl_nb.experiments.compare import rows_at
from mtl_nb.core import BadInput
from mtl_nb.data.episodes import TaskShape
from mtl_nb.evaluation.exam import make_exam
from mtl_nb.data.glyphs import glyphs
from mtl_nb.experiments.compare import SPLITS, by_classes, class_table, classes_of
from mtl_nb.evaluation.stats import over_classes
from test_report import right, row, write  # noqa: F401

KNOWN = "44308db5bacb88d6" # FC100, test, 1-shot


@pytest.mark.parametrize("split", ["near", "far"])
def test_lists_of_the_glyphs_are_those_of_the_images(split):
    for name, bank in glyphs(0, split).items():
        for k in (1, 5)*(name != "train"):
            exam = make_exam(bank, TaskShape(5, k, 15), tasks=300, split=name)
            tasks, classes = classes_of(dict(exam=exam.fingerprint, way=5, shot=k, query=15, tasks=300))
            assert torch.equal(tasks, bank.y[exam.idx[:, :, 0]]) and classes == len(bank.names)


def test_class_effects_alone_have_the_interval_of_their_mean():
    g = torch.Generator().manual_seed(0)
    effect, tasks = torch.randn(20, generator=g, dtype=torch.float64), torch.rand(20_000, 20, generator=g).argsort(1)[:, :5]
    mean, ci, without = over_classes(effect[tasks].mean(1), tasks, 20)
    assert abs(mean - effect.mean()) < .02 and ci == pytest.approx(2.093*effect.std().item()/20**.5, rel=.1)
    c = without.argmax()   # without the worst class the rest is best
    assert c == effect.argmin() and without[c] == pytest.approx(effect[torch.arange(20) != c].mean().item(), abs=.02)


def test_no_class_effects_leave_the_interval_over_tasks():
    g = torch.Generator().manual_seed(1)
    x, tasks = torch.randn(5000, generator=g), torch.rand(5000, 16, generator=g).argsort(1)[:, :5]
    ci = over_classes(x, tasks, 16)[1]
    assert 2.1*x.std()/5000**.5 < ci < 5*x.std()/5000**.5


def test_seeds_are_averaged_task_by_task(write):  # noqa: F811
    a, b = right(40), right(41)
    for s, (x, y) in enumerate([(a, b), (b, a)]): folder = write(f"s{s}.json", [row("head only", x, s, exam=KNOWN), row("MTL", y, s, exam=KNOWN)], seed=s)
    rows = rows_at(read_results(folder), "fc100", "small")
    mean, ci, without = by_classes(rows, "MTL", "head only", 1)
    assert (mean, ci) == (0, 0) and len(without) == SPLITS[KNOWN][0] == 20   # the two seeds undo each other in every task
    one = [r for r in rows if r["seed"] == 0]
    assert by_classes(one, "MTL", "head only", 1)[1] > 0 and by_classes(rows, "MTL", "no row", 1) is None


def test_unknown_lists_are_said_and_refused(write):  # noqa: F811
    folder = write("a.json", [row("head only", right(40)), row("MTL", right(42))])
    runs = read_results(folder)
    with pytest.raises(BadInput, match="nothing is known of the classes of exam"): by_classes(rows_at(runs, "fc100", "small"), "MTL", "head only", 1)
    assert [r[4] for r in class_table(runs, [("MTL", "head only")]).rows] == ["list of classes not known"]
    assert class_table([], [("MTL", "head only")]).rows[0][0] == "not yet run"
