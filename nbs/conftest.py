"""`pytest` runs every notebook outside folders with a leading `_` as one test, through nbdev, which honours the `#|` options.
Cells flagged slow, cuda or data, and tests marked slow, are left out unless asked for: `pytest --nbflags=slow`
(several: `--nbflags="slow data"`)."""
import os, re, sys
from contextlib import contextmanager
from io import StringIO
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before any notebook imports torch: the workers share the cores
os.environ.update(TQDM_DISABLE="1", MPLBACKEND="Agg")

import pytest
from fastcore.nbio import read_nb
from nbdev.config import get_config
from nbdev.test import test_nb as run_notebook

def pytest_addoption(parser):
    parser.addoption("--nbflags", default="", help="run the notebook cells with these flags too, e.g. 'slow data'")

def pytest_collect_file(file_path, parent):
    nbs = parent.config.rootpath/"nbs"
    if file_path.suffix == ".ipynb" and not any(o[0] in "._" for o in file_path.relative_to(nbs).parts):
        return Notebook.from_parent(parent, path=file_path)

# Files that take longest, so that no worker begins one of them when the others are done. The order is only for speed.
LONGEST = """test_kills test_corruption test_golden test_run test_methods test_tta test_another_device 23_evaluation.tta test_several_processes
36_train.objectives 00_tour 31_methods.base 09_train.meta_train 32_methods.ablations test_hub test_big_bank test_types
test_package 07_train.pretrain 11_evaluation.meta_test 35_methods.tadam 10_data.hard_tasks test_plans test_recognize
test_pretrained test_publish test_folders test_datasets test_checkpoints test_sync""".split()

def pytest_collection_modifyitems(items):
    "The longest files first, the others as they were found."
    places = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda o: places.get(o.path.stem, len(places)))

def pytest_runtest_setup(item):
    "Tests marked `slow` take minutes; they run when asked for, as slow cells do."
    asked = "slow" in item.config.getoption("--nbflags").split()
    if item.get_closest_marker("slow") and not asked: pytest.skip("takes minutes: add --nbflags=slow")

@contextmanager
def restored_registries():
    "What is registered inside, such as a class that a page defines anew, is forgotten afterwards: pages share a process."
    from mtl_nb.data.datasets import DATASETS
    from mtl_nb.methods.base import METHODS
    from mtl_nb.models.backbones import BACKBONES, FAMILIES, backbone_names
    backbone_names()  # imports the package's own, as looking into METHODS does
    methods, others = dict(METHODS), [(o, dict(o)) for o in (BACKBONES, FAMILIES, DATASETS)]
    try: yield
    finally:
        METHODS._methods, METHODS._sorted = methods, None
        for registry, before in others:
            registry.clear()
            registry.update(before)

@pytest.fixture()
def clean_registries():
    "For tests that register something."
    with restored_registries(): yield

class Notebook(pytest.File):
    def collect(self): yield Page.from_parent(self, name="page")

class Page(pytest.Item):
    def runtest(self):
        flags, skip, err = self.config.getoption("nbflags").split(), get_config(self.path).tst_flags.split(), StringIO()
        with restored_registries(), patch.object(sys, "__stderr__", err):  # where nbdev prints the failing cell and its traceback
            ok, _ = run_notebook(self.path, skip_flags=skip, force_flags=flags, basepath=self.config.rootpath, cell_timeout=None if flags else 600)
        if plt := sys.modules.get("matplotlib.pyplot"): plt.close("all")
        if not ok: raise PageFailed(self.explain(re.sub(r"\x1b\[[\d;]*m", "", err.getvalue()).strip()))

    def explain(self, tb):
        "nbdev's traceback `tb` without the runner's frames, below the source of the cell that failed"
        if not (m := re.search(r"While Executing Cell #(\d+):", tb)): return tb
        cell = read_nb(self.path).cells[int(m[1]) - 1]
        tb = re.sub(r"  File \"[^\"]*(nbdev|execnb|IPython)[/\\][^\n]*\n(    [^\n]*\n)*", "", tb[m.end():].strip())
        return f"cell {m[1]} of {self.path.name}: {tb.splitlines()[-1]}\n\n" + "\n".join(f"    {o}" for o in cell.source.splitlines()) + f"\n\n{tb}"

    def repr_failure(self, excinfo):
        return str(excinfo.value) if isinstance(excinfo.value, PageFailed) else super().repr_failure(excinfo)

    def reportinfo(self): return self.path, None, self.path.name

class PageFailed(Exception): "The message is the failing cell and its traceback."
