"What is generated agrees with what it is generated from, and nothing foreign stands in the project."
import importlib.util, os, re, subprocess, sys
from pathlib import Path

root = Path(__file__).parents[2]
allowed = {"nbs", "mtl_nb", "data", "settings.ini", "setup.py", "README.md", "pyproject.toml", "LICENSE", "MANIFEST.in"}

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

def test_links_of_the_readme_lead_somewhere():
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", (root/"README.md").read_text(encoding="utf-8"))
    assert not [o for o in links if not (root/o).exists()]

def test_every_module_has_its_notebook():
    modules = {o.stem for o in (root/"mtl_nb").glob("*.py") if o.stem[0] != "_"}
    pages = {o: re.search(r'#\|\s*default_exp\s+(\w+)', o.read_text(encoding="utf-8")) for o in (root/"nbs").glob("[0-9]*.ipynb")}
    exported = {m[1]: re.sub(r"^\d+_", "", o.stem) for o, m in pages.items() if m}
    assert exported == {o: o for o in modules}

def test_no_path_of_one_machine(files):
    found = re.compile(r"(?<![\w.:/])/(work|root|home|Users|opt)/[\w.]+")
    texts = [o for o in files if not o.endswith((".png", ".safetensors"))]
    hits = {o: m[0] for o in texts if (m := found.search((root/o).read_text(encoding="utf-8")))}
    assert not hits

def test_top_level(files):
    assert {o.split("/")[0] for o in files if not o.startswith(".")} <= allowed
