"The recogniser: every kind of picture and of bad input, saved files, weights that are not the right ones; and the weights that ship."
import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mtl_nb
from mtl_nb.cli import main
from mtl_nb.core import BadInput
from mtl_nb.data.folders import MAX_PIXELS, Preprocessing
from mtl_nb.data.glyphs import glyphs
from mtl_nb.models.backbones import FAMILIES, Pretrained
from mtl_nb.models.base_learner import BaseLearner
from mtl_nb.models.resnet12 import ResNet12
from mtl_nb.hub import BUNDLED, find_weights
from mtl_nb.publish import _halve
from mtl_nb.recognize import (UNKNOWN, Recognizer, answer_sheet, balanced_heads, calibrate_unknown,
                              held_out, sort_pictures)
from mtl_nb.train.checkpoints import load, save

root = Path(__file__).parents[2]
SMALL = root/"data/weights/glyphs-small.safetensors"


def make_bundled(path):
    "The weights that ship: the small glyph backbone in float16, its inner loop and its threshold chosen on val."
    tensors, record = load(SMALL, "backbone")
    kept = {k: record[k] for k in ("kind", "widths", "classes")}
    record = kept | dict(arch="resnet12", dropout=0., size=32, inner=[0.3, 20])
    save(path, _halve(tensors), record)
    calibration = calibrate_unknown(Recognizer.from_pretrained(path), glyphs(0)["val"])
    unknown = dict(false_alarms=calibration.false_alarms, similarity=calibration.similarity)
    save(path, _halve(tensors), record | dict(unknown=unknown))


@pytest.fixture(scope="module")
def bank(): return glyphs(0)["test"]


@pytest.fixture(scope="module")
def fitted(bank):
    idx = torch.cat([bank.by_class[c][:3] for c in range(5)])
    return Recognizer.from_pretrained("glyphs").fit(bank.x[idx], [bank.names[i] for i in bank.y[idx].tolist()])


def test_the_weights_for_photographs():
    file = find_weights("photos")
    tensors, record = load(file, "backbone")
    assert file.stat().st_size < 2e6 and all(v.dtype == torch.float16 for v in tensors.values() if v.dim() == 4)
    assert (record["arch"], record["size"], len(record["classes"])) == ("resnet12", 32, 64)
    assert {*record["unknown"]["similarity"]} == {"1", "2", "5", "10"}
    noise = torch.randint(-60, 60, (3, 6, 3, 40, 50), generator=torch.Generator().manual_seed(0))
    colours = torch.tensor([[200, 60, 60], [60, 200, 60], [60, 60, 200]])[:, None, :, None, None]
    x, names = (colours + noise).clamp(0, 255).to(torch.uint8), ["red", "green", "blue"]
    r = Recognizer.from_pretrained().fit([*x[:, :2].flatten(0, 1)], [o for o in names for _ in range(2)])
    assert r.source == "photos" and r.score([*x[:, 2:].flatten(0, 1)], [o for o in names for _ in range(4)]) == 1


def write(folder, bank, classes=range(3), first=0, last=2):
    for c in classes:
        (folder/bank.names[c]).mkdir(parents=True)
        for i in bank.by_class[c][first:last].tolist():
            Image.fromarray(bank.x[i].permute(1, 2, 0).numpy()).save(folder/bank.names[c]/f"{i}.png")
    return folder


@pytest.fixture()
def pets(bank, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write(tmp_path/"pets", bank)


def refused(f, *words):
    with pytest.raises(BadInput) as e: f()
    text = str(e.value)
    assert "\n" not in text and all(o in text for o in words), text


# --- the weights that ship ------------------------------------------------------------------------------------------
def test_bundled_weights_are_those_of_the_script(tmp_path):
    make_bundled(tmp_path/"glyphs.safetensors")
    (ours, a), (made, b) = load(BUNDLED/"glyphs.safetensors"), load(tmp_path/"glyphs.safetensors")
    assert ours.keys() == made.keys() and all(torch.equal(ours[k], made[k]) for k in ours)
    for k, v in b["unknown"].pop("similarity").items(): assert abs(a["unknown"]["similarity"][k] - v) < .01
    a["unknown"].pop("similarity")
    assert a == b
    assert (BUNDLED/"glyphs.safetensors").stat().st_size < 600_000


def test_rounding_changes_next_to_nothing(bank):
    exact = Recognizer.from_pretrained(SMALL, Preprocessing(32))
    ours, x = Recognizer.from_pretrained("glyphs"), bank.x[:50]
    assert (exact.embed(x) - ours.embed(x)).abs().max() < .02


def test_works_from_any_folder(bank, tmp_path):
    "Without a clone around it, and though a folder has the name of the weights."
    write(tmp_path/"glyphs", bank)
    code = ("from mtl_nb import Recognizer\nr = Recognizer.from_pretrained('glyphs').fit('glyphs')\nr.save('x')\n"
            "assert Recognizer.load('x').source == 'glyphs' and r.score('glyphs') > .5")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env=os.environ | dict(PYTHONPATH=str(root)))


