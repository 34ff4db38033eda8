"Flipped bits and cuts in every file of a run folder; two processes, foreign parts, debris, a full disk."
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save as to_bytes

import mtl_nb.experiments.run as run_module
from mtl_nb.cli import load_models
from mtl_nb.core import BadInput, read_json, write_json
from mtl_nb.data.glyphs import glyphs
from mtl_nb.experiments.config import preset
from mtl_nb.experiments.run import run
from mtl_nb.models.resnet12 import ResNet12
from mtl_nb.train.checkpoints import RunFolder, content_digest, load, load_state, save, save_state


def rejected(f, match=None):
    "`f()` raises a `BadInput` of one line"
    with pytest.raises(BadInput, match=match) as e: f()
    assert "\n" not in str(e.value)

def flips(raw, step=1):
    "The bytes with one bit flipped, for every bit of every `step`-th byte."
    for i in range(0, len(raw), step):
        for bit in range(8): yield raw[:i] + bytes([raw[i] ^ 1 << bit]) + raw[i + 1:]

# --- flipped bits --------------------------------------------------------------------------------------------------
def test_every_flipped_bit_of_a_weights_file_is_refused(tmp_path):
    path, t = tmp_path/"w.safetensors", {"a": torch.arange(5.), "b": torch.ones(3, dtype=torch.float16)}
    save(path, t, {"kind": "x", "lr": .1})
    for data in flips(path.read_bytes()):
        path.write_bytes(data)
        rejected(lambda: load(path))

def test_flipped_bits_of_a_state_are_refused(tmp_path):
    save_state(tmp_path/"s", train={"w": torch.ones(2, 2)}, seconds=1.5, log="[]")
    for data in flips((tmp_path/"s").read_bytes(), 3):
        (tmp_path/"s").write_bytes(data)
        rejected(lambda: load_state(tmp_path/"s"))

def test_every_flipped_bit_of_a_further_file_is_refused(tmp_path):
    save(tmp_path/"w.safetensors", {"a": torch.ones(8), "b": torch.ones(8)}, {"kind": "x"}, limit=32)
    part = tmp_path/"w-part2.safetensors"
    assert load(part, "part")[1] == {"kind": "part"}
    for data in flips(part.read_bytes(), 7):
        part.write_bytes(data)
        rejected(lambda: load(tmp_path/"w.safetensors"), "w-part2.safetensors")
        rejected(lambda: load(part), "w-part2.safetensors")

def test_no_flipped_bit_of_a_record_changes_what_is_read(tmp_path):
    file, record = tmp_path/"r.json", dict(rows=[dict(lr=.01, n=10, label="MTL ±", none=None)], ok=True, x=1e-5)
    write_json(file, record)
    same, tried = 0, 0
    for data in flips(file.read_bytes(), 3):
        file.write_bytes(data)
        tried += 1
        try: assert read_json(file) == record
        except BadInput: continue
        same += 1
    assert same <= 3 and tried > 500 # such as 1E-05 for 1e-05

@pytest.mark.parametrize("change", [dict(x=.2), dict(more=1), dict(checksum="sha256:0"), dict(checksum=None)], ids=str)
def test_a_changed_record_is_refused(tmp_path, change):
    write_json(tmp_path/"r.json", dict(x=.1))
    (tmp_path/"r.json").write_text(json.dumps(json.loads((tmp_path/"r.json").read_text()) | change))
    rejected(lambda: read_json(tmp_path/"r.json"), "does not match its checksum")

def test_a_record_in_another_order_or_without_a_checksum_is_read(tmp_path):
    write_json(tmp_path/"r.json", dict(a=(1, 2), b={3: "x"}))
    record = json.loads((tmp_path/"r.json").read_text())
    (tmp_path/"r.json").write_text(json.dumps(dict(reversed(record.items()))))
    assert read_json(tmp_path/"r.json") == dict(a=[1, 2], b={"3": "x"})
    (tmp_path/"r.json").write_text('{"a": 1}')
    assert read_json(tmp_path/"r.json") == dict(a=1)

def test_files_of_older_versions_are_read(tmp_path):
    (tmp_path/"w").write_bytes(to_bytes({"a": torch.ones(2)}, {"record": '{"kind": "x"}'}))
    assert load(tmp_path/"w", "x")[1] == {"kind": "x"}

