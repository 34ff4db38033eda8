"Downloads from a server on this machine that breaks off, falls silent, refuses, redirects or sends something else."
import hashlib
import shutil
import socket
import ssl
import subprocess
import threading
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from mtl_nb.core import BadInput
from mtl_nb.data import downloads
from mtl_nb.data.downloads import download

CONTENT = bytes(range(256))*4000 # about 1 MB
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    "Each request is answered by the next of `answers`, the last one again and again; `asked` are the ranges."
    daemon_threads, block_on_close = True, False
    def __init__(self, certificate=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.asked, self.silence = [whole], [], threading.Event()
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.socket = context.wrap_socket(self.socket, server_side=True)
        self.url = f"http{'s' if certificate else ''}://localhost:{self.server_port}/set.zip"
        threading.Thread(target=self.serve_forever, kwargs=dict(poll_interval=.01), daemon=True).start()
    def handle_error(self, *_): pass # such as a client that goes away


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_): pass
    def do_GET(self):
        said = self.headers.get("Range")
        self.server.asked.append(said)
        self.start = int(said.removeprefix("bytes=").removesuffix("-")) if said else 0
        answers = self.server.answers
        (answers.pop(0) if len(answers) > 1 else answers[0])(self)
    def do_CONNECT(self): # as a proxy is asked
        self.server.asked.append(self.path)
        self.send_error(403)
    def begin(self, code=200, length=None, **headers):
        self.send_response(code)
        if length is not None: self.send_header("Content-Length", str(length))
        for name, value in headers.items(): self.send_header(name, value)
        self.end_headers()


def whole(h):
    h.begin(206 if h.start else 200, len(CONTENT) - h.start)
    h.wfile.write(CONTENT[h.start:])

def whole_always(h): # ignores the range
    h.begin(200, len(CONTENT))
    h.wfile.write(CONTENT)

def half(h):
    h.begin(206 if h.start else 200, len(CONTENT) - h.start)
    h.wfile.write(CONTENT[h.start:h.start + 300_000])

def stalled(h):
    half(h)
    h.wfile.flush()
    h.server.silence.wait(20)

def endless(h):
    h.begin(200)
    for _ in range(100): h.wfile.write(CONTENT)

def sends(data):
    def answer(h):
        h.begin(200, len(data))
        h.wfile.write(data)
    return answer

def status(code):
    def answer(h): h.begin(code, 0)
    return answer

def leads_to(url):
    def answer(h): h.begin(302, 0, Location=url)
    return answer


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    "A file with a key and a certificate for localhost, made for this test."
    if not shutil.which("openssl"): pytest.skip("openssl, which makes the certificate, is not installed")
    folder = tmp_path_factory.mktemp("certificate")
    made = ("req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost "
            "-addext subjectAltName=DNS:localhost -keyout key.pem -out cert.pem").split()
    subprocess.run(["openssl", *made], cwd=folder, check=True, capture_output=True)
    (folder/"both.pem").write_text((folder/"key.pem").read_text() + (folder/"cert.pem").read_text())
    return folder/"both.pem"


@pytest.fixture()
def server(certificate, monkeypatch):
    "A server that is trusted, and a client that does not wait long."
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    for name in "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY": monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(downloads, "_WAIT", .01)
    server = Server(certificate)
    yield server
    server.silence.set()
    server.shutdown()
    server.server_close()


@pytest.fixture()
def target(tmp_path): return tmp_path/"sets/set.zip"

def refused(*args, words):
    "The message of a download that fails, in one line with all `words`."
    with pytest.raises(BadInput) as e: download(*args)
    text = str(e.value)
    assert "\n" not in text and all(o in text for o in words), text
    return text

def names(target): return sorted(o.name for o in target.parent.iterdir())


def test_whole(server, target):
    assert download(server.url, target, DIGEST, len(CONTENT)) == target and target.read_bytes() == CONTENT
    assert download(server.url, target, DIGEST) == target and server.asked == [None], "it is not fetched again"
    target.write_bytes(b"altered")
    download(server.url, target, DIGEST)
    assert target.read_bytes() == CONTENT and names(target) == ["set.zip"]

