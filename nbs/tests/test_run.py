"A run killed and resumed at every state that is saved; same config, same numbers; a backbone of another run."
import json
import logging
import math
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

import mtl_nb.experiments.run as run_module
from mtl_nb.core import BadInput
from mtl_nb.data.bank import ImageBank, prefetch
from mtl_nb.data.episodes import TaskShape
from mtl_nb.data.glyphs import glyphs
from mtl_nb.evaluation.meta_test import Protocol
from mtl_nb.experiments.config import compute_matched, preset
from mtl_nb.experiments.records import make_row, results_table
from mtl_nb.experiments.run import EarlyStopping, plot_curves, run
from mtl_nb.methods.base import get_method, load_model
from mtl_nb.train.checkpoints import RunFolder, load, load_backbone, load_state, save
from mtl_nb.train.distributed import DeadlineReached, Runtime


class Killed(Exception): pass

@contextmanager
def killed_after(n, monkeypatch):
    "Raise when a state has been saved for the n-th time; it must come to that."
    save_state, left = RunFolder.save_state, [n]
    def save_and_raise(self, *args, **kwargs):
        save_state(self, *args, **kwargs)
        left[0] -= 1
        if left[0] == 0: raise Killed
    with monkeypatch.context() as m, pytest.raises(Killed):
        m.setattr(RunFolder, "save_state", save_and_raise)
        yield

@contextmanager
def short_grid(*labels):
    "These methods choose from two rates and two numbers of steps; whole grids are run in test_golden."
    with ExitStack() as stack:
        for m in map(get_method, labels):
            stack.enter_context(patch.multiple(m, inner_rates=m.inner_rates[:2], inner_steps=m.inner_steps[:2]))
        yield


@pytest.fixture(scope="module")
def banks():
    torch.set_num_threads(1)
    return {k: b.subset(range(n)).first(20) for (k, b), n in zip(glyphs(0).items(), (6, 5, 5))}


@pytest.fixture(scope="module")
def config():
    c = preset("quick", widths=(4, 4, 4, 4), eval_tasks=20, select_tasks=20, eval_every=24, shots=(1,), inner=(0.2, 3),
               query=3)
    return replace(c, phase1=replace(c.phase1, epochs=2), phase2=replace(c.phase2, tasks=48))


@pytest.fixture(scope="module")
def whole(banks, config, tmp_path_factory):
    "An uninterrupted run: its results, its folder, and what `on_record` was given."
    out, records = tmp_path_factory.mktemp("whole")/"run", []
    return run(config, banks, out, on_record=records.append), out, records


def same(a, b): return [r["correct"] for r in a["rows"]] == [r["correct"] for r in b["rows"]]

def log_of(folder): return (folder/"log.jsonl").read_text()


@pytest.mark.parametrize("after", [2, 5, 8, *(pytest.param(o, marks=pytest.mark.slow) for o in (1, 3, 4, 6, 7, 9, 10))])
def test_killed_and_resumed(banks, config, whole, tmp_path, monkeypatch, after):
    with killed_after(after, monkeypatch): run(config, banks, tmp_path/"run")
    results = run(config, banks, tmp_path/"run", resume=True)
    assert same(results, whole[0])
    assert log_of(tmp_path/"run") == log_of(whole[1])
    assert not list((tmp_path/"run").glob(".*"))


def test_stopped_at_the_deadline_and_resumed(banks, config, whole, tmp_path):
    over = Runtime(deadline=0.)
    with pytest.raises(DeadlineReached): run(config, banks, tmp_path/"run", over)
    assert same(run(config, banks, tmp_path/"run", resume=True), whole[0])


@pytest.mark.parametrize("after", [1, 2, 3])
def test_the_best_weights_on_val_are_kept(banks, config, tmp_path, monkeypatch, after):
    values = {1: .4, 2: .6, 3: .5}
    def validate(job, net): return values[len([o for o in job.folder.log if o["phase"] == 1]) + 1]
    monkeypatch.setattr(run_module, "_validate_backbone", validate)
    phase1 = replace(config.phase1, epochs=3, ema=.5, keep_best=True)
    kept, two = (replace(config, methods=(), phase1=c) for c in (phase1, replace(phase1, keep_best=False)))
    run(kept, banks, tmp_path/"whole")
    with killed_after(after, monkeypatch): run(kept, banks, tmp_path/"run")
    run(kept, banks, tmp_path/"run", resume=True)
    with killed_after(2, monkeypatch): run(two, banks, tmp_path/"two") # after two epochs: these weights are the best
    best = load_state(tmp_path/"two"/".phase1.state")["train"]["average"]
    a, b = (load(tmp_path/o/"pretrain.safetensors")[0] for o in ("whole", "run"))
    assert all(torch.equal(v, b[k]) for k, v in a.items())
    assert all(torch.equal(v, best[f"module.net.{k}"]) for k, v in a.items() if k != "centre")


