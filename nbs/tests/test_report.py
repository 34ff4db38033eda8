"Comparing records and the tables made of them: sources, emptied cells, refused exams, seeds, damaged files; on small made-up records."
import base64
import json
from dataclasses import asdict, replace

import pytest
import torch

from mtl_nb.experiments.compare import EQUAL, Cell, accuracy_at, by_seed, difference, gain, of_one_recipe, places, rows_at
from mtl_nb.experiments.records import correct_counts, read_results
from mtl_nb.core import BadInput
from mtl_nb.experiments.compare import one_change_table
from mtl_nb.experiments.config import preset
from mtl_nb.experiments.report import PAPER, beside, changed_on_test, deviations, differences, figure4, report, table1
from mtl_nb.train.objectives import ObjectiveConfig


def row(method, right, seed=0, shot=1, exam=None, split="test", protocol="standard", query=15, **more):
    right = torch.as_tensor(right)
    return dict(method=method, split=split, way=5, shot=shot, query=query, tasks=len(right), accuracy=round(100*right.double().mean().item()/(5*query), 3), ci95=1., protocol=protocol,
        exam=exam or f"{split}-{protocol}-{shot}", seed=seed, steps=5, lr=.1, correct=base64.b64encode(right.numpy().astype("<u2").tobytes()).decode(), **more)


def right(mean, n=40, seed=0): return (torch.randn(n, generator=torch.Generator().manual_seed(seed))*4 + mean).round().long().clamp(0, 75)


@pytest.fixture
def write(tmp_path):
    "Write a record of rows; what is given replaces fields of it, or of its recipe."
    def f(name, rows, data="fc100", seed=0, curves=None, recipe={}, **changes):
        r = replace(preset("small", data, seed=seed), **recipe)
        run = dict(schema=1, kind="run", rows=rows, recipe=asdict(r), data=dict(name=data), device="cpu, 1 thread", seconds=dict(pretrain=60.), curves=curves or {}) | changes
        (tmp_path/name).write_text(json.dumps(run))
        return tmp_path
    return f


@pytest.fixture
def three(write):
    "Three seeds, phase 1 anew, a 0.3, 0.5 and 0.9 points gain: 30, 50 and 90 more right answers over 10,000."
    for s, more in enumerate((30, 50, 90)):
        base = torch.full((1000,), 5) # of 10
        best = base.clone(); best[:more] += 1
        folder = write(f"fc100-small-s{s}.json", [row("head only", base, s, query=2), row("MTL", best, s, query=2)], seed=s)
    return folder


def refused(f, *words):
    with pytest.raises(BadInput) as e: f()
    assert all(w in str(e.value) for w in words) and "\n" not in str(e.value)


def test_each_number_names_its_file(write):
    write("one.json", [row("head only", right(40)), row("MTL", right(42, seed=1))])
    folder = write("two.json", [row("FT θ", right(41, seed=2)), row("SS [Θ;θ] + HT", right(43, seed=3))], recipe=dict(backbone="f00d"))
    t = table1(read_results(folder), "fc100", "small")
    files = {m: t[m, "1-shot"].files for m in ("head only", "MTL", "FT θ", "MTL + HT", "FT [Θ;θ]", EQUAL)}
    assert files == {"head only": ("one.json",), "MTL": ("one.json",), "FT θ": ("two.json",), "MTL + HT": ("two.json",), "FT [Θ;θ]": (), EQUAL: ()}
    assert t.files == ["one.json", "two.json"] and "[1] `one.json`, [2] `two.json`" in repr(t)
    assert abs(t["MTL", "1-shot"].mean - right(42, seed=1).double().mean().item()/75) < 1e-9
    assert t["MTL", "1-shot, the paper"] == "43.6±1.8 [fig]" and t["FT θ", "10-shot, the paper"] == "61.1 [mem]"


