"What is not said did not happen: options are obeyed or refused, nothing is skipped, leaked or blank without a word."
import json
import os
import shutil
import subprocess
import sys
import warnings
from io import BytesIO, TextIOWrapper
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mtl_nb.cli import main
from mtl_nb.core import BadInput
from mtl_nb.data.bank import ImageBank, duplicates_line, find_duplicates
from mtl_nb.data.datasets import DATASETS, _from_folders, load_data, split_table
from mtl_nb.data.folders import folder_bank, folder_splits, picture_files, read_image, say_doubts
from mtl_nb.evaluation.meta_test import unpack_hashes
from mtl_nb.experiments.records import read_record
from mtl_nb.methods.base import get_method, load_model
from mtl_nb.models.resnet12 import ResNet12
from mtl_nb.publish import Weights, at_way, load_weights
from mtl_nb.recognize import Recognizer
from mtl_nb.train.checkpoints import RunFolder, load, load_backbone, save, trained_size

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
    said = mtl(capsys, *test, finished/"run", "--way", 3)
    assert rows(said) == [("head only", 3, 1), ("head only", 3, 5), ("MTL", 3, 1), ("MTL", 3, 5)]
    line = "these weights were trained on 2-way tasks: on 3-way tasks each class starts from the mean row of the head θ₀"
    assert said.err.count(line) == 1 and "trained on" not in mtl(capsys, *test, finished/"run", "--way", 2).err
    for weights in "mtl-1shot.safetensors", "mtl-5shot.safetensors":
        assert [way for _, way, _ in rows(mtl(capsys, *test, finished/"run"/weights, "--way", 3))] == [3]
        refused(capsys, "-shot tasks, not 7-shot", *test, finished/"run"/weights, "--shots", 7)
    refused(capsys, "is for one number of shots", *test, finished/"run/mtl-1shot.safetensors", "--shots", "1,5")
    assert rows(mtl(capsys, *test, finished/"run/pretrain.safetensors", "--way", 3, "--shots", 2)) == [("head only", 3, 2)]


def test_pictures_to_learn_are_checked_before_anything_is_learned(capsys, monkeypatch):
    classes(Path("pets"), 0, "ab", 4)
    shutil.copy("pets/a/00.png", "pets/b/copy.png")
    shutil.copy("pets/a/01.png", "pets/a/again.png")
    line = "identical pictures: 2 within pets (such as "
    assert line in mtl(capsys, "learn", "pets").err
    Path("pets/b/bad.png").write_bytes(b"no picture")
    def embed(*_, **how): raise AssertionError("a picture was embedded")
    with monkeypatch.context() as patch:
        patch.setattr(Recognizer, "embed", embed)
        refused(capsys, "bad.png", "learn", "pets", "-o", "x.safetensors")
    assert "left out: " in mtl(capsys, "learn", "pets", "-o", "x.safetensors", "--skip-bad").err


def test_way_and_shots_in_python():
    file = QUICK/"mtl-1shot.safetensors"
    with pytest.raises(BadInput, match="is for 1-shot tasks"): load_weights(file, k_shot=5)
    same, other = load_weights(file, k_shot=1, way=5), load_weights(QUICK, "MTL", 1, way=3)
    own, head = load_weights(file).model.base, other.model.base
    assert torch.equal(same.model.base.weight, own.weight) and (same.model.base.lr, same.record["shot"]) == (own.lr, 1)
    assert torch.equal(head.weight, own.weight.mean(0).expand(3, -1)) and torch.equal(head.bias, own.bias.mean().expand(3))
    assert (head.lr, head.steps, other.record["way"], other.record["lr"]) == (own.lr*3/5, own.steps, 3, own.lr*3/5)
    cosine = Weights(get_method("cosine classifier"), get_method("cosine classifier").build(other.model.backbone, own), same.record)
    assert at_way(cosine, 3).model.base.n_way == 3
    maml = get_method("MAML ResNet-12")
    with pytest.raises(BadInput, match="'MAML ResNet-12' are for 5-way tasks, not 3-way: each row of the head"):
        at_way(Weights(maml, maml.build(load_backbone(QUICK/"pretrain.safetensors")[0], own), same.record), 3)


