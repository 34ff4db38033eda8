"Test-time augmentation: against the long way, for every method, through a run, by the command, in records and cards."
import json
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from conftest import root
from test_run import banks, config, killed_after, same  # noqa: F401

from mtl_nb.core import BadInput
from mtl_nb.data import datasets
from mtl_nb.data.augment import AugmentConfig
from mtl_nb.data.bank import ImageBank
from mtl_nb.data.episodes import TaskShape
from mtl_nb.evaluation.exam import features, make_exam
from mtl_nb.evaluation.meta_test import Protocol, paper_protocol
from mtl_nb.evaluation.tta import TTA, TTAConfig
from mtl_nb.experiments.config import ExperimentConfig, config_from_record, preset, with_overrides
from mtl_nb.experiments.records import results_table
from mtl_nb.experiments.run import run
from mtl_nb.methods.base import METHODS, get_method
from mtl_nb.models.base_learner import BaseLearner
from mtl_nb.models.convnet4 import ConvNet4
from mtl_nb.publish import export_weights
from mtl_nb.train.distributed import ALONE, Team
from mtl_nb.train.meta_train import MTL
from mtl_nb.train.objectives import ObjectiveConfig

HOW = AugmentConfig(pad=3, jitter=.5)
LABELS = [o for o in METHODS if not o.endswith("HT")]
CACHED = [o for o in LABELS if get_method(o).caches_features]
MANY = TTAConfig(views=2, rotations=True, max_pool=True, whitening=True)


def tta_of(base=None, **options): return TTA(TTAConfig(**options), HOW, base)
def generator(seed): return torch.Generator().manual_seed(seed)
def model_of(net, centre=None, n_way=5): return MTL(net, BaseLearner(net.num_features, n_way), centre)
def all_of(bank): return bank.take(torch.arange(len(bank)))
def view(x, v): return HOW(x, generator(10_007*(1000 + v)))
def rotated(x, k): return x.rot90(k, (2, 3))


@pytest.fixture(scope="module")
def large(): # its last maps have 3 x 3 places
    x = torch.randint(256, (24, 3, 48, 48), generator=generator(5)).to(torch.uint8)
    return ImageBank(x, torch.arange(6).repeat_interleave(4), list("abcdef"))


# --- features ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("centred", [True, False])
def test_views_rotations_and_copies_by_hand(net, bank, centred):
    model = model_of(net, features(net, bank).mean(0) if centred else None)
    feats, copies = tta_of(support_copies=2, views=3, rotations=True).embed(model, bank)
    every, by_hand, more = all_of(bank), [], []
    for k in range(4):
        parts = [model.embed(rotated(x, k)) for x in (every, *(view(every, v) for v in range(3)))]
        mean = sum(parts)/4
        by_hand.append((4*F.normalize(mean, dim=1) if centred else mean)/2)
        more.append(torch.stack([model.embed(rotated(HOW(every, generator(c)), k)) for c in range(2)])/2)
    assert torch.allclose(feats, torch.cat(by_hand, 1), atol=1e-5)
    assert torch.allclose(copies, torch.cat(more, 2), atol=1e-5)
    assert feats.shape == (len(bank), 4*net.num_features) and copies.shape == (2, len(bank), 4*net.num_features)


def max_pooled(model, x): # the long way
    maps, f = model.backbone.blocks(x), model.embed(x)
    top = maps.flatten(2).max(2)[0]
    top = F.normalize(top - top.mean(1, keepdim=True), dim=1)
    return torch.cat([f, f.norm(dim=1, keepdim=True)*top], 1)/2**.5


