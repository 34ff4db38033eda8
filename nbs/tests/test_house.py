"""The house rules, for the package and every page: width, length of functions, one statement a line, words of the field.

`python nbs/tests/test_house.py nbs/04_*.ipynb` lists what a page breaks."""
import ast
import json
import re
import sys
from pathlib import Path

import pyflakes.checker
import pytest

root = Path(__file__).parents[2]
WIDTH, BODY = 120, 40
# Functions that read best from top to bottom: their bodies may have up to 60 lines.
LONG = {"pretrain", "meta_train", "run"}
# Labels that are recorded, or ordinary uses of a word: what a finding's line must contain to be allowed.
ALLOWED = ("head only, equal time", "extras.generations", '"quarters"', '"peaks"')


def words():
    lines = (Path(__file__).parent/"house_words.txt").read_text(encoding="utf-8").splitlines()
    return [(re.compile(a, re.I if a.islower() else 0), b) for a, _, b in (o.partition(" -> ") for o in lines if o and o[0] != "#")]


def cells(page):
    "(number, kind, text) of each cell; the text of code without IPython's magics."
    for i, c in enumerate(json.loads(page.read_text(encoding="utf-8"))["cells"]):
        text = "".join(c["source"])
        yield i, c["cell_type"], re.sub(r"^\s*[%!].*$", "", text, flags=re.M) if c["cell_type"] == "code" else text


def body_length(node, lines):
    "Lines of a function from its first statement on, its docstring left out."
    body = node.body
    if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant): body = body[1:]
    return node.end_lineno - body[0].lineno + 1 if body else 0


def code_findings(text):
    "What a piece of Python breaks, as (line, message)."
    lines = text.splitlines()
    for n, line in enumerate(lines, 1):
        if re.match(r"__all__ = \[| {11}'", line): continue # written by nbdev
        if line.startswith("#| fig-alt:"): continue # prose, and an option of a cell has one line
        if len(line) > WIDTH: yield n, f"{len(line)} characters wide"
    try: tree = ast.parse(text)
    except SyntaxError as e: yield e.lineno or 0, f"syntax: {e.msg}"; return
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            limit = 60 if node.name in LONG else BODY
            if body_length(node, lines) > limit: yield node.lineno, f"{node.name} has {body_length(node, lines)} lines"
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda) and isinstance(node.targets[0], ast.Name):
            yield node.lineno, "a lambda bound to a name"
        for part in ("body", "orelse", "finalbody"):
            block = getattr(node, part, None)
            if not isinstance(block, list): continue
            for a, b in zip(block, block[1:]):
                if a.end_lineno == b.lineno: yield b.lineno, "two statements on a line"
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            for side in (node.left, node.right):
                if isinstance(side, ast.Call) and getattr(side.func, "id", "") == "bool": yield node.lineno, "a product with bool()"
        if isinstance(node, ast.ImportFrom) and any(o.name == "*" for o in node.names): yield node.lineno, "a star import"


def word_findings(text):
    for n, line in enumerate(text.splitlines(), 1):
        if any(o in line for o in ALLOWED): continue
        for pattern, say in words():
            if m := pattern.search(line): yield n, f"'{m[0]}': say {say}"


def findings(path):
    if path.suffix == ".py":
        text = path.read_text(encoding="utf-8")
        return [f"{path.name}:{n}: {what}" for n, what in [*code_findings(text), *word_findings(text)]]
    out = []
    for i, kind, text in cells(path):
        found = [*(code_findings(text) if kind == "code" else ()), *word_findings(text)]
        out += [f"{path.name}, cell {i}, line {n}: {what}" for n, what in found]
    return out


PAGES = sorted((root/"nbs").glob("*.ipynb"))
MODULES = [p for p in sorted((root/"mtl_nb").rglob("*.py")) if p.name != "_modidx.py"]

@pytest.mark.parametrize("path", [*PAGES, *MODULES], ids=lambda p: p.relative_to(root).as_posix())
def test_house_rules(path):
    found = findings(path)
    assert not found, "\n" + "\n".join(found[:40])


def shown_code(page):
    "The code that a reader sees, and can copy: hidden cells left out."
    hidden = re.compile(r"^#\|\s*(hide|include:\s*false|echo:\s*false|eval:\s*false)", re.M)
    return "\n".join(text for _, kind, text in cells(page) if kind == "code" and not hidden.search(text))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_the_first_text_is_title_and_subtitle(page):
    "nbdev makes the heading of it, and leaves out whatever else stands in that cell."
    first = next(text for _, kind, text in cells(page) if kind == "markdown")
    assert re.fullmatch(r"# [^\n]+\n+> [^\n]+", first.strip())


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_imports_stand_in_cells_of_their_own(page):
    "nbdev runs a cell with imports again, without the cells before it, when it builds the site."
    imports, mixed = (ast.Import, ast.ImportFrom), []
    for i, kind, text in cells(page):
        if kind != "code" or text.startswith("#| export"): continue
        body = ast.parse(text).body
        if 0 < sum(isinstance(o, imports) for o in body) < len(body): mixed.append(i)
    assert not mixed


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_figures_are_saved(page):
    "A reader sees each figure without running the page: a cell that describes one has it among its outputs."
    for c in json.loads(page.read_text(encoding="utf-8"))["cells"]:
        if "#| fig-alt:" in "".join(c["source"]):
            assert any("image/png" in o.get("data", {}) for o in c["outputs"]), "".join(c["source"])[:200]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_pictures_have_alt_text(page):
    "Every picture says in words what it shows, for those who cannot see it."
    for c in json.loads(page.read_text(encoding="utf-8"))["cells"]:
        text = "".join(c["source"])
        shows = c["cell_type"] == "code" and any("image/png" in o.get("data", {}) for o in c["outputs"])
        assert not shows or re.search(r"^#\| fig-alt: \S", text, re.M), text[:200]
        assert c["cell_type"] == "code" or not re.search(r"!\[\s*\]\(|<img(?![^>]*\balt=.\w)", text), text[:200]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_shown_code_can_be_copied(page):
    "No cell that a reader sees uses a name that only a hidden cell defines."
    messages = pyflakes.checker.Checker(ast.parse(shown_code(page))).messages
    missing = {m.message_args[0] for m in messages if type(m).__name__ == "UndefinedName"}
    assert not missing - {"display", "get_ipython"}


if __name__ == "__main__":
    for name in sys.argv[1:]: print("\n".join(findings(Path(name))) or f"{name}: clean")
