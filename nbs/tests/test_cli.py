"The command `mtl`: bad input is one clear line and exit code 2, nothing left behind; options, deadlines, plug-ins."
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from mtl_nb.cli import DEADLINE, main, read_run_options
from mtl_nb.data.glyphs import glyphs
from mtl_nb.experiments.config import config_from_record, differing_fields, preset, with_overrides

root = Path(__file__).parents[2]
TINY = ("--widths 4,4,8,8 --phase1.epochs 1 --phase2.tasks 8 --eval-tasks 20 --select-tasks 20 --eval-every 4 "
        "--inner 0.2,5 --way 2 --shots 1 --query 5 --methods mtl").split()


def write(folder, banks, classes, images):
    for split, bank in banks.items():
        for c in range(classes[split]):
            place = folder/split/bank.names[c]
            place.mkdir(parents=True)
            for i in bank.by_class[c][:images].tolist():
                Image.fromarray(bank.x[i].permute(1, 2, 0).numpy()).save(place/f"{i}.png")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    write(folder, glyphs(0), dict(train=5, val=5, test=5), 20)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MTL_NB_CACHE", str(tmp_path/"cache"))
    monkeypatch.chdir(tmp_path)


def mtl(command, *more, data=None):
    "Run a command given as text; returns its exit code."
    return main([*command.split(), *map(str, more), *(["--data", str(data)] if data else [])])


def refused(capsys, words, command, *more, data=None):
    assert mtl(command, *more, data=data) == 2
    err = capsys.readouterr().err.splitlines()
    assert err[-1].startswith("mtl: ") and words in err[-1], err
    assert not any(o.startswith(("mtl:", "Traceback")) for o in err[:-1]), err
    assert not Path("out").exists() or not any(Path("out").iterdir())


@pytest.mark.parametrize("options, words", [
    ("--way 6", "only 5"),
    ("--shots -1", "shots"),
    ("--shots 1,x", "--shots takes whole numbers with commas between; got '1,x'"),
    ("--shots 1,1", "different"),
    ("--shots 6", "20 images"),
    ("--query 0", "query"),
    ("--way 1", "way"),
    ("--eval-tasks 0", "tasks"),
    ("--size -3", "size"),
    ("--device abacus", "abacus"),
    ("--preset huge", "huge"),
    ("--eval-split train", "eval_split is test or val"),
    ("--seed -1", "seed"),
    ("--seed 1180591620717411303424", "seed"),
    ("--preset paper --shots 11 --query 5", "needs 22"),
    ("--backbone nowhere.safetensors", "nowhere"),
    ("--backbone=", "--backbone was given nothing"),
    ("--compute-matched=", "--compute-matched was given nothing"),
    ("--root=", "--root was given nothing"),
    ("--inner 1e308,5", "inner must be a rate from 0 to 1000"),
    ("--hard.shot1 -1", "hard: shot1"),
    ("--phase1.augment.turn 1", "no option --phase1.augment.turn"),
    ("--select-tasks 10000000", "select_tasks must be from 2 to 1,000,000"),
    ("--phase1.lr fast", "--phase1.lr takes a number; got 'fast'"),
    ("--objective.rounds 2 --objective.temperature inf", "temperature must be above 0, and at most 1000"),
    ("--phase1.epoch 3", "did you mean --phase1.epochs"),
    ("--tasks 30", "--tasks is called --eval-tasks now"),
    ("--equal-time x", "--equal-time is called --compute-matched now"),
    ("--minutes 0", "--minutes must be above 0"),
    ("--minutes", "--minutes needs a value"),
    ("--methods mtl,maml-ht", "did you mean"),
    ("--arch resnet", "did you mean resnet12?"),
    ("--centred perhaps", "--centred takes true or false; got 'perhaps'"),
    ("stray", "'stray' is no option"),
    ("--plugin nope.py", "no such Python file"),
    ("--config nope.json", "nope.json is missing or damaged"),
    ("--phase1.augment some", "takes only none"),
    ("--phase1.bn-splits 0", "bn_splits"),
    ("--tasks-at-once -1", "--tasks-at-once must not be negative"),
])
def test_options(pictures, capsys, options, words): refused(capsys, words, f"run --out out {options}", data=pictures)


def test_no_such_folder(capsys): refused(capsys, "no data set and no folder", "run --out out", data="nothing-here")


def test_unknown_command(capsys): refused(capsys, "no command 'rnu' (did you mean run", "rnu")


def broken(pictures, tmp_path):
    folder = tmp_path/"broken"
    shutil.copytree(pictures, folder)
    return folder


def test_split_missing(pictures, tmp_path, capsys):
    folder = broken(pictures, tmp_path)
    shutil.rmtree(folder/"val")
    refused(capsys, "val", "run --out out", data=folder)


