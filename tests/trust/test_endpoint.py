"""A writer behind an endpoint: its reply is data, bounded in size and time, and the key shows nowhere."""

from __future__ import annotations

import dataclasses
import http.server
import json
import logging
import socket
import threading
import time

import pytest

import cvg_kernels as cvg
from cvg_kernels.guidance import synopsis

KEY = "sk-nobodys-0123456789abcdef0123456789"  # the same in every process of a run, which name tests by it


def chat(text: object) -> bytes:
    return json.dumps({"choices": [{"message": {"content": text}}]}).encode()


class Server:
    """Answers with what `answer(handler)` does; keeps what it was asked."""

    def __init__(self) -> None:
        self.answer, self.asked = None, []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                self.rfile.read(int(self.headers["Content-Length"]))
                outer.asked.append((self.path, dict(self.headers)))
                try:
                    outer.answer(self)
                except OSError:  # the client had enough
                    self.close_connection = True

            do_GET = do_POST

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def says(self, body: bytes, status: int = 200, **headers: str) -> None:
        def answer(handler):
            handler.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                handler.send_header(name.replace("_", "-"), value)
            handler.end_headers()
            handler.wfile.write(body)

        self.answer = answer


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    made = Server()
    yield made
    made.server.shutdown()
    made.server.server_close()


def write(server, seconds=20.0, key=KEY):
    return synopsis.endpoint_writer(server.url, "m", key=key, seconds=seconds)("a flower opens")


def refused(server, **options) -> str:
    with pytest.raises(cvg.ArgumentError) as caught:
        write(server, **options)
    text = str(caught.value)
    chain, error = "", caught.value
    while error is not None:
        chain, error = f"{chain} {error!r} {error}", error.__cause__
    assert KEY not in chain and "\n" not in text and len(text) < 600
    return text


