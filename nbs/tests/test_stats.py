"Intervals over seeds against arithmetic, over classes against closed forms."
import pytest
import torch

from mtl_nb.core import BadInput
from mtl_nb.evaluation.stats import T975, over_classes, over_seeds, t_quantile


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


def test_student_t():
    assert [t_quantile(df) for df in range(1, 11)] == list(T975)
    assert t_quantile(30) == pytest.approx(2.0423, abs=1e-3) and t_quantile(10**6) == pytest.approx(1.95996, abs=1e-4)
    assert all(t_quantile(df) > t_quantile(df + 1) for df in range(1, 60))
    with pytest.raises(BadInput, match="at least 1 degree"): t_quantile(0)


def test_seeds():
    parts = [(.01, .002), (.03, .004), (.02, .003)]
    mean, ci = over_seeds(parts)
    assert mean == pytest.approx(.02) and ci == pytest.approx(4.303*.01/3**.5)
    assert over_seeds(parts, shared=.5)[1] == .5 and over_seeds(parts[:1], shared=.5) == parts[0]
    with pytest.raises(BadInput, match="at least one run"): over_seeds([])


def test_what_does_not_fit():
    with pytest.raises(BadInput, match="3 scores for 2 tasks"):
        over_classes(torch.zeros(3), torch.zeros(2, 5, dtype=torch.int64), 16)
    with pytest.raises(BadInput, match="every class must be missing"):
        over_classes(torch.zeros(2), torch.tensor([[0, 1, 2], [0, 1, 2]]), 3)
