"A network as an ONNX file, and the inner loop of the page in JavaScript: both against PyTorch."
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import mtl_nb.onnx
from mtl_nb.cli import BAD_INPUT, main
from mtl_nb.core import BadInput, read_json, sha256
from mtl_nb.data.folders import Preprocessing
from mtl_nb.methods.base import get_method
from mtl_nb.models.backbones import Pretrained
from mtl_nb.models.base_learner import BaseLearner, fit_head
from mtl_nb.models.scale_shift import scale_shift
from mtl_nb.onnx import PixelsToFeatures, export_onnx
from mtl_nb.train.meta_train import MTL

root = Path(__file__).parents[2]
SMALL = root/"data/weights/glyphs-small.safetensors"
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra [onnx] is not installed")
pytest.importorskip("onnxscript", reason="the extra [onnx] is not installed")


@pytest.fixture(scope="module")
def model(net):
    "A tiny network whose scales, shifts and centre are not those of the start."
    g = torch.Generator().manual_seed(2)
    backbone = scale_shift(net)
    for p in backbone.parameters():
        if p.requires_grad: p.data += .2*torch.randn(p.shape, generator=g)
    return MTL(backbone, BaseLearner(8, 5, .1, 20), torch.randn(8, generator=g))


@pytest.fixture(scope="module")
def pixels(): return torch.randint(256, (7, 3, 32, 32), generator=torch.Generator().manual_seed(3)).float()


def run_onnx(path, pixels):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["features"], {"pixels": pixels.numpy()})[0])


def test_onnx_gives_the_features_of_pytorch(model, pixels, tmp_path):
    about = export_onnx(model, tmp_path/"net.onnx", Preprocessing(32, .875, "bilinear"))
    with torch.no_grad(): expected = model.embed((pixels/255 - .5)/.25)
    for n in (1, 7): assert (run_onnx(tmp_path/"net.onnx", pixels[:n]) - expected[:n]).abs().max() < 4e-5
    assert about == read_json(tmp_path/"net.json") == dict(
        size=32, crop=.875, interpolation="bilinear", way=5, lr=.1, steps=20, sha256=sha256(tmp_path/"net.onnx"))


def test_a_network_from_elsewhere_and_no_centre(net, pixels, tmp_path):
    "Its own mean and std are applied once."
    p = Preprocessing(32, mean=(.485, .456, .406), std=(.229, .224, .225))
    export_onnx(MTL(Pretrained(net, p), BaseLearner(8, 5)), tmp_path/"net.onnx", p)
    mean, std = (torch.tensor(o)[:, None, None] for o in (p.mean, p.std))
    with torch.no_grad(): expected = 4*F.normalize(net((pixels/255 - mean)/std))
    assert (run_onnx(tmp_path/"net.onnx", pixels) - expected).abs().max() < 4e-5


def test_the_file_is_the_same_each_time_and_holds_no_path(model, tmp_path):
    files = [tmp_path/"a.onnx", tmp_path/"b.onnx"]
    for file in files: export_onnx(model, file, Preprocessing(32))
    data = files[0].read_bytes()
    assert data == files[1].read_bytes()
    assert str(root).encode() not in data and b"site-packages" not in data and b".py" not in data


def test_the_given_model_stays_as_it_is(model, pixels):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    PixelsToFeatures(model)(pixels)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(v, after[k]) for k, v in before.items())
    assert any(p.requires_grad for p in model.backbone.parameters())


def test_bad_input(model, net, tmp_path, monkeypatch):
    size = Preprocessing(32)
    with pytest.raises(BadInput, match="ends with .onnx"): export_onnx(model, tmp_path/"net.pt", size)
    with pytest.raises(BadInput, match="no folder"): export_onnx(model, tmp_path/"none/net.onnx", size)
    for name in ("TADAM ResNet-12", "MAML ResNet-12", "ProtoNet"):
        other = get_method(name).build(net, BaseLearner(8, 5))
        with pytest.raises(BadInput, match="linear head"): export_onnx(other, tmp_path/"net.onnx", size)
    monkeypatch.setattr(mtl_nb.onnx, "find_spec", {"onnx": 1}.get)
    with pytest.raises(BadInput, match=r"needs onnxscript: pip install 'mtl_nb\[onnx\]'"):
        export_onnx(model, tmp_path/"net.onnx", size)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.__version__ < (2, 6), reason="the older exporter follows one branch without a word")
