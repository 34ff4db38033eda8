"Numbers that are no longer finite: in phase 1, in phase 2, in the inner loop. Nothing of it is written or scored."
import json
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from test_run import banks  # noqa: F401

from mtl_nb.core import BadInput, Diverged
from mtl_nb.data.episodes import TaskShape
from mtl_nb.evaluation.exam import check_finite, count_right, evaluate, evaluate_head, make_exam, tune
from mtl_nb.evaluation.meta_test import Protocol, meta_test
from mtl_nb.experiments.config import preset
from mtl_nb.experiments.run import chance_note, run
from mtl_nb.methods.ablations import finetune
from mtl_nb.methods.base import get_inner, get_method, set_inner
from mtl_nb.models.base_learner import BaseLearner
from mtl_nb.models.heads import Prototypes
from mtl_nb.train.checkpoints import load_state
from mtl_nb.train.distributed import Runtime
from mtl_nb.train.meta_train import MTL, MetaTrainConfig, check_training, meta_state
from mtl_nb.train.pretrain import PretrainConfig, pretrain, pretrain_state


@pytest.fixture(scope="module")
def config():
    c = preset("quick", widths=(4, 4, 4, 4), eval_tasks=20, select_tasks=20, eval_every=8, shots=(1,), inner=(0.2, 3),
               query=3)
    return replace(c, phase1=replace(c.phase1, epochs=2), phase2=replace(c.phase2, tasks=16))


def one_line(e): return "\n" not in str(e.value)


# --- phase 1 -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("epochs", [1, 2])
def test_a_phase_1_that_diverges_writes_no_backbone(banks, config, tmp_path, epochs):
    "The first attempt and every --resume say the same: the rate, and what to try."
    wild = replace(config, phase1=replace(config.phase1, lr=1000., epochs=epochs))
    said = []
    for resume in False, True, True:
        with pytest.raises(Diverged, match="phase 1 .*lower phase1.lr") as e:
            run(wild, banks, tmp_path/"run", resume=resume)
        assert one_line(e) and "1000" in str(e.value)
        said.append(str(e.value))
    assert len(set(said)) == 1
    assert not list((tmp_path/"run").glob("*.safetensors")) and not (tmp_path/"run"/"results.json").exists()


def test_the_last_good_state_stays(banks, config, tmp_path):
    "A weight that becomes NaN in the second epoch: the state of the first is what --resume goes on from."
    three = replace(config, phase1=replace(config.phase1, epochs=3), methods=())
    def spoil(record):
        if record["phase"] == 1 and record["epoch"] == 2: raise InterruptedError
    with pytest.raises(InterruptedError): run(three, banks, tmp_path/"run", on_record=spoil)
    state = tmp_path/"run"/".phase1.state"
    before = state.read_bytes()
    with patch("torch.optim.SGD.step", lambda opt: opt.param_groups[0]["params"][0].data.fill_(float("nan"))):
        with pytest.raises(Diverged, match="^phase 1 has diverged: in epoch 2"):
            run(three, banks, tmp_path/"run", resume=True)
    assert state.read_bytes() == before and load_state(state)["train"]["done"] == 1
    assert run(three, banks, tmp_path/"run", resume=True)["rows"]


@pytest.mark.parametrize("ema", [0., .9])
def test_weights_are_looked_at_as_well_as_the_loss(banks, ema):
    "The loss is that of the weights before the last step."
    cfg = PretrainConfig(epochs=1, batch=120, lr=.1, ema=ema)
    state = pretrain_state(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(4)), 6, cfg, make=Tiny)
    step = state.opt.step
    def spoil():
        step()
        with torch.no_grad(): state.model.head.weight[0, 0] = float("inf")
    with patch.object(state.opt, "step", spoil), pytest.raises(Diverged, match="loss or weights"):
        list(pretrain(state, banks["train"], cfg))
    assert state.done == 0


class Tiny(torch.nn.Module):
    def __init__(self, net, n_classes, seed):
        super().__init__()
        self.net, self.head = net, torch.nn.Linear(4, n_classes)
        net(torch.zeros(1, 3, 32, 32))
    def forward(self, x): return self.head(self.net(x))