def test_records_are_passed_on(whole):
    _, out, records = whole
    assert records == [json.loads(o) for o in log_of(out).splitlines()]


def test_a_resumed_run_passes_on_what_is_new(banks, config, whole, tmp_path, monkeypatch):
    with killed_after(2, monkeypatch): run(config, banks, tmp_path/"run")
    later = []
    run(config, banks, tmp_path/"run", resume=True, on_record=later.append)
    assert later == whole[2][2:] and later[0]["phase"] == 2


def test_a_logger_may_change_its_records(banks, config, whole, tmp_path):
    run(config, banks, tmp_path/"run", on_record=dict.clear)
    assert log_of(tmp_path/"run") == log_of(whole[1])


def test_progress_goes_through_logging(banks, config, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "mtl_nb"): run(replace(config, methods=()), banks, tmp_path/"run")
    assert any("phase 1: epoch 2/2" in o for o in caplog.messages) and any("head only" in o for o in caplog.messages)


def test_progress_is_printed_where_logging_is_not_set_up(monkeypatch, capsys):
    logger = logging.getLogger("mtl_nb")
    for name, value in (("handlers", []), ("level", logging.NOTSET), ("propagate", False)):
        monkeypatch.setattr(logger, name, value)
    logger.manager._clear_cache()
    run_module._show_messages()
    logger.info("seen")
    logger.debug("unseen")
    assert capsys.readouterr().out == "seen\n"
    logger.manager._clear_cache()


def test_early_stopping():
    stop, model = EarlyStopping(every=10, patience=2, budget=35), torch.nn.Linear(1, 1)
    stop.start(10)
    assert [n for n in range(11, 36) if stop.is_due(n)] == [20, 30, 35]
    for done, accuracy, over in ((0, .5, False), (10, .6, False), (20, .6, False), (30, .6, True)):
        stop.update(done, accuracy, model)
        assert stop.exhausted(done) is over
    assert stop.best["tasks"] == 10
    assert not replace(stop, patience=0).exhausted(1000)


def test_finished_run_is_read_back(banks, config, whole):
    again = run(config, banks, whole[1], resume=True)
    assert same(again, whole[0]) and "head only" in results_table(again)


def test_backbone_of_another_run(banks, config, whole, tmp_path):
    again = run(config, banks, tmp_path/"run", backbone=whole[1]/"pretrain.safetensors")
    assert same(again, whole[0]) and again["recipe"]["backbone"]
    assert again["recipe_sha256"] != whole[0]["recipe_sha256"]


def test_a_backbone_brings_its_phase_1(banks, config, whole, tmp_path):
    theta = whole[1]/"pretrain.safetensors"
    other = replace(config, preset="quick", methods=(), widths=(8, 8, 8, 8), phase1=replace(config.phase1, epochs=7))
    again = run(other, banks, tmp_path/"run", backbone=theta)
    assert again["recipe"]["widths"] == [4, 4, 4, 4] and again["recipe"]["phase1"]["epochs"] == 2
    assert again["recipe"]["preset"] == "quick; phase1.epochs=2, widths=[4, 4, 4, 4]"
    assert again["theta"] == whole[0]["theta"] == again["recipe"]["backbone"]


def test_a_backbone_of_an_older_version(banks, config, whole, tmp_path):
    "Its file states its widths and dropout alone."
    tensors, record = load(whole[1]/"pretrain.safetensors")
    old = {k: v for k, v in record.items() if k not in ("training", "dropout", "arch")} | dict(drop=0.)
    save(tmp_path/"old.safetensors", tensors, old)
    results = run(replace(config, methods=()), banks, tmp_path/"old", backbone=tmp_path/"old.safetensors")
    assert results["recipe"]["phase1"]["epochs"] == 2
    other = replace(config, methods=(), widths=(8, 8, 8, 8))
    with pytest.raises(BadInput, match=r"has widths \[4, 4, 4, 4\] and dropout 0.0, the config \[8, 8, 8, 8\] and 0.0: "
                       "choose the preset"):
        run(other, banks, tmp_path/"no", backbone=tmp_path/"old.safetensors")
    assert not (tmp_path/"no").exists()


def test_another_architecture(banks, config, tmp_path):
    "A network made for one image size is built and loaded again at that size."
    results = run(replace(config, arch="convnet4", methods=("MTL",)), banks, tmp_path/"run")
    net, _, record = load_backbone(tmp_path/"run/pretrain.safetensors")
    assert record["arch"] == "convnet4" and type(net).__name__ == "ConvNet4"
    _, model, record = load_model(tmp_path/"run/mtl-1shot.safetensors")
    result = results["rows"][1]
    assert result["method"] == "MTL" and type(model.backbone).__name__ == "ConvNet4"


