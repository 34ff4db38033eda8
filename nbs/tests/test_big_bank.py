"A bank larger than memory: mapped from a file, fetched ahead, in both phases."
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from mtl_nb.models.base_learner import BaseLearner
from mtl_nb.data.bank import ImageBank, prefetch
from mtl_nb.data.episodes import TaskSampler, TaskShape
from mtl_nb.data.glyphs import glyphs
from mtl_nb.train.meta_train import MTL, MetaTrainConfig, meta_state, meta_train
from mtl_nb.train.pretrain import PretrainConfig, pretrain, pretrain_state
from mtl_nb.models.resnet12 import ResNet12
from mtl_nb.models.scale_shift import scale_shift

def mapped(path, gigabytes, size=84, classes=100):
    "A file of so many gigabytes, mostly holes, some of it noise, and a bank over it."
    n = int(gigabytes*1e9)//(3*size*size)//classes*classes
    with open(path, "wb") as f:
        f.truncate(n*3*size*size)
        f.write(np.random.default_rng(0).integers(0, 256, 3*size*size*1000, np.uint8).tobytes())
    x = torch.from_numpy(np.memmap(path, np.uint8, "c", shape=(n, 3, size, size)))
    names, y = [f"c{i:03}" for i in range(classes)], torch.arange(classes).repeat_interleave(n//classes)
    return ImageBank(x, y, names, torch.arange(n))

def anonymous():
    "Gigabytes of memory that belong to no file."
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))/1e6

class Enough(Exception): pass

def train_on(bank, steps):
    "So many steps of phase 1 and of phase 2; the most anonymous memory on the way."
    most, left = [anonymous()], [steps]
    state = pretrain_state(ResNet12((4, 4, 8, 8)), len(bank.names), cfg := PretrainConfig(batch=32, lr=.01))
    before = {k: v.clone() for k, v in state.model.state_dict().items()}
    def call(x):
        left[0] -= 1
        most.append(anonymous())
        if left[0] < 0: raise Enough
        return state.model(x)
    with pytest.raises(Enough): next(pretrain(state, bank, cfg, call=call))
    assert any(not torch.equal(v, before[k]) for k, v in state.model.state_dict().items())
    cfg = MetaTrainConfig(tasks=2*steps, batch=2)
    phase2 = meta_state(MTL(scale_shift(state.model.net), BaseLearner(8, 5)), cfg)
    for record in meta_train(phase2, TaskSampler(bank.by_class, TaskShape(), 2), bank, cfg): most.append(anonymous())
    assert record["tasks"] == 2*steps
    return max(most)

@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is read from /proc")
def test_ten_gigabytes_train_in_two(tmp_path):
    out = subprocess.run([sys.executable, __file__, tmp_path/"big.bin"], capture_output=True, text=True,
                         env={**os.environ, "TQDM_DISABLE": "1"})
    assert out.returncode == 0, out.stderr
    gigabytes, most = map(float, out.stdout.split())
    print(f"{gigabytes:.2f} GB of images, {most:.2f} GB of anonymous memory at most")
    assert gigabytes > 9.9 and most < 2

@pytest.mark.parametrize("ahead", [0, 1, 2, 7])
def test_order_and_labels(ahead):
    bank = glyphs(0)["val"]
    batches = torch.randperm(len(bank), generator=torch.Generator().manual_seed(0)).split(333)
    there = list(prefetch(bank, iter(batches), torch.device("cpu"), ahead))
    assert len(there) == len(batches)
    for idx, (x, y) in zip(batches, there): assert torch.equal(x, bank.take(idx)) and torch.equal(y, bank.y[idx])

def test_nothing_to_fetch(): assert list(prefetch(glyphs(0)["val"], [], torch.device("cpu"))) == []

def test_errors_come_through_and_threads_end():
    bank, before = glyphs(0)["val"], threading.active_count()
    with pytest.raises(IndexError): list(prefetch(bank, [torch.tensor([len(bank)])], torch.device("cpu")))
    some = prefetch(bank, torch.arange(1000).split(10), torch.device("cpu"))
    next(some)
    some.close()
    for t in threading.enumerate(): t.join(5) if t is not threading.current_thread() and not t.daemon else None
    assert threading.active_count() <= before

if __name__ == "__main__":
    torch.set_num_threads(1)
    bank = mapped(sys.argv[1], 10)
    print(bank.x.numel()/1e9, train_on(bank, 6))
