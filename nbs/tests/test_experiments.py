"Kill and resume at every state that is written; same recipe, same numbers; a backbone from elsewhere."
import json
from dataclasses import replace

import pytest
import torch

from mtl_nb.checkpoints import RunFolder
from mtl_nb.data import BadInput
from mtl_nb.experiments import run
from mtl_nb.recipes import preset
from mtl_nb.glyphs import glyphs
from mtl_nb.meta_test import table


class Killed(Exception): pass


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


@pytest.mark.parametrize("after", range(1, 9))
def test_killed_and_resumed(banks, recipe, whole, tmp_path, monkeypatch, after):
    keep, left = RunFolder.keep, [after]
    def short(self, *args, **kwargs):
        keep(self, *args, **kwargs)
        left[0] -= 1
        if left[0] == 0: raise Killed
    monkeypatch.setattr(RunFolder, "keep", short)
    with pytest.raises(Killed): run(recipe, banks, tmp_path/"run")
    monkeypatch.undo()
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


def test_budgets_are_equal(whole):
    results, out = whole
    log = [json.loads(o) for o in (out/"log.jsonl").read_text().splitlines()]
    assert {n: max(r["tasks"] for r in log if r.get("run") == n) for n in ("mtl-1shot", "mtl-ht-1shot")} == {"mtl-1shot": 48, "mtl-ht-1shot": 48}


def test_other_data_is_refused(banks, recipe, whole):
    _, out = whole
    other = dict(banks, test=glyphs(1)["test"].subset(range(5)))
    with pytest.raises(BadInput, match="other data"): run(recipe, other, out, resume=True)