def test_a_good_reply_is_read_whatever_its_content_type(server):
    server.says(chat("1. a bud\n 2)  a bloom "), Content_Type="text/plain")
    assert write(server) == ["a bud", "a bloom"]
    path, headers = server.asked[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"


def test_the_key_of_the_environment_is_stripped_and_used(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    server.says(chat("1. a bud"))
    write(server, key=None)
    assert server.asked[0][1]["Authorization"] == f"Bearer {KEY}"


REPLIES = {
    "page": (b"<html>hello</html>", "must be JSON"),
    "nothing": (b"", "must be JSON"),
    "not UTF-8": (b'{"choices": "\xff"}', "UTF-8, got byte 0xff"),
    "deep": (b"[" * 100_000, "nested too deeply"),
    "a list": (b"[]", "has no choices"),
    "a number": (b"3", "has no choices"),
    "no choice": (b'{"choices": []}', "has no choices"),
    "a choice of text": (b'{"choices": ["x"]}', "has no choices"),
    "content is none": (chat(None), "answer must be text, got NoneType"),
    "content is a list": (chat(["1. a"]), "answer must be text, got list"),
    "no lines": (chat("I would rather not."), "no numbered lines"),
    "empty lines": (chat("1. \n2.\t\n"), "no numbered lines"),
    "many lines": (chat("1. a\n" * 101), "at most 100 lines"),
    "a long line": (chat("1. " + "a" * 2001), "of 2000 characters"),
}


@pytest.mark.drawn(3)
@pytest.mark.parametrize("name", REPLIES)
def test_another_reply_is_told_in_one_line(name, server):
    body, why = REPLIES[name]
    server.says(body, Content_Type="text/html")
    assert why in refused(server)


def test_what_takes_a_square_of_time_does_not(server):
    """Blank lines before no number: a pattern that looks past the end of a line would take minutes."""
    server.says(chat("\n \n" * 150_000 + "x"))
    began = time.perf_counter()
    assert "no numbered lines" in refused(server, seconds=60)
    assert time.perf_counter() - began < 50


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("status", [401, 404, 429, 500])
def test_a_status_of_failure_is_told(status, server):
    server.says(chat("1. a"), status=status)
    assert f"HTTP Error {status}" in refused(server)


def test_a_server_that_tells_the_key_back(server):
    """In the reason of its status, which the error shows."""

    def answer(handler):
        handler.wfile.write(f"HTTP/1.1 401 no {KEY} here\r\nContent-Length: 0\r\n\r\n".encode())

    server.answer = answer
    assert "HTTP Error 401: no … here" in refused(server)


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(status, server):
    """Least of all with the key."""
    other = Server()
    other.says(chat("1. a"))
    server.says(b"", status=status, Location=f"{other.url}/elsewhere?{KEY}")
    text = refused(server)
    assert not other.asked and len(server.asked) == 1
    assert "redirects to" in text or f"HTTP Error {status}" in text
    other.server.shutdown()
    other.server.server_close()


def test_an_endless_body_ends(server):
    def answer(handler):
        handler.send_response(200)
        handler.end_headers()
        while True:
            handler.wfile.write(b" " * 65536)

    server.answer = answer
    assert "more than 1048576 bytes" in refused(server)


def test_a_large_body_that_is_announced_is_not_read(server):
    server.says(b" " * (2**20 + 1))
    assert "more than 1048576 bytes" in refused(server)


def _dripping(place):
    """A byte now and then, each well within a socket's timeout."""

    def answer(handler):
        if place != "status":
            handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
        if place == "body":
            handler.wfile.write(b"Content-Length: 100000\r\n\r\n")
        if place == "body without a length":
            handler.wfile.write(b"\r\n")
        for _ in range(1000):
            handler.wfile.write(b"X" if place != "headers" else b"X: y\r\n")
            handler.wfile.flush()
            time.sleep(0.05)

    return answer


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("place", ["status", "headers", "body", "body without a length"])
def test_a_reply_that_drips_ends_in_time(place, server):
    """The server would go on for 50 seconds."""
    server.answer = _dripping(place)
    began = time.perf_counter()
    assert "took longer than 0.6 seconds" in refused(server, seconds=0.6)
    assert time.perf_counter() - began < 25


def test_silence_ends_in_time():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(cvg.ArgumentError, match="took longer than 0.4 seconds"):
            synopsis.endpoint_writer(url, "m", key=KEY, seconds=0.4)("a flower")


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize(
    "lines",
    [
        b"",
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 200 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 " + b"a" * 70_000,
    ],
    ids=["nothing", "nonsense", "headers", "cut off", "chunks", "gzip", "long line"],
)
def test_what_is_no_http_is_told(lines, server):
    def answer(handler):
        handler.wfile.write(lines)
        handler.close_connection = True

    server.answer = answer
    assert "gave no states" in refused(server)


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("key", [f"{KEY}\nX-Evil: 1", f"{KEY}\r", f"a {KEY}", f"{KEY}é", f"{KEY}\0"])
def test_a_key_that_is_none_is_not_shown(key, server):
    """Python's own errors show the value of a header that it refuses."""
    if key.strip() == KEY:
        server.says(chat("1. a"))
        assert write(server, key=key) == ["a"]
    else:
        assert "key must be of printable ASCII" in refused(server, key=key)
        assert not server.asked


@pytest.mark.parametrize(
    "url, why",
    [
        (f"http://me:{KEY}@127.0.0.1/v1", "no name, password or query"),
        (f"http://{KEY}@127.0.0.1/v1", "no name, password or query"),
        (f"http://127.0.0.1/v1?key={KEY}", "no name, password or query"),
        ("file:///etc/passwd", "must begin with http"),
        ("ftp://127.0.0.1/", "must begin with http"),
        ("127.0.0.1:8000/v1", "must begin with http"),
        ("http://", "must begin with http"),
        ("http://127.0.0.1/a b", "must begin with http"),
        ("http://127.0.0.1/\r\nHost: x", "must begin with http"),
        ("http://127.0.0.1:port/v1", "cannot be read"),
        ("http://[::1/v1", "cannot be read"),
    ],
)
def test_an_address_that_is_none_is_refused_at_once(url, why):
    with pytest.raises(cvg.ArgumentError, match=why) as caught:
        synopsis.endpoint_writer(url, "m")
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("options", [{"states": 0}, {"seconds": 0}, {"seconds": float("inf")}])
def test_settings_are_checked(options):
    with pytest.raises(cvg.ArgumentError, match=f"^{next(iter(options))} must be"):
        synopsis.endpoint_writer("http://127.0.0.1/v1", "m", **options)


def test_the_key_is_in_nothing_that_is_shown(server, caplog, capsys):
    """Not in the writer, nor in a method that has it, nor in what is logged or printed."""
    server.says(chat("1. a bud"))
    writer = synopsis.endpoint_writer(server.url, "m", key=KEY)
    method = cvg.VSTAR(sigma=None, prompts=writer)
    with caplog.at_level(logging.DEBUG):
        assert method.states("a flower opens") == ["a bud"]
    shown = [repr(writer), repr(method), str(method), str(dataclasses.asdict(method)), caplog.text]
    assert not any(KEY in text for text in (*shown, *capsys.readouterr()))


@pytest.mark.parametrize(
    "data, why",
    [
        (b'{"a": 1}', "must be a list of strings"),
        (b"[1]", "must be a list of strings"),
        (b"[[" * 100_000, "nested too deeply"),
        (b"\xff\xfe1", "must be UTF-8"),
        (b"[]", "at least one"),
        (b'["' + b"a" * 2**20 + b'"]', "at most 1048576 bytes"),
    ],
)
def test_a_file_of_states_is_checked(data, why, tmp_path):
    path = tmp_path / "states.json"
    path.write_bytes(data)
    with pytest.raises(cvg.ArgumentError, match=why):
        synopsis.read_states(path)


def test_a_file_of_states_may_have_a_mark(tmp_path):
    for name, text in (("a.json", '["é", "b"]'), ("a.txt", "é\nb\n")):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert synopsis.read_states(tmp_path / name) == ["é", "b"]