def test_class_in_two_splits(pictures, tmp_path, capsys):
    folder = broken(pictures, tmp_path)
    name = next((folder/"train").iterdir()).name
    shutil.copytree(folder/"train"/name, folder/"test"/name)
    refused(capsys, name, "run --out out", data=folder)


def test_class_too_small(pictures, tmp_path, capsys):
    folder = broken(pictures, tmp_path)
    place = next((folder/"val").iterdir())
    for file in list(place.iterdir())[:10]: file.unlink()
    refused(capsys, place.name, "run --out out", data=folder)


def test_corrupt_image(pictures, tmp_path, capsys):
    folder = broken(pictures, tmp_path)
    file = next(next((folder/"train").iterdir()).iterdir())
    file.write_bytes(file.read_bytes()[:100])
    refused(capsys, file.name, "run --out out", data=folder)
    mtl("run --out out --skip-bad --way 99", data=folder)
    assert file.name in capsys.readouterr().err


def test_unwritable_out(pictures, capsys):
    Path("file").write_text("in the way")
    refused(capsys, "file", "run --shots 1 --out file/run", data=pictures)
    refused(capsys, "file", "run --shots 1 --out file", data=pictures)


def test_out_of_another_program(pictures, capsys):
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("important")
    refused(capsys, "no run folder", "run --shots 1 --out mine", data=pictures)
    assert Path("mine/thesis.txt").read_text() == "important"


def test_weights_of_another_program(pictures, capsys):
    Path("w.safetensors").write_bytes(b"not weights at all")
    refused(capsys, "w.safetensors", "test --weights w.safetensors", data=pictures)
    refused(capsys, "no weights 'none.safetensors'", "test --weights none.safetensors", data=pictures)
    refused(capsys, "--weights", "test", data=pictures)
    Path("empty").mkdir()
    refused(capsys, "holds no weights", "test --weights empty", data=pictures)


@pytest.mark.parametrize("options, words", [
    ("--split nonsense", "--split"),
    ("--way 0", "--way"),
    ("--way 99", "99-way needs 99 classes"),
    ("--shots 7", "is for 1-shot tasks, not 7-shot"),
    ("--seed 1180591620717411303424", "--seed"),
    ("--shots 1,1", "different"),
    ("--size 8", "16"),
    ("--base glyphs", "--base is for weights that whiten"),
])
def test_options_of_test(pictures, capsys, options, words):
    weights = root/"data/weights/glyphs-quick-s0/mtl-1shot.safetensors"
    refused(capsys, words, f"test --weights {weights} --query 5 --tasks 20 {options}", data=pictures)


def test_damaged_run(pictures, capsys):
    Path("run").mkdir()
    Path("run/results.json").write_text('{"rows": [')
    refused(capsys, "damaged", "test --weights run", data=pictures)


def test_bad_backbone_leaves_no_folder(pictures, capsys):
    Path("b.json").write_text("{}")
    refused(capsys, "b.json", "run --shots 1 --out out --backbone b.json", data=pictures)
    assert not Path("out").exists()


def test_root_without_a_set(pictures, capsys):
    refused(capsys, "--root", f"run --out out --root {pictures}", data="glyphs")


@pytest.fixture(scope="module")
def finished(pictures, tmp_path_factory):
    "A tiny run on the pictures."
    out = tmp_path_factory.mktemp("finished")/"run"
    assert mtl("run --seed 3 -q", "--out", out, *TINY, data=pictures) == 0
    return out


def test_every_option_reaches_the_config(finished):
    changes = {"widths": (4, 4, 8, 8), "phase1.epochs": 1, "phase2.tasks": 8, "eval_tasks": 20, "select_tasks": 20,
               "eval_every": 4, "inner": (.2, 5), "way": 2, "shots": (1,), "query": 5}
    expected = with_overrides(preset("quick", "pictures", seed=3, methods=("MTL",)), changes)
    record = json.loads((finished/"results.json").read_text(encoding="utf-8"))
    got = config_from_record(record["recipe"])
    assert not differing_fields(got, expected) or differing_fields(got, expected) == ["data"]
    assert (got.seed, got.phase2.seed, got.methods, got.shots) == (3, 3, ("MTL",), (1,))


def test_no_methods_are_a_choice_too():
    assert read_run_options(["--methods", "none"])[1].methods == ()
    assert read_run_options([])[1].methods == ("MTL", "MTL + HT")


