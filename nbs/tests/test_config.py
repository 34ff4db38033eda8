"The config of an experiment: names and errors, overrides, records of every version, backbones, the matched baseline."
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from mtl_nb.core import BadInput
from mtl_nb.data.augment import AugmentConfig
from mtl_nb.data.datasets import DATASETS
from mtl_nb.experiments.config import (LEGACY, PRESETS, ExperimentConfig, compute_matched, config_from_record,
    differing_fields, flatten, nest, preset, with_backbone, with_overrides)

RECORDS = sorted((Path(__file__).parents[2]/"data/results").glob("*.json"))
config = preset("small", "fc100", shots=(1, 5, 10), seed=2)


def error_of(make, *args, **settings):
    "The one line that a call raises as `BadInput`."
    with pytest.raises(BadInput) as e: make(*args, **settings)
    message = str(e.value)
    assert message and "\n" not in message
    return message


def as_json(config): return json.loads(json.dumps(asdict(config)))


@pytest.fixture(scope="module")
def recorded():
    read = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in RECORDS}
    return {name: record for name, record in read.items() if "recipe" in record}


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("data", [*DATASETS, "my-folder"])
def test_every_preset_suits_every_data_set(name, data):
    made = preset(name, data, seed=3)
    assert (made.data, made.preset, made.base_preset, made.overrides) == (data, name, name, "")
    assert made.seed == made.phase1.seed == made.phase2.seed == 3
    assert config_from_record(as_json(made)) == made
    if data in DATASETS: assert made.phase1.augment.flip == DATASETS[data].mirror


@pytest.mark.parametrize("field", ["random", "shot1", "shot5", "shot10", "other"])
def test_every_count_of_hard_tasks_can_be_set(field):
    made = with_overrides(config, {f"hard.{field}": 7})
    assert getattr(made.hard, field) == 7 and made.digest() != config.digest()
    assert config_from_record(as_json(made)).digest() == made.digest()


def test_unknown_preset():
    assert "did you mean small?" in error_of(preset, "smal")
    assert "choose one of quick, small, paper, strong" in error_of(preset, "x")


@pytest.mark.parametrize("name, suggestion", [
    ("phase1.epoch", "phase1.epochs"), ("tta.view", "tta.views"), ("evaltasks", "eval_tasks"),
    ("objective.mixups", "objective.mixup"), ("phase3.lr", "phase2.lr"), ("phase1.augment.pads", "phase1.augment.pad")])
def test_unknown_names_get_a_suggestion(name, suggestion):
    message = error_of(with_overrides, config, {name: 3})
    assert message.startswith(f"a config has no '{name}'") and suggestion in message


@pytest.mark.parametrize("name, value, words", [
    ("phase1.epochs", "many", "expected a whole number, got text"),
    ("phase1.epochs", 2.5, "expected a whole number, got a number"),
    ("phase1.lr", "fast", "expected a number, got text"),
    ("dropout", None, "expected a number, got null"),
    ("way", True, "expected a whole number, got true or false"),
    ("centred", 1, "expected true or false, got a whole number"),
    ("shots", 3, "expected a list, got a whole number"),
    ("arch", 12, "expected text, got a whole number"),
    ("inner", [.2, .5], "inner[1]: expected a whole number, got a number")])
def test_values_of_another_kind(name, value, words):
    message = error_of(with_overrides, config, {name: value})
    assert message.startswith(name) and words in message