def test_import_is_light():
    code = "import sys, mtl_nb\nassert 'torch' not in sys.modules\nfrom mtl_nb.cli import main\nmain(['--help'])\n" \
           "assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=root, capture_output=True, text=True)
    assert "mtl learn" in done.stdout and "mtl recognize" in done.stdout


# --- learning -------------------------------------------------------------------------------------------------------
def test_order_does_not_matter(bank):
    idx = torch.cat([bank.by_class[c][:k] for c, k in ((3, 4), (0, 2), (7, 9))])
    names, new = [bank.names[i] for i in bank.y[idx].tolist()], bank.x[::40]
    a = Recognizer.from_pretrained("glyphs").fit(bank.x[idx], names)
    shuffled = torch.randperm(len(idx), generator=torch.Generator().manual_seed(0))
    b = Recognizer.from_pretrained("glyphs").fit(bank.x[idx[shuffled]], [names[i] for i in shuffled])
    assert a.classes_.tolist() == b.classes_.tolist() and a.estimate_ == b.estimate_
    assert np.allclose(a.predict_proba(new), b.predict_proba(new), atol=1e-5)
    c = Recognizer.from_pretrained("glyphs")
    for name in sorted({*names}, reverse=True): c.add(name, bank.x[idx[[o == name for o in names]]])
    assert np.allclose(a.predict_proba(new), c.predict_proba(new), atol=1e-5)
    c.add("more", new[:1]).remove("more")
    assert np.allclose(a.predict_proba(new), c.predict_proba(new), atol=1e-5)


def test_more_pictures_do_not_win():
    "Two classes whose features are mirror images: one has 50 times as many, and the boundary stays in the middle."
    f = torch.tensor([[4., 0]] + 50*[[-4., 0]])
    labels = torch.tensor([0] + 50*[1])
    w, b = balanced_heads(f, labels, torch.ones(1, 51, dtype=torch.bool), torch.zeros(2, 2), torch.zeros(2), .1, 50)
    assert torch.allclose(w[0, 0], -w[0, 1], atol=1e-5) and b.abs().max() < 1e-5


def test_chunks_change_nothing(monkeypatch):
    g = torch.Generator().manual_seed(0)
    f, labels = torch.randn(600, 16, generator=g), torch.arange(300).repeat(2)
    keep, start = torch.rand(50, 600, generator=g) < .9, (torch.zeros(300, 16), torch.zeros(300))
    keep[:, 300:] = True
    w, b = balanced_heads(f, labels, keep, *start, .1, 3)  # in parts of 279 pictures
    for e in (0, 49):
        one, other = balanced_heads(f[keep[e]], labels[keep[e]], torch.ones(1, int(keep[e].sum()), dtype=torch.bool), *start, .1, 3)
        assert torch.allclose(w[e], one[0], atol=1e-6) and torch.allclose(b[e], other[0], atol=1e-6)


def test_a_thousand_classes(fitted):
    "1,000 classes of 20 pictures, as features: memory stays in bounds, and the estimate comes from one tenth."
    g = torch.Generator().manual_seed(0)
    centres = 4*torch.nn.functional.normalize(torch.randn(1000, 64, generator=g))
    support = {f"{i:04}": c + .1*torch.randn(20, 64, generator=g) for i, c in enumerate(centres)}
    r = Recognizer(fitted.model, fitted.preprocessing).fit_features(support)
    assert r.estimate_.pictures == 2000 and r.estimate_.accuracy > .95
    assert (r.probabilities(centres).argmax(1) == torch.arange(1000)).float().mean() > .99


def test_held_out_pictures():
    for counts in ([2, 3], [60, 60], [2]*100, [300, 2, 5]):
        labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        tested = held_out(labels)
        assert (tested.sum(0) == 1).all()
        assert all(len(labels[~t].unique()) == len(counts) for t in tested), "each head has seen every class"
    assert len(held_out(torch.arange(1000).repeat_interleave(200))) == 1


def test_estimate(bank):
    idx = torch.cat([bank.by_class[c][:4] for c in range(0, 20, 4)])
    r = Recognizer.from_pretrained("glyphs").fit(bank.x[idx], bank.y[idx])
    assert r.estimate_.low < r.estimate_.accuracy < r.estimate_.high and r.estimate_.pictures == 20
    right = 0
    for i in idx.tolist():
        others = idx[idx != i]
        right += Recognizer.from_pretrained("glyphs").fit(bank.x[others], bank.y[others]).predict(bank.x[i])[0] == str(int(bank.y[i]))
    assert right == round(20*r.estimate_.accuracy)
    r.add("single", bank.x[0])
    assert r.estimate_ is None and "no estimate" in repr(r)


