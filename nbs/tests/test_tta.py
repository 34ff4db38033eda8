"More looks at each picture: against the long way, through a run, by the shell, in records."
import json
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from conftest import root
from test_run import banks, killed_after, recipe, same  # noqa: F401

from mtl_nb.models.base_learner import BaseLearner
from mtl_nb.campaign import read_plan
from mtl_nb.methods.base import METHODS
from mtl_nb.core import BadInput
from mtl_nb.data.bank import ImageBank
from mtl_nb.data.augment import augment
from mtl_nb.train.distributed import ALONE, Team
from mtl_nb.data.episodes import TaskShape
from mtl_nb.evaluation.exam import features, make_exam
from mtl_nb.experiments.run import run
from mtl_nb.evaluation.tta import TTA
from mtl_nb.evaluation.meta_test import Protocol, paper_protocol, table
from mtl_nb.train.meta_train import MTL
from mtl_nb.models.convnet4 import ConvNet4
from mtl_nb.experiments.config import ExperimentConfig, with_overrides, config_from_record, preset
from mtl_nb.train.objectives import ObjectiveConfig
from mtl_nb.publish import export_weights

how = dict(pad=3, jitter=.5)


@pytest.mark.parametrize("centred", [True, False])
def test_many_looks_by_hand(net, bank, centred):
    model = MTL(net, BaseLearner(net.num_features, 5), features(net, bank).mean(0) if centred else None)
    feats, more = TTA(2, 3, True, how).see(model, bank)
    every, by_hand, rolled = bank.take(torch.arange(len(bank))), [], []
    for k in range(4):
        f = [model.embed(every.rot90(k, (2, 3)))] + [model.embed(augment(every, torch.Generator().manual_seed(10_007*(1000 + v)), **how).rot90(k, (2, 3))) for v in range(3)]
        mean = sum(f)/4
        by_hand.append((4*F.normalize(mean, dim=1) if centred else mean)/2)
        rolled.append(torch.stack([model.embed(augment(every, torch.Generator().manual_seed(c), **how).rot90(k, (2, 3))) for c in range(2)])/2)
    assert torch.allclose(feats, torch.cat(by_hand, 1), atol=1e-5) and torch.allclose(more, torch.cat(rolled, 2), atol=1e-5)
    assert feats.shape == (len(bank), 4*net.num_features) and more.shape == (2, len(bank), 4*net.num_features)


def with_peaks(model, x): # the long way
    maps, f = model.backbone.blocks(x), model.embed(x)
    p = maps.flatten(2).max(2)[0]
    return torch.cat([f, f.norm(dim=1, keepdim=True)*F.normalize(p - p.mean(1, keepdim=True), dim=1)], 1)/2**.5


@pytest.mark.parametrize("centred", [True, False])
def test_peaks_by_hand(centred, net, large):
    model = MTL(net, BaseLearner(net.num_features, 5), features(net, large).mean(0) if centred else None)
    every, plain = large.take(torch.arange(len(large))), with_peaks(model, large.take(torch.arange(len(large))))
    feats, more = TTA(TTAConfig(max_pool=True)).see(model, large)
    assert more is None and torch.allclose(feats, plain, rtol=1e-4, atol=1e-4) and torch.allclose(feats[:, :net.num_features]*2**.5, features(model.embed, large), rtol=1e-4, atol=1e-4)
    assert torch.allclose(feats.norm(dim=1), features(model.embed, large).norm(dim=1), atol=1e-4) and (feats[:, net.num_features:] - plain[:, :net.num_features]).abs().max() > .01
    feats, more = TTA(1, 2, True, how, True).see(model, large)
    by_hand, rolled = [], []
    for k in range(4):
        mean = sum(with_peaks(model, x.rot90(k, (2, 3))) for x in (every, *(augment(every, torch.Generator().manual_seed(10_007*(1000 + v)), **how) for v in range(2))))/3
        by_hand.append((4*F.normalize(mean, dim=1) if centred else mean)/2)
        rolled.append(with_peaks(model, augment(every, torch.Generator().manual_seed(0), **how).rot90(k, (2, 3)))/2)
    assert torch.allclose(feats, torch.cat(by_hand, 1), rtol=1e-4, atol=1e-4) and torch.allclose(more[0], torch.cat(rolled, 1), rtol=1e-4, atol=1e-4)
    assert feats.shape == (len(large), 8*net.num_features)


