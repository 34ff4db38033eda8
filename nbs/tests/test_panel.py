"The panel that recognises, in a headless Chromium: the answers of Python, with nothing fetched from elsewhere."
import json
import sys
from pathlib import Path

import pytest
import torch
from browser import CHROMIUM, browser, serve
from PIL import Image

from mtl_nb.data.folders import Preprocessing, read_image
from mtl_nb.models.base_learner import fit_head
from mtl_nb.publish import load_weights

root = Path(__file__).parents[2]
sys.path.append(str(root/"nbs/_site"))
import panel as site  # noqa: E402

HTML = '<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,"><div id="recognise">...</div>'
STATE = "document.querySelector('#recognise')?.dataset.state"
STATUS = "document.querySelector('#recognise .status').textContent"
ANSWERS = "[...document.querySelectorAll('.answers > li')].map(o => [o.dataset.answer, o.dataset.shares])"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A site of one page."
    if not CHROMIUM: pytest.skip("no Chromium on this machine")
    pytest.importorskip("onnxscript", reason="the extra [onnx] is not installed")
    out = tmp_path_factory.mktemp("site")
    (out/"index.html").write_text(HTML, encoding="utf-8")
    site.add_panel(out)
    if not (out/"recognise"/site.RUNTIME[-1]).exists(): pytest.skip("no npm on this machine, or no registry")
    return out


