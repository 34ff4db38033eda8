"Banks: hostile input, order, digests, augmentation at the edges of its arguments."
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mtl_nb.core import BadInput
from mtl_nb.data.bank import ImageBank, check_disjoint, normalise, pixel_hash, send
from mtl_nb.data.augment import augment

def gen(seed=0): return torch.Generator().manual_seed(seed)

def make(n=12, classes=3, side=8, seed=0, height=None):
    x = torch.randint(0, 256, (n, 3, height or side, side), generator=gen(seed), dtype=torch.uint8)
    return ImageBank(x, torch.arange(n) % classes, [f"c{i}" for i in range(classes)])

def rebuilt(bank, order): return ImageBank(bank.x[order], bank.y[order], bank.names, bank.hashes[order])

@pytest.mark.parametrize("change, words", [
    (dict(x=torch.zeros(4, 3, 8, 8)), "uint8"),
    (dict(x=torch.zeros(4, 8, 8, dtype=torch.uint8)), r"\[n,C,H,W\]"),
    (dict(x=torch.zeros(0, 3, 8, 8, dtype=torch.uint8), y=torch.zeros(0, dtype=torch.int64)), "at least one image"),
    (dict(y=torch.tensor([0, 1, 1])), "4 images and 3 labels"),
    (dict(y=torch.tensor([0, 1, 1, 2])), r"0\.\.1"),
    (dict(y=torch.tensor([0, 1, 1, -1])), "-1"),
    (dict(y=torch.tensor([0., 1., 1., 0.])), "int64"),
    (dict(names=["a", "a"]), "more than once: .'a'"),
    (dict(hashes=torch.zeros(3, dtype=torch.int64)), "4 images and 3 hashes"),
])
def test_a_bank_refuses(change, words):
    good = dict(x=torch.zeros(4, 3, 8, 8, dtype=torch.uint8), y=torch.tensor([0, 1, 1, 0]), names=["a", "b"])
    ImageBank(**good)
    with pytest.raises(BadInput, match=words) as e: ImageBank(**(good | change))
    assert "\n" not in str(e.value)

def test_the_order_of_the_input_does_not_matter():
    bank = make(30)
    for seed in range(3):
        other = rebuilt(bank, torch.randperm(30, generator=gen(seed)))
        assert other.digest == bank.digest
        assert torch.equal(other.x, bank.x) and torch.equal(other.hashes, bank.hashes)

def test_duplicates_keep_a_fixed_order():
    x = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    bank = ImageBank(x, torch.tensor([1, 0, 1, 0]), ["a", "b"])
    assert bank.hashes.unique().numel() == 1 and bank.y.tolist() == [0, 0, 1, 1]

def test_hashes_come_from_the_decoded_pixels_when_given():
    bank = make()
    smaller = ImageBank(bank.x[..., ::2, ::2].contiguous(), bank.y, bank.names, bank.hashes)
    assert torch.equal(smaller.hashes, bank.hashes)
    flipped = ImageBank(bank.x, bank.y, bank.names, -bank.hashes)
    assert torch.equal(flipped.x[flipped.by_class[0]], bank.x[bank.by_class[0]].flip(0))

def test_the_digest_sees_pixels_labels_names_and_shape():
    bank = make()
    pixel = bank.x.clone()
    pixel[3, 1, 4, 4] ^= 1
    label = bank.y.clone()
    label[4] = 0
    others = [ImageBank(pixel, bank.y, bank.names, bank.hashes), ImageBank(bank.x, label, bank.names, bank.hashes),
              ImageBank(bank.x, bank.y, ["c0", "c1", "x"], bank.hashes),
              ImageBank(bank.x.reshape(12, 3, 4, 16), bank.y, bank.names, bank.hashes)]
    assert len({o.digest for o in [bank, *others]}) == 5

def test_digest_and_hash_are_pinned():
    x = torch.arange(2*3*2*2, dtype=torch.uint8).reshape(2, 3, 2, 2)
    bank = ImageBank(x, torch.tensor([1, 0]), ["a", "b"])
    assert bank.hashes.tolist() == [-3290445159958445129, 8779844413918686111]
    assert bank.digest == "4a365345b840fb5d650073563dab92fe36c248d4e48b5968dfa25a1b2db389f3"

def test_the_hash_does_not_depend_on_the_memory_layout():
    a = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    assert pixel_hash(np.asfortranarray(a)) == pixel_hash(a) == pixel_hash(a[::-1][::-1])

def test_a_class_without_images_is_allowed_and_visible():
    bank = ImageBank(make().x, make().y, ["c0", "c1", "c2", "empty"])
    assert [len(o) for o in bank.by_class] == [4, 4, 4, 0]

