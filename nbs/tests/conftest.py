"Fixtures of several test files."
import shutil, subprocess
from pathlib import Path

import pytest

root = Path(__file__).parents[2]

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
