"Every page runs without ipywidgets, the extra `[nb]`: what needs it stands under a guard, or is not run with the page."
import ast
import re
from functools import cache

import pytest
from test_house import PAGES, cells

NOT_RUN = re.compile(r"^#\|\s*eval:\s*false", re.M)


def imports_widgets(node):
    names = [o.name for o in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", "") or ""]
    return isinstance(node, (ast.Import, ast.ImportFrom)) and any(o.split(".")[0] == "ipywidgets" for o in names)


def is_guard(node):
    return isinstance(node, ast.If) and 'find_spec("ipywidgets")' in ast.unparse(node.test).replace("'", '"')


def executed(node):
    "What runs when a cell runs: neither the insides of functions nor what stands under a guard."
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef) or is_guard(child): continue
        yield child
        yield from executed(child)


def trees(page):
    return [(i, ast.parse(text)) for i, kind, text in cells(page) if kind == "code" and not NOT_RUN.search(text)]


@cache
def widget_functions():
    "Functions of all pages that import ipywidgets when they are called."
    functions = [o for page in PAGES for _, tree in trees(page) for o in ast.walk(tree) if isinstance(o, ast.FunctionDef)]
    return {o.name for o in functions if any(imports_widgets(n) for n in ast.walk(o))}


def findings(tree, functions):
    for node in executed(tree):
        if imports_widgets(node): yield "imports ipywidgets"
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in functions: yield f"calls {node.func.id}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_a_page_runs_without_ipywidgets(page):
    functions = widget_functions()
    assert not [(i, o) for i, tree in trees(page) for o in findings(tree, functions)]


def test_what_is_found():
    assert {"seed_slider", "task_explorer", "loop_explorer", "filter_explorer", "failure_explorer", "recognizer_panel"} <= widget_functions()
    bad = "import ipywidgets as w", "from ipywidgets import HTML", "if True:\n    import ipywidgets", "box = f().children"
    good = 'def f(): import ipywidgets', 'if find_spec("ipywidgets"):\n    import ipywidgets\n    f()', "import json"
    assert all([*findings(ast.parse(o), {"f"})] for o in bad)
    assert not any([*findings(ast.parse(o), {"f"})] for o in good)
