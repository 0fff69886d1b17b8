"""Who is still there: a sign of life each second between rank 0 and the others.

MLX waits for ever inside a step where another process has died, so this runs outside of it, on a
thread of its own (MLX lets Python's lock go while it waits). Who has been silent for SILENCE_S, or
whose connection has closed without a word, is lost, and with it the model: there is no way out of
the step that waits for it but the end of the process.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections.abc import Callable, Mapping

from mlx_vlm_pipes.command import RANK_LOST
from mlx_vlm_pipes.distributed.channel import Channel
from mlx_vlm_pipes.errors import RankLost

BEAT_S, SILENCE_S = 1.0, 7.0
GRACE_S = 2.0  # from the failure of all requests to the end of the process
_BYE, _LOST = b"bye", b"lost "

Ender = Callable[[], None]


def end_process() -> None:
    """What waits in MLX cannot be ended otherwise."""
    time.sleep(GRACE_S)
    os._exit(RANK_LOST)


class Watchdog:
    """Watches the other ranks: rank 0 all of them, each of these rank 0.

    listeners are called with the RankLost, from its thread; then `end`, on a thread of its own.
    """

    def __init__(self, peers: Mapping[int, Channel], end: Ender = end_process) -> None:
        self._peers, self._end = dict(peers), end
        self._heard = dict.fromkeys(self._peers, time.monotonic())
        self._lock = threading.Lock()
        self._listeners: list[Callable[[RankLost], None]] = []
        self._is_over = False
        self.lost: RankLost | None = None
        self._thread = threading.Thread(target=self._run, name="ranks: watchdog", daemon=True)

    def start(self) -> None:
        self._heard = dict.fromkeys(self._peers, time.monotonic())
        self._thread.start()

    def tell(self, listener: Callable[[RankLost], None]) -> None:
        """Call this one too when a rank is lost; at once where one is."""
        with self._lock:
            self._listeners.append(listener)
            lost = self.lost
        if lost is not None:
            listener(lost)

    def close(self) -> None:
        """An orderly end: the others are told, and nobody is watched any more."""
        with self._lock:
            if self._is_over:
                return
            self._is_over = True
        self._say(_BYE)

    def fail(self, error: RankLost) -> None:
        """The model cannot go on, whoever found out: tell the others and end."""
        with self._lock:
            if self._is_over:
                return
            self._is_over, self.lost = True, error
            listeners = list(self._listeners)
        self._say(_LOST + str(error).encode())
        threading.Thread(target=self._end, name="ranks: end", daemon=True).start()
        for listener in listeners:
            listener(error)

    def _say(self, word: bytes) -> None:
        for channel in self._peers.values():
            with contextlib.suppress(RankLost):
                channel.send(word)

    def _run(self) -> None:
        next_beat = time.monotonic()
        while not self._is_over and self._peers:
            now = time.monotonic()
            if now >= next_beat:
                self._say(b"")
                next_beat = now + BEAT_S
            ready = select.select(list(self._peers.values()), [], [], max(0, next_beat - now))[0]
            try:
                for rank, channel in self._peers.items():
                    if channel in ready:
                        self._hear(rank, channel)
                    else:  # what has come is read before anybody is called silent
                        self._require_heard(rank)
            except RankLost as error:
                self.fail(error)

    def _hear(self, rank: int, channel: Channel) -> None:
        """Raises: RankLost."""
        word = channel.receive()
        self._heard[rank] = time.monotonic()
        if word == _BYE:
            # another dict: `_say` may be on its way through this one, on another thread
            self._peers = {r: peer for r, peer in self._peers.items() if r != rank}
        elif word.startswith(_LOST):
            raise RankLost(word[len(_LOST) :].decode(errors="replace"))

    def _require_heard(self, rank: int) -> None:
        silent_s = time.monotonic() - self._heard[rank]
        if silent_s > SILENCE_S:
            raise RankLost(f"rank {rank} has been silent for {silent_s:.0f} s")
