"""http(s): limits, redirects, addresses that are not public, bodies that end too soon."""

import io
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from mlx_vlm_pipes.errors import MediaError
from mlx_vlm_pipes.processing import fetch, web
from mlx_vlm_pipes.processing.fetch import Access
from mlx_vlm_pipes.processing.images import load_image
from tests.processing.folders import picture

HERE = Access(allow_private=True)
MOVED = {"/file": "file:///etc/passwd", "/moved": "/image", "/loop": "/loop"}


def picture_bytes() -> bytes:
    buffer = io.BytesIO()
    picture(6, 4).save(buffer, "PNG")
    return buffer.getvalue()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path in MOVED:
            self.send_response(302)
            self.send_header("Location", MOVED[self.path])
            self.end_headers()
            return
        body = picture_bytes() if self.path in ("/image", "/short") else b"x" * 20_000
        self.send_response(200 if self.path in ("/image", "/huge", "/short") else 404)
        if self.path == "/short":
            self.send_header("Content-Length", str(len(body) + 7))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(fetch, "MAX_BYTES", 10_000)
    monkeypatch.setenv("no_proxy", "*")
    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_picture_also_behind_a_redirect(root: str) -> None:
    assert (
        load_image(f"{root}/image", HERE).size == load_image(f"{root}/moved", HERE).size == (6, 4)
    )


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/file", "not allowed"),
        ("/loop", "redirect"),
        ("/none", "answered 404"),
        ("/huge", "limit of 10000 bytes"),
        ("/short", "7 short of what the server announced"),
    ],
)
def test_what_a_server_may_not_do(root: str, path: str, message: str) -> None:
    with pytest.raises(MediaError, match=message):
        load_image(root + path, HERE)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0", "2130706433", "127.0.0.%31"])
def test_this_machine_is_asked_only_where_that_is_allowed(root: str, host: str) -> None:
    with pytest.raises(MediaError, match="no public address; allow_private"):
        load_image(root.replace("127.0.0.1", host) + "/image")


def test_redirects_are_judged_again(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first address passes for a public one, the second is a private one."""
    monkeypatch.setattr(web, "is_public", lambda text: text == "127.0.0.1")
    monkeypatch.setitem(MOVED, "/away", "http://10.1.2.3/image")
    with pytest.raises(MediaError, match=r"leads to 10\.1\.2\.3"):
        load_image(f"{root}/away")


def test_only_the_hosts_that_are_named_are_asked(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A redirect of one of them leads to another one only; a name as it stands is no permission
    for its address."""
    monkeypatch.setattr(web, "is_public", lambda text: True)
    ours = frozenset({"127.0.0.1"})
    assert fetch.fetch(f"{root}/image", hosts=ours) == picture_bytes()
    monkeypatch.setitem(MOVED, "/away", root.replace("127.0.0.1", "localhost") + "/image")
    with pytest.raises(MediaError, match="localhost is not one of the hosts"):
        fetch.fetch(f"{root}/away", hosts=ours)
    monkeypatch.undo()
    monkeypatch.setenv("no_proxy", "*")
    for host in ("127.1", "2130706433", "127.0.0.1"):
        with pytest.raises(MediaError, match="no public address"):
            fetch.fetch(f"http://{host}:1/image", hosts=frozenset({host}))


def test_a_name_is_resolved_once(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name server that answers with another address the second time is not asked again."""
    answers = ["127.0.0.1", "10.1.2.3"]
    resolve = socket.getaddrinfo

    def getaddrinfo(host: str, *args: object, **options: object) -> object:
        assert host == "pictures.example"
        return resolve(answers.pop(0), *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(web, "is_public", lambda text: text == "127.0.0.1")
    port = root.rpartition(":")[2]
    assert load_image(f"http://pictures.example:{port}/image").size == (6, 4)
    assert answers == ["10.1.2.3"]


def test_behind_a_proxy_the_goal_is_judged(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("http_proxy", root)
    with pytest.raises(MediaError, match=r"leads to 10\.1\.2\.3"):
        load_image("http://10.1.2.3/image")
    with pytest.raises(MediaError, match="answered 404"):  # the proxy was asked
        load_image("http://192.0.2.1/image", HERE)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True), ("2606:2800:220:1::1", True), ("64:ff9b::5db8:d822", True),
        ("10.0.0.1", False), ("169.254.169.254", False), ("100.64.0.1", False),
        ("224.0.0.1", False), ("0.0.0.0", False), ("::1", False), ("fe80::1%eth0", False),
        ("fd00::1", False), ("fec0::1", False), ("::ffff:127.0.0.1", False),
        ("::127.0.0.1", False), ("64:ff9b::7f00:1", False), ("2002:7f00:1::", False),
    ],
)  # fmt: skip
def test_public_addresses(address: str, public: bool) -> None:
    assert web.is_public(address) is public


def test_a_download_out_of_time_ends_its_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Headers that drip reset the socket's own clock with every byte."""
    monkeypatch.setattr(fetch, "TIMEOUT_S", 0.5)
    listener = socket.create_server(("127.0.0.1", 0))
    ended = threading.Event()

    def drip() -> None:
        connection, _ = listener.accept()
        connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
        try:
            for _ in range(200):
                connection.sendall(b"x")
                time.sleep(0.05)
        except OSError:
            ended.set()
        connection.close()

    threading.Thread(target=drip, daemon=True).start()
    with pytest.raises(MediaError, match="took longer than"):
        load_image(f"http://127.0.0.1:{listener.getsockname()[1]}/", HERE)
    assert ended.wait(5)
    listener.close()
