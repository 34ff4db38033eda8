"Weights that are exported and loaded again; and the small glyph backbone that pages 06 and on start from."
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mtl_nb.core import BadInput, read_json
from mtl_nb.data.augment import AugmentConfig
from mtl_nb.data.episodes import TaskShape
from mtl_nb.data.glyphs import glyphs
from mtl_nb.evaluation.exam import evaluate, features, make_exam
from mtl_nb.evaluation.meta_test import Protocol
from mtl_nb.experiments.config import preset
from mtl_nb.experiments.run import run, save_backbone
from mtl_nb.models.base_learner import BaseLearner
from mtl_nb.models.resnet12 import ResNet12
from mtl_nb.publish import card, export_weights, load_weights, weights_in
from mtl_nb.train.checkpoints import halve_phi, load, load_backbone, save
from mtl_nb.train.meta_train import MTL
from mtl_nb.train.pretrain import pretrain, pretrain_state

HOME = Path(__file__).parents[2]/"data/weights"
SMALL = HOME/"glyphs-small.safetensors"
METHODS = ("MTL", "FT [Θ4;θ]", "cosine classifier")
OFFERED = [("head only", 1), ("MTL", 1), ("FT [Θ4;θ]", 1), ("cosine classifier", 1)]


@pytest.fixture(scope="module")
def banks():
    torch.set_num_threads(1)
    return {k: b.subset(range(n)).first(20) for (k, b), n in zip(glyphs(0).items(), (6, 5, 5))}


@pytest.fixture(scope="module")
def finished(banks, tmp_path_factory):
    "A finished run with methods of three kinds."
    c = preset("quick", widths=(4, 4, 4, 4), eval_tasks=20, select_tasks=20, eval_every=8, shots=(1,), inner=(0.2, 3),
               query=3, methods=METHODS)
    c = replace(c, phase1=replace(c.phase1, epochs=1), phase2=replace(c.phase2, tasks=8))
    out = tmp_path_factory.mktemp("run")/"run"
    run(c, banks, out)
    return out


@pytest.fixture()
def exported(finished, tmp_path):
    export_weights(finished, tmp_path/"out")
    return tmp_path/"out"


def counts(weights, bank):
    protocol = Protocol("standard", TaskShape(5, 1, 3), 20)
    return weights.method.evaluate(weights.model, bank, [protocol])[0].correct


def test_every_method_of_a_run_loads_and_scores_as_recorded(finished, banks):
    assert sorted(weights_in(finished)) == sorted(OFFERED)
    rows = {r["method"]: r for r in read_json(finished/"results.json")["rows"]}
    for label, k in weights_in(finished):
        weights = load_weights(finished, label, k)
        assert weights.method.label == label and weights.record["shot"] == k == 1 and weights.record["way"] == 5
        assert not any(p.requires_grad for p in weights.model.parameters())
        accuracy = counts(weights, banks["test"]).double().mean().item()/15
        assert round(100*accuracy, 3) == rows[label]["accuracy"], label


def test_exported_weights_score_nearly_the_same(finished, exported, banks):
    assert weights_in(exported) == weights_in(finished)
    for label, k in weights_in(exported):
        a, b = (counts(load_weights(o, label, k), banks["test"]) for o in (finished, exported))
        assert (a - b).abs().sum() <= 15*20//50, label


def test_precision_of_what_is_exported(finished, exported):
    a, b = (load(o/"mtl-1shot.safetensors") for o in (finished, exported))
    assert a[0].keys() == b[0].keys() and {v.dtype for v in b[0].values()} == {torch.float32}
    for k, v in a[0].items(): assert (v - b[0][k]).abs().max() <= (4e-5 if "backbone" in k else 0), k
    theta = load(exported/"pretrain.safetensors")[0]
    assert {v.dtype for k, v in theta.items() if ".conv" in k or ".short" in k} == {torch.float16}
    assert {v.dtype for k, v in theta.items() if "running" in k or k == "centre"} == {torch.float32}
    assert load(exported/"ft-theta4-1shot.safetensors")[1]["backbone_sha256"] == b[1]["backbone_sha256"]


def test_names_of_methods_and_defaults(finished):
    for name in ("MTL", "mtl", "SS [Θ;θ]", None): assert load_weights(finished, name).method.label == "MTL"
    for path in (str(finished/"mtl-1shot.safetensors"), finished/"mtl-1shot.safetensors"):
        assert load_weights(path, device="cpu").method.label == "MTL"
    bare = load_weights(finished/"pretrain.safetensors", k_shot=5)
    assert bare.method.label == "head only" and (bare.record["way"], bare.record["shot"]) == (5, 5)


@pytest.mark.parametrize("wrong, message", [
    (dict(method="MTL", k_shot=5), "has no 'MTL' at 5-shot: it has head only at 1-shot, FT"),
    (dict(method="TADAM"), "has no 'TADAM ResNet-12': it has"),
    (dict(method="MTTL"), "no method 'MTTL'"),
])
def test_what_a_folder_does_not_offer(finished, wrong, message):
    with pytest.raises(BadInput, match=re.escape(message)): load_weights(finished, **wrong)


