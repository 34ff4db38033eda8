"Intervals over classes: the jackknife against its closed form."
import pytest
import torch

from mtl_nb.evaluation.stats import over_classes


def test_class_effects_alone_have_the_interval_of_their_mean():
    g = torch.Generator().manual_seed(0)
    effect = torch.randn(20, generator=g, dtype=torch.float64)
    tasks = torch.rand(20_000, 20, generator=g).argsort(1)[:, :5]
    mean, ci, without = over_classes(effect[tasks].mean(1), tasks, 20)
    assert abs(mean - effect.mean()) < .02 and ci == pytest.approx(2.093*effect.std().item()/20**.5, rel=.1)
    c = without.argmax()   # without the worst class the rest is best
    assert c == effect.argmin()
    assert without[c] == pytest.approx(effect[torch.arange(20) != c].mean().item(), abs=.02)


def test_no_class_effects_leave_the_interval_over_tasks():
    g = torch.Generator().manual_seed(1)
    x, tasks = torch.randn(5000, generator=g), torch.rand(5000, 16, generator=g).argsort(1)[:, :5]
    ci = over_classes(x, tasks, 16)[1]
    assert 2.1*x.std()/5000**.5 < ci < 5*x.std()/5000**.5
