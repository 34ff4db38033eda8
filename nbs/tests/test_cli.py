"Bad input at the command line: one clear line, exit code 2, nothing left behind."
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from mtl_nb.cli import mtl_meta_test, mtl_run
from mtl_nb.data.glyphs import glyphs


def write(root, banks, classes, images):
    for split, bank in banks.items():
        for c in range(classes[split]):
            folder = root/split/bank.names[c]
            folder.mkdir(parents=True)
            for i in bank.by_class[c][:images].tolist(): Image.fromarray(bank.x[i].permute(1, 2, 0).numpy()).save(folder/f"{i}.png")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    write(root, glyphs(0), dict(train=5, val=5, test=5), 20)
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MTL_NB_CACHE", str(tmp_path/"cache"))
    monkeypatch.chdir(tmp_path)


def refused(capsys, words, command=mtl_run, **arguments):
    assert command(**arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("mtl_nb: ") and err.count("\n") == 1 and "Traceback" not in err
    assert words in err, err
    assert not Path("out").exists() or not any(Path("out").iterdir())


@pytest.mark.parametrize("arguments, words", [
    (dict(way=6), "only 5"),
    (dict(shots="-1"), "--shots"),
    (dict(shots="1,x"), "--shots"),
    (dict(shots="1,1"), "different"),
    (dict(shots="6"), "20 images"),
    (dict(query=0), "query"),
    (dict(way=1), "way"),
    (dict(tasks=0), "tasks"),
    (dict(size=-3), "size"),
    (dict(device="abacus"), "abacus"),
    (dict(preset="huge"), "huge"),
    (dict(exam="train"), "--exam"),
    (dict(seed=-1), "seed"),
    (dict(seed=2**70), "seed"),
    (dict(preset="paper", shots="11", query=5), "needs 22"),
    (dict(backbone="nowhere.safetensors"), "nowhere"),
    (dict(backbone=""), "--backbone was given nothing"),
    (dict(equal_time=""), "--equal-time was given nothing"),
    (dict(root=""), "--root was given nothing"),
    (dict(set="inner=[1e308, 5]"), "inner must be a rate from 0 to 1000"),
    (dict(set="hard.1=-1"), "hard must give numbers of tasks by shot"),
    (dict(set="phase1.augment.turn=1"), "an augmentation has only pad, flip, jitter, zoom"),
    (dict(set="select=10000000"), "select must be from 2 to 1,000,000"),
    (dict(set='phase1.lr="0.1"'), "lr must be a number, got"),
    (dict(set="objective.rounds=2; objective.temperature=Infinity"), "temperature must be above 0, and at most 1000"),
])
def test_options(pictures, capsys, arguments, words):
    refused(capsys, words, data=str(pictures), out="out", **arguments)


def test_no_such_folder(capsys): refused(capsys, "no data set and no folder", data="nothing-here", out="out")


def broken(pictures, tmp_path):
    root = tmp_path/"broken"
    shutil.copytree(pictures, root)
    return root


def test_split_missing(pictures, tmp_path, capsys):
    root = broken(pictures, tmp_path)
    shutil.rmtree(root/"val")
    refused(capsys, "val", data=str(root), out="out")


def test_class_in_two_splits(pictures, tmp_path, capsys):
    root = broken(pictures, tmp_path)
    name = next((root/"train").iterdir()).name
    shutil.copytree(root/"train"/name, root/"test"/name)
    refused(capsys, name, data=str(root), out="out")


def test_class_too_small(pictures, tmp_path, capsys):
    root = broken(pictures, tmp_path)
    folder = next((root/"val").iterdir())
    for file in list(folder.iterdir())[:10]: file.unlink()
    refused(capsys, folder.name, data=str(root), out="out")


def test_corrupt_image(pictures, tmp_path, capsys):
    root = broken(pictures, tmp_path)
    file = next(next((root/"train").iterdir()).iterdir())
    file.write_bytes(file.read_bytes()[:100])
    refused(capsys, file.name, data=str(root), out="out")
    mtl_run(data=str(root), out="out", skip_bad=True, way=99)
    assert file.name in capsys.readouterr().out


def test_unwritable_out(pictures, capsys):
    Path("file").write_text("in the way")
    refused(capsys, "file", data=str(pictures), shots="1", out="file/run")
    refused(capsys, "file", data=str(pictures), shots="1", out="file")


def test_foreign_out(pictures, capsys):
    Path("mine").mkdir(); Path("mine/thesis.txt").write_text("dear to me")
    refused(capsys, "no run folder", data=str(pictures), shots="1", out="mine")
    assert Path("mine/thesis.txt").read_text() == "dear to me"


def test_foreign_weights(pictures, capsys, tmp_path):
    Path("w.safetensors").write_bytes(b"not weights at all")
    refused(capsys, "w.safetensors", mtl_meta_test, weights="w.safetensors", data=str(pictures))
    refused(capsys, "no such", mtl_meta_test, weights="none.safetensors", data=str(pictures))
    refused(capsys, "--weights", mtl_meta_test, data=str(pictures))
    refused(capsys, "results.json", mtl_meta_test, weights=str(tmp_path), data=str(pictures))


@pytest.mark.parametrize("arguments, words", [
    (dict(split="nonsense"), "--split"),
    (dict(way=0), "--way"),
    (dict(seed=2**70), "--seed"),
    (dict(shots="1,1"), "different"),
    (dict(size=8), "16"),
])
def test_options_of_meta_test(pictures, capsys, arguments, words):
    weights = Path(__file__).parents[2]/"data/weights/glyphs-small.safetensors"
    refused(capsys, words, mtl_meta_test, weights=str(weights), data=str(pictures), **{"query": 5, "tasks": 20, **arguments})


def test_damaged_run(pictures, capsys):
    Path("run").mkdir(); Path("run/results.json").write_text('{"rows": [')
    refused(capsys, "damaged", mtl_meta_test, weights="run", data=str(pictures))


def test_bad_backbone_leaves_no_folder(pictures, capsys):
    Path("b.json").write_text("{}")
    refused(capsys, "b.json", data=str(pictures), shots="1", out="out", backbone="b.json")
    assert not Path("out").exists()


def test_root_without_a_set(pictures, capsys): refused(capsys, "--root", data="glyphs", root=str(pictures), out="out")


def test_from_the_shell(pictures):
    "The console script itself: exit code and streams."
    r = subprocess.run([Path(sys.executable).parent/"mtl_run", "--data", str(pictures), "--way", "9"], capture_output=True, text=True)
    assert r.returncode == 2 and r.stderr.count("\n") == 1 and "Traceback" not in r.stderr


def test_quick_from_end_to_end(request, capsys):
    "The README's first command, whole: `pytest nbs/tests/test_cli.py --nbflags slow`."
    if "slow" not in request.config.getoption("--nbflags"): pytest.skip("minutes of training: add --nbflags slow")
    assert mtl_run(out="out") == 0
    assert all(o in capsys.readouterr().out for o in ("head only", "MTL + HT", "2,000 tasks"))
    rows = json.loads(Path("out/results.json").read_text())["rows"]
    gain = next(r["paired"] for r in rows if (r["method"], r["shot"]) == ("MTL", 1))
    assert gain["difference"] > gain["ci95"]
