"""The built site in headless Chromium: every page, the search, dark mode, maths, the width of a phone.

It needs Chromium (its place in `$CHROMIUM`, or on the path), Playwright (in the extra `docs`) and the site
(`python nbs/_site/build.py`); what is missing is stated, and the tests are skipped."""
import re
from pathlib import Path

import pytest
from browser import serve, watch

root = Path(__file__).parents[2]
site = root/"_docs"
prefix = "/mtl_nb/"  # where the site lies at its address, and where its page 404 looks for styles
pages = sorted(o.name for o in site.glob("*.html")) or ["index.html"]


@pytest.fixture(scope="module", autouse=True)
def built():
    "Skips every test where the site is missing or older than what it is made from."
    made = (site/"llms.txt").stat().st_mtime if (site/"llms.txt").exists() else 0
    sources = [*(root/"nbs").glob("*.ipynb"), *(root/"nbs/_site").glob("*.py"), *(root/"nbs/_site/recognise").iterdir()]
    if any(o.stat().st_mtime > made for o in sources):
        pytest.skip("no site of these notebooks: run python nbs/_site/build.py")


@pytest.fixture(scope="module")
def address(built):
    with serve(site, prefix) as address: yield address


@pytest.fixture(scope="module")
def window(browser, address):
    "A page of a phone's width, and what went wrong on it."
    window = browser.new_page(viewport={"width": 390, "height": 844})
    return window, watch(window, address)


LOOK = """() => ({
    wide: document.documentElement.scrollWidth - innerWidth,
    outputs: [...document.querySelectorAll('.cell_output pre')].filter(o => o.scrollWidth > o.clientWidth + 1).length,
    images: [...document.images].filter(o => !o.alt || !o.naturalWidth).map(o => o.src),
    maths: document.querySelectorAll('.math').length - document.querySelectorAll('.math mjx-container').length,
    errors: document.querySelectorAll('mjx-merror').length,
    description: document.querySelector('meta[name=description]')?.content,
    canonical: document.querySelector('link[rel=canonical]')?.href})"""


@pytest.mark.parametrize("name", pages)
def test_page(window, address, name):
    "No failed request, no error; pictures with alt text; maths rendered; no overflow at 390 pixels."
    page, faults = window
    faults.clear()
    page.goto(address + name, wait_until="load")
    if page.query_selector(".math"):
        page.wait_for_function("document.querySelectorAll('.math').length <= document.querySelectorAll('mjx-container').length")
    for picture in page.query_selector_all("article img"): picture.evaluate("o => o.decode().catch(() => 0)")
    seen = page.evaluate(LOOK)
    assert not faults
    assert seen["wide"] <= 0 and seen["outputs"] == 0, seen
    assert not seen["images"] and seen["maths"] == 0 and seen["errors"] == 0, seen
    if name not in ("genindex.html", "search.html", "404.html"):
        assert seen["description"] and seen["canonical"].endswith(prefix + name)


@pytest.mark.parametrize("wanted, first", [
    ("SSConv2d", "models.scale_shift.html"),
    ("hard task", "data.hard_tasks.html"),
    ("hard tasks", "data.hard_tasks.html"),
    ("my own pictures", "recognize.html" if "recognize.html" in pages else "data.folders.html"),
    ("base learner", "models.base_learner.html"),
    ("test-time augmentation", "evaluation.tta.html"),
    ("resume", "train.checkpoints.html"),
    ("install", "index.html"),
])
def test_search(window, address, wanted, first):
    "The right page comes first, and the lines shown with the results hold no code."
    page, faults = window
    faults.clear()
    page.goto(address + "index.html")
    if not page.is_visible("input[name=q]"): page.goto(address + "search.html")
    page.fill("input[name=q] >> visible=true", wanted)
    page.press("input[name=q] >> visible=true", "Enter")
    page.wait_for_function("/found|did not match/.test(document.querySelector('#search-results .search-summary')?.textContent)")
    found = [o.get_attribute("href") for o in page.query_selector_all("#search-results li a")]
    lines = " ".join(o.inner_text() for o in page.query_selector_all("#search-results p.context"))
    assert found and re.split("[#?]", found[0])[0].rpartition("/")[2] == first, found[:5]
    assert not re.search(r"\bfrom \S+ import\b|Open in Colab", lines)
    assert not faults