BAD = [("way", 1), ("shots", []), ("shots", [1, 1]), ("shots", [0]), ("query", 0), ("eval_tasks", 1),
    ("eval_tasks", 10**7), ("select_tasks", 1), ("eval_every", 0), ("patience", -1), ("eval_split", "train"),
    ("size", 8), ("widths", [16, 32, 64]), ("widths", [16, 32, 64, 0]), ("dropout", 1.), ("dropout", -.1), ("order", 3),
    ("inner", [-1., 5]), ("inner", [.2, -1]), ("phase1.epochs", -1), ("phase1.batch", 1), ("phase1.lr", 0.),
    ("phase1.weight_decay", -1.), ("phase1.smoothing", 1.), ("phase1.warmup", 2.), ("phase1.halve", 0),
    ("phase1.bn_splits", 0), ("phase1.augment.pad", -1), ("phase1.augment.jitter", 2.), ("phase1.augment.zoom", 0.),
    ("phase2.tasks", 0), ("phase2.batch", 0), ("phase2.lr", -1.), ("phase2.head_lr", -1.), ("phase2.halve", 0),
    ("phase2.floor", 2.), ("phase2.augment.pad", -1), ("objective.rotation", 2.), ("objective.mixup", -1.),
    ("objective.dropblock", 3), ("objective.dropblock", -1), ("objective.rounds", 0), ("objective.distill", 2.),
    ("objective.temperature", 0.), ("hard.random", 0), ("hard.shot1", -1), ("hard.other", -1),
    ("tta.support_copies", -1), ("tta.views", 101)]

@pytest.mark.parametrize("name, value", BAD)
def test_bad_values_are_one_line_that_names_the_field(name, value):
    assert name.rpartition(".")[2] in error_of(with_overrides, config, {name: value})


def test_fields_that_exclude_each_other():
    plain = with_overrides(config, {"phase1.augment": None})
    assert "phase1.augment is null" in error_of(with_overrides, plain, {"tta.views": 2})
    assert "at least 32 pixels" in error_of(with_overrides, config, {"size": 24, "tta.max_pool": True})
    assert "seed must be" in error_of(ExperimentConfig, seed=2**32)


@pytest.mark.parametrize("name", ["data", "preset", "seed", "backbone", "head_label", "phase1.seed", "phase2.seed"])
def test_what_the_command_sets_is_no_override(name):
    assert "is not set this way" in error_of(with_overrides, config, {name: 1})


@pytest.mark.parametrize("name", ["phase1", "phase2", "objective", "hard", "tta", "phase1.augment"])
def test_a_part_is_no_field(name):
    for value in (1, {}): assert "is a part of the config" in error_of(with_overrides, config, {name: value})


def test_overrides_are_told_in_one_order():
    both = with_overrides(config, {"tta.views": 2, "phase1.epochs": 9})
    assert both.preset == "small; phase1.epochs=9, tta.views=2"
    assert both == with_overrides(with_overrides(config, {"tta.views": 2}), {"phase1.epochs": 9})
    assert with_overrides(both, {"phase1.epochs": 10}).overrides == "phase1.epochs=10, tta.views=2"
    assert with_overrides(config, {}) == config
    asked = {"eval_split": "val", "shots": [1], "eval_tasks": 50, "paper_protocol": True}
    assert with_overrides(config, asked).preset == "small"
    listed = with_overrides(config, {"widths": [4, 4, 8, 8], "inner": (.1, 5), "dropout": .5})
    assert listed.overrides == "dropout=0.5, inner=[0.1, 5], widths=[4, 4, 8, 8]"
    assert config_from_record(as_json(listed)) == listed


def test_augmentation_is_switched_off_and_on():
    off = with_overrides(config, {"phase1.augment": None})
    assert off.phase1.augment is None and off.overrides == "phase1.augment=null"
    assert with_overrides(off, {"phase1.augment.pad": 2}).phase1.augment == AugmentConfig(2)
    glyphs = with_overrides(preset("quick"), {"phase2.augment.pad": 2})
    assert glyphs.phase2.augment == AugmentConfig(2, flip=False)


def test_flatten_and_nest():
    assert nest(config.fields) == as_json(config) and flatten(as_json(config)) == config.fields
    assert nest({"a": None, "a.b": 1}) == {"a": {"b": 1}}
    assert flatten({"a": {}}) == {"a": {}}


