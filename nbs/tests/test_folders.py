"Folders that no page should carry: broken, hostile, enormous, changing under your hands; caches that were harmed."
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mtl_nb.data import folders
from mtl_nb.core import BadInput
from mtl_nb.data.bank import ImageBank, pixel_hash
from mtl_nb.data.folders import build_bank, cache_folder, class_files, fit, folder_bank, folder_splits, read_image

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux only")

@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MTL_NB_CACHE", str(tmp_path/"cache"))
    return tmp_path/"cache"

def pixels(seed=0, h=16, w=16): return np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)

def classes(root, names=("ant", "bee"), count=3, seed=0, h=16, w=16):
    for c, name in enumerate(names):
        (root/name).mkdir(parents=True)
        for i in range(count): Image.fromarray(pixels([seed, c, i], h, w)).save(root/name/f"{i}.png")
    return root

def refused(f, *words):
    "`f()` raises a `BadInput` of one line that holds all `words`."
    with pytest.raises(BadInput) as e: f()
    text = str(e.value)
    assert "\n" not in text and all(o in text for o in words), text
    text.encode()  # can be printed
    return text

def fresh(root, size=None):
    "The bank of `root`, read image by image."
    x, y, h = [], [], []
    listed = class_files(root)
    for c, paths in enumerate(listed.values()):
        for p in paths:
            a = np.array(Image.open(p).convert("RGB"))
            x.append(torch.from_numpy(fit(a, size).copy()).permute(2, 0, 1))
            y.append(c)
            h.append(pixel_hash(a))
    return ImageBank(torch.stack(x), torch.tensor(y), list(listed), torch.tensor(h))

# --- pictures of every kind ----------------------------------------------------------------------------------------
GREY = pixels(3)[..., :1].repeat(3, 2)

@pytest.mark.parametrize("suffix", "png bmp tif webp ppm tga gif jp2 ico".split())
def test_lossless_formats_give_the_same_pixels(tmp_path, suffix):
    a = np.kron(pixels(1, 4, 4), np.ones((4, 4, 1), np.uint8))  # 16 colours: a GIF holds them
    options = dict(webp=dict(lossless=True), jp2=dict(irreversible=False), ico=dict(sizes=[(16, 16)]))
    image = Image.fromarray(a)
    if suffix == "gif": image = image.quantize(256)
    try: image.save(tmp_path/f"x.{suffix}", **options.get(suffix, {}))
    except (OSError, KeyError): pytest.skip(f"this Pillow writes no {suffix}")
    np.testing.assert_array_equal(read_image(tmp_path/f"x.{suffix}"), a)

@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
def test_all_orientations(tmp_path, orientation, suffix):
    a = np.zeros((24, 16, 3), np.uint8)
    a[:8, :8], a[16:, 8:] = (255, 0, 0), (0, 0, 255)
    undo = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
            4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
            6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}
    exif, im = Image.Exif(), Image.fromarray(a)
    exif[0x0112] = orientation
    options = dict(jpg=dict(quality=95, subsampling=0), webp=dict(lossless=True)).get(suffix, {})
    if orientation > 1: im = im.transpose(undo[orientation])
    im.save(tmp_path/f"x.{suffix}", exif=exif, **options)
    got = read_image(tmp_path/f"x.{suffix}")
    assert got.shape == a.shape and abs(got.astype(int) - a).max() < 40