def test_resumed_within_a_call(server, target):
    server.answers = [half, half, whole]
    download(server.url, target, DIGEST, len(CONTENT))
    assert server.asked == [None, "bytes=300000-", "bytes=600000-"] and names(target) == ["set.zip"]

def test_resumed_by_the_next_call(server, target):
    server.answers = [half, status(500)]
    refused(server.url, target, DIGEST, words=["500", str(target)])
    assert names(target) == [".set.zip.part"] and len(server.asked) == 3
    server.answers = [whole]
    download(server.url, target, DIGEST)
    assert server.asked[3:] == ["bytes=300000-"] and target.read_bytes() == CONTENT and names(target) == ["set.zip"]

def test_a_server_that_cannot_resume(server, target):
    server.answers = [half, whole_always]
    download(server.url, target, DIGEST)
    assert target.read_bytes() == CONTENT and server.asked == [None, "bytes=300000-"]

@pytest.mark.parametrize("left, answers", [(b"other"*1000, [whole]), (CONTENT + b"x", [status(416), whole])])
def test_a_part_of_another_file_is_begun_anew(server, target, left, answers):
    target.parent.mkdir()
    (target.parent/".set.zip.part").write_bytes(left)
    server.answers = answers
    download(server.url, target, DIGEST)
    assert target.read_bytes() == CONTENT and server.asked[-1] is None and names(target) == ["set.zip"]

def test_truncated(server, target):
    server.answers = [lambda h: (h.begin(200, len(CONTENT)), h.wfile.write(CONTENT[:10]))]
    refused(server.url, target, DIGEST, words=["the connection ended after 10 of 1,024,000 bytes", "check the connection"])
    assert len(server.asked) == 3 and not target.exists()

def test_stalled(server, target, monkeypatch):
    monkeypatch.setattr(downloads, "_SILENCE", .2)
    server.answers = [stalled]
    refused(server.url, target, DIGEST, words=["no answer for 0.2 seconds"])
    assert server.asked == [None, "bytes=300000-", "bytes=600000-"], "what came before the silence is kept"

def test_a_server_that_accepts_and_says_nothing(server, target, monkeypatch):
    monkeypatch.setattr(downloads, "_SILENCE", .2)
    monkeypatch.setattr(downloads, "_TRIES", 1)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        refused(f"https://localhost:{mute.getsockname()[1]}/a", target, DIGEST, words=["no answer for 0.2 seconds"])

@pytest.mark.parametrize("code, tries", [(404, 1), (403, 1), (429, 3), (500, 3)])
def test_refusals(server, target, code, tries):
    server.answers = [status(code)]
    refused(server.url, target, DIGEST, words=[f"the server answers {code} ", "put the file there yourself", str(target)])
    assert len(server.asked) == tries and names(target) == []

def test_busy_at_first(server, target):
    server.answers = [status(500), whole]
    download(server.url, target, DIGEST)
    assert target.read_bytes() == CONTENT

@pytest.mark.parametrize("data", [CONTENT[:-1] + b"\0", b"<html>log in</html>", b""])
def test_another_content(server, target, data):
    server.answers = [sends(data)]
    refused(server.url, target, DIGEST, words=["SHA-256 differs", "It was not kept"])
    assert len(server.asked) == 1 and names(target) == []
    if len(data) < len(CONTENT): # and when the size is known, nothing is written
        refused(server.url, target, DIGEST, len(CONTENT), words=[f"has {len(data):,} bytes where 1,024,000 are expected"])

def test_the_file_that_is_there_stays(server, target):
    target.parent.mkdir()
    target.write_bytes(b"an older version")
    server.answers = [sends(b"other")]
    refused(server.url, target, DIGEST, words=["SHA-256 differs"])
    assert target.read_bytes() == b"an older version" and names(target) == ["set.zip"]

