"Scale and shift on networks stranger than the page's."
import logging
import os
os.environ.setdefault("OMP_NUM_THREADS", "1")

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mtl_nb.models.scale_shift as scale_shift_module
from mtl_nb.core import BadInput
from mtl_nb.models.scale_shift import SSConv2d, merge, scale_shift, ss_parameters

def seeded(make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()

def shake(net):
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, p in ss_parameters(net): p.add_(.3*torch.randn(p.shape, generator=g, dtype=p.dtype))
    return net

x = torch.randn(2, 4, 9, 8, generator=torch.Generator().manual_seed(2))
forms = [
    dict(kernel_size=3, padding=1), dict(kernel_size=3, bias=False), dict(kernel_size=(1, 3)),
    dict(kernel_size=(5, 3), stride=2, padding=2), dict(kernel_size=3, dilation=2, padding="same"),
    dict(kernel_size=3, padding="valid"), dict(kernel_size=3, groups=2), dict(kernel_size=3, groups=4, bias=False),
    *[dict(kernel_size=3, padding=1, padding_mode=o) for o in ("circular", "reflect", "replicate")]]

@pytest.mark.parametrize("form", forms, ids=str)
def test_every_form_of_convolution(form):
    conv = seeded(lambda: nn.Conv2d(4, 8, **form))
    ss = scale_shift(conv) # the network is itself a convolution
    assert isinstance(ss, SSConv2d) and torch.equal(ss(x), conv(x)) and not ss.training
    assert [n for n, _ in ss_parameters(ss)] == ["scale", "shift"] and ss.scale.shape == (8, 4//conv.groups, 1, 1)
    shake(ss)
    assert torch.allclose(ss(x), merge(ss)(x), atol=1e-6) and not torch.allclose(ss(x), conv(x), atol=.05)
    ref = deepcopy(conv)
    with torch.no_grad():
        ref.weight.mul_(ss.scale)
        want = ref(x) + ss.shift[:, None, None]
    assert torch.allclose(ss(x), want, atol=1e-5)

class Shared(nn.Module): # one convolution in two places, a gap, and a list
    def __init__(self):
        super().__init__()
        conv = nn.Conv2d(4, 4, 3, padding=1)
        self.a, self.b, self.gap = conv, conv, None
        self.more = nn.ModuleList([conv, nn.Sequential(conv, nn.ReLU())])
    def forward(self, x):
        for f in (self.a, self.b, *self.more): x = f(x)
        return x

def test_a_shared_convolution_stays_shared():
    net = seeded(Shared)
    ss = scale_shift(net)
    assert torch.equal(ss(x), net(x)) and len(list(ss_parameters(ss))) == 2
    assert ss.a is ss.b is ss.more[0] is ss.more[1][0] and isinstance(ss.a, SSConv2d) and ss.gap is None
    m = merge(shake(ss))
    assert m.a is m.b is m.more[0] is m.more[1][0] and type(m.a) is nn.Conv2d and torch.allclose(m(x), ss(x), atol=1e-5)

class Twice(nn.Conv2d):
    def forward(self, x): return 2*super().forward(x)

def test_subclasses_keep_their_forward():
    net = seeded(lambda: nn.Sequential(nn.Conv2d(4, 4, 3), Twice(4, 4, 3)))
    ss = scale_shift(net)
    assert [n for n, _ in ss_parameters(ss)] == ["0.scale", "0.shift", "1.scale", "1.shift"]
    assert torch.equal(ss(x), net(x)) and not ss[1]._parameters["weight"].requires_grad and isinstance(ss[1], Twice)
    assert list(ss.state_dict()) == [f"{i}.{o}" for i in range(2) for o in ("weight", "bias", "scale", "shift")]
    merged = merge(shake(ss))
    assert torch.allclose(merged(x), ss(x), atol=1e-5) and not torch.allclose(ss(x), net(x), atol=.05)
    assert [type(m) for m in merged] == [nn.Conv2d, Twice] and list(merged.state_dict()) == list(net.state_dict())
    assert isinstance(ss[1].weight, torch.Tensor) and type(net[1]) is Twice and net[1].weight.requires_grad

@pytest.mark.parametrize("form", forms, ids=str)
def test_every_form_of_a_subclass(form):
    conv = seeded(lambda: Twice(4, 8, **form))
    ss = shake(scale_shift(conv)) # the network is itself a convolution
    plain = seeded(lambda: nn.Conv2d(4, 8, **form))
    same = scale_shift(plain)
    same.load_state_dict(ss.state_dict()) # the same tensor names
    assert torch.allclose(ss(x), 2*same(x), atol=1e-6) and torch.allclose(merge(ss)(x), ss(x), atol=1e-6)
    again = scale_shift(merge(ss))
    assert torch.equal(again(x), merge(ss)(x)) and type(merge(again)) is Twice

def test_a_subclass_is_trained_saved_copied_and_compiled_as_a_plain_one():
    net = seeded(lambda: nn.Sequential(Twice(4, 4, 3, bias=False), Twice(4, 4, 3))).double()
    ss, z = shake(scale_shift(net)), x.double()
    def f(scale, shift): return torch.func.functional_call(ss, {"0.scale": scale, "1.shift": shift}, z[:1])
    assert torch.autograd.gradcheck(f, (ss[0].scale, ss[1].shift))
    ss(z).sum().backward()
    assert [k for k, p in ss.named_parameters() if p.grad is not None] == [k for k, _ in ss_parameters(ss)]
    twin = scale_shift(net)
    twin.load_state_dict(ss.state_dict())
    assert torch.equal(twin(z), ss(z)) and torch.equal(deepcopy(ss)(z), ss(z))
    half = ss.to(torch.bfloat16)
    assert half[0].weight.dtype == half[0].scale.dtype == torch.bfloat16

class Gain(nn.Conv2d): # as in timm's networks without norm layers: it has a scale of its own
    def __init__(self, *args):
        super().__init__(*args)
        self.scale = .5

def test_a_layer_with_a_scale_of_its_own_stays_as_it_is():
    net = seeded(lambda: nn.Sequential(nn.Conv2d(4, 4, 3), Gain(4, 4, 3)))
    ss = scale_shift(net)
    assert [n for n, _ in ss_parameters(ss)] == ["0.scale", "0.shift"] and ss[1].scale == .5
    assert torch.equal(ss(x), net(x)) and not ss[1].weight.requires_grad

def test_networks_that_do_not_fit_are_rejected():
    for net in nn.Linear(2, 2), nn.Conv2d(3, 3, 1), nn.Sequential(), Gain(2, 2, 3):
        with pytest.raises(BadInput, match="no Conv2d larger"): scale_shift(net)
    ss = scale_shift(nn.Sequential(nn.Conv2d(3, 3, 3), Twice(3, 3, 3)))
    for twice in ss, ss[1]:
        with pytest.raises(BadInput, match="already"): scale_shift(twice)

def test_a_patch_embedding_alone_is_asked_for():
    net = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 1))
    with pytest.raises(BadInput, match="but its patch embedding"): scale_shift(net)
    assert len(list(ss_parameters(scale_shift(net, patches=True)))) == 2
    assert len(list(ss_parameters(scale_shift(nn.Sequential(net, nn.Conv2d(8, 8, 3)))))) == 4

