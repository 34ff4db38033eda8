"A campaign: plans refused in words, stopped and resumed, failures that stop nobody else, weights in half the space."
import json
import sys
import time
from dataclasses import replace
from math import inf
from pathlib import Path

import pytest
import torch

from mtl_nb import campaign as module
from mtl_nb import weights
from mtl_nb.campaign import Job, campaign, mtl_campaign, overview, read_plan
from mtl_nb.checkpoints import RunFolder, load, read_json, save, sha256
from mtl_nb.contenders import load_method
from mtl_nb.data import BadInput, ImageBank
from mtl_nb.devices import Machine, Team, TimeUp
from mtl_nb.episodes import TaskShape
from mtl_nb.glyphs import glyphs
from mtl_nb.meta_test import Protocol, load_model, meta_test, read_backbone
from mtl_nb.recipes import Recipe
from mtl_nb.weights import publish

PLANS = Path(__file__).parents[2]/"data/plans"


@pytest.fixture(scope="module")
def banks():
    def few(bank):
        idx = torch.cat([o[:20] for o in bank.by_class[:6]])
        return ImageBank(bank.x[idx, :, ::2, ::2], bank.y[idx], bank.names[:6])
    return {k: few(b) for k, b in glyphs(0).items()}


@pytest.fixture(scope="module")
def whole(banks, tmp_path_factory):
    "The toy plan from end to end, never stopped."
    out = tmp_path_factory.mktemp("whole")
    return out, campaign(read_plan(PLANS/"toy.json"), lambda *_: banks, out)


def write(path, *entries): path.write_text(json.dumps(entries)); return path

GOOD = dict(name="good", data="glyphs", preset="quick")
NEXT = dict(GOOD, name="next")

@pytest.mark.parametrize("entry, words", [
    (dict(NEXT, sets={}), "a job has no 'sets'"),
    (dict(NEXT, name="../up"), "a job needs a 'name'"),
    (dict(data="glyphs", preset="quick"), "a job needs a 'name'"),
    (dict(NEXT, name=7), "'name' cannot be 7"),
    (GOOD, "an earlier job has the same name"),
    (dict(NEXT, data="glyfs"), "no data set and no folder 'glyfs'"),
    (dict(name="next", preset="quick"), "no data set and no folder ''"),
    (dict(name="next", data="glyphs"), "it needs a 'preset'"),
    (dict(NEXT, preset="huge"), "no preset 'huge'"),
    (dict(NEXT, methods="mtl,mlt"), "no method 'mlt'"),
    (dict(NEXT, methods=[["mtl"]]), "no method"),
    (dict(NEXT, methods=5), "'methods' cannot be 5"),
    (dict(NEXT, set={"phase1.epoch": 3}), "no 'phase1.epoch'"),
    (dict(NEXT, set={"phase1.epochs": "many"}), 'epochs must be a whole number, got "many"'),
    (dict(NEXT, set={"phase1.augment.zom": .5}), "a recipe has no 'phase1.augment.zom'"),
    (dict(NEXT, set={"extras.turns": 2.}), "turns must be between 0 and 1"),
    (dict(NEXT, set={"seed": 3}), "'seed' is not to be set this way"),
    (dict(NEXT, set={"exam": "train"}), "--exam is test or val"),
    (dict(NEXT, set=[1]), "'set' cannot be [1]"),
    (dict(NEXT, shots=[]), "'shots' must be different whole numbers"),
    (dict(NEXT, shots=[1, 1]), "'shots' must be different whole numbers"),
    (dict(NEXT, shots=[0]), "'shots' must be different whole numbers"),
    (dict(NEXT, seeds=[0, -1]), "'seeds' must be different whole numbers"),
    (dict(NEXT, seeds=[0, "1"]), "'seeds' must be different whole numbers"),
    (dict(NEXT, seed=2**40), "'seed' must be a whole number"),
    (dict(NEXT, seed=True), "'seed' cannot be true"),
    (dict(NEXT, seed=1, seeds=[1]), "not both"),
    (dict(NEXT, minutes=0), "'minutes' must be a number above 0"),
    (dict(NEXT, minutes=float("nan")), "'minutes' must be a number above 0"),
    (dict(NEXT, minutes="3"), "'minutes' cannot be"),
    (dict(NEXT, backbone="next"), "'backbone' names 'next', which is no earlier job"),
    (dict(NEXT, backbone="good", set={"widths": [4, 4, 8, 8]}), "which has other widths"),
    (dict(NEXT, like="goods"), "'like' names 'goods'"),
    (dict(name="next", equal_to="goods"), "'equal_to' names 'goods'"),
    (dict(NEXT, equal_to="good"), "leave out data, preset"),
    (dict(name="next", equal_to="bare"), "nothing to be equal to"),
])
def test_refused(tmp_path, entry, words):
    plan = write(tmp_path/"plan.json", GOOD, dict(GOOD, name="bare", methods="none"), entry)
    with pytest.raises(BadInput) as e: read_plan(plan)
    assert words in str(e.value) and "job 3" in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("text, words", [("", "damaged"), ("[{]", "damaged"), ("{}", "no plan"), ("[]", "no plan"), ("[1]", "no plan"), ("[" * 100_000, "damaged"), ("\xff\xfe", "damaged")])