def test_peaks_leave_nothing_behind_and_ask_for_evaluation_mode(net, large):
    model = MTL(net, BaseLearner(net.num_features, 5))
    TTA(TTAConfig(max_pool=True)).see(model, large)
    assert not net.blocks._forward_hooks
    net.train()
    try:
        with pytest.raises(ValueError, match="training mode"): TTA(TTAConfig(max_pool=True)).see(model, large)
    finally: net.eval()
    with pytest.raises(BadInput, match="at least 32 pixels a side"): TTA(TTAConfig(max_pool=True)).see(model, ImageBank(large.x[:, :, :12], large.y, large.names))
    with pytest.raises(RuntimeError, match="broken"): TTA(TTAConfig(max_pool=True)).see(_Broken(net, BaseLearner(net.num_features, 5)), large)   # within the pass
    assert not net.blocks._forward_hooks


class _Broken(MTL):
    def embed(self, x): raise RuntimeError("broken")


def test_peaks_ask_for_maps(net, large):
    for backbone, kind in ((torch.nn.Sequential(net), "Sequential"), (ConvNet4(8, size=48), "ConvNet4")):
        with pytest.raises(BadInput, match=f"last maps of a ResNet12, this model's backbone is a {kind}"): TTA(TTAConfig(max_pool=True)).see(MTL(backbone, BaseLearner(net.num_features, 5)), large)


@pytest.fixture(scope="module")
def large(): # their last maps have 3 x 3 places
    return ImageBank(torch.randint(256, (24, 3, 48, 48), generator=torch.Generator().manual_seed(5)).to(torch.uint8), torch.arange(6).repeat_interleave(4), list("abcdef"))


def whitened(f, base, y): # one axis of the base pictures after the other, in the way of a textbook
    x = torch.cat([base[y == c] - base[y == c].mean(0) for c in y.unique()]).double()
    spread = x.T @ x/(len(x) - 1)
    u, values, _ = torch.linalg.svd(spread)
    out = sum((f.double() @ u[:, i:i + 1])*u[:, i]/(.7*values[i] + .3*values.mean())**.25 for i in range(len(values)))
    return (out/out.norm(dim=-1, keepdim=True)*f.norm(dim=-1, keepdim=True).double()).float()


@pytest.mark.parametrize("centred", [True, False])
def test_whitening_by_hand(centred, net, bank):
    model = MTL(net, BaseLearner(net.num_features, 5), features(net, bank).mean(0) if centred else None)
    looks, base = TTA(TTAConfig(whitening=True), 1, 1, True, augment=, base=bank), features(model.embed, bank)
    feats, more = looks.see(model, bank)
    plain, plain_more = replace(looks, whiten=False).see(model, bank)
    for k in range(4):
        part = slice(k*net.num_features, (k + 1)*net.num_features)
        assert torch.allclose(feats[:, part], whitened(plain[:, part], base, bank.y), atol=1e-4) and torch.allclose(more[..., part], whitened(plain_more[..., part], base, bank.y), atol=1e-4)
    assert torch.equal(looks.see(model, bank, white=looks.whitener(model))[0], feats) and (feats - plain).abs().max() > .01


def test_peaks_are_whitened_by_themselves(net, large):
    model = MTL(net, BaseLearner(net.num_features, 5), features(net, large).mean(0))
    plain, f = TTA(TTAConfig(max_pool=True)).see(model, large)[0], TTA(TTAConfig(max_pool=True, whitening=True), base=large).see(model, large)[0]
    for part in (slice(net.num_features), slice(net.num_features, None)): assert torch.allclose(f[:, part], whitened(plain[:, part], plain[:, part], large.y), atol=1e-4)