def test_unknown(fitted, bank):
    nothing = np.full((32, 32, 3), 255, np.uint8)
    assert fitted.predict(nothing, unknown=.99).tolist() == [UNKNOWN]
    known = torch.cat([bank.by_class[c][3:100] for c in range(5)])
    assert .005 < (fitted.predict(bank.x[known], unknown=True) == UNKNOWN).mean() < .15
    assert UNKNOWN not in fitted.predict(nothing) and UNKNOWN not in fitted.predict(nothing, unknown=-1.)
    bare = Recognizer.from_pretrained(SMALL, Preprocessing(32)).fit(bank.x[::100][:2], ["a", "b"])
    refused(lambda: bare.predict(bank.x[0], unknown=True), "calibrate", "one picture")
    bare.add("a", bank.x[1]).add("b", bank.x[101])
    assert -1 < bare.threshold() < 1


# --- pictures -------------------------------------------------------------------------------------------------------
def test_pictures_of_every_kind(pets, bank, fitted):
    place = pets/bank.names[0]
    im = Image.fromarray(bank.x[5].permute(1, 2, 0).numpy())
    exif = Image.Exif()
    exif[0x0112] = 6
    im.rotate(90, expand=True).save(place/"side ways.png", exif=exif)
    im.convert("L").save(place/"grau-größe.png")
    im.convert("CMYK").save(place/"印刷.tif")
    im.convert("RGBA").save(place/"alpha.png")
    Image.fromarray(np.asarray(im.convert("L")).astype(np.uint16)*257).save(place/"sixteen.png")
    im.save(place/"moving.gif", save_all=True, append_images=[im.rotate(90)])
    im.resize((500, 300)).save(place/"large.jpg")
    r = Recognizer.from_pretrained("glyphs").fit(pets)
    assert len(r.support[bank.names[0]]) == 9
    assert np.allclose(r.predict_proba(place/"side ways.png"), r.predict_proba(im), atol=1e-5)
    assert len(r.predict(place)) == 9


def test_class_names(bank, tmp_path):
    x = bank.x[::100][:4]
    r = Recognizer.from_pretrained("glyphs").fit(x, ["猫", "Ein Hund", "é", "0"])
    r.save(tmp_path/"namen mit ü.safetensors")
    assert Recognizer.load(tmp_path/"namen mit ü.safetensors").classes_.tolist() == sorted(["猫", "Ein Hund", "é", "0"])
    answers = r.answers(x)
    assert answer_sheet(answers).size[0] > 300
    assert Recognizer.from_pretrained("glyphs").fit(x, torch.arange(4)).classes_.tolist() == list("0123")


BAD = {"truncated.png": "truncated", "empty.jpg": "empty", "huge.png": "more than 89 million", "words.png": "no image"}

def spoil(folder, name, bank):
    if name == "huge.png": return Image.new("1", (10_000, 10_000)).save(folder/name)
    data = dict(empty=b"", words=b"nothing of the kind").get(name.split(".")[0])
    if data is None:
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(folder/name)
        data = (folder/name).read_bytes()[:5000]
    (folder/name).write_bytes(data)


