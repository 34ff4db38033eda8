"Phase 3: weights files that are damaged, incomplete or of another program; protocols that make no sense."
import itertools

import pytest
import torch

from mtl_nb.core import BadInput, sha256
from mtl_nb.data.bank import ImageBank
from mtl_nb.data.episodes import TaskShape
from mtl_nb.evaluation.exam import features
from mtl_nb.evaluation.meta_test import Protocol, check_unseen, check_way, meta_test, paper_protocol
from mtl_nb.methods.base import load_model
from mtl_nb.models.base_learner import BaseLearner
from mtl_nb.models.resnet12 import ResNet12
from mtl_nb.models.scale_shift import scale_shift
from mtl_nb.train.checkpoints import save
from mtl_nb.train.meta_train import MTL

WIDTHS = [4, 4, 4, 8]


@pytest.fixture(scope="module")
def bank():
    x = torch.randint(0, 256, (60, 3, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    return ImageBank(x, torch.arange(60) % 6, list("abcdef"))


@pytest.fixture
def model():
    m = MTL(scale_shift(ResNet12(WIDTHS)), BaseLearner(8, 3, .1, 10), torch.linspace(-1, 1, 8))
    with torch.no_grad():
        for i, p in enumerate(p for p in m.parameters() if p.requires_grad):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i))*.1)
    return m


@pytest.fixture
def files(tmp_path, model):
    "Write Θ and a model's file; what is given replaces what belongs there."
    def write(tensors=None, drop=(), theta=None, **changes):
        state, path = model.backbone.state_dict(), tmp_path/"pretrain.safetensors"
        back = {"blocks." + k.split("blocks.")[1]: v for k, v in state.items() if not k.endswith(("scale", "shift"))}
        save(path, back | {"centre": model.centre} | (theta or {}), dict(kind="backbone", widths=WIDTHS, drop=0.))
        ours = {k: p for k, p in model.named_parameters() if p.requires_grad} | (tensors or {})
        record = dict(kind="mtl", way=3, shot=1, hard=False, lr=.1, steps=10, backbone=path.name,
                      backbone_sha256=sha256(path)) | changes
        kept, told = ({k: v for k, v in o.items() if k not in drop} for o in (ours, record))
        save(tmp_path/"mtl.safetensors", kept, told)
        return tmp_path/"mtl.safetensors"
    return write


def refused(path, words, f=load_model):
    with pytest.raises(BadInput) as e: f(path)
    assert words in str(e.value) and "\n" not in str(e.value)


def test_round_trip(files, model, bank):
    method, again, record = load_model(files())
    x, p = bank.take(torch.arange(10)), Protocol(shape=TaskShape(3, 1, 4), tasks=20)
    theirs = model.state_dict()
    assert method.label == "MTL" and record["shot"] == 1
    assert all(torch.equal(v, theirs[k]) for k, v in again.state_dict().items())
    assert torch.allclose(again.embed(x), model.embed(x), atol=1e-5) # the order of pixels in memory may differ
    assert (meta_test(again, bank, p).correct - meta_test(model, bank, p).correct).abs().sum() <= 2
    assert not any(q.requires_grad for q in again.parameters())


def test_incomplete(files):
    scale, words = "backbone.blocks.2.conv1.scale", "does not hold exactly the tensors that 'MTL' trains"
    refused(files(drop=(scale,)), words)
    refused(files(drop=("base.bias",)), words)
    refused(files({scale: torch.ones(9, 9, 1, 1)}), words)
    refused(files({"more": torch.ones(2)}), words)
    refused(files({"backbone.blocks.0.conv1.weight": torch.ones(4, 3, 3, 3)}), words) # Θ must not be replaced


def test_another_way_than_recorded(files): refused(files(way=5), "does not hold exactly the tensors")


@pytest.mark.parametrize("key", ["way", "lr", "steps", "backbone", "backbone_sha256"])
def test_record_lacks(files, key): refused(files(drop=(key,)), f"lacks {key}")


