"""Nothing that comes from outside can run code, write outside its folder, or arrive unchecked: the package is read for it.

What the rules find is a finding unless ALLOWED says why it is none. The rules themselves are tried on bad code."""
import ast
import re
from pathlib import Path

import pytest

root = Path(__file__).parents[2]
SOURCES = [p for p in sorted([*(root/"mtl_nb").rglob("*.py"), *(root/"nbs/_site").rglob("*.py"), root/"setup.py"])
           if p.name != "_modidx.py"]
SCRIPTS = sorted(p for p in (root/"nbs/_site").rglob("*") if p.suffix in (".js", ".mjs", ".html"))

# Full names, whatever they are imported as; a name stands for all that begins with it.
FORBIDDEN = """
pickle dill cloudpickle shelve marshal joblib: can run code when a file is opened
torch.load torch.hub.load numpy.load: can open pickles
eval exec __import__ builtins.eval builtins.exec: run text as code
os.system os.popen subprocess.getoutput subprocess.getstatusoutput commands: go through a shell
yaml.load yaml.unsafe_load yaml.full_load yaml.load_all: can make any object
tarfile.TarFile.extract tempfile.mktemp: can write elsewhere
hashlib.md5 hashlib.sha1: can be forged
ssl._create_unverified_context ssl.CERT_NONE: trusts any server
urllib.request requests httpx urllib3 aiohttp ftplib telnetlib: a way to the network beside data.downloads
""".strip()
RULES = {name: why for line in FORBIDDEN.splitlines() for names, _, why in [line.partition(": ")] for name in names.split()}
METHODS = dict(exec_module="runs a file", extract="can write elsewhere", load_state_dict_from_url="opens pickles")
KEYWORDS = dict(shell=True, allow_pickle=True, weights_only=False, trust_remote_code=True, verify=False, check_hostname=False)

# (file, what is found in it): why that is right
ALLOWED = {
    ("mtl_nb/data/downloads.py", "urllib.request"): "the one way to the network; https alone",
    ("mtl_nb/data/datasets.py", "pickle"): "CIFAR-100, after its SHA-256, by an unpickler that calls nothing but numpy's arrays",
    ("mtl_nb/cli.py", ".exec_module"): "--plugin: the user names a Python file of their own to be run",
}


def full_name(node, names):
    "`numpy.load` for `np.load`; a call or an index in front becomes `?`."
    if isinstance(node, ast.Name): return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute): return f"{full_name(node.value, names)}.{node.attr}"
    return "?"


