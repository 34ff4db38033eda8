"Known sets from synthetic images: folders, archives, lists; failing downloads; a copy of another set; one of your own."
import hashlib
import pickle
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mtl_nb.data import datasets
from mtl_nb.data.datasets import (
    DATASETS, SUPERCLASSES, cifar_fs, fc100, get_dataset, load_data, mini_imagenet, omniglot, register_dataset,
    split_table)
from mtl_nb.core import BadInput, sha256
from mtl_nb.data.folders import folder_splits

EVERY = sorted(c for o in SUPERCLASSES.values() for c in o)

@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    "A cache of its own, an empty folder to stand in, and no network."
    monkeypatch.setenv("MTL_NB_CACHE", str(tmp_path/"cache"))
    (tmp_path/"here").mkdir()
    monkeypatch.chdir(tmp_path/"here")
    def offline(*_): raise BadInput("cannot download, no route to host")
    monkeypatch.setattr(datasets, "download_file", offline)

def refused(f, *words):
    "`f()` raises a `BadInput` of one line that holds all `words`."
    with pytest.raises(BadInput) as e: f()
    text = str(e.value)
    assert "\n" not in text and all(o in text for o in words), text
    return text

def digests(banks): return {s: b.digest for s, b in banks.items()}

def served(monkeypatch, files):
    "Downloads copy one of `files` in place of the network; the addresses asked for, with what is expected of them."
    asked = []
    def copy(url, path, digest, size):
        asked.append((url, digest, size))
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(files[url.rpartition("/")[2]], path)
    monkeypatch.setattr(datasets, "download_file", copy)
    return asked

def noise(n, side=32, seed=0): return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), dtype=np.uint8)

def save_folders(root, listed):
    "PNG files ROOT/SPLIT/CLASS/*, from split -> class -> images."
    for split, classes in listed.items():
        for name, images in classes.items():
            (root/split/name).mkdir(parents=True)
            for i, image in enumerate(images): Image.fromarray(image).save(root/split/name/f"{i}.png")
    return root

def by_table(title, of, splits=("train", "val", "test")):
    "split -> class -> `of(class)`."
    table = split_table(title)
    return {s: {c: of(c) for c in table[s]} for s in splits}

# --- the tables ----------------------------------------------------------------------------------------------------
def test_tables_are_the_published_ones():
    "Fixed from the lists of TADAM, of torchmeta and of Ravi & Larochelle."
    known = {"FC100": "5b641e1d61329cc2", "CIFAR-FS": "5e009e6d239bd0ee",
             "miniImageNet": "3c52940fcb47da43", "Omniglot": "d88823a391139d1d"}
    for title, want in known.items():
        t = split_table(title)
        lines = "\n".join(f"{s} {name}" for s in ("train", "val", "test") for name in sorted(t[s]))
        assert hashlib.sha256(lines.encode()).hexdigest()[:16] == want, title

def test_fc100_by_the_numbers_of_the_superclasses():
    "CIFAR-100 numbers its superclasses by name; the split as TADAM prints it."
    ids = dict(train={1, 2, 3, 4, 5, 6, 9, 10, 15, 17, 18, 19}, val={8, 11, 13, 16}, test={0, 7, 12, 14})
    assert list(SUPERCLASSES) == sorted(SUPERCLASSES) and all(o == sorted(o) for o in SUPERCLASSES.values())
    for split, want in ids.items():
        classes = {c for i, o in enumerate(SUPERCLASSES.values()) if i in want for c in o}
        assert set(split_table("FC100")[split]) == classes

COUNTS = {"FC100": (60, 20, 20), "CIFAR-FS": (64, 16, 20), "miniImageNet": (64, 16, 20), "Omniglot": (1028, 172, 423)}