def test_a_digest_of_the_content_leaves_times_out(tmp_path):
    net = ResNet12((4, 4, 4, 8)).state_dict()
    def digest(tensors, **record):
        save(tmp_path/"w", tensors, dict(kind="backbone") | record)
        return content_digest(tmp_path/"w")
    one = digest(net, seconds=1.)
    assert one == digest(net, seconds=2.) and len(one) == 64
    name = next(iter(net))
    others = {digest(net, seed=1), digest(net | {name: net[name] + 1}), digest(net | {name: net[name].double()}),
              digest({k: v for k, v in net.items() if k != name})}
    assert len(others | {one}) == 5

# --- states --------------------------------------------------------------------------------------------------------
RUN = dict(recipe=dict(seed=0), recipe_sha256="5e1f", data=dict(name="glyphs"))

@pytest.fixture
def folder(tmp_path):
    "A run with two states and two lines of log."
    folder = RunFolder(tmp_path/"run", RUN)
    for n in 1, 2:
        folder.log.append(dict(n=n))
        folder.save_state("phase1", n=n)
    return folder

def again(folder): return RunFolder(folder.path, RUN, resume=True)

@pytest.mark.parametrize("damage", [lambda raw: raw[:-1], lambda raw: b"", lambda raw: raw[:-3] + b"?" + raw[-2:]])
def test_a_damaged_state_falls_back_to_the_one_before(folder, caplog, damage):
    last, before = folder.states("phase1")
    last.write_bytes(damage(last.read_bytes()))
    back = again(folder)
    assert back.load_state("phase1") == dict(n=1) and back.log == [dict(n=1)]
    assert "the run goes on from the state before it" in caplog.text
    back.save_state("phase1", n=3)
    assert [load_state(o)["n"] for o in (last, before)] == [3, 1] # the damaged one has not taken its place
    for file in last, before: file.write_bytes(b"")
    rejected(lambda: again(folder).load_state("phase1"), "delete it, and --resume begins")

def test_killed_between_two_states(folder):
    "The last one is kept under its second name while the next one is written."
    last, before = folder.states("phase1")
    os.replace(last, before)
    assert again(folder).load_state("phase1") == dict(n=2)

def test_a_full_disk_leaves_the_last_state(folder, monkeypatch):
    def full(fd): raise OSError(28, "No space left on device")
    with monkeypatch.context() as m:
        m.setattr(os, "fsync", full)
        rejected(lambda: folder.save_state("phase1", n=3), "No space left on device")
    assert again(folder).load_state("phase1") == dict(n=2)

def test_the_log_on_disk_never_gets_shorter(folder):
    back = again(folder)
    assert back.log == [dict(n=1), dict(n=2)] # as far as it was written
    folder.states("phase1")[0].unlink()
    back.load_state("phase1")
    back.save_state("phase1", n=1)
    assert len((folder.path/"log.jsonl").read_text().splitlines()) == 2 and back.log == [dict(n=1)]

@pytest.mark.parametrize("other", [dict(recipe_sha256="0"), dict(data=dict(name="fc100"))], ids=str)
def test_the_state_of_another_run_is_refused(folder, tmp_path, other):
    foreign = RunFolder(tmp_path/"foreign", RUN | other)
    foreign.save_state("phase2", n=1)
    os.replace(foreign.path/".phase2.state", folder.path/".phase2.state")
    rejected(lambda: folder.load_state("phase2"), "is the state of another run: delete it")

def test_a_state_on_another_backbone_is_refused(folder):
    folder.theta = "a"
    folder.save_state("phase2", n=1)
    back = again(folder)
    back.theta = "b"
    rejected(lambda: back.load_state("phase2"), "belongs to another pretrain.safetensors: delete it")

def test_another_number_of_threads_is_noted(folder):
    folder.machine = "cpu, 1 thread"
    folder.save_state("phase1", n=3)
    for machine, notes in ("cpu, 1 thread", 0), ("cpu, 2 threads", 1), ("cpu, 2 threads", 1):
        back = again(folder)
        back.machine = machine
        back.load_state("phase1")
        assert len(back.notes) == notes
        back.save_state("phase1", n=4)
    assert back.notes == ["resumed on cpu, 2 threads, begun on cpu, 1 thread: the last digits of sums may differ"]

