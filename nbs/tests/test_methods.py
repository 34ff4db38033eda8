"Every method through an experiment, by one class: names, files, hard tasks, kill and resume, a team."
import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from mtl_nb.cli import main
from mtl_nb.core import BadInput, sha256
from mtl_nb.data.augment import AugmentConfig
from mtl_nb.data.bank import ImageBank
from mtl_nb.data.episodes import TaskSampler, TaskShape
from mtl_nb.data.glyphs import glyphs
from mtl_nb.data.hard_tasks import HardTaskSampler
from mtl_nb.evaluation.exam import make_exam
from mtl_nb.evaluation.meta_test import Protocol, paper_protocol
from mtl_nb.evaluation.tta import TTA, TTAConfig
from mtl_nb.experiments.config import preset
from mtl_nb.experiments.records import make_row, results_table
from mtl_nb.experiments.run import run
from mtl_nb.methods.base import METHODS, get_inner, get_method, load_model, set_inner, trained
from mtl_nb.methods.tadam import TADAMMethod
from mtl_nb.models.base_learner import BaseLearner
from mtl_nb.train.checkpoints import load, load_backbone, save
from mtl_nb.train.distributed import ALONE, Team
from mtl_nb.train.meta_train import MetaTrainConfig, meta_state
from test_run import killed_after, same, short_grid

shape = TaskShape(5, 1, 2)
OTHERS = [k for k, m in METHODS.items() if m.group.startswith("others")]
ROWS = [k for k in METHODS if k not in OTHERS]
LONG = ("MAML 4-conv + HT", "TADAM ResNet-12 + HT")
COPIES = TTA(TTAConfig(support_copies=2), augment=AugmentConfig(pad=3, jitter=.5))


class Part(Team):
    "A rank whose share is not gathered with the others'."
    def all_gather(self, x, n): return x
    def all_reduce(self, tensors): pass


def start(method, net): return method.build(net, BaseLearner(net.num_features, 5, 0.1, 5), None, 16, 8)


def test_names_are_distinct_and_lead_to_their_method():
    names = [n for m in METHODS.values() for n in {m.label, m.slug, *m.aliases}]
    assert len(METHODS) == 32 and len(names) == len(set(names))
    assert all(get_method(n) is m for m in METHODS.values() for n in (m.label, m.slug, *m.aliases))
    slugs = [m.slug for m in METHODS.values()]
    assert all(o.isascii() and o.replace("-", "").isalnum() and o == o.lower() for o in slugs)
    paper = {"MAML 4-conv + HT": "maml-4-conv-ht", "MAML ResNet-12 + HT": "maml-resnet-12-ht",
             "TADAM ResNet-12": "tadam", "MTL + HT": "mtl-ht"}
    assert {k: get_method(k).slug for k in paper} == paper
    assert get_method("tadam").file_stem(5) == "tadam-5shot"


@pytest.mark.parametrize("name", ["", "MAML", "maml-ht", "cosine-classifier-ht", "TADAM + ht"])
def test_unknown_method_is_refused_with_the_choices(name):
    with pytest.raises(BadInput) as e: get_method(name)
    assert "\n" not in str(e.value) and all(m.slug in str(e.value) for m in METHODS.values())


@pytest.mark.parametrize("label", METHODS)
def test_hard_tasks_are_hard(label, bank):
    method = METHODS[label]
    tasks = method.task_sampler(bank.by_class, shape, 4, 3, hard_count=7)
    assert type(tasks) is (HardTaskSampler if label.endswith(" + HT") else TaskSampler)
    assert not method.hard or method.meta
    if not method.hard: return
    assert (tasks.random, tasks.hard_count) == (20, 7)
    twin, names = METHODS[label.removesuffix(" + HT")], dict.fromkeys(("label", "aliases", "slug", "group", "hard"))
    assert vars(method) | names == vars(twin) | names and type(method) is type(twin)


def test_rates_and_loops():
    cfg = MetaTrainConfig(lr=3e-3)
    assert get_method("mtl").config(cfg) == cfg
    assert get_method("protonet").config(cfg).lr == pytest.approx(3e-4)
    assert get_method("maml-4-conv").config(cfg).lr == pytest.approx(3e-3)
    own = [k for k, m in METHODS.items() if type(m).train is TADAMMethod.train]
    assert own == ["TADAM ResNet-12", "TADAM ResNet-12 + HT"]


