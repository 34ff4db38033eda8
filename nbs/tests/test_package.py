"The package as others get it: built into an sdist, from that into a wheel."
import subprocess
import sys
import zipfile
from email import message_from_string
from importlib.metadata import entry_points
from pathlib import Path

import pytest

root = Path(__file__).parents[2]

def test_wheel(copy):
    done = subprocess.run([sys.executable, "-m", "build", "--no-isolation", "-o", "dist"], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    wheel = zipfile.ZipFile(next((copy/"dist").glob("*.whl")))
    names = wheel.namelist()
    ours = {o.relative_to(root).as_posix() for o in (root/"mtl_nb").rglob("*") if o.suffix in (".py", ".typed")}
    assert {o for o in names if ".dist-info/" not in o} == ours
    meta = message_from_string(wheel.read(next(o for o in names if o.endswith("METADATA"))).decode())
    assert meta["Name"] == "mtl_nb" and meta["Requires-Python"] == ">=3.11" and set(meta.get_all("Provides-Extra")) == {"nb", "onnx", "dev", "docs"}
    assert any(o.startswith("torch>=") for o in meta.get_all("Requires-Dist"))
    assert meta.get_payload().lstrip().startswith("<!-- made from nbs/index.ipynb")
    assert any(o.endswith("LICENSE") for o in names)

def test_console_scripts():
    ours = [o for o in entry_points(group="console_scripts") if o.value.startswith("mtl_nb.")]
    assert [o.name for o in ours] == ["mtl"] and callable(ours[0].load())


def test_public_names_are_lazy():
    "`import mtl_nb` imports nothing heavy, and every public name is there when it is asked for."
    code = "import sys, mtl_nb\nassert 'torch' not in sys.modules\nfor o in mtl_nb.__all__: getattr(mtl_nb, o)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


@pytest.mark.parametrize("heavy", ["torchvision", "ipywidgets", "matplotlib.pyplot"])
def test_heavy_libraries_are_imported_where_they_are_used(heavy):
    code = f"import sys, mtl_nb, mtl_nb.cli, mtl_nb.experiments.run\nassert '{heavy}' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