@pytest.mark.parametrize("title, counts", COUNTS.items())
def test_tables_are_disjoint_and_in_order(title, counts):
    t = split_table(title)
    every = {c for o in t.values() for c in o}
    assert tuple(len(o) for o in t.values()) == counts and len(every) == sum(counts)
    assert list(t) == ["train", "val", "test"]
    if title in ("FC100", "CIFAR-FS"): assert every == set(EVERY) and all(o == sorted(o) for o in t.values())

# --- CIFAR-100 -----------------------------------------------------------------------------------------------------
@pytest.fixture
def archive(tmp_path, monkeypatch):
    "Files like CIFAR-100's, three images a class, which are taken for the published ones; ROOT and the pixels by class."
    pixels, folder = noise(300).reshape(100, 3, 32, 32, 3), tmp_path/"tv/cifar-100-python"
    folder.mkdir(parents=True)
    mix = np.random.default_rng(5).permutation(200)
    def part(a, order):
        labels = np.repeat(np.arange(100), a.shape[1])
        return dict(data=a.transpose(0, 1, 4, 2, 3).reshape(-1, 3072)[order], fine_labels=labels[order].tolist())
    parts = dict(train=part(pixels[:, :2], mix), test=part(pixels[:, 2:], np.arange(100)),
                 meta=dict(fine_label_names=EVERY))
    for name, o in parts.items(): (folder/name).write_bytes(pickle.dumps(o, protocol=4))
    packed = tmp_path/"cifar-100-python.tar.gz"
    with tarfile.open(packed, "w:gz") as tar: tar.add(folder, "cifar-100-python")
    url = datasets._CIFAR_ARCHIVE[0]
    monkeypatch.setattr(datasets, "_CIFAR_ARCHIVE", (url, sha256(packed), packed.stat().st_size))
    content = datasets._content(pixels.reshape(300, 32, 32, 3), np.repeat(np.arange(100), 3))
    monkeypatch.setattr(datasets, "_CIFAR_IMAGES", content)
    return tmp_path/"tv", dict(zip(EVERY, pixels))

@pytest.mark.parametrize("title, load", [("FC100", fc100), ("CIFAR-FS", cifar_fs)])
@pytest.mark.parametrize("size", [None, 20, 84])
def test_archive_and_folders_are_the_same_bank(tmp_path, archive, capsys, title, load, size):
    root, pixels = archive
    want = load(root, size)
    assert "300" not in (said := capsys.readouterr().out) and said.count("do not compare with published numbers") == 3
    save_folders(tmp_path/title, by_table(title, lambda c: pixels[c][::-1]))
    (tmp_path/"flat").mkdir()
    for o in (tmp_path/title).glob("*/*"): shutil.copytree(o, tmp_path/"flat"/o.name)
    for place in (tmp_path, tmp_path/title, tmp_path/"flat", root, root/"cifar-100-python"):
        banks = load(place, size)
        assert digests(banks) == digests(want)
        assert all(torch.equal(banks[s].hashes, want[s].hashes) and banks[s].names == want[s].names for s in want)
        assert digests(load(place, size, need=("test",))) == {"test": want["test"].digest}
    assert digests(folder_splits(tmp_path/title, size)) == digests(want)
    assert list(want["val"].x.shape[1:]) == [3, size or 32, size or 32]

def test_nothing_there(tmp_path):
    for load, title in ((fc100, "FC100"), (cifar_fs, "CIFAR-FS")):
        refused(lambda: load(tmp_path), title, "--download", "--root", str(tmp_path))
        refused(load, title, "--download", "data")
        refused(lambda: load(tmp_path/"no/such"), "--download")

def test_download(tmp_path, archive, monkeypatch):
    root, _ = archive
    want, name = digests(fc100(root)), "cifar-100-python.tar.gz"
    refused(lambda: fc100(tmp_path/"new", download=True), "no route to host")
    asked = served(monkeypatch, {name: tmp_path/name})
    assert digests(fc100(tmp_path/"new", download=True)) == want and asked == [datasets._CIFAR_ARCHIVE]
    assert [o.name for o in (tmp_path/"new").iterdir()] == [name], "nothing is unpacked"
    assert digests(fc100(tmp_path/"new")) == want and len(asked) == 1, "the archive by itself will do"
    (tmp_path/"new"/name).write_bytes((tmp_path/name).read_bytes()[:-9])
    refused(lambda: fc100(tmp_path/"new"), name, "incomplete or altered", "delete it", "--download")