# --- exact chance --------------------------------------------------------------------------------------------------
def test_a_run_at_chance_says_so(banks, config, tmp_path, caplog):
    high = replace(config, phase1=replace(config.phase1, lr=30.), methods=())
    results = run(high, banks, tmp_path/"run")
    note, = results["notes"]
    assert results["rows"][0]["accuracy"] == 20 and results["rows"][0]["ci95"] == 0
    assert "at chance, 20 %" in note and "lower phase1.lr" in note and "\n" not in note
    assert note in caplog.messages
    assert json.loads((tmp_path/"run"/"results.json").read_text())["notes"] == [note]


@pytest.mark.parametrize("rows, is_chance", [
    ([(20., 0., 5)], True), ([(33.333, 0., 3)], True), ([(20.4, .5, 5), (19.7, .4, 5)], True), ([(20.6, .5, 5)], False),
    ([(20.1, .5, 5), (25., .4, 5)], False), ([(19., .5, 5)], False), ([(50., 0., 2)], True), ([(20., 0., 4)], False)])
def test_chance(rows, is_chance):
    note = chance_note([dict(accuracy=a, ci95=c, way=n) for a, c, n in rows])
    assert bool(note) is is_chance


# --- phase 2 -------------------------------------------------------------------------------------------------------
def test_a_method_that_diverges_is_left_out(banks, config, tmp_path, caplog):
    "The other rows are there, the note names method, step and rate, and --resume gives the same."
    wild = replace(config, centred=False, phase2=replace(config.phase2, lr=1000., head_lr=1000.),
                   methods=("MTL", "cosine classifier", "FT θ + HT"))
    results = run(wild, banks, tmp_path/"run")
    labels = [r["method"] for r in results["rows"]]
    assert labels[0] == "head only" and "MTL" not in labels and "cosine classifier" in labels
    note = next(o for o in results["notes"] if o.startswith("MTL, 1-shot, is left out: phase 2 has diverged: after "))
    assert "at rates 1000 and 1000" in note and "lower phase2.lr" in note and note in caplog.messages
    assert not (tmp_path/"run"/"mtl-1shot.safetensors").exists()
    assert run(wild, banks, tmp_path/"run", resume=True)["notes"] == results["notes"]


def test_divergence_in_the_middle_of_phase_2(banks, config, tmp_path, monkeypatch):
    "A weight that overflows between two checks: neither validated nor saved, and the best weights so far are no result."
    step, left = torch.optim.Adam.step, [3]
    def spoil(opt, *args):
        out = step(opt, *args)
        left[0] -= 1
        if left[0] == 0: opt.param_groups[0]["params"][0].data.view(-1)[0] = float("inf")
        return out
    saved = []
    monkeypatch.setattr(torch.optim.Adam, "step", spoil)
    one = replace(config, methods=("MTL", "ProtoNet"))
    results = run(one, banks, tmp_path/"run", Runtime(), on_record=saved.append)
    assert [r["method"] for r in results["rows"]] == ["head only", "ProtoNet"]
    assert any("MTL, 1-shot, is left out" in o for o in results["notes"])
    assert all(torch.tensor(o["loss"]).isfinite() for o in saved if "loss" in o)


def test_rates_of_methods_are_checked_at_the_start(banks, config, tmp_path):
    method = get_method("MTL")
    with patch.object(method, "lr", 1.), pytest.raises(BadInput, match="phase2: lr must be from 0 to 1000"):
        run(replace(config, phase2=replace(config.phase2, lr=10.)), banks, tmp_path/"run")
    assert not (tmp_path/"run").exists()


def test_weights_of_phase_2():
    state = meta_state(MTL(torch.nn.Flatten(), BaseLearner(4, 5)), MetaTrainConfig())
    check_training(state, MetaTrainConfig())
    state.model.base.bias.data[2] = float("nan")
    with pytest.raises(Diverged, match="the weights are not finite"): check_training(state, MetaTrainConfig())


