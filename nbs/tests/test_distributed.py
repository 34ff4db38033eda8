"Machines that this one is not: two GPUs, a Mac, a driver that is too old."
from contextlib import nullcontext

import pytest
import torch

from mtl_nb.cli import run_command
from mtl_nb.core import BadInput
from mtl_nb.train.distributed import autocast, join, pick_device

@pytest.fixture
def runtime(monkeypatch):
    "Pretend to be a runtime with so many CUDA cards, with or without MPS."
    def make(cuda=0, mps=False, works=True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0 and works)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    return make

@pytest.mark.parametrize("cuda,mps,name,want", [
    (0, False, "auto", "cpu"), (0, True, "auto", "mps:0"), (2, False, "auto", "cuda:0"),
    (2, False, "cuda", "cuda:0"), (2, False, "cuda:1", "cuda:1"), (2, False, "cpu", "cpu"), (0, True, "mps", "mps:0"),
    (0, False, "cpu:0", "cpu"),
])
def test_takes_what_is_here(runtime, cuda, mps, name, want):
    runtime(cuda, mps)
    assert str(pick_device(name)) == want

@pytest.mark.parametrize("cuda,mps,name", [
    (0, False, "cuda"), (0, False, "mps"), (2, False, "cuda:2"), (2, False, "mps"), (0, True, "cuda:0"),
    (0, False, "meta"), (0, False, "xpu"),
])
def test_rejects_what_is_not(runtime, cuda, mps, name):
    runtime(cuda, mps)
    with pytest.raises(BadInput, match=f"^device '{name}' is not here: this machine has .*cpu$"): pick_device(name)

@pytest.mark.parametrize("name", ["gpu", "", "CUDA", "cuda:", "cuda:x", "cuda:-1", "cpu,cuda"])
def test_rejects_what_it_does_not_know(name):
    with pytest.raises(BadInput, match="unknown device") as e: pick_device(name)
    assert "\n" not in str(e.value)

@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_more_processes_than_cards(runtime, monkeypatch, name):
    runtime(2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(BadInput, match="^3 processes on a machine with 2 GPUs: start no more"): pick_device(name)
    assert str(pick_device("cpu")) == "cpu"
    runtime(0)
    assert str(pick_device("auto")) == "cpu"

def test_processes_that_nobody_started(monkeypatch):
    for o in ("RANK", "MASTER_ADDR", "MASTER_PORT"): monkeypatch.delenv(o, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    says = "WORLD_SIZE is 2, but RANK and MASTER_ADDR and MASTER_PORT are not set: start the processes with torchrun"
    with pytest.raises(BadInput, match=says):
        join(torch.device("cpu"))
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert join(torch.device("cpu")).size == 1

STARTED = dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")

@pytest.mark.parametrize("name,value,call", [
    ("WORLD_SIZE", "abc", join), ("WORLD_SIZE", "-2", join), ("LOCAL_RANK", "x", pick_device), ("RANK", "one", join),
])
def test_environment_that_is_no_number(monkeypatch, name, value, call):
    for k, v in STARTED.items(): monkeypatch.setenv(k, v)
    monkeypatch.setenv(name, value)
    with pytest.raises(BadInput, match=f"variable {name} is '{value}', not a whole number"):
        call(torch.device("cpu") if call is join else "cpu")

def test_rank_beyond_the_team(monkeypatch):
    for k, v in {**STARTED, "RANK": "5"}.items(): monkeypatch.setenv(k, v)
    with pytest.raises(BadInput, match="RANK is 5, but with 2 processes it is 1 at most"): join(torch.device("cpu"))

def test_cards_without_a_working_driver_do_not_count(runtime):
    runtime(cuda=1, works=False)
    assert pick_device().type == "cpu"

def test_autocast_is_for_cuda_alone():
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    for name in "cpu", "mps":
        with autocast(torch.device(name)):
            assert (x @ x).dtype == torch.float32 and not torch.is_autocast_enabled("cpu")

def test_a_rank_without_a_team_is_not_muted(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    def command():
        print("here")
        raise BadInput("there")
    assert run_command(command) == 2
    printed = capsys.readouterr()
    assert printed.out == "here\n" and "there" in printed.err

@pytest.mark.parametrize("error,left", [
    (None, 1), (BadInput("bad"), 1), (KeyboardInterrupt(), 0), (ZeroDivisionError(), 0),
], ids=str)
def test_a_process_that_has_finished_leaves_the_team(monkeypatch, error, left):
    "A stopped or broken process ends at once: the others may still wait for it, and it for them."
    gone = []
    monkeypatch.setattr("mtl_nb.train.distributed.dist.is_initialized", lambda: True)
    monkeypatch.setattr("mtl_nb.train.distributed.dist.destroy_process_group", lambda: gone.append(1))
    def command():
        if error: raise error
    broken = isinstance(error, ZeroDivisionError)
    with pytest.raises(ZeroDivisionError) if broken else nullcontext(): run_command(command)
    assert len(gone) == left