def test_more_than_expected(server, target, monkeypatch):
    server.answers = [endless]
    refused(server.url, target, DIGEST, len(CONTENT), words=["has more than 1,024,000 bytes"])
    monkeypatch.setattr(downloads, "_MOST", 5*10**6)
    refused(server.url, target, DIGEST, words=["has more than 5,000,000 bytes"])
    server.answers = [lambda h: h.begin(200, 10**10)]
    refused(server.url, target, DIGEST, words=["has 10,000,000,000 bytes where 5,000,000 are expected"])

def test_only_https(server, target):
    plain = Server()
    server.answers = [leads_to(plain.url)]
    refused(server.url, target, DIGEST, words=["which is not encrypted", plain.url])
    refused(plain.url, target, DIGEST, words=["no https address"])
    for url in "file:///etc/passwd", "ftp://localhost/a", "", "set.zip":
        server.answers = [leads_to(url or "ftp://x")]
        refused(url, target, DIGEST, words=["no https address"])
    assert plain.asked == []
    plain.shutdown()
    plain.server_close()

def test_a_redirect_to_https_is_followed(server, target):
    server.answers = [leads_to("/elsewhere"), leads_to(server.url), whole]
    download(server.url, target, DIGEST)
    assert target.read_bytes() == CONTENT

def test_a_certificate_that_nobody_trusts(server, target, monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE")
    refused(server.url, target, DIGEST, words=["certificate is not accepted", "SSL_CERT_FILE"])
    assert server.asked == [] and names(target) == []

def test_no_network(server, target, monkeypatch):
    refused("https://no-such-host.invalid/a", target, DIGEST, words=["cannot download", "check the connection"])
    with socket.create_server(("127.0.0.1", 0)) as closed: port = closed.getsockname()[1]
    refused(f"https://localhost:{port}/a", target, DIGEST, words=["Connection refused"])
    refused("https://local host:x/a", target, DIGEST, words=["cannot download"])

def test_a_proxy(server, target, monkeypatch):
    "The proxy of the environment is asked, and not for hosts that no_proxy names."
    proxy = Server()
    monkeypatch.setenv("https_proxy", f"http://user:secret@127.0.0.1:{proxy.server_port}")
    monkeypatch.setenv("no_proxy", "")
    said = refused("https://example.org/a", target, DIGEST, words=["403", "through the proxy that https_proxy names"])
    assert proxy.asked == ["example.org:443"]*3 and "secret" not in said
    monkeypatch.setenv("no_proxy", "localhost")
    download(server.url, target, DIGEST)
    assert target.read_bytes() == CONTENT and len(proxy.asked) == 3
    proxy.shutdown()
    proxy.server_close()

def test_the_disk(server, target, monkeypatch, tmp_path):
    (tmp_path/"sets").write_text("a file")
    refused(server.url, target, DIGEST, words=["cannot write", "sets"])
    (tmp_path/"sets").unlink()
    (tmp_path/"sets/set.zip").mkdir(parents=True)
    refused(server.url, target, DIGEST, words=["cannot write", "set.zip"])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1000))
    refused(server.url, tmp_path/"b.zip", DIGEST, words=["no room", "1,024,000 bytes, 1,000 are free"])
    assert not [o for o in tmp_path.iterdir() if "b.zip" in o.name]

def test_two_at_once(server, target):
    "Each writes a file of its own; both end with the whole file."
    errors = []
    def one():
        try: download(server.url, target, DIGEST)
        except Exception as e: errors.append(e)
    threads = [threading.Thread(target=one) for _ in range(4)]
    for o in threads: o.start()
    for o in threads: o.join()
    assert not errors and target.read_bytes() == CONTENT and names(target) == ["set.zip"]

def test_interrupted(server, target, monkeypatch):
    "What has come stays beside the target under one name, for the next call."
    def stop(*_, **__): raise KeyboardInterrupt
    server.answers = [half, whole]
    monkeypatch.setattr(downloads.time, "sleep", stop)
    with pytest.raises(KeyboardInterrupt): download(server.url, target, DIGEST)
    assert names(target) == [".set.zip.part"] and (target.parent/".set.zip.part").stat().st_size == 300_000
    download(server.url, target, DIGEST)
    assert server.asked == [None, "bytes=300000-"] and names(target) == ["set.zip"]
