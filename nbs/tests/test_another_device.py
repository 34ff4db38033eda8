"An accelerator that this runtime need not have: what would break on a GPU breaks here. Tensors with a device of their own that mix with no others, and bfloat16."
import importlib
import pkgutil
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

import mtl_nb
from mtl_nb.train.distributed import Runtime
from mtl_nb.experiments.run import run
from mtl_nb.evaluation.meta_test import load_model
from mtl_nb.train.objectives import ObjectiveConfig
from test_run import banks, killed_after, recipe, same  # noqa: F401

THERE, plain_tensor = torch.device("lazy"), torch.tensor  # a device type of PyTorch's that nobody here computes on


class Elsewhere(torch.Tensor):
    "A tensor that says it lives on `THERE`. What it holds is on the CPU."
    __torch_function__ = torch._C._disabled_torch_function_impl
    @staticmethod
    def __new__(cls, held): return torch.Tensor._make_wrapper_subclass(cls, held.size(), strides=held.stride(), dtype=held.dtype, device=THERE)
    def __init__(self, held): self.held = held
    def __repr__(self): return f"Elsewhere({self.held})"
    def new_tensor(self, data, dtype=None): return plain_tensor(data, dtype=dtype or self.dtype).to(THERE)
    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None): return compute(op, args, kwargs or {})


class Pretended(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None): return compute(op, args, kwargs or {})


COPIES, INDEXES = ("aten.copy_.default", "aten._to_copy.default"), ("aten.index.Tensor", "aten.index_put.default", "aten.index_put_.default")

def compute(op, args, kwargs):
    "Do it on the CPU, if CUDA would have done it."
    name, tensors = str(op), [o for o in tree_iter((args, kwargs)) if isinstance(o, torch.Tensor)]
    there = torch.device(kwargs["device"]) == THERE if kwargs.get("device") is not None else any(isinstance(o, Elsewhere) for o in tensors)
    mixed = any(isinstance(o, Elsewhere) for o in tensors) and any(not isinstance(o, Elsewhere) and o.dim() for o in tensors)
    if mixed and not (name in COPIES or name in INDEXES and isinstance(args[0], Elsewhere)): raise RuntimeError(f"{name} on two devices")
    if there and kwargs.get("generator") is not None: raise RuntimeError(f"{name} on the accelerator with dice of the CPU")
    here = lambda o: o.held if isinstance(o, Elsewhere) else torch.device("cpu") if isinstance(o, torch.device) and o == THERE else o
    out = op(*tree_map(here, args), **tree_map(here, kwargs))
    if name == "aten.copy_.default" or name.split(".")[1].endswith("_") and isinstance(args[0], Elsewhere): return args[0]
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
    with pytest.raises(RuntimeError, match="dice of the CPU"): torch.rand(3, device=THERE, generator=torch.Generator())
    w = torch.nn.Linear(4, 2).to(THERE)
    w(x).sum().backward()
    assert w.weight.grad.device.type == "lazy" and w.weight.grad.sum() == 24


SHORT = dict(tasks=4, select=4, every=8)

@pytest.fixture(scope="module")
def everything(recipe):
    methods = ("MTL + HT", "FT [Θ4;θ]", "MAML 4-conv", "ProtoNet", "cosine classifier", "TADAM ResNet-12")
    return replace(recipe, methods=methods, phase1=replace(recipe.phase1, epochs=1), phase2=replace(recipe.phase2, tasks=8, augment=dict(pad=2)), copies=2, **SHORT)


@pytest.fixture(scope="module")
def on_the_cpu(banks, everything, tmp_path_factory): return run(everything, banks, tmp_path_factory.mktemp("cpu")/"run")


def test_same_answers_on_another_device(banks, everything, on_the_cpu, tmp_path, pretended, monkeypatch):
    with killed_after(4, monkeypatch): run(everything, banks, tmp_path/"run", pretended)
    assert same(run(everything, banks, tmp_path/"run", pretended, resume=True), on_the_cpu)
    model, _ = load_model(tmp_path/"run/mtl-ht-1shot.safetensors", device=THERE)
    assert {p.device.type for p in model.parameters()} == {"lazy"}


def test_stronger_phase_one_on_another_device(banks, recipe, tmp_path, pretended):
    r = replace(recipe, methods=(), drop=.1, extras=ObjectiveConfig(turns=.5, mixup=.2, block=3, cosine=True, generations=2), phase1=replace(recipe.phase1, epochs=1), **SHORT)
    assert len(run(r, banks, tmp_path/"run", pretended)["rows"]) == 1


def test_bfloat16(banks, everything, tmp_path, monkeypatch):
    "As on a GPU: convolutions and linear layers answer in bfloat16 wherever the package asks for it."
    mended = [m for o in pkgutil.iter_modules(mtl_nb.__path__) if hasattr(m := importlib.import_module(f"mtl_nb.{o.name}"), "autocast")]
    for m in mended: monkeypatch.setattr(m, "autocast", lambda device: torch.autocast("cpu", torch.bfloat16))
    assert len(mended) > 5
    r = replace(everything, methods=(*everything.methods, "SS [Θ;θ], batch statistics", "MAML ResNet-12, first order"))
    assert [o["method"] for o in run(r, banks, tmp_path/"run")["rows"]] == ["head only", *r.methods]