def test_deleting_a_file_empties_its_cells(write):
    write("one.json", [row("head only", right(40)), row("MTL", right(42, seed=1))])
    folder = write("two.json", [row("FT θ", right(41, seed=2))])
    whole = table1(read_results(folder), "fc100", "small")
    (folder/"two.json").unlink()
    left = table1(read_results(folder), "fc100", "small")
    assert str(left["FT θ", "1-shot"]) == "not yet run" and whole["FT θ", "1-shot"].files == ("two.json",)
    assert [r for r in left.rows if r[0] != "FT θ"] == [r for r in whole.rows if r[0] != "FT θ"]
    (folder/"one.json").unlink()
    empty = table1(read_results(folder), "fc100", "small")
    assert not empty.files and {str(c) for r in empty.rows for c in r if isinstance(c, Cell)} == {"not yet run"} and "Not yet run: miniimagenet small" in report(folder)


def test_rows_of_the_table(write):
    folder = write("a.json", [row(m, right(40)) for m in ("ProtoNet", "SS [Θ;θ], scale only", "head only", "update [Θ;θ]", "MAML 4-conv + HT")])
    names = [r[0] for r in table1(read_results(folder), "fc100", "small").rows]
    assert len(names) == 16 and names[:2] == ["update [Θ;θ]", "head only"] and names[12:] == [EQUAL, "SS [Θ;θ], scale only", "ProtoNet", "MAML 4-conv + HT"]
    assert table1(read_results(folder), "fc100", "small")["MAML 4-conv + HT", "1-shot, the paper"] == "39.9 [fig]"


def test_different_exams_are_refused(write):
    a = row("MTL", right(40))
    for k, v in dict(exam="another", protocol="paper", query=10, split="val", shot=5, way=7).items():
        refused(lambda: difference(a, dict(row("head only", right(38)), **{k: v})), "'MTL'", "'head only'", k)
    write("one.json", [a])
    folder = write("two.json", [row("head only", right(38), exam="other images")])
    runs = read_results(folder)
    refused(lambda: gain(rows_at(runs, "fc100", "small"), "MTL", "head only", 1), "one.json", "two.json", "exam")
    refused(lambda: table1(runs, "fc100", "small"), "one.json", "two.json")
    refused(lambda: beside(runs, "fc100"), "one.json", "two.json")
    assert "Not shown: 'MTL' in one.json and 'head only' in two.json are not compared" in report(folder)


def test_common_prefix():
    a, b = right(40, 30), right(38, 12, 1)
    d, ci = difference(row("update [Θ;θ]", b), row("head only", a))
    x = (b - a[:12]).double()/75
    assert abs(d - x.mean().item()) < 1e-12 and abs(ci - 1.96*x.std().item()/12**.5) < 1e-12


def test_seeds_against_arithmetic(three):
    rows = rows_at(read_results(three), "fc100", "small")
    c = gain(rows, "MTL", "head only", 1)
    x = torch.tensor([.3, .5, .9], dtype=torch.float64)
    assert abs(100*c.mean - x.mean().item()) < 1e-9 and abs(100*c.ci - 4.303*x.std().item()/3**.5) < 1e-9
    assert (c.seeds, c.phases, c.tasks) == (3, 3, 1000) and c.verdict == "no difference shown (3 seeds)"
    assert str(accuracy_at(rows, "MTL", 1)).endswith("(3 seeds)")


def test_verdicts():
    over = lambda *x, phases=None: Cell.over([(v, .001) for v in x], phases=len(x) if phases is None else phases, files=("a",), signed=True).verdict
    assert over(.01, .011, .012) == "helps on these classes (3 seeds)" and over(-.01, -.011, -.012) == "hurts on these classes (3 seeds)"
    on = lambda split, x: Cell.over([(x, .001)]*3, phases=3, files=("a",), signed=True, split=split).verdict
    assert [on("val", .01), on("val", -.01), on("test", .01)] == ["ahead on val (3 seeds)", "behind on val (3 seeds)", "helps on these classes (3 seeds)"]
    assert over(.01, .011, .012, phases=1) == "ahead in these 3 runs" # one backbone
    assert over(.01) == "ahead in this run" and over(-.01) == "behind in this run" and over(.0005) == "no difference shown in this run"
    assert over(.010, .0101) == "ahead in these 2 runs" and over(.01, .02) == "no difference shown in these 2 runs" # t is 12.7
    assert Cell.over([(0., 0.)], phases=1, files=("a",)).verdict == "the very same answers" and Cell().verdict == "not yet run"