@pytest.mark.parametrize("label", METHODS)
def test_validate_tune_and_evaluate_agree(label, net, bank):
    method = METHODS[label]
    steps = method.inner_steps[:1 if label.startswith("update [") else 2]
    method = method.variant(select_limit=6, eval_limit=4, inner_steps=steps)
    model, exam = start(method, net), make_exam(bank, shape, 1, 6)
    if label == "update [Θ;θ]": set_inner(model, .01, 20)
    kept, before = {k: v.clone() for k, v in model.state_dict().items()}, get_inner(model)
    assert 0 <= method.validate(model, bank, exam) <= 1 and get_inner(model) == before
    best = method.tune(model, bank, exam)
    lr, steps = get_inner(model)
    assert lr in method.inner_rates and steps in method.inner_steps
    assert method.validate(model, bank, exam) == pytest.approx(best)
    results, n = method.evaluate(model, bank, [Protocol("standard", shape, 5), paper_protocol(1)], "val"), 1
    if method.caches_features: n = 2
    assert [r.protocol.name for r in results] == ["standard", "paper"][:n] and all(len(r.correct) == 4 for r in results)
    assert [(r.lr, r.steps) for r in results] == [(lr, steps), (0.01, 100) if lr else (None, None)][:n]
    assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items())


def test_order_of_the_config_holds_for_all(net):
    def order(name, o):
        model = get_method(name).build(net, BaseLearner(8, 5, 0.1, 5, o))
        return getattr(model, "order", model.base.__dict__.get("order"))
    for name in "maml-4-conv", "maml-resnet-12", "mtl": assert (order(name, 1), order(name, 2)) == (1, 2)
    assert get_method("maml-4-conv-first-order").build(net, BaseLearner(8, 5)).order == 1


def test_copies_join_where_features_are_made_once(net, bank):
    for name in "mtl", "protonet":
        method = get_method(name)
        model, both = start(method, net), [Protocol("standard", shape, 60), paper_protocol(1)]
        plain, more = (method.evaluate(model, bank, both, "val", tta=o) for o in (TTA(), COPIES))
        assert not torch.equal(plain[0].correct, more[0].correct)
        assert torch.equal(plain[1].correct, more[1].correct) # the authors' protocol has mirror images of its own


def test_copies_join_as_images_what_they_join_as_features(net, bank):
    "All weights at rest, and prototypes on a backbone that no task changes: the same answers by either way."
    exam = make_exam(bank, shape, 1, 40)
    def count(name, model, tta, rates=(None,), steps=(None,)):
        return get_method(name).count_correct(model, bank, exam, rates, steps, False, ALONE, tta)
    head, whole, proto, tadam = (start(get_method(o), net) for o in ("update θ", "update [Θ;θ]", "protonet", "tadam"))
    whole.base.lr = 0.1 # the head's rate
    want = count("update θ", head, COPIES, (0.1,), (1, 3))
    assert torch.equal(want, count("update [Θ;θ]", whole, COPIES, (0.,), (1, 3)))
    assert not torch.equal(want, count("update θ", head, TTA(), (0.1,), (1, 3)))
    for tta in COPIES, TTA(): assert torch.equal(count("protonet", proto, tta), count("tadam", tadam, tta))


@pytest.mark.parametrize("name", ["maml-resnet-12", "maml-4-conv", "update-head-batch-statistics"])
def test_copies_join_where_images_are_asked(name, net, bank):
    exam, method = make_exam(bank, shape, 1, 40), get_method(name)
    model, rates, steps = start(method, net), method.inner_rates[-1:], method.inner_steps[:1]
    def count(mirrored, tta): return method.count_correct(model, bank, exam, rates, steps, mirrored, ALONE, tta)
    assert not torch.equal(count(False, TTA()), count(False, COPIES))
    assert torch.equal(count(True, COPIES), count(True, TTA()))


@pytest.mark.parametrize("name", ["mtl", "protonet", "cosine-classifier", "tadam", "maml-resnet-12", "update-theta"])
def test_an_exam_of_another_n_is_refused(name, net, bank):
    method = get_method(name)
    with pytest.raises(BadInput, match="5-way tasks.* 3-way"):
        method.evaluate(start(method, net), bank, [Protocol("standard", TaskShape(3, 1, 2), 4)], "val")


@pytest.mark.parametrize("label", ["TADAM", "MAML 4-conv", "update [Θ;θ]"])
def test_processes_share_the_tasks(label, net, bank):
    "For methods whose features are shared, too, see test_several_processes."
    method, exam = get_method(label), make_exam(bank, shape, 1, 7)
    model, rates, steps = start(method, net), method.inner_rates[:1], method.inner_steps[:2]
    def count(team): return method.count_correct(model, bank, exam, rates, steps, False, team)
    assert torch.equal(torch.cat([count(Part(r, 3)) for r in range(3)], -1), count(ALONE))


# Through an experiment
@pytest.fixture(scope="module")
def banks():
    torch.set_num_threads(1)
    return {k: b.subset(range(6)).first(20) for k, b in glyphs(0).items()}