def test_take_keeps_the_shape_of_the_indices():
    bank = make()
    for shape in ((), (3,), (2, 5), (0,), (2, 1, 3)):
        idx = torch.randint(0, 12, shape, generator=gen())
        out = bank.take(idx)
        assert list(out.shape) == [*shape, 3, 8, 8] and out.dtype == torch.float32
    assert torch.equal(bank.take(torch.tensor(5)), normalise(bank.x[5]))

def test_take_from_a_read_only_memory_map(tmp_path):
    bank = make()
    bank.x.numpy().tofile(tmp_path/"x.bin")
    x = torch.from_numpy(np.memmap(tmp_path/"x.bin", np.uint8, "c", shape=tuple(bank.x.shape)))
    mapped = ImageBank(x, bank.y, bank.names, bank.hashes)
    assert mapped.x.data_ptr() == x.data_ptr() and mapped.digest == bank.digest
    assert torch.equal(mapped.take(torch.arange(12)), bank.take(torch.arange(12)))

def test_normalise_leaves_its_input_alone():
    z = torch.full((2, 3, 4, 4), 100.)
    normalise(z)
    assert (z == 100).all()

def test_subset_renumbers_and_keeps_the_hashes():
    bank = make()
    sub = bank.subset([2, 0])
    assert sub.names == ["c2", "c0"] and sub.y.tolist() == [0]*4 + [1]*4
    assert torch.equal(sub.hashes[4:], bank.hashes[bank.by_class[0]])
    with pytest.raises(BadInput, match="more than once"): bank.subset([1, 1])
    with pytest.raises(BadInput, match="at least one class"): bank.subset([])

def test_disjoint_names_both_splits():
    bank = make()
    check_disjoint({})
    check_disjoint({"train": bank.subset([0]), "val": bank.subset([1, 2])})
    with pytest.raises(BadInput, match="'c1' is in both 'val' and 'test'"):
        check_disjoint({"train": bank.subset([0]), "val": bank.subset([1, 2]), "test": bank.subset([1])})

def test_augment_shifts_by_whole_pixels_also_on_oblong_images():
    x = make(200, side=10, height=6).take(torch.arange(200))
    out = augment(x, gen(), pad=2, flip=False)
    known = torch.cat([x.flatten(), torch.tensor([0.])]).unique()
    off = (known[torch.searchsorted(known, out.flatten().clamp(max=known[-1]))] - out.flatten()).abs()
    before = (torch.searchsorted(known, out.flatten()) - 1).clamp(min=0)
    near = torch.minimum(off, (known[before] - out.flatten()).abs())
    assert near.max() < 1e-4  # every pixel of the answer is a pixel of the picture

def test_augment_spreads_shifts_and_flips_evenly():
    x = torch.zeros(4000, 3, 9, 9)
    x[:, :, 4, 4] = 1
    at = augment(x, gen(), pad=2, flip=False)[:, 0].flatten(1).argmax(1)
    rows, cols = (at//9).bincount(minlength=9), (at % 9).bincount(minlength=9)
    for n in (rows, cols): assert n[:2].sum() == n[7:].sum() == 0 and (n[2:7] - 800).abs().max() < 5*25.3
    mirrored = augment(torch.linspace(0, 1, 9).expand(4000, 3, 9, 9), gen(), pad=0)[:, 0, 0, 0] > .5
    assert abs(mirrored.float().mean() - .5) < .04

def test_augment_does_not_touch_the_global_generator_or_its_input():
    x = make().take(torch.arange(12))
    copy, state = x.clone(), torch.get_rng_state()
    out = augment(x, gen(), jitter=.5, zoom=.3)
    assert torch.equal(x, copy) and torch.equal(torch.get_rng_state(), state)
    assert out.shape == x.shape and out.isfinite().all()

def test_nothing_is_pinned_where_compile_reads_along(monkeypatch):
    class Here: # a tensor on the CPU, as far as `send` looks
        device = torch.device("cpu")
        def pin_memory(self):
            return SimpleNamespace(to=lambda device, non_blocking: ("pinned", device.type, non_blocking))
        def to(self, device): return "plain", device.type
    assert send(Here(), torch.device("cuda")) == ("pinned", "cuda", True)
    assert send(Here(), torch.device("cpu")) == ("plain", "cpu")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert send(Here(), torch.device("cuda")) == ("plain", "cuda")

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_same_on_a_gpu():
    bank = make()
    there, idx = bank.to("cuda"), torch.arange(12)
    assert there.digest == bank.digest and there.y.device.type == "cpu"
    assert there.subset([2, 0]).digest == bank.subset([2, 0]).digest
    a, b = (augment(o.take(idx), gen(), jitter=.3, zoom=.6).cpu() for o in (bank, there))
    assert (a - b).abs().max() < 1e-3