def test_one_backbone_is_known_by_its_weights(write):
    "Seed 0 trained it, seed 1 was given it, seed 2 has its own: two phase 1s."
    write("s0.json", [row("head only", right(40)), row("MTL", right(40) + 1)], theta="f00d")
    write("s1.json", [row("head only", right(40), 1), row("MTL", right(40) + 1, 1)], seed=1, recipe=dict(backbone="f00d"), theta="f00d")
    folder = write("s2.json", [row("head only", right(40), 2), row("MTL", right(40) + 1, 2)], seed=2, theta="beef")
    c = gain(rows_at(read_results(folder), "fc100", "small"), "MTL", "head only", 1)
    assert (c.seeds, c.phases, c.verdict) == (3, 2, "ahead in these 3 runs")


@pytest.mark.parametrize("odd", [dict(seed=7), dict(way=10**30), dict(query=0), dict(seconds="x")])
def test_rows_that_cannot_be_are_refused(write, odd):
    folder = write("a.json", [row("MTL", right(40)) | odd])
    refused(lambda: read_results(folder), "a.json is damaged", next(iter(odd)))


def test_more_than_one_change_is_no_comparison(write):
    write("fc100-small-val-s0.json", [row("head only", right(40), split="val")])
    folder = changed_run(write, "a.json", "objective.mixup=0.2", [row("head only", right(43), split="val")], extras=ObjectiveConfig(mixup=.2))
    assert len(one_change_table(read_results(folder), "fc100").rows) == 2
    changed_run(write, "a.json", "objective.mixup=0.2", [row("head only", right(43), split="val")], extras=ObjectiveConfig(mixup=.2), size=84)
    refused(lambda: one_change_table(read_results(folder), "fc100"), "a.json", "in more than its name tells: in size")
    refused(lambda: one_change_table(read_results(folder), "fc100", "nosuch"), "no run of 'nosuch' on 'fc100' is recorded: there are small")


def test_shots_that_are_not_shown_are_said(write):
    folder = write("a.json", [row("head only", right(40)), row("head only", right(40), shot=3)])
    assert "also recorded, and not shown: 3-shot" in repr(table1(read_results(folder), "fc100", "small"))


def test_seeds_that_agree_by_chance_have_the_interval_of_their_tasks(write):
    for s in range(3): folder = write(f"s{s}.json", [row("head only", right(40), s), row("MTL", right(41, seed=1), s)], seed=s)
    c, d = gain(rows_at(read_results(folder), "fc100", "small"), "MTL", "head only", 1), (right(41, seed=1) - right(40)).double()/75
    assert (c.seeds, c.phases) == (3, 3) and abs(c.ci - 1.96*d.std().item()/40**.5) < 1e-12   # the seeds themselves spread by nothing


def test_one_backbone_is_one_phase_1(write):
    for s in range(3): folder = write(f"s{s}.json", [row("head only", right(40), s), row("MTL", right(40) + 1, s)], seed=s, recipe=dict(backbone="f00d"))
    c = gain(rows_at(read_results(folder), "fc100", "small"), "MTL", "head only", 1)
    assert (c.seeds, c.phases, c.verdict) == (3, 1, "ahead in these 3 runs")


def test_a_seed_recorded_twice_counts_once(write):
    write("a.json", [row("head only", right(40)), row("MTL", right(42, seed=1))])
    write("b.json", [row("head only", right(40, 50)), row("FT θ", right(41, seed=2))])
    runs = read_results(write("c.json", [row("MTL + HT", right(43, seed=3))]))
    rows = rows_at(runs, "fc100", "small")
    assert [r["file"] for r in by_seed(rows, "head only", 1)[0]] == ["b.json", "a.json"] # the longer exam
    t = table1(runs, "fc100", "small")
    assert t["head only", "1-shot"].seeds == 1 and "recorded again" in repr(t) and "in a.json" in repr(t)
    assert gain(rows, "MTL", "head only", 1).files == ("a.json",) # both sides from one file where there is one
    assert gain(rows, "MTL + HT", "MTL", 1).files == ("c.json", "a.json")