@pytest.mark.parametrize("centred", [True, False])
def test_max_pool_by_hand(centred, net, large):
    model, d = model_of(net, features(net, large).mean(0) if centred else None), net.num_features
    close = dict(rtol=1e-4, atol=1e-4)
    feats, copies = tta_of(max_pool=True).embed(model, large)
    plain = features(model.embed, large)
    assert copies is None and torch.allclose(feats, max_pooled(model, all_of(large)), **close)
    assert torch.allclose(feats[:, :d]*2**.5, plain, **close) and (feats[:, d:] - feats[:, :d]).abs().max() > .01
    assert torch.allclose(feats.norm(dim=1), plain.norm(dim=1), atol=1e-4)
    feats, copies = tta_of(support_copies=1, views=2, rotations=True, max_pool=True).embed(model, large)
    every, by_hand, more = all_of(large), [], []
    for k in range(4):
        mean = sum(max_pooled(model, rotated(x, k)) for x in (every, view(every, 0), view(every, 1)))/3
        by_hand.append((4*F.normalize(mean, dim=1) if centred else mean)/2)
        more.append(max_pooled(model, rotated(HOW(every, generator(0)), k))/2)
    assert torch.allclose(feats, torch.cat(by_hand, 1), **close)
    assert torch.allclose(copies[0], torch.cat(more, 1), **close)


class _Broken(MTL):
    def embed(self, x): raise RuntimeError("broken")


def test_max_pool_leaves_no_hook_and_needs_evaluation_mode(net, large):
    tta, model = tta_of(max_pool=True), model_of(net)
    tta.embed(model, large)
    assert not net.blocks._forward_hooks
    net.train()
    try:
        with pytest.raises(BadInput, match="training mode"): tta.embed(model, large)
    finally: net.eval()
    small = ImageBank(large.x[:, :, :12], large.y, large.names)
    with pytest.raises(BadInput, match="at least 32 pixels a side"): tta.embed(model, small)
    with pytest.raises(RuntimeError, match="broken"): tta.embed(_Broken(net, BaseLearner(net.num_features, 5)), large)
    assert not net.blocks._forward_hooks


@pytest.mark.parametrize("kind", ["Sequential", "ConvNet4"])
def test_max_pool_needs_the_maps_of_a_resnet12(kind, net, large):
    backbone = torch.nn.Sequential(net) if kind == "Sequential" else ConvNet4(8, size=48)
    model = MTL(backbone, BaseLearner(net.num_features, 5))
    with pytest.raises(BadInput, match=f"a ResNet12, this model's backbone is a {kind}"):
        tta_of(max_pool=True).embed(model, large)


def by_textbook(f, base, y): # whitening, one axis of the base images after the other
    x = torch.cat([base[y == c] - base[y == c].mean(0) for c in y.unique()]).double()
    u, values, _ = torch.linalg.svd(x.T @ x/(len(x) - 1))
    scale = (.7*values + .3*values.mean())**-.25
    out = sum((f.double() @ u[:, i:i + 1])*u[:, i]*scale[i] for i in range(len(values)))
    return (out/out.norm(dim=-1, keepdim=True)*f.norm(dim=-1, keepdim=True).double()).float()


@pytest.mark.parametrize("centred", [True, False])
def test_whitening_by_hand(centred, net, bank):
    model, d = model_of(net, features(net, bank).mean(0) if centred else None), net.num_features
    others, base = dict(support_copies=1, views=1, rotations=True), features(model.embed, bank)
    tta = tta_of(bank, whitening=True, **others)
    feats, copies = tta.embed(model, bank)
    plain, plain_copies = tta_of(**others).embed(model, bank)
    for part in (slice(k*d, (k + 1)*d) for k in range(4)):
        assert torch.allclose(feats[:, part], by_textbook(plain[:, part], base, bank.y), atol=1e-4)
        assert torch.allclose(copies[..., part], by_textbook(plain_copies[..., part], base, bank.y), atol=1e-4)
    assert torch.equal(tta.embed(model, bank, white=tta.whitening_matrix(model))[0], feats)
    assert (feats - plain).abs().max() > .01