def test_what_is_no_weights(finished, tmp_path):
    with pytest.raises(BadInput, match="no such weights"): load_weights(tmp_path/"none")
    with pytest.raises(BadInput, match="neither results.json nor weights"): load_weights(tmp_path)
    with pytest.raises(BadInput, match="holds a backbone alone, not the weights of 'MTL'"):
        load_weights(finished/"pretrain.safetensors", "MTL")
    with pytest.raises(BadInput, match="holds 'MTL', not 'head only'"):
        load_weights(finished/"mtl-1shot.safetensors", "head only")
    (tmp_path/"w.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(BadInput, match="damaged or no safetensors"): load_weights(tmp_path/"w.safetensors")


def test_several_shots_ask_for_one():
    with pytest.raises(BadInput, match=re.escape("has 'MTL' at [1, 5] shots: choose k_shot")):
        load_weights(HOME/"glyphs-quick-s0", "MTL")


def test_a_folder_without_results_still_gives_its_trained_methods(exported):
    (exported/"results.json").unlink()
    assert weights_in(exported) == [("FT [Θ4;θ]", 1), ("MTL", 1)]
    assert load_weights(exported).method.label == "MTL"
    with pytest.raises(BadInput, match="has no 'head only'"): load_weights(exported, "head only")


def test_damaged_results(exported):
    for text in ('{"rows": 3}', '{"rows": [{}]}', "{}", "nothing"):
        (exported/"results.json").write_text(text)
        with pytest.raises(BadInput, match="damaged"): load_weights(exported, "head only")


def test_export_never_mixes_runs(finished, exported, tmp_path):
    before = {p.name: p.read_bytes() for p in exported.iterdir()}
    (exported/"README.md").write_text("mine")
    export_weights(finished, exported)
    assert (exported/"README.md").read_text() == "mine", "a card that was edited stays"
    assert all((exported/k).read_bytes() == v for k, v in before.items() if k != "README.md")
    with pytest.raises(BadInput, match="would be overwritten"): export_weights(finished, finished)
    with pytest.raises(BadInput, match="no finished run"): export_weights(tmp_path, tmp_path/"x")
    (exported/"results.json").write_text("{}")
    with pytest.raises(BadInput, match="the weights of another run"): export_weights(finished, exported)
    other = tmp_path/"other"
    shutil.copytree(finished, other)
    shutil.copy(SMALL, other/"pretrain.safetensors")
    with pytest.raises(BadInput, match="is not the backbone"): export_weights(other, tmp_path/"y")
    assert not (tmp_path/"y").exists()


def test_the_python_of_a_card_runs(capsys, monkeypatch):
    monkeypatch.chdir(HOME.parents[1])
    text = (HOME/"glyphs-quick-s0/README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.S)[1]
    exec(code.replace("tasks=1000", "tasks=50"), {})
    assert "5-way 5-shot, 50 tasks on test" in capsys.readouterr().out


def test_cards(finished):
    results = read_json(finished/"results.json")
    text = card("mine", results)
    assert "mtl test --weights mine --data glyphs\n" in text and "Meta-trained by: MTL, FT [Θ4;θ]." in text
    results["recipe"] |= dict(eval_split="val", tta=dict(results["recipe"]["tta"], rotations=True, views=2))
    text = card("mine", results)
    assert "--split val" in text and "did not use test" in text
    assert "2 augmented views averaged; 90° rotations" in text


def test_halved_phi_is_exact_near_its_start(tmp_path):
    g = torch.Generator().manual_seed(0)
    tensors = {"a.scale": 1 + .01*torch.randn(64, 3, 1, 1, generator=g), "a.shift": .01*torch.randn(64, generator=g)}
    save(tmp_path/"a.safetensors", halve_phi(tensors), dict(kind="mtl", half_phi=True))
    again, record = load(tmp_path/"a.safetensors")
    assert "half_phi" not in record
    for k, v in tensors.items(): assert again[k].dtype == v.dtype and (again[k] - v).abs().max() < 2e-5


def make_small(path):
    "Phase 1 of `quick` at half the width, with mirror images: about a minute on two cores."
    config, base = preset("quick", widths=(8, 16, 32, 64)), glyphs(0)["train"]
    config = replace(config, phase1=replace(config.phase1, augment=AugmentConfig(pad=2, flip=True, jitter=0.)))
    net = ResNet12(config.widths, seed=0)
    for _ in pretrain(pretrain_state(net, len(base.names), config.phase1), base, config.phase1): pass
    save_backbone(path, net, base, config, 0.)


def accuracy(path):
    net, centre, _ = load_backbone(path)
    bank, head = glyphs(0)["val"], BaseLearner(net.num_features, 5, 0.2, 50)
    feats = features(MTL(net, head, centre).embed, bank)
    return evaluate(feats, make_exam(bank, TaskShape(), 1, 500), head).double().mean().item()/75


def test_the_small_backbone_is_trained(): assert accuracy(SMALL) > 0.5


@pytest.mark.slow
def test_the_small_backbone_made_anew(tmp_path):
    make_small(tmp_path/"new.safetensors")
    assert abs(accuracy(tmp_path/"new.safetensors") - accuracy(SMALL)) < 0.02


if __name__ == "__main__":
    torch.set_num_threads(2)
    make_small(SMALL)
