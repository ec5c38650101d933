"""What rank 0 tells the other ranks, and what they answer: plain data in MessagePack.

Each message stands behind its length, 8 bytes. Nothing here can run code, whatever the bytes are.
Tensors never pass here.
"""

from __future__ import annotations

import socket
from typing import TypeVar

import msgspec

from cloudlm.core.chat import Sampling
from cloudlm.core.errors import CloudlmError, InternalError, error_from_body
from cloudlm.engine.step import Chunk

_T = TypeVar("_T")
_LENGTH_BYTES = 8
MAX_BYTES = 1 << 30


class Start(msgspec.Struct, frozen=True, tag=True):
    """The first message: which part of which model to load, and how. ``store`` is the file by which
    ranks find each other; sizes as in ``RunnerFacts``."""

    folder: str
    store: str
    rank: int
    tensor: int
    pipeline: int
    dtype: str
    device: str
    threads: int
    num_blocks: int
    block_size: int
    max_model_len: int


class Piece(msgspec.Struct, frozen=True, array_like=True):
    """What a rank needs to know of a chunk."""

    token_ids: tuple[int, ...]
    start: int
    block_table: tuple[int, ...]
    adapter: str

    @classmethod
    def of(cls, chunk: Chunk) -> Piece:
        return cls(chunk.token_ids, chunk.start, chunk.block_table, chunk.adapter)

    def chunk(self) -> Chunk:
        return Chunk(
            0,
            self.token_ids,
            self.start,
            self.block_table,
            samples=False,
            sampling=_ANY_SAMPLING,
            adapter=self.adapter,
        )


class Forward(msgspec.Struct, frozen=True, tag=True):
    """Compute hidden states. Not answered."""

    pieces: tuple[Piece, ...]


class Logits(msgspec.Struct, frozen=True, tag=True):
    """Compute the logits of so many hidden states, which follow. Not answered."""

    rows: int


class Copy(msgspec.Struct, frozen=True, tag=True):
    """Copy blocks of the cache. Not answered."""

    pairs: tuple[tuple[int, int], ...]


class AddAdapter(msgspec.Struct, frozen=True, tag=True):
    """Load a LoRA adapter. Answered."""

    key: str
    folder: str


class RemoveAdapter(msgspec.Struct, frozen=True, tag=True):
    """Forget one, if it is known. Not answered."""

    key: str


class Sleep(msgspec.Struct, frozen=True, tag=True):
    """Give memory back, unless that is done. Answered."""

    level: int


class Wake(msgspec.Struct, frozen=True, tag=True):
    """Load the weights again. Answered."""


Order = Start | Forward | Logits | Copy | AddAdapter | RemoveAdapter | Sleep | Wake


class Done(msgspec.Struct, frozen=True, tag=True):
    """What was asked is done."""


class Failed(msgspec.Struct, frozen=True, tag=True):
    """It is not, and why: an error of ``core.errors`` as it goes over the wire."""

    status: int
    code: str | None
    message: str
    param: str | None

    @classmethod
    def of(cls, error: CloudlmError) -> Failed:
        return cls(error.status, error.code, error.message, error.param)

    def error(self) -> CloudlmError:
        body = {"message": self.message, "code": self.code, "param": self.param}
        return error_from_body(self.status, {"error": body})


Reply = Done | Failed

_ANY_SAMPLING = Sampling()  # ranks other than the first choose no tokens
_encoder = msgspec.msgpack.Encoder()
_orders = msgspec.msgpack.Decoder(Order)
_replies = msgspec.msgpack.Decoder(Reply)


def frame(message: Order | Reply) -> bytes:
    """The bytes that go over a socket."""
    body = _encoder.encode(message)
    return len(body).to_bytes(_LENGTH_BYTES, "little") + body


def read_order(connection: socket.socket) -> Order | None:
    """The next order, None when rank 0 has closed the connection. Raises InternalError for bytes
    that are no order, OSError."""
    body = _read_frame(connection)
    return None if body is None else _decoded(_orders, body)


def read_reply(connection: socket.socket) -> Reply | None:
    """The next answer, None when the rank has ended. Raises as ``read_order``."""
    body = _read_frame(connection)
    return None if body is None else _decoded(_replies, body)


def _decoded(decoder: msgspec.msgpack.Decoder[_T], body: bytes) -> _T:
    try:
        return decoder.decode(body)
    except msgspec.DecodeError as error:
        raise InternalError(f"a rank was sent something else than a message: {error}") from error


def _read_frame(connection: socket.socket) -> bytes | None:
    head = _read(connection, _LENGTH_BYTES)
    if head is None:
        return None
    length = int.from_bytes(head, "little")
    if length > MAX_BYTES:
        raise InternalError(f"a rank was sent a message of {length} bytes")
    return _read(connection, length)


def _read(connection: socket.socket, count: int) -> bytes | None:
    data = bytearray(count)
    view, done = memoryview(data), 0
    while done < count:
        got = connection.recv_into(view[done:])
        if not got:
            return None
        done += got
    return bytes(data)
