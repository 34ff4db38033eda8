"The package as others get it: built into an sdist, from that into a wheel, installed into a fresh environment."
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email import message_from_string
from pathlib import Path
from textwrap import dedent

import pytest

root = Path(__file__).parents[2]

@pytest.fixture(scope="module")
def dist(files, tmp_path_factory):
    "The folder with sdist and wheel, built in a copy of the project."
    copy = tmp_path_factory.mktemp("project")
    for o in files:
        if o.startswith(("nbs/", "data/", ".")): continue
        (copy/o).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root/o, copy/o)
    done = subprocess.run([sys.executable, "-m", "build", "--no-isolation", "-o", "dist"], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return copy/"dist"

def test_wheel(dist):
    wheel = zipfile.ZipFile(next(dist.glob("*.whl")))
    names = wheel.namelist()
    files = (o for o in (root/"mtl_nb").rglob("*") if o.is_file() and "__pycache__" not in o.parts)
    assert {o for o in names if ".dist-info/" not in o} == {o.relative_to(root).as_posix() for o in files}
    assert "mtl_nb/py.typed" in names
    meta = message_from_string(wheel.read(next(o for o in names if o.endswith("METADATA"))).decode())
    assert meta["Name"] == "mtl_nb" and meta["Requires-Python"] == ">=3.11" and {"nb", "dev", "docs"} <= set(meta.get_all("Provides-Extra"))
    assert any(o.startswith("torch>=") for o in meta.get_all("Requires-Dist"))
    assert meta.get_payload().lstrip().startswith("<!-- made from nbs/index.ipynb")
    assert wheel.read(next(o for o in names if o.endswith("licenses/LICENSE"))) == (root/"LICENSE").read_bytes()

def test_sdist(dist):
    names = {o.partition("/")[2] for o in tarfile.open(next(dist.glob("*.tar.gz"))).getnames()}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "settings.ini", "setup.py", "mtl_nb/py.typed"} <= names

def test_size(dist):
    "Sdist and wheel take at most 4 MB each."
    for o in dist.iterdir(): assert o.stat().st_size <= 4e6, o

def call(command, cwd):
    "Run a command with nothing of this project on its path."
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run([str(o) for o in command], cwd=cwd, env=env, capture_output=True, text=True)

@pytest.fixture(scope="module")
def installed(dist, tmp_path_factory):
    """The folder of commands of a fresh environment that holds the wheel.

    What the package requires is borrowed from this environment by its path; of what is installed for editing, nothing is."""
    home = tmp_path_factory.mktemp("env")
    venv.create(home, with_pip=False)
    paths = sysconfig.get_paths("venv", vars={"base": str(home), "platbase": str(home)})
    pip = [sys.executable, "-m", "pip", f"--python={paths['scripts']}/python", "install", "-q", "--no-deps", "--no-index"]
    done = call([*pip, next(dist.glob("*.whl"))], home)
    assert done.returncode == 0, done.stdout + done.stderr
    (Path(paths["purelib"])/"borrowed.pth").write_text(sysconfig.get_paths()["purelib"])
    return Path(paths["scripts"])

def test_commands_in_an_empty_folder(installed, tmp_path):
    "The installed command says its version and its help, and what to do about files that are not there."
    said = call([installed/"mtl", "--version"], tmp_path)
    version = re.search(r'__version__ = "(.+?)"', (root/"mtl_nb/__init__.py").read_text(encoding="utf-8"))[1]
    assert (said.returncode, said.stdout) == (0, f"mtl_nb {version}\n"), said.stderr
    said = call([installed/"mtl", "--help"], tmp_path)
    assert said.returncode == 0 and all(f"\n  mtl {o} " in said.stdout for o in ("run", "test", "results", "bench")), said.stdout
    for words in (["results"], ["test"], ["test", "--weights", "nowhere"], ["run", "--data", "miniimagenet"]):
        said = call([installed/"mtl", *words], tmp_path)
        assert said.returncode == 2 and said.stderr.startswith("mtl: ") and said.stderr.count("\n") == 1, said.stderr
    assert not any(tmp_path.iterdir())

def test_a_run_in_an_empty_folder(installed, tmp_path):
    "Run and test with the defaults, which lie below the folder that the command is called in."
    tiny = "--widths 4,4,8,8 --phase1.epochs 1 --phase2.tasks 8 --eval-every 8 --eval-tasks 20 --select-tasks 20 --shots 1".split()
    said = call([installed/"mtl", "run", *tiny], tmp_path)
    assert said.returncode == 0, said.stderr
    folder, = (tmp_path/"data/runs").iterdir()
    said = call([installed/"mtl", "test", "--weights", folder.relative_to(tmp_path), "--tasks", "20"], tmp_path)
    assert said.returncode == 0 and "head only" in said.stdout, said.stderr

def test_every_module_without_tools(installed, tmp_path):
    "Every module is imported, and every public name is there, without the tools that build and test the project."
    code = """
        import importlib, pkgutil, sys
        for tool in "nbdev execnb IPython ipywidgets pytest sphinx build mypy".split(): sys.modules[tool] = None
        import mtl_nb
        assert sys.prefix in mtl_nb.__file__
        for o in pkgutil.walk_packages(mtl_nb.__path__, "mtl_nb."):
            if not o.name.endswith(("__main__", "_modidx")): importlib.import_module(o.name)
        for o in mtl_nb.__all__: getattr(mtl_nb, o)"""
    said = call([installed/"python", "-c", dedent(code)], tmp_path)
    assert said.returncode == 0, said.stderr

def test_one_command(installed):
    assert [o.name for o in installed.glob("mtl*")] == ["mtl"]


def test_public_names_are_lazy():
    "`import mtl_nb` imports nothing heavy, and every public name is there when it is asked for."
    code = "import sys, mtl_nb\nassert 'torch' not in sys.modules\nfor o in mtl_nb.__all__: getattr(mtl_nb, o)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


@pytest.mark.parametrize("heavy", ["torchvision", "ipywidgets", "matplotlib.pyplot"])
def test_heavy_libraries_are_imported_where_they_are_used(heavy):
    code = f"import sys, mtl_nb, mtl_nb.cli, mtl_nb.experiments.run\nassert '{heavy}' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
