"What the tests in a browser share: Chromium, a web server for a folder, and the faults of a window."
import os
import shutil
import threading
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
OPTIONS = """--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync""".split()


@contextmanager
def launch():
    "A headless Chromium; the test is skipped where there is none."
    if not CHROMIUM: pytest.skip("no Chromium on the path, and none in $CHROMIUM")
    playwright = pytest.importorskip("playwright.sync_api", reason='no Playwright: pip install "mtl_nb[docs]"')
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield browser
        browser.close()


class _Quiet(SimpleHTTPRequestHandler):
    def __init__(self, *args, prefix, **kwargs):
        self.prefix = prefix
        super().__init__(*args, **kwargs)
    def translate_path(self, path): return super().translate_path("/" + path.removeprefix(self.prefix))
    def log_message(self, *args): pass


@contextmanager
def serve(folder, prefix="/"):
    "The address of a web server for `folder`, which lies below `prefix`."
    handler = partial(_Quiet, prefix=prefix, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try: yield f"http://127.0.0.1:{server.server_port}{prefix}"
        finally: server.shutdown()


def watch(window, address):
    "A list that collects what goes wrong in a window: failed requests, errors, addresses elsewhere."
    faults, ours = [], (address, "data:", "blob:")
    window.on("console", lambda o: faults.append(o.text) if o.type == "error" else None)
    window.on("pageerror", lambda o: faults.append(str(o)))
    window.on("response", lambda o: faults.append(f"{o.status} {o.url}") if o.status >= 400 else None)
    window.on("requestfailed", lambda o: faults.append(f"{o.failure} {o.url}"))
    window.on("request", lambda o: None if o.url.startswith(ours) else faults.append(f"elsewhere: {o.url}"))
    return faults
