"""An accelerator that this machine need not have: what would break on a GPU breaks here.

Tensors with a device of their own, which mix with no others; and bfloat16."""
import importlib
import pkgutil
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

import mtl_nb
from mtl_nb.data.augment import AugmentConfig
from mtl_nb.evaluation.tta import TTAConfig
from mtl_nb.experiments.run import run
from mtl_nb.methods.base import load_model
from mtl_nb.train.distributed import Runtime
from mtl_nb.train.objectives import ObjectiveConfig
from test_run import banks, config, killed_after, same, short_grid  # noqa: F401

THERE, plain_tensor = torch.device("lazy"), torch.tensor # a device type of PyTorch's that nobody here computes on


class Elsewhere(torch.Tensor):
    "A tensor that says it is on `THERE`. Its values are on the CPU."
    __torch_function__ = torch._C._disabled_torch_function_impl
    @staticmethod
    def __new__(cls, held):
        layout = dict(strides=held.stride(), dtype=held.dtype, device=THERE)
        return torch.Tensor._make_wrapper_subclass(cls, held.size(), **layout)
    def __init__(self, held): self.held = held
    def __repr__(self): return f"Elsewhere({self.held})"
    def new_tensor(self, data, dtype=None): return plain_tensor(data, dtype=dtype or self.dtype).to(THERE)
    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None): return compute(op, args, kwargs or {})


class Pretended(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None): return compute(op, args, kwargs or {})


COPIES = ("aten.copy_.default", "aten._to_copy.default")
INDEXES = ("aten.index.Tensor", "aten.index_put.default", "aten.index_put_.default")

def on_the_cpu_side(o):
    if isinstance(o, Elsewhere): return o.held
    return torch.device("cpu") if isinstance(o, torch.device) and o == THERE else o


def compute(op, args, kwargs):
    "Do it on the CPU, if CUDA would have done it."
    name, tensors = str(op), [o for o in tree_iter((args, kwargs)) if isinstance(o, torch.Tensor)]
    wrapped = any(isinstance(o, Elsewhere) for o in tensors)
    there = torch.device(kwargs["device"]) == THERE if kwargs.get("device") is not None else wrapped
    mixed = wrapped and any(not isinstance(o, Elsewhere) and o.dim() for o in tensors)
    allowed = name in COPIES or name in INDEXES and isinstance(args[0], Elsewhere)
    if mixed and not allowed: raise RuntimeError(f"{name} on two devices")
    if there and kwargs.get("generator") is not None:
        raise RuntimeError(f"{name} on the accelerator with a generator of the CPU")
    out = op(*tree_map(on_the_cpu_side, args), **tree_map(on_the_cpu_side, kwargs))
    in_place = name.split(".")[1].endswith("_") and isinstance(args[0], Elsewhere)
    if name == "aten.copy_.default" or in_place: return args[0]
    return tree_map(lambda o: Elsewhere(o) if isinstance(o, torch.Tensor) else o, out) if there else out


@pytest.fixture()
def pretended(monkeypatch):
    def tensor(*args, device=None, **more):
        x = plain_tensor(*args, **more)
        return x if device is None else x.to(device)
    monkeypatch.setattr(torch, "tensor", tensor)
    with Pretended(): yield Runtime(THERE, tasks_at_once=1)


def test_devices_do_not_mix_by_themselves(pretended):
    x = torch.ones(3, 4, device=THERE)
    assert x.device.type == "lazy" and (2*x).sum().item() == 24 and x.cpu().device.type == "cpu"
    with pytest.raises(RuntimeError, match="two devices"): x + torch.ones(3, 4)
    with pytest.raises(RuntimeError, match="generator of the CPU"):
        torch.rand(3, device=THERE, generator=torch.Generator())
    w = torch.nn.Linear(4, 2).to(THERE)
    w(x).sum().backward()
    assert w.weight.grad.device.type == "lazy" and w.weight.grad.sum() == 24


@pytest.fixture(scope="module", autouse=True)
def short():
    with short_grid("MAML 4-conv", "MAML ResNet-12, first order"): yield


SHORT = dict(eval_tasks=4, select_tasks=4, eval_every=8)

@pytest.fixture(scope="module")
def everything(config):
    methods = ("MTL + HT", "FT [Θ4;θ]", "MAML 4-conv", "ProtoNet", "cosine classifier", "TADAM ResNet-12")
    phases = dict(phase1=replace(config.phase1, epochs=1),
                  phase2=replace(config.phase2, tasks=8, augment=AugmentConfig(2)))
    return replace(config, methods=methods, tta=TTAConfig(support_copies=2), **phases, **SHORT)


@pytest.fixture(scope="module")
def on_the_cpu(banks, everything, tmp_path_factory):
    return run(everything, banks, tmp_path_factory.mktemp("cpu")/"run")


def test_same_predictions_on_another_device(banks, everything, on_the_cpu, tmp_path, pretended, monkeypatch):
    with killed_after(4, monkeypatch): run(everything, banks, tmp_path/"run", pretended)
    assert same(run(everything, banks, tmp_path/"run", pretended, resume=True), on_the_cpu)
    _, model, _ = load_model(tmp_path/"run/mtl-ht-1shot.safetensors", device=THERE)
    assert {p.device.type for p in model.parameters()} == {"lazy"}


def test_a_stronger_objective_on_another_device(banks, config, tmp_path, pretended):
    objective = ObjectiveConfig(rotation=.5, mixup=.2, dropblock=3, cosine=True, rounds=2)
    phase1 = replace(config.phase1, epochs=1)
    short = replace(config, methods=(), dropout=.1, objective=objective, phase1=phase1, **SHORT)
    assert len(run(short, banks, tmp_path/"run", pretended)["rows"]) == 1


def test_bfloat16(banks, everything, tmp_path, monkeypatch):
    "As on a GPU: convolutions and linear layers compute in bfloat16 wherever the package asks for it."
    names = [o.name for o in pkgutil.walk_packages(mtl_nb.__path__, "mtl_nb.") if not o.name.endswith("__main__")]
    modules = [m for m in map(importlib.import_module, names) if hasattr(m, "autocast")]
    for m in modules: monkeypatch.setattr(m, "autocast", lambda device: torch.autocast("cpu", torch.bfloat16))
    assert len(modules) > 5
    more = ("SS [Θ;θ], batch statistics", "MAML ResNet-12, first order")
    full = replace(everything, methods=(*everything.methods, *more))
    assert [o["method"] for o in run(full, banks, tmp_path/"run")["rows"]] == ["head only", *full.methods]