def test_a_network_that_cannot_be_exported(tmp_path):
    class Odd(torch.nn.Module):
        def forward(self, x): return x.mean((2, 3)) if x.sum().item() > 0 else x.amax((2, 3))
    with pytest.raises(BadInput, match="cannot be exported"):
        export_onnx(MTL(Odd(), BaseLearner(3, 5)), tmp_path/"net.onnx", Preprocessing(32))
    assert not list(tmp_path.iterdir())


def test_command(tmp_path, capsys):
    file = tmp_path/"net.onnx"
    for words, message in {
        "export": "mtl export WEIGHTS --onnx FILE",
        f"export {SMALL}": "mtl export WEIGHTS --onnx FILE",
        f"export {SMALL} --onnx {file}": "does not say for which pictures it was trained: give their size",
        f"export {SMALL} --onnx {file} --size 8": "from 16 to 2048",
        f"export {tmp_path}/none --onnx {file}": "give a file, a run folder, or one of",
        f"export {root}/data/weights/glyphs-quick-s0 --method protonet --onnx {file}": "has no 'ProtoNet'",
        f"export {SMALL} --onnx {tmp_path}/net.pt --size 32": "ends with .onnx",
    }.items():
        assert main(words.split()) == BAD_INPUT
        assert message in capsys.readouterr().err, words
    assert main(f"export {root}/data/weights/glyphs-quick-s0 --shot 1 --onnx {file} --json -q".split()) == 0
    about = json.loads(capsys.readouterr().out)
    assert about == read_json(tmp_path/"net.json") and (about["size"], about["lr"], about["steps"]) == (32, .1, 20)


def in_javascript(support, labels, query, classes, lr, steps):
    "Probabilities from the page's own inner loop."
    if not shutil.which("node"): pytest.skip("no node on this machine")
    module = (root/"nbs/_site/recognise/inner_loop.mjs").as_uri()
    code = f"""import {{ adapt, predict }} from "{module}";
    let text = ""; for await (const part of process.stdin) text += part;
    const [support, labels, query, ...how] = JSON.parse(text);
    console.log(JSON.stringify(predict(adapt(support, labels, ...how), support, query)));"""
    given = json.dumps([support.tolist(), labels.tolist(), query.tolist(), classes, lr, steps])
    done = subprocess.run(["node", "--input-type=module", "-e", code], input=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.tensor(json.loads(done.stdout), dtype=torch.float64)


def unit(*shape, seed): # features of length 4
    g = torch.Generator().manual_seed(seed)
    return 4*F.normalize(torch.randn(*shape, generator=g, dtype=torch.float64), dim=-1)


@pytest.mark.parametrize("classes, shots", [(2, 1), (5, 1), (5, 5), (20, 3)])
def test_inner_loop_in_javascript(classes, shots):
    "With as many pictures of each class it is the base learner, from any row that all classes share."
    support, query = unit(classes*shots, 64, seed=classes), unit(25, 64, seed=shots)
    labels, start = torch.arange(classes).repeat_interleave(shots), unit(64, seed=9).expand(classes, -1)
    expected = fit_head(support[None], labels[None], query[None], start, start[:, 0], .1, 50)[0].softmax(-1)
    torch.testing.assert_close(in_javascript(support, labels, query, classes, .1, 50), expected, rtol=0, atol=1e-12)


def test_inner_loop_in_javascript_is_balanced():
    "With unequal numbers it is gradient descent on the mean over classes of each class's mean loss."
    labels = torch.tensor([0, 1, 0, 2, 0, 2, 0])
    support, query = unit(7, 16, seed=0), unit(9, 16, seed=1)
    weight, bias = torch.zeros(3, 16, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for _ in range(30):
        weight, bias = weight.detach().requires_grad_(), bias.detach().requires_grad_()
        losses = F.cross_entropy(F.linear(support, weight, bias), labels, reduction="none")
        loss = torch.stack([losses[labels == c].mean() for c in range(3)]).mean()
        gradients = torch.autograd.grad(loss, (weight, bias))
        weight, bias = weight - .2*gradients[0], bias - .2*gradients[1]
    expected = F.linear(query, weight, bias).softmax(-1)
    torch.testing.assert_close(in_javascript(support, labels, query, 3, .2, 30), expected, rtol=0, atol=1e-12)