def test_json_on_stdout_messages_on_stderr(finished, pictures, capsys):
    assert mtl("test --json --query 5 --tasks 20", "--weights", finished, data=pictures) == 0
    said = capsys.readouterr()
    rows = json.loads(said.out)["rows"]
    recorded = json.loads((finished/"results.json").read_text(encoding="utf-8"))["rows"]
    assert [r["accuracy"] for r in rows] == [r["accuracy"] for r in recorded] and "correct" not in rows[0]
    assert "test: 100 images of 5 classes" in said.err
    assert mtl("test -q --query 5 --tasks 20", "--weights", finished, data=pictures) == 0
    said = capsys.readouterr()
    assert "head only" in said.out and not said.err


@pytest.mark.parametrize("name", ["recipe.json", "results.json"])
def test_config_from_a_file(finished, pictures, tmp_path, name):
    assert mtl(f"run -q --out {tmp_path/'again'} --config", finished/name, data=pictures) == 0
    old, new = (json.loads((o/"results.json").read_text(encoding="utf-8")) for o in (finished, tmp_path/"again"))
    assert old["recipe"] == new["recipe"]
    assert [r["correct"] for r in old["rows"]] == [r["correct"] for r in new["rows"]]


def test_compute_matched(finished, pictures, capsys):
    source = finished/"results.json"
    command = f"run --out out --compute-matched {source}"
    refused(capsys, "leave out --phase1.epochs", f"{command} --phase1.epochs 7777", data=pictures)
    refused(capsys, "leave out --seed", f"{command} --seed 3", data=pictures)
    refused(capsys, "that run is on 'pictures", command, data="glyphs")
    assert mtl(f"run -q --out matched --compute-matched {source}", data=pictures) == 0
    assert "head only, equal time" in capsys.readouterr().out


def test_deadline_and_resume(pictures, tmp_path, capsys, finished):
    command = ["--out", tmp_path/"slow", *TINY]
    assert mtl("run --seed 3 --minutes 0.000001", *command, data=pictures) == DEADLINE
    assert "go on with --resume" in capsys.readouterr().err
    while (code := mtl("run --seed 3 --minutes 0.000001 --resume", *command, data=pictures)) == DEADLINE: pass
    assert code == 0
    rows = [json.loads((o/"results.json").read_text(encoding="utf-8"))["rows"] for o in (finished, tmp_path/"slow")]
    assert [r["correct"] for r in rows[0]] == [r["correct"] for r in rows[1]]


def test_plugin(pictures, capsys):
    lines = ["from mtl_nb.data.datasets import register_dataset", "from mtl_nb.data.glyphs import glyphs", "",
             "@register_dataset('squiggles', mirror=False)", "def load(): return glyphs(0)"]
    Path("mine.py").write_text("\n".join(lines))
    assert mtl("run --help --plugin mine.py") == 0
    assert "squiggles" in capsys.readouterr().out
    Path("bad.py").write_text("1/0")
    refused(capsys, "ZeroDivisionError", "run --plugin bad.py", data=pictures)


def test_help_shows_the_values_of_the_preset(capsys):
    assert mtl("run --data fc100 --preset small --help") == 0
    said = " ".join(capsys.readouterr().out.split())
    for part in ("passes over all base images; 0: none, for a backbone with weights of its own (default: 20)", "at 1-shot (default: 20)", "maml-4-conv", "resnet12",
                 "--objective.rotation NUMBER", "cifar-fs"): assert part in said, part


def test_light_help():
    "`mtl --help` imports no torch; the help of a command imports nothing that it does not need."
    code = "import sys\nfrom mtl_nb.cli import main\nmain({})\nfor o in {}: assert o not in sys.modules, o"
    heavy = ["torchvision", "ipywidgets", "matplotlib", "tyro"]
    for argv, absent in ((["--help"], ["torch", "numpy"]), (["run", "--help"], heavy)):
        subprocess.run([sys.executable, "-c", code.format(argv, absent)], check=True, cwd=root, capture_output=True)


def test_from_the_shell(pictures):
    "The module itself: exit code and streams."
    command = [sys.executable, "-m", "mtl_nb", "run", "--data", str(pictures), "--way", "9", "-q"]
    r = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert r.returncode == 2 and r.stderr.count("\n") == 1 and "Traceback" not in r.stderr


@pytest.mark.slow
def test_quick_from_end_to_end(capsys):
    "The first command of the front page: `pytest nbs/tests/test_cli.py --nbflags=slow`."
    assert mtl("run --out out") == 0
    assert all(o in capsys.readouterr().out for o in ("head only", "MTL + HT", "2,000 tasks"))
    rows = json.loads(Path("out/results.json").read_text())["rows"]
    gain = next(r["paired"] for r in rows if (r["method"], r["shot"]) == ("MTL", 1))
    assert gain["difference"] > gain["ci95"]
