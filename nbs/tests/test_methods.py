"Every method through a run, by one handle: names, files, hard tasks, kill and resume, a team."
import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from mtl_nb.models.base_learner import BaseLearner
from mtl_nb.train.checkpoints import load, save
from mtl_nb.cli import mtl_meta_test
from mtl_nb.methods.base import METHODS, get_method, get_inner, load_model, set_inner
from mtl_nb.core import BadInput
from mtl_nb.data.bank import ImageBank
from mtl_nb.train.distributed import ALONE, Team
from mtl_nb.data.episodes import TaskSampler, TaskShape
from mtl_nb.evaluation.exam import make_exam
from mtl_nb.experiments.run import run
from mtl_nb.data.glyphs import glyphs
from mtl_nb.data.hard_tasks import HardTaskSampler
from mtl_nb.evaluation.tta import TTA
from mtl_nb.evaluation.meta_test import Protocol, load_model, paper_protocol, row, table
from mtl_nb.train.meta_train import MetaTrainConfig, meta_state
from mtl_nb.experiments.config import preset
from test_run import killed_after, same

shape = TaskShape(5, 1, 2)
RIVALS = [k for k, c in METHODS.items() if c.slug.startswith(("maml", "proto", "cosine", "meta-b", "tadam"))]
ROWS = [k for k in METHODS if k not in RIVALS]
LONG = ("MAML 4-conv + HT", "TADAM ResNet-12 + HT")

far = TTA(TTAConfig(support_copies=2), augment=AugmentConfig(pad=3, jitter=.5))

def start(method, net, **more): return method.build(net, BaseLearner(net.num_features, 5, 0.1, 5), None, 16, 8, **more)


def test_names_are_distinct_and_lead_to_their_method():
    names = [n for c in METHODS.values() for n in {c.label, c.published, c.slug}]
    assert len(METHODS) == 32 and len(names) == len(set(names)) and all(get_method(n).label in METHODS for n in names)
    assert all(c.slug.isascii() and c.slug.replace("-", "").isalnum() and c.slug == c.slug.lower() for c in METHODS.values())
    paper = {"MAML 4-conv + HT": "maml-4-conv-ht", "MAML ResNet-12 + HT": "maml-resnet-12-ht", "TADAM ResNet-12": "tadam", "MTL + HT": "mtl-ht"}
    assert {k: get_method(k).slug for k in paper} == paper and get_method("tadam").stem(5) == "tadam-5shot"


@pytest.mark.parametrize("name", ["", "MAML", "maml-ht", "cosine-classifier-ht", "TADAM + ht"])
def test_unknown_method_is_refused_with_the_choices(name):
    with pytest.raises(BadInput) as e: get_method(name)
    assert "\n" not in str(e.value) and all(c.slug in str(e.value) for c in METHODS.values())


@pytest.mark.parametrize("label", METHODS)
def test_hard_tasks_are_hard(label, bank):
    c = METHODS[label]
    tasks = c.source(bank.by_class, shape, 4, 3, hard_count=7)
    assert type(tasks) is (HardTaskSampler if label.endswith(" + HT") else TaskSampler) and (not c.hard or c.meta)
    if c.hard: assert (tasks.random, tasks.hard_count) == (20, 7) and {**vars(METHODS[label.removesuffix(" + HT")]), **dict(label=0, published=0, slug=0, hard=0, make=0)} == {**vars(c), **dict(label=0, published=0, slug=0, hard=0, make=0)}


def test_rates_and_loops():
    cfg = MetaTrainConfig(lr=3e-3)
    assert get_method("mtl").config(cfg) == cfg and get_method("protonet").config(cfg).lr == pytest.approx(3e-4) and get_method("maml-4-conv").config(cfg).lr == pytest.approx(3e-3)
    assert [k for k, c in METHODS.items() if c.loop.__name__ == "co_train"] == ["TADAM", "TADAM + HT"]


@pytest.mark.parametrize("label", METHODS)
def test_look_choose_and_sit_agree(label, net, bank):
    c = replace(METHODS[label], few=6, most=4, steps=METHODS[label].steps[:1 if label.startswith("update [") else 2])
    model, exam = start(c, net), make_exam(bank, shape, 1, 6)
    if c.label == "update [Θ;θ]": set_inner(model, .01, 20)
    kept, before = {k: v.clone() for k, v in model.state_dict().items()}, get_inner(model)
    seen = c.look(model, bank, exam)
    assert 0 <= seen <= 1 and get_inner(model) == before
    best = c.choose(model, bank, exam)
    lr, steps = get_inner(model)
    assert lr in c.rates and steps in c.steps and c.look(model, bank, exam) == pytest.approx(best)
    results = c.sit(model, bank, [Protocol("standard", shape, 5), paper_protocol(1)], "val")
    assert [r.protocol.name for r in results] == ["standard", "paper"][:1 + c.cached] and all(len(r.correct) == 4 for r in results)
    assert [(r.lr, r.steps) for r in results] == [(lr, steps), (0.01, 100) if lr else (None, None)][:1 + c.cached]
    assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items())


