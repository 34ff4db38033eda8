"The ResNet-12: gradients, layouts, round trips, input validation."
from copy import deepcopy

import pytest
import torch

from mtl_nb.core import BadInput
from mtl_nb.models.resnet12 import ResBlock, ResNet12
from mtl_nb.train.checkpoints import load, save

WIDTHS = (4, 6, 8, 10)
def images(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

@pytest.mark.parametrize("shape", [(2, 3, 15, 16), (2, 3, 16, 15), (2, 1, 32, 32), (3, 32, 32), (2, 32, 32, 3)])
def test_other_shapes_are_rejected(shape):
    with pytest.raises(BadInput, match="takes"): ResNet12(WIDTHS)(torch.zeros(shape))

def test_every_parameter_gets_a_gradient():
    net = ResNet12(WIDTHS)
    net(images(4, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())

def test_gradients_are_those_of_finite_differences():
    block = ResBlock(2, 3).double().eval()
    x = images(1, 2, 4, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(block, (x,))

def test_channels_last_is_the_same_function():
    net, x = ResNet12(WIDTHS).eval(), images(2, 3, 20, 24)
    other = deepcopy(net).to(memory_format=torch.channels_last)
    assert (net(x) - other(x.contiguous(memory_format=torch.channels_last))).abs().max() < 1e-5

def test_a_batch_is_its_images_one_by_one():
    net, x = ResNet12(WIDTHS).eval(), images(5, 3, 16, 16)
    assert (net(x) - torch.cat([net(o[None]) for o in x])).abs().max() < 1e-5

def test_an_empty_batch():
    assert ResNet12(WIDTHS).eval()(torch.zeros(0, 3, 16, 16)).shape == (0, 10)

def test_saved_and_loaded(tmp_path):
    net = ResNet12(WIDTHS, seed=3)
    net(images(4, 3, 16, 16)) # so that the running averages are not those of a fresh network
    save(tmp_path/"net.safetensors", net.state_dict(), dict(widths=WIDTHS))
    tensors, record = load(tmp_path/"net.safetensors")
    other = ResNet12(record["widths"])
    other.load_state_dict(tensors)
    x = images(2, 3, 32, 32, seed=1)
    assert torch.equal(net.eval()(x), other.eval()(x)) and other.widths == WIDTHS

def test_dropout_is_off_by_default_and_only_in_training():
    assert all(m.p == 0 for m in ResNet12(WIDTHS).modules() if isinstance(m, torch.nn.Dropout))
    net, x = ResNet12(WIDTHS, dropout=.5), images(4, 3, 32, 32)
    assert torch.equal(net.eval()(x), net(x))

def test_fewer_blocks_and_other_widths():
    assert ResNet12((3, 5)).eval()(images(1, 3, 16, 16)).shape == (1, 5)
