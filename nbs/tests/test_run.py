"Kill and resume at every state that is written; same recipe, same numbers; a backbone from elsewhere."
import json
import math
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from mtl_nb.train.checkpoints import RunFolder, load, save
from mtl_nb.core import BadInput
from mtl_nb.data.bank import prefetch
from mtl_nb.train.distributed import Runtime
from mtl_nb.data.episodes import TaskShape
from mtl_nb.experiments.run import run
from mtl_nb.data.glyphs import glyphs
from mtl_nb.evaluation.meta_test import Protocol, load_model, meta_test, row, table
from mtl_nb.experiments.config import compute_matched, preset


class Killed(Exception): pass

@contextmanager
def killed_after(n, monkeypatch):
    "Pull the plug when a state has been written for the n-th time; it must come to that."
    keep, left = RunFolder.save_state, [n]
    def short(self, *args, **kwargs):
        keep(self, *args, **kwargs)
        left[0] -= 1
        if left[0] == 0: raise Killed
    with monkeypatch.context() as m, pytest.raises(Killed):
        m.setattr(RunFolder, "keep", short)
        yield


@pytest.fixture(scope="module")
def banks():
    torch.set_num_threads(1)
    return {k: b.subset(range(n)) for (k, b), n in zip(glyphs(0).items(), (6, 5, 5))}


@pytest.fixture(scope="module")
def recipe():
    r = preset("quick", widths=(4, 4, 4, 4), tasks=20, select=20, every=24, shots=(1,), inner=(0.2, 3), query=3)
    return replace(r, phase1=replace(r.phase1, epochs=2), phase2=replace(r.phase2, tasks=48))


