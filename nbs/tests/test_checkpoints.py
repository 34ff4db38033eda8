"Cut, damaged and hostile files, files of other programs, killed and competing writers, states of every kind."
import json
import os
import pickle
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save as to_bytes
from torch import nn

from mtl_nb.core import BadInput, atomic_write, sha256
from mtl_nb.models.resnet12 import ResNet12
from mtl_nb.models.scale_shift import scale_shift
from mtl_nb.train.checkpoints import (RunFolder, TrainState, backbone_path, halve_phi, load, load_backbone, load_state,
                                      pack, save, save_state, unpack)

def rejected(f, match):
    "`f()` raises a `BadInput` of one line"
    with pytest.raises(BadInput, match=match) as e: f()
    assert "\n" not in str(e.value)

@pytest.fixture
def path(tmp_path): return tmp_path/"w.safetensors"

def net(d=4, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, d), nn.BatchNorm1d(d), nn.Linear(d, 2))

# --- files ---------------------------------------------------------------------------------------------------------
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16,
          torch.int64, torch.int32, torch.uint8, torch.bool]

@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_round_trip_of_every_type(path, dtype):
    t = {"a": torch.arange(12).view(3, 4).to(dtype), "scalar": torch.tensor(1).to(dtype),
         "empty": torch.empty(0, 3, dtype=dtype)}
    save(path, t, {})
    back, record = load(path)
    assert record == {} and list(sorted(back)) == sorted(t)
    for k, v in t.items():
        assert back[k].dtype == dtype and back[k].shape == v.shape and torch.equal(back[k], v)

def test_views_of_one_memory_and_other_layouts(path):
    x = torch.arange(48.).view(2, 3, 2, 4)
    last = x.contiguous(memory_format=torch.channels_last)
    t = {"x": x, "same": x, "row": x[0, 1], "transposed": x.mT, "last": last, "grad": x.clone().requires_grad_()}
    save(path, t, {})
    for k, v in load(path)[0].items(): assert torch.equal(v, t[k]) and not v.requires_grad

def test_record_keeps_what_json_can_hold(path):
    record = {"kind": "x", "name": "naïve ☃ \"quoted\"", "n": 2**60, "x": 0.1 + 0.2, "none": None,
              "list": [1, [2.5]], "dict": {"a": True}}
    save(path, {}, record)
    assert load(path, "x") == ({}, record)

def test_what_json_cannot_hold_leaves_the_old_file(path):
    save(path, {"a": torch.ones(2)}, {})
    before = path.read_bytes()
    with pytest.raises(TypeError): save(path, {}, {"device": torch.device("cpu")})
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]

def test_same_content_same_bytes(path):
    t = {"b": torch.ones(2), "a": torch.zeros(3)}
    save(path, t, {"kind": "x"})
    one = sha256(path)
    save(path, t, {"kind": "x"})
    assert sha256(path) == one and len(one) == 64

def test_every_cut_of_a_file_is_rejected(path):
    save(path, {"a": torch.arange(10.), "b": torch.ones(3)}, {"kind": "x"})
    raw = path.read_bytes()
    for n in range(len(raw)):
        path.write_bytes(raw[:n])
        rejected(lambda: load(path), "damaged")
    path.write_bytes(raw + b"\0")
    rejected(lambda: load(path), "damaged")

OVERLAP = (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
           b'"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}')
OTHER_FILES = {
    "text": b"hello, I am no weights file" * 9, "pickle": pickle.dumps([0.5]*99),
    "zip": b"PK\x03\x04" + bytes(99), "zeros": bytes(64),
    "long header": (2**62).to_bytes(8, "little") + b"{}", "no json": (4).to_bytes(8, "little") + b"{{{{",
    "overlap": len(OVERLAP).to_bytes(8, "little") + OVERLAP + bytes(8),
}
@pytest.mark.parametrize("raw", OTHER_FILES.values(), ids=OTHER_FILES)
def test_other_files_are_rejected(path, raw):
    path.write_bytes(raw)
    rejected(lambda: load(path), "damaged or no safetensors file")

def test_torch_save_is_rejected(path):
    torch.save({"a": torch.ones(2)}, path)
    rejected(lambda: load(path), "damaged or no safetensors file")

@pytest.mark.parametrize("meta", [None, {}, {"other": "x"}, {"record": "no json"}, {"record": "3"}, {"record": "[]"},
                                  {"record": "null"}], ids=str)
def test_safetensors_of_other_programs_are_rejected(path, meta):
    path.write_bytes(to_bytes({"a": torch.ones(2)}, meta))
    rejected(lambda: load(path), "not one of mtl_nb")
    rejected(lambda: load(path, "state"), "not one of mtl_nb")