def test_recipes_that_do_not_go_together(write):
    write("a.json", [row("MTL", right(40))])
    longer = replace(preset("small", "fc100").phase1, epochs=40)
    folder = write("equal.json", [row(EQUAL, right(41))], recipe=dict(phase1=longer, head_label=EQUAL, methods=()))
    assert gain(rows_at(read_results(folder), "fc100", "small"), "MTL", EQUAL, 1).files == ("a.json", "equal.json")
    write("b.json", [row("MTL", right(40), 1)], seed=1, recipe=dict(phase1=replace(longer, seed=1)))
    refused(lambda: of_one_recipe(read_results(folder), "fc100", "small"), "a.json", "b.json", "phase1.epochs")
    assert "Not shown: a.json and b.json" in report(folder)


@pytest.mark.parametrize("how", ["torn", "list", "kind", "schema", "seconds", "recipe", "row", "answers", "odd", "accuracy", "count", "too many", "curves", "bytes"])
def test_damaged_and_foreign_files(write, how):
    r = row("MTL", right(40))
    folder = write("good.json", [r])
    if how == "row": write("bad.json", [{k: v for k, v in r.items() if k != "exam"}])
    elif how == "answers": write("bad.json", [dict(r, correct="???")])
    elif how == "odd": write("bad.json", [dict(r, correct=base64.b64encode(b"abc").decode())])
    elif how == "accuracy": write("bad.json", [dict(r, accuracy=r["accuracy"] + .01)])
    elif how == "count": write("bad.json", [dict(r, tasks=41)])
    elif how == "too many": write("bad.json", [row("MTL", right(40) + 60)])
    elif how == "curves": write("bad.json", [r], curves={"mtl-1shot": [["a", None]]})
    elif how == "recipe": (folder/"bad.json").write_text(json.dumps(dict(schema=1, kind="run", rows=[r], recipe={"data": "fc100"})))
    elif how in ("kind", "schema", "seconds"): write("bad.json", [r], **{how: "other"})
    else: (folder/"bad.json").write_bytes(dict(torn=b'{"kind": "run", "rows": [', list=b"[1, 2]", bytes=b"\xff\xfe\x00")[how])
    refused(lambda: read_results(folder), "bad.json")
    refused(lambda: report(folder), "bad.json")


def test_speed_records_are_passed_over(write):
    folder = write("run.json", [row("MTL", right(40))])
    (folder/"speed-cpu.json").write_text(json.dumps(dict(schema=1, kind="speed", rows=[])))
    (folder/"a-trace.json").write_text(json.dumps(dict(schema=1, kind="trace", traces=[])))
    assert [r["file"] for r in read_results(folder)] == ["run.json"]
    refused(lambda: read_results(folder/"nowhere"), "no such folder")


def test_protocols_and_splits_stay_apart(write):
    always = lambda n: torch.full((40,), n)
    folder = write("a.json", [row("MTL", always(40)), row("MTL", always(4), protocol="paper", query=1), row("MTL", always(50), split="val")])
    runs = read_results(folder)
    mean = lambda t, r="MTL", c="1-shot": round(75*t[r, c].mean)
    assert [mean(table1(runs, "fc100", "small")), mean(table1(runs, "fc100", "small", "val")), mean(table1(runs, "fc100", "small", "test", "paper"))] == [40, 50, 60]
    t = beside(runs, "fc100")
    assert [mean(t, f"here: MTL, small, {s}, {p} protocol") for s, p in (("test", "standard"), ("val", "standard"), ("test", "paper"))] == [40, 50, 60]
    d = [r for r in deviations(runs).rows if r[2].endswith("protocol")]
    assert [(r[2], r[3], round(75*r[4].mean)) for r in d] == [("MTL, standard protocol", "fc100, small, test", 40), ("MTL, paper protocol", "fc100, small, test", 60)]
    assert str(beside(runs, "miniimagenet")["here, paper protocol", "1-shot"]) == "not yet run" and "paper protocol" in report(folder)