@pytest.fixture(scope="module")
def small(banks):
    "The same at 16 pixels a side, where adapting whole networks is quick."
    return {k: ImageBank(b.x[:, :, ::2, ::2].contiguous(), b.y, b.names) for k, b in banks.items()}


@pytest.fixture(scope="module")
def config():
    c = preset("quick", widths=(4, 4, 4, 4), eval_tasks=6, select_tasks=6, eval_every=8, shots=(1,), inner=(0.2, 3),
               query=2)
    return replace(c, phase1=replace(c.phase1, epochs=1), phase2=replace(c.phase2, tasks=8))


@pytest.fixture(scope="module")
def everybody(small, config, tmp_path_factory):
    out = tmp_path_factory.mktemp("all")/"run"
    config = replace(config, methods=tuple(OTHERS), paper_protocol=True)
    with short_grid(*(o for o in OTHERS if o.startswith("MAML"))): return run(config, small, out), tuple(OTHERS), out


def test_every_other_method_in_an_experiment(everybody):
    results, labels, out = everybody
    methods = [get_method(o) for o in labels]
    rows = [r for r in results["rows"] if r["protocol"] == "standard"]
    assert [r["method"] for r in rows] == ["head only", *labels]
    assert len({r["exam"] for r in rows}) == 1 and all("paired" in r for r in rows[1:])
    paper = [r["method"] for r in results["rows"] if r["protocol"] == "paper"]
    assert paper == ["head only"] + [m.label for m in methods if m.caches_features]
    for r, m in zip(rows[1:], methods):
        assert (r["lr"] is None, r["steps"] is None) == (m.inner_rates[0] is None,)*2
        assert r["lr"] in m.inner_rates and r["steps"] in m.inner_steps and ("trained_tasks" in r) == m.meta
    stems = {m.file_stem(1) for m in methods if m.meta}
    assert {p.name for p in out.glob("*.safetensors")} == {f"{o}.safetensors" for o in stems | {"pretrain"}}
    assert set(results["curves"]) == stems and all(o in results_table(results) for o in labels)
    log = [json.loads(o) for o in (out/"log.jsonl").read_text().splitlines()]
    tadam = [r for r in log if str(r.get("run")).startswith("tadam") and r["tasks"]]
    assert {bool("auxiliary" in r) for r in tadam} == {True}


def test_weights_load_and_answer_the_same(everybody, small):
    results, labels, out = everybody
    for label in labels:
        if not get_method(label).meta: continue
        method, model, record = load_model(out/f"{get_method(label).file_stem(1)}.safetensors")
        got = method.evaluate(model, small["test"], [Protocol("standard", TaskShape(5, 1, 2), 6)])[0]
        mine = next(r for r in results["rows"] if (r["method"], r["protocol"]) == (label, "standard"))
        assert (method.label, record["size"], record["hard"]) == (label, 16, label.endswith("+ HT"))
        assert make_row(label, got, 0)["correct"] == mine["correct"]
        assert not any(p.requires_grad for p in model.parameters())


def test_a_run_folder_is_evaluated_whole(everybody, small, tmp_path, monkeypatch, capsys):
    results, labels, out = everybody
    for i, (image, y) in enumerate(zip(small["test"].x, small["test"].y)):
        place = tmp_path/"set/test"/small["test"].names[y]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(place/f"{i}.png")
    monkeypatch.setenv("MTL_NB_CACHE", str(tmp_path/"cache"))
    def command(name, tasks, *more):
        words = ["test", "--weights", str(out/name), "--data", str(tmp_path/"set"), "--tasks", str(tasks)]
        return main([*words, "--query", "2", *more])
    assert command("", 6) == 0
    said = capsys.readouterr().out
    standard = [r for r in results["rows"] if r["protocol"] == "standard"]
    want = results_table(results | dict(rows=standard)).split("\n")
    assert said.strip().split("\n")[-len(labels) - 1:] == want[-len(labels) - 2:-1]
    assert command("tadam-1shot.safetensors", 601) == 0
    said = capsys.readouterr()
    assert "TADAM ResNet-12, 1-shot" in said.out + said.err and "first 600 tasks" in said.out + said.err
    assert command("maml-4-conv-1shot.safetensors", 6, "--size", "20") == 2
    assert "set --size 16" in capsys.readouterr().err


def test_a_network_from_nothing_is_whole_in_its_file(everybody):
    _, _, out = everybody
    tensors, _ = load(out/"maml-4-conv-1shot.safetensors")
    net = load_backbone(out/"pretrain.safetensors")[0]
    assert set(tensors) == set(get_method("maml-4-conv").build(net, BaseLearner(4, 5), size=16).state_dict())
    method, model, _ = load_model(out/"maml-4-conv-1shot.safetensors")
    with pytest.raises(BadInput, match="16 x 16 pixels, these have 32 x 32: set --size 16"):
        method.evaluate(model, glyphs(0)["test"], [Protocol()])