@pytest.fixture(scope="module")
def chromium(folder, tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as page: yield page


@pytest.fixture()
def page(folder, chromium):
    "The page, opened anew."
    chromium.events.clear()
    with serve(folder) as url:
        chromium.call("Page.navigate", url=f"{url}/index.html")
        chromium.wait(f"{STATE} == 'start'")
        yield chromium
        assert not chromium.problems()


def click(page, selector): page.run(f"document.querySelector({selector!r}).click()")

def start(page, name):
    click(page, f"[data-start={name}]")
    page.wait(f"['ready', 'failed'].includes({STATE})")
    assert page.run(STATE) == "ready", page.run(STATUS)

def choose(page, selector, paths):
    "Choose files, and wait for what the panel says of them."
    page.run("document.querySelector('#recognise').dataset.state = 'asked'")
    page.choose_files(selector, paths)
    page.wait(f"{STATE} == 'ready'")

def shares_of(answers): return torch.tensor([json.loads(shares) for _, shares in answers])

def in_python(support, query, classes=5):
    "Probabilities of query images, from support images in the order of their classes: both uint8 [n,3,32,32]."
    model = load_weights(root/"data/weights/glyphs-small.safetensors").model
    with torch.no_grad(): s, q = (model.embed((x/255. - .5)/.25)[None] for x in (support, query))
    labels = torch.arange(classes).repeat_interleave(len(support)//classes)[None]
    weight, bias = model.base.weight.new_zeros(classes, 64), torch.zeros(classes)
    lr = model.base.lr*classes/5 # a picture moves the head as far as in training
    return fit_head(s, labels, q, weight, bias, lr, model.base.steps)[0].softmax(-1)


def test_the_prepared_task_has_the_answers_of_python(page):
    start(page, "glyphs-prepared")
    names, images = site.glyph_task()
    images = torch.from_numpy(images)
    expected = in_python(images[:, 0], images[:, 1:].flatten(0, 1))
    found = page.run(ANSWERS)
    assert [name for name, _ in found] == [names[i] for i in expected.argmax(1)] and len(found) == 25
    torch.testing.assert_close(shares_of(found), expected, rtol=0, atol=1e-5)
    right = (expected.argmax(1) == torch.arange(5).repeat_interleave(5)).sum()
    assert page.run(STATUS) == f"25 answers, from 5 classes. Right: {right} of 25."


def test_own_files(page, tmp_path):
    "Large pictures, one of them lying on its side, are cut and shrunk nearly as in Python; a text file is named."
    images, paths = torch.from_numpy(site.glyph_task()[1])[:2, :3], []
    for i, x in enumerate(images.flatten(0, 1)):
        image = Image.fromarray(x.permute(1, 2, 0).numpy()).resize((300, 300), Image.Resampling.BICUBIC)
        wide = Image.new("RGB", (400, 300), "white")
        wide.paste(image, (50, 0))
        exif = Image.Exif()
        if i == 1: wide, exif[0x0112] = wide.transpose(Image.Transpose.ROTATE_90), 6
        paths.append(tmp_path/f"drawing {i}.png")
        wide.save(paths[-1], exif=exif)
    (tmp_path/"notes.txt").write_text("no picture")
    start(page, "glyphs")
    choose(page, ".classes fieldset:nth-child(1) input[type=file]", [paths[0]])
    assert page.run(STATUS) == "Give at least two classes a picture each."
    choose(page, ".classes fieldset:nth-child(2) input[type=file]", [paths[3]])
    choose(page, ".queries input", [*(paths[i] for i in (1, 2, 4, 5)), tmp_path/"notes.txt"])
    assert page.run(STATUS) == "Not a picture that this browser can read: notes.txt. 4 answers, from 2 classes."
    pixels = torch.stack([torch.from_numpy(Preprocessing(32)(read_image(o)).copy()).permute(2, 0, 1) for o in paths])
    expected, found = in_python(pixels[[0, 3]], pixels[[1, 2, 4, 5]], 2), page.run(ANSWERS)
    print("largest difference of a probability:", (shares_of(found) - expected).abs().max().item())
    assert (shares_of(found) - expected).abs().max() < .05


def test_classes_are_added_renamed_and_removed(page, tmp_path):
    start(page, "glyphs-prepared")
    before = shares_of(page.run(ANSWERS))
    click(page, ".add") # a class without pictures changes nothing
    assert page.run("document.querySelectorAll('.remove').length") == 6
    torch.testing.assert_close(shares_of(page.run(ANSWERS)), before)
    page.run("""{ const input = document.querySelector('.classes input[type=text]'); input.value = '<b>Ä</b>';
              input.dispatchEvent(new Event('input')); }""")
    assert {name for name, _ in page.run(ANSWERS)} <= {"<b>Ä</b>", *"BCDE"}
    assert page.run("document.querySelectorAll('.bars b').length") == 0 # a name is text, whatever it holds
    for _ in range(2): click(page, ".classes fieldset:last-child .remove")
    assert shares_of(page.run(ANSWERS)).shape == (25, 4)
    click(page, ".picture button")
    assert page.run(STATUS).startswith("25 answers, from 3 classes")
    click(page, ".clear")
    assert page.run(STATUS) == "3 classes learned. Now choose new pictures."


def test_a_file_that_does_not_load(page):
    "The panel says so, and the next click tries again."
    page.call("Network.setBlockedURLs", urls=["*glyphs.onnx"])
    click(page, "[data-start=glyphs]")
    page.wait(f"{STATE} == 'failed'")
    assert page.run(STATUS).startswith("That did not work")
    page.call("Network.setBlockedURLs", urls=[])
    page.events.clear()
    start(page, "glyphs")


def test_without_a_runtime(chromium, tmp_path, monkeypatch):
    "Where npm is missing the site is built, and the panel says what it lacks."
    monkeypatch.setattr(site, "add_runtime", lambda folder: False)
    monkeypatch.setattr(site, "add_networks", lambda folder: [dict(name="glyphs", title="Your own", hint="")])
    out = tmp_path/"site"
    out.mkdir()
    (out/"index.html").write_text(HTML, encoding="utf-8")
    site.add_panel(out)
    with serve(out) as url:
        chromium.call("Page.navigate", url=f"{url}/index.html")
        chromium.wait(f"{STATE} == 'off'")
        assert "has no runtime" in chromium.run(STATUS)
        assert chromium.run("[...document.querySelectorAll('.start button')].every(o => o.disabled)")
