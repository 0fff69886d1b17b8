"""The ranks of a model as this process sees them: how they meet, agree, and talk before a step."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from mlx_vlm_pipes.distributed.channel import Channel
from mlx_vlm_pipes.distributed.codec import Malformed, pack, unpack
from mlx_vlm_pipes.distributed.handshake import Door, Purpose, knock, listen
from mlx_vlm_pipes.distributed.joining import SECRET, first_addresses, is_local
from mlx_vlm_pipes.distributed.watchdog import Watchdog, end_process
from mlx_vlm_pipes.errors import PipesError, RankLost, RanksDiffer, one_line, shown
from mlx_vlm_pipes.ranks import Ranks

MEET_S = 30.0  # for all connections, once MLX has brought the ranks together
_CARD_BYTES = 2048

_MET: list[int] = []  # ranks that have met in this process

T = TypeVar("T")


class Team:
    """Channels to the others (rank 0: to all; the others: to rank 0 alone), and the watchdog."""

    def __init__(self, ranks: Ranks, news: Mapping[int, Channel], watchdog: Watchdog) -> None:
        self.ranks, self.watchdog = ranks, watchdog
        self._news = dict(sorted(news.items()))
        watchdog.tell(self._cut)

    @property
    def sent_bytes(self) -> int:
        """What went out over the control channels, signs of life left out."""
        return sum(channel.sent_bytes for channel in self._news.values())

    def announce(self, message: bytes) -> None:
        """Rank 0 to all others; nobody answers. Raises: RankLost."""
        with self._naming_the_lost():
            for channel in self._news.values():
                channel.send(message)

    def hear(self) -> bytes:
        """What rank 0 announces next; waits for it. Raises: RankLost."""
        with self._naming_the_lost():
            return self._news[0].receive()

    def decide(self, make: Callable[[], T]) -> T:
        """What rank 0 makes of what only it knows, on every rank: all call it, in the same order.

        Raises: RankLost.
        """
        if not self.ranks.is_first:
            with self._naming_the_lost():
                return _read(self._news[0])
        made = make()
        self.announce(pack(made))
        return made

    def gather(self, value: Any) -> list[Any]:
        """Everybody's values by rank, on every rank: all call it, in the same order.

        Raises: RankLost.
        """
        with self._naming_the_lost():
            if not self.ranks.is_first:
                self._news[0].send(pack(value))
                return _read(self._news[0])
            values = [value, *(_read(channel) for channel in self._news.values())]
        self.announce(pack(values))
        return values

    def together(self, work: Callable[[], T]) -> T:
        """Do this on every rank, or fail on every rank with what any of them says.

        Raises: its own failure where all have the same, else RanksDiffer with that of the first.
        """
        made, failure = None, None
        try:
            made = work()
        except RankLost:
            raise
        except Exception as error:
            failure = error
        said = None if failure is None else _line(failure)
        lines = self.gather(said)
        failed = [rank for rank, line in enumerate(lines) if line is not None]
        if not failed:
            return made  # pyright: ignore[reportReturnType]  # it has not failed
        if failure is not None and (len(set(lines)) == 1 or not isinstance(failure, PipesError)):
            raise failure
        raise RanksDiffer(f"rank {failed[0]}: {lines[failed[0]]}") from failure

    def require_same(self, facts: Mapping[str, Any]) -> None:
        """Raises: RanksDiffer, the same line on all ranks, for the first fact that differs."""
        everybody = self.gather(dict(facts))
        for name, first in everybody[0].items():
            for rank, own in enumerate(everybody):
                if own[name] != first:
                    raise RanksDiffer(
                        f"{name}: rank {rank} has {shown(own[name])}, rank 0 {shown(first)}; all "
                        "ranks need the same"
                    )

    def leave(self, error: BaseException) -> None:
        """The end by an error: one that all ranks have agreed on, or this one's own."""
        if isinstance(error, PipesError) and not isinstance(error, RankLost):
            self.close()
            return
        own = RankLost(f"rank {self.ranks.rank} has ended: {_line(error)}")
        self.watchdog.fail(error if isinstance(error, RankLost) else own)

    @contextlib.contextmanager
    def _naming_the_lost(self) -> Iterator[None]:
        """A connection that the watchdog has cut says why."""
        try:
            yield
        except RankLost as error:
            raise self.watchdog.lost or error from None

    def _cut(self, error: RankLost) -> None:
        """Whoever waits for a rank that is silent waits no more."""
        del error
        for channel in self._news.values():
            channel.close()

    def close(self) -> None:
        """The end of the watch; what MLX still computes may end."""
        self.watchdog.close()