# --- folders -------------------------------------------------------------------------------------------------------
OTHER = """
import sys
from mtl_nb.core import BadInput
from mtl_nb.train.checkpoints import RunFolder
try: RunFolder(sys.argv[1], dict(recipe=dict(seed=0), recipe_sha256="5e1f", data=dict(name="glyphs")), resume=True)
except BadInput as e: sys.exit(f"refused: {e}")
if "die" in sys.argv: import os; os.abort()
"""
def other_process(path, *more):
    return subprocess.run([sys.executable, "-c", OTHER, str(path), *more], capture_output=True, text=True).stderr

def test_one_process_at_a_time(folder):
    assert "refused: another process works in" in other_process(folder.path)
    folder.clear()
    other_process(folder.path, "die") # a killed process leaves no lock
    assert again(folder)._lock

def test_killed_in_the_first_write(tmp_path):
    (tmp_path/".recipe.json.0123abcd.tmp").write_bytes(b"{")
    assert sorted(os.listdir(RunFolder(tmp_path, RUN).path)) == [".lock", "recipe.json"]
    (tmp_path/".notes.tmp").write_bytes(b"") # not ours
    again = RunFolder(tmp_path, RUN, resume=True)
    assert (again.path/".notes.tmp").exists()

def test_an_unreadable_recipe_is_not_called_damaged(folder, monkeypatch):
    def denied(*_, **__): raise PermissionError(13, "Permission denied")
    monkeypatch.setattr("pathlib.Path.read_text", denied)
    rejected(lambda: again(folder), r"recipe.json cannot be read \(permission denied\)")

# --- runs ----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def banks():
    torch.set_num_threads(1)
    return {k: b.subset(range(n)).first(12) for (k, b), n in zip(glyphs(0).items(), (6, 5, 5))}

@pytest.fixture(scope="module")
def config():
    c = preset("quick", widths=(4, 4, 4, 4), eval_tasks=8, select_tasks=8, eval_every=8, shots=(1,), inner=(.2, 3),
               query=3, methods=("MTL",))
    return replace(c, phase1=replace(c.phase1, epochs=1), phase2=replace(c.phase2, tasks=8))

@pytest.fixture
def finished(banks, config, tmp_path):
    return run(config, banks, tmp_path/"run"), tmp_path/"run"

def test_a_finished_run(banks, config, finished, tmp_path, monkeypatch):
    results, out = finished
    log = (out/"log.jsonl").read_text()
    assert not list(out.glob(".*")) and results == read_json(out/"results.json")
    (out/".phase1.state").write_bytes(b"") # it was killed before it could clear
    assert run(config, banks, out, resume=True) == results and not list(out.glob(".*"))
    with monkeypatch.context() as m: # in a folder that cannot be written to
        def denied(*_): raise PermissionError(13, "Permission denied")
        m.setattr("mtl_nb.train.checkpoints._lock_of", denied)
        assert run(config, banks, out, resume=True) == results
    (out/"results.json").unlink() # moved away
    renewed = run(config, banks, out, resume=True)
    assert (out/"log.jsonl").read_text() == log and renewed["curves"] == results["curves"]
    assert renewed["theta"] == results["theta"] and renewed["rows"] == results["rows"]

def test_equal_runs_have_equal_theta_and_another_seeds_backbone_is_refused(banks, config, finished, tmp_path):
    results, out = finished
    twin = run(config, banks, tmp_path/"twin", on_record=print)
    assert twin["theta"] == results["theta"] and twin["rows"][0] == results["rows"][0]
    other = run(replace(config, seed=1), banks, tmp_path/"other")
    assert other["theta"] != results["theta"]
    for name in "pretrain.safetensors", "mtl-1shot.safetensors":
        (out/"results.json").unlink(missing_ok=True)
        before = (out/name).read_bytes()
        (out/name).write_bytes((tmp_path/"other"/name).read_bytes())
        rejected(lambda: run(config, banks, out, resume=True), f"{name} is of another run: move it away")
        (out/name).write_bytes(before)
    (tmp_path/"twin/pretrain.safetensors").write_bytes((tmp_path/"other/pretrain.safetensors").read_bytes())
    rejected(lambda: load_models(tmp_path/"twin", None, None, "cpu"), "is not the backbone of the run in")

def test_no_room_on_the_disk(banks, config, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module.shutil, "disk_usage", lambda path: type("Usage", (), dict(free=1000)))
    rejected(lambda: run(config, banks, tmp_path/"run"), "MB free, and the run writes at least")
    assert not (tmp_path/"run").exists()