def test_unpacked_files_need_no_download(tmp_path, archive):
    root, _ = archive
    assert list(fc100(root, download=True)) == ["train", "val", "test"] # and there is no network

class Bomb:
    def __reduce__(self): return (pytest.fail, ("a pickle called a function",))

def test_altered_files_are_refused(archive):
    root, _ = archive
    path = root/"cifar-100-python/train"
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole)//2] ^= 1
    lacks, other = pickle.dumps(dict(data=noise(3))), pickle.dumps(dict(data=noise(3), fine_labels=[0, 1]))
    for data in (pickle.dumps(Bomb()), whole[:-1], b"", bytes(flipped), lacks, other, b"."):
        path.write_bytes(data)
        refused(lambda: fc100(root), "incomplete or altered", "--download", str(root/"cifar-100-python"))
    path.unlink()
    refused(lambda: fc100(root), "incomplete or altered")

@pytest.mark.parametrize("value", [Bomb(), print, Path("x"), np.random.default_rng(0), 3j, {1}, np.array([Bomb()])])
def test_the_unpickler_makes_arrays_and_plain_data_alone(value):
    from io import BytesIO
    plain = {"data": noise(2), "labels": [1, -2, 2**70], "text": ("a", b"b", 0.5, None, True)}
    def read(o, protocol): return datasets._PlainUnpickler(BytesIO(pickle.dumps(o, protocol)), encoding="latin1").load()
    for protocol in (3, 4):
        back = read(plain, protocol)
        assert (back.pop("data") == plain["data"]).all() and back == {k: plain[k] for k in back}
        if not isinstance(value, set) or protocol < 4: refused(lambda: read(value, protocol), "the pickle asks for")

def test_pickles_of_python_2_as_the_published_files_are():
    "Opcodes as Python 2 and its numpy wrote them: bytes as text in Latin-1, and the older name of numpy's module."
    images, labels = noise(3), [0, 1, 99]
    rows = images.transpose(0, 3, 1, 2).tobytes()
    array = (b"cnumpy.core.multiarray\n_reconstruct\nq\x01cnumpy\nndarray\nq\x02K\x00\x85U\x01b\x87Rq\x03(K\x01K\x03M\x00\x0c\x86"
             b"cnumpy\ndtype\nq\x04U\x02u1K\x00K\x01\x87Rq\x05(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
             b"T" + len(rows).to_bytes(4, "little") + rows + b"tb")
    data = b"\x80\x02}q\x00(U\x04data" + array + b"U\x0bfine_labels](" + b"".join(b"K" + bytes([o]) for o in labels) + b"eu."
    got, its_labels = datasets._cifar_part(data)
    assert (got == images).all() and its_labels.tolist() == labels

