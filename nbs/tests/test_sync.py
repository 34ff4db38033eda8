"What is generated agrees with what it is generated from, and nothing foreign stands in the project."
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

root = Path(__file__).parents[2]
allowed = {"nbs", "mtl_nb", "data", "settings.ini", "setup.py", "README.md", "pyproject.toml", "LICENSE", "MANIFEST.in",
           "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff"}
by_hand = {"__init__.py", "__main__.py"}  # the only modules without a page

def run(code, cwd):
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | {"PYTHONPATH": str(cwd), "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, check=True)

def changed(copy, files):
    here = {o.relative_to(copy).as_posix() for o in copy.rglob("*") if o.is_file()}
    return sorted(here ^ set(files)) + [o for o in files if o in here and (copy/o).read_bytes() != (root/o).read_bytes()]

def site():
    spec = importlib.util.spec_from_file_location("build", root/"nbs/_site/build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def test_export_changes_nothing(copy, files):
    run("from nbdev.doclinks import nbdev_export; nbdev_export()", copy)
    assert not changed(copy, files), "run nbdev-export"

def test_clean_changes_nothing(copy, files):
    run("from nbdev.clean import nbdev_clean; nbdev_clean()", copy)
    assert not changed(copy, files), "run nbdev-clean"

def test_readme_is_the_index_page():
    md, pictures = site().readme()
    assert (root/"README.md").read_text(encoding="utf-8") == md, "run python nbs/_site/build.py --readme"
    assert {o.relative_to(root).as_posix(): o.read_bytes() for o in (root/"nbs/_site/readme").glob("*")} == pictures

def test_readme_is_short():
    "At most 450 words of prose, beside tables, pictures and code."
    text = (root/"README.md").read_text(encoding="utf-8")
    for other in (r"<!--.*?-->", r"```.*?```", r"^\|.*?$", r"!\[.*?\]\(.*?\)", r"(?<=\])\([^)]*\)"):
        text = re.sub(other, "", text, flags=re.S | re.M)
    assert len(re.findall(r"[\w'’-]+", text)) <= 450

def test_links_of_the_readme_lead_somewhere():
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", (root/"README.md").read_text(encoding="utf-8"))
    assert not [o for o in links if not (root/o).exists()]

def pages(): return sorted((root/"nbs").glob("[0-9]*.ipynb"))

def test_every_module_has_its_page():
    found = [o.relative_to(root/"mtl_nb").with_suffix("") for o in (root/"mtl_nb").rglob("*.py")]
    modules = {".".join(o.parts) for o in found if o.name[0] != "_"}
    stated = {o: re.search(r'#\|\s*default_exp\s+([\w.]+)', o.read_text(encoding="utf-8")) for o in pages()}
    assert {re.sub(r"^\d+_", "", o.stem): m[1] for o, m in stated.items() if m} == {o: o for o in modules}
    assert {o.name for o in (root/"mtl_nb").rglob("_*.py")} <= by_hand | {"_modidx.py"}

def test_page_numbers_are_used_once():
    numbers = [o.name[:2] for o in pages()]
    assert len(set(numbers)) == len(numbers)

def test_links_between_pages_lead_somewhere():
    "Every linked page exists, and each page of a part links to the one after it."
    names = {o.name for o in (root/"nbs").glob("*.ipynb")}
    missing, here = [], pages()
    for page in [*here, root/"nbs/index.ipynb"]:
        cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
        text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
        missing += [(page.name, o) for o in re.findall(r"\]\(([\w.]+\.ipynb)", text) if o not in names]
    assert not missing
    for a, b in zip(here, here[1:]):
        last = "".join(json.loads(a.read_text(encoding="utf-8"))["cells"][-1]["source"])
        if a.name[0] == b.name[0] or a.name < "20": assert f"]({b.name}" in last, f"{a.name} does not end with a link to {b.name}"

def test_no_path_of_one_machine(files):
    found = re.compile(r"(?<![\w.:/])/(work|root|home|Users|opt)/[\w.]+")
    texts = [o for o in files if not o.endswith((".png", ".safetensors", ".webp"))]
    hits = {o: m[0] for o in texts if (m := found.search((root/o).read_text(encoding="utf-8")))}
    assert not hits

def test_top_level(files):
    assert {o.split("/")[0] for o in files if not o.startswith(".")} <= allowed
