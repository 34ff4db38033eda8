"The ledger: every recorded run once, and everything that did not pay, from the records alone."
from pathlib import Path

from mtl_nb.experiments.records import read_results
from mtl_nb.experiments.report import ledger, unpaid
from test_report import changed_run, right, row, write  # noqa: F401

root = Path(__file__).parents[2]


def test_every_recorded_run_has_its_line():
    runs = read_results(root/"data/results")
    t = ledger(runs)
    assert [r[0] + ".json" for r in t.rows] == [r["file"] for r in runs]
    assert t["miniimagenet-strong-turns-s0", "MTL adds, 1-shot"] == "+2.34 ±0.09"
    assert t["fc100-small-aug-s0", "minutes, phases 1 + 2"].startswith("given")
    assert t["fc100-small-equal-s0", "head only, 1-shot"] != "–"   # the compute-matched baseline, in its place


def test_what_did_not_pay(write, changed_run):  # noqa: F811
    def on(method, mean, seed=0): return row(method, right(mean, seed=seed), split="val")
    write("a.json", [on("head only", 40), on("MTL", 40), on("MTL + HT", 41), on("ProtoNet", 38), on("FT θ", 44)])
    changed_run("b.json", "centred=false", [on("head only", 36)], centred=False)
    changed_run("c.json", "size=48", [on("head only", 45)], size=48)
    folder = changed_run("d.json", "order=1", [on("head only", 40), on("MTL", 40)], order=1)
    t = unpaid(read_results(folder))
    found = [(r[0], r[1], str(r[3]).partition(", ")[2] or str(r[3])) for r in t.rows]
    assert ("a change of phase 1 or of the evaluation", "centred=false, head only", "behind in this run") in found
    assert ("a change of phase 2", "order=1, MTL", "identical predictions") in found
    assert ("a method against head only", "ProtoNet", "behind in this run") in found
    assert ("a method against head only", "MTL", "identical predictions") in found
    assert not any("size=48" in r[1] or r[1] == "FT θ" for r in t.rows)       # these paid
    assert not any(r[0].startswith("hard tasks") for r in t.rows)              # MTL + HT is ahead of MTL here


def test_each_line_names_its_files(write):  # noqa: F811
    folder = write("a.json", [row("head only", right(40)), row("MTL", right(38))])
    t = unpaid(read_results(folder))
    assert t.files == ["a.json"] and len(t.rows) == 1
    assert unpaid([]).rows == [] and ledger([]).rows == []
