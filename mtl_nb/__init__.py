"""Meta-Transfer Learning for few-shot learning. The names below are imported at their first use."""
__version__ = "0.2.0"

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .data.bank import ImageBank as ImageBank
    from .data.datasets import load_data as load_data
    from .data.episodes import TaskSampler as TaskSampler
    from .data.episodes import TaskShape as TaskShape
    from .data.hard_tasks import HardTaskSampler as HardTaskSampler
    from .evaluation.meta_test import meta_test as meta_test
    from .experiments.config import ExperimentConfig as ExperimentConfig
    from .experiments.run import run as run
    from .hub import from_pretrained as from_pretrained
    from .hub import push_to_hub as push_to_hub
    from .hub import save_pretrained as save_pretrained
    from .models.base_learner import BaseLearner as BaseLearner
    from .models.resnet12 import ResNet12 as ResNet12
    from .models.scale_shift import merge as merge
    from .models.scale_shift import scale_shift as scale_shift
    from .publish import load_weights as load_weights
    from .recognize import Recognizer as Recognizer
    from .train.meta_train import MTL as MTL
    from .train.meta_train import meta_train as meta_train
    from .train.pretrain import pretrain as pretrain

_HOME = {
    "BaseLearner": "models.base_learner",
    "ExperimentConfig": "experiments.config",
    "HardTaskSampler": "data.hard_tasks",
    "ImageBank": "data.bank",
    "MTL": "train.meta_train",
    "Recognizer": "recognize",
    "ResNet12": "models.resnet12",
    "TaskSampler": "data.episodes",
    "TaskShape": "data.episodes",
    "from_pretrained": "hub",
    "load_data": "data.datasets",
    "load_weights": "publish",
    "merge": "models.scale_shift",
    "meta_test": "evaluation.meta_test",
    "meta_train": "train.meta_train",
    "pretrain": "train.pretrain",
    "push_to_hub": "hub",
    "run": "experiments.run",
    "save_pretrained": "hub",
    "scale_shift": "models.scale_shift",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name):
    if name not in _HOME: raise AttributeError(f"module 'mtl_nb' has no attribute '{name}'")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    return value


def __dir__(): return sorted([*globals(), *_HOME])