def test_order_of_the_recipe_holds_for_all(net):
    for name in "maml-4-conv", "maml-resnet-12", "mtl":
        order = lambda o: (lambda m: getattr(m, "order", m.base.__dict__.get("order")))(get_method(name).build(net, BaseLearner(8, 5, 0.1, 5, o)))
        assert (order(1), order(2)) == (1, 2)
    assert get_method("maml-4-conv-first-order").build(net, BaseLearner(8, 5)).order == 1


def test_copies_join_where_features_are_made_once(net, bank):
    exam = make_exam(bank, shape, 1, 60)
    for name in "mtl", "protonet":
        c = get_method(name)
        model, p = start(c, net), Protocol("standard", shape, 60)
        plain, more = (c.sit(model, bank, [p], "val", looks=o)[0].correct for o in (TTA(), far))
        assert not torch.equal(plain, more)
        other, mirrored = (c.sit(model, bank, [p, paper_protocol(1)], "val", looks=o)[1].correct for o in (TTA(), far))
        assert torch.equal(other, mirrored)   # the authors' protocol has its own


def test_copies_join_as_images_what_they_join_as_features(net, bank):
    "The whole network at rest, and prototypes through a network that no task turns: the same answers by either way."
    exam = make_exam(bank, shape, 1, 40)
    head, whole = (get_method(o) for o in ("update θ", "update [Θ;θ]"))
    right = lambda c, m, rates, looks: c.right(m, bank, exam, rates, (1, 3), False, ALONE, looks)
    a, b = start(head, net), start(whole, net)
    b.base.lr = 0.1   # the head's rate
    assert torch.equal(right(head, a, (0.1,), far), right(whole, b, (0.,), far)) and not torch.equal(right(head, a, (0.1,), TTA()), right(head, a, (0.1,), far))
    proto, tadam = (start(get_method(o), net) for o in ("protonet", "tadam"))
    ask = lambda name, m, looks: get_method(name).right(m, bank, exam, (None,), (None,), False, ALONE, looks)
    assert torch.equal(ask("protonet", proto, far), ask("tadam", tadam, far)) and torch.equal(ask("protonet", proto, TTA()), ask("tadam", tadam, TTA()))


@pytest.mark.parametrize("name", ["maml-resnet-12", "maml-4-conv", "update-head-batch-statistics"])
def test_copies_join_where_images_are_asked(name, net, bank):
    exam = make_exam(bank, shape, 1, 40)
    c = get_method(name)
    model = start(c, net)
    plain, more, mirrored = (c.right(model, bank, exam, c.rates[-1:], c.steps[:1], m, ALONE, e) for m, e in ((False, TTA()), (False, far), (True, far)))
    assert not torch.equal(plain, more) and torch.equal(mirrored, c.right(model, bank, exam, c.rates[-1:], c.steps[:1], True, ALONE, TTA()))


@pytest.mark.parametrize("name", ["mtl", "protonet", "cosine-classifier", "tadam", "maml-resnet-12", "update-theta"])
def test_an_exam_of_another_n_is_refused(name, net, bank):
    c = get_method(name)
    with pytest.raises(BadInput, match="the model answers 5-way tasks, the exam asks 3-way ones"): c.sit(start(c, net), bank, [Protocol("standard", TaskShape(3, 1, 2), 4)], "val")


@pytest.mark.parametrize("label", ["MTL", "ProtoNet", "TADAM", "MAML 4-conv", "update [Θ;θ]", "update θ, batch statistics"])
def test_processes_share_the_tasks(label, net, bank):
    class Part(Team):   # each rank's share, uncut
        def cat(self, x, n): return x
        def sum(self, tensors): pass
    c, exam = get_method(label), make_exam(bank, shape, 1, 7)
    model = start(c, net)
    ask = lambda team: c.right(model, bank, exam, (c.rates[0],), c.steps[:2], False, team)
    if c.cached: return   # features are shared, too: see test_several_processes
    if label.endswith("statistics"): return   # likewise
    assert torch.equal(torch.cat([ask(Part(r, 3)) for r in range(3)], -1), ask(ALONE))