def test_no_plan(tmp_path, text, words):
    (tmp_path/"plan.json").write_bytes(text.encode("latin1"))
    with pytest.raises(BadInput, match=words): read_plan(tmp_path/"plan.json")


def test_what_a_plan_says(tmp_path):
    a, b, c, d, e = read_plan(write(tmp_path/"plan.json", dict(GOOD, seeds=[0, 2], set={"phase1.epochs": 3}), dict(name="on", like="good", seeds=[2], backbone="good", set={"copies": 2}),
        dict(NEXT, backbone="good-s0", methods="table1"), dict(name="equal", equal_to="good-s2")))
    assert [o.name for o in (a, b, c, d, e)] == ["good-s0", "good-s2", "on-s2", "next", "equal"]
    assert (a.recipe.seed, b.recipe.seed, b.recipe.phase1.seed) == (0, 2, 2)
    assert c.backbone == "good-s2" and c.recipe.copies == 2 and c.recipe.phase1 == b.recipe.phase1
    assert d.recipe.phase1 == a.recipe.phase1 and len(d.recipe.methods) == 11 # its phase 1 is that of its backbone; head only is there anyhow
    assert (c.recipe.changes, d.recipe.changes) == ("copies=2, phase1.epochs=3", "phase1.epochs=3") # and its name says so
    assert e.equal_to == "good-s2" and e.recipe.methods == ()


@pytest.mark.parametrize("plan", sorted(PLANS.glob("*.json")), ids=lambda p: p.stem)
def test_the_plans_that_travel_are_sound(plan): assert all(o.minutes and o.why for o in read_plan(plan))


def test_the_toy_plan_from_end_to_end(whole):
    out, record = whole
    assert [o["state"] for o in record["jobs"]] == ["done"]*6 and record == read_json(out/"campaign.json")
    methods = {o["name"]: {r["method"] for r in o["rows"]} for o in record["jobs"]}
    assert methods["toy-equal"] == {"head only, equal time"} and methods["toy-rows"] == {"head only", "FT θ", "ProtoNet"}
    longer = read_json(out/"toy-equal/results.json")["recipe"]["phase1"]["epochs"]
    assert longer > read_json(out/"toy-s0/results.json")["recipe"]["phase1"]["epochs"]
    assert read_json(out/"toy-curve-s1/results.json")["recipe"]["backbone"] == sha256(out/"toy-s1/pretrain.safetensors")
    text = overview(record)
    assert "6 jobs: 6 done" in text and "ProtoNet" in text and "min of about 0.5" in text


def answers(folder): return [r["correct"] for r in read_json(folder/"results.json")["rows"]]

@pytest.fixture
def plug(monkeypatch):
    "A plug that is pulled at every `n`th state that is kept, as `Machine.mind` would, whoever calls it."
    def set(n):
        left, keep = [n], RunFolder.keep
        def kept(self, *args, **kwargs):
            keep(self, *args, **kwargs); left[0] -= 1
            if left[0] % n == 0: raise TimeUp
        monkeypatch.setattr(RunFolder, "keep", kept)
    return set

def test_stopped_again_and_again(banks, whole, plug, tmp_path):
    "Every second state is the last of its piece; the pieces together give what one piece gave."
    plug(2)
    jobs, pieces = [o for o in read_plan(PLANS/"toy.json") if not o.equal_to][:3], 0
    while True:
        record = campaign(jobs, lambda *_: banks, tmp_path, Machine(until=time.time() + 600)) # a job that is stopped is taken up again at once
        pieces += 1
        if all(o["state"] == "done" for o in record["jobs"]): break
        assert pieces < 5
    for job in jobs:
        assert answers(tmp_path/job.name) == answers(whole[0]/job.name)
        assert (tmp_path/job.name/"log.jsonl").read_text() == (whole[0]/job.name/"log.jsonl").read_text()
        a, b = (load(o/job.name/"pretrain.safetensors")[0] for o in (tmp_path, whole[0]))
        assert all(torch.equal(v, b[k]) for k, v in a.items())

