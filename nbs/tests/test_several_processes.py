"Two gloo processes on the CPU give one process's numbers, one log and one set of files."
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mtl_nb.cli import run_command
from mtl_nb.core import BadInput
from mtl_nb.data.augment import AugmentConfig
from mtl_nb.data.episodes import TaskSampler, TaskShape
from mtl_nb.data.glyphs import glyphs
from mtl_nb.data.hard_tasks import HardTaskSampler
from mtl_nb.evaluation.exam import evaluate_path, features, make_exam
from mtl_nb.methods.base import evaluate_images
from mtl_nb.methods.tadam import TADAM, co_train
from mtl_nb.models.base_learner import BaseLearner
from mtl_nb.models.resnet12 import ResNet12
from mtl_nb.models.scale_shift import scale_shift
from mtl_nb.train.distributed import ALONE, Team, join
from mtl_nb.train.meta_train import MTL, MetaTrainConfig, meta_state, meta_train
from mtl_nb.train.pretrain import PretrainConfig, pretrain, pretrain_state

CROP = AugmentConfig(2, True, .2, .8)

def two(*args, n=2, timeout=300):
    "Start this file, or a command, in `n` processes as torchrun would; their outputs and exit codes."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(n),
           "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    processes = [subprocess.Popen([*map(str, args)], env={**env, "RANK": str(r), "LOCAL_RANK": str(r)}, **pipes)
                 for r in range(n)]
    try: printed = [p.communicate(timeout=timeout) for p in processes]
    finally:
        for p in processes: p.kill()
    return printed, [p.returncode for p in processes]

def eight_classes(): return glyphs(0)["train"].subset(range(8))

def one_phase(team, bn_splits=2):
    bank, cfg = eight_classes(), PretrainConfig(epochs=2, batch=50, lr=.05, augment=CROP, bn_splits=bn_splits)
    state = pretrain_state(ResNet12((4, 8, 8, 16), dropout=.1), 8, cfg)
    return list(pretrain(state, bank, cfg, team)), state.model.state_dict()

def plain_sgd(state, rate, momentum=0.): # Adam would amplify rounding where a gradient is zero
    params = [p for group in state.opt.param_groups for p in group["params"]]
    state.opt = torch.optim.SGD([dict(params=params, lr=rate, start=rate)], momentum=momentum)

def two_phase(team, tasks_at_once=0):
    bank, shape = eight_classes(), TaskShape(5, 1, 4)
    cfg = MetaTrainConfig(tasks=33, batch=3, lr=3e-3, augment=CROP)
    backbone = scale_shift(ResNet12((4, 8, 8, 16)).eval())
    state = meta_state(MTL(backbone, BaseLearner(16, 5, .1, 10), torch.zeros(16)), cfg)
    plain_sgd(state, 1.)
    tasks = HardTaskSampler(bank.by_class, shape, 3, 0, random=7, hard_count=4)
    records = list(meta_train(state, tasks, bank, cfg, tasks_at_once, team))
    return records, state.model.state_dict()

def co_trained(team):
    bank, shape, cfg = eight_classes(), TaskShape(5, 1, 4), MetaTrainConfig(tasks=24, batch=3, augment=CROP)
    state = meta_state(TADAM(ResNet12((4, 8, 8, 16)).eval(), 5, 8), cfg)
    plain_sgd(state, .05, .9) # with momentum: what has no gradient must not change
    records = list(co_train(state, TaskSampler(bank.by_class, shape, 3), bank, cfg, batch=9, team=team))
    right = evaluate_images(state.model, bank, make_exam(bank, shape, tasks=9), team=team)
    return records, state.model.state_dict(), right

def exam_of(team):
    bank = glyphs(0)["val"].subset(range(6))
    net, exam = ResNet12((4, 8, 8, 16)).eval(), make_exam(bank, TaskShape(5, 1, 5), tasks=101)
    feats = features(net, bank, team=team)
    return feats, evaluate_path(feats, exam, BaseLearner(16, 5), .1, [1, 20], team=team)

def plain(records):
    return [{k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in r.items()} for r in records]

def near(a, b, tol):
    for k, v in a.items():
        if isinstance(v, torch.Tensor):
            assert (v.double() - b[k].double()).abs().max() <= tol*max(1, v.abs().max().item()), k
        elif isinstance(v, float): assert abs(v - b[k]) <= tol, k
        else: assert v == b[k], k

def same(a, b): return all(torch.equal(v, b[k]) for k, v in a.items())

@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    place = tmp_path_factory.mktemp("pair")
    printed, codes = two(sys.executable, __file__, place)
    assert codes == [0, 0], printed
    return [torch.load(place/f"{r}.pt") for r in range(2)]

def test_phase_1_in_parts(pair):
    records, weights = one_phase(ALONE)
    for there, w in (p["one"] for p in pair):
        for a, b in zip(records, there, strict=True): near(a, b, 1e-4)
        near(weights, w, 1e-3)
    assert same(pair[0]["one"][1], pair[1]["one"][1]), "the processes have different weights"
    whole, _ = one_phase(ALONE, bn_splits=1)
    assert abs(whole[-1]["loss"] - records[-1]["loss"]) > 1e-4, "batch norm over parts of a batch differs"

