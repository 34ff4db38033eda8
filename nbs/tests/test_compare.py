"Comparing records: same exams only, seeds, verdicts, changes one at a time, classes; on small made-up records."
from dataclasses import replace

import pytest
import torch

from mtl_nb.core import BadInput
from mtl_nb.data.episodes import TaskShape
from mtl_nb.data.glyphs import glyphs
from mtl_nb.evaluation.exam import make_exam
from mtl_nb.experiments.compare import (
    EQUAL, SPLITS, Cell, Table, accuracy_at, by_classes, by_seed, class_table, classes_of, difference, gain,
    of_one_config, one_change_table, place_name, places, rows_at)
from mtl_nb.experiments.config import preset
from mtl_nb.experiments.records import read_results
from mtl_nb.experiments.report import report, table1
from mtl_nb.train.objectives import ObjectiveConfig
from test_report import changed_run, refused, right, row, write  # noqa: F401

KNOWN = "44308db5bacb88d6" # FC100, test, 1-shot


def small(folder): return rows_at(read_results(folder), "fc100", "small")


@pytest.fixture
def three(write):  # noqa: F811
    "Three seeds, phase 1 anew: gains of 0.3, 0.5 and 0.9 points, as 30, 50 and 90 more correct answers of 10,000."
    for s, more in enumerate((30, 50, 90)):
        base = torch.full((1000,), 5) # of 10
        best = base.clone()
        best[:more] += 1
        rows = [row("head only", base, s, query=2), row("MTL", best, s, query=2)]
        folder = write(f"fc100-small-s{s}.json", rows, seed=s)
    return folder


def test_different_exams_are_rejected(write):  # noqa: F811
    a = row("MTL", right(40))
    for k, v in dict(exam="another", protocol="paper", query=10, split="val", shot=5, way=7).items():
        refused(lambda: difference(a, row("head only", right(38)) | {k: v}), "'MTL'", "'head only'", k)
    write("one.json", [a])
    folder = write("two.json", [row("head only", right(38), exam="other images")])
    refused(lambda: gain(small(folder), "MTL", "head only", 1), "one.json", "two.json", "exam")


def test_common_prefix():
    a, b = right(40, 30), right(38, 12, 1)
    d, ci = difference(row("update [Θ;θ]", b), row("head only", a))
    x = (b - a[:12]).double()/75
    assert abs(d - x.mean().item()) < 1e-12 and abs(ci - 1.96*x.std().item()/12**.5) < 1e-12


def test_seeds_against_arithmetic(three):
    c = gain(small(three), "MTL", "head only", 1)
    x = torch.tensor([.3, .5, .9], dtype=torch.float64)
    assert abs(100*c.mean - x.mean().item()) < 1e-9 and abs(100*c.ci - 4.303*x.std().item()/3**.5) < 1e-9
    assert (c.seeds, c.phases, c.tasks) == (3, 3, 1000) and c.verdict == "no difference shown (3 seeds)"
    assert str(accuracy_at(small(three), "MTL", 1)).endswith("(3 seeds)")


def verdict(*means, phases=None, split=""):
    phases = len(means) if phases is None else phases
    return Cell.over([(v, .001) for v in means], phases=phases, files=("a",), signed=True, split=split).verdict


def test_verdicts():
    assert verdict(.01, .011, .012) == "helps on these classes (3 seeds)"
    assert verdict(-.01, -.011, -.012) == "hurts on these classes (3 seeds)"
    assert verdict(.01, .01, .01, split="val") == "ahead on val (3 seeds)"
    assert verdict(-.01, -.01, -.01, split="val") == "behind on val (3 seeds)"
    assert verdict(.01, .011, .012, phases=1) == "ahead in these 3 runs" # one backbone
    assert verdict(.01) == "ahead in this run" and verdict(-.01) == "behind in this run"
    assert verdict(.0005) == "no difference shown in this run"
    assert verdict(.010, .0101) == "ahead in these 2 runs"
    assert verdict(.01, .02) == "no difference shown in these 2 runs" # t is 12.7
    same = Cell.over([(0., 0.)], phases=1, files=("a",), signed=True)
    assert same.verdict == str(same) == "identical predictions"