@pytest.fixture(scope="module")
def whole(banks, recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")/"run"
    return run(recipe, banks, out), out


def same(a, b): return [r["correct"] for r in a["rows"]] == [r["correct"] for r in b["rows"]]


@pytest.mark.parametrize("after", range(1, 11))
def test_killed_and_resumed(banks, recipe, whole, tmp_path, monkeypatch, after):
    with killed_after(after, monkeypatch): run(recipe, banks, tmp_path/"run")
    results, (expected, out) = run(recipe, banks, tmp_path/"run", resume=True), whole
    assert same(results, expected)
    assert (tmp_path/"run/log.jsonl").read_text() == (out/"log.jsonl").read_text()
    assert not list((tmp_path/"run").glob(".*"))


def test_finished_run_is_read_back(banks, recipe, whole):
    results, out = whole
    again = run(recipe, banks, out, resume=True)
    assert same(again, results) and "head only" in table(again)


def test_backbone_of_another_run(banks, recipe, whole, tmp_path):
    results, out = whole
    again = run(recipe, banks, tmp_path/"run", backbone=out/"pretrain.safetensors")
    assert same(again, results) and again["recipe"]["backbone"] and again["recipe_sha256"] != results["recipe_sha256"]


def test_a_backbone_brings_its_phase_1(banks, recipe, whole, tmp_path):
    theta = whole[1]/"pretrain.safetensors"
    other = replace(recipe, preset="quick", methods=(), widths=(8, 8, 8, 8), phase1=replace(recipe.phase1, epochs=7))
    again = run(other, banks, tmp_path/"run", backbone=theta)
    assert again["recipe"]["widths"] == [4, 4, 4, 4] and again["recipe"]["phase1"]["epochs"] == 2 and again["recipe"]["preset"] == "quick; phase1.epochs=2, widths=[4, 4, 4, 4]"
    assert again["theta"] == whole[0]["theta"] == again["recipe"]["backbone"]   # one phase 1, and the records say so
    tensors, record = load(theta)
    save(tmp_path/"old.safetensors", tensors, {k: v for k, v in record.items() if k != "training"})   # as files were written before they told
    assert run(replace(recipe, methods=()), banks, tmp_path/"old", backbone=tmp_path/"old.safetensors")["recipe"]["phase1"]["epochs"] == 2
    with pytest.raises(BadInput, match=r"has widths \[4, 4, 4, 4\], the recipe widths \[8, 8, 8, 8\]: choose the preset"): run(other, banks, tmp_path/"no", backbone=tmp_path/"old.safetensors")
    assert not (tmp_path/"no").exists()


def test_classes_that_the_backbone_knows_are_no_exam(banks, recipe, whole, tmp_path):
    met = dict(banks, test=glyphs(0)["train"].subset([5, 20, 21, 22, 23]))   # the first of them is the last of the base classes
    with pytest.raises(BadInput, match="was trained on 1 of the 5 classes of 'test'"): run(recipe, met, tmp_path/"run", backbone=whole[1]/"pretrain.safetensors")
    assert not (tmp_path/"run").exists()
    other = {k: b.subset(range(6, 11)) for k, b in glyphs(0).items()}   # handed on by a run on other classes, it still knows those it was trained on
    run(replace(recipe, methods=()), other, tmp_path/"on", backbone=whole[1]/"pretrain.safetensors")
    with pytest.raises(BadInput, match="was trained on 1 of the 5 classes of 'test'"): run(recipe, met, tmp_path/"run", backbone=tmp_path/"on/pretrain.safetensors")


def test_weights_that_are_not_finite_are_refused(banks, recipe, whole, tmp_path):
    tensors, record = load(whole[1]/"pretrain.safetensors")
    tensors["blocks.0.conv1.weight"][0, 0, 0, 0] = math.nan
    save(tmp_path/"nan.safetensors", tensors, record)
    with pytest.raises(BadInput, match="not finite: blocks.0.conv1.weight"): run(recipe, banks, tmp_path/"run", backbone=tmp_path/"nan.safetensors")


def test_killed_between_the_weights_and_the_last_state(banks, recipe, whole, tmp_path, monkeypatch):
    "The weights are there, and the log that goes with them has been kept before, however rarely states are."
    import mtl_nb.experiments as module
    rare = Runtime(checkpoint_seconds=1e9)
    def short(path, *args):
        save(path, *args)
        if path.name.startswith("mtl-1shot"): raise Killed
    with monkeypatch.context() as m, pytest.raises(Killed):
        m.setattr(module, "save", short)
        run(recipe, banks, tmp_path/"run", rare)
    results = run(recipe, banks, tmp_path/"run", rare, resume=True)
    assert same(results, whole[0]) and results["curves"] == whole[0]["curves"] and (tmp_path/"run/log.jsonl").read_text() == (whole[1]/"log.jsonl").read_text()


def test_what_was_taken_out_of_a_run_is_done_again(banks, recipe, whole, tmp_path, monkeypatch):
    with killed_after(7, monkeypatch): run(recipe, banks, tmp_path/"run")
    (tmp_path/"run/mtl-1shot.safetensors").unlink()
    results = run(recipe, banks, tmp_path/"run", resume=True)
    assert same(results, whole[0]) and sorted((tmp_path/"run/log.jsonl").read_text().split()) == sorted((whole[1]/"log.jsonl").read_text().split())


def test_results_of_another_run_are_not_read_back(banks, recipe, whole, tmp_path, monkeypatch):
    with killed_after(1, monkeypatch): run(recipe, banks, tmp_path/"run")
    for text in (json.dumps(whole[0] | dict(recipe_sha256="0"*64)), "{}"):
        (tmp_path/"run/results.json").write_text(text)
        with pytest.raises(BadInput, match="results of another run"): run(recipe, banks, tmp_path/"run", resume=True)


def test_budgets_are_equal(whole):
    results, out = whole
    log = [json.loads(o) for o in (out/"log.jsonl").read_text().splitlines()]
    assert {n: max(r["tasks"] for r in log if r.get("run") == n) for n in ("mtl-1shot", "mtl-ht-1shot")} == {"mtl-1shot": 48, "mtl-ht-1shot": 48}


def test_other_data_is_refused(banks, recipe, whole):
    _, out = whole
    other = dict(banks, test=glyphs(1)["test"].subset(range(5)))
    with pytest.raises(BadInput, match="other data"): run(recipe, other, out, resume=True)


ROWS = ("FT [Θ4;θ]", "SS [Θ;θ], batch statistics", "update [Θ;θ]", "update θ, batch statistics")

@pytest.fixture(scope="module")
def ablated(banks, recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("rows")/"run"
    few = replace(recipe, methods=ROWS, phase2=replace(recipe.phase2, tasks=16), every=8, tasks=12)
    return run(few, banks, out), few, out


def test_rows_of_the_ablations(ablated, banks):
    results, few, out = ablated
    assert [r["method"] for r in results["rows"]] == ["head only", *ROWS] and all("paired" in r for r in results["rows"][1:])
    assert {r["exam"] for r in results["rows"]} == {results["rows"][0]["exam"]}, "one list of tasks for all"
    assert sorted(p.name for p in out.glob("*.safetensors")) == ["ft-theta4-1shot.safetensors", "mtl-batch-statistics-1shot.safetensors", "pretrain.safetensors"]
    assert set(results["curves"]) == {"ft-theta4-1shot", "mtl-batch-statistics-1shot"} and [t for t, _ in results["curves"]["ft-theta4-1shot"]] == [0, 8, 16]


def test_weights_of_a_row_load_again(ablated, banks):
    results, few, out = ablated
    model, record = load_model(out/"ft-theta4-1shot.safetensors")
    assert record["method"] == "FT [Θ4;θ]"
    result = meta_test(model, banks["test"], Protocol("standard", TaskShape(5, 1, 3), 12))
    assert row("FT [Θ4;θ]", result, 0)["correct"] == results["rows"][1]["correct"]
    with pytest.raises(BadInput, match="batch norm sees whole tasks"): load_model(out/"mtl-batch-statistics-1shot.safetensors")


def test_a_row_with_a_part_missing_is_refused(ablated, tmp_path):
    _, _, out = ablated
    tensors, record = load(out/"ft-theta4-1shot.safetensors")
    (tmp_path/"pretrain.safetensors").write_bytes((out/"pretrain.safetensors").read_bytes())
    tensors.pop("base.weight")
    save(tmp_path/"bad.safetensors", tensors, record)
    with pytest.raises(BadInput, match="does not hold what 'FT"): load_model(tmp_path/"bad.safetensors")


def test_rows_killed_and_resumed(ablated, banks, tmp_path, monkeypatch):
    expected, few, _ = ablated
    with killed_after(4, monkeypatch): run(few, banks, tmp_path/"run")
    assert same(run(few, banks, tmp_path/"run", resume=True), expected)


def test_unknown_and_doubled_rows(banks, recipe, tmp_path):
    with pytest.raises(BadInput, match="no method 'MAMA'"): run(replace(recipe, methods=("MAMA",)), banks, tmp_path/"a")
    with pytest.raises(BadInput, match="must be different"): run(replace(recipe, methods=("MTL", "SS [Θ;θ]")), banks, tmp_path/"b")
    assert not list(tmp_path.iterdir())


def test_equal_time(whole, banks, tmp_path):
    results, _ = whole
    longer = compute_matched(results)
    spent = max(r["seconds"] for r in results["rows"] if r["method"] == "MTL")
    assert longer.phase1.epochs == 2 + math.ceil(spent/(results["seconds"]["pretrain"]/2))
    again = run(replace(longer, phase1=replace(longer.phase1, epochs=3)), banks, tmp_path/"run")
    assert [r["method"] for r in again["rows"]] == ["head only, equal time"] and again["rows"][0]["exam"] == results["rows"][0]["exam"]


@pytest.mark.parametrize("where, value", [("rows", [1, 2]), ("rows", [{}]), ("rows", None), ("seconds", None), ("seconds", {"pretrain": "x"}), ("seconds", {"pretrain": -1}), ("seconds", {"pretrain": 1e300}), ("seconds", {"pretrain": math.nan}), ("seconds", {"pretrain": True}), ("recipe.phase1.epochs", 0), ("recipe.phase1.epochs", "six"),
    ("recipe.shots", "1,5"), ("recipe.size", "big"), ("recipe.widths", []), ("recipe.backbone", "abc"), ("recipe", None)])
def test_a_damaged_record_has_no_equal(whole, where, value):
    results = json.loads(json.dumps(whole[0]))
    *path, last = where.split(".")
    spot = results
    for o in path: spot = spot[o]
    spot[last] = value
    with pytest.raises(BadInput): compute_matched(results)


def test_shares_are_checked_at_the_door(banks, recipe, tmp_path):
    with pytest.raises(BadInput, match="lower --shares"): run(replace(recipe, phase1=replace(recipe.phase1, shares=1000)), banks, tmp_path/"run")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="must not be negative"): next(prefetch(banks["train"], [torch.arange(2)], torch.device("cpu"), ahead=-1))