def test_deviations_where_both_sides_are_recorded(write):
    folder = write("a.json", [row("MTL", right(40)), row("SS [Θ;θ], batch statistics", right(40)[:20] - 1)])
    t = deviations(read_results(folder))
    c = t[("batch norm on each batch's own statistics", "running statistics, frozen"), "1-shot"]
    assert abs(75*c.mean - 1) < 1e-9 and c.tasks == 20 and c.files == ("a.json",)
    assert t["first-order outer gradient (PyTorch)", "1-shot"] == "not yet measured"


def test_differences_by_place(write):
    write("a.json", [row("MTL", right(40)), row("MTL + HT", right(41))])
    folder = write("b.json", [row("MTL", right(50), split="val"), row("MTL + HT", right(50), split="val")], data="glyphs")
    t = differences(read_results(folder), [("MTL + HT", "MTL"), ("MTL", EQUAL)])
    assert [r[:2] for r in t.rows] == [("MTL + HT − MTL", "fc100, small, test"), ("MTL + HT − MTL", "glyphs, small, val"), (f"MTL − {EQUAL}", "")]
    assert places(read_results(folder)) == [("fc100", "small", "test"), ("glyphs", "small", "val")]
    assert repr(t).count("MTL + HT − MTL") == 1 # a repeated text is left out


def test_figure_4(write, tmp_path):
    curve = lambda up, stop: [[t, .4 + up*t/1000 - .0003*(t/100)**2] for t in range(0, stop, 100)]
    for s in range(2): folder = write(f"s{s}.json", [row("MTL", right(40), s)], seed=s, curves={"mtl-1shot": curve(.03 + s/100, 900 - 300*s), "mtl-ht-1shot": curve(.04, 900)})
    fig = figure4(read_results(folder), "fc100", "small")
    ax, = fig.axes
    labels = [o.get_text() for o in ax.get_legend().get_texts()]
    assert labels == ["MTL, 2 seeds", "MTL + HT, 2 seeds"] and len(ax.lines) == 6
    mean = ax.lines[2].get_xydata()
    assert mean[-1, 0] == 500 and abs(mean[1, 1] - 100*(curve(.03, 900)[1][1] + curve(.04, 900)[1][1])/2) < 1e-9 # as far as all seeds went
    out = tmp_path/"out"; out.mkdir()
    assert "![fc100 small](figure4-fc100-small.png)" in report(folder, out) and (out/"figure4-fc100-small.png").read_bytes()[:4] == b"\x89PNG"
    refused(lambda: report(folder, tmp_path/"nowhere"), "cannot write")
    assert "recorded; give a folder" in report(folder)
    for s in range(2): write(f"s{s}.json", [row("MTL", right(40), s)], seed=s)
    assert "fc100 small: not yet recorded" in report(folder)


def test_every_quoted_number_has_its_mark():
    marked = [v for rows in PAPER.values() for v3 in rows.values() for v in v3 if v != "–"]
    assert all(v.endswith("]") for v in marked) and PAPER["miniimagenet"]["MTL + HT"][0] == "61.2±1.8 [fig, brief]"


def test_answers_are_little_endian():
    assert correct_counts(dict(correct=base64.b64encode(bytes([1, 0, 2, 1])).decode())).tolist() == [1, 258]


def changed_run(write, name, change, rows, **recipe): return write(name, rows, recipe=dict(preset=f"small; {change}", **recipe))