def test_one_backbone_is_known_by_its_weights(write):  # noqa: F811
    "Seed 0 trained it, seed 1 was given it, seed 2 has its own: two phase 1s."
    def rows(seed): return [row("head only", right(40), seed), row("MTL", right(40) + 1, seed)]
    write("s0.json", rows(0), theta="f00d")
    write("s1.json", rows(1), seed=1, recipe=dict(backbone="f00d"), theta="f00d")
    c = gain(small(write("s2.json", rows(2), seed=2, theta="beef")), "MTL", "head only", 1)
    assert (c.seeds, c.phases, c.verdict) == (3, 2, "ahead in these 3 runs")


def test_one_backbone_is_one_phase_1(write):  # noqa: F811
    for s in range(3):
        rows = [row("head only", right(40), s), row("MTL", right(40) + 1, s)]
        folder = write(f"s{s}.json", rows, seed=s, recipe=dict(backbone="f00d"))
    c = gain(small(folder), "MTL", "head only", 1)
    assert (c.seeds, c.phases, c.verdict) == (3, 1, "ahead in these 3 runs")


def test_seeds_that_agree_by_chance_have_the_interval_of_their_tasks(write):  # noqa: F811
    for s in range(3):
        rows = [row("head only", right(40), s), row("MTL", right(41, seed=1), s)]
        folder = write(f"s{s}.json", rows, seed=s)
    c, d = gain(small(folder), "MTL", "head only", 1), (right(41, seed=1) - right(40)).double()/75
    assert (c.seeds, c.phases) == (3, 3) and abs(c.ci - 1.96*d.std().item()/40**.5) < 1e-12


def test_a_seed_recorded_twice_counts_once(write):  # noqa: F811
    write("a.json", [row("head only", right(40)), row("MTL", right(42, seed=1))])
    write("b.json", [row("head only", right(40, 50)), row("FT θ", right(41, seed=2))])
    runs = read_results(write("c.json", [row("MTL + HT", right(43, seed=3))]))
    rows = rows_at(runs, "fc100", "small")
    assert [r["file"] for r in by_seed(rows, "head only", 1)[0]] == ["b.json", "a.json"] # more tasks first
    t = table1(runs, {}, "fc100", "small")
    assert t["head only", "1-shot"].seeds == 1 and "recorded again" in repr(t) and "in a.json" in repr(t)
    assert gain(rows, "MTL", "head only", 1).files == ("a.json",) # both sides from one file where there is one
    assert gain(rows, "MTL + HT", "MTL", 1).files == ("c.json", "a.json")


def test_configs_that_do_not_go_together(write):  # noqa: F811
    write("a.json", [row("MTL", right(40))])
    longer = replace(preset("small", "fc100").phase1, epochs=40)
    recipe = dict(phase1=longer, head_label=EQUAL, methods=())
    folder = write("equal.json", [row(EQUAL, right(41))], recipe=recipe)
    assert gain(small(folder), "MTL", EQUAL, 1).files == ("a.json", "equal.json")
    write("b.json", [row("MTL", right(40), 1)], seed=1, recipe=dict(phase1=replace(longer, seed=1)))
    refused(lambda: of_one_config(read_results(folder), "fc100", "small"), "a.json", "b.json", "phase1.epochs")
    assert "Not shown: a.json and b.json" in report(folder)


def test_places_and_their_names(write, changed_run):  # noqa: F811
    write("a.json", [row("MTL", right(40)), row("MTL", right(40), split="val")])
    overrides = "inner=[0.01, 20], order=1"
    runs = read_results(changed_run("b.json", overrides, [row("MTL", right(40))], order=1, inner=(.01, 20)))
    assert places(runs) == [("fc100", "small", "test"), ("fc100", "small", "val")]
    assert [place_name(p) for p in places(runs, overrides=True)][-1] == "fc100, small + 2 overrides, test"