def test_modes(tmp_path):
    def read(im, name="x.png", **kwargs):
        im.save(tmp_path/name, **kwargs)
        return read_image(tmp_path/name)
    a, g = Image.fromarray(pixels(2)), Image.fromarray(GREY[..., 0])
    np.testing.assert_array_equal(read(g), GREY)
    np.testing.assert_array_equal(read(g.convert("1", dither=0)), np.where(GREY > 127, 255, 0))
    np.testing.assert_array_equal(read(a.convert("CMYK"), "x.tif"), np.array(a))
    sixteen = GREY[..., 0].astype(np.uint16)*256 + 200
    for name in ("x.png", "x.tif"): np.testing.assert_array_equal(read(Image.fromarray(sixteen), name), GREY)
    (tmp_path/"x.pgm").write_bytes(b"P5 16 16 65535\n" + sixteen.astype(">u2").tobytes())
    np.testing.assert_array_equal(read_image(tmp_path/"x.pgm"), GREY)
    alpha = np.dstack([np.array(a), np.full((16, 16), 255, np.uint8)])
    alpha[:8, :, 3] = 0
    white = np.array(a)
    white[:8] = 255
    np.testing.assert_array_equal(read(Image.fromarray(alpha)), white)
    np.testing.assert_array_equal(read(Image.fromarray(alpha[..., [0, 3]]))[8:], np.array(a)[8:, :, :1].repeat(3, 2))
    half = alpha.copy()
    half[..., 3] = 128
    assert abs(read(Image.fromarray(half)).astype(int) - (np.array(a).astype(int)*128 + 255*127)/255).max() <= 1
    small = Image.fromarray(np.kron(pixels(1, 4, 4), np.ones((4, 4, 1), np.uint8))).quantize(16)
    colour = np.array(small.convert("RGB"))
    clear = colour.copy()
    clear[np.array(small) == 5] = 255
    for name in ("x.png", "x.gif"): np.testing.assert_array_equal(read(small, name, transparency=5), clear)
    grey_key = GREY.copy()
    grey_key[GREY[..., 0] == GREY[3, 3, 0]] = 255
    np.testing.assert_array_equal(read(g, transparency=int(GREY[3, 3, 0])), grey_key)
    frames = [Image.fromarray(np.full((16, 16, 3), v, np.uint8)) for v in (10, 200)]
    assert (read(frames[0], "x.gif", save_all=True, append_images=frames[1:]) == 10).all()

@pytest.mark.parametrize("array, words", [
    (np.ones((16, 16), np.float32), "floating-point"), (np.full((16, 16), 1 << 20, np.int32), "16 bits")])
def test_pixels_without_a_clear_meaning_are_refused(tmp_path, array, words):
    classes(tmp_path/"set")
    Image.fromarray(array).save(tmp_path/"set/bee/x.tif")
    refused(lambda: folder_bank(tmp_path/"set"), "x.tif", words)

@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("side", [9_500, 14_000])  # Pillow warns about the first, refuses the second
def test_decompression_bomb(tmp_path, side):
    classes(tmp_path/"set")
    Image.new("1", (side, side)).save(tmp_path/"set/bee/x.png")
    refused(lambda: folder_bank(tmp_path/"set", size=16), "x.png", "pixels")
    assert len(folder_bank(tmp_path/"set", size=16, skip_bad=True)) == 6

def test_fit():
    for h, w, s in [(1, 1000, 8), (1000, 1, 8), (5, 7, 84), (84, 84, 5), (33, 32, 32)]:
        assert fit(pixels(0, h, w), s).shape == (s, s, 3)
    a = pixels(0, 20, 32)
    np.testing.assert_array_equal(fit(a, 20), a[:, 6:26])