def test_a_deadline_strikes(banks, whole, tmp_path):
    jobs, until = [o for o in read_plan(PLANS/"toy.json") if not o.equal_to][:1], time.time() + 2
    def late(*_): time.sleep(max(0, until + .1 - time.time())); return banks
    record = campaign(jobs, late, tmp_path, Machine(until=until))
    assert record["jobs"][0]["state"] == "begun" and record["jobs"][0]["minutes"] > 0
    assert len((tmp_path/"toy-s0/log.jsonl").read_text().splitlines()) == 1
    assert campaign(jobs, late, tmp_path, Machine(until=time.time() - 1))["jobs"][0]["state"] == "begun"
    assert campaign(jobs, late, tmp_path)["jobs"][0]["state"] == "done"
    assert answers(tmp_path/"toy-s0") == answers(whole[0]/"toy-s0")


def toy_entry(**more): return dict(json.loads((PLANS/"toy.json").read_text())[0] | dict(methods="none"), **more)

def plain(**more): e = toy_entry(**more); e.pop("seeds"); return e

def test_failures_stop_nobody_else(banks, tmp_path):
    entries = plain(name="bad", shots=[9]), plain(name="on-bad", backbone="bad"), plain(name="on-that", backbone="on-bad"), plain(name="fine")
    record = campaign(read_plan(write(tmp_path/"plan.json", *entries)), lambda *_: banks, tmp_path/"out")
    assert [(o["name"], o["state"]) for o in record["jobs"]] == [("bad", "failed"), ("on-bad", "failed"), ("on-that", "failed"), ("fine", "done")]
    assert "images" in record["jobs"][0]["why"] and "needs bad, which failed" in record["jobs"][1]["why"]

def test_data_that_are_not_there(banks, tmp_path):
    def load(data, size):
        if size == 99: raise BadInput("no such disk")
        return banks
    entries = plain(name="far"), plain(name="near")
    entries[0]["set"] = entries[0]["set"] | {"size": 99}
    jobs = read_plan(write(tmp_path/"plan.json", *entries))
    record = campaign(jobs, load, tmp_path/"out")
    assert [o["state"] for o in record["jobs"]] == ["failed", "done"] and record["jobs"][0]["why"] == "no such disk"
    assert [o["state"] for o in campaign(jobs, lambda *_: banks, tmp_path/"out")["jobs"]] == ["done", "done"], "what failed is tried again"

def test_memory_that_runs_out(banks, tmp_path, monkeypatch):
    def full(*_): raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB\nand more")
    monkeypatch.setattr(module, "run", full)
    record = campaign([Job("a", "glyphs", Recipe()), Job("b", "glyphs", Recipe())], lambda *_: banks, tmp_path)
    assert [(o["state"], o["why"]) for o in record["jobs"]] == [("failed", "CUDA out of memory. Tried to allocate 7 GiB")]*2

def test_a_fault_of_ours_is_told_in_full_and_stops_nobody_else(banks, tmp_path, monkeypatch, capsys):
    real, broken = module.run, []
    def breaks(*args):
        if not broken: broken.append(1); raise RuntimeError("expected scalar type Float\nbut found BFloat16")
        return real(*args)
    monkeypatch.setattr(module, "run", breaks)
    jobs = [o for o in read_plan(PLANS/"toy.json") if not (o.backbone or o.equal_to)][:1]
    jobs = [replace(jobs[0], name="first"), replace(jobs[0], name="second")]
    record = campaign(jobs, lambda *_: banks, tmp_path)
    assert [(o["state"], o["why"]) for o in record["jobs"]] == [("failed", "expected scalar type Float"), ("done", "")]
    assert "Traceback" in (said := capsys.readouterr().err) and "but found BFloat16" in said
    monkeypatch.setattr(module, "run", lambda *_: (_ for _ in ()).throw(RuntimeError("a partner waits")))
    team = Team(0, 2)
    with pytest.raises(RuntimeError, match="a partner waits"): # in a team the process ends, and the others with it
        monkeypatch.setattr(Team, "tell", lambda self, make: make()); monkeypatch.setattr(Team, "in_turn", lambda self, load: load())
        campaign([replace(jobs[0], name="third")], lambda *_: banks, tmp_path, Machine(team=team))

