"The annotations of the package agree with each other, as mypy reads them."

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_package_type_checks():
    command = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", "mtl_nb"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
