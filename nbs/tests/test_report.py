"The tables made of records: sources, what is left out, published numbers, Figure 4; on small made-up records."
import base64
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from mtl_nb.core import BadInput
from mtl_nb.evaluation.stats import mean_ci
from mtl_nb.experiments.compare import EQUAL, Cell, accuracy_at, places, rows_at
from mtl_nb.experiments.config import preset
from mtl_nb.experiments.records import read_results
from mtl_nb.experiments.report import (TABLE1, beside_others, deviations, differences, figure4, read_published, report,
                                       table1)
from mtl_nb.methods.base import get_method

root = Path(__file__).parents[2]
PUBLISHED = read_published(root/"data/published")


def row(method, right, seed=0, shot=1, exam=None, split="test", protocol="standard", query=15, **more):
    "A row of a record, from the correct answers of each task."
    right = torch.as_tensor(right)
    accuracy, ci95 = (round(100*o, 3) for o in mean_ci(right.double()/(5*query)))
    correct = base64.b64encode(right.numpy().astype("<u2").tobytes()).decode()
    return dict(method=method, split=split, way=5, shot=shot, query=query, tasks=len(right), accuracy=accuracy,
                ci95=ci95, protocol=protocol, exam=exam or f"{split}-{protocol}-{shot}", seed=seed, steps=5, lr=.1,
                correct=correct, **more)


def right(mean, n=40, seed=0):
    "Correct answers, of 75, in n tasks."
    noise = torch.randn(n, generator=torch.Generator().manual_seed(seed))*4
    return (noise + mean).round().long().clamp(0, 75)


@pytest.fixture
def write(tmp_path):
    "Write a record of rows; what is given replaces fields of it, or of its config."
    def f(name, rows, data="fc100", seed=0, curves=None, recipe={}, **changes):
        config = replace(preset("small", data, seed=seed), **recipe)
        run = dict(schema=1, kind="run", rows=rows, recipe=asdict(config), data=dict(name=data), device="cpu, 1 thread",
                   recipe_sha256=config.digest(), versions={}, seconds=dict(pretrain=60.), curves=curves or {})
        (tmp_path/name).write_text(json.dumps(run | changes))
        return tmp_path
    return f


@pytest.fixture
def changed_run(write):
    "Write a record of the preset small with overrides."
    def f(name, overrides, rows, data="fc100", **recipe):
        return write(name, rows, data=data, recipe=dict(preset=f"small; {overrides}", **recipe))
    return f


def refused(f, *words):
    with pytest.raises(BadInput) as e: f()
    assert all(w in str(e.value) for w in words) and "\n" not in str(e.value)


def small(folder, *args): return table1(read_results(folder), PUBLISHED, "fc100", "small", *args)


def test_each_number_names_its_file(write):
    write("one.json", [row("head only", right(40)), row("MTL", right(42, seed=1))])
    rows = [row("FT θ", right(41, seed=2)), row("SS [Θ;θ] + HT", right(43, seed=3))]
    t = small(write("two.json", rows, recipe=dict(backbone="f00d")))
    files = {m: t[m, "1-shot"].files for m in ("head only", "MTL", "FT θ", "MTL + HT")}
    assert files == {"head only": ("one.json",), "MTL": ("one.json",), "FT θ": ("two.json",), "MTL + HT": ("two.json",)}
    assert t.files == ["one.json", "two.json"] and "[1] `one.json`, [2] `two.json`" in repr(t)
    assert abs(t["MTL", "1-shot"].mean - right(42, seed=1).double().mean().item()/75) < 1e-9
    assert t["MTL", "1-shot, the paper"] == "43.6 ±1.8"
    assert t["FT θ", "the paper's numbers"] == "widely cited, not verified"


def test_deleting_a_file_takes_its_rows_away(write):
    write("one.json", [row("head only", right(40)), row("MTL", right(42, seed=1))])
    folder = write("two.json", [row("FT θ", right(41, seed=2))])
    whole = small(folder)
    (folder/"two.json").unlink()
    assert small(folder).rows == [r for r in whole.rows if r[0] != "FT θ"] and len(whole.rows) == 3
    (folder/"one.json").unlink()
    refused(lambda: small(folder), "no run of fc100 small is recorded")
    assert report(folder).startswith("# Results of 0 recorded runs")


def test_only_what_was_run_is_shown(write):
    t = small(write("a.json", [row("head only", right(40)), row("MTL", right(41), shot=5)]))
    assert [r[0] for r in t.rows] == ["head only", "MTL"] and "10-shot" not in t.columns
    assert str(t["head only", "5-shot"]) == "–" and "not yet run" not in repr(t)


