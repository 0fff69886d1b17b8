"""Who has gone or says nothing is lost; who has said farewell is not."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from mlx_vlm_pipes.distributed import watchdog
from mlx_vlm_pipes.distributed.channel import Channel
from mlx_vlm_pipes.distributed.watchdog import Watchdog
from mlx_vlm_pipes.errors import RankLost


class Watched:
    """Rank 0 and rank 1 in one process, and what rank 0 has learned."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(watchdog, "BEAT_S", 0.05)
        monkeypatch.setattr(watchdog, "SILENCE_S", 0.4)
        a, b = socket.socketpair()
        self.other_end = Channel(b, "rank 0", b"b", b"a")
        self.ended, self.lost = threading.Event(), threading.Event()
        self.errors: list[RankLost] = []
        self.first = Watchdog({1: Channel(a, "rank 1", b"a", b"b")}, self.ended.set)
        self.first.tell(self.note)
        self.first.start()

    def note(self, error: RankLost) -> None:
        self.errors.append(error)
        self.lost.set()

    def other(self) -> Watchdog:
        made = Watchdog({0: self.other_end}, lambda: None)
        made.start()
        return made


def test_signs_of_life_keep_it_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    other = watched.other()
    assert not watched.lost.wait(1.0)
    other.close()
    watched.other_end.close()
    assert not watched.lost.wait(0.6)  # it had said that it goes


def test_silence_is_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    begun = time.monotonic()
    assert watched.lost.wait(5)
    assert 0.3 < time.monotonic() - begun < 3
    assert "rank 1 has been silent" in str(watched.errors[0])
    assert watched.first.lost is watched.errors[0]
    assert watched.ended.wait(5)


def test_a_closed_connection_is_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    watched.other_end.close()
    assert watched.lost.wait(0.3)
    assert "rank 1 has gone" in str(watched.errors[0])


def test_what_one_rank_has_met_all_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    watched.other().fail(RankLost("rank 1 cannot go on: no memory"))
    assert watched.lost.wait(5)
    assert str(watched.errors[0]) == "rank 1 cannot go on: no memory"
    late: list[RankLost] = []
    watched.first.tell(late.append)  # who asks later hears it at once
    assert late == watched.errors


def test_two_ranks_say_farewell_at_once() -> None:
    """The watching thread hears one while the closing one still tells all."""
    (a, b), heard = socket.socketpair(), threading.Event()
    other_end = Channel(b, "rank 0", b"b", b"a")

    class Crossing(Channel):
        def send(self, message: bytes = b"") -> None:
            super().send(message)
            if message:
                other_end.send(message)
                assert heard.wait(5)
                time.sleep(0.05)

        def receive(self) -> bytes:
            message = super().receive()
            if message:
                heard.set()
            return message

    first = Watchdog({1: Crossing(a, "rank 1", b"a", b"b")}, lambda: None)
    first.start()
    first.close()
