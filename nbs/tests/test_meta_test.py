"Phase 3: weights files that are damaged, incomplete or foreign; exams that cannot be held."
import pytest
import torch

from mtl_nb.models.base_learner import BaseLearner
from mtl_nb.train.checkpoints import save
from mtl_nb.core import sha256
from mtl_nb.core import BadInput
from mtl_nb.data.bank import ImageBank
from mtl_nb.data.episodes import TaskShape
from mtl_nb.evaluation.exam import features
from mtl_nb.evaluation.meta_test import Protocol, load_model, meta_test, paper_protocol
from mtl_nb.train.checkpoints import load_backbone
from mtl_nb.train.meta_train import MTL
from mtl_nb.models.resnet12 import ResNet12
from mtl_nb.models.scale_shift import scale_shift

WIDTHS = [4, 4, 4, 8]


@pytest.fixture(scope="module")
def bank():
    x = torch.randint(0, 256, (60, 3, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    return ImageBank(x, torch.arange(60) % 6, list("abcdef"))


@pytest.fixture
def model():
    m = MTL(scale_shift(ResNet12(WIDTHS)), BaseLearner(8, 3, .1, 10), torch.linspace(-1, 1, 8))
    with torch.no_grad():
        for i, p in enumerate(p for p in m.parameters() if p.requires_grad): p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i))*.1)
    return m


@pytest.fixture
def files(tmp_path, model):
    "Write Θ and a model's file; what is given replaces what belongs there."
    def write(tensors=None, drop=(), theta=None, **changes):
        back = {"blocks." + k.split("blocks.")[1]: v for k, v in model.backbone.state_dict().items() if not k.endswith(("scale", "shift"))}
        save(tmp_path/"pretrain.safetensors", back | {"centre": model.centre} | (theta or {}), dict(kind="backbone", widths=WIDTHS, drop=0.))
        ours = {k: p for k, p in model.named_parameters() if p.requires_grad} | (tensors or {})
        record = dict(kind="mtl", way=3, shot=1, hard=False, lr=.1, steps=10, backbone="pretrain.safetensors", backbone_sha256=sha256(tmp_path/"pretrain.safetensors")) | changes
        save(tmp_path/"mtl.safetensors", {k: v for k, v in ours.items() if k not in drop}, {k: v for k, v in record.items() if k not in drop})
        return tmp_path/"mtl.safetensors"
    return write


def refused(path, words, f=load_model):
    with pytest.raises(BadInput) as e: f(path)
    assert words in str(e.value) and "\n" not in str(e.value)


def test_round_trip(files, model, bank):
    again, record = load_model(files())
    x, p = bank.take(torch.arange(10)), Protocol(shape=TaskShape(3, 1, 4), tasks=20)
    theirs = model.state_dict()
    assert record["shot"] == 1 and all(torch.equal(v, theirs[k]) for k, v in again.state_dict().items())
    assert torch.allclose(again.embed(x), model.embed(x), atol=1e-5)   # the order of pixels in memory may differ
    assert (meta_test(again, bank, p).correct - meta_test(model, bank, p).correct).abs().sum() <= 2
    assert not any(q.requires_grad for q in again.parameters())


def test_head_only_starts_from_zero(files):
    head, record = load_model(files().with_name("pretrain.safetensors"), n_way=4, inner=(.2, 7))
    assert head.base.weight.shape == (4, 8) and not head.base.weight.any() and (head.base.lr, head.base.steps) == (.2, 7)
    assert record["kind"] == "backbone" and head.centre is not None


def test_incomplete(files):
    scale = "backbone.blocks.2.conv1.scale"
    refused(files(drop=(scale,)), "does not hold all scales")
    refused(files(drop=("base.bias",)), "does not hold all scales")
    refused(files({scale: torch.ones(9, 9, 1, 1)}), "does not hold all scales")
    refused(files({"more": torch.ones(2)}), "nothing else")
    refused(files({"backbone.blocks.0.conv1.weight": torch.ones(4, 3, 3, 3)}), "nothing else")   # Θ is not to be smuggled in