def meet(ranks: Ranks, end: Callable[[], None] = end_process) -> Team:
    """Connect the ranks; all call it at once, on the thread that MLX's sums run on.

    end: what ends the process when a rank is lost. Raises: RanksDiffer on all ranks.
    """
    if _MET:
        raise RanksDiffer(
            "the other ranks have ended with the first pipeline of this process; start a process "
            "for each model"
        )
    _MET.append(ranks.size)
    channels, failure = None, None
    alarm = threading.Timer(2 * MEET_S, end)  # who dies now would leave MLX waiting for ever
    alarm.daemon = True
    alarm.start()
    try:
        door = _open_door(ranks) if ranks.is_first else None
        card = _shared_card(ranks, {} if door is None else door[1])
        try:
            channels = door[0].wait(MEET_S) if door is not None else _knock(ranks, card)
        except RanksDiffer as error:
            failure = error
        here = ranks.total(int(failure is None))
    except RuntimeError as error:  # MLX's: another rank has ended meanwhile
        said = f"rank {ranks.rank} lost the others while they met ({one_line(error)})"
        raise failure or RanksDiffer(f"{said}; see what they say") from None
    finally:
        alarm.cancel()
    if failure is not None or channels is None:
        raise failure or RanksDiffer("the ranks have not met")
    if here < ranks.size:
        raise RanksDiffer(f"{ranks.size - here} of {ranks.size} ranks could not join")
    by_purpose = {
        purpose: {rank: channel for (rank, own), channel in channels.items() if own is purpose}
        for purpose in Purpose
    }
    watchdog = Watchdog(by_purpose[Purpose.WATCH], end)
    watchdog.start()
    return Team(ranks, by_purpose[Purpose.NEWS], watchdog)


def _open_door(ranks: Ranks) -> tuple[Door, dict[str, Any]]:
    """Rank 0's door, and the card that says where it is.

    Without a secret in the environment one is drawn, which travels over MLX's own connections.
    """
    hosts, given = first_addresses(), os.environ.get(SECRET)
    secret = secrets.token_bytes(32) if not given else given.encode()
    listener = listen("127.0.0.1" if all(map(is_local, hosts)) else "")
    drawn = None if given else secret.hex()
    card = {"hosts": hosts, "port": listener.getsockname()[1], "secret": drawn}
    return Door(listener, secret, ranks.size), card


def _shared_card(ranks: Ranks, card: Mapping[str, Any]) -> dict[str, Any]:
    """Rank 0's card on every rank, through MLX."""
    text = json.dumps(card).encode()
    padded = np.zeros(_CARD_BYTES, np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    shared = np.array(ranks.from_first(mx.array(padded)))
    return json.loads(shared.tobytes().rstrip(b"\0"))


def _knock(ranks: Ranks, card: Mapping[str, Any]) -> dict[tuple[int, Purpose], Channel]:
    given = os.environ.get(SECRET)
    if bool(given) != (card["secret"] is None):
        where = f"this rank ({ranks.rank})" if card["secret"] is None else "rank 0"
        raise RanksDiffer(f"{SECRET} is not set for {where}; set it everywhere or nowhere")
    secret = given.encode() if given else bytes.fromhex(card["secret"])
    addresses = [(host, card["port"]) for host in card["hosts"]]
    return {
        (0, purpose): knock(addresses, secret, ranks.rank, purpose, MEET_S) for purpose in Purpose
    }


def _read(channel: Channel) -> Any:
    """Raises: RankLost."""
    try:
        return unpack(channel.receive())
    except Malformed as error:
        raise RankLost(f"{channel.peer} has sent what is no message ({error})") from None


def _line(error: BaseException) -> str:
    if isinstance(error, PipesError):
        return " ".join(str(error).split())
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