def test_changes_one_at_a_time(write):
    "Against the preset as it is, each for its own method; a change to phase 2 alone is no change to the head."
    head, mtl, better = right(40), right(41, seed=1), right(44, seed=2)
    on = lambda method, r, **more: row(method, r, split="val", **more)
    write("fc100-small-val-s0.json", [on("head only", head), on("MTL", mtl, seconds=120.)])
    changed_run(write, "a.json", "copies=2", [on("head only", better)], copies=2)
    folder = changed_run(write, "b.json", "order=1", [on("head only", head), on("MTL", better, seconds=60.)], order=1)
    runs = read_results(folder)
    a, b = one_change_table(runs, "fc100"), one_change_table(runs, "fc100", shots=(1,), method="MTL")
    assert [o[0] for o in a.rows] == ["small as it is", "copies=2"] and [o[0] for o in b.rows] == ["small as it is", "order=1"]
    assert a["copies=2", "1-shot, gain in points"].mean == pytest.approx((better - head).double().mean().item()/75)
    assert b["order=1", "1-shot, gain in points"].mean == pytest.approx((better - mtl).double().mean().item()/75)
    assert b["order=1", "1-shot, over head only"].mean == pytest.approx((better - head).double().mean().item()/75)
    assert [o[-1] for o in b.rows] == ["2", "1"] and a["small as it is", "phase 1, min"] == "1"
    text = report(folder)
    assert all(f"`{o}.json`" in text for o in ("a", "b", "fc100-small-val-s0"))
    for wrong in (dict(data="fc1000"), dict(method="mtl"), dict(shots=(0,)), dict(shots=1)):
        with pytest.raises(BadInput): one_change_table(runs, **dict(dict(data="fc100"), **wrong))


def test_a_change_without_an_exam_on_val_is_not_listed(write):
    write("fc100-small-s0.json", [row("head only", right(40))])
    folder = changed_run(write, "a.json", "copies=2", [row("head only", right(44))], copies=2)
    assert [o[0] for o in one_change_table(read_results(folder), "fc100").rows] == ["small as it is"]


def test_a_deviation_taken_back_is_measured(write):
    there, here = right(40), right(43, seed=1)
    write("fc100-small-val-s0.json", [row("head only", here, split="val")])
    folder = changed_run(write, "a.json", "centred=false", [row("head only", there, split="val")], centred=False)
    line = next(r for r in deviations(read_results(folder)).rows if r[2] == "head only, here − there" and r[1].startswith("centred"))
    assert line[3] == "fc100, small, val" and line[4].mean == pytest.approx((here - there).double().mean().item()/75)


def test_changed_recipes_on_test(write):
    views, both = preset("small", "fc100", views=4, preset="small; views=4"), preset("small", "fc100", views=4, quarters=True, preset="small; quarters=true, views=4")
    fields = lambda r: dict(preset=r.preset, views=r.views, quarters=r.quarters)
    write("as-it-is.json", [row("head only", right(30))])
    write("val.json", [row("head only", right(31, seed=1), split="val")], recipe=fields(views))
    folder = write("other.json", [row("head only", right(31, seed=1))], data="cifar-fs", recipe=dict(preset="small; views=4", views=4))
    t = changed_on_test(read_results(folder), "fc100")
    assert not any(r[0].startswith("here") for r in t.rows) and ["MTL + HT, the paper"] == [r[0] for r in t.rows if "paper" in r[0]]
    write("a.json", [row("head only", right(31, seed=1)), row("MTL", right(33, seed=1))], recipe=fields(views))
    write("b.json", [row("head only", right(36, seed=1)), row("head only", right(50, seed=2), shot=10)], recipe=fields(both))
    runs = read_results(folder)
    t = changed_on_test(runs, "fc100")
    assert [r[0] for r in t.rows if r[0].startswith("here")] == ["here: head only, recipe 1", "here: MTL, recipe 1", "here: head only, recipe 2"]
    assert t["here: head only, recipe 2", "1-shot"].mean == pytest.approx(accuracy_at(rows_at(runs, "fc100", both.preset, "test"), "head only", 1).mean) and str(t["here: head only, recipe 2", "5-shot"]) == "not yet run"
    assert t["here: MTL, recipe 1", "1-shot"].files == ("a.json",) and any("recipe 2: small; quarters=true, views=4" in o for o in t.notes)
    text = report(folder)
    assert "fc100, changed recipes on test" in text and "cifar-fs, changed recipes on test" in text and "miniimagenet, changed recipes on test" not in text and text.count("`b.json`")
    assert [r[0] for r in changed_on_test(runs, "glyphs").rows] == []
