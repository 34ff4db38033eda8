"""Records from outside: whatever an entry is replaced by, a reader gives one line that names the file, or reads a value
that changes no prediction. Nothing hangs, nothing fills the memory."""
import json
import resource
import shutil
import sys
import time
from copy import deepcopy
from math import isfinite, nan
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes

from mtl_nb.cli import main
from mtl_nb.core import BadInput, read_json, sha256
from mtl_nb.data.episodes import TaskShape
from mtl_nb.data.folders import folder_bank
from mtl_nb.evaluation.exam import make_exam
from mtl_nb.experiments.config import compute_matched, config_from_record
from mtl_nb.experiments.records import read_config, read_record, results_table
from mtl_nb.methods.base import get_inner
from mtl_nb.publish import card, load_weights, weights_in
from mtl_nb.recognize import Recognizer

DEEP, NESTED = "@deep@", "["*200_000 + "]"*200_000
BAD = [None, -1, 0, 1e9, 1e300, nan, "x", "", [], {}, [5], True, 10**30, DEEP]
RUN = """--widths 4,4,8,8 --phase1.epochs 1 --phase2.tasks 4 --eval-tasks 10 --select-tasks 10 --eval-every 4 --inner 0.2,5
--way 2 --query 5 --methods mtl -q --shots 1 --size 16""".split()


def pictures(place, seed, names):
    for c, name in enumerate(names):
        (place/name).mkdir(parents=True)
        x = np.random.default_rng([seed, c]).integers(0, 256, (10, 16, 16, 3), dtype=np.uint8)
        for i, pixels in enumerate(x): Image.fromarray(pixels).save(place/name/f"{i}.png")


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    "A tiny run, and a recogniser learned on its weights; states in old files have no checksum, so these have none."
    place = tmp_path_factory.mktemp("real")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MTL_NB_CACHE", str(place/"cache"))
        for s, split in enumerate(("train", "val", "test")): pictures(place/"set"/split, s, [f"{split}{c}" for c in range(3)])
        assert main(["run", "--data", str(place/"set"), "--out", str(place/"run"), *RUN]) == 0
        learn = "learn", place/"set/test", "--weights", place/"run", "-o", place/"known.safetensors", "-q"
        assert main(list(map(str, learn))) == 0
        bank = folder_bank(place/"set/test")
    (place/"known.safetensors").rename(place/"run/known.safetensors")
    return place/"run", bank


@pytest.fixture()
def run(real, tmp_path):
    shutil.copytree(real[0], tmp_path/"run")
    return tmp_path/"run"


def nodes(tree, at=()):
    "Where something can be replaced; of a long list the first entry stands for all."
    if at: yield at
    parts = tree.items() if isinstance(tree, dict) else enumerate(tree[:1]) if isinstance(tree, list) else ()
    for k, v in parts: yield from nodes(v, (*at, k))


def changed(record, at, value=None, drop=False):
    out = deepcopy(record)
    inner = out
    for k in at[:-1]: inner = inner[k]
    if drop: del inner[at[-1]]
    else: inner[at[-1]] = value
    return out


def variants(record):
    for at in nodes(record):
        for bad in BAD: yield at, bad, changed(record, at, bad)
        yield at, "(dropped)", changed(record, at, drop=True)


def record_of(file):
    if file.suffix == ".json": return {k: v for k, v in json.loads(file.read_text()).items() if k != "checksum"}
    data = file.read_bytes()
    header = json.loads(data[8:8 + int.from_bytes(data[:8], "little")])
    record = json.loads(header["__metadata__"]["record"])
    record.pop("checksum", None)
    return record


def write(file, record, tensors=None):
    "Without a checksum, as older versions wrote, and as anyone may."
    text = json.dumps(record).replace(f'"{DEEP}"', NESTED)
    if tensors is None: file.write_text(text)
    else: file.write_bytes(to_bytes(tensors, {"record": text}))


def predictions(weights, bank):
    exam = make_exam(bank, TaskShape(weights.record["way"], weights.record["shot"], 5), tasks=4)
    lr, steps = get_inner(weights.model)
    return weights.method.count_correct(weights.model, bank, exam, (lr,), (steps,)).tolist()


# What each file's readers give; equal before and after a change that is accepted.
def from_results(file, bank):
    record = read_record(file)
    results_table(record | dict(recipe={}))
    try: compute_matched(read_json(file))
    except BadInput: pass
    return predictions(load_weights(file.parent, "head only", 1), bank)


def from_recipe(file, bank):
    config = read_config(file)[0]
    return config.digest()


def from_backbone(file, bank): return predictions(load_weights(file, way=2), bank)


def from_method(file, bank):
    assert weights_in(file.parent)
    return predictions(load_weights(file), bank)


def from_known(file, bank):
    r = Recognizer.load(file)
    assert isfinite(r.threshold()) and "3 classes" in r.summary
    return r.predict_proba(bank.x[:2].permute(0, 2, 3, 1).numpy()).tolist()


