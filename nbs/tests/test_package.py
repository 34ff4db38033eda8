"The package as others get it: built into an sdist, from that into a wheel."
import subprocess, sys, zipfile
from email import message_from_string
from importlib.metadata import entry_points
from pathlib import Path

root = Path(__file__).parents[2]

def test_wheel(copy):
    done = subprocess.run([sys.executable, "-m", "build", "--no-isolation", "-o", "dist"], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    wheel = zipfile.ZipFile(next((copy/"dist").glob("*.whl")))
    names = wheel.namelist()
    assert {o for o in names if ".dist-info/" not in o} == {f"mtl_nb/{o.name}" for o in (root/"mtl_nb").glob("*.py")}
    meta = message_from_string(wheel.read(next(o for o in names if o.endswith("METADATA"))).decode())
    assert meta["Name"] == "mtl_nb" and meta["Requires-Python"] == ">=3.11" and set(meta.get_all("Provides-Extra")) == {"dev", "docs"}
    assert any(o.startswith("torch>=") for o in meta.get_all("Requires-Dist"))
    assert meta.get_payload().lstrip().startswith("<!-- made from nbs/index.ipynb")
    assert any(o.endswith("LICENSE") for o in names)

def test_console_scripts():
    ours = [o for o in entry_points(group="console_scripts") if o.value.startswith("mtl_nb.")]
    assert {"mtl_run", "mtl_meta_test", "mtl_campaign"} <= {o.name for o in ours}
    assert all(callable(o.load()) for o in ours)
