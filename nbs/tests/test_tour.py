"The tour's first cell: it fetches and installs the project where the package is missing, and does nothing elsewhere. No test uses the network."
import builtins
import importlib.util
import json
import tomllib
from pathlib import Path
from types import SimpleNamespace

root = Path(__file__).parents[2]
CELLS = json.loads((root/"nbs/00_tour.ipynb").read_text(encoding="utf-8"))["cells"]
FIRST = "".join(next(c["source"] for c in CELLS if c["cell_type"] == "code"))
REPOSITORY = tomllib.loads((root/"pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]


def run_first(missing):
    "What the cell runs in the shell and with magics."
    done = []
    shell = SimpleNamespace(system=done.append, run_line_magic=lambda *o: done.append(" ".join(o)))
    def without(name, *args, **kwargs):
        if missing and name == "mtl_nb": raise ModuleNotFoundError(name)
        return __import__(name, *args, **kwargs)
    exec(FIRST, {"get_ipython": lambda: shell, "__builtins__": vars(builtins) | {"__import__": without}})
    return done


def test_nothing_is_installed_where_the_package_is(): assert run_first(missing=False) == []


def test_the_project_is_fetched_and_installed_where_it_is_not():
    clone, install = run_first(missing=True)
    folder = install.split()[-1]
    assert clone == f"git clone -q --depth 1 {REPOSITORY} {folder.removeprefix('./')}" and install == f"pip install -q {folder}"
    records = next("".join(c["source"]) for c in CELLS if "data/results" in "".join(c["source"]) and c["cell_type"] == "code")
    assert f'"{folder.removeprefix("./")}"' in records, "the cell that reads records looks into the folder that was fetched"


def test_the_button_opens_this_notebook_of_the_repository():
    spec = importlib.util.spec_from_file_location("build", root/"nbs/_site/build.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    text = build.heading({"title": "The tour"}, root/"nbs/00_tour.ipynb", None)
    where = REPOSITORY.removeprefix("https://github.com/")
    assert f"(https://colab.research.google.com/github/{where}/blob/main/nbs/00_tour.ipynb)" in text
    assert f"({REPOSITORY}/blob/main/nbs/00_tour.ipynb)" in text