def test_other_kinds(files):
    refused(files(kind="state"), "holds 'state'")
    refused(files(drop=("kind",)), "holds 'None'")


def test_backbone_gone_or_another(files):
    path = files()
    theta = path.with_name("pretrain.safetensors")
    raw = theta.read_bytes()
    theta.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    refused(path, "is not the backbone that mtl.safetensors was trained on")
    theta.unlink()
    refused(path, "needs its backbone 'pretrain.safetensors' beside it")
    theta.mkdir()
    refused(path, "needs its backbone")


def test_backbone_is_looked_for_beside_it_only(files, tmp_path):
    path = files(backbone=str(tmp_path.parent/"elsewhere"/"pretrain.safetensors"))
    load_model(path)
    path.with_name("pretrain.safetensors").unlink()
    refused(path, "needs its backbone 'pretrain.safetensors' beside it")


def test_centre_of_another_size(files): refused(files(theta={"centre": torch.zeros(5)}), "[5]")


def test_half_a_file(files):
    path = files()
    path.write_bytes(path.read_bytes()[:-10])
    refused(path, "damaged")
    path.unlink()
    refused(path, "no such weights file")


@pytest.mark.parametrize("kw", [dict(tasks=0), dict(tasks=1), dict(tasks=-5), dict(lr=-.1), dict(steps=-1)])
def test_protocols_that_make_no_sense(kw):
    with pytest.raises(BadInput): Protocol(**kw)


@pytest.mark.parametrize("shape, words", [
    (TaskShape(4, 1, 4), "3-way tasks"), (TaskShape(2, 1, 4), "3-way tasks"), (TaskShape(7, 1, 4), "has only 6"),
    (TaskShape(3, 1, 15), "has 10 images")])
def test_model_and_tasks_must_fit(model, bank, shape, words):
    with pytest.raises(BadInput, match=words): meta_test(model, bank, Protocol(shape=shape, tasks=2))


def test_way(model):
    check_way(model, TaskShape(3, 1))
    with pytest.raises(BadInput, match="predicts 3-way tasks, but these are 5-way: ask for --way 3, or train a model"):
        check_way(model, TaskShape(5, 1))


def test_classes_of_phase_1(bank):
    check_unseen({}, bank, "test")
    check_unseen(dict(classes=["x"], met=["y"]), bank, "test")
    for key in ("classes", "met"): # of its own run, and of the run whose backbone it goes on from
        with pytest.raises(BadInput, match="was trained on 2 of the 6 classes of 'test', such as 'b'"):
            check_unseen({key: ["b", "x", "c"]}, bank, "test")


@pytest.mark.parametrize("mirrored", [False, True])
def test_features_at_hand_change_nothing(model, bank, mirrored):
    p, feats = Protocol(shape=TaskShape(3, 2, 4), tasks=30, mirrored=mirrored), features(model.embed, bank)
    assert torch.equal(meta_test(model, bank, p).correct, meta_test(model, bank, p, feats=feats).correct)


def test_rate_and_steps_of_the_protocol_come_first(model, bank):
    shape = TaskShape(3, 1, 4)
    mine = meta_test(model, bank, Protocol(shape=shape, tasks=5))
    given = meta_test(model, bank, Protocol(shape=shape, tasks=5, lr=0., steps=0))
    assert (mine.lr, mine.steps, given.lr, given.steps) == (.1, 10, 0., 0)
    p = paper_protocol(2, 3)
    assert p.shape == TaskShape(3, 2, 2) and (p.tasks, p.lr, p.steps, p.mirrored) == (600, .01, 100, True)


def test_split_shape_and_seed_make_another_exam(model, bank):
    prints = set()
    for k, seed, split in itertools.product((1, 2), (0, 1), ("val", "test")):
        protocol = Protocol(shape=TaskShape(3, k, 4), tasks=2, seed=seed)
        prints.add(meta_test(model, bank, protocol, split).exam.fingerprint)
    assert len(prints) == 8