def test_wrong_kind_and_no_file(path):
    save(path, {}, {"kind": "backbone"})
    rejected(lambda: load(path, "state"), "holds 'backbone', expected 'state'")
    rejected(lambda: load_state(path), "holds 'backbone', expected 'state'")
    rejected(lambda: load(path.parent), "no such weights file")
    rejected(lambda: load(path.parent/"none"), "no such weights file")

def test_places_that_cannot_be_written(tmp_path):
    (tmp_path/"file").write_text("x")
    for p in tmp_path/"none"/"w", tmp_path/"file"/"w": rejected(lambda: atomic_write(p, b"x"), "cannot write")
    (tmp_path/"dir").mkdir()
    rejected(lambda: atomic_write(tmp_path/"dir", b"x"), "cannot write")
    assert sorted(os.listdir(tmp_path)) == ["dir", "file"]

# --- other processes ------------------------------------------------------------------------------------------------
WRITER = """
import sys, torch
from mtl_nb.train.checkpoints import save
path, value, times = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
print("ready", flush=True)
for i in range(times): save(path, {"a": torch.full((200_000,), value), "b": torch.full((7,), value)}, {"value": value})
"""
def writer(path, value, times):
    command = [sys.executable, "-c", WRITER, str(path), str(value), str(times)]
    p = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert p.stdout.readline() == "ready\n"
    return p

def whole(path, values):
    t, record = load(path)
    v = record["value"]
    assert v in values and (t["a"] == v).all() and (t["b"] == v).all()

def test_two_writers_one_reader(path):
    save(path, {"a": torch.zeros(9), "b": torch.zeros(2)}, {"value": 0.})
    ps = [writer(path, v, 10) for v in (1., 2.)]
    while any(p.poll() is None for p in ps): whole(path, (0., 1., 2.))
    assert [p.returncode for p in ps] == [0, 0]
    whole(path, (1., 2.))
    assert os.listdir(path.parent) == [path.name]

@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_killed_writer_leaves_a_whole_file(path):
    save(path, {"a": torch.zeros(9), "b": torch.zeros(2)}, {"value": 0.})
    for wait in 0.01, 0.05:
        p = writer(path, 1., 10_000)
        time.sleep(wait)
        p.kill()
        p.wait()
        whole(path, (0., 1.))
    assert all(o == path.name or (o.startswith(".") and o.endswith(".tmp")) for o in os.listdir(path.parent))

# --- states --------------------------------------------------------------------------------------------------------
def test_pack_and_unpack_any_tree():
    a, b = torch.ones(2), torch.zeros(3)
    tree = {"a/b": a, "a": {"b": b, 1: [a, (b, 2.5, "x")], "1": ()}, 0: None, "s": {}, "l": [], "flag": True,
            "inf": float("inf")}
    tensors = {}
    back = unpack(json.loads(json.dumps(pack(tree, tensors))), tensors)
    assert len(tensors) == 4 and list(back) == list(tree) and list(back["a"]) == list(tree["a"])
    assert torch.equal(back["a/b"], a) and torch.equal(back["a"]["b"], b)
    assert torch.equal(back["a"][1][0], a) and torch.equal(back["a"][1][1][0], b)
    assert back["a"][1][1][1:] == (2.5, "x") and back["a"]["1"] == ()
    assert (back[0], back["s"], back["l"], back["flag"], back["inf"]) == (None, {}, [], True, float("inf"))

def train(s, until):
    out, x = [], torch.linspace(-1, 1, 48).view(16, 3)
    while s.done < until:
        s.model.train()
        noisy = x + .1*torch.randn(x.shape, generator=s.g)
        loss = (s.model(noisy) - x[:, :2]).pow(2).mean()
        s.opt.zero_grad()
        loss.backward()
        s.opt.step()
        s.done += 1
        out.append(loss.item())
    return out

OPTIMISERS = {
    "adam": lambda p: torch.optim.Adam(p, .01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, .01),
    "plain sgd": lambda p: torch.optim.SGD(p, .1),
    "nesterov": lambda p: torch.optim.SGD(p, .1, momentum=.9, nesterov=True, weight_decay=1e-3),
}
def state(opt=OPTIMISERS["adam"], d=4, seed=0, frozen=False):
    m = net(d, seed)
    if frozen: m[0].requires_grad_(False)
    return TrainState(m, opt([p for p in m.parameters() if p.requires_grad]), torch.Generator().manual_seed(seed))