@pytest.mark.parametrize("name", BAD)
def test_bad_pictures(pets, bank, fitted, name, capsys):
    assert MAX_PIXELS < 100_000_000
    spoil(pets/bank.names[1], name, bank)
    refused(lambda: Recognizer.from_pretrained("glyphs").fit(pets), name, BAD[name])
    refused(lambda: fitted.predict(pets/bank.names[1]), name, BAD[name])
    skipped = {}
    assert len(Recognizer.from_pretrained("glyphs").fit(pets, skipped=skipped).support[bank.names[1]]) == 2
    assert [name in o for o in skipped.values()] == [True]
    assert main(["learn", "pets", "-o", "x"]) == 2 and not Path("x").exists()
    assert main(["learn", "pets", "-o", "x", "--skip-bad"]) == 0
    assert main(["recognize", "x", "pets"]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1 + 6 and "Traceback" not in err and err.count(name) == 3


def test_a_class_without_readable_pictures(pets, bank):
    for p in (pets/bank.names[2]).iterdir(): p.write_bytes(b"")
    refused(lambda: Recognizer.from_pretrained("glyphs").fit(pets), "the file is empty", "1 more")
    refused(lambda: Recognizer.from_pretrained("glyphs").fit(pets, skipped={}), f"no picture of '{bank.names[2]}'")


def test_other_files_are_passed_over_with_a_count(pets, bank, capsys):
    (pets/bank.names[0]/"notes.txt").write_text("a list")
    Recognizer.from_pretrained("glyphs").fit(pets)
    assert "passed over 1 file" in (out := capsys.readouterr().out) and "notes.txt" in out


@pytest.mark.parametrize("change, words", [
    (lambda o, names: [p.unlink() for p in (o/names[0]).iterdir()], "no images in the class folder"),
    (lambda o, names: [shutil.rmtree(o/n) for n in names[1:3]], "only one class"),
    (lambda o, names: shutil.rmtree(o), "no such folder"),
])
def test_bad_folders(pets, bank, change, words):
    change(pets, bank.names)
    refused(lambda: Recognizer.from_pretrained("glyphs").fit(pets), words)


@pytest.mark.parametrize("call, words", [
    (lambda r, x: r.fit(x, ["a"]), ["3 pictures and 1 labels"]),
    (lambda r, x: r.fit(x, ["a", "a", "a"]), ["only one class (a)"]),
    (lambda r, x: r.fit([x[0]]), ["class folders, or pictures and their labels"]),
    (lambda r, x: r.predict([]), ["no pictures"]),
    (lambda r, x: r.predict(x.float()), ["uint8", "float32"]),
    (lambda r, x: r.predict([x[0], None]), ["number 2", "NoneType"]),
    (lambda r, x: r.predict(x[0, 0]), ["[3,H,W]"]),
    (lambda r, x: r.predict("nowhere.png"), ["no such file or folder: nowhere.png"]),
    (lambda r, x: r.remove("nobody"), ["no class 'nobody'"]),
    (lambda r, x: r.remove({}), ["no class '{}'"]),
    (lambda r, x: r.fit(x, ["a", None, "b"]), ["number 2 has the label"]),
    (lambda r, x: r.fit(x, ["a", float("nan"), "b"]), ["number 2 has the label"]),
    (lambda r, x: r.fit(x, [["a"], ["b", "c"], "d"]), ["number 1 has the label ['a']"]),
    (lambda r, x: r.fit(None), ["class folders, or pictures and their labels"]),
    (lambda r, x: r.fit({"a": x, "b": x}), ["class folders, or pictures and their labels"]),
    (lambda r, x: r.fit(5, ["a"]), ["pictures are a file, a folder", "got int"]),
    (lambda r, x: r.predict(None), ["got NoneType"]),
    (lambda r, x: r.predict(dict(a=x)), ["got dict"]),
    (lambda r, x: r.predict(b"x.png"), ["got bytes"]),
    (lambda r, x: r.predict(x, unknown="often"), ["unknown is True, False, or the least similarity"]),
    (lambda r, x: r.predict(x, unknown=None), ["unknown is True, False"]),
    (lambda r, x: r.answers(x, top="three"), ["top must be a whole number"]),
    (lambda r, x: r.add(None, x), ["name of a class is text; got NoneType"]),
    (lambda r, x: r.save(None), ["give its path, not None"]),
    (lambda r, x: Recognizer.load(5), ["give its path, not 5"]),
    (lambda r, x: Recognizer.from_pretrained(None), ["weights are a name", "NoneType"]),
    (lambda r, x: Recognizer.from_pretrained({}), ["weights are a name", "dict"]),
    (lambda r, x: Recognizer.from_pretrained(5), ["weights are a name", "int"]),
    (lambda r, x: Recognizer.from_pretrained("glyphs", 32), ["such as Preprocessing(32)", "int"]),
    (lambda r, x: Recognizer.from_pretrained("glyphs", k_shot="one"), ["k_shot", "str"]),
    (lambda r, x: Recognizer.from_pretrained("glyphs", device="foo"), ["unknown device 'foo'"]),
    (lambda r, x: Recognizer.from_pretrained("glyphs", device={}), ["unknown device '{}'"]),
    (lambda r, x: Recognizer.from_pretrained("glyphs", device=5), ["device '5' is not here"]),
    (lambda r, x: r.score(x, ["x", "y", "z"]), ["not learned: x, y, z"]),
    (lambda r, x: Recognizer(r.model, r.preprocessing).predict(x), ["two classes are needed, there are 0"]),
    (lambda r, x: Recognizer(r.model, r.preprocessing).add("a", x).predict(x), ["there are 1"]),
    (lambda r, x: Recognizer(r.model, r.preprocessing).save("x"), ["nothing to save"]),
])
def test_bad_calls(fitted, bank, call, words): refused(lambda: call(fitted, bank.x[:3]), *words)


def test_more_pictures_and_classes(fitted, bank):
    "`partial_fit` is `fit` on everything, and a picture that comes a second time changes nothing."
    x, names = bank.x, bank.names
    first, more = (torch.cat([bank.by_class[c][i:j] for c in o]) for o, i, j in (((0, 1), 0, 2), ((1, 2), 2, 4)))
    def labels(idx): return [names[i] for i in bank.y[idx].tolist()]
    both = torch.cat([first, more])
    whole = Recognizer.from_pretrained("glyphs").fit(x[both], labels(both))
    grown = Recognizer.from_pretrained("glyphs").fit(x[first], labels(first)).partial_fit(x[more], labels(more))
    assert np.allclose(grown.predict_proba(x[:50]), whole.predict_proba(x[:50]), atol=1e-5)
    assert (repr(grown), grown.estimate_) == (repr(whole), whole.estimate_)
    grown.partial_fit(x[both.flip(0)], labels(both.flip(0)))
    assert repr(grown) == repr(whole)


def test_look_alike_names(bank, caplog):
    r = Recognizer.from_pretrained("glyphs").fit(bank.x[::100][:4], ["Red_Circle", "blue", "red circle", "-"])
    assert [o.message[:42] for o in caplog.records] == ["'Red_Circle' and 'red circle' are learned "]
    caplog.clear()
    assert len(r.remove("red circle").add("green", bank.x[0]).classes_) == 4 and not caplog.records


def test_arrays_of_paths_and_numpys_values(pets, bank, fitted):
    files = np.array(sorted(str(o) for o in pets.rglob("*.png")))
    assert (fitted.predict(files) == fitted.predict(files.tolist(), unknown=np.bool_(False))).all()
    assert (fitted.predict(files, unknown=np.True_) == fitted.predict(files, unknown=True)).all()
    assert len(fitted.answers(files, top=np.int64(2))[0].probabilities) == 2
    for labels in ([0, 1, 2], torch.arange(3), list(torch.arange(3)), np.arange(3)[:, None], np.array(list("012"), object)):
        assert Recognizer.from_pretrained("glyphs").fit(bank.x[::100][:3], labels).classes_.tolist() == list("012")


def test_a_bad_picture_in_the_home_folder(pets, monkeypatch, fitted):
    monkeypatch.setenv("HOME", str(pets))
    (pets/"bad.png").write_text("words")
    refused(lambda: fitted.predict(["~/bad.png"]), "bad.png", "replace or delete it")


# --- weights --------------------------------------------------------------------------------------------------------
def test_runs_and_their_shots():
    home = root/"data/weights"
    r = Recognizer.from_pretrained("glyphs-quick-s0")
    assert r.record.shot == 5 and r.preprocessing.size == 32 and r.source == "glyphs-quick-s0"
    assert Recognizer.from_pretrained(home/"glyphs-quick-s0", k_shot=1).record.shot == 1
    one = Recognizer.from_pretrained(home/"glyphs-quick-s0/mtl-5shot.safetensors")
    x = glyphs(0)["test"].x[:4]
    assert torch.equal(one.embed(x), r.embed(x))
    assert Recognizer.from_pretrained("fc100-strong-turns-84-s0").preprocessing.size == 84


class Net(torch.nn.Module):
    num_features = 12
    def __init__(self, mean=0.5, std=0.25):
        super().__init__()
        self.mean, self.std = mean, std
    def forward(self, x): return torch.nn.functional.adaptive_avg_pool2d(x*self.std + self.mean, 2).flatten(1)


def test_networks_of_any_origin(bank, monkeypatch, tmp_path):
    "The same features, whether a network normalises by itself or is told by its preprocessing; a name from a library."
    x, names = bank.x[::100][:4], list("abcd")
    own = Recognizer.from_pretrained(Net(), Preprocessing(16)).fit(x, names)
    other = Recognizer.from_pretrained(Net(.2, 3.), Preprocessing(16, mean=(.2,)*3, std=(3.,)*3)).fit(x, names)
    assert np.allclose(own.predict_proba(x), other.predict_proba(x), atol=1e-4)
    assert torch.allclose(own.embed(x).norm(dim=1), torch.full((4,), 4.))
    refused(lambda: Recognizer.from_pretrained(Net()), "Preprocessing(size)")
    monkeypatch.setitem(FAMILIES, "toys", lambda name, pretrained=True: Pretrained(Net(), Preprocessing(16)))
    named = Recognizer.from_pretrained("toys/net").fit(x, names)
    assert np.allclose(own.predict_proba(x), named.predict_proba(x), atol=1e-4)
    named.save(tmp_path/"a")
    assert Recognizer.load(tmp_path/"a").source == "toys/net"
    own.save(tmp_path/"b")
    refused(lambda: Recognizer.load(tmp_path/"b"), "a network of your own")
    assert np.allclose(Recognizer.load(tmp_path/"b", Net()).predict_proba(x), own.predict_proba(x))


def test_weights_that_do_not_fit(tmp_path):
    tensors, record = load(SMALL, "backbone")
    place = tmp_path/"w.safetensors"
    def given(): return Recognizer.from_pretrained(place, Preprocessing(32))
    save(place, tensors, record | dict(widths=[8, 16, 32, 32]))
    refused(given, "does not hold the network", "shape")
    save(place, {f"module.{k}": v for k, v in tensors.items()}, record)
    refused(given, "begin with 'module.'")
    save(place, {k: v for k, v in tensors.items() if "conv1" not in k}, record)
    refused(given, "lacks 'blocks.0.conv1.weight'")
    save(place, tensors, record | dict(inner=[1, "many"]))
    refused(given, "damaged", "inner")
    save(place, tensors, record)
    refused(lambda: Recognizer.from_pretrained(place), "Preprocessing(size)")
    place.write_bytes(place.read_bytes()[:5000])
    refused(given, "damaged")
    refused(lambda: find_weights("nowhere/at/all"), "no weights 'nowhere/at/all'")


def test_pickles_are_never_opened(tmp_path, monkeypatch):
    class Bomb:
        def __reduce__(self): return (Path.touch, (tmp_path/"boom",))
    for name in ("model.pth", "model.PT"):
        torch.save(Bomb(), tmp_path/name)
        refused(lambda: Recognizer.from_pretrained(tmp_path/name), "not opened")
    shutil.copy(tmp_path/"model.pth", tmp_path/"model.safetensors")
    refused(lambda: Recognizer.from_pretrained(tmp_path/"model.safetensors"), "no safetensors file")
    assert not (tmp_path/"boom").exists()


# --- saved recognisers ----------------------------------------------------------------------------------------------
def test_saved_file(fitted, bank, tmp_path):
    fitted.save(tmp_path/"a")
    again = Recognizer.load(tmp_path/"a")
    assert np.array_equal(again.predict_proba(bank.x[:20]), fitted.predict_proba(bank.x[:20]))
    assert (again.estimate_, again.record.unknown, again.source) == (fitted.estimate_, fitted.record.unknown, "glyphs")
    again.fit_features(again.support)
    assert np.allclose(again.predict_proba(bank.x[:20]), fitted.predict_proba(bank.x[:20]), atol=1e-6)
    refused(lambda: Recognizer.load(tmp_path/"a", SMALL), "learned with other weights")
    refused(lambda: Recognizer.load(tmp_path/"none"), "no such file of a recogniser")
    refused(lambda: Recognizer.load(SMALL), "holds weights ('backbone') and no recogniser", "mtl learn")
    fitted.save(tmp_path/"a")
    own = Recognizer.from_pretrained(SMALL, Preprocessing(32))
    shutil.copy(SMALL, tmp_path/"w.safetensors")
    own = Recognizer.from_pretrained(tmp_path/"w.safetensors", Preprocessing(32)).fit(bank.x[:2], ["a", "b"])
    own.save(tmp_path/"b")
    assert Recognizer.load(tmp_path/"b").preprocessing.size == 32
    (tmp_path/"w.safetensors").unlink()
    refused(lambda: Recognizer.load(tmp_path/"b"), "needs the weights that it was learned with")
    assert len(Recognizer.load(tmp_path/"b", SMALL).classes_) == 2


@pytest.mark.parametrize("change", [
    dict(classes=["a"]), dict(classes=list("badce")), dict(classes=3), dict(counts=[3, 3, 3, 3, 4]), dict(counts=[15]),
    dict(inner=[float("nan"), 3]), dict(inner=[.1, 10**9]), dict(preprocessing=dict(size=10**9)), dict(preprocessing={}),
    dict(preprocessing=dict(size=32, interpolation="none")), dict(unknown={"similarity": {"x": 1}}), dict(source=None),
    dict(estimate=[1]), dict(backbone_sha256=5), dict(k_shot="x"), dict(source="../../x.pth"),
])
def test_damaged_records(fitted, tmp_path, change):
    fitted.save(tmp_path/"a")
    tensors, record = load(tmp_path/"a")
    save(tmp_path/"a", tensors, record | change)
    refused(lambda: Recognizer.load(tmp_path/"a"), "")


def test_damaged_tensors(fitted, tmp_path):
    fitted.save(tmp_path/"a")
    tensors, record = load(tmp_path/"a")
    for name, bad in dict(support=torch.zeros(3), weight=torch.zeros(5, 3), bias=torch.full((5,), torch.nan)).items():
        save(tmp_path/"a", tensors | {name: bad}, record)
        refused(lambda: Recognizer.load(tmp_path/"a"), "damaged")
    save(tmp_path/"a", {}, record)
    refused(lambda: Recognizer.load(tmp_path/"a"), "damaged")
    wider = dict(support=torch.zeros(15, 3), weight=torch.zeros(5, 3), bias=torch.zeros(5))
    save(tmp_path/"a", wider, record)
    refused(lambda: Recognizer.load(tmp_path/"a"), "3 features", "64")


def test_sorting_leaves_no_folder(fitted, bank, tmp_path):
    Image.fromarray(bank.x[0].permute(1, 2, 0).numpy()).save(tmp_path/"x.png")
    answer = fitted.answers(tmp_path/"x.png")[0]
    for name in ("..", "a/b", "", "a\\b", "a\0"):
        refused(lambda: sort_pictures([answer._replace(name=name)], tmp_path/"out"), "cannot be the name of a folder")
    names = [sort_pictures([answer], tmp_path/"out")[0].name for _ in range(3)]
    assert names == ["x.png", "x-1.png", "x-2.png"]


# --- the commands ---------------------------------------------------------------------------------------------------
def test_the_commands(pets, bank, capsys, tmp_path):
    new = write(tmp_path/"new", bank, range(3), 50, 54)
    assert main(["learn", "pets", "-o", "p.safetensors"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("p.safetensors: 3 classes, 6 pictures; about ") and "large networks see more" in err
    assert main("recognize p new".split()) == 2 and "did you mean p.safetensors?" in capsys.readouterr().err
    before = Path("p.safetensors").read_bytes()
    assert main(["learn", "pets", "-o", "p.safetensors"]) == 2 and "--force" in capsys.readouterr().err
    assert Path("p.safetensors").read_bytes() == before
    assert main(["learn", "pets", "--out", "p.safetensors", "--force", "--json"]) == 0
    assert '"classes": {' in capsys.readouterr().out
    command = "recognize p.safetensors new --top 2 --csv a.csv --sheet a.png --sort sorted --unknown".split()
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12 and all(o.startswith("new") and "%" in o for o in lines)
    assert len([p for p in Path("sorted").rglob("*") if p.is_file()]) == 12
    rows = Path("a.csv").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 13 and rows[0] == "picture,answer,class 1,probability 1,class 2,probability 2"
    assert Image.open("a.png").width > 100
    assert main(command) == 2 and "a.csv is there" in capsys.readouterr().err
    for one in (new/bank.names[0], next((new/bank.names[0]).iterdir())):
        assert main(["recognize", "p.safetensors", str(one), "-q"]) == 0
    assert main(["recognize", "p.safetensors", "new", "--json"]) == 0


def test_classes_are_added_and_taken_out(pets, bank, capsys, tmp_path):
    assert main("learn pets -o p.safetensors".split()) == 0
    before = Path("p.safetensors").read_bytes()
    write(tmp_path/"more", bank, [7], 0, 3)
    write(tmp_path/"pets again", bank, range(3), 1, 3) # one picture of each is there already
    capsys.readouterr()
    assert main("learn more --add-to p.safetensors -o q.safetensors".split()) == 0
    assert Path("p.safetensors").read_bytes() == before
    assert capsys.readouterr().out.startswith("q.safetensors: 4 classes, 9 pictures; ")
    assert main(["learn", "pets again", "--add-to", "p.safetensors", "--json"]) == 0
    out, err = capsys.readouterr()
    assert [*json.loads(out)["classes"].values()] == [3, 3, 3] and "they are learned already" in err
    assert main(["forget", "q.safetensors", bank.names[7]]) == 0
    assert "3 classes, 6 pictures" in capsys.readouterr().out
    same = Recognizer.load("q.safetensors"), Recognizer.from_pretrained().fit("pets")
    assert np.allclose(*(o.predict_proba(bank.x[:50]) for o in same), atol=1e-5)
    r = Recognizer.from_pretrained("glyphs").fit(bank.x[::100][:4], ["a, b", "a", "b", "c"])
    r.save("c")
    assert main(["forget", "c", "a, b"]) == 0 and Recognizer.load("c").classes_.tolist() == ["a", "b", "c"]
    for words in ("a,b", "a,b,c,d", ","):
        assert main(["forget", "c", words]) == 2 and Recognizer.load("c").classes_.tolist() == ["a", "b", "c"]


def test_no_cell_of_a_spreadsheet_is_a_formula(pets, bank, capsys):
    x = bank.x[::100][:3]
    Recognizer.from_pretrained("glyphs").fit(x, ["=1+1", "@b", "c"]).save("r")
    for o, name in zip(x, ("-a.png", "+b.png", "c.png")):
        Path("new").mkdir(exist_ok=True)
        Image.fromarray(o.permute(1, 2, 0).numpy()).save(f"new/{name}")
    os.chdir("new")
    assert main("recognize ../r . --top 3 --csv ../a.csv --json".split()) == 0
    rows = list(csv.reader(open("../a.csv", encoding="utf-8")))
    assert {row[1] for row in rows[1:]} == {"'=1+1", "'@b", "c"}
    assert all(cell[:1] not in "=+-@" for row in rows for cell in row)
    found = json.loads(capsys.readouterr().out)["answers"]
    assert [*found[0]] == ["picture", "answer", "probabilities"] and {o["answer"] for o in found} == {"=1+1", "@b", "c"}


@pytest.mark.parametrize("command, words", [
    ("learn", "required: FOLDER"),
    ("learn pets --weights x", "x is a saved recogniser. It holds classes and no weights: those it was learned with are 'photos'"),
    ("learn pets -o x", "x is there already: --force overwrites it, --add-to x adds to it"),
    ("learn pets --add-to y", "no such file of a recogniser: y"),
    ("learn pets --add-to x --size 20", "--size: x says with which weights"),
    ("learn empty --add-to x", "no class folders in empty"),
    ("learn more --add-to x", "no images in the class folder more"),
    ("forget x", "required: CLASSES"),
    ("forget x nobody", "no class 'nobody'"),
    ("forget nothing nobody", "no such file of a recogniser: nothing"),
    ("recognize pets pets", "pets is a folder: give a file that `save` or mtl learn has written"),
    ("test --weights x --data glyphs", "x is a saved recogniser"),
    ("test --weights glyhps --data glyphs", "did you mean glyphs"),
    ("test --weights torchvision/resnet18", "mtl run --methods none --arch torchvision/resnet18"),
    ("learn nowhere", "no such folder: nowhere"),
    ("learn pets more", "'more' is no option"),
    ("learn pets --weights nothing", "no weights 'nothing'"),
    ("learn pets --weights model.pth", "not opened"),
    ("learn pets --size 0", "--size"),
    ("learn pets -o no/such/place", "cannot write"),
    ("learn pets --device abacus", "abacus"),
    ("recognize x", "required: PICTURES"),
    ("recognize nothing pets", "no such file of a recogniser: nothing"),
    ("recognize pets x", "pets is a folder: give a file that `save` or mtl learn has written"),
    ("recognize x pets --sheet sheet --sort sorted", "such as sheet.png"),
    ("recognize x pets --top 0", "--top"),
    ("recognize x pets --sheet sheet.none", "--sheet: cannot write sheet.none"),
    ("recognize x pets --csv no/such/place", "no such folder"),
    ("recognize x pets --sort x", "cannot copy"),
    ("recognize x nowhere", "no such file or folder: nowhere"),
    ("recognize x empty", "no images in empty"),
    ("recognize x pets --wieghts y", "did you mean --weights"),
])
def test_bad_commands(pets, capsys, command, words):
    Path("empty").mkdir()
    Path("more/cats").mkdir(parents=True)
    assert main(["learn", "pets", "-o", "x"]) == 0
    before = sorted(Path().rglob("*"))
    capsys.readouterr()
    assert main(command.split()) == 2
    out, err = capsys.readouterr()
    assert err.splitlines()[-1].startswith("mtl: ") and re.search(re.escape(words), err) and "Traceback" not in err, err
    assert sorted(Path().rglob("*")) == before


if __name__ == "__main__":
    BUNDLED.mkdir(exist_ok=True)
    make_bundled(BUNDLED/"glyphs.safetensors")


@pytest.mark.parametrize("name", ["", " ", "a\nb", "unknown"])
def test_names_that_no_class_can_have(name, bank):
    refused(lambda: Recognizer.from_pretrained("glyphs").fit(bank.x[:4], ["a", "a", name, name]), "the name of a class")


def test_nothing_is_written_over_what_is_read(pets, tmp_path, capsys):
    "Not with --force, either; one file for two outputs, and sorting into the folder itself, are refused at once."
    file = tmp_path/"pets.safetensors"
    assert main(["learn", str(pets), "-o", str(file), "-q"]) == 0
    before, picture = file.read_bytes(), next(p for p in sorted(pets.rglob("*")) if p.is_file())
    for words in (["--csv", str(file), "--force"], ["--sheet", str(picture), "--force"], ["--sort", str(pets)],
                  ["--csv", str(tmp_path/"o.png"), "--sheet", str(tmp_path/"o.png")], ["--csv", "/dev/null", "--force"]):
        assert main(["recognize", str(file), str(pets), *words]) == 2, words
        assert capsys.readouterr().err.count("\n") == 1
    assert file.read_bytes() == before and not (tmp_path/"o.png").exists()
    assert main(["export", "glyphs", "--onnx", str(file)]) == 2 and file.read_bytes() == before


def test_a_terminal_without_the_signs(pets, tmp_path):
    "Names of any script are shown as escapes where the terminal has no such signs."
    ascii_only = dict(os.environ, PYTHONUTF8="0", PYTHONIOENCODING="ascii")
    command = [sys.executable, "-m", "mtl_nb", "learn", str(pets), "-o", str(tmp_path/"\u732b.safetensors")]
    done = subprocess.run(command, env=ascii_only, capture_output=True, text=True)
    assert done.returncode == 0 and "\\u732b" in done.stdout, done.stderr