def test_max_pooled_features_are_whitened_by_themselves(net, large):
    model, d = model_of(net, features(net, large).mean(0)), net.num_features
    plain = tta_of(max_pool=True).embed(model, large)[0]
    f = tta_of(large, max_pool=True, whitening=True).embed(model, large)[0]
    for part in (slice(d), slice(d, None)):
        assert torch.allclose(f[:, part], by_textbook(plain[:, part], plain[:, part], large.y), atol=1e-4)


def test_whitening_learns_from_a_hundred_of_each_class(net):
    x = torch.randint(256, (240, 3, 16, 16), generator=generator(3)).to(torch.uint8)
    base = ImageBank(x, torch.arange(2).repeat_interleave(120), list("ab"))
    first = torch.cat([torch.arange(100), torch.arange(120, 220)])
    few = ImageBank(base.x[first], base.y[first], list("ab"), base.hashes[first])
    a, b = (tta_of(o, whitening=True).whitening_matrix(model_of(net, n_way=2)) for o in (base, few))
    assert torch.equal(a, b) and a.shape == (1, net.num_features, net.num_features)


def test_whitening_needs_base_images(net, bank, large):
    model = model_of(net)
    with pytest.raises(BadInput, match=r"in Python TTA\(TTAConfig\(whitening=True\), base=bank\)"):
        tta_of(whitening=True).embed(model, bank)
    one_each = ImageBank(bank.x[:3], torch.arange(3), list("abc"))
    all_alike = ImageBank(bank.x[:1].repeat(6, 1, 1, 1), torch.arange(6)//2, list("abc"))
    for base in (one_each, all_alike):
        with pytest.raises(BadInput, match="no two images of one class differ here"):
            tta_of(base, whitening=True).embed(model, bank)
    small = ImageBank(large.x[..., :20, :20], large.y, large.names)
    with pytest.raises(BadInput, match="at least 32 pixels a side"):
        tta_of(small, max_pool=True, whitening=True).embed(model, large)
    net.train()
    try:
        with pytest.raises(BadInput, match="training mode"): tta_of(bank, whitening=True).whitening_matrix(model)
    finally: net.eval()


def test_processes_share_the_images(net, bank):
    class Part(Team):
        def all_gather(self, x, n): return x
    model, tta = model_of(net), tta_of(support_copies=1, views=2, rotations=True)
    parts = [tta.embed(model, bank, Part(r, 3)) for r in range(3)]
    feats, copies = tta.embed(model, bank)
    assert torch.allclose(torch.cat([f for f, _ in parts]), feats, atol=1e-5)
    assert torch.allclose(torch.cat([c for _, c in parts], 1), copies, atol=1e-5)


def test_images_that_are_not_square(net):
    x = torch.randint(256, (4, 3, 16, 20), generator=generator(0)).to(torch.uint8)
    wide, model = ImageBank(x, torch.arange(4), list("abcd")), model_of(net, n_way=2)
    with pytest.raises(BadInput, match="only square images .* 16 by 20 pixels: set --size, or leave out tta.rotations"):
        tta_of(rotations=True).embed(model, wide)
    assert tta_of(views=2).embed(model, wide)[0].shape == (4, net.num_features)


@pytest.mark.parametrize("options, parts", [(dict(rotations=True), 4), (dict(max_pool=True), 2),
                                            (dict(rotations=True, max_pool=True), 8)])
def test_a_wider_head_keeps_its_inner_loop(net, options, parts):
    base, d = BaseLearner(net.num_features, 5, .3, 7, 1), net.num_features
    with torch.no_grad(): base.weight.normal_(generator=generator(9))
    before, wide = base.weight.clone(), tta_of(**options).widen_head(base)
    assert (wide.lr, wide.steps, wide.order, list(wide.weight.shape)) == (.3, 7, 1, [5, parts*d])
    assert torch.equal(base.weight, before) and wide.weight.is_leaf and not wide.weight.requires_grad
    f = torch.randn(3, parts, d, generator=generator(parts)) # at first: the mean of the logits of the parts
    logits = F.linear(f.flatten(1)/parts**.5, wide.weight, wide.bias)
    assert torch.allclose(logits, F.linear(f.mean(1), base.weight, base.bias), atol=1e-5)


# --- methods -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("label", CACHED)
@pytest.mark.parametrize("max_pool, whitening", [(False, False), (True, False), (True, True)])
def test_every_method_that_caches_features(max_pool, whitening, label, net, bank, large):
    if max_pool: bank = large
    method = get_method(label).variant(select_limit=20)
    model = method.build(net, BaseLearner(net.num_features, 5, 0.1, 5), None, 16, 8)
    exam = make_exam(bank, TaskShape(5, 1, 2), 1, 20)
    tta = tta_of(bank, support_copies=1, views=2, rotations=True, max_pool=max_pool, whitening=whitening)
    rates, steps = method.inner_rates[-1:], method.inner_steps[-1:]
    a, b = (method.count_correct(model, bank, exam, rates, steps, False, ALONE, o) for o in (TTA(), tta))
    assert a.shape == b.shape and not torch.equal(a, b)
    assert 0 <= method.tune(model, bank, exam, tta=tta) <= 1
    protocols = [Protocol("standard", TaskShape(5, 1, 2), 20), paper_protocol(1)]
    paper = method.evaluate(model, bank, protocols, "val", tta=tta)[1]
    assert torch.equal(paper.correct, method.evaluate(model, bank, protocols, "val")[1].correct) # never augmented


@pytest.mark.parametrize("label", [o for o in LABELS if o not in CACHED])
@pytest.mark.parametrize("options", [dict(rotations=True), dict(max_pool=True)])
def test_methods_that_need_images(label, options, net, bank):
    method = get_method(label)
    model = method.build(net, BaseLearner(net.num_features, 5, 0.1, 5), None, 16, 8)
    with pytest.raises(BadInput, match="one feature for each image"):
        method.evaluate(model, bank, [Protocol("standard", TaskShape(5, 1, 2), 4)], "val", tta=tta_of(**options))


# --- runs ----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def augmented(config): # noqa: F811
    return replace(config, tta=MANY, paper_protocol=True, methods=("MTL", "ProtoNet"))


@pytest.fixture(scope="module")
def finished(banks, augmented, tmp_path_factory): # noqa: F811
    out = tmp_path_factory.mktemp("finished")/"run"
    return run(augmented, banks, out), out


def row_of(results, method, protocol="standard"):
    return next(r for r in results["rows"] if (r["method"], r["protocol"]) == (method, protocol))


def test_a_run_augments_for_all_methods(banks, config, finished, tmp_path): # noqa: F811
    results, plain = finished[0], run(replace(config, paper_protocol=True, methods=("MTL",)), banks, tmp_path/"plain")
    assert plain["curves"]["mtl-1shot"] == results["curves"]["mtl-1shot"] # training does not know of it
    for label in ("head only", "MTL"): assert row_of(plain, label)["correct"] != row_of(results, label)["correct"]
    assert row_of(plain, "head only", "paper")["correct"] == row_of(results, "head only", "paper")["correct"]
    assert row_of(results, "ProtoNet")["paired"]["to"] == "head only"


def test_a_model_that_was_not_trained_predicts_like_head_only(banks, config, tmp_path): # noqa: F811
    still = replace(config, tta=replace(MANY, views=1), methods=("MTL",),
                    phase2=replace(config.phase2, lr=0., head_lr=0.))
    a, b = run(still, banks, tmp_path/"run")["rows"]
    assert b["trained_tasks"] == 0 and a["correct"] == b["correct"] and b["paired"]["difference"] == 0


def test_killed_and_resumed(banks, augmented, finished, tmp_path, monkeypatch): # noqa: F811
    with killed_after(5, monkeypatch): run(augmented, banks, tmp_path/"run")
    assert same(run(augmented, banks, tmp_path/"run", resume=True), finished[0])


def test_methods_that_need_images_are_rejected_before_training(banks, config, tmp_path): # noqa: F811
    methods = ("MTL", "MAML ResNet-12", "update [Θ;θ]")
    with pytest.raises(BadInput, match="leave out MAML ResNet-12, update .*, or ask for none of the four"):
        run(replace(config, tta=TTAConfig(views=1), methods=methods), banks, tmp_path/"run")
    assert not (tmp_path/"run").exists()


def cut(bank, high, wide): return ImageBank(bank.x[..., :high, :wide], bank.y, bank.names, bank.hashes)


@pytest.mark.parametrize("change, words", [
    (dict(tta=TTAConfig(rotations=True)), "only square images .* 30 by 32 pixels: .* leave out tta.rotations"),
    (dict(objective=ObjectiveConfig(rotation=.5)), "rotation prediction needs square images"),
])
def test_images_that_are_not_square_are_rejected_before_training(banks, config, tmp_path, change, words): # noqa: F811
    with pytest.raises(BadInput, match=words):
        run(replace(config, **change), {k: cut(b, 30, 32) for k, b in banks.items()}, tmp_path/"run")
    assert not (tmp_path/"run").exists()


@pytest.mark.parametrize("splits, whitening", [(("train", "val", "test"), False), (("train",), True)])
def test_images_too_small_for_max_pool(banks, config, tmp_path, splits, whitening): # noqa: F811
    small = banks | {s: cut(banks[s], 31, 31) for s in splits}
    with pytest.raises(BadInput, match="at least 32 pixels a side, .* these are 31 by 31: .* leave out tta.max_pool"):
        run(replace(config, tta=TTAConfig(max_pool=True, whitening=whitening)), small, tmp_path/"run")
    assert not (tmp_path/"run").exists()


def test_a_given_backbone_trained_on_rotations_needs_no_square_images(banks, config, tmp_path): # noqa: F811
    trained, wide = replace(config, objective=ObjectiveConfig(rotation=.5), methods=()), tmp_path/"wide"
    run(trained, banks, tmp_path/"square")
    oblong = {k: cut(b, 30, 32) for k, b in banks.items()}
    results = run(replace(trained, size=32), oblong, wide, backbone=tmp_path/"square/pretrain.safetensors")
    assert [r["method"] for r in results["rows"]] == ["head only"]


# --- commands and records ------------------------------------------------------------------------------------------
def use_sets(monkeypatch, sets):
    def load(name, need, **how):
        missing = [s for s in need if s not in sets[name]]
        if missing: raise BadInput(f"no folder '{missing[0]}'")
        return {s: sets[name][s] for s in need}
    monkeypatch.setattr(datasets, "load_data", load)


def evaluate_by_command(capsys, *options):
    from mtl_nb.cli import main
    code = main(["test", "--tasks", "20", "--query", "3", *map(str, options)])
    return code, capsys.readouterr()


def test_saved_weights_are_evaluated_alike(banks, finished, monkeypatch, capsys): # noqa: F811
    use_sets(monkeypatch, dict(glyphs=banks))
    results, out = finished
    code, said = evaluate_by_command(capsys, "--weights", out, "--data", "glyphs")
    assert not code, said.err
    for r in results["rows"]:
        if r["protocol"] == "standard": assert f"{r['accuracy']:.2f}" in said.out, (r["method"], said.out)
    assert "2 augmented views averaged, 90° rotations, max-pooled features, partial within-class whitening" in said.out
    assert "for whitening" in said.err


def test_weights_that_whiten_need_their_base_classes(banks, finished, monkeypatch, capsys): # noqa: F811
    train = banks["train"]
    renamed = ImageBank(train.x, train.y, [f"other {n}" for n in train.names], train.hashes)
    fewer = ImageBank(train.x[::2], train.y[::2], train.names, train.hashes[::2])
    use_sets(monkeypatch, dict(glyphs=banks, omniglot=banks | dict(train=renamed),
                               fc100=dict(test=banks["test"]), miniimagenet=dict(train=fewer)))

    def test(data, *more):
        weights = finished[1]/"mtl-1shot.safetensors"
        code, said = evaluate_by_command(capsys, "--weights", weights, "--data", data, *more)
        return code, said.err, [o for o in said.out.split("\n") if o.startswith("MTL")]

    code, _, expected = test("glyphs")
    assert not code and expected
    code, err, _ = test("omniglot")
    assert code == 2 and "train of 'omniglot' holds others: give theirs with --base" in err
    code, err, _ = test("fc100")
    assert code == 2 and "(--base says where they are): no folder 'train'" in err
    for data in ("omniglot", "fc100"):
        code, err, lines = test(data, "--base", "glyphs")
        assert not code and lines == expected and "for whitening\n" in err
    code, err, _ = test("fc100", "--base", "miniimagenet")
    assert not code and "for whitening, not those of the run" in err


def test_base_is_for_weights_that_whiten(capsys):
    weights = root/"data/weights/glyphs-quick-s0/mtl-1shot.safetensors"
    code, said = evaluate_by_command(capsys, "--weights", weights, "--base", "glyphs")
    assert code == 2 and "--base is for weights that whiten features, and these do not" in said.err


def test_a_card_says_how_images_were_augmented(finished, tmp_path):
    export_weights(finished[1], tmp_path/"weights")
    card = (tmp_path/"weights/README.md").read_text(encoding="utf-8")
    for words in ("2 augmented views", "90° rotations", "max-pooled features", "within-class whitening"):
        assert words in card


def test_a_table_says_how_images_were_augmented(finished):
    lines = results_table(finished[0]).split("\n")
    standard, paper = (next(o for o in lines if f"{p} protocol" in o) for p in ("standard", "paper"))
    assert "2 augmented views averaged, 90° rotations, max-pooled features, partial within-class whitening" in standard
    assert "views" not in paper


# --- configs -------------------------------------------------------------------------------------------------------
def test_configs_check_themselves():
    with pytest.raises(BadInput, match=r"set phase1.augment, or tta.views=0"): TTA(TTAConfig(views=4))
    for name, value in (("rotations", "no"), ("max_pool", 1), ("whitening", .5)):
        with pytest.raises(BadInput, match=f"tta.{name} must be true or false, got {value!r}"):
            TTAConfig(**{name: value})


@pytest.mark.parametrize("changes, words", [
    ({"tta.views": -1}, "views must be a whole number from 0 to 100"), ({"tta.views": 101}, "views must be"),
    ({"tta.views": 1.5}, "tta.views: .* a whole number"), ({"tta.rotations": 1}, "tta.rotations: .* true or false"),
    ({"tta.max_pool": "yes"}, "max_pool"), ({"tta.whitening": 2}, "whitening"),
    ({"tta.whiten": True}, "did you mean tta.whitening"), ({"tta.rotation": True}, "did you mean tta.rotations"),
    ({"tta.max_pool": True, "size": 24}, "at least 32 pixels a side, got size 24"),
    ({"tta.views": 2, "phase1.augment": None}, "set it, or tta.views=0"),
    ({"tta.support_copies": 2, "phase1.augment": None}, "set it, or tta.support_copies=0"),
])
def test_bad_configs(changes, words):
    with pytest.raises(BadInput, match=words): with_overrides(preset("quick"), changes)


def test_records_of_earlier_versions():
    found = 0
    for file in (root/"data/results").glob("*.json"):
        record = json.loads(file.read_text(encoding="utf-8"))
        if "recipe_sha256" not in record: continue
        try: c = config_from_record(record["recipe"])
        except BadInput: continue
        found += c.tta != TTAConfig()
    assert found > 10


def test_each_option_makes_another_config():
    options = [{}, *(({name: True}) for name in ("rotations", "max_pool", "whitening")), dict(views=1),
               dict(support_copies=1)]
    assert len({replace(ExperimentConfig(), tta=TTAConfig(**o)).digest() for o in options}) == 6
    assert asdict(TTAConfig()) == dict(support_copies=0, views=0, rotations=False, max_pool=False, whitening=False)
