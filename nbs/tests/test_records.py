"Reading records: whatever is wrong with a file is one line that names the file and the entry."
import json
from dataclasses import asdict
from pathlib import Path

import pytest

from mtl_nb.core import BadInput
from mtl_nb.experiments.config import preset
from mtl_nb.experiments.records import correct_counts, read_record, read_results, results_table

root = Path(__file__).parents[2]
RUN = json.loads((root/"data/results/glyphs-quick-s0.json").read_text(encoding="utf-8"))


def rejected(tmp_path, text, *words):
    (tmp_path/"bad.json").write_text(text)
    with pytest.raises(BadInput) as e: read_results(tmp_path)
    message = str(e.value)
    assert "bad.json" in message and "\n" not in message and all(o in message for o in words), message


@pytest.mark.parametrize("changes, words", [
    (dict(way=None), "rows[0].way: expected a whole number, got null"),
    (dict(way=1e9), "rows[0].way"), (dict(way=10**30), "rows[0].way"), (dict(way=True), "rows[0].way"),
    (dict(query=0), "rows[0].query"), (dict(shot="1"), "rows[0].shot"), (dict(tasks=-1), "rows[0].tasks"),
    (dict(lr=float("nan")), "rows[0].lr"), (dict(lr=-1), "rows[0].lr"), (dict(steps=-1), "rows[0].steps"),
    (dict(steps=1.5), "rows[0].steps"), (dict(accuracy=float("nan")), "rows[0].accuracy"),
    (dict(ci95=float("inf")), "rows[0].ci95"), (dict(seconds="x"), "rows[0].seconds"), (dict(seed=5), "seed"),
    (dict(paired=dict(to="head only")), "rows[0].paired"), (dict(method=""), "rows[0].method"),
    (dict(accuracy=50), "do not give the accuracy"), (dict(tasks=5), "do not give the accuracy"),
    (dict(correct="?"), "are damaged"), (dict(correct=""), "do not give"), (dict(correct="AAA="), "damaged"),
])
def test_bad_row(tmp_path, changes, words):
    row = RUN["rows"][0] | changes
    rejected(tmp_path, json.dumps(RUN | dict(rows=[row])), words)


@pytest.mark.parametrize("changes, words", [
    (dict(rows=[]), "rows"), (dict(rows=[5]), "rows[0]"), (dict(rows=5), "rows"), (dict(rows=None), "rows"),
    (dict(data=None), "data"), (dict(data={}), "there is no entry name"), (dict(seconds={}), "pretrain"),
    (dict(seconds=dict(pretrain="long")), "seconds.pretrain"), (dict(curves=5), "curves"),
    (dict(curves={"mtl": [[0, float("nan")]]}), "curves"), (dict(recipe=None), "recipe"), (dict(recipe={}), "config"),
    (dict(schema=2), "schema 2"), (dict(kind="other"), "is not the record of a run"),
])
def test_bad_record(tmp_path, changes, words): rejected(tmp_path, json.dumps(RUN | changes), words)


@pytest.mark.parametrize("key", ["rows", "recipe", "data", "seconds"])
def test_missing_entry(tmp_path, key):
    rejected(tmp_path, json.dumps({k: v for k, v in RUN.items() if k != key}), f"there is no entry {key}")


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "null", '{"rows": [', "[" * 5000])
def test_no_record(tmp_path, text): rejected(tmp_path, text)


def test_a_record_stays_as_it_is(tmp_path):
    "Rows get a few entries more; nothing that was written is changed, but for the paper's names of methods."
    run = read_record(root/"data/results/glyphs-quick-s0.json")
    for row, read in zip(RUN["rows"], run["rows"], strict=True):
        assert {k: read[k] for k in row} == row and read["file"] == "glyphs-quick-s0.json"
        assert len(correct_counts(read)) == row["tasks"]
    assert run["recipe"].data == "glyphs" and run["seconds"] == RUN["seconds"]


def test_other_records_are_left_out(tmp_path):
    for kind in "speed", "trace", "recognize", "reliability":
        (tmp_path/f"{kind}.json").write_text(json.dumps(dict(kind=kind)))
    assert read_results(tmp_path) == []
    with pytest.raises(BadInput, match="no such folder"): read_results(tmp_path/"nowhere")


def test_table_says_how_images_were_seen():
    "Old and new records name the test-time augmentation of the standard protocol."
    old = json.loads((root/"data/results/fc100-small-views4-s0.json").read_text(encoding="utf-8"))
    assert results_table(old).splitlines()[0].endswith("standard protocol, 4 augmented views averaged")
    plain = results_table(RUN | dict(recipe=asdict(preset("quick"))))
    assert plain == results_table(RUN) == results_table(RUN | dict(recipe={}))
