"""The first cell of every page, as its button leads to Colab.

It fetches and installs the project where the package is missing, and does nothing elsewhere.

`python nbs/tests/test_colab.py` puts it into pages that lack it. No test uses the network."""
import importlib.util
import json
import sys
import tomllib
import uuid
from pathlib import Path
from types import SimpleNamespace

import pytest

root = Path(__file__).parents[2]
PAGES = sorted((root/"nbs").glob("[0-9]*.ipynb"))
REPOSITORY = tomllib.loads((root/"pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]
EXTRAS = {"29_onnx": "[onnx]"} # of the package, that a page needs and Colab lacks


def install_cell(page):
    return f'''#| hide
try:
    import os
    import mtl_nb
except ImportError: # as on Colab: fetch the project with its recorded runs, and install it
    get_ipython().system("git clone -q --depth 1 {REPOSITORY} project")
    get_ipython().run_line_magic("pip", "install -q ./project{EXTRAS.get(page.stem, '')}")
if os.path.isdir("project/nbs"): os.chdir("project/nbs") # where ../data holds the recorded runs'''


def first_cell(page):
    "The first code cell that does something."
    cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    return next(o for o in sources if not o.startswith("#| default_exp"))


@pytest.mark.parametrize("page", PAGES, ids=[p.stem for p in PAGES])
def test_every_page_with_a_button_begins_with_it(page):
    where = f"{REPOSITORY.removeprefix('https://github.com/')}/blob/main/{page.relative_to(root).as_posix()}"
    assert f"(https://colab.research.google.com/github/{where})" in heading(page)
    assert first_cell(page) == install_cell(page), "run python nbs/tests/test_colab.py"


def heading(page):
    spec = importlib.util.spec_from_file_location("build", root/"nbs/_site/build.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    return build.heading({"title": page.stem}, page, None)


def test_the_front_page_has_no_button(): assert "colab" not in heading(root/"nbs/index.ipynb")


def run_first(missing, folder, monkeypatch):
    "What the cell runs in the shell and with magics, in an empty folder."
    done = []
    def clone(command):
        done.append(command)
        (folder/command.split()[-1]/"nbs").mkdir(parents=True)
    shell = SimpleNamespace(system=clone, run_line_magic=lambda *o: done.append(" ".join(o)))
    monkeypatch.chdir(folder)
    if missing: monkeypatch.setitem(sys.modules, "mtl_nb", None)
    exec(install_cell(PAGES[0]), {"get_ipython": lambda: shell})
    return done, Path.cwd()


def test_nothing_is_installed_where_the_package_is(tmp_path, monkeypatch):
    assert run_first(False, tmp_path, monkeypatch) == ([], tmp_path)


def test_the_project_is_fetched_and_installed_where_it_is_not(tmp_path, monkeypatch):
    done, place = run_first(True, tmp_path, monkeypatch)
    assert done == [f"git clone -q --depth 1 {REPOSITORY} project", "pip install -q ./project"]
    assert place == tmp_path/"project/nbs"
    monkeypatch.undo()
    assert run_first(False, tmp_path, monkeypatch) == ([], place), "as after a restart of the kernel"


def insert(page):
    "Put the cell below the title, unless the page has it."
    nb = json.loads(page.read_text(encoding="utf-8"))
    if first_cell(page) == install_cell(page): return
    at = next(i for i, c in enumerate(nb["cells"]) if c["cell_type"] == "markdown") + 1
    cell = dict(cell_type="code", execution_count=None, id=uuid.uuid4().hex[:8], metadata={}, outputs=[],
                source=install_cell(page).splitlines(keepends=True))
    nb["cells"].insert(at, cell)
    page.write_text(json.dumps(nb, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    for page in PAGES: insert(page)