def test_a_small_share_is_told_once(caplog):
    scale_shift_module._warn.cache_clear()
    net = nn.Sequential(nn.Conv2d(4, 4, 3), *[nn.Conv2d(4, 4, 1) for _ in range(4)])
    with caplog.at_level(logging.DEBUG, "mtl_nb"):
        for _ in range(2): scale_shift(net)
        scale_shift(net[:4])
    assert [(o.levelname, o.getMessage()[:38]) for o in caplog.records] == [
        ("WARNING", "scales and shifts on 1 of 5 convolutio"), ("DEBUG", "scales and shifts on 1 of 4 convolutio")]

def test_the_given_network_and_global_randomness_are_left_alone():
    net = seeded(lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))).train()
    before, state = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    ss = shake(scale_shift(net))
    merged = merge(ss)
    after = ss.state_dict()
    ss(x)
    merged(x)
    assert torch.equal(state, torch.get_rng_state())
    assert net.training and all(p.requires_grad for p in net.parameters()) and list(net.state_dict()) == list(before)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert all(torch.equal(before[k], after[k]) for k in before) # Θ keeps its names and its values
    assert not merged.training and not any(p.requires_grad for p in merged.parameters()) and isinstance(ss[0], SSConv2d)
    with torch.no_grad():
        merged[0].weight.zero_()
        ss[2].weight.zero_()
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items()) and ss[0].weight.abs().max() > 0

def test_hooks_and_mode_of_a_wrapped_convolution():
    conv = seeded(lambda: nn.Conv2d(4, 4, 3)).eval()
    ss = SSConv2d(conv)
    calls = []
    ss.register_forward_hook(lambda *_: calls.append(1))
    conv(x)
    assert not calls and not ss.training
    ss(x)
    assert calls
    assert ss.weight.data_ptr() == conv.weight.data_ptr() and conv.weight.requires_grad

def test_gradients():
    conv = seeded(lambda: nn.Conv2d(2, 3, 3)).double()
    ss = shake(SSConv2d(conv))
    z = torch.randn(1, 2, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    def f(scale, shift, z): return torch.func.functional_call(ss, dict(scale=scale, shift=shift), z)
    assert torch.autograd.gradcheck(f, (ss.scale, ss.shift, z.requires_grad_()))
    ss(z).sum().backward()
    assert ss.weight.grad is None and ss.bias.grad is None and ss.scale.grad is not None

@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_and_memory_formats(dtype):
    net = seeded(lambda: nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)))
    net = net.to(dtype).to(memory_format=torch.channels_last)
    z = x.to(dtype).contiguous(memory_format=torch.channels_last)
    ss = scale_shift(net)
    assert torch.equal(ss(z), net(z)) and all(p.dtype == dtype for _, p in ss_parameters(ss))
    assert torch.allclose(merge(shake(ss))(z), ss(z), atol=1e-6 if dtype == torch.float64 else .05)

def test_saved_and_loaded():
    def make(): return scale_shift(seeded(lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, bias=False))))
    a, b = shake(make()), make()
    b.load_state_dict(a.state_dict())
    assert torch.equal(a(x), b(x)) and torch.equal(deepcopy(a)(x), a(x))

def test_training_updates_phi_alone():
    ss = scale_shift(seeded(lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))))
    before = {k: v.clone() for k, v in ss.state_dict().items()}
    opt = torch.optim.Adam([p for _, p in ss_parameters(ss)], 1e-2, weight_decay=.1)
    for _ in range(3):
        opt.zero_grad()
        F.mse_loss(ss(x), torch.ones(())).backward()
        opt.step()
    updated = {k for k, v in ss.state_dict().items() if not torch.equal(v, before[k])}
    assert updated == {k for k, _ in ss_parameters(ss)}
