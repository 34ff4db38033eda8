"What is not said did not happen: options are obeyed or refused, nothing is skipped, leaked or blank without a word."
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mtl_nb.cli import main
from mtl_nb.core import BadInput
from mtl_nb.models.resnet12 import ResNet12
from mtl_nb.publish import load_weights
from mtl_nb.train.checkpoints import load, load_backbone, save, trained_size

root = Path(__file__).parents[2]
QUICK = root/"data/weights/glyphs-quick-s0"
PHASE1 = "--widths 4,4,8,8 --phase1.epochs 1".split()
TINY = "--phase2.tasks 4 --eval-tasks 10 --select-tasks 10 --eval-every 4 --inner 0.2,5 --way 2 --query 5 --methods mtl -q".split()


def pixels(*seed, side=16): return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def classes(place, first, names, count=12, side=16):
    for c, name in enumerate(names):
        (place/name).mkdir(parents=True)
        for i in range(count): Image.fromarray(pixels(first + c, i, side=side)).save(place/name/f"{i:02}.png")
    return place


def splits(place, side=16):
    for s, split in enumerate(("train", "val", "test")): classes(place/split, 10*s, [f"{split}{c}" for c in range(3)], side=side)
    return place


@pytest.fixture(autouse=True)
def at(tmp_path, monkeypatch):
    monkeypatch.setenv("MTL_NB_CACHE", str(tmp_path/"cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A tiny run at 16 pixels, and its pictures."
    place = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MTL_NB_CACHE", str(place/"cache"))
        data = str(splits(place/"set"))
        assert main(["run", "--data", data, "--out", str(place/"run"), "--shots", "1,5", "--size", "none", *PHASE1, *TINY]) == 0
    return place


def mtl(capsys, *words, code=0):
    "Run a command; what it said on stdout and stderr."
    assert main(list(map(str, words))) == code, capsys.readouterr().err
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return said


def refused(capsys, words, *command):
    last = mtl(capsys, *command, code=2).err.splitlines()[-1]
    assert last.startswith("mtl: ") and words in last, last
    return last


# --- options -------------------------------------------------------------------------------------------------------
def rows(said): return [(r["method"], r["way"], r["shot"]) for r in json.loads(said.out)["rows"]]


def test_way_and_shots_of_saved_weights(finished, capsys):
    test = "test", "--query", 5, "--tasks", 10, "--data", finished/"set", "--json", "--weights"
    assert {k for _, _, k in rows(mtl(capsys, *test, finished/"run"))} == {1, 5}
    assert rows(mtl(capsys, *test, finished/"run", "--shots", 5)) == [("head only", 2, 5), ("MTL", 2, 5)]
    refused(capsys, "--shots 3: these weights are for 1,5-shot tasks", *test, finished/"run", "--shots", "1,3")
    refused(capsys, "is for 2-way tasks, not 3-way", *test, finished/"run", "--way", 3)
    for weights in "mtl-1shot.safetensors", "mtl-5shot.safetensors":
        refused(capsys, "is for 2-way tasks, not 3-way", *test, finished/"run"/weights, "--way", 3)
        refused(capsys, "-shot tasks, not 7-shot", *test, finished/"run"/weights, "--shots", 7)
    refused(capsys, "is for one number of shots", *test, finished/"run/mtl-1shot.safetensors", "--shots", "1,5")
    assert rows(mtl(capsys, *test, finished/"run/pretrain.safetensors", "--way", 3, "--shots", 2)) == [("head only", 3, 2)]


def test_way_and_shots_in_python():
    for how, says in (dict(way=3), "5-way"), (dict(k_shot=5), "1-shot"):
        with pytest.raises(BadInput, match=f"is for {says} tasks"): load_weights(QUICK/"mtl-1shot.safetensors", **how)
    with pytest.raises(BadInput, match="is for 5-way"): load_weights(QUICK, "MTL", 1, way=3)
    assert load_weights(QUICK/"mtl-1shot.safetensors", k_shot=1, way=5).record["shot"] == 1


@pytest.mark.parametrize("words, says", [
    ("bench --size 84", "--size goes with --data"),
    ("bench --skip-bad", "--skip-bad goes with --data"),
    ("bench --download", "--download"),
    ("bench --parts exam --start .", "--start is for the part start"),
    ("learn pictures --shots 5", "glyphs is a network alone"),
    ("export glyphs --onnx x.onnx --shot 5", "--shot: glyphs is a network alone"),
    ("test --weights x -q -v", "--quiet and --verbose exclude each other"),
    ("run -q -v", "--quiet and --verbose exclude each other"),
])
def test_options_that_would_change_nothing(capsys, words, says):
    classes(Path("pictures"), 0, "ab")
    refused(capsys, says, *words.split())


def test_the_size_that_weights_record_is_used(finished, capsys, monkeypatch):
    import mtl_nb.data.datasets
    asked, real = [], mtl_nb.data.datasets.load_data
    def load_data(*args, **how):
        banks = real(*args, **how)
        asked.append({tuple(o.x.shape[2:]) for o in banks.values()})
        return banks
    monkeypatch.setattr(mtl_nb.data.datasets, "load_data", load_data)
    large = splits(Path("large"), side=40)
    shutil.copytree(finished/"run", "alone")
    for name in "recipe.json", "results.json": Path("alone", name).unlink()
    test = "test", "--query", 5, "--tasks", 10, "--way", 2, "-q", "--data", large, "--weights"
    for weights in finished/"run", "alone", "alone/mtl-1shot.safetensors", "alone/pretrain.safetensors":
        mtl(capsys, *test, weights)
        assert asked.pop() == {(16, 16)}, weights
    mtl(capsys, *test, "alone", "--size", 24)
    assert asked.pop() == {(24, 24)}


def test_weights_without_a_size(finished, capsys):
    tensors, record = load(finished/"run/pretrain.safetensors")
    assert trained_size(record) == 16
    del record["image_size"]
    save(Path("old.safetensors"), tensors, record)
    test = "test", "--weights", "old.safetensors", "--query", 5, "--tasks", 10, "--way", 2, "--data", finished/"set"
    refused(capsys, "old.safetensors does not say for which pictures it was trained: give their size, --size", *test)
    mtl(capsys, *test, "--size", 16)


def test_a_backbone_of_another_size(finished, capsys):
    large = splits(Path("large"), side=20)
    run = "run", "--data", large, "--backbone", finished/"run/pretrain.safetensors", "--out", "out", "--shots", 1, *TINY
    refused(capsys, "was trained on pictures of 16 x 16 pixels", *run, "--size", "none")
    assert not Path("out").exists()
    mtl(capsys, *run, "--size", 16)


def test_a_run_without_results_is_evaluated_all_the_same(finished, capsys):
    Path("folder").mkdir()
    shutil.copy(finished/"run/pretrain.safetensors", "folder")
    said = mtl(capsys, "test", "--weights", "folder", "--query", 5, "--tasks", 10, "--way", 2, "--data", finished/"set")
    assert "head only" in said.out and "folder has no results.json: its backbone is evaluated" in said.err