# Through a run
@pytest.fixture(scope="module")
def banks():
    torch.set_num_threads(1)
    return {k: b.subset(range(6)) for k, b in glyphs(0).items()}


@pytest.fixture(scope="module")
def small(banks):
    "The same at 16 pixels a side, where adapting whole networks is quick."
    return {k: ImageBank(b.x[:, :, ::2, ::2].contiguous(), b.y, b.names) for k, b in banks.items()}


@pytest.fixture(scope="module")
def recipe():
    r = preset("quick", widths=(4, 4, 4, 4), tasks=6, select=6, every=8, shots=(1,), inner=(0.2, 3), query=2)
    return replace(r, phase1=replace(r.phase1, epochs=1), phase2=replace(r.phase2, tasks=8))


@pytest.fixture(scope="module")
def everybody(small, recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("all")/"run"
    methods = tuple(METHODS[k].published for k in RIVALS)
    return run(replace(recipe, methods=methods, paper=True), small, out), methods, out


def test_every_rival_in_a_run(everybody):
    results, methods, out = everybody
    rows = [r for r in results["rows"] if r["protocol"] == "standard"]
    assert [r["method"] for r in rows] == ["head only", *methods] and len({r["exam"] for r in rows}) == 1 and all("paired" in r for r in rows[1:])
    assert [r["method"] for r in results["rows"] if r["protocol"] == "paper"] == ["head only"] + [m for m in methods if get_method(m).cached]
    for r in rows[1:]:
        c = get_method(r["method"])
        assert (r["lr"] is None, r["steps"] is None) == (c.rates[0] is None,)*2 and r["lr"] in c.rates and r["steps"] in c.steps and ("trained_tasks" in r) == c.meta
    assert sorted(p.name for p in out.glob("*.safetensors")) == sorted(["pretrain.safetensors", *(f"{get_method(m).stem(1)}.safetensors" for m in methods if get_method(m).meta)])
    assert set(results["curves"]) == {get_method(m).stem(1) for m in methods if get_method(m).meta} and all(m in table(results) for m in methods)
    log = [json.loads(o) for o in (out/"log.jsonl").read_text().splitlines()]
    assert {bool("auxiliary" in r) for r in log if str(r.get("run")).startswith("tadam") and r["tasks"]} == {True}


def test_weights_load_and_answer_the_same(everybody, small):
    results, methods, out = everybody
    for m in methods:
        if not get_method(m).meta: continue
        method, model, record = load_model(out/f"{get_method(m).stem(1)}.safetensors")
        got = method.sit(model, small["test"], [Protocol("standard", TaskShape(5, 1, 2), 6)])[0]
        mine = next(r for r in results["rows"] if (r["method"], r["protocol"]) == (m, "standard"))
        assert (method.published, record["size"], record["hard"]) == (m, 16, m.endswith("+ HT")) and row(m, got, 0)["correct"] == mine["correct"]
        assert not any(p.requires_grad for p in model.parameters())


def test_a_run_folder_is_examined_whole(everybody, small, tmp_path, monkeypatch, capsys):
    results, methods, out = everybody
    for i, (image, y) in enumerate(zip(small["test"].x, small["test"].y)):
        (place := tmp_path/"set/test"/small["test"].names[y]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(place/f"{i}.png")
    monkeypatch.setenv("MTL_NB_CACHE", str(tmp_path/"cache"))
    assert mtl_meta_test(weights=str(out), data=str(tmp_path/"set"), tasks=6, query=2) == 0
    said = capsys.readouterr().out
    want = table(results | dict(rows=[r for r in results["rows"] if r["protocol"] == "standard"])).split("\n")
    assert said.strip().split("\n")[-len(methods) - 1:] == want[-len(methods) - 2:-1]
    assert mtl_meta_test(weights=str(out/"tadam-1shot.safetensors"), data=str(tmp_path/"set"), tasks=601, query=2) == 0
    assert "TADAM ResNet-12, 1-shot: takes long, and sits the first 600 tasks" in capsys.readouterr().out
    assert mtl_meta_test(weights=str(out/"maml-4-conv-1shot.safetensors"), data=str(tmp_path/"set"), tasks=6, query=2, size=20) == 2
    assert "set --size 16" in capsys.readouterr().err


def test_a_network_from_nothing_is_whole_in_its_file(everybody, small):
    _, _, out = everybody
    tensors, _ = load(out/"maml-4-conv-1shot.safetensors")
    assert set(tensors) == set(get_method("maml-4-conv").start(load_model(out/"pretrain.safetensors")[0].backbone, BaseLearner(4, 5), size=16).state_dict())
    method, model, _ = load_model(out/"maml-4-conv-1shot.safetensors")
    with pytest.raises(BadInput, match="16 x 16 pixels only, these have 32 x 32: set --size 16"): method.sit(model, glyphs(0)["test"], [Protocol()])


@pytest.mark.parametrize("change, words", [
    (lambda t, r: t.pop("base.weight"), "does not hold what 'TADAM ResNet-12' trains"), (lambda t, r: t.update(odd=torch.zeros(1)), "and nothing else"),
    (lambda t, r: r.pop("way"), "does not tell its way"), (lambda t, r: r.update(method="ProtoNet"), "does not hold what 'ProtoNet' trains"),
    (lambda t, r: r.update(method="MAMA"), "no method 'MAMA'"), (lambda t, r: r.update(kind="backbone"), "expected 'mtl'"), (lambda t, r: r.update(backbone_sha256="0"), "is not the backbone")])
def test_what_is_not_its_own_is_refused(everybody, tmp_path, change, words):
    _, _, out = everybody
    tensors, record = load(out/"tadam-1shot.safetensors")
    (tmp_path/"pretrain.safetensors").write_bytes((out/"pretrain.safetensors").read_bytes())
    change(tensors, record)
    save(tmp_path/"tadam-1shot.safetensors", tensors, record)
    with pytest.raises(BadInput) as e: load_model(tmp_path/"tadam-1shot.safetensors")
    assert words in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("label", ROWS)
def test_every_row_loads_by_its_handle(label, net, bank, tmp_path):
    "A row's file, as phase 2 leaves it."
    from mtl_nb.methods.ablations import trained
    from mtl_nb.core import sha256
    c = METHODS[label]
    if not c.meta: return
    save(tmp_path/"pretrain.safetensors", net.state_dict(), dict(kind="backbone", widths=list(net.widths), drop=0.3, classes=bank.names))
    model, cfg = start(c, net), c.config(MetaTrainConfig(tasks=4, batch=4))
    list(c.loop(meta_state(model, cfg), c.source(bank.by_class, shape, 4), bank, cfg))
    record = dict(kind="mtl", method=c.published, way=5, shot=1, hard=c.hard, lr=.1, steps=5, backbone="pretrain.safetensors", backbone_sha256=sha256(tmp_path/"pretrain.safetensors"))
    save(tmp_path/"w.safetensors", trained(model), record)
    method, again, _ = load_model(tmp_path/"w.safetensors")
    assert method is c and all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items()) and get_inner(again) == (.1, 5)


@pytest.fixture(scope="module")
def long(small, recipe, tmp_path_factory):
    out, few = tmp_path_factory.mktemp("long")/"run", replace(recipe, methods=LONG, phase2=replace(recipe.phase2, tasks=32))
    return run(few, small, out), few, out


def test_hard_tasks_are_among_those_trained_on(long):
    log = [json.loads(o) for o in (long[2]/"log.jsonl").read_text().splitlines()]
    for m in LONG: assert {r["hard"] for r in log if r.get("run") == get_method(m).stem(1) and r["tasks"]} == {True, False}


@pytest.mark.parametrize("after", [3, 6, 8])
def test_killed_and_resumed(long, small, tmp_path, monkeypatch, after):
    expected, few, out = long
    with killed_after(after, monkeypatch): run(few, small, tmp_path/"run")
    assert same(run(few, small, tmp_path/"run", resume=True), expected)
    assert (tmp_path/"run/log.jsonl").read_text() == (out/"log.jsonl").read_text()
    for m in LONG:
        a, b = (load(o/f"{get_method(m).stem(1)}.safetensors")[0] for o in (out, tmp_path/"run"))
        assert all(torch.equal(v, b[k]) for k, v in a.items())


def test_doubled_under_another_name(small, recipe, tmp_path):
    for names in (("TADAM", "TADAM ResNet-12"), ("protonet", "ProtoNet")):
        with pytest.raises(BadInput, match="must be different"): run(replace(recipe, methods=names), small, tmp_path/"run")
    assert not list(tmp_path.iterdir())


def test_pictures_of_two_sizes(recipe, banks, small, tmp_path):
    "Then the small network does not flatten its features, and answers pictures of both."
    results = run(replace(recipe, methods=("MAML 4-conv, first order",)), dict(banks, test=small["test"]), tmp_path/"run")
    assert load(tmp_path/"run/maml-4-conv-first-order-1shot.safetensors")[1]["size"] == 0 and len(results["rows"]) == 2