@pytest.mark.parametrize("opt", OPTIMISERS.values(), ids=OPTIMISERS)
@pytest.mark.parametrize("stop", [0, 1, 7])
def test_stopped_and_resumed_is_never_stopped(path, opt, stop):
    straight, s = state(opt), state(opt)
    want, got = train(straight, 12), train(s, stop)
    save_state(path, train=s)
    s = state(opt, seed=5)
    s.load_state_dict(load_state(path)["train"])
    assert got + train(s, 12) == want and s.done == 12
    for k, v in straight.model.state_dict().items(): assert torch.equal(v, s.model.state_dict()[k])
    assert torch.equal(straight.g.get_state(), s.g.get_state())
    assert s.opt.state_dict()["param_groups"] == straight.opt.state_dict()["param_groups"]

def test_the_optimiser_comes_back_in_the_memory_format_of_the_weights(path):
    def make():
        m = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
        return TrainState(m, torch.optim.SGD(m.parameters(), .1, momentum=.9), torch.Generator())
    s, again = make(), make()
    s.model(torch.ones(1, 4, 5, 5)).sum().backward()
    s.opt.step()
    save_state(path, train=s)
    again.load_state_dict(load_state(path)["train"])
    p, q = s.model.weight, again.model.weight
    assert again.opt.state[q]["momentum_buffer"].stride() == q.stride() != torch.empty(q.shape).stride()
    assert torch.equal(again.opt.state[q]["momentum_buffer"], s.opt.state[p]["momentum_buffer"])

def test_a_step_stays_as_the_optimiser_keeps_it_beside_a_weight_that_is_one_number(path):
    def make():
        m = nn.Module()
        m.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
        return TrainState(m, torch.optim.Adam(m.parameters()), torch.Generator())
    s, again = make(), make()
    s.model.scale.sum().backward()
    s.opt.step()
    save_state(path, train=s)
    again.load_state_dict(load_state(path)["train"])
    for o in (s, again): assert o.opt.state[o.model.scale]["step"].dtype == torch.float32

def test_frozen_weights_stay_out_buffers_stay_in():
    kept = set(state(frozen=True).state_dict()["model"])
    assert not any(k.startswith("0.") for k in kept) and {"1.running_mean", "1.num_batches_tracked", "2.weight"} <= kept

@pytest.mark.parametrize("other", [dict(d=5), dict(frozen=True)], ids=str)
def test_state_of_another_model_is_rejected_before_anything_changes(other):
    s, before = state(seed=3), state(seed=3)
    rejected(lambda: s.load_state_dict(state(**other).state_dict()), "another model")
    for k, v in before.model.state_dict().items(): assert torch.equal(v, s.model.state_dict()[k])
    assert s.done == 0 and torch.equal(s.g.get_state(), before.g.get_state())

def test_states_beside_each_other(path):
    s = state()
    save_state(path, train=s, tasks={"g": s.g.get_state()}, log=[{"loss": .5}], best=None)
    back = load_state(path)
    assert list(back) == ["train", "tasks", "log", "best"] and back["log"] == [{"loss": .5}] and back["best"] is None
    assert torch.equal(back["tasks"]["g"], s.g.get_state()) and back["tasks"]["g"].dtype == torch.uint8

@pytest.mark.parametrize("tree", [None, 3, [], {"tensor": "gone"}, {"dict": [["a", {"tensor": "gone"}]]}, {"dict": 3},
                                  {"what": 1}], ids=str)
def test_a_tree_that_does_not_fit_is_rejected(path, tree):
    save(path, {"a": torch.ones(1)}, {"kind": "state", "tree": tree})
    rejected(lambda: load_state(path), "damaged")

# --- run folders ---------------------------------------------------------------------------------------------------
RUN = dict(recipe=dict(shots=(1, 5)), recipe_sha256="5e1f", data=dict(name="glyphs"))

@pytest.mark.parametrize("content", ["", "{", "3", "[1]", "null", "\"text\""])
def test_a_damaged_recipe_is_rejected(tmp_path, content):
    (tmp_path/"recipe.json").write_text(content)
    rejected(lambda: RunFolder(tmp_path, RUN, resume=True), "recipe.json is damaged")
    assert (tmp_path/"recipe.json").read_text() == content

def test_places_that_can_be_no_run_folder(tmp_path):
    (tmp_path/"file").write_text("x")
    for p in tmp_path/"file", tmp_path/"file"/"run": rejected(lambda: RunFolder(p, RUN), "cannot write to")
    rejected(lambda: RunFolder(tmp_path, RUN, resume=True), "no run folder")

