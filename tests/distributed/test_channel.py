"""Who knows the secret gets in, and what it says arrives; nobody else is heard."""

from __future__ import annotations

import socket
import struct
import threading
import time

import pytest

from mlx_vlm_pipes.distributed.channel import MAX_BYTES, TAG_BYTES, Channel
from mlx_vlm_pipes.distributed.handshake import MAGIC, Door, Purpose, knock, listen
from mlx_vlm_pipes.errors import RankLost, RanksDiffer

SECRET = b"of the ranks"
HOST = "127.0.0.1"


def pair() -> tuple[Channel, Channel, socket.socket]:
    """Two ends, and what lies below the first one."""
    a, b = socket.socketpair()
    return Channel(a, "rank 1", b"there", b"back"), Channel(b, "rank 0", b"back", b"there"), a


class Waiting:
    """Rank 0 of two, who waits for the other on a thread of its own."""

    def __init__(self, timeout_s: float = 10) -> None:
        listener = listen(HOST)
        self.address = listener.getsockname()
        self.door = Door(listener, SECRET, 2)
        self.found: dict[tuple[int, Purpose], Channel] = {}
        self.failure: RanksDiffer | None = None
        self.thread = threading.Thread(target=self.wait, args=[timeout_s])
        self.thread.start()

    def wait(self, timeout_s: float) -> None:
        try:
            self.found = self.door.wait(timeout_s)
        except RanksDiffer as error:
            self.failure = error

    def enter(self, secret: bytes = SECRET, timeout_s: float = 5) -> list[Channel]:
        return [knock([self.address], secret, 1, purpose, timeout_s) for purpose in Purpose]


def test_messages_arrive_in_both_directions() -> None:
    one, other, _ = pair()
    for message in (b"", b"a", bytes(100_000)):
        threading.Thread(target=one.send, args=[message]).start()
        assert other.receive() == message
    other.send(b"back")
    assert one.receive() == b"back"
    assert other.sent_bytes == 4 + len("back") + TAG_BYTES


def test_a_message_put_in_is_not_heard() -> None:
    for raw in (
        struct.pack("<I", 3) + b"bye" + bytes(TAG_BYTES),
        struct.pack("<I", MAX_BYTES + 1),  # refused before any of it is read
    ):
        _, other, below = pair()
        below.sendall(raw)
        with pytest.raises(RankLost, match="rank 0"):
            other.receive()


def test_a_message_said_twice_is_not_heard() -> None:
    a, b = socket.socketpair()
    c, d = socket.socketpair()
    Channel(a, "", b"k", b"").send(b"once")
    seen = b.recv(100)
    d.sendall(seen + seen)
    listening = Channel(c, "rank 1", b"", b"k")
    assert listening.receive() == b"once"
    with pytest.raises(RankLost, match="not written"):
        listening.receive()


def test_an_end_that_closes_is_noticed() -> None:
    one, other, _ = pair()
    one.close()
    with pytest.raises(RankLost, match="gone"):
        other.receive()


def test_ranks_meet_whatever_strangers_do() -> None:
    waiting = Waiting()
    strangers = [socket.create_connection(waiting.address) for _ in range(40)]  # some say nothing
    for stranger in strangers[:5]:
        stranger.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + bytes(60))
    strangers[5].sendall(MAGIC + bytes(51))
    time.sleep(0.1)
    for stranger in strangers[:30]:
        stranger.close()
    ours = waiting.enter()
    waiting.thread.join()
    for purpose, channel in zip(Purpose, ours, strict=True):
        channel.send(b"here")
        assert waiting.found[1, purpose].receive() == b"here"
    with pytest.raises(OSError):  # noqa: PT011  # it listens no more; the message is the system's
        socket.create_connection(waiting.address)


def test_another_secret_is_refused_on_both_sides() -> None:
    waiting = Waiting(timeout_s=0.5)
    with pytest.raises(RanksDiffer, match="MLX_VLM_PIPES_SECRET"):
        waiting.enter(b"another")
    waiting.thread.join()
    assert "rank 1" in str(waiting.failure)
    assert "without the secret" in str(waiting.failure)


def test_rank_0_must_know_the_secret_too() -> None:
    listener = socket.create_server((HOST, 0))

    def pretend() -> None:
        connection, _ = listener.accept()
        connection.sendall(MAGIC + bytes(16))
        connection.recv(1000)
        connection.sendall(bytes(32))

    threading.Thread(target=pretend).start()
    with pytest.raises(RanksDiffer, match="secret"):
        knock([listener.getsockname()], SECRET, 1, Purpose.NEWS, 2)


def test_nobody_there_is_said_in_time() -> None:
    with socket.create_server((HOST, 0)) as nobody:
        address = nobody.getsockname()
    with pytest.raises(RanksDiffer, match="MLX_VLM_PIPES_ADDRESS"):
        knock([address], SECRET, 1, Purpose.NEWS, 0.3)