def test_old_names_are_names_of_today():
    assert set(LEGACY) <= set(ExperimentConfig().fields) and len(set(LEGACY.values())) == len(LEGACY)
    for old in LEGACY.values(): assert "a config has no" in error_of(with_overrides, config, {old: 1})


def test_every_record_comes_back(recorded):
    assert len(recorded) > 50
    for name, record in recorded.items():
        made = config_from_record(record["recipe"])
        again = config_from_record(as_json(made))
        assert (again, again.digest()) == (made, made.digest()), name
        assert with_overrides(made, {}) == made, name
        assert not any(old in made.overrides for old in ("extras.", "quarters", "copies=4, q", "shares")), name


@pytest.mark.parametrize("odd", [{}, [], None, {"data": "fc100"}, {"preset": None}, {"hard": 3}, {"phase1": []},
    {"way": "5"}, {"rotation": 1}, {"way": 1}, {"phase2": {"turns": 3}}], ids=str)
def test_what_is_no_config(odd):
    record = as_json(config) | odd if isinstance(odd, dict) and odd and odd != {"data": "fc100"} else odd
    assert error_of(config_from_record, record).startswith("this is not the config of a run (")


def test_differing_fields():
    longer = with_overrides(config, {"phase1.epochs": 9})
    assert sorted(differing_fields(config, longer)) == ["phase1.epochs", "preset"]
    other = replace(config, eval_tasks=9, seed=5, shots=(1,), methods=(), backbone="0"*64)
    assert differing_fields(config, other) == []


def test_backbone_brings_its_phase_1(recorded):
    other = with_overrides(config, {"phase1.epochs": 9, "phase1.augment": None, "objective.mixup": .2, "dropout": .1})
    assert with_backbone(config, other.training) == other
    assert with_backbone(config, config.training) == config
    old = recorded["fc100-small-turns-s0"]["recipe"]
    parts = {k: old[k] for k in ("widths", "drop", "phase1", "extras")}
    parts["phase1"] = {k: v for k, v in parts["phase1"].items() if k not in ("seed", "shares")}
    assert with_backbone(preset("small", "fc100"), parts).overrides == "objective.rotation=0.5"
    assert "a config has no 'colour'" in error_of(with_backbone, config, {"colour": 3})


def finished(spent, phase1=1000., **more):
    rows = [dict(method="MTL", seconds=s) for s in spent]
    return dict(recipe=as_json(config), seconds=dict(pretrain=phase1), rows=rows) | more


def test_compute_matched(recorded):
    matched = compute_matched(finished((420., 260.)))
    assert matched.phase1.epochs == config.phase1.epochs + 9 # 50 seconds an epoch; 420 seconds buy 8.4
    assert (matched.methods, matched.head_label) == ((), "head only, equal time")
    assert replace(matched, phase1=config.phase1, methods=config.methods, head_label=config.head_label) == config
    for i in range(3):
        run, baseline = (recorded[f"fc100-small-{o}s{i}"]["recipe"] for o in ("", "equal-"))
        assert compute_matched(recorded[f"fc100-small-s{i}"]) == config_from_record(baseline), i
        assert baseline["phase1"]["epochs"] > run["phase1"]["epochs"]


@pytest.mark.parametrize("record, words", [
    ([], "not the record of a run"), ({}, "not the config of a run"), (finished(()), "nothing to match"),
    (finished((5.,), phase1=0.), "nothing to match"), (finished((5.,), seconds={}), "nothing to match"),
    (finished(("5",)), "cannot be read"), (finished((5.,), rows=[{}]), "cannot be read"),
    (finished((-1.,)), "cannot be read"), (finished((5.,), seconds=[]), "cannot be read"),
    (finished((5.,), recipe=as_json(replace(config, backbone="0"*64))), "took its backbone from another")])
def test_records_that_tell_no_times(record, words): assert words in error_of(compute_matched, record)