def test_a_run_goes_on_with_its_own_folder_only(tmp_path):
    run = RunFolder(tmp_path/"a"/"b", RUN)
    assert run.load_state("phase1") is None
    run.log.append(dict(loss=.5))
    run.save_state("phase1", train=state(), seconds=1.5)
    run.log.append(dict(loss=.4))
    again = RunFolder(run.path, RUN, resume=True)
    saved = again.load_state("phase1")
    assert saved["seconds"] == 1.5 and again.log == [dict(loss=.5)]
    state().load_state_dict(saved["train"])
    for other in RUN | dict(recipe_sha256="x"), RUN | dict(data=dict(name="fc100")):
        rejected(lambda: RunFolder(run.path, other, resume=True), "holds")
    (run.path/".phase1.state").write_bytes((run.path/".phase1.state").read_bytes()[:-9])
    rejected(lambda: again.load_state("phase1"), "damaged")
    again.clear()
    assert sorted(os.listdir(run.path)) == ["log.jsonl", "recipe.json"]

def test_the_difference_to_another_config_is_named(tmp_path):
    RunFolder(tmp_path/"run", RUN | dict(recipe=dict(seed=0, phase1=dict(epochs=20))))
    other = RUN | dict(recipe=dict(seed=0, phase1=dict(epochs=40)), recipe_sha256="x")
    rejected(lambda: RunFolder(tmp_path/"run", other), r"another config \(phase1.epochs: 20 there, 40 here\): choose")

# --- weights -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("limit", [None, 300])
def test_phi_as_float16_differences(path, limit):
    net, g = scale_shift(ResNet12((4, 4, 4, 8))), torch.Generator().manual_seed(0)
    t = {k: p.detach() for k, p in net.named_parameters() if p.requires_grad}
    for v in t.values(): v += .04*(2*torch.rand(v.shape, generator=g) - 1)
    t |= {"base.weight": torch.randn(5, 8, generator=g), "metric.scale": torch.tensor(7.3)} # not Φ: no pair
    save(path, halve_phi(t), {"kind": "mtl", "half_phi": True}, limit)
    back, record = load(path, "mtl")
    assert record == {"kind": "mtl"} and back.keys() == t.keys() and {v.dtype for v in back.values()} == {torch.float32}
    assert max((back[k] - v).abs().max() for k, v in t.items()) < 4e-5
    assert all(torch.equal(back[k], t[k]) for k in ("base.weight", "metric.scale"))

def test_a_phi_that_float16_cannot_hold_is_rejected(path):
    phi = {"conv.scale": torch.full((2, 2, 1, 1), 1e6), "conv.shift": torch.zeros(2)}
    save(path, halve_phi(phi), {"kind": "mtl", "half_phi": True})
    rejected(lambda: load(path, "mtl"), "not finite: conv.scale")

def test_backbones_of_this_version_and_of_the_first(path):
    net = ResNet12((4, 4, 4, 8), dropout=.2)
    for record in dict(widths=[4, 4, 4, 8], drop=.2), dict(arch="resnet12", widths=[4, 4, 4, 8], dropout=.2, size=32):
        save(path, net.state_dict(), {"kind": "backbone"} | record)
        loaded, centre, _ = load_backbone(path)
        assert centre is None and loaded.blocks[0].dropout.p == .2 and not loaded.training
        assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in net.state_dict().items())

@pytest.mark.parametrize("change,says", [
    (dict(arch="resnet21"), r"no backbone 'resnet21' \(did you mean resnet12"),
    (dict(widths=[4, 4, 4, 4]), "does not hold"),
    (dict(widths=3), "widths: expected a list, got a whole number"), (dict(widths=[]), "does not hold"),
], ids=str)
def test_backbones_that_do_not_fit_their_record(path, change, says):
    record = dict(kind="backbone", arch="resnet12", widths=[4, 4, 4, 8]) | change
    save(path, ResNet12((4, 4, 4, 8)).state_dict(), record)
    rejected(lambda: load_backbone(path), says)

def test_a_model_without_its_backbone(tmp_path):
    record = dict(way=5, shot=1, lr=.1, steps=5, backbone="b.safetensors", backbone_sha256="0")
    rejected(lambda: backbone_path(tmp_path/"m", {}), "lacks way, shot, lr, steps, backbone, backbone_sha256")
    rejected(lambda: backbone_path(tmp_path/"m", record), "needs its backbone 'b.safetensors' beside it")
    (tmp_path/"b.safetensors").write_bytes(b"x")
    rejected(lambda: backbone_path(tmp_path/"m", record), "is not the backbone that m was trained on")