# --- the inner loop ------------------------------------------------------------------------------------------------
SHAPE = TaskShape(5, 1, 3)

@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_a_task_without_finite_logits_has_no_right_answers(bad):
    "NaN is the highest of all for `argmax`: such a task would score exactly 1/N."
    z, y = torch.randn(3, 15, 5, generator=torch.Generator().manual_seed(0)), SHAPE.labels(3)
    want = (z.argmax(-1) == y).sum(-1)
    assert torch.equal(count_right(z, y), want)
    z[1, 4] = bad
    assert count_right(z, y).tolist() == [want[0], -1, want[2]]
    with pytest.raises(Diverged, match="diverges in 1 of 3 tasks at rate 0.1 with 20 steps") as e:
        check_finite(count_right(z, y), .1, 20)
    assert one_line(e)


def test_logits_of_all_sizes_that_are_finite_count(banks):
    for scale in 1e-38, 1e-4, 1e4, 1e30: assert (count_right(scale*torch.randn(4, 15, 5), SHAPE.labels(3)) >= 0).all()


@pytest.fixture(scope="module")
def exam(banks): return make_exam(banks["val"], SHAPE, 1, 40)

@pytest.fixture(scope="module")
def huge(banks): # features whose products overflow
    return 1e25*torch.randn(len(banks["val"]), 6, generator=torch.Generator().manual_seed(0))


def test_evaluation_of_features_that_are_too_large(exam, huge):
    with pytest.raises(Diverged, match="in 40 of 40 tasks"): evaluate(huge, exam, BaseLearner(6, 5))
    assert (evaluate_head(huge, exam, Prototypes(5)) == -1).all()
    with pytest.raises(Diverged, match="whatever the inner rate.*lower phase1.lr"): tune(huge, exam, BaseLearner(6, 5))


def test_the_grid_leaves_out_what_diverges(banks, exam):
    "A rate at which some tasks overflow is not chosen, however well the others do."
    feats = torch.nn.functional.one_hot(banks["val"].y, 5).float()
    lr, _, table = tune(feats, exam, BaseLearner(5, 5), rates=(.1, 1e38, 3e38), steps=(5, 200))
    assert lr == .1 and table[0].min() > .9 and table[2, 1] == -1


class Wild(MTL):
    "A model whose weights have left the finite numbers."
    def __init__(self):
        super().__init__(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3*32*32, 6)), BaseLearner(6, 5))
        self.backbone[1].weight.data.fill_(float("nan"))


def test_phase_3_of_a_model_that_is_not_finite(banks):
    with pytest.raises(Diverged, match="in 20 of 20 tasks"):
        meta_test(Wild(), banks["val"], Protocol("standard", SHAPE, 20))


@pytest.mark.parametrize("label", ["MTL", "ProtoNet", "MAML ResNet-12", "TADAM ResNet-12", "update [Θ;θ]",
                                   "SS [Θ;θ], batch statistics"])
def test_every_kind_of_method_sees_it(banks, exam, label):
    "Validation, the choice of the inner loop and the evaluation: on features, on images, with every weight adapted."
    method = get_method(label).variant(select_limit=3, eval_limit=3)
    with patch.multiple(method, inner_rates=method.inner_rates[:2], inner_steps=method.inner_steps[:1]):
        model = method.build(small_net(float("nan")), BaseLearner(4, 5), None, 32, 6)
        set_inner(model, *(a if a is None else b for a, b in zip(get_inner(model), (.1, 2))))
        calls = [lambda: method.validate(model, banks["val"], exam), lambda: method.tune(model, banks["val"], exam)]
        if method.meta: calls.append(lambda: method.evaluate(model, banks["val"], [Protocol("standard", SHAPE, 3)]))
        for call in calls if method.meta else calls[1:]:
            with pytest.raises(Diverged): call()


def small_net(value):
    from mtl_nb.models.resnet12 import ResNet12
    net = ResNet12((4, 4, 4, 4)).eval().requires_grad_(False)
    net.blocks[3].bn3.bias.data.fill_(value)
    return net