def test_whitening_learns_from_a_hundred_of_each_class(net):
    g = torch.Generator().manual_seed(3)
    x, y = torch.randint(256, (240, 3, 16, 16), generator=g).to(torch.uint8), torch.arange(2).repeat_interleave(120)
    model, base, seen = MTL(net, BaseLearner(net.num_features, 2)), ImageBank(x, y, list("ab")), torch.cat([torch.arange(100), torch.arange(120, 220)])
    white = TTA(TTAConfig(whitening=True), base=base).whitener(model)
    few = ImageBank(base.x[seen], base.y[seen], list("ab"), base.hashes[seen])
    assert torch.equal(white, TTA(TTAConfig(whitening=True), base=few).whitener(model)) and white.shape == (1, net.num_features, net.num_features)


def test_whitening_asks_for_base_pictures(net, bank, large):
    model = MTL(net, BaseLearner(net.num_features, 5))
    with pytest.raises(BadInput, match=r"in Python TTA\(whiten=True, base=bank\)"): TTA(TTAConfig(whitening=True)).see(model, bank)
    for one in (ImageBank(bank.x[:3], torch.arange(3), list("abc")), ImageBank(bank.x[:1].repeat(6, 1, 1, 1), torch.arange(6)//2, list("abc"))):
        with pytest.raises(BadInput, match="no two pictures of one class differ here"): TTA(TTAConfig(whitening=True), base=one).see(model, bank)
    with pytest.raises(BadInput, match="at least 32 pixels a side"): TTA(TTAConfig(max_pool=True, whitening=True), base=ImageBank(large.x[..., :20, :20], large.y, large.names)).see(model, large)
    net.train()
    try:
        with pytest.raises(ValueError, match="training mode"): TTA(TTAConfig(whitening=True), base=bank).whitener(model)
    finally: net.eval()


def test_processes_share_the_pictures(net, bank):
    class Part(Team):
        def cat(self, x, n): return x
    model, looks = MTL(net, BaseLearner(net.num_features, 5)), TTA(1, 2, True, how)
    parts = [looks.see(model, bank, Part(r, 3)) for r in range(3)]
    whole = looks.see(model, bank)
    assert torch.allclose(torch.cat([f for f, _ in parts]), whole[0], atol=1e-5) and torch.allclose(torch.cat([m for _, m in parts], 1), whole[1], atol=1e-5)


def test_pictures_that_are_not_square(net):
    g = torch.Generator().manual_seed(0)
    wide = ImageBank(torch.randint(256, (4, 3, 16, 20), generator=g).to(torch.uint8), torch.arange(4), list("abcd"))
    model = MTL(net, BaseLearner(net.num_features, 2))
    with pytest.raises(BadInput, match="only square pictures can be rotate_some, these are 16 by 20 pixels: set --size, or leave out quarters"): TTA(TTAConfig(rotations=True)).see(model, wide)
    assert TTA(TTAConfig(views=2), augment=how).see(model, wide)[0].shape == (4, net.num_features)


def test_a_start_keeps_its_inner_loop_and_is_not_touched(net):
    base = BaseLearner(net.num_features, 5, .3, 7, 1)
    with torch.no_grad(): base.weight.normal_()
    for looks, parts in ((TTA(TTAConfig(rotations=True)), 4), (TTA(TTAConfig(max_pool=True)), 2), (TTA(TTAConfig(rotations=True, max_pool=True)), 8)):
        before, wide = base.weight.clone(), looks.start(base)
        assert (wide.lr, wide.steps, wide.order, list(wide.weight.shape)) == (.3, 7, 1, [5, parts*net.num_features]) and torch.equal(base.weight, before) and wide.weight.is_leaf and not wide.weight.requires_grad
        f = torch.randn(3, parts, net.num_features, generator=torch.Generator().manual_seed(parts))   # before the first step: the mean of the answers to the parts
        assert torch.allclose(F.linear(f.flatten(1)/parts**.5, wide.weight, wide.bias), F.linear(f.mean(1), base.weight, base.bias), atol=1e-5)


@pytest.mark.parametrize("label", [k for k, c in METHODS.items() if c.cached and not k.endswith("HT")])
@pytest.mark.parametrize("peaks, whiten", [(False, False), (True, False), (True, True)])
def test_every_method_with_a_feature_for_each_picture(peaks, whiten, label, net, bank, large):
    if peaks: bank = large
    c = replace(METHODS[label], few=20)
    model, exam, looks = c.build(net, BaseLearner(net.num_features, 5, 0.1, 5), None, 16, 8), make_exam(bank, TaskShape(5, 1, 2), 1, 20), TTA(1, 2, True, how, peaks, whiten, bank)
    right = lambda o: c.right(model, bank, exam, c.rates[-1:], c.steps[-1:], False, ALONE, o)
    assert right(TTA()).shape == right(looks).shape and not torch.equal(right(TTA()), right(looks))
    best = c.choose(model, bank, exam, looks=looks)
    a, b = c.sit(model, bank, [Protocol("standard", TaskShape(5, 1, 2), 20), paper_protocol(1)], "val", looks=looks)
    assert 0 <= best <= 1 and torch.equal(b.correct, c.sit(model, bank, [a.protocol, b.protocol], "val")[1].correct)   # the authors' protocol looks as the authors do


@pytest.mark.parametrize("label", [k for k, c in METHODS.items() if not c.cached and not k.endswith("HT")])
def test_others_refuse(label, net, bank):
    c = METHODS[label]
    with pytest.raises(BadInput, match="one feature for each picture"): c.sit(c.build(net, BaseLearner(net.num_features, 5, 0.1, 5), None, 16, 8), bank, [Protocol("standard", TaskShape(5, 1, 2), 4)], "val", looks=TTA(TTAConfig(rotations=True)))
    with pytest.raises(BadInput, match="views, quarters, peaks and whitening need a method"): c.sit(c.build(net, BaseLearner(net.num_features, 5, 0.1, 5), None, 16, 8), bank, [Protocol("standard", TaskShape(5, 1, 2), 4)], "val", looks=TTA(TTAConfig(max_pool=True)))


@pytest.fixture(scope="module")
def seen(banks, recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("seen")/"run"
    return run(replace(recipe, views=2, quarters=True, peaks=True, whiten=True, paper=True, methods=("MTL", "ProtoNet")), banks, out), out


def test_a_run_takes_more_looks_for_all(banks, recipe, seen, tmp_path):
    results, out = seen
    plain = run(replace(recipe, paper=True, methods=("MTL",)), banks, tmp_path/"plain")
    row = lambda r, m, p="standard": next(x for x in r["rows"] if (x["method"], x["protocol"]) == (m, p))
    assert plain["curves"]["mtl-1shot"] == results["curves"]["mtl-1shot"]   # training looks once, and does not know
    assert row(plain, "head only")["correct"] != row(results, "head only")["correct"] and row(plain, "MTL")["correct"] != row(results, "MTL")["correct"]
    assert row(plain, "head only", "paper")["correct"] == row(results, "head only", "paper")["correct"]
    assert row(results, "ProtoNet")["paired"]["to"] == "head only"


def test_what_is_kept_at_its_start_answers_like_head_only(banks, recipe, tmp_path):
    r = run(replace(recipe, quarters=True, peaks=True, whiten=True, views=1, methods=("MTL",), phase2=replace(recipe.phase2, lr=0., head_lr=0.)), banks, tmp_path/"run")
    a, b = r["rows"]
    assert b["trained_tasks"] == 0 and a["correct"] == b["correct"] and b["paired"]["difference"] == 0


def test_killed_and_resumed(banks, recipe, seen, tmp_path, monkeypatch):
    mine = replace(recipe, views=2, quarters=True, peaks=True, whiten=True, paper=True, methods=("MTL", "ProtoNet"))
    with killed_after(5, monkeypatch): run(mine, banks, tmp_path/"run")
    assert same(run(mine, banks, tmp_path/"run", resume=True), seen[0])


def test_saved_weights_sit_the_same_exam(banks, seen, tmp_path, monkeypatch, capsys):
    from mtl_nb import cli
    results, out = seen
    monkeypatch.setattr(cli, "load_data", lambda *a, need, **k: {s: banks[s] for s in need})
    assert not cli.mtl_meta_test(weights=str(out), data="glyphs", tasks=20, query=3)
    said = capsys.readouterr().out
    for r in results["rows"]:
        if r["protocol"] == "standard": assert f"{r['accuracy']:.2f}" in said, (r["method"], said)
    assert "standard protocol, 2 views, quarter turns, peaks, whitened" in said and "classes, for whitening\n" in said


def test_whitened_weights_ask_for_their_base_classes(banks, seen, tmp_path, monkeypatch, capsys):
    from mtl_nb import cli
    train = banks["train"]
    renamed, fewer = ImageBank(train.x, train.y, [f"other {n}" for n in train.names], train.hashes), ImageBank(train.x[::2], train.y[::2], train.names, train.hashes[::2])
    sets = dict(glyphs=banks, omniglot=banks | dict(train=renamed), fc100=dict(test=banks["test"]), miniimagenet=dict(train=fewer))
    def load(name, need, **how):
        if lacks := [s for s in need if s not in sets[name]]: raise BadInput(f"no folder '{lacks[0]}'")
        return {s: sets[name][s] for s in need}
    monkeypatch.setattr(cli, "load_data", load)
    sit = lambda data, **more: (cli.mtl_meta_test(weights=str(seen[1]/"mtl-1shot.safetensors"), data=data, tasks=20, query=3, **more), capsys.readouterr())
    code, there = sit("glyphs")
    assert not code
    code, said = sit("omniglot")
    assert code == 2 and "these weights ask for whitening, which learns from the base classes that they were trained on, and train of 'omniglot' holds others: say with --base where they lie" in said.err
    code, said = sit("fc100")
    assert code == 2 and "these weights ask for whitening, which learns from the pictures of their base classes (--base says where they lie, if not with --data): no folder 'train'" in said.err
    answers = lambda o: [x for x in o.out.split("\n") if x.startswith("MTL")]
    for data in ("omniglot", "fc100"):
        code, said = sit(data, base="glyphs")
        assert not code and answers(said) == answers(there) and "for whitening\n" in said.out
    code, said = sit("fc100", base="miniimagenet")
    assert not code and "for whitening, not those that the run had" in said.out


def test_base_is_refused_where_nothing_is_whitened(capsys):
    from mtl_nb import cli
    assert cli.mtl_meta_test(weights=str(root/"data/weights/glyphs-quick-s0/mtl-1shot.safetensors"), base="glyphs") == 2
    assert "--base is for weights that ask for whitening, and these do not" in capsys.readouterr().err


def test_a_card_tells_how_the_exam_looked(seen, tmp_path):
    export_weights(seen[1], tmp_path/"weights")
    assert "every picture averaged with 2 augmented views of it, every picture seen under four quarter turns, the peak of each channel beside its mean, features whitened by half" in (tmp_path/"weights/README.md").read_text()


def test_a_run_refuses_what_looks_once(banks, recipe, tmp_path):
    with pytest.raises(BadInput, match="leave out MAML ResNet-12, update .*, or ask for none of the four"): run(replace(recipe, views=1, methods=("MTL", "MAML ResNet-12", "update [Θ;θ]")), banks, tmp_path/"run")
    assert not (tmp_path/"run").exists()


@pytest.mark.parametrize("change, words", [(dict(quarters=True), "quarters"), (dict(extras=ObjectiveConfig(turns=.5)), "objective.rotation")])
def test_pictures_that_are_not_square_are_refused_before_training(banks, recipe, tmp_path, change, words):
    wide = {k: ImageBank(b.x[..., :30, :], b.y, b.names, b.hashes) for k, b in banks.items()}
    with pytest.raises(BadInput, match=f"only square pictures can be rotate_some, these are 30 by 32 pixels: set --size, or leave out {words}"): run(replace(recipe, **change), wide, tmp_path/"run")
    assert not (tmp_path/"run").exists()


def test_pictures_too_small_for_peaks_are_refused_before_training(banks, recipe, tmp_path):
    small = {k: ImageBank(b.x[..., :31, :31], b.y, b.names, b.hashes) for k, b in banks.items()}
    with pytest.raises(BadInput, match="peaks need pictures of at least 32 pixels a side, .* these are 31 by 31: set --size, or leave out peaks"): run(replace(recipe, peaks=True), small, tmp_path/"run")
    assert not (tmp_path/"run").exists()


def test_base_pictures_too_small_for_peaks_are_refused_where_they_are_whitened(banks, recipe, tmp_path):
    mixed = banks | dict(train=ImageBank(banks["train"].x[..., :31, :31], banks["train"].y, banks["train"].names, banks["train"].hashes))
    with pytest.raises(BadInput, match="these are 31 by 31"): run(replace(recipe, peaks=True, whiten=True), mixed, tmp_path/"run")
    assert not (tmp_path/"run").exists()


def test_a_backbone_that_was_trained_on_turns_is_asked_for_none_of_them(banks, recipe, tmp_path):
    rotate_some, wide = replace(recipe, extras=ObjectiveConfig(turns=.5), methods=()), {k: ImageBank(b.x[..., :30, :], b.y, b.names, b.hashes) for k, b in banks.items()}
    run(rotate_some, banks, tmp_path/"square")
    assert [r["method"] for r in run(rotate_some, wide, tmp_path/"wide", backbone=tmp_path/"square/pretrain.safetensors")["rows"]] == ["head only"]


def test_a_plan_is_refused_before_any_of_it_runs(tmp_path):
    (tmp_path/"plan.json").write_text(json.dumps([dict(name="a", data="glyphs", preset="quick", methods="none"), dict(name="b", data="glyphs", preset="quick", methods="maml-4-conv", set=dict(views=2))]))
    with pytest.raises(BadInput, match="job 2 'b': views, quarters, peaks and whitening are for methods .* leave out MAML 4-conv"): read_plan(tmp_path/"plan.json")


def test_a_table_tells_how_the_exam_looked(seen, banks):
    standard, paper = (next(o for o in table(seen[0]).split("\n") if f"{p} protocol" in o) for p in ("standard", "paper"))
    assert standard.endswith("standard protocol, 2 views, quarter turns, peaks, whitened") and paper.endswith("paper protocol")


def test_in_python_it_has_to_be_said_how():
    with pytest.raises(BadInput, match=r"in Python how=dict\(pad=4\)"): TTA(TTAConfig(views=4))
    with pytest.raises(BadInput, match="quarters must be true or false, got 'no'"): TTA(TTAConfig(rotations="no"))
    with pytest.raises(BadInput, match="peaks must be true or false, got 1"): TTA(TTAConfig(max_pool=1))
    with pytest.raises(BadInput, match="whiten must be true or false, got 0.5"): TTA(TTAConfig(whitening=.5))


@pytest.mark.parametrize("changes, words", [({"views": -1}, "views must be a whole number from 0 to 100"), ({"views": 101}, "views must be"), ({"views": 1.5}, "views must be a whole number"), ({"quarters": 1}, "quarters must be true or false"), ({"peaks": "yes"}, "peaks"), ({"whiten": 2}, "whiten"), ({"whitening": True}, "did you mean whiten"), ({"peaks": True, "size": 24}, "at least 32 pixels a side, got --size 24"), ({"quarter": True}, "did you mean quarters"),
    ({"views": 2, "phase1.augment": None}, "set phase1.augment, or views=0"), ({"copies": 2, "phase1.augment": None}, "set phase1.augment, or copies=0")])
def test_bad_recipes(changes, words):
    with pytest.raises(BadInput, match=words): with_overrides(preset("quick"), changes)


def test_names_of_earlier_runs_hold():
    found = 0
    for file in (root/"data/results").glob("*.json"):
        record = json.loads(file.read_text())
        if "recipe_sha256" in record and asdict(ExperimentConfig()).keys() - record["recipe"].keys() <= {"views", "quarters", "peaks", "whiten"}:
            found += 1
            assert config_from_record(record["recipe"]).digest() == record["recipe_sha256"], file.name
    assert found > 20
    assert len({replace(ExperimentConfig(), **o).digest() for o in ({}, dict(views=1), dict(quarters=True), dict(peaks=True), dict(whiten=True), dict(copies=1))}) == 6
    assert with_overrides(preset("quick"), {"views": 2, "quarters": True}).changes == "quarters=true, views=2"