def test_cuda_is_begun_before_its_memory_is_asked_for(banks, tmp_path, monkeypatch):
    asked = [] # `reset_peak_memory_stats` is refused by a CUDA that nothing has used yet
    for name in "init", "empty_cache", "reset_peak_memory_stats", "max_memory_allocated": monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: asked.append(name) or 0)
    monkeypatch.setattr(module, "run", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a card")
    monkeypatch.setattr(module, "_found", lambda job, out: dict(state="done" if "empty_cache" in asked else "waiting", why="", rows=[]))
    campaign([Job("a", "glyphs", Recipe())], lambda *_: banks, tmp_path, Machine(torch.device("cuda")))
    assert asked == ["init", "empty_cache", "reset_peak_memory_stats", "max_memory_allocated"]

def test_a_changed_plan_does_not_take_old_results(banks, whole):
    jobs = [replace(o, recipe=replace(o.recipe, tasks=60)) if o.name == "toy-s1" else o for o in read_plan(PLANS/"toy.json")]
    record = {o["name"]: o for o in campaign(jobs, lambda *_: banks, whole[0], Machine(until=time.time() - 1))["jobs"]}
    assert record["toy-s1"]["state"] == "failed" and "holds another recipe" in record["toy-s1"]["why"]
    assert record["toy-s0"]["state"] == "done" and record["toy-s0"]["minutes"] > 0

def test_a_place_that_cannot_be_written_to(tmp_path):
    (tmp_path/"file").write_text("x")
    with pytest.raises(BadInput, match="cannot write"): campaign([Job("a", "glyphs", Recipe())], None, tmp_path/"file")
    (tmp_path/"campaign.json").write_text("{")
    with pytest.raises(BadInput, match="damaged"): campaign([Job("a", "glyphs", Recipe())], None, tmp_path)


def test_the_clock_of_the_first_decides():
    class Two(Team):
        def tell(self, make): return True # what the first has said
    with pytest.raises(TimeUp): Machine(team=Two(1, 2), until=time.time() + 1000).mind()
    Machine(team=Two(1, 2), until=inf).mind()


def test_published_and_read_again(banks, whole, tmp_path):
    source, out = whole[0]/"toy-s0", tmp_path/"weights/toy"
    names = publish(source, out)
    assert names == ["README.md", "mtl-1shot.safetensors", "mtl-ht-1shot.safetensors", "pretrain.safetensors", "recipe.json", "results.json"]
    publish(source, tmp_path/"split", limit=6_000)
    assert len(list((tmp_path/"split").glob("pretrain-part*"))) > 0 and all(o.stat().st_size < 20_000 for o in (tmp_path/"split").glob("*.safetensors"))
    full, half, split = (load(o/"pretrain.safetensors", "backbone") for o in (source, out, tmp_path/"split"))
    assert full[1] == half[1] == split[1] and full[0].keys() == half[0].keys() == split[0].keys()
    for k, v in full[0].items():
        assert torch.equal(half[0][k], split[0][k])
        if v.dim() == 4: assert half[0][k].dtype == torch.float16 and torch.allclose(v, half[0][k].float(), rtol=1e-3, atol=1e-6)
        else: assert torch.equal(v, half[0][k])
    assert all(p.dtype == torch.float32 for p in read_backbone(tmp_path/"split/pretrain.safetensors")[0].parameters())
    for name in "mtl-1shot", "mtl-ht-1shot":
        assert load(out/f"{name}.safetensors")[1]["backbone_sha256"] == sha256(out/"pretrain.safetensors")
        protocol = Protocol("standard", TaskShape(5, 1, 15), 100)
        a, b, c = (meta_test(load_model(o/f"{name}.safetensors")[0], banks["test"], protocol).correct for o in (source, out, tmp_path/"split"))
        assert torch.equal(b, c) and (a - b).abs().sum() <= 75
        assert load_method(out/f"{name}.safetensors")[0].published == ("MTL + HT" if "ht" in name else "MTL")
    assert "19" in (out/"README.md").read_text() and "Apache" in (out/"README.md").read_text()
    again = publish(out, tmp_path/"again")
    assert again == names and sha256(tmp_path/"again/mtl-1shot.safetensors") == sha256(out/"mtl-1shot.safetensors")

def test_damaged_parts(whole, tmp_path):
    publish(whole[0]/"toy-s0", tmp_path/"a", limit=6_000)
    part = tmp_path/"a/pretrain-part2.safetensors"
    sound = part.read_bytes()
    for damage, words in ((sound[:-1] + bytes([sound[-1] ^ 1]), "is damaged, or no part of"), (sound[:100], "is damaged, or no part of"), (None, "which is missing beside it")):
        part.write_bytes(damage) if damage else part.unlink()
        for name in "pretrain", "mtl-1shot":
            with pytest.raises(BadInput, match=words): load_model(tmp_path/f"a/{name}.safetensors")
    save(tmp_path/"odd.safetensors", {}, dict(kind="backbone", parts=[1]))
    with pytest.raises(BadInput, match="is damaged"): load(tmp_path/"odd.safetensors")

def test_another_plan_keeps_the_book_of_the_first(banks, tmp_path):
    first, second = (read_plan(write(tmp_path/f"{o}.json", plain(name=o))) for o in ("one", "two"))
    spent = {o["name"]: o for o in campaign(first, lambda *_: banks, tmp_path/"out")["jobs"]}["one"]
    assert [o["name"] for o in campaign(second, lambda *_: banks, tmp_path/"out")["jobs"]] == ["two"]
    there = {o["name"]: o for o in campaign(first, lambda *_: banks, tmp_path/"out", Machine(until=time.time() - 1))["jobs"]}
    assert there == dict(one=spent) and spent["minutes"] > 0
    for odd in (dict(jobs=None), dict(jobs=[dict(name=[]), 3, dict(name="one", minutes="x")])):
        (tmp_path/"out/campaign.json").write_text(json.dumps(odd))
        assert campaign(first, lambda *_: banks, tmp_path/"out", Machine(until=time.time() - 1))["jobs"][0]["minutes"] == 0

def test_what_a_finished_job_should_have_left(banks, tmp_path):
    jobs = read_plan(write(tmp_path/"plan.json", plain(name="base"), plain(name="on", backbone="base")))
    campaign(jobs[:1], lambda *_: banks, tmp_path/"out")
    (tmp_path/"out/base/pretrain.safetensors").unlink()
    record = {o["name"]: o for o in campaign(jobs, lambda *_: banks, tmp_path/"out")["jobs"]}
    assert record["base"]["state"] == "done" and record["on"]["state"] == "failed" and record["on"]["why"].endswith("base/pretrain.safetensors, which is missing")

def test_published_weights_are_not_replaced_by_others(whole, tmp_path):
    publish(whole[0]/"toy-s0", tmp_path/"w")
    (tmp_path/"w/README.md").write_text("mine")
    publish(whole[0]/"toy-s0", tmp_path/"w")
    before = sha256(tmp_path/"w/pretrain.safetensors")
    with pytest.raises(BadInput, match="holds the weights of another run: move them away first"): publish(whole[0]/"toy-s1", tmp_path/"w")
    assert (tmp_path/"w/README.md").read_text() == "mine" and sha256(tmp_path/"w/pretrain.safetensors") == before

def test_not_published(whole, tmp_path):
    with pytest.raises(BadInput, match="no finished run"): publish(tmp_path, tmp_path/"w")
    with pytest.raises(BadInput, match="somewhere else"): publish(whole[0]/"toy-s0", whole[0]/"toy-s0")

def test_numbers_beyond_float16_stay_as_they_are():
    kept = weights._halved({"a.weight": torch.full((1, 1, 3, 3), 1e6), "b.weight": torch.ones(1, 1, 3, 3), "b.running_var": torch.ones(3), "scale": torch.ones(4, 4, 1, 1)})
    assert [v.dtype for v in kept.values()] == [torch.float32, torch.float16, torch.float32, torch.float32]


@pytest.mark.parametrize("arguments, words", [
    (dict(minutes=-1), "--minutes"), (dict(minutes=float("nan")), "--minutes"), (dict(at_once=-1), "--at-once"), (dict(publish="toy"), "no job 'toy'"), (dict(device="abacus"), "--device"),
    (dict(only="toy-s0,toy"), "--only: this plan has no job 'toy': did you mean toy-s0 or toy-s1 or toy-equal?"), (dict(only="toy-s0", publish="toy-s1"), "--publish: --only leaves out job 'toy-s1'"),
    (dict(only="toy-s0", publish="nope"), "--publish: this plan has no job 'nope'"), (dict(only=""), "--only names no job"), (dict(only=" , "), "--only names no job")])
def test_command_refused(tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert mtl_campaign(plan=str(PLANS/"toy.json"), **arguments) == 2
    err = capsys.readouterr().err
    assert words in err and err.startswith("mtl_nb: ") and err.count("\n") == 1 and not list(tmp_path.iterdir())

def test_command(banks, whole, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "load_data", lambda *_: banks)
    plan = write(tmp_path/"plan.json", plain(name="one"), plain(name="bad", shots=[9]))
    assert mtl_campaign(plan=str(plan), out="out", minutes=0, device="cpu") == 0
    assert "Nothing was run: give it --minutes" in capsys.readouterr().out
    assert mtl_campaign(plan=str(plan), out="out", device="cpu", publish="one") == 2
    said = capsys.readouterr()
    assert "1 of 2 jobs failed: bad" in said.err and "one: done" in said.out and "weights: 4 files in data/weights/one" in said.out
    assert load_model(tmp_path/"data/weights/one/pretrain.safetensors")[0]
    def stop(*_): raise KeyboardInterrupt
    monkeypatch.setattr(module, "run", stop)
    assert mtl_campaign(plan=str(plan), out="other", device="cpu") == 130
    assert "the same command goes on from here" in capsys.readouterr().err

def test_a_plan_shared_out(banks, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "load_data", lambda *_: banks)
    plan = write(tmp_path/"plan.json", plain(name="one"), plain(name="on-one", backbone="one"), plain(name="other"))
    share = lambda only: mtl_campaign(plan=str(plan), out="out", device="cpu", only=only)
    assert share("on-one") == 0 and not (tmp_path/"out/on-one").exists()
    said = capsys.readouterr().out
    assert "on-one: waiting (it waits for one, which is not among these)" in said and "stands on a job that is not among these" in said and "Time is up" not in said
    assert share("other, one") == 0 and share("on-one") == 0 and "Time is up" not in capsys.readouterr().out
    record = read_json(tmp_path/"out/campaign.json")
    assert [o["name"] for o in record["jobs"]] == ["on-one"] and {o["name"] for o in record["others"]} == {"one", "other"}
    assert {o["state"] for o in record["jobs"] + record["others"]} == {"done"}

def test_weights_of_another_run_stop_no_other(banks, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "load_data", lambda *_: banks)
    (tmp_path/"data/weights/one").mkdir(parents=True)
    (tmp_path/"data/weights/one/results.json").write_text("{}")
    plan = write(tmp_path/"plan.json", plain(name="one"), plain(name="two"))
    assert mtl_campaign(plan=str(plan), out="out", device="cpu", publish="one,two") == 2
    said = capsys.readouterr()
    assert "2 jobs: 2 done" in said.out and "files in data/weights/two" in said.out and "holds the weights of another run" in said.err
    assert (tmp_path/"data/weights/one/results.json").read_text() == "{}"

def test_a_card_says_how_to_use_what_is_there(whole, banks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    campaign(read_plan(write(tmp_path/"plan.json", plain(name="one"))), lambda *_: banks, tmp_path/"out")
    for folder in tmp_path/"out/one", whole[0]/"toy-s0":
        publish(folder, tmp_path/"data/weights"/folder.name)
        card = (tmp_path/"data/weights"/folder.name/"README.md").read_text()
        exec(card.split("```python")[1].split("```")[0], there := {})
        assert there["record"]["kind"] in ("backbone", "mtl") and ("meta-training added" in card) == (folder.name == "toy-s0")

def test_command_in_two_processes(tmp_path):
    from test_several_processes import two
    said, codes = two(Path(sys.executable).parent/"mtl_campaign", write(tmp_path/"plan.json", plain(name="one"), plain(name="on-one", backbone="one", methods="mtl")),
                      "--out", tmp_path/"out", "--device", "cpu", "--minutes", "9")
    assert codes == [0, 0], said
    assert "2 jobs: 2 done" in said[0][0] and said[1] == ("", ""), "only the first process speaks"
    assert read_json(tmp_path/"out/on-one/results.json")["recipe"]["phase1"]["shares"] == 2
    assert read_json(tmp_path/"out/campaign.json")["device"].startswith("2 x cpu")