def test_the_panel_on_its_page(window, address):
    "The panel of the page that recognises answers the prepared task, at a phone's width."
    page, faults = window
    faults.clear()
    page.goto(address + "recognize.html")
    page.wait_for_function("document.querySelector('#recognise')?.dataset.state != 'loading'")
    if page.get_attribute("#recognise", "data-state") == "off": pytest.skip(page.inner_text("#recognise .status"))
    page.click("[data-start=glyphs-prepared]")
    page.wait_for_function("document.querySelectorAll('#recognise .answers > li[data-answer]').length == 25")
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    assert not faults


def test_dark_mode(browser, address):
    "The button switches to dark; nothing keeps a light ground or a light border."
    page = browser.new_page(viewport={"width": 1400, "height": 900}, color_scheme="light")
    page.goto(address + "models.scale_shift.html")
    lightness = "(o, part) => Math.max(...getComputedStyle(o)[part].match(/[\\d.]+/g).slice(0, 3))"
    body = page.query_selector("body")
    assert body.evaluate(lightness, "backgroundColor") > 200
    for _ in range(3):
        if body.get_attribute("data-theme") != "dark": page.click(".theme-toggle >> visible=true")
    assert body.get_attribute("data-theme") == "dark"
    for o in [body, *page.query_selector_all("div.cell_input, div.cell_output pre, details")]:
        ground = o.evaluate("o => getComputedStyle(o).backgroundColor")
        assert ground == "rgba(0, 0, 0, 0)" or o.evaluate(lightness, "backgroundColor") < 80, ground
        if o.evaluate("o => parseFloat(getComputedStyle(o).borderTopWidth)"): assert o.evaluate(lightness, "borderTopColor") < 120
    page.close()


def test_previous_and_next_follow_the_book():
    "From the front page, `next` leads through every page of the book in the order of its numbers."
    book = ["index", *(re.sub(r"^\d+_", "", o.stem) for o in sorted((root/"nbs").glob("[0-9]*.ipynb")))]
    for a, b in zip(book, book[1:]):
        before, after = ((site/f"{o}.html").read_text(encoding="utf-8") for o in (a, b))
        assert re.search(rf'<a class="next-page" href="{b}\.html"', before), a
        assert re.search(rf'<a class="prev-page" href="{a}\.html"', after), b


def test_buttons_of_a_page(window, address):
    page, _ = window
    page.goto(address + "models.scale_shift.html")
    links = {o.inner_text(): o.evaluate("o => o.href") for o in page.query_selector_all(".source a")}
    assert list(links) == ["Open in Colab", "Download notebook", "GitHub"]
    assert links["Open in Colab"].startswith("https://colab.research.google.com/github/")
    assert links["GitHub"].endswith("/blob/main/nbs/08_models.scale_shift.ipynb")
    reply = page.request.get(links["Download notebook"])
    assert reply.body() == (root/"nbs/08_models.scale_shift.ipynb").read_bytes()


def test_an_entry_has_its_parameters_and_its_source(window, address):
    page, _ = window
    page.goto(address + "models.scale_shift.html")
    entry = page.query_selector("dl.py:has(dt[id$='.scale_shift'])")
    assert re.search(r"/blob/main/mtl_nb/models/scale_shift\.py#L\d+$", entry.query_selector("a.external").get_attribute("href"))
    assert entry.query_selector("table th").inner_text() == "name"
    assert "net" in entry.query_selector("table td").inner_text()


def test_files_beside_the_pages():
    "A site map and `llms.txt` that name every page, and the notebooks as Markdown."
    names = {re.sub(r"^\d+_", "", o.stem) for o in (root/"nbs").glob("[0-9]*.ipynb")}
    told, listed = (site/"llms.txt").read_text(encoding="utf-8"), (site/"sitemap.xml").read_text(encoding="utf-8")
    for name in names:
        assert f"/{name}.html.md)" in told and f"/{name}.html</loc>" in listed and (site/f"{name}.html.md").exists()