@pytest.mark.parametrize("words, says", [
    ("bench --size 84", "--size goes with --data"),
    ("bench --skip-bad", "--skip-bad goes with --data"),
    ("bench --download", "--download"),
    ("bench --parts exam --start .", "--start is for the part start"),
    ("learn pictures --shots 5", "photos is a network alone"),
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


# --- what is passed over -------------------------------------------------------------------------------------------
def deeper(place):
    "A class of 4 pictures with a folder of 3 more."
    classes(place, 0, "abc", 4)
    classes(place/"a", 9, ["more"], 3)
    Image.fromarray(pixels(99)).save(place/"stray.png")
    return place


def test_pictures_in_a_folder_of_a_class_are_passed_over_with_a_line(capsys):
    assert len(folder_bank(deeper(Path("set")))) == 12
    line = "set: passed over 1 folder inside a folder of images: a/more; 1 image outside the class folders: stray.png\n"
    assert capsys.readouterr().out == line
    assert line in mtl(capsys, "learn", "set").err
    assert len(picture_files("set")) == 13
    assert capsys.readouterr().out == "set: passed over 1 folder inside a folder of images: a/more\n"


@pytest.mark.parametrize("name", ["Test", "TEST", "testing", "tests", "novel"])
def test_a_test_split_by_another_name(capsys, name):
    place = splits(Path("set"))
    (place/"test").rename(place/name)
    refused(capsys, f"no folder 'test' in set: rename '{name}' to 'test'", "run", "--data", "set", "--out", "out")
    refused(capsys, f"rename '{name}' to 'test'", "test", "--data", "set", "--weights", QUICK)
    assert not Path("out").exists()


@pytest.mark.parametrize("split, name", [("train", "Train"), ("train", "base"), ("val", "Val"), ("val", "dev")])
def test_the_other_splits_by_another_name(split, name):
    place = splits(Path("set"))
    (place/split).rename(place/name)
    with pytest.raises(BadInput, match=f"no folder '{split}' in set: rename '{name}' to '{split}'"): folder_splits(place)


def test_folders_that_stand_for_no_split(capsys):
    place = splits(Path("set"))
    classes(place/"unlabelled", 50, "ab", 2)
    classes(place/"Valid", 60, "ab", 2)
    assert [len(o) for o in folder_splits(place).values()] == [36]*3
    assert capsys.readouterr().out == "set: passed over 2 folders that stand for no split: Valid, unlabelled\n"


def test_messages_of_the_folders_go_to_stderr(capsys, finished):
    shutil.copytree(finished/"set", "set")
    Path("set/test/test0/notes.txt").write_text("x")
    test = "test", "--weights", finished/"run", "--query", 5, "--tasks", 10, "--data", "set", "--json"
    said = mtl(capsys, *test)
    assert len(json.loads(said.out)["rows"]) == 4 and "passed over 1 file without an image's suffix" in said.err


def test_a_benchmark_whose_classes_lie_side_by_side_says_what_it_leaves_out(capsys):
    table = split_table("FC100")
    names = [*table["train"], *table["val"], *table["test"][1:], "zzz"]
    for name in names:
        Path("flat", name).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(Path("flat", name, "0.png"))
    assert list(_from_folders(Path("flat"), "FC100", table, None)[1]) == ["train", "val"]
    said = capsys.readouterr().out
    assert f"passed over the test split of FC100: 1 of its 20 classes is missing, such as {table['test'][0]}" in said
    assert "passed over 1 folder of no class of FC100, such as zzz" in said


# --- pictures that would be blank ----------------------------------------------------------------------------------
def ink(level, ground=0): # strokes on a transparent ground
    a = np.full((20, 20, 4), (ground, ground, ground, 0), np.uint8)
    a[5:15, 5:15] = level, level, level, 255
    return a


@pytest.mark.parametrize("level, ground", [(255, 0), (255, 255), (230, 255), (0, 0), (0, 255), (120, 255)])
def test_strokes_are_seen_on_their_ground(level, ground):
    for a in ink(level, ground), ink(level, ground)[..., 2:]: # in colour, and grey with alpha
        Image.fromarray(a).save("x.png")
        got = read_image("x.png").astype(int)
        assert (got[5:15, 5:15] == level).all() and abs(got[0, 0, 0] - level) >= 100
        assert got[0, 0, 0] == (0 if level > 191 else 255)


GREY = np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint16)
GREY[0, 0], GREY[0, 1] = 255, 0


@pytest.mark.parametrize("array, name, options, factor", [
    (GREY*16 + 15, "x.tif", dict(tiffinfo={281: 4095}), 1), # the file says what is white
    (GREY.astype(np.int32), "x.tif", {}, 1),
    (GREY*257, "x.png", {}, 1), (GREY*257, "x.tif", {}, 1), (GREY.astype(np.int32)*257, "x.tif", {}, 1)])
def test_more_than_8_bits(array, name, options, factor):
    Image.fromarray(array).save(name, **options)
    assert abs(read_image(name)[..., 0].astype(int) - GREY).max() <= 1


@pytest.mark.parametrize("array, name", [(GREY*16, "x.png"), (GREY, "x.png"), (GREY*16, "x.tif"), (GREY.astype(np.int32)*16, "x.tif")])
def test_16_bits_that_would_be_black_are_refused(array, name):
    Image.fromarray(array).save(name)
    with pytest.raises(ValueError, match="no value above .* of 65,535, so it would be black"): read_image(name)
    Image.fromarray(array*0).save(name) # black is black
    assert read_image(name).max() == 0


def png_rgb16(values):
    "A PNG of 16 bits a channel, which Pillow does not write."
    import struct
    import zlib
    def chunk(kind, data): return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_colours_of_16_bits():
    colours = GREY[..., None].repeat(3, 2)
    Path("x.png").write_bytes(png_rgb16(colours*257))
    np.testing.assert_array_equal(read_image("x.png"), colours)
    Path("x.png").write_bytes(png_rgb16(colours*16))
    with pytest.raises(ValueError, match="no value above .* of 65,535"): read_image("x.png")


def test_blank_pictures_and_a_class_of_one_picture_are_pointed_out(capsys):
    place = classes(Path("set"), 0, "ab", 4)
    for i in range(3): Image.new("RGB", (16, 16), (0, 0, 50*i)).save(place/f"b/{i:02}.png")
    for i in range(4): shutil.copy(place/"a/00.png", place/f"a/{i:02}.png") if i else None
    says = [f"warning: identical pictures: 3 within set (such as 4 times in set/a)",
            f"warning: pictures of one colour only: 3 ({Path('set').resolve()/'b/00.png'}, "]
    for _ in "decoded", "from the cache":
        bank = folder_bank(place.resolve())
        first, second = capsys.readouterr().out.splitlines()
        assert first == says[0] and second.startswith(says[1]) and len(bank.blank) == 3 == len(bank.to("cpu").blank)
    with pytest.raises(BadInput, match="identical pictures.*--strict refuses them"): folder_bank(place, strict=True)


# --- leaks ---------------------------------------------------------------------------------------------------------
def leaky(place):
    "A test class is a renamed copy of a train class; a class of train is one picture; two names differ in case."
    splits(place)
    shutil.rmtree(place/"test/test0")
    shutil.copytree(place/"train/train0", place/"test/copy")
    for i in range(1, 12): shutil.copy(place/"train/train1/00.png", place/f"train/train1/{i:02}.png")
    (place/"val/val0").rename(place/"val/TRAIN2")
    return place


LINE = ("identical pictures: 11 within train, 12 in both train and test (such as train/train0 = test/copy; 12 times in "
        "train/train1); class names that differ in upper and lower case only: train/train2 = val/TRAIN2")


def test_duplicates_are_counted_at_loading(capsys):
    banks = folder_splits(leaky(Path("set")))
    assert capsys.readouterr().out == f"warning: {LINE}\n"
    assert find_duplicates(banks) == dict(
        within=dict(train=11), across={"train, test": 12}, names=["train/train2 = val/TRAIN2"],
        examples=["train/train0 = test/copy", "12 times in train/train1"])
    assert duplicates_line(find_duplicates(banks)) == LINE
    for load in folder_splits, load_data:
        with pytest.raises(BadInput, match="--strict refuses"): load("set", strict=True)
    assert find_duplicates(folder_splits(splits(Path("clean")))) == {} and capsys.readouterr().out.count("warning") == 0


def test_duplicates_of_a_run(capsys, finished):
    leaky(Path("set"))
    run = "run", "--data", "set", "--shots", 1, "--json", *(*PHASE1, *TINY)[:-1]
    refused(capsys, "identical pictures: 11 within train, 12 in both", *run, "--out", "no", "--strict")
    assert not Path("no").exists()
    said = mtl(capsys, *run, "--out", "out")
    assert said.err.count("warning: identical") == 1
    record = json.loads(Path("out/results.json").read_text(encoding="utf-8"))
    assert record["duplicates"] == json.loads(said.out)["duplicates"] and record["duplicates"]["across"] == {"train, test": 12}
    assert read_record(Path("out/results.json"))["duplicates"] == record["duplicates"]
    assert "duplicates" not in json.loads((finished/"run/results.json").read_text(encoding="utf-8"))


def test_pictures_that_saved_weights_were_trained_on(capsys, finished):
    splits(Path("set"))
    shutil.rmtree("set/test/test0")
    shutil.copytree(finished/"set/train/train0", "set/test/copy")
    line = "identical pictures: 12 of test are among those that the backbone was trained on (such as in copy)"
    for weights in "run", "run/mtl-1shot.safetensors", "run/pretrain.safetensors":
        test = "test", "--weights", finished/weights, "--query", 5, "--tasks", 10, "--way", 2, "--data", "set", "--json"
        said = mtl(capsys, *test)
        assert said.err.count(line) == 1 and json.loads(said.out)["duplicates"] == {"across": {"backbone, test": 12}}
        refused(capsys, line, *test, "--strict")
    for split in "train", "val": shutil.rmtree(f"set/{split}")
    classes(Path("set/train"), 70, "abc")
    classes(Path("set/val"), 80, "def")
    run = "run", "--data", "set", "--backbone", finished/"run/pretrain.safetensors", "--shots", 1, *TINY
    refused(capsys, line, *run, "--out", "no", "--size", 16, "--strict")
    assert line in mtl(capsys, *run, "--size", 16, "--out", "out").err
    record = json.loads(Path("out/results.json").read_text(encoding="utf-8"))
    assert record["duplicates"] == {"across": {"backbone, test": 12}}
    seen = unpack_hashes(load(Path("out/pretrain.safetensors"))[1]["seen"])
    assert len(seen) == 72 # those of the given backbone, and of this run's train


def test_what_a_benchmark_is_known_to_hold_is_not_said_again(capsys):
    def banks(n):
        a = ImageBank(torch.from_numpy(np.stack([pixels(i) for i in range(20)])).permute(0, 3, 1, 2), torch.arange(20)//10, ["a", "b"])
        b = ImageBank(a.x[20 - n:], torch.zeros(n, dtype=torch.int64), ["c"])
        return dict(train=a, test=b)
    say_doubts(banks(3), known=3)
    assert capsys.readouterr().out == ""
    say_doubts(banks(4), known=3)
    assert "4 in both train and test" in capsys.readouterr().out
    assert [DATASETS[o].duplicates for o in ("fc100", "cifar-fs", "miniimagenet", "omniglot", "glyphs")] == [3, 15, 6, 0, 0]


# --- messages ------------------------------------------------------------------------------------------------------
def config(**phase1): return dict(recipe=dict(phase1=phase1), recipe_sha256=str(phase1), data={})


def one_line(call, *words):
    with pytest.raises(BadInput) as e: call()
    text = str(e.value)
    assert "\n" not in text and all(o in text for o in words), text
    return text


def test_a_difference_of_configs_is_never_cut_inside_a_number():
    for n in range(1, 30):
        there, here = ({f"{'x'*n}{i}": 1000*i + side for i in range(1, 12)} for side in (1, 2))
        shutil.rmtree("run", ignore_errors=True)
        RunFolder(Path("run"), config(**there))
        said = one_line(lambda: RunFolder(Path("run"), config(**here), resume=True), "choose another --out")
        shown = said.partition("(")[2].partition(")")[0].split("; ")
        whole = [f"phase1.{k}: {there[k]} there, {here[k]} here" for k in there]
        more = shown.pop() if shown[-1].startswith("and ") else None
        assert shown == whole[:len(shown)] and len(shown) >= 1
        assert more == (f"and {11 - len(shown)} more" if len(shown) < 11 else None)


def test_a_pickle_a_folder_and_other_files_in_place_of_weights(capsys, finished):
    torch.save(ResNet12((4, 4, 8, 8)).state_dict(), "net.pth")
    torch.save({"w": torch.zeros(2)}, "old.pth", _use_new_zipfile_serialization=False)
    Path("empty").write_bytes(b"")
    for name in "net.pth", "old.pth":
        said = one_line(lambda: load(Path(name)), name, "it is a pickle", "write its tensors with mtl_nb.train.checkpoints.save")
        assert "header" not in said
    one_line(lambda: load(Path("empty")), "empty is damaged or no safetensors file (it is empty)")
    run = "run", "--data", finished/"set", "--shots", 1, "--out", "out", *TINY, "--backbone"
    refused(capsys, "it is a pickle", *run, "net.pth")
    refused(capsys, f"is a folder: give the file in it, {finished/'run/pretrain.safetensors'}", *run, finished/"run")
    refused(capsys, "is a folder, and there is no pretrain.safetensors in it", *run, finished/"set")
    one_line(lambda: load(finished/"run"), "is a folder: give a file in it, such as", "mtl-1shot.safetensors")


def test_names_of_a_parallel_network_are_explained(finished):
    for name, read in ("pretrain", load_backbone), ("mtl-1shot", load_model):
        shutil.copytree(finished/"run", name)
        file = Path(name, f"{name}.safetensors")
        tensors, record = load(file)
        save(file, {f"module.{k}": v for k, v in tensors.items()}, record)
        one_line(lambda: read(file), str(file), "its names begin with 'module.': save the `.module` of the parallel network")
        missing = max(k for k in tensors if "centre" not in k)
        save(file, {k: v for k, v in tensors.items() if k != missing}, record)
        one_line(lambda: read(file), f"it lacks '{missing}'")


def test_a_damaged_state_says_a_way_out(finished, capsys):
    folder = RunFolder(Path("run"), config(epochs=1))
    folder.save_state("phase1", x=torch.zeros(3))
    raw = Path("run/.phase1.state").read_bytes()
    for data in raw[:-4], raw[:40], b"":
        Path("run/.phase1.state").write_bytes(data)
        one_line(lambda: folder.load_state("phase1"), "run/.phase1.state", "delete it, and --resume begins this part of the run anew")
    save(Path("run/.phase1.state"), {}, dict(kind="state", tree=dict(dict=[])))
    one_line(lambda: folder.load_state("phase1"), "it holds no log: delete it")
    run = "run", "--data", finished/"set", "--shots", 1, "--out", "out", "--size", "none", *PHASE1, *TINY
    assert main([*map(str, run), "--minutes", "1e-6"]) == 75
    state = Path("out/.phase1.state")
    state.write_bytes(state.read_bytes()[:-9])
    capsys.readouterr()
    refused(capsys, "delete it, and --resume begins", *run, "--resume")
    state.unlink()
    mtl(capsys, *run, "--resume")
    new, old = (json.loads((o/"results.json").read_text())["rows"] for o in (Path("out"), finished/"run"))
    assert [r["correct"] for r in new] == [r["correct"] for r in old if r["shot"] == 1]


@pytest.mark.parametrize("bad", [1, 2, 19, 30])
def test_all_bad_pictures_are_named_up_to_twenty(bad):
    files = sorted(classes(Path("set"), 0, "abc", 12).rglob("*.png"))[:bad]
    for file in files: file.write_bytes(b"no picture")
    said = one_line(lambda: folder_bank("set"), "cannot read", "--skip-bad")
    assert sum(str(file) in said for file in files) == min(bad, 20) == said.count("(it is no image that Pillow knows)")
    assert ("20 images or more" in said) == (bad > 20) and ("the image " in said) == (bad == 1)


def test_a_class_of_bad_pictures_is_named_too():
    classes(Path("set"), 0, "abc", 2)
    for file in Path("set/b").iterdir(): file.write_bytes(b"")
    one_line(lambda: folder_bank("set"), "cannot read 2 images: ", "b/00.png (the file is empty); ", "b/01.png (the file is empty): ")


@pytest.mark.parametrize("side", [9_500, 14_000]) # Pillow warns of the first and refuses the second
def test_too_many_pixels_in_our_words(side):
    Image.new("1", (side, side)).save("x.png")
    with pytest.raises(ValueError, match="more than 89 million( pixels)?: shrink it"), warnings.catch_warnings():
        warnings.simplefilter("error")
        read_image("x.png")


# --- terminals and locales -----------------------------------------------------------------------------------------
ASCII = dict(PYTHONUTF8="0", PYTHONIOENCODING="ascii", LC_ALL="C", PYTHONCOERCECLOCALE="0")
PLAIN_C = dict(PYTHONUTF8="0", LC_ALL="C", PYTHONCOERCECLOCALE="0")
CP1252 = dict(PYTHONUTF8="0", PYTHONIOENCODING="cp1252")
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="names are bytes on Linux only")


def shell(how, *words, code=0):
    env = dict(os.environ, PYTHONPATH=str(root), TQDM_DISABLE="1", OMP_NUM_THREADS="1", MPLBACKEND="Agg") | how
    r = subprocess.run([sys.executable, "-m", "mtl_nb", *map(str, words)], env=env, capture_output=True)
    assert r.returncode == code and b"Traceback" not in r.stderr and b"Error" not in r.stderr, r.stderr.decode("utf-8", "replace")
    return r.stdout


def in_one_process(how, *commands):
    "What each of these commands writes to the standard output."
    code = ("import sys\nfrom mtl_nb.cli import main\nfor command in sys.argv[1:]:\n"
            "    assert main(command.split()) in (0, None)\n    sys.stdout.flush()\n    sys.stdout.buffer.write(b'\\0')")
    env = dict(os.environ, PYTHONPATH=str(root), TQDM_DISABLE="1", OMP_NUM_THREADS="1", MPLBACKEND="Agg") | how
    r = subprocess.run([sys.executable, "-c", code, *commands], env=env, capture_output=True)
    assert r.returncode == 0 and b"Traceback" not in r.stderr and b"Error" not in r.stderr, r.stderr.decode("utf-8", "replace")
    return r.stdout.split(b"\0")[:-1]


@linux
def test_a_run_in_an_ascii_terminal_is_the_run_in_utf8():
    "Class folders, files and the set itself have names beyond ASCII; the table has ±, the answers have Θ."
    for s, split in enumerate(("train", "val", "test")):
        classes(Path("mots–猫")/split, 10*s, [f"{split}猫", f"{split}é", f"{split}Θ"])
    run = "run", "--data", "mots–猫", "--shots", 1, "--size", "none", *PHASE1, *TINY
    for name, how in dict(ascii=ASCII, utf8=dict(PYTHONUTF8="1")).items(): out = shell(how, *run, "--out", name)
    assert "±" in out.decode("utf-8")
    records = [json.loads(Path(o, "results.json").read_text(encoding="utf-8")) for o in ("ascii", "utf8")]
    assert [r["correct"] for r in records[0]["rows"]] == [r["correct"] for r in records[1]["rows"]]
    assert records[0]["data"] == records[1]["data"] and records[0]["data"]["name"] == "mots–猫"
    names = [load(Path(o, "pretrain.safetensors"))[1]["classes"] for o in ("ascii", "utf8")]
    assert names[0] == names[1] == sorted(["train猫", "trainé", "trainΘ"])


@linux
@pytest.mark.parametrize("how", [ASCII, PLAIN_C, CP1252])
def test_commands_in_other_terminals(how, finished):
    classes(Path("mots"), 0, ["猫", "é", "Θ"])
    Path("records").mkdir()
    shutil.copy(root/"data/results/miniimagenet-small-s0.json", "records")
    _, answers, _, table, tested = in_one_process(how,
        "learn mots -o x.safetensors", "recognize x.safetensors mots --json",
        "recognize x.safetensors mots --csv x.csv --sort sorted --top 3", "results --records records",
        f"test --weights {finished/'run'} --data {finished/'set'} --query 5 --tasks 10 --json")
    found = json.loads(answers.decode("ascii"))
    assert {o["picture"] for o in found["answers"]} == {f"mots/{c}/{i:02}.png" for c in ("猫", "é", "Θ") for i in range(12)}
    assert {k for o in found["answers"] for k in o["probabilities"]} <= {"猫", "é", "Θ"}
    assert "mots/猫/00.png" in Path("x.csv").read_text(encoding="utf-8")
    assert {o.name for o in Path("sorted").iterdir()} <= {"猫", "é", "Θ"}
    sign = "±".encode("cp1252" if how is CP1252 else "ascii", "backslashreplace")
    assert b"Results of" in table and sign in table
    assert len(json.loads(tested.decode("ascii"))["rows"]) > 1


@linux
def test_a_name_that_breaks_a_line_is_shown_escaped(capsys):
    classes(Path("set"), 0, "ab")
    Path("set/a/evil\nmtl: all is well\x1b[31m.png").write_bytes(b"no")
    line = refused(capsys, r"set/a/evil\nmtl: all is well\x1b[31m.png", "learn", "set")
    assert "\x1b" not in line
    refused(capsys, r"no data set and no folder 'a\nb'", "run", "--data", "a\nb")


def test_a_library_call_prints_on_an_ascii_stream(monkeypatch):
    stream = TextIOWrapper(BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    classes(Path("mots"), 0, ["猫", "é"])
    Path("mots/猫/notes–.txt").write_text("x")
    folder_bank("mots")
    assert stream.buffer.getvalue() == rb"mots: passed over 1 file without an image's suffix: \u732b/notes\u2013.txt" + os.linesep.encode()


def test_the_size_of_a_set_is_that_of_its_images_as_they_come():
    assert [DATASETS[o].side for o in ("fc100", "miniimagenet", "omniglot", "glyphs")] == [32, 84, 28, 32]