def test_classes_that_the_backbone_was_trained_on_are_rejected(banks, config, whole, tmp_path):
    theta = whole[1]/"pretrain.safetensors"
    met = dict(banks, test=glyphs(0)["train"].subset([5, 20, 21, 22, 23])) # the first is the last of the base classes
    with pytest.raises(BadInput, match="was trained on 1 of the 5 classes of 'test'"):
        run(config, met, tmp_path/"run", backbone=theta)
    assert not (tmp_path/"run").exists()
    # handed on by a run on other classes, it still names those that it was trained on
    other = {k: b.subset(range(6, 11)) for k, b in glyphs(0).items()}
    run(replace(config, methods=()), other, tmp_path/"on", backbone=theta)
    with pytest.raises(BadInput, match="was trained on 1 of the 5 classes of 'test'"):
        run(config, met, tmp_path/"run", backbone=tmp_path/"on/pretrain.safetensors")


def test_weights_that_are_not_finite_are_rejected(banks, config, whole, tmp_path):
    tensors, record = load(whole[1]/"pretrain.safetensors")
    tensors["blocks.0.conv1.weight"][0, 0, 0, 0] = math.nan
    save(tmp_path/"nan.safetensors", tensors, record)
    with pytest.raises(BadInput, match="not finite: blocks.0.conv1.weight"):
        run(config, banks, tmp_path/"run", backbone=tmp_path/"nan.safetensors")


def test_killed_between_the_weights_and_the_last_state(banks, config, whole, tmp_path, monkeypatch):
    "The weights are there, and the log that goes with them was saved before, however rarely states are."
    rare = Runtime(checkpoint_seconds=1e9)
    def save_and_raise(path, *args):
        save(path, *args)
        if path.name.startswith("mtl-1shot"): raise Killed
    with monkeypatch.context() as m, pytest.raises(Killed):
        m.setattr(run_module, "save", save_and_raise)
        run(config, banks, tmp_path/"run", rare)
    results = run(config, banks, tmp_path/"run", rare, resume=True)
    assert same(results, whole[0]) and results["curves"] == whole[0]["curves"]
    assert log_of(tmp_path/"run") == log_of(whole[1])


def test_what_was_taken_out_of_a_run_is_done_again(banks, config, whole, tmp_path, monkeypatch):
    with killed_after(7, monkeypatch): run(config, banks, tmp_path/"run")
    (tmp_path/"run/mtl-1shot.safetensors").unlink()
    results = run(config, banks, tmp_path/"run", resume=True)
    assert same(results, whole[0])
    assert sorted(log_of(tmp_path/"run").split()) == sorted(log_of(whole[1]).split())


def test_results_of_another_run_are_not_read_back(banks, config, whole, tmp_path, monkeypatch):
    with killed_after(1, monkeypatch): run(config, banks, tmp_path/"run")
    for text in (json.dumps(whole[0] | dict(recipe_sha256="0"*64)), "{}"):
        (tmp_path/"run/results.json").write_text(text)
        with pytest.raises(BadInput, match="results of another run"): run(config, banks, tmp_path/"run", resume=True)


def test_budgets_are_equal(whole):
    log, names = whole[2], ("mtl-1shot", "mtl-ht-1shot")
    assert [max(r["tasks"] for r in log if r.get("run") == n) for n in names] == [48, 48]


def test_other_data_is_rejected(banks, config, whole):
    other = dict(banks, test=glyphs(1)["test"].subset(range(5)))
    with pytest.raises(BadInput, match="other data"): run(config, other, whole[1], resume=True)


def test_a_missing_split_and_small_images_are_rejected(banks, config, tmp_path):
    two = {k: b for k, b in banks.items() if k != "test"}
    with pytest.raises(BadInput, match="is to be on 'test', but the data has only train, val"):
        run(config, two, tmp_path/"run")
    tiny = {k: ImageBank(b.x[:, :, :8, :8], b.y, b.names) for k, b in banks.items()}
    with pytest.raises(BadInput, match="images of 8 pixels are too small"): run(config, tiny, tmp_path/"run")
    assert not list(tmp_path.iterdir())


def test_curves_of_any_log():
    many = [dict(phase=2, run=f"m{i}-{k}shot", tasks=t, val=.5) for i in range(9) for k in (1, 5) for t in (0, 8)]
    for log in ([], many[:4], many, [dict(phase=1, epoch=1, accuracy=.5)]): assert len(plot_curves(log).axes) == 2


ROWS = ("FT [Θ4;θ]", "SS [Θ;θ], batch statistics", "update [Θ;θ]", "update θ, batch statistics")
FILES = ["ft-theta4-1shot.safetensors", "mtl-batch-statistics-1shot.safetensors", "pretrain.safetensors"]