def test_rows_of_the_table(write):
    methods = ("ProtoNet", "SS [Θ;θ], scale only", "head only", "update [Θ;θ]", "MAML 4-conv + HT")
    folder = write("a.json", [row(m, right(40)) for m in methods])
    write("b.json", [row(EQUAL, right(40))], recipe=dict(head_label=EQUAL, methods=()))
    t = small(folder)
    order = ["update [Θ;θ]", "head only", EQUAL, "ProtoNet", "SS [Θ;θ], scale only", "MAML 4-conv + HT"]
    assert [r[0] for r in t.rows] == order and t["MAML 4-conv + HT", "1-shot, the paper"] == "39.9"


def test_different_exams_are_rejected(write):
    write("one.json", [row("MTL", right(40))])
    folder = write("two.json", [row("head only", right(38), exam="other images")])
    refused(lambda: small(folder), "one.json", "two.json")
    refused(lambda: beside_others(read_results(folder), PUBLISHED, "fc100"), "one.json", "two.json")
    assert "Not shown: 'MTL' in one.json and 'head only' in two.json are not compared" in report(folder)


def test_shots_that_are_not_shown_are_named(write):
    t = small(write("a.json", [row("head only", right(40)), row("head only", right(40), shot=3)]))
    assert "also recorded, and not shown: 3-shot" in repr(t)


def test_protocols_and_splits_stay_apart(write):
    def always(n): return torch.full((40,), n)
    def mean(t, method="MTL", column="1-shot"): return round(75*t[method, column].mean)
    paper = row("MTL", always(4), protocol="paper", query=1)
    folder = write("a.json", [row("MTL", always(40)), paper, row("MTL", always(50), split="val")])
    runs = read_results(folder)
    assert [mean(small(folder, *o)) for o in ((), ("val",), ("test", "paper"))] == [40, 50, 60]
    t = beside_others(runs, {}, "fc100")
    where = [("test", "standard"), ("val", "standard"), ("test", "paper")]
    names = [("MTL", f"ours: small, {split}, {protocol} protocol") for split, protocol in where]
    assert [mean(t, name) for name in names] == [40, 50, 60]
    lines = [r for r in deviations(runs).rows if r[2].endswith("protocol")]
    found = [(r[2], r[3], round(75*r[4].mean)) for r in lines]
    assert found == [(f"MTL, {o} protocol", "fc100, small, test", n) for o, n in (("standard", 40), ("paper", 60))]
    assert "paper protocol" in report(folder)


def test_a_preset_with_overrides_is_shown_where_it_was_evaluated_on_test(write, changed_run):
    write("as-it-is.json", [row("head only", right(30))])
    changed_run("val.json", "order=1", [row("MTL", right(31), split="val")], order=1)
    changed_run("a.json", "order=1", [row("MTL", right(33, seed=1))], order=1)
    rows = [row("head only", right(36, seed=1)), row("head only", right(50, seed=2), shot=10)]
    folder = changed_run("b.json", "centred=false, order=1", rows, order=1, centred=False)
    runs = read_results(folder)
    t = beside_others(runs, PUBLISHED, "fc100")
    ours = [r[:2] for r in t.rows if r[1].startswith("ours")]
    named = [("head only", "small"), ("MTL", "small + 1 override"), ("head only", "small + 2 overrides")]
    assert sorted(ours) == sorted((m, f"ours: {p}, test, standard protocol") for m, p in named)
    assert "small + 2 overrides: centred=false, order=1" in t.notes
    cell = t[("head only", "ours: small + 2 overrides, test, standard protocol"), "1-shot"]
    expected = accuracy_at(rows_at(runs, "fc100", "small; centred=false, order=1", "test"), "head only", 1)
    assert cell.mean == pytest.approx(expected.mean) and cell.files == ("b.json",)
    assert not any(r[1].startswith("ours") for r in beside_others(runs, PUBLISHED, "miniimagenet").rows)


def test_the_full_width_run_stands_in_table_2():
    runs = read_results(root/"data/results")
    t = beside_others(runs, PUBLISHED, "miniimagenet")
    mine = [r for r in t.rows if r[1].startswith("ours: strong") and "test" in r[1]]
    assert [r[0] for r in mine] == ["head only", "MTL", "MTL + HT"]
    assert all(r[2].files == ("miniimagenet-strong-turns-s0.json",) for r in mine)
    first = next(r for r in t.rows if r[1].startswith("ours"))
    assert "test" in first[1] and t["MTL + HT", "1-shot"] == "61.2 ±1.8"   # the paper first, then ours on test


def test_deviations_where_both_sides_are_recorded(write):
    folder = write("a.json", [row("MTL", right(40)), row("SS [Θ;θ], batch statistics", right(40)[:20] - 1)])
    t = deviations(read_results(folder))
    c = t[("batch norm on batch statistics", "running statistics, frozen"), "1-shot"]
    assert abs(75*c.mean - 1) < 1e-9 and c.tasks == 20 and c.files == ("a.json",)
    assert t["first-order outer gradient (PyTorch)", "measured"] == "not measured"