def test_changes_one_at_a_time(write, changed_run):  # noqa: F811
    "Against the preset without overrides, each for its own method; a change of phase 2 is no change to the head."
    def on(method, r, **more): return row(method, r, split="val", **more)
    head, mtl, better = right(40), right(41, seed=1), right(44, seed=2)
    write("fc100-small-val-s0.json", [on("head only", head), on("MTL", mtl, seconds=120.)])
    changed_run("a.json", "centred=false", [on("head only", better)], centred=False)
    folder = changed_run("b.json", "order=1", [on("head only", head), on("MTL", better, seconds=60.)], order=1)
    runs, base = read_results(folder), "small without overrides"
    a, b = one_change_table(runs, "fc100"), one_change_table(runs, "fc100", shots=(1,), method="MTL")
    assert [o[0] for o in a.rows] == [base, "centred=false"] and [o[0] for o in b.rows] == [base, "order=1"]
    def mean(x, y): return pytest.approx((x - y).double().mean().item()/75)
    assert a["centred=false", "1-shot, gain in points"].mean == mean(better, head)
    assert b["order=1", "1-shot, gain in points"].mean == mean(better, mtl)
    assert b["order=1", "1-shot, over head only"].mean == mean(better, head)
    assert [o[-1] for o in b.rows] == ["2", "1"] and a[base, "phase 1, min"] == "1"
    text = report(folder)
    assert all(f"`{o}.json`" in text for o in ("a", "b", "fc100-small-val-s0"))
    for wrong in (dict(data="fc1000"), dict(method="mtl"), dict(shots=(0,)), dict(shots=1)):
        with pytest.raises(BadInput): one_change_table(runs, **dict(data="fc100") | wrong)


def test_a_change_that_was_not_evaluated_on_val_is_not_listed(write, changed_run):  # noqa: F811
    write("fc100-small-s0.json", [row("head only", right(40))])
    folder = changed_run("a.json", "centred=false", [row("head only", right(44))], centred=False)
    assert [o[0] for o in one_change_table(read_results(folder), "fc100").rows] == ["small without overrides"]


def test_more_than_one_change_is_no_comparison(write, changed_run):  # noqa: F811
    write("fc100-small-val-s0.json", [row("head only", right(40), split="val")])
    rows, mixup = [row("head only", right(43), split="val")], dict(objective=ObjectiveConfig(mixup=.2))
    folder = changed_run("a.json", "objective.mixup=0.2", rows, **mixup)
    assert len(one_change_table(read_results(folder), "fc100").rows) == 2
    changed_run("a.json", "objective.mixup=0.2", rows, **mixup, size=84)
    runs = read_results(folder)
    refused(lambda: one_change_table(runs, "fc100"), "a.json", "in more than its overrides: in size")
    refused(lambda: one_change_table(runs, "fc100", "nosuch"), "no run of 'nosuch' on 'fc100' is recorded")


@pytest.mark.parametrize("split", ["near", "far"])
def test_lists_of_the_glyphs_are_those_of_the_images(split):
    for name, bank in glyphs(0, split).items():
        for k in (1, 5)*(name != "train"):
            exam = make_exam(bank, TaskShape(5, k, 15), tasks=300, split=name)
            tasks, classes = classes_of(dict(exam=exam.fingerprint, way=5, shot=k, query=15, tasks=300))
            assert torch.equal(tasks, bank.y[exam.idx[:, :, 0]]) and classes == len(bank.names)


def test_seeds_are_averaged_task_by_task(write):  # noqa: F811
    a, b = right(40), right(41)
    for s, (x, y) in enumerate([(a, b), (b, a)]):
        folder = write(f"s{s}.json", [row("head only", x, s, exam=KNOWN), row("MTL", y, s, exam=KNOWN)], seed=s)
    mean, ci, without = by_classes(small(folder), "MTL", "head only", 1)
    assert (mean, ci) == (0, 0) and len(without) == SPLITS[KNOWN][0] == 20   # the two seeds cancel in every task
    one = [r for r in small(folder) if r["seed"] == 0]
    assert by_classes(one, "MTL", "head only", 1)[1] > 0 and by_classes(one, "MTL", "no method", 1) is None


def test_unknown_lists_of_classes(write):  # noqa: F811
    runs = read_results(write("a.json", [row("head only", right(40)), row("MTL", right(42))]))
    rows = rows_at(runs, "fc100", "small")
    refused(lambda: by_classes(rows, "MTL", "head only", 1), "a.json", "are not known")
    assert [r[4] for r in class_table(runs, [("MTL", "head only")]).rows] == ["classes not known"]
    assert class_table([], [("MTL", "head only")]).rows == []


def test_a_bar_in_a_name_ends_no_cell():
    table = Table("T", ("name", "n"), [("a|b", "1")])
    assert str(table).splitlines()[-1] == r"| a\|b | 1 |"