@pytest.fixture(scope="module")
def ablated(banks, config, tmp_path_factory):
    out = tmp_path_factory.mktemp("rows")/"run"
    few = replace(config, methods=ROWS, phase2=replace(config.phase2, tasks=16), eval_every=8, eval_tasks=12)
    with short_grid("update [Θ;θ]"): return run(few, banks, out), few, out


def test_ablations(ablated):
    results, _, out = ablated
    assert [r["method"] for r in results["rows"]] == ["head only", *ROWS]
    assert all("paired" in r for r in results["rows"][1:])
    assert {r["exam"] for r in results["rows"]} == {results["rows"][0]["exam"]}, "one list of tasks for all"
    assert sorted(p.name for p in out.glob("*.safetensors")) == FILES
    assert set(results["curves"]) == {"ft-theta4-1shot", "mtl-batch-statistics-1shot"}
    assert [t for t, _ in results["curves"]["ft-theta4-1shot"]] == [0, 8, 16]


def test_weights_of_an_ablation_load_again(ablated, banks):
    results, _, out = ablated
    method, model, record = load_model(out/"ft-theta4-1shot.safetensors")
    assert record["method"] == method.label == "FT [Θ4;θ]"
    result = method.evaluate(model, banks["test"], [Protocol("standard", TaskShape(5, 1, 3), 12)])[0]
    assert make_row(method.label, result, 0)["correct"] == results["rows"][1]["correct"]


def test_an_ablation_with_a_tensor_missing_is_rejected(ablated, tmp_path):
    _, _, out = ablated
    tensors, record = load(out/"ft-theta4-1shot.safetensors")
    (tmp_path/"pretrain.safetensors").write_bytes((out/"pretrain.safetensors").read_bytes())
    tensors.pop("base.weight")
    save(tmp_path/"bad.safetensors", tensors, record)
    with pytest.raises(BadInput, match="does not hold exactly the tensors that 'FT"):
        load_model(tmp_path/"bad.safetensors")


def test_ablations_killed_and_resumed(ablated, banks, tmp_path, monkeypatch):
    expected, few, _ = ablated
    with short_grid("update [Θ;θ]"):
        with killed_after(4, monkeypatch): run(few, banks, tmp_path/"run")
        assert same(run(few, banks, tmp_path/"run", resume=True), expected)


def test_unknown_and_doubled_methods(banks, config, tmp_path):
    with pytest.raises(BadInput, match="no method 'MAMA'"): run(replace(config, methods=("MAMA",)), banks, tmp_path/"a")
    with pytest.raises(BadInput, match="must be different"):
        run(replace(config, methods=("MTL", "SS [Θ;θ]")), banks, tmp_path/"b")
    assert not list(tmp_path.iterdir())


def test_compute_matched(whole, banks, tmp_path):
    results = whole[0]
    longer = compute_matched(results)
    spent = max(r["seconds"] for r in results["rows"] if r["method"] == "MTL")
    assert longer.phase1.epochs == 2 + math.ceil(spent/(results["seconds"]["pretrain"]/2))
    again = run(replace(longer, phase1=replace(longer.phase1, epochs=3)), banks, tmp_path/"run")
    assert [r["method"] for r in again["rows"]] == ["head only, equal time"]
    assert again["rows"][0]["exam"] == results["rows"][0]["exam"]


DAMAGE = [("rows", [1, 2]), ("rows", [{}]), ("rows", None), ("seconds", None), ("seconds", {"pretrain": "x"}),
          ("seconds", {"pretrain": -1}), ("seconds", {"pretrain": 1e300}), ("seconds", {"pretrain": math.nan}),
          ("seconds", {"pretrain": True}), ("recipe.phase1.epochs", 0), ("recipe.phase1.epochs", "six"),
          ("recipe.shots", "1,5"), ("recipe.size", "big"), ("recipe.widths", []), ("recipe.backbone", "abc"),
          ("recipe", None)]

@pytest.mark.parametrize("where, value", DAMAGE)
def test_a_damaged_record_has_no_compute_matched_config(whole, where, value):
    results = json.loads(json.dumps(whole[0]))
    *path, last = where.split(".")
    spot = results
    for o in path: spot = spot[o]
    spot[last] = value
    with pytest.raises(BadInput): compute_matched(results)


def test_too_many_splits_are_rejected(banks, config, tmp_path):
    with pytest.raises(BadInput, match="lower phase1.bn_splits"):
        run(replace(config, phase1=replace(config.phase1, bn_splits=1000)), banks, tmp_path/"run")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="must not be negative"):
        next(prefetch(banks["train"], [torch.arange(2)], torch.device("cpu"), ahead=-1))