def imported(tree):
    "(node, the full name that it imports, the name that it is given) of every import."
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): yield from ((node, o.name, o.asname or o.name.partition(".")[0]) for o in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((node, f"{node.module}.{o.name}", o.asname or o.name) for o in node.names)


def rule_of(name): return next((o for o in RULES if name == o or name.startswith(o + ".")), None)


def of_call(node):
    "What is wrong with a call, by its method and its keywords."
    given = {k.arg: k.value for k in node.keywords}
    method = getattr(node.func, "attr", getattr(node.func, "id", ""))
    if method in METHODS: yield f".{method}", METHODS[method]
    if method in ("extractall", "unpack_archive") and "filter" not in given: yield f".{method}", "needs a filter"
    for name, bad in KEYWORDS.items():
        value = given.get(name)
        if value is not None and not (isinstance(value, ast.Constant) and value.value is (not bad)):
            yield f"{name}=", f"may be {bad}"
    if method == "new" and node.args and getattr(node.args[0], "value", "") in ("md5", "sha1"): yield "hashlib.new", "can be forged"


def findings(text):
    "(what, line, why) for all that a piece of Python does which it should not."
    tree, names = ast.parse(text), {}
    for node, full, alias in imported(tree):
        names[alias] = full if isinstance(node, ast.ImportFrom) or node.names[0].asname else alias
        if rule := rule_of(full): yield rule, node.lineno, RULES[rule]
    for node in ast.walk(tree):
        if isinstance(node, (ast.Name, ast.Attribute)) and (rule := rule_of(full_name(node, names))):
            yield rule, node.lineno, RULES[rule]
        if isinstance(node, ast.Call): yield from ((what, node.lineno, why) for what, why in of_call(node))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.search(r"\b(http|ftp)://\w", node.value):
            yield "http://", node.lineno, "is not encrypted"


FOUND = {p.relative_to(root).as_posix(): list(findings(p.read_text(encoding="utf-8"))) for p in SOURCES}

@pytest.mark.parametrize("file", FOUND)
def test_sources(file):
    assert not [f"{file}:{line}: {what} {why}" for what, line, why in FOUND[file] if (file, what) not in ALLOWED]

def test_what_is_allowed_is_still_there():
    found = {(file, what) for file, out in FOUND.items() for what, *_ in out}
    assert set(ALLOWED) <= found and all(ALLOWED.values())

@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_scripts_of_the_site(path):
    text = path.read_text(encoding="utf-8")
    assert not re.findall(r"\beval\(|new Function\(|document\.write\(|\bhttp://(?!www\.w3\.org/)[\w.]+", text)

def test_the_workflow_installs_what_is_declared():
    "The oldest versions and the newest are tested, and known faults looked up; extras have the names they have in setup.py."
    yaml = pytest.importorskip("yaml")
    jobs = yaml.safe_load((root/".github/workflows/test.yml").read_text(encoding="utf-8"))["jobs"]
    matrix = jobs["test"]["strategy"]["matrix"]
    assert matrix["versions"] == ["highest"] and [o["versions"] for o in matrix["include"]] == ["lowest-direct"]
    steps = [o["run"] for job in jobs.values() for o in job["steps"] if "run" in o]
    extras = {o for step in steps for m in re.findall(r"\[([\w,]+)\]", step) for o in m.split(",")}
    declared = re.findall(r"^(\w+)_requirements =", (root/"settings.ini").read_text(encoding="utf-8"), re.M)
    assert any("pip-audit" in o for o in steps) and extras <= set(declared)


BAD = """
import pickle
import pickle as p
from pickle import loads
import numpy as np; np.load("x", allow_pickle=True)
import numpy; numpy.load("x")
from numpy import load as read; read("x")
import torch; torch.load("x")
import torch as t; t.load("x", weights_only=False)
from torch import load
torch.hub.load_state_dict_from_url("https://x")
f(weights_only=False)
f(weights_only=choice)
eval("1")
run = exec
__import__("os")
import os; os.system("ls")
from os import system as say
import subprocess; subprocess.run("ls", shell=True)
from subprocess import run; run("ls", shell=flag)
import tarfile; tarfile.open("x").extractall("y")
tar.extract(member)
import zipfile; zipfile.ZipFile("x").extractall()
import shutil; shutil.unpack_archive("x", "y")
import yaml; yaml.load(text)
import hashlib; hashlib.md5(b"")
import hashlib; hashlib.new("md5", b"")
from hashlib import sha1
from urllib.request import urlopen
import urllib.request
import requests
import ssl; ssl._create_unverified_context()
f(verify=False)
url = "http://example.org/x"
a = f"see http://example.org/{x}"
spec.loader.exec_module(module)
from builtins import eval as f
AutoModel.from_pretrained("x", trust_remote_code=True)
""".strip().splitlines()

@pytest.mark.parametrize("text", BAD)
def test_bad_code_is_found(text): assert list(findings(text)), text

GOOD = """
import tarfile; tarfile.open("x").extractall("y", filter="data")
import yaml; yaml.safe_load(text)
model.eval()
import hashlib; hashlib.sha256(b"")
import subprocess; subprocess.run(["ls"], shell=False)
import torch; torch.compile(net)
import re; re.compile("x")
load("x", weights_only=True)
url = "https://example.org/x"
Weights.load(path)
""".strip().splitlines()

@pytest.mark.parametrize("text", GOOD)
def test_good_code_is_not(text): assert not list(findings(text)), text
