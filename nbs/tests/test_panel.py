"The panel that recognises, in a headless Chromium: the answers of `Recognizer`, with nothing fetched from elsewhere."
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from browser import serve, watch
from PIL import Image

from mtl_nb import Recognizer

root = Path(__file__).parents[2]
HTML = '<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,"><div id="recognise">...</div>'
STATE = "document.querySelector('#recognise')?.dataset.state"


def site_script():
    spec = importlib.util.spec_from_file_location("panel", root/"nbs/_site/panel.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

site = site_script()


@pytest.fixture(scope="module")
def folder(browser, tmp_path_factory):
    "A site of one page."
    pytest.importorskip("onnxscript", reason="the extra [onnx] is not installed")
    out = tmp_path_factory.mktemp("site")
    (out/"index.html").write_text(HTML, encoding="utf-8")
    site.add_panel(out)
    if not (out/"recognise"/site.RUNTIME[-1]).exists(): pytest.skip("no npm on this machine, or no registry")
    return out


@pytest.fixture()
def page(browser, folder):
    "The page, opened anew."
    with serve(folder) as address:
        page = browser.new_page()
        page.faults = watch(page, address)
        page.goto(f"{address}index.html")
        page.wait_for_function(f"{STATE} == 'start'")
        yield page
        page.close()
        assert not page.faults


@pytest.fixture(scope="module")
def task():
    "Names of five classes that the network has not seen, and pictures of each: uint8 [5,6,32,32,3]."
    names, images = site.glyph_task()
    return names, images.transpose(0, 1, 3, 4, 2)


def status(page): return page.inner_text(".status")

def start(page, name):
    page.click(f"[data-start={name}]")
    page.wait_for_function(f"['ready', 'failed'].includes({STATE})")
    assert page.evaluate(STATE) == "ready", status(page)

def choose(page, selector, paths):
    "Choose files, and wait for what the panel says of them."
    page.evaluate("document.querySelector('#recognise').dataset.state = 'asked'")
    page.set_input_files(selector, paths)
    page.wait_for_function(f"{STATE} == 'ready'")

def teach(page, number, paths): choose(page, f".classes fieldset:nth-child({number}) input[type=file]", paths)

def answers(page):
    "The class of each new picture, and the probabilities of all classes: float [n,N]."
    found = page.query_selector_all(".answers > li")
    shares = [json.loads(o.get_attribute("data-shares")) for o in found]
    return [o.get_attribute("data-answer") for o in found], np.array(shares)

def in_python(support, labels, query):
    "The same of `Recognizer`."
    r = Recognizer.from_pretrained("glyphs").fit(support, labels)
    return r.predict(query).tolist(), r.predict_proba(query)


def test_the_exported_network_has_the_rate_and_the_steps_of_its_record(folder):
    about, base = json.loads((folder/"recognise/glyphs.json").read_text()), Recognizer.from_pretrained("glyphs").model.base
    assert (about["size"], about["way"], about["lr"], about["steps"]) == (32, 5, base.lr, base.steps) == (32, 5, .3, 20)


def test_the_prepared_task_has_the_answers_of_python(page, task):
    start(page, "glyphs-prepared")
    names, images = task
    expected, shares = in_python(images[:, 0], names, images[:, 1:].reshape(-1, 32, 32, 3))
    found = answers(page)
    assert found[0] == expected and len(expected) == 25
    np.testing.assert_allclose(found[1], shares, rtol=0, atol=1e-5)
    right = sum(a == b for a, b in zip(expected, np.repeat(names, 5)))
    assert status(page) == f"25 answers, from 5 classes. Right: {right} of 25."


def test_files_in_unequal_numbers(page, task, tmp_path):
    "Three classes of one, two and three pictures of the network's own size: the answers of Python."
    start(page, "glyphs")
    page.click(".add")
    paths, labels = [], []
    for c in range(3):
        own = [tmp_path/f"{c} {i}.png" for i in range(c + 1)]
        for path, x in zip(own, task[1][c]): Image.fromarray(x).save(path)
        teach(page, c + 1, own)
        paths, labels = paths + own, labels + [f"class {c + 1}"]*len(own)
    new = [tmp_path/f"new {c} {i}.png" for c in range(3) for i in range(3, 6)]
    for path, x in zip(new, task[1][:3, 3:].reshape(-1, 32, 32, 3)): Image.fromarray(x).save(path)
    choose(page, ".queries input", new)
    expected, found = in_python(paths, labels, new), answers(page)
    assert found[0] == expected[0]
    np.testing.assert_allclose(found[1], expected[1], rtol=0, atol=1e-5)


def test_large_files(page, task, tmp_path):
    "Large pictures, one of them lying on its side, are cut and shrunk nearly as in Python; a text file is named."
    paths = []
    for i, x in enumerate(task[1][:2, :3].reshape(-1, 32, 32, 3)):
        image = Image.fromarray(x).resize((300, 300), Image.Resampling.BICUBIC)
        wide = Image.new("RGB", (400, 300), "white")
        wide.paste(image, (50, 0))
        exif = Image.Exif()
        if i == 1: wide, exif[0x0112] = wide.transpose(Image.Transpose.ROTATE_90), 6
        paths.append(tmp_path/f"drawing {i}.png")
        wide.save(paths[-1], exif=exif)
    (tmp_path/"notes.txt").write_text("no picture")
    start(page, "glyphs")
    teach(page, 1, [paths[0]])
    assert status(page) == "Give at least two classes a picture each."
    teach(page, 2, [paths[3]])
    new = [paths[i] for i in (1, 2, 4, 5)]
    choose(page, ".queries input", [*new, tmp_path/"notes.txt"])
    assert status(page) == "Not a picture that this browser can read: notes.txt. 4 answers, from 2 classes."
    expected = in_python([paths[0], paths[3]], ["class 1", "class 2"], new)[1]
    difference = np.abs(answers(page)[1] - expected).max() # the browser shrinks pictures in a way of its own
    print("largest difference of a probability:", difference)
    assert difference < .1


def test_classes_are_added_renamed_and_removed(page):
    start(page, "glyphs-prepared")
    before = answers(page)[1]
    page.click(".add") # a class without pictures changes nothing
    assert page.locator(".remove").count() == 6
    np.testing.assert_array_equal(answers(page)[1], before)
    page.fill(".classes input[type=text] >> nth=0", "<b>Ä</b>")
    assert {*answers(page)[0]} <= {"<b>Ä</b>", *"BCDE"}
    assert not page.query_selector(".bars b") # a name is text, whatever it holds
    for _ in range(2): page.click(".classes fieldset:last-child .remove")
    assert answers(page)[1].shape == (25, 4)
    page.click(".picture button >> nth=0")
    assert status(page).startswith("25 answers, from 3 classes")
    page.click(".clear")
    assert status(page) == "3 classes learned. Now choose new pictures."


def test_a_file_that_does_not_load(page):
    "The panel says so, and the next click tries again."
    page.route("**/glyphs.onnx", lambda route: route.abort())
    page.click("[data-start=glyphs]")
    page.wait_for_function(f"{STATE} == 'failed'")
    assert status(page).startswith("That did not work")
    page.unroute("**/glyphs.onnx")
    page.faults.clear()
    start(page, "glyphs")


def test_without_a_runtime(browser, tmp_path, monkeypatch):
    "Where npm is missing the site is built, and the panel says what it lacks."
    monkeypatch.setattr(site, "add_runtime", lambda folder: False)
    monkeypatch.setattr(site, "add_networks", lambda folder: [dict(name="glyphs", title="Your own", hint="")])
    (tmp_path/"index.html").write_text(HTML, encoding="utf-8")
    site.add_panel(tmp_path)
    with serve(tmp_path) as address:
        page = browser.new_page()
        page.goto(f"{address}index.html")
        page.wait_for_function(f"{STATE} == 'off'")
        assert "has no runtime" in status(page)
        assert page.is_disabled(".start button")
        page.close()