def test_phase_2(pair):
    records, weights = two_phase(ALONE)
    for tasks_at_once, team in ((1, None), (2, None), (0, pair[0]), (0, pair[1])):
        there, w = team["two"] if team else two_phase(ALONE, tasks_at_once)
        for a, b in zip(plain(records), plain(there), strict=True): near(a, b, 1e-4)
        near(weights, w, 1e-4)
    start = scale_shift(ResNet12((4, 8, 8, 16))).state_dict()
    phi = [k for k in start if k.endswith(("scale", "shift"))]
    changes = [(start[k] - weights[f"backbone.{k}"]).abs().max() for k in phi]
    assert max(changes) > .01, "nothing was learned that could differ"
    assert {r["hard"] for r in records} == {True, False}
    assert same(pair[0]["two"][1], pair[1]["two"][1])

def test_co_training(pair):
    records, weights, right = co_trained(ALONE)
    for there, w, answers in (p["tadam"] for p in pair):
        for a, b in zip(plain(records), plain(there), strict=True):
            near({k: v for k, v in a.items() if v is not None}, b, 1e-4)
        near(weights, w, 1e-4)
        assert (answers - right).abs().max() <= 1
    assert {r["auxiliary"] is None for r in records} == {True, False}
    assert same(pair[0]["tadam"][1], pair[1]["tadam"][1])

def test_more_processes_than_tasks(pair):
    assert Team(0, 2).shard(1) == slice(0, 0) and Team(1, 2).shard(1) == slice(0, 1)
    done = [r["tasks"] for r in pair[0]["two"][0]]
    assert any(b - a == 1 for a, b in zip(done, done[1:])), "no batch of one task was among them"

def test_exam(pair):
    feats, right = exam_of(ALONE)
    for p in pair:
        assert (p["exam"][0] - feats).abs().max() < 1e-5
        assert (p["exam"][1] - right).abs().max() <= 1 and (p["exam"][1] == right).float().mean() > .98

def test_broadcast_of_a_result_and_of_an_error(pair):
    assert [p["received"] for p in pair] == ["from 0", "from 0"]
    assert [p["error"] for p in pair] == ["no room", "no room"]

def test_the_team_ends_before_python_does(pair):
    assert [p["gone"] for p in pair] == [True, True]

@pytest.mark.parametrize("bn_splits,team,says", [
    (5, ALONE, "fewer than 2 images"), (3, Team(0, 2), "cannot be divided among 2 processes"),
], ids=str)
def test_parts_that_do_not_fit(bn_splits, team, says):
    bank, cfg = glyphs(0)["train"].subset(range(3)), PretrainConfig(batch=8, bn_splits=bn_splits)
    state = pretrain_state(ResNet12((4, 4, 4, 4)), 3, cfg)
    with pytest.raises(BadInput, match=says): next(pretrain(state, bank, cfg, team))

@pytest.fixture(scope="module")
def images(tmp_path_factory):
    from PIL import Image
    root = tmp_path_factory.mktemp("images")
    for split, bank in glyphs(0).items():
        for c in range(6):
            folder = root/split/bank.names[c]
            folder.mkdir(parents=True)
            for i in bank.by_class[c][:20]:
                Image.fromarray(bank.x[i].permute(1, 2, 0).numpy()).save(folder/f"{i}.png")
    return root

FILES = ["curves.png", "log.jsonl", "mtl-1shot.safetensors", "mtl-ht-1shot.safetensors", "pretrain.safetensors",
         "recipe.json", "results.json"]

SHORT = "--widths 4,4,8,8 --phase1.epochs 1 --phase2.tasks 16 --eval-every 8 --select-tasks 20".split()

def test_command_in_two_processes(images, tmp_path, monkeypatch):
    monkeypatch.setenv("MTL_NB_CACHE", str(tmp_path/"cache"))
    command = [sys.executable, "-m", "mtl_nb", "run", "--data", images, "--size", "16", "--eval-tasks", "40",
               "--query", "5", "--shots", "1", "--device", "cpu", "--out", tmp_path/"run", *SHORT]
    printed, codes = two(*command)
    assert codes == [0, 0], printed
    assert "MTL + HT" in printed[0][0] and printed[1] == ("", ""), "only the first process prints"
    results = json.loads((tmp_path/"run/results.json").read_text())
    assert results["recipe"]["phase1"]["bn_splits"] == 2 and results["device"].startswith("2 x cpu")
    assert sorted(p.name for p in (tmp_path/"run").iterdir()) == FILES
    again, codes = two(*command)
    assert codes == [2, 2] and "holds this config already" in again[0][1] and again[1] == ("", "")
    done, codes = two(*command, "--resume")
    assert codes == [0, 0] and "MTL + HT" in done[0][0]

if __name__ == "__main__":
    torch.set_num_threads(1)
    team, error = join(torch.device("cpu")), ""
    def fail(): raise BadInput("no room")
    try: team.broadcast(fail)
    except BadInput as e: error = str(e)
    out = dict(one=one_phase(team), two=two_phase(team), tadam=co_trained(team), exam=exam_of(team),
               received=team.broadcast(lambda: f"from {team.rank}"), error=error)
    # A process that does not leave the team is aborted, now and then, when Python ends.
    out["gone"] = dist.is_initialized() and run_command(fail) == 2 and not dist.is_initialized()
    torch.save(out, Path(sys.argv[1])/f"{team.rank}.pt")