READERS = {"results.json": from_results, "recipe.json": from_recipe, "pretrain.safetensors": from_backbone,
           "mtl-1shot.safetensors": from_method, "known.safetensors": from_known}


def attempt(read, file, bank):
    "What a reader gives, or its `BadInput`, in bounded time."
    began = time.process_time()
    try: return read(file, bank)
    except BadInput as e:
        said = str(e)
        assert "\n" not in said and len(said) < 600 and (file.name in said or "run" in said), said[:1000]
        return None
    finally: assert time.process_time() - began < 2


def check(name, run, bank, every):
    "One of `every` variants of a record."
    read, file = READERS[name], run/name
    tensors = from_bytes(file.read_bytes()) if file.suffix == ".safetensors" else None
    record = record_of(file)
    write(file, record, tensors)
    if name == "pretrain.safetensors": (run/"mtl-1shot.safetensors").unlink()
    expected, refused, tried = read(file, bank), 0, 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i, (at, bad, other) in enumerate(variants(record)):
        if i % every: continue
        write(file, other, tensors)
        try: got = attempt(read, file, bank)
        except Exception as e: raise AssertionError(f"{name}: {at} = {bad!r}: {type(e).__name__}: {e}") from e
        assert got in (None, expected), (at, bad)
        refused, tried = refused + (got is None), tried + 1
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most)/(2**20 if sys.platform == "darwin" else 2**10)
    assert grown < 500 and refused > tried/3, (grown, refused, tried)


@pytest.mark.parametrize("name", READERS)
def test_some_changes(real, run, name): check(name, run, real[1], 13)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_every_change(real, run, name): check(name, run, real[1], 1)


FORGED = "x\nmtl: all is well\r\x1b[2J\u2028"

def test_no_name_in_a_record_forges_a_line(run, capsys):
    record = record_of(run/"results.json")
    for part in record["data"], record["recipe"]: part["name" if "name" in part else "data"] = FORGED
    record["recipe_sha256"] = config_from_record(record["recipe"]).digest()
    record |= dict(device=FORGED, notes=[FORGED], versions={FORGED: FORGED}, curves={"mtl-1shot": [[0, .2], [4, .3]]})
    for row in record["rows"]: row["exam"] = FORGED
    (run.parent/"records").mkdir()
    write(run.parent/"records/r.json", record)
    for out in [], ["--out", str(run.parent/"tables")]:
        assert main(["results", "--records", str(run.parent/"records"), *out]) == 0
    said = capsys.readouterr().out + (run.parent/"tables/results.md").read_text() + card("name", record)
    assert r"x\nmtl: all is well\r\x1b[2J\u2028" in said and not {"\r", "\x1b", "\u2028"} & {*said}
    assert not any(o.startswith("mtl: all") for o in said.splitlines())
    assert [o.suffix for o in sorted((run.parent/"tables").iterdir())] == [".png", ".md"]


@pytest.mark.parametrize("name, at, bad, command", [
    ("recipe.json", ("recipe", "way"), DEEP, "test"), ("results.json", ("rows", 0, "lr"), nan, "test"),
    ("pretrain.safetensors", ("widths", 0), 9000, "test"), ("mtl-1shot.safetensors", ("steps",), 10**9, "test"),
    ("results.json", ("rows", 1, "seconds"), 1e7, "run --compute-matched"), ("recipe.json", ("recipe", "way"), 10**9, "run --config"),
    ("results.json", ("rows",), [5], "results"), ("known.safetensors", ("counts",), DEEP, "recognize"),
    ("mtl-1shot.safetensors", ("parts",), {"p"*5000: "0"*64}, "learn"), ("pretrain.safetensors", ("met",), 7, "export"),
], ids=str)
def test_commands_end_with_one_line(real, run, capsys, name, at, bad, command):
    file = run/name
    tensors = from_bytes(file.read_bytes()) if file.suffix == ".safetensors" else None
    write(file, changed(record_of(file), at, bad), tensors)
    if name == "pretrain.safetensors":
        method = run/"mtl-1shot.safetensors"
        write(method, record_of(method) | dict(backbone_sha256=sha256(file)), from_bytes(method.read_bytes()))
    data = real[0].parent/"set"
    (run.parent/"records").mkdir()
    if name == "results.json": shutil.copy(file, run.parent/"records")
    words = {"test": ["--weights", run, "--data", data, "--query", 5, "--tasks", 10], "results": ["--records", run.parent/"records"],
             "run --compute-matched": [file, "--data", data], "run --config": [file, "--data", data],
             "recognize": [file, data/"test"], "learn": [data/"test", "--weights", file, "-o", run/"new.safetensors"],
             "export": ["--weights", file, "--onnx", run/"net.onnx"]}[command]
    capsys.readouterr()
    assert main([*command.split(), *map(str, words)]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and said[0].startswith("mtl: ") and len(said[0]) < 500 and ("1e+07" in said[0] or name in said[0] or "phase 2 took" in said[0]), said
