"Heads: against arithmetic, odd numbers of pictures, what is learned, reproducible starts."
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mtl_nb.core import BadInput
from mtl_nb.models.heads import Classifier, Cosine, CosineHead, Prototypes

class Net(nn.Module):
    num_features = 6
    def forward(self, x): return x.flatten(1)[:, :6]

def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)

@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("rotation", [False, True])
def test_the_classifier_of_phase_1(cosine, rotation):
    state = torch.get_rng_state()
    a, b = (Classifier(Net(), 5, 3, cosine, rotation) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.head.weight, Classifier(Net(), 5, 4, cosine, rotation).head.weight)
    x = rand(2, 3, 2, 2, dtype=torch.float32)
    assert a(x).shape == (2, 9 if rotation else 5)
    assert torch.equal(a(x)[:, :5], a.head(Net()(x)))
    if rotation: assert torch.equal(a(x)[:, 5:], a.rotation(Net()(x)))
    assert sorted({k.split(".")[0] for k in a.state_dict()}) == ["head", *["rotation"]*rotation]

def test_the_classifier_validates_its_input():
    with pytest.raises(BadInput, match="Linear has no num_features"): Classifier(nn.Linear(2, 2), 5)
    with pytest.raises(BadInput, match="at least one class, got 0"): Classifier(Net(), 0)

def test_the_cosine_head_is_the_cosine():
    head, f = CosineHead(6, 4).double(), rand(3, 6)
    want = head.scale*F.cosine_similarity(f[:, None], head.weight, dim=-1)
    assert torch.allclose(head(f), want, atol=1e-12)
    head(f).sum().backward()
    assert head.scale.grad is not None and head.weight.grad.norm() > 0

@pytest.mark.parametrize("counts", [(1, 1, 1), (2, 2, 2), (1, 4, 2)])
def test_prototypes_are_means_whatever_the_counts_and_their_order(counts):
    labels = torch.cat([torch.full((k,), c) for c, k in enumerate(counts)])[None]
    support, query = rand(1, len(labels[0]), 6), rand(1, 5, 6, seed=1)
    means = torch.stack([support[0, labels[0] == c].mean(0) for c in range(3)])
    order = torch.randperm(len(labels[0]), generator=torch.Generator().manual_seed(0))
    for head, want in (
        (Prototypes(3, 2.), 2*(query[0].square().sum(1, keepdim=True) - torch.cdist(query[0], means).square())),
        (Cosine(3), 10*F.cosine_similarity(query[0][:, None], means, dim=-1)),
    ):
        z = head(support, labels, query)
        assert torch.allclose(z[0], want, atol=1e-6)
        assert torch.allclose(head(support[:, order], labels[:, order], query), z, atol=1e-12)

def test_a_batch_is_its_tasks():
    support, query = rand(4, 6, 5), rand(4, 3, 5, seed=1)
    labels = torch.arange(3).repeat(2).expand(4, -1)
    for head in Prototypes(3), Cosine(3):
        both = head(support, labels, query)
        for e in range(4):
            one = head(support[e:e + 1], labels[e:e + 1], query[e:e + 1])[0]
            assert torch.allclose(one, both[e], atol=1e-12)

def test_which_factor_is_learned():
    assert not Prototypes(3).weight.requires_grad and Cosine(3).weight.requires_grad
    assert [Prototypes(3).weight.item(), Cosine(3).weight.item()] == [1, 10]
    assert list(Cosine(3).state_dict()) == ["weight"] and Prototypes(3, learn=True).weight.requires_grad
    with pytest.raises(BadInput, match="at least one class, got n_way=0"): Prototypes(0)