def test_an_archive_can_write_nowhere(tmp_path, archive, monkeypatch):
    "Its members are read by their names; others, links and paths that lead elsewhere are never looked at."
    root, _ = archive
    want, packed = digests(fc100(root)), tmp_path/"evil"/"cifar-100-python.tar.gz"
    packed.parent.mkdir()
    with tarfile.open(packed, "w:gz") as tar:
        for name in ("../escaped", str(tmp_path/"escaped"), "cifar-100-python/extra"): tar.add(root/"cifar-100-python/meta", name)
        link = tarfile.TarInfo("cifar-100-python/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/"
        tar.addfile(link)
        tar.add(root/"cifar-100-python", "cifar-100-python")
    monkeypatch.setattr(datasets, "_CIFAR_ARCHIVE", (packed.as_uri(), sha256(packed), 0))
    assert digests(fc100(packed.parent)) == want
    assert not list(tmp_path.rglob("escaped")) and [o.name for o in packed.parent.iterdir()] == [packed.name]

def test_other_folders_are_not_taken_for_the_set(tmp_path, archive):
    _, pixels = archive
    save_folders(tmp_path/"FC100", by_table("FC100", lambda c: pixels[c]))
    refused(lambda: cifar_fs(tmp_path/"FC100"), "is no train class of CIFAR-FS", "--data")
    save_folders(tmp_path/"mine", {s: {f"{s}{i}": noise(2) for i in range(2)} for s in ("train", "val")})
    refused(lambda: fc100(tmp_path/"mine"), "'train0'", "FC100", "--data")
    refused(lambda: fc100(tmp_path/"FC100/train"), "give the folder above it")
    shutil.move(tmp_path/"FC100/test/whale", tmp_path/"FC100/val/whale")
    refused(lambda: fc100(tmp_path), "'whale'", "no val class")
    shutil.rmtree(tmp_path/"FC100/val")
    refused(lambda: fc100(tmp_path), "no folder 'val'")

# --- miniImageNet --------------------------------------------------------------------------------------------------
@pytest.fixture
def heap(tmp_path):
    "images/ with train.csv and val.csv, and the same as class folders."
    root, classes = tmp_path/"heap", by_table("miniImageNet", lambda c: noise(2, 84, int(c[1:])), ("train", "val"))
    (root/"images").mkdir(parents=True)
    for split, of in classes.items():
        lines = ["filename,label"]
        for name, images in of.items():
            for i, image in enumerate(images):
                Image.fromarray(image).save(root/f"images/{name}{i:08d}.png")
                lines.append(f"{name}{i:08d}.png,{name}")
        (root/f"{split}.csv").write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
    return root, save_folders(tmp_path/"mini", classes)

def test_mini_imagenet(tmp_path, heap):
    root, folders = heap
    want = mini_imagenet(folders)
    assert list(want) == ["train", "val"] and list(want["val"].x.shape) == [32, 3, 84, 84]
    assert digests(mini_imagenet(root)) == digests(want) == digests(load_data("miniimagenet", root, download=True))
    shutil.copytree(folders, tmp_path/"data/miniImageNet")
    assert digests(mini_imagenet(tmp_path/"data")) == digests(want)
    shutil.copytree(root, tmp_path/"lists/miniImageNet")
    assert digests(mini_imagenet(tmp_path/"lists", 84)) == digests(want)
    (tmp_path/"flat").mkdir()
    for o in folders.glob("*/*"): shutil.copytree(o, tmp_path/"flat"/o.name)
    assert digests(mini_imagenet(tmp_path/"flat")) == digests(want)
    assert list(mini_imagenet(root, 32)["train"].x.shape[1:]) == [3, 32, 32]
    refused(lambda: mini_imagenet(root, need=("test",)), "no test split")
    refused(lambda: mini_imagenet(folders, need=("test",)), "no folder 'test'")
    words = "ImageNet's terms", "not the full ImageNet", "train.csv"
    refused(lambda: mini_imagenet(tmp_path/"here", download=True), *words)

def test_bad_lists(heap):
    root, _ = heap
    text, names = (root/"val.csv").read_text(encoding="utf-8"), split_table("miniImageNet")
    def lists(content, *words, **kwargs):
        (root/"val.csv").write_text(content, encoding="utf-8")
        return refused(lambda: mini_imagenet(root, **kwargs), *words)
    lists("", "val.csv", "columns filename and label")
    lists("file,class\na.png,b", "columns filename and label")
    lists("filename,label\na.png", "every line")
    lists("filename,label\na.png,b\nc.png,b", "'b'", "no val class")
    lists(text + f"\r\ngone.png,{names['val'][0]}", "gone.png", "--skip-bad")
    assert mini_imagenet(root, skip_bad=True)["val"].skipped == [str(root/"images/gone.png")]
    lists(text + f"\r\n{names['train'][0]}00000000.png,{names['train'][0]}", "no val class")
    (root/"val.csv").unlink()
    refused(lambda: mini_imagenet(root), "has no val split")
    (root/"val.csv").write_bytes(b"\xff\xfe\x00garbage\x00")
    refused(lambda: mini_imagenet(root), "val.csv")

# --- Omniglot ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
    "torchvision's layout with one drawing for each of the 1,623 characters."
    root, rng = tmp_path_factory.mktemp("omniglot")/"omniglot-py", np.random.default_rng(0)
    others = "Angelic Atemayar_Qelisayer Atlantean Aurek-Besh Avesta Ge_ez Glagolitic"
    second = {c.split(".")[0] for c in split_table("Omniglot")["test"]} | set(others.split())
    for name in (c for o in split_table("Omniglot").values() for c in o):
        alphabet, character = name.split(".")
        folder = root/("images_evaluation" if alphabet in second else "images_background")/alphabet/character
        folder.mkdir(parents=True)
        drawing = Image.fromarray(rng.integers(0, 2, (105, 105), dtype=np.uint8)*np.uint8(255))
        drawing.convert("1").save(folder/"0001_01.png")
    return root

def test_omniglot(tmp_path, drawings, monkeypatch):
    want = omniglot(drawings.parent)
    assert [len(b) for b in want.values()] == [1028, 172, 423] and list(want["test"].x.shape[1:]) == [3, 28, 28]
    assert digests(omniglot(drawings)) == digests(want)
    of = {f"{p.parent.name}.{p.name}": p for p in drawings.glob("*/*/*")}
    for split, names in split_table("Omniglot").items():
        for name in names: shutil.copytree(of[name], tmp_path/f"Omniglot/{split}/{name}")
    assert digests(omniglot(tmp_path)) == digests(want) == digests(load_data("omniglot", tmp_path/"Omniglot"))
    assert list(omniglot(tmp_path, 105, need=("val",))["val"].x.shape) == [172, 3, 105, 105]
    refused(lambda: omniglot(tmp_path/"here"), "--download", "omniglot-py")
    refused(lambda: omniglot(tmp_path/"here", download=True), "no route to host")

def test_omniglot_from_its_archives(tmp_path, drawings, monkeypatch):
    want, pinned, files = omniglot(drawings), {}, {}
    for url in datasets._OMNIGLOT_ARCHIVES:
        part = files[Path(url).name] = tmp_path/Path(url).name
        with zipfile.ZipFile(part, "w") as z:
            for p in sorted((drawings/part.stem).rglob("*.png")): z.write(p, p.relative_to(drawings))
            z.writestr("../escaped/a/b.png", b"")
            z.writestr("__MACOSX/images_background/Latin/character01/._a.png", b"")
        pinned[url] = (sha256(part), part.stat().st_size)
    monkeypatch.setattr(datasets, "_OMNIGLOT_ARCHIVES", pinned)
    asked, place = served(monkeypatch, files), tmp_path/"new/omniglot-py"
    got = omniglot(tmp_path/"new", download=True)
    assert digests(got) == digests(want) and all(torch.equal(got[s].hashes, want[s].hashes) for s in want)
    assert asked == [(url, *pinned[url]) for url in pinned]
    assert sorted(o.name for o in place.iterdir()) == sorted(files) and not list(tmp_path.rglob("escaped"))
    assert digests(omniglot(tmp_path/"new")) == digests(omniglot(place)) == digests(want)
    for part in ("images_background", "images_evaluation"): shutil.copytree(drawings/part, place/part)
    shutil.rmtree(place/"images_evaluation/ULOG")
    assert digests(omniglot(tmp_path/"new")) == digests(want), "the archives, which can be checked, come first"
    (place/"images_evaluation.zip").write_bytes(b"half")
    refused(lambda: omniglot(tmp_path/"new"), "incomplete", "ULOG/character01", "26 characters")
    shutil.rmtree(place/"images_background")
    refused(lambda: omniglot(tmp_path/"new"), "no Omniglot in", "--download")

# --- by name -------------------------------------------------------------------------------------------------------
def test_load_data(tmp_path, monkeypatch):
    for name in ("imagenet", "no/such/folder", "", "x"*5000, "~nobody-of-this-name"):
        refused(lambda: load_data(name), "no data set and no folder", "fc100", "glyphs-far")
    refused(lambda: load_data("cifarfs"), "did you mean cifar-fs?")
    save_folders(tmp_path/"mine", {s: {f"{s}{i}": noise(2) for i in range(2)} for s in ("train", "val")})
    assert list(load_data(str(tmp_path/"mine"), size=16)["val"].x.shape) == [4, 3, 16, 16]
    assert list(load_data(tmp_path/"mine")) == ["train", "val"]
    refused(lambda: load_data("FC100"), "no FC100 in data")
    shutil.copytree(tmp_path/"mine", "FC100")  # a folder of that very name
    assert list(load_data("FC100")) == ["train", "val"]
    refused(lambda: load_data("fc100"), "no FC100 in data")

def test_glyphs_by_name():
    far = load_data("glyphs-far", size=40, need=("test",))
    assert list(far) == ["test"] and list(far["test"].x.shape[1:]) == [3, 40, 40]
    assert len(far["test"].hashes) == len(far["test"])

# --- entries -------------------------------------------------------------------------------------------------------
def test_what_the_entries_say():
    assert list(DATASETS) == ["glyphs", "glyphs-far", "fc100", "cifar-fs", "miniimagenet", "omniglot"]
    assert [name for name, o in DATASETS.items() if not o.mirror] == ["glyphs", "glyphs-far", "omniglot"]
    assert [name for name, o in DATASETS.items() if o.download] == ["fc100", "cifar-fs", "omniglot"]
    assert [name for name, o in DATASETS.items() if o.on_disk] == ["fc100", "cifar-fs", "miniimagenet", "omniglot"]
    assert {o.hard for name, o in DATASETS.items() if name != "fc100"} == {(10, 4, 4)}
    assert DATASETS["fc100"].hard == (20, 10, 4)
    for o in DATASETS.values(): assert o.splits is None or o.splits == split_table(o.title)
    mine = get_dataset("/pictures/mine")
    assert mine.mirror and mine.hard == (10, 4, 4) and get_dataset("FC100") is DATASETS["fc100"]

def test_a_set_of_ones_own(monkeypatch):
    monkeypatch.setattr("mtl_nb.data.datasets.DATASETS", dict(DATASETS))
    asked = {}
    @register_dataset("stripes", "Stripes", mirror=False, hard=(1, 2, 3))
    def stripes(root, skip_bad=False):
        asked.update(root=root, skip_bad=skip_bad)
        return {s: load_data("glyphs", need=(s,))[s] for s in ("train", "val")}
    banks = load_data("stripes", "somewhere", size=16, skip_bad=True)
    assert list(banks) == ["train", "val"] and list(banks["val"].x.shape) == [1600, 3, 16, 16]
    assert asked == dict(root="somewhere", skip_bad=True)
    assert list(load_data("Stripes", need=("val",))) == ["val"] and get_dataset("stripes").hard == (1, 2, 3)
    refused(lambda: load_data("stripes", need=("test",)), "Stripes has no test split")
    refused(lambda: load_data("stripe"), "did you mean stripes?")
    refused(lambda: register_dataset("stripes")(len), "already")
    refused(lambda: register_dataset("My Set"), "lower case")

def test_torchvision_is_not_needed():
    code = "import sys\nimport mtl_nb.data.datasets\nprint('torchvision' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
