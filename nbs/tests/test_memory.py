"""Peak memory against the number of tasks, and that of a folder of many pictures, each in a process of its own:
`python nbs/tests/test_memory.py tasks 1000000`, or `folder PATH`. `data/results/reliability-memory.json` holds rows
that these commands printed."""
import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from mtl_nb.data.episodes import TaskShape
from mtl_nb.evaluation.exam import make_exam

root = Path(__file__).parents[2]


def peak_mib():
    "The most memory that this process has had since its start, with the pages of mapped files that it has read."
    return next(int(o.split()[1]) for o in open("/proc/self/status") if o.startswith("VmHWM"))/1024


def reset_peak():
    "Forget it, and give back what is free: from here on it counts from what is in use now."
    gc.collect()
    with suppress(AttributeError): ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return peak_mib()


def evaluate_tasks(tasks):
    "A linear head on features of glyphs, 5-way 1-shot, from the list of tasks to the row of `results.json`."
    import torch
    from mtl_nb.data.glyphs import glyphs
    from mtl_nb.evaluation.exam import evaluate, features
    from mtl_nb.evaluation.meta_test import Protocol, Result
    from mtl_nb.experiments.records import make_row
    from mtl_nb.models.base_learner import BaseLearner
    from mtl_nb.train.checkpoints import load_backbone
    torch.set_num_threads(1)
    net, bank, shape = load_backbone(root/"data/weights/glyphs-small.safetensors")[0], glyphs(0)["val"], TaskShape()
    feats, head = features(net, bank), BaseLearner(net.num_features, 5, .1, 20)
    evaluate(feats, make_exam(bank, shape, tasks=100), head)
    before, began = reset_peak(), time.perf_counter()
    exam = make_exam(bank, shape, tasks=tasks)
    result = Result(exam, evaluate(feats, exam, head), Protocol(shape=shape, tasks=tasks), head.lr, head.steps)
    row = make_row("head only", result, 0)
    assert len(result.correct) == row["tasks"] == tasks and row["accuracy"] > 40
    return dict(tasks=tasks, peak_mib=round(peak_mib(), 1), before_mib=round(before, 1),
                seconds=round(time.perf_counter() - began, 1))


def index_folder(folder):
    "A folder of many pictures, decoded into a cache and opened as a bank; then once more from the cache."
    import torch
    from mtl_nb.data.folders import folder_bank
    torch.set_num_threads(1)
    before, began = reset_peak(), time.perf_counter()
    bank = folder_bank(Path(folder))
    assert bank.x.shape[1:] == (3, 16, 16)
    return dict(pictures=len(bank), pixels_mib=round(bank.x.numel()/2**20, 1),
                peak_mib=round(peak_mib(), 1), before_mib=round(before, 1),
                seconds=round(time.perf_counter() - began, 1))


def measure(name, argument, **env):
    "What a function of this file returns in a process of its own."
    out = subprocess.run([sys.executable, __file__, name, str(argument)], capture_output=True, text=True, cwd=root,
                         env=os.environ | dict(OMP_NUM_THREADS="1", TQDM_DISABLE="1", PYTHONPATH=str(root)) | env)
    assert out.returncode == 0, out.stderr
    return json.loads(out.stdout.splitlines()[-1])


def make_folder(folder, pictures, classes=100):
    "Class folders of tiny pictures: hard links to a few files, which are not the same in two classes."
    import numpy as np
    from PIL import Image
    rng = np.random.default_rng(0)
    for c in range(classes):
        place = folder/f"class{c:03}"
        place.mkdir(parents=True)
        for i in range(pictures//classes):
            file = place/f"{i:05}.png"
            if i >= 5: file.hardlink_to(place/f"{i % 5:05}.png")
            else: Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(file)
    return folder


RECORD = root/"data/results/reliability-memory.json"

def test_the_record_shows_flat_memory():
    "From a thousand tasks to a million memory grows by the counts and their copies; pictures cost their mapped pixels."
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    grown = {r["tasks"]: r["peak_mib"] - r["before_mib"] for r in record["rows"]}
    assert [*grown] == [10**3, 10**4, 10**5, 10**6]
    assert (grown[10**6] - grown[10**3])*2**20 < 64*10**6
    for row in record["folders"]:
        assert (row["peak_mib"] - row["before_mib"] - row["pixels_mib"])*2**20 < 16*2**20 + 512*row["pictures"]


def test_a_list_of_a_million_tasks_is_not_held():
    from mtl_nb.data.bank import ImageBank
    import torch
    bank = ImageBank(torch.arange(120).view(120, 1, 1, 1).expand(-1, 3, 4, 4).to(torch.uint8),
                     torch.arange(6).repeat_interleave(20), list("abcdef"))
    exam = make_exam(bank, TaskShape(5, 1, 5), tasks=10**6)
    assert len(exam) == 10**6 and len(exam.idx) == 10_000
    assert [len(o) for o, _ in zip(exam.chunks(1000), range(12))] == [1000]*12


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
def test_memory_is_flat(tmp_path):
    few, many = (measure("tasks", n) for n in (1000, 200_000))
    assert many["peak_mib"] - few["peak_mib"] < 24
    row = measure("folder", make_folder(tmp_path/"many", 20_000), MTL_NB_CACHE=str(tmp_path))
    assert row["peak_mib"] - row["before_mib"] - row["pixels_mib"] < 24


if __name__ == "__main__":
    what, argument = sys.argv[1:]
    print(json.dumps(evaluate_tasks(int(argument)) if what == "tasks" else index_folder(argument)))
