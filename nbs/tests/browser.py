"A headless Chromium, driven over a pipe in the DevTools protocol; and a web server for a folder."
import itertools
import json
import os
import shutil
import subprocess
import threading
import time
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --disable-dev-shm-usage --remote-debugging-pipe""".split()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


@contextmanager
def serve(folder):
    "The address of a web server for `folder`."
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield f"http://127.0.0.1:{server.server_port}"
    finally: server.shutdown()


class Page:
    "One page: `call` sends a command of the protocol, `events` are what the browser has reported."
    def __init__(self, write, read):
        self.write, self.read, self.numbers, self.session = write, read, itertools.count(1), None
        self.events, self.rest = [], b""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log", "DOM"): self.call(f"{domain}.enable")

    def call(self, method, **params):
        number = next(self.numbers)
        message = dict(id=number, method=method, params=params) | (dict(sessionId=self.session) if self.session else {})
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            reply = self._next()
            if reply.get("id") != number:
                self.events.append(reply)
                continue
            assert "error" not in reply, f"{method}: {reply.get('error')}"
            return reply["result"]

    def _next(self):
        while b"\0" not in self.rest:
            part = os.read(self.read, 2**16)
            assert part, "the browser has gone"
            self.rest += part
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def run(self, expression):
        "The value of a JavaScript expression; promises are awaited."
        reply = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in reply, reply["exceptionDetails"]
        return reply["result"].get("value")

    def wait(self, expression, seconds=90):
        "Wait until a JavaScript expression is true."
        end = time.monotonic() + seconds
        while not self.run(expression):
            assert time.monotonic() < end, f"not true after {seconds} s: {expression}"
            time.sleep(.1)

    def choose_files(self, selector, paths):
        "Give files to an input, as a visitor would."
        document = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=document, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(o) for o in paths])

    def problems(self):
        "Uncaught errors, errors on the console, failed requests, and requests to other places than this machine."
        out = []
        for event in self.events:
            kind, o = event.get("method"), event.get("params", {})
            if kind == "Runtime.exceptionThrown": out.append(o["exceptionDetails"]["text"])
            if kind == "Log.entryAdded" and o["entry"]["level"] == "error": out.append(o["entry"]["text"])
            if kind == "Network.loadingFailed": out.append(o["errorText"])
            if kind != "Network.requestWillBeSent": continue
            url = o["request"]["url"]
            if not url.startswith(("http://127.0.0.1", "data:", "blob:", "about:")): out.append(url)
        return out


@contextmanager
def browser(folder):
    "A page in a fresh browser, whose profile lies in `folder`."
    (from_us, to_us), (read, write) = os.pipe(), os.pipe() # commands, replies
    def wire():
        a, b = os.dup(from_us), os.dup(write)
        os.dup2(a, 3)
        os.dup2(b, 4)
    process = subprocess.Popen([CHROMIUM, *FLAGS, f"--user-data-dir={folder}"], preexec_fn=wire, close_fds=False,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.close(from_us)
    os.close(write)
    try: yield Page(to_us, read)
    finally:
        process.terminate()
        process.wait()
        os.close(to_us)
        os.close(read)