def test_a_deviation_taken_back_is_measured(write, changed_run):
    theirs, ours = right(40), right(43, seed=1)
    write("fc100-small-val-s0.json", [row("head only", ours, split="val")])
    folder = changed_run("a.json", "centred=false", [row("head only", theirs, split="val")], centred=False)
    line = next(r for r in deviations(read_results(folder)).rows if r[2] == "head only, ours − theirs")
    assert line[1].startswith("centred") and line[3] == "fc100, small, val"
    assert line[4].mean == pytest.approx((ours - theirs).double().mean().item()/75)


def test_differences_by_place(write):
    write("a.json", [row("MTL", right(40)), row("MTL + HT", right(41))])
    same = [row("MTL", right(50), split="val"), row("MTL + HT", right(50), split="val")]
    folder = write("b.json", same, data="glyphs")
    t = differences(read_results(folder), [("MTL + HT", "MTL"), ("MTL", EQUAL)])
    assert [r[:2] for r in t.rows] == [("MTL + HT − MTL", o) for o in ("fc100, small, test", "glyphs, small, val")]
    assert places(read_results(folder)) == [("fc100", "small", "test"), ("glyphs", "small", "val")]
    assert repr(t).count("MTL + HT − MTL") == 1 # a repeated text is left out
    assert str(t.rows[1][2]) == "identical predictions"


def test_figure_4(write, tmp_path):
    def curve(up, stop): return [[t, .4 + up*t/1000 - .0003*(t/100)**2] for t in range(0, stop, 100)]
    for s in range(2):
        curves = {"mtl-1shot": curve(.03 + s/100, 900 - 300*s), "mtl-ht-1shot": curve(.04, 900)}
        folder = write(f"s{s}.json", [row("MTL", right(40), s)], seed=s, curves=curves)
    ax, = figure4(read_results(folder), "fc100", "small").axes
    assert [o.get_text() for o in ax.get_legend().get_texts()] == ["MTL, 2 seeds", "MTL + HT, 2 seeds"]
    assert len(ax.lines) == 6
    mean = ax.lines[2].get_xydata()
    both = (curve(.03, 900)[1][1] + curve(.04, 900)[1][1])/2
    assert mean[-1, 0] == 500 and abs(mean[1, 1] - 100*both) < 1e-9 # as far as all seeds went
    out = tmp_path/"out"
    out.mkdir()
    assert "![fc100 small](figure4-fc100-small.png)" in report(folder, out)
    assert (out/"figure4-fc100-small.png").read_bytes()[:4] == b"\x89PNG"
    refused(lambda: report(folder, tmp_path/"nowhere"), "cannot write")
    assert "recorded; give a folder" in report(folder)
    for s in range(2): write(f"s{s}.json", [row("MTL", right(40), s)], seed=s)
    refused(lambda: figure4(read_results(folder), "fc100", "small"), "no curve of phase 2 is recorded")


def test_every_published_number_says_where_it_was_read():
    numbers = [o for part in PUBLISHED.values() for o in part]
    assert {"paper", "others"} == PUBLISHED.keys() and len(numbers) == 87
    assert all(o.source and "[" not in o.source and "description" not in o.source for o in numbers)
    paper = [o for o in PUBLISHED["paper"] if (o.method, o.dataset) == ("MTL + HT", "miniimagenet")]
    read = "read from the paper's table"
    assert [(str(o), o.source) for o in paper] == [("61.2 ±1.8", read), ("75.5 ±0.8", read)]


def test_published_methods_find_the_cells_of_ours():
    for o in PUBLISHED["paper"]: assert get_method(o.method).label == o.method
    assert all(get_method(m).label == m for m in TABLE1)


@pytest.mark.parametrize("line", ["MTL,fc100,one,45.1,1.8,read,", "MTL,fc100,1,high,,read,", "MTL,fc100,1,45.1,,,"])
def test_a_damaged_line_of_published_numbers(tmp_path, line):
    (tmp_path/"a.csv").write_text(f"method,dataset,shots,accuracy,interval,source,reference\n{line}\n")
    refused(lambda: read_published(tmp_path), "a.csv, line 2")
    refused(lambda: read_published(tmp_path/"nowhere"), "no such folder")


@pytest.mark.parametrize("wrong", ["torn", "list", "kind", "schema", "accuracy"])
def test_a_damaged_record_stops_the_report(write, wrong):
    r = row("MTL", right(40))
    folder = write("good.json", [r])
    if wrong == "accuracy": write("bad.json", [r | dict(accuracy=r["accuracy"] + .01)])
    elif wrong in ("kind", "schema"): write("bad.json", [r], **{wrong: "other"})
    else: (folder/"bad.json").write_text(dict(torn='{"kind": "run", "rows": [', list="[1, 2]")[wrong])
    refused(lambda: report(folder), "bad.json")


def test_cells_without_a_record_are_a_dash():
    assert str(Cell()) == "–" and Cell().verdict == "not recorded"