@pytest.mark.parametrize("change, words", [
    (lambda t, r: t.pop("base.weight"), "does not hold exactly the tensors that 'TADAM ResNet-12' trains"),
    (lambda t, r: t.update(odd=torch.zeros(1)), "does not hold exactly the tensors"),
    (lambda t, r: r.pop("way"), "lacks way"),
    (lambda t, r: r.update(method="ProtoNet"), "does not hold exactly the tensors that 'ProtoNet' trains"),
    (lambda t, r: r.update(method="MAMA"), "no method 'MAMA'"),
    (lambda t, r: r.update(kind="backbone"), "expected 'mtl'"),
    (lambda t, r: r.update(backbone_sha256="0"*64), "is not the backbone")])
def test_what_is_not_its_own_is_refused(everybody, tmp_path, change, words):
    _, _, out = everybody
    tensors, record = load(out/"tadam-1shot.safetensors")
    (tmp_path/"pretrain.safetensors").write_bytes((out/"pretrain.safetensors").read_bytes())
    change(tensors, record)
    save(tmp_path/"tadam-1shot.safetensors", tensors, record)
    with pytest.raises(BadInput) as e: load_model(tmp_path/"tadam-1shot.safetensors")
    assert words in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("label", [k for k in ROWS if METHODS[k].meta])
def test_every_row_loads_by_its_method(label, net, bank, tmp_path):
    "A row's file, as phase 2 leaves it."
    method, theta = METHODS[label], tmp_path/"pretrain.safetensors"
    save(theta, net.state_dict(), dict(kind="backbone", widths=list(net.widths), dropout=0.3, classes=bank.names))
    model, cfg = start(method, net), method.config(MetaTrainConfig(tasks=4, batch=4))
    list(method.train(meta_state(model, cfg), method.task_sampler(bank.by_class, shape, 4), bank, cfg))
    record = dict(kind="mtl", method=method.label, way=5, shot=1, hard=method.hard, lr=.1, steps=5,
                  backbone=theta.name, backbone_sha256=sha256(theta))
    save(tmp_path/"w.safetensors", trained(model), record)
    found, again, _ = load_model(tmp_path/"w.safetensors")
    assert found is method and get_inner(again) == (.1, 5)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


@pytest.fixture(scope="module")
def long(small, config, tmp_path_factory):
    out = tmp_path_factory.mktemp("long")/"run"
    config = replace(config, methods=LONG, phase2=replace(config.phase2, tasks=32))
    with short_grid(LONG[0]): return run(config, small, out), config, out


def test_hard_tasks_are_among_those_trained_on(long):
    log = [json.loads(o) for o in (long[2]/"log.jsonl").read_text().splitlines()]
    for m in LONG:
        mine = [r for r in log if r.get("run") == get_method(m).file_stem(1) and r["tasks"]]
        assert {r["hard"] for r in mine} == {True, False}


@pytest.mark.parametrize("after", [6, *(pytest.param(o, marks=pytest.mark.slow) for o in (3, 8))])
def test_killed_and_resumed(long, small, tmp_path, monkeypatch, after):
    expected, config, out = long
    with short_grid(LONG[0]):
        with killed_after(after, monkeypatch): run(config, small, tmp_path/"run")
        assert same(run(config, small, tmp_path/"run", resume=True), expected)
    assert (tmp_path/"run/log.jsonl").read_text() == (out/"log.jsonl").read_text()
    for m in LONG:
        a, b = (load(o/f"{get_method(m).file_stem(1)}.safetensors")[0] for o in (out, tmp_path/"run"))
        assert all(torch.equal(v, b[k]) for k, v in a.items())


def test_the_same_method_under_another_name(small, config, tmp_path):
    for names in ("TADAM", "TADAM ResNet-12"), ("protonet", "ProtoNet"):
        with pytest.raises(BadInput, match="must be different"):
            run(replace(config, methods=names), small, tmp_path/"run")
    assert not list(tmp_path.iterdir())


def test_images_of_two_sizes(config, banks, small, tmp_path):
    "Then the small network does not flatten its feature maps, and answers images of both."
    config = replace(config, methods=("MAML 4-conv, first order",))
    results = run(config, dict(banks, test=small["test"]), tmp_path/"run")
    record = load(tmp_path/"run/maml-4-conv-first-order-1shot.safetensors")[1]
    assert record["size"] == 0 and len(results["rows"]) == 2
