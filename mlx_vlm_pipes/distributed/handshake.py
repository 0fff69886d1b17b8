"""How two ranks find out that both know the secret, before a word is said.

Rank 0 listens and sends 16 random bytes; who comes answers with its rank, what the connection is
for, 16 random bytes of its own and an HMAC-SHA256 of all of that under the secret; rank 0 answers
with another one. Whoever cannot is dropped. The keys of the connection come from the same bytes.
"""

from __future__ import annotations

import contextlib
import enum
import hmac
import queue
import secrets
import socket
import struct
import threading
import time
from collections.abc import Sequence

from mlx_vlm_pipes.distributed.channel import Channel
from mlx_vlm_pipes.errors import RanksDiffer

MAGIC = b"mlx-vlm-pipes 1\n"
NONCE_BYTES, MAC_BYTES = 16, 32
KNOCK_S = 5.0  # for somebody who has connected to say who it is
MOST_KNOCKING = 32  # at once; others are dropped
RETRY_S = 0.2
_WHO = struct.Struct("<HB")  # rank, purpose


class Purpose(enum.IntEnum):
    """What a connection is for: rank 0's announcements, or signs of life."""

    NEWS = 0
    WATCH = 1


def listen(host: str) -> socket.socket:
    """A socket on a free port of this address ("" for all)."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind((host, 0))
    listener.listen(64)
    return listener


class Door:
    """Rank 0's side: takes in the connections of all others, and nobody else's."""

    def __init__(self, listener: socket.socket, secret: bytes, size: int) -> None:
        self._listener, self._secret = listener, secret
        self._wanted = {(rank, purpose) for rank in range(1, size) for purpose in Purpose}
        self._knocking = threading.Semaphore(MOST_KNOCKING)
        self._came: queue.SimpleQueue[tuple[int, Purpose, Channel]] = queue.SimpleQueue()
        self.refused = 0  # who did not know the secret

    def wait(self, timeout_s: float) -> dict[tuple[int, Purpose], Channel]:
        """All connections. Raises: RanksDiffer naming the ranks that have not come in time."""
        threading.Thread(target=self._take_in, name="ranks: door", daemon=True).start()
        end = time.monotonic() + timeout_s
        found: dict[tuple[int, Purpose], Channel] = {}
        try:
            while self._wanted - found.keys():
                rank, purpose, channel = self._came.get(timeout=max(0.0, end - time.monotonic()))
                found.setdefault((rank, purpose), channel)
        except queue.Empty:
            missing = sorted({rank for rank, _ in self._wanted - found.keys()})
            said = f"; {self.refused} connections without the secret" if self.refused else ""
            raise RanksDiffer(
                f"no connection from rank {', '.join(map(str, missing))} within {timeout_s:g} s"
                f"{said}; set the same MLX_VLM_PIPES_SECRET everywhere, or "
                "MLX_VLM_PIPES_ADDRESS to an address of rank 0 that the others reach"
            ) from None
        finally:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
        return found

    def _take_in(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return  # everybody is here
            if not self._knocking.acquire(blocking=False):
                connection.close()
                continue
            threading.Thread(target=self._ask, args=[connection], daemon=True).start()

    def _ask(self, connection: socket.socket) -> None:
        try:
            connection.settimeout(KNOCK_S)
            ours = secrets.token_bytes(NONCE_BYTES)
            connection.sendall(MAGIC + ours)
            answer = _read(connection, len(MAGIC) + _WHO.size + NONCE_BYTES + MAC_BYTES)
            who = answer[len(MAGIC) : -MAC_BYTES]
            rank, number = _WHO.unpack_from(who)
            talk = ours + who
            if not hmac.compare_digest(answer[-MAC_BYTES:], _mac(self._secret, b"join", talk)):
                raise OSError("it does not know the secret")
            if (rank, number) not in self._wanted:
                raise OSError("there is no such rank")
            connection.sendall(_mac(self._secret, b"welcome", talk))
        except OSError:
            self.refused += 1
            connection.close()
            return
        finally:
            self._knocking.release()
        keys = _mac(self._secret, b"from rank 0", talk), _mac(self._secret, b"to rank 0", talk)
        self._came.put((rank, Purpose(number), Channel(connection, f"rank {rank}", *keys)))


def knock(
    addresses: Sequence[tuple[str, int]],
    secret: bytes,
    rank: int,
    purpose: Purpose,
    timeout_s: float,
) -> Channel:
    """The other ranks' side: a connection to rank 0, by the first address that is its own.

    Raises: RanksDiffer where none is in time.
    """
    end, refused = time.monotonic() + timeout_s, False
    while True:
        for address in addresses:
            try:
                return _enter(address, secret, rank, purpose)
            except _Refused:
                refused = True
            except OSError:
                continue  # not reachable, or not yet
        if refused:
            raise RanksDiffer(
                f"rank {rank} and rank 0 have not the same secret; set the same "
                "MLX_VLM_PIPES_SECRET everywhere (mlx.launch --env)"
            )
        if time.monotonic() > end:
            tried = ", ".join(f"{host}:{port}" for host, port in addresses)
            raise RanksDiffer(
                f"rank {rank} reaches rank 0 at none of {tried}; set MLX_VLM_PIPES_ADDRESS to an "
                "address of rank 0 that the others reach"
            )
        time.sleep(RETRY_S)


class _Refused(Exception):
    """Somebody was there who does not know the secret, or says that we do not."""


def _enter(address: tuple[str, int], secret: bytes, rank: int, purpose: Purpose) -> Channel:
    connection = socket.create_connection(address, KNOCK_S)
    try:
        asked = _read(connection, len(MAGIC) + NONCE_BYTES)
        who = _WHO.pack(rank, purpose) + secrets.token_bytes(NONCE_BYTES)
        talk = asked[len(MAGIC) :] + who
        connection.sendall(MAGIC + who + _mac(secret, b"join", talk))
        try:
            welcome = _read(connection, MAC_BYTES)
        except OSError:
            raise _Refused from None
        if not hmac.compare_digest(welcome, _mac(secret, b"welcome", talk)):
            raise _Refused
    except BaseException:
        connection.close()
        raise
    keys = _mac(secret, b"to rank 0", talk), _mac(secret, b"from rank 0", talk)
    return Channel(connection, "rank 0", *keys)


def _mac(secret: bytes, role: bytes, talk: bytes) -> bytes:
    return hmac.digest(secret, role + b"\0" + talk, "sha256")


def _read(connection: socket.socket, count: int) -> bytes:
    """So many bytes that begin with MAGIC, or are a MAC alone. Raises: OSError."""
    data = b""
    while len(data) < count:
        piece = connection.recv(count - len(data))
        if not piece:
            raise OSError("closed")
        data += piece
    if count > MAC_BYTES and not data.startswith(MAGIC):
        raise OSError("another protocol")
    return data