def test_another_way_than_told(files): refused(files(way=5), "does not hold all scales")
@pytest.mark.parametrize("key", ["way", "lr", "steps", "backbone", "backbone_sha256"])
def test_record_lacks(files, key): refused(files(drop=(key,)), f"does not tell its {key}")
def test_other_kinds(files): refused(files(kind="state"), "holds 'state'"); refused(files(drop=("kind",)), "holds 'None'")


def test_backbone_gone_or_another(files):
    path = files()
    theta = path.with_name("pretrain.safetensors")
    raw = theta.read_bytes()
    theta.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1])); refused(path, "is not the backbone that mtl.safetensors was trained on")
    theta.unlink(); refused(path, "needs its backbone 'pretrain.safetensors' beside it")
    theta.mkdir(); refused(path, "needs its backbone")


def test_backbone_is_looked_for_beside_it_only(files, tmp_path):
    path = files(backbone=str(tmp_path.parent/"elsewhere"/"pretrain.safetensors"))
    load_model(path)
    path.with_name("pretrain.safetensors").unlink(); refused(path, "needs its backbone 'pretrain.safetensors' beside it")


@pytest.mark.parametrize("record", [dict(widths=[4, 4, 8, 8], drop=0.), dict(drop=0.), dict(widths=WIDTHS), dict(widths=4, drop=0.), dict(widths="wide", drop=0.), dict(widths=[4, 4], drop=0.), dict(widths=WIDTHS, drop=7.), dict(widths=[-4, 4, 4, 8], drop=0.)])
def test_backbone_unlike_its_record(tmp_path, record):
    save(tmp_path/"p", ResNet12(WIDTHS).state_dict(), dict(kind="backbone") | record)
    refused(tmp_path/"p", "does not hold the ResNet-12 that its record tells", load_backbone)


def test_centre_of_another_size(files): refused(files(theta={"centre": torch.zeros(5)}), "has a centre of [5] for 8 features")


def test_half_a_file(files):
    path = files()
    path.write_bytes(path.read_bytes()[:-10]); refused(path, "damaged")
    path.unlink(); refused(path, "no such weights file")


@pytest.mark.parametrize("kw", [dict(tasks=0), dict(tasks=1), dict(tasks=-5), dict(lr=-.1), dict(steps=-1)])
def test_exam_that_cannot_be_held(kw):
    with pytest.raises(BadInput): Protocol(**kw)


def test_model_and_exam_must_fit(model, bank):
    for shape, words in (TaskShape(4, 1, 4), "3-way tasks"), (TaskShape(2, 1, 4), "3-way tasks"), (TaskShape(7, 1, 4), "has only 6"), (TaskShape(3, 1, 15), "has 10 images"):
        with pytest.raises(BadInput, match=words): meta_test(model, bank, Protocol(shape=shape, tasks=2))


@pytest.mark.parametrize("mirrored", [False, True])
def test_features_at_hand_change_nothing(model, bank, mirrored):
    p = Protocol(shape=TaskShape(3, 2, 4), tasks=30, mirrored=mirrored)
    assert torch.equal(meta_test(model, bank, p).correct, meta_test(model, bank, p, feats=features(model.embed, bank)).correct)


def test_rate_and_steps_of_the_protocol_come_first(model, bank):
    shape = TaskShape(3, 1, 4)
    mine, given = meta_test(model, bank, Protocol(shape=shape, tasks=5)), meta_test(model, bank, Protocol(shape=shape, tasks=5, lr=0., steps=0))
    assert (mine.lr, mine.steps, given.lr, given.steps) == (.1, 10, 0., 0)
    p = paper_protocol(2, 3)
    assert p.shape == TaskShape(3, 2, 2) and (p.tasks, p.lr, p.steps, p.mirrored) == (600, .01, 100, True)


def test_split_shape_and_seed_make_another_exam(model, bank):
    prints = {meta_test(model, bank, Protocol(shape=TaskShape(3, k, 4), tasks=2, seed=s), split).exam.fingerprint for k in (1, 2) for s in (0, 1) for split in ("val", "test")}
    assert len(prints) == 8
