"Fixtures of several test files."
import os, re, shutil, subprocess
from pathlib import Path

import pytest
import torch
from browser import launch
from crash import note

from mtl_nb.core import BadInput
from mtl_nb.data.bank import ImageBank
from mtl_nb.models.resnet12 import ResNet12

root = Path(__file__).parents[2]

def pytest_configure(config):
    "Hypothesis tries the same few examples each time; many, where slow tests are asked for."
    from hypothesis import settings
    many = "slow" in config.getoption("--nbflags").split()
    settings.register_profile("mtl_nb", max_examples=200 if many else 25, deadline=None, derandomize=True, database=None)
    settings.load_profile("mtl_nb")

def pytest_sessionstart(session):
    "With RELIABILITY=inputs: count the refusals of bad input that the tests bring about, each message once."
    if os.environ.get("RELIABILITY") != "inputs": return
    begin, session.refusals = BadInput.__init__, set()
    def counted(self, *args):
        begin(self, *args)
        session.refusals.add(re.sub(r"\S*pytest-\S*|\d+", "N", str(self))) # not each place and number anew
    BadInput.__init__ = counted

def pytest_sessionfinish(session):
    if not hasattr(session, "refusals"): return
    one_line = sum("\n" not in o for o in session.refusals)
    note("inputs", rows=[dict(tried=len(session.refusals), one_line=one_line, tests=session.testscollected,
                              failed=session.testsfailed)])

@pytest.fixture(scope="module")
def files():
    "Paths of the project's files: those that git has or would take."
    if not (root/".git").exists(): pytest.skip("not a clone")
    out = subprocess.run("git ls-files -co --exclude-standard -z".split(), cwd=root, capture_output=True, text=True, check=True).stdout
    return sorted({o for o in out.split("\0") if (root/o).is_file()})

@pytest.fixture()
def copy(files, tmp_path):
    "A copy of the project to run commands in; the project itself is never touched."
    for o in files:
        (tmp_path/o).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root/o, tmp_path/o)
    return tmp_path

@pytest.fixture(scope="module")
def browser():
    "A headless Chromium, for tests in a browser."
    with launch() as browser: yield browser

@pytest.fixture(scope="module")
def bank():
    "Eight classes of six coarse patterns, for files that make none of their own."
    g = torch.Generator().manual_seed(0)
    mean = torch.randint(256, (8, 1, 3, 4, 4), generator=g).expand(-1, 6, -1, -1, -1)   # a class is a coarse pattern
    x = (mean + torch.randint(-60, 60, (8, 6, 3, 4, 4), generator=g)).clamp(0, 255).to(torch.uint8).flatten(0, 1)
    return ImageBank(x.repeat_interleave(4, 2).repeat_interleave(4, 3), torch.arange(8).repeat_interleave(6), list("abcdefgh"))

@pytest.fixture(scope="module")
def net():
    "A tiny frozen network with batch-norm statistics of its own."
    net, g = ResNet12((4, 6, 8, 8), dropout=0.3), torch.Generator().manual_seed(1)
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d): m.running_mean.normal_(0, .2, generator=g); m.running_var.uniform_(.5, 2, generator=g)
    return net.requires_grad_(False).eval()