# --- broken files --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("suffix", "png jpg gif webp bmp tif".split())
def test_every_cut_and_every_flip_is_read_or_named(tmp_path, suffix):
    classes(tmp_path/"set")
    path = tmp_path/f"set/bee/x.{suffix}"
    Image.fromarray(pixels(5)).save(path)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    spoilt = [whole[:n] for n in range(0, len(whole), max(1, len(whole)//12))]
    for _ in range(25):
        b = bytearray(whole)
        for at in rng.integers(0, len(b), 3): b[at] ^= int(rng.integers(1, 256))
        spoilt.append(bytes(b))
    named = 0
    for b in spoilt + [b"", b"\0"*4096, rng.bytes(999)]:
        path.write_bytes(b)
        try: folder_bank(tmp_path/"set", size=16)
        except BadInput as e:
            named += 1
            assert f"x.{suffix}" in str(e) and "\n" not in str(e)
    assert named >= 3

def test_skip_bad_lists_what_it_leaves_out(tmp_path):
    root = classes(tmp_path/"set", count=4)
    (root/"ant/1.png").write_bytes(b"")
    (root/"bee/3.png").write_text("no")
    for _ in range(2):  # decoded, then from the cache
        bank = folder_bank(root, skip_bad=True)
        assert len(bank) == 6 and bank.skipped == [str(root/"ant/1.png"), str(root/"bee/3.png")]
        refused(lambda: folder_bank(root), "ant", "1.png", "is empty", "--skip-bad")
    for p in (root/"ant").iterdir(): p.write_bytes(b"")
    refused(lambda: folder_bank(root, skip_bad=True), "class 'ant' has no image that can be read")

def test_a_file_that_can_be_read_again_is_read_again(tmp_path, monkeypatch):
    root = classes(tmp_path/"set")
    real = folders.read_image
    def locked(path):
        if str(path).endswith("2.png"): raise PermissionError("no")
        return real(path)
    listed = class_files(root)
    refused(lambda: build_bank(listed, root, read=locked), "2.png", "no permission")
    assert len(build_bank(listed, root, read=locked, skip_bad=True)) == 4
    assert len(build_bank(listed, root, skip_bad=True)) == 6

# --- hostile folders -----------------------------------------------------------------------------------------------
def test_levels_and_names(tmp_path):
    classes(tmp_path/"set/train")
    classes(tmp_path/"set/val", ["cat", "dog"], seed=1)
    assert list(folder_splits(tmp_path/"set")) == ["train", "val"]
    assert list(folder_splits(str(tmp_path/"set"), need=("val",))) == ["val"]
    refused(lambda: folder_splits(tmp_path/"set", need=("test",)), "no folder 'test'")
    refused(lambda: folder_splits(tmp_path/"set/val"), "one split", str(tmp_path/"set"))
    refused(lambda: folder_splits(tmp_path/"set/train/ant"), "no folder 'train'", "3 files and no folder")
    refused(lambda: folder_splits(tmp_path), "give that", str(tmp_path/"set"))
    refused(lambda: folder_bank(tmp_path/"set"), "holds splits")
    refused(lambda: folder_bank(tmp_path/"set/train/ant"), "lie directly in")
    refused(lambda: folder_bank(tmp_path/"set/train/ant/0.png"), "is a file")
    refused(lambda: folder_bank(tmp_path/"none"), "no such folder")
    (tmp_path/"set/val").rename(tmp_path/"set/Validation")
    refused(lambda: folder_splits(tmp_path/"set"), "rename 'Validation' to 'val'")
    (tmp_path/"bare").mkdir()
    refused(lambda: folder_splits(tmp_path/"bare"), "it is empty")
    refused(lambda: folder_bank(tmp_path/"bare"), "no class folders")
    for size in (0, -3): refused(lambda: folder_bank(tmp_path/"set/train", size=size), "--size")

def test_overlap_and_sizes_are_said_with_the_place(tmp_path):
    classes(tmp_path/"a/train")
    classes(tmp_path/"a/val", ["bee", "cat"])
    (tmp_path/"a/train/ant/0.png").write_bytes(b"")  # overlap is found before anything is decoded
    refused(lambda: folder_splits(tmp_path/"a"), "class 'bee'", "'train'", "'val'", str(tmp_path/"a"))
    classes(tmp_path/"b/train")
    classes(tmp_path/"b/val", ["cat", "dog"], h=20)
    refused(lambda: folder_splits(tmp_path/"b"), "16 x 16", "16 x 20", "--size 16")
    assert {tuple(b.x.shape[1:]) for b in folder_splits(tmp_path/"b", size=12).values()} == {(3, 12, 12)}
    classes(tmp_path/"c", h=16, w=24)
    assert list(folder_bank(tmp_path/"c").x.shape) == [6, 3, 16, 24]

def test_names_of_every_kind(tmp_path):
    names = ["a b", "ünï", "日本", "👩\u200d🔬", "x'y\"z", "-rf", "100%", "a.b", "#1", "%s{0}"]
    root = classes(tmp_path/"my set (1)", names)
    assert folder_bank(root).names == sorted(names) == folder_bank(root).names
    (root/"ünï"/"dé jà.PNG").write_bytes((root/"a b/0.png").read_bytes())
    assert len(folder_bank(root)) == 31

@linux
def test_names_that_cannot_be_written(tmp_path, capsys):
    root = classes(tmp_path/"set")
    (root/"ant/line\nbreak.png").write_bytes(b"")
    refused(lambda: folder_bank(root), "line\\nbreak.png")
    os.rename(root/"ant/line\nbreak.png", os.fsencode(root/"ant") + b"/\xff.png")
    refused(lambda: folder_bank(root), "\\udcff.png")
    assert folder_bank(root, skip_bad=True).skipped[0].endswith("\\udcff.png")
    os.rename(os.fsencode(root/"ant") + b"/\xff.png", os.fsencode(root/"ant") + b"/\xff.txt")
    folder_bank(root)
    capsys.readouterr().out.encode()
    for name in (b"/new\nline", b"/\xff\xfe"):
        os.rename(root/"bee", os.fsencode(root) + name)
        refused(lambda: folder_bank(root), "rename it")
        os.rename(os.fsencode(root) + name, root/"bee")
    (root/"caf\u00e9").mkdir()
    (root/"cafe\u0301").mkdir()
    for o in ("caf\u00e9", "cafe\u0301"): Image.fromarray(pixels()).save(root/o/"x.png")
    refused(lambda: folder_bank(root), "both called")

@linux
def test_links_pipes_and_circles(tmp_path):
    root = classes(tmp_path/"set")
    (root/"ant/folder.png").mkdir()  # a folder is no image, whatever its name
    (root/"ant/up").symlink_to(root)
    (root/"ant/.hidden.png").write_bytes(b"")
    assert len(folder_bank(root)) == 6
    (root/"ant/ok.png").symlink_to(root/"bee/0.png")
    assert len(folder_bank(root)) == 7
    strange = dict(circle=lambda p: p.symlink_to(p), nowhere=lambda p: p.symlink_to("gone"), pipe=os.mkfifo,
                   device=lambda p: p.symlink_to("/dev/zero"), folder=lambda p: p.symlink_to(root))
    for name, make in strange.items():
        path = root/f"bee/{name}.png"
        make(path)
        if name != "folder": refused(lambda: folder_bank(root), f"{name}.png")
        assert len(folder_bank(root, skip_bad=True)) == 7
        path.unlink()
    (root/"self").symlink_to(root/"self")  # a class folder in a circle: no folder at all
    assert folder_bank(root).names == ["ant", "bee"]
    (root/"self").unlink()
    (root/"loop").symlink_to(root)
    refused(lambda: folder_bank(root), "loop", "images must lie directly in it")
    (root/"loop").unlink()
    (root/"linked").symlink_to(classes(tmp_path/"other")/"ant")
    assert folder_bank(root).names == ["ant", "bee", "linked"]

def test_left_by_systems(tmp_path, capsys):
    root = classes(tmp_path/"set")
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", ".x.png"): (root/"ant"/name).write_bytes(b"x")
    for name in (".git", "__MACOSX", "@eaDir"): (root/name).mkdir()
    assert folder_bank(root).names == ["ant", "bee"] and capsys.readouterr().out == ""
    for i in range(5): (root/f"bee/{i}.txt").write_text("")
    folder_bank(root)
    words = "passed over 5 files without an image's suffix: bee/0.txt, bee/1.txt, bee/2.txt and 2 more"
    assert words in capsys.readouterr().out

def test_no_permission(tmp_path, monkeypatch):
    root = classes(tmp_path/"set")
    def closed(path): raise PermissionError(errno.EACCES, "Permission denied", str(path))
    monkeypatch.setattr(os, "scandir", closed)
    refused(lambda: folder_bank(root), "no permission", str(root))

def test_thousands_of_classes(tmp_path):
    root = tmp_path/"set"
    Image.fromarray(pixels()).save(tmp_path/"x.png")
    data = (tmp_path/"x.png").read_bytes()
    for i in range(3000):
        (root/f"{i:04d}").mkdir(parents=True)
        (root/f"{i:04d}/x.png").write_bytes(data)
    for _ in range(2):
        bank = folder_bank(root)
        assert len(bank.names) == len(bank) == 3000 and bank.names[-1] == "2999"

# --- the cache -----------------------------------------------------------------------------------------------------
def opened(root, **kwargs):
    "The bank, and how many files were read for it."
    reads = []
    def read(path):
        reads.append(path)
        return read_image(path)
    return build_bank(class_files(root), root, read=read, **kwargs), len(reads)

@pytest.mark.parametrize("size", [None, 8, 40])
def test_cache_is_a_fresh_read(tmp_path, size):
    root = classes(tmp_path/"set", count=9)
    want = fresh(root, size)
    for reads in (18, 0):
        bank, n = opened(root, size=size)
        assert n == reads and bank.digest == want.digest
        assert torch.equal(bank.hashes, want.hashes) and bank.x.is_contiguous()

def test_rebuilt_when_the_folder_changes(tmp_path, cache):
    root = classes(tmp_path/"set")
    def changes(f):
        f()
        bank, n = opened(root)
        assert n == len(bank) and bank.digest == fresh(root).digest
        assert len(list(cache.iterdir())) == 1 and opened(root)[1] == 0
    changes(lambda: None)
    changes(lambda: Image.fromarray(pixels(9)).save(root/"ant/new.png"))
    changes(lambda: (root/"ant/new.png").rename(root/"bee/new.png"))
    changes(lambda: (root/"bee/new.png").rename(root/"bee/other.png"))
    changes(lambda: (root/"bee/other.png").unlink())
    changes(lambda: Image.fromarray(pixels(8)).save(root/"bee/0.png"))
    changes(lambda: os.utime(root/"bee/0.png", ns=(5, 5)))
    changes(lambda: (root/"bee").rename(root/"cat"))
    changes(lambda: classes(root, ["zebra"], seed=4))

def test_sizes_and_places_do_not_share_a_cache(tmp_path, cache):
    for name in ("a/set", "b/set"): classes(tmp_path/name, seed=ord(name[0]))
    for root in (tmp_path/"a/set", tmp_path/"b/set"):
        for size in (None, 8, 9): assert folder_bank(root, size=size).digest == fresh(root, size).digest
    assert len(list(cache.iterdir())) == 6
    here = os.path.relpath(tmp_path/"a/set")
    assert opened(here)[1] == 0 or os.sep == "\\"  # the same folder under another name

def test_harmed_cache_is_made_anew(tmp_path, cache, capsys):
    root = classes(tmp_path/"set")
    want = folder_bank(root).digest
    path = next(cache.iterdir())
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    harmed = [whole[:n] for n in (0, 1, 23, 24, 100, len(whole)//2, len(whole) - 1)]
    harmed += [b"\0"*len(whole), rng.bytes(len(whole)), whole + b"x", whole[1:], whole + whole[-200:]]
    for at in [0, 6*768 - 1, 6*768, len(whole) - 1, len(whole) - 13, len(whole) - 24, *rng.integers(0, len(whole), 40)]:
        harmed.append(whole[:at] + bytes([whole[at] ^ 1 << int(rng.integers(8))]) + whole[at+1:])
    for b in harmed:
        path.unlink()
        path.write_bytes(b)
        bank, reads = opened(root)
        assert reads == 6 and bank.digest == want and "is damaged and is made anew" in capsys.readouterr().out
        assert path.read_bytes() == whole

@linux
def test_pixels_are_mapped_and_the_file_is_never_written(tmp_path, cache):
    root = classes(tmp_path/"set", count=40, h=64, w=64)
    folder_bank(root)
    bank = folder_bank(root)
    path = next(cache.iterdir())
    before = path.read_bytes()
    lines = [o for o in Path("/proc/self/maps").read_text().splitlines() if o.endswith(str(path))]
    spans = [line.split()[0].split("-") for line in lines]
    assert any(int(a, 16) <= bank.x.data_ptr() < int(b, 16) for a, b in spans)
    bank.x.zero_()
    assert path.read_bytes() == before

@pytest.mark.parametrize("how", ["under a file", "read-only"])
def test_cache_folder_that_cannot_be_written(tmp_path, monkeypatch, capsys, how):
    root = classes(tmp_path/"set")
    if how == "under a file":
        (tmp_path/"file").write_text("")
        monkeypatch.setenv("MTL_NB_CACHE", str(tmp_path/"file/cache"))
    else:
        real = folders.tempfile.TemporaryFile
        def closed(dir=None, **kwargs):
            if dir: raise PermissionError(errno.EROFS, "Read-only file system")
            return real(dir=dir, **kwargs)
        monkeypatch.setattr(folders.tempfile, "TemporaryFile", closed)
    assert folder_bank(root).digest == fresh(root).digest
    assert "cannot write to the cache folder" in (said := capsys.readouterr().out) and "MTL_NB_CACHE" in said

def test_disk_full(tmp_path, cache, monkeypatch):
    root = classes(tmp_path/"set")
    def full(fd): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(folders.os, "fsync", full)
    refused(lambda: folder_bank(root), "No space left on device", "MTL_NB_CACHE")
    assert not list(cache.iterdir())

def test_nothing_is_left_by_a_refusal_and_old_leftovers_go(tmp_path, cache):
    root = classes(tmp_path/"set")
    good = (root/"bee/2.png").read_bytes()
    (root/"bee/2.png").write_bytes(b"")
    refused(lambda: folder_bank(root), "2.png")
    assert not list(cache.iterdir())
    (root/"bee/2.png").write_bytes(good)
    folder_bank(root)
    stem = next(cache.iterdir()).name.rpartition("-")[0]
    (cache/f"{stem}-young.part").write_text("")
    (cache/f"{stem}-old.part").write_text("")
    (cache/"another-old.part").write_text("")
    os.utime(cache/f"{stem}-old.part", (1, 1))
    os.utime(cache/"another-old.part", (1, 1))
    os.utime(root/"bee/2.png", ns=(7, 7))
    folder_bank(root)
    assert sorted(p.name for p in cache.glob("*.part")) == sorted(["another-old.part", f"{stem}-young.part"])

def start(root, *, slow=False):
    code = ["import sys, time", "from mtl_nb.data import folders"]
    if slow:
        code += ["real = folders.pixel_hash", "def slow(a):", "    time.sleep(.05)", "    return real(a)",
                 "folders.pixel_hash = slow"]
    code += ["print('up', flush=True)", "print(folders.folder_bank(sys.argv[1]).digest)"]
    return subprocess.Popen([sys.executable, "-c", "\n".join(code), str(root)], stdout=subprocess.PIPE, text=True,
                            env=dict(os.environ, TQDM_DISABLE="1", OMP_NUM_THREADS="1"))

def test_two_processes_at_once(tmp_path, cache):
    root = classes(tmp_path/"set", count=60)
    runs = [start(root, slow=i > 0) for i in range(2)]
    got = {p.communicate(timeout=300)[0].split()[-1] for p in runs}
    assert got == {fresh(root).digest} and all(p.returncode == 0 for p in runs)
    assert [p.suffix for p in cache.iterdir()] == [".bank"] and opened(root)[1] == 0

@linux
def test_killed_while_decoding(tmp_path, cache):
    root = classes(tmp_path/"set", count=60)
    run = start(root, slow=True)
    run.stdout.readline()
    end = time.time() + 120
    while time.time() < end and not list(cache.glob("*.part")): time.sleep(.05)
    run.send_signal(signal.SIGKILL)
    run.wait()
    run.stdout.close()
    assert not list(cache.glob("*.bank"))
    bank, reads = opened(root)
    assert reads == 120 and bank.digest == fresh(root).digest

def test_interrupt_stops_at_once(tmp_path, cache):
    root, seen = classes(tmp_path/"set", count=400), []
    def read(path):
        seen.append(path)
        if len(seen) == 5: raise KeyboardInterrupt
        time.sleep(.01)
        return read_image(path)
    with pytest.raises(KeyboardInterrupt): build_bank(class_files(root), root, read=read)
    assert len(seen) < 100 and not list(cache.iterdir())

def test_cache_folder(monkeypatch, tmp_path):
    assert cache_folder() == tmp_path/"cache"
    monkeypatch.delenv("MTL_NB_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path/"xdg"))
    assert cache_folder() == tmp_path/"xdg/mtl_nb"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder().name in ("mtl_nb", "cache") and cache_folder().is_absolute()
