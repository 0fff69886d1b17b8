"""A connection between two ranks: messages that nobody else can have written.

A message is its length (uint32, little endian), its bytes, and the first 16 bytes of an HMAC-SHA256
over its number, its length and its bytes, with a key that this connection and direction has alone:
nothing can be put in, changed, left out or said twice by who does not know the ranks' secret.
Messages can be read by who sees the cable, as MLX's own tensors can.
"""

from __future__ import annotations

import contextlib
import hmac
import socket
import struct
import threading

from mlx_vlm_pipes.errors import RankLost

MAX_BYTES = 64 << 20  # of a message: the tokens of the longest prompts are some megabytes
TAG_BYTES = 16
_HEAD = struct.Struct("<I")
_NUMBER = struct.Struct("<Q")


class Channel:
    """One end of it. peer: who is at the other, for messages.

    sent_bytes: all that it took, lengths and tags included. Sending is safe from several threads.
    """

    def __init__(
        self, connection: socket.socket, peer: str, send_key: bytes, receive_key: bytes
    ) -> None:
        self.peer, self._connection = peer, connection
        self._send_key, self._receive_key = send_key, receive_key
        self._sent = self._received = 0
        self._lock = threading.Lock()
        self.sent_bytes = 0
        connection.settimeout(None)
        with contextlib.suppress(OSError):  # a test's pair of sockets has no such option
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def fileno(self) -> int:
        """For select."""
        return self._connection.fileno()

    def send(self, message: bytes = b"") -> None:
        """Raises: RankLost where the other end has gone."""
        if len(message) > MAX_BYTES:
            raise RankLost(
                f"a message of {len(message)} bytes for {self.peer}, at most {MAX_BYTES}"
            )
        head = _HEAD.pack(len(message))
        with self._lock:
            tag = _tag(self._send_key, self._sent, head, message)
            try:
                self._connection.sendall(b"".join([head, message, tag]))
            except OSError as error:
                raise self._gone(error) from None
            self._sent += 1
            self.sent_bytes += len(head) + len(message) + len(tag)

    def receive(self) -> bytes:
        """The next message; waits for it.

        Raises: RankLost where the other end has gone, and for what it cannot have written.
        """
        head = self._read(_HEAD.size)
        (length,) = _HEAD.unpack(head)
        if length > MAX_BYTES:
            raise self._refused(f"a message of {length} bytes, at most {MAX_BYTES} are taken")
        message = self._read(length)
        expected = _tag(self._receive_key, self._received, head, message)
        if not hmac.compare_digest(self._read(TAG_BYTES), expected):
            raise self._refused("a message that it has not written")
        self._received += 1
        return message

    def close(self) -> None:
        """Both directions; who waits on the other end is told."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _read(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            try:
                piece = self._connection.recv(min(count - len(data), 1 << 20))
            except OSError as error:
                raise self._gone(error) from None
            if not piece:
                raise self._gone(None)
            data += piece
        return bytes(data)

    def _gone(self, error: OSError | None) -> RankLost:
        why = "its connection is closed" if error is None else error.strerror or str(error)
        return RankLost(f"{self.peer} has gone ({why})")

    def _refused(self, what: str) -> RankLost:
        self.close()
        return RankLost(f"the connection to {self.peer} brought {what}; it is closed")


def _tag(key: bytes, number: int, head: bytes, message: bytes) -> bytes:
    signed = b"".join([_NUMBER.pack(number), head, message])
    return hmac.digest(key, signed, "sha256")[:TAG_BYTES]
