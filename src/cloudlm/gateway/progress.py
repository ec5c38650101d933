"""How far a client has got in a stream, as far as another replica must know to go on with it.

Fed with every chunk that is passed on; takes out of it the note that the replica put there for the
gateway alone. A stream whose chunks have no notes (a foreign endpoint's) cannot be resumed. Pure.
"""

from __future__ import annotations

from array import array
from typing import Any

import msgspec

from cloudlm.core.resuming import NOTE

_encoder = msgspec.json.Encoder()
_decode_ids = msgspec.json.Decoder(list[int]).decode


class _Choice:
    """One choice: the tokens that are wholly shown, and the number of its chunks."""

    __slots__ = ("chunks", "finished", "token_ids")

    def __init__(self) -> None:
        self.token_ids = array("i")
        self.chunks = 0
        self.finished = False

    def body(self, index: int) -> dict[str, Any]:
        known: dict[str, Any]
        if self.finished:
            known = {"finished": True, "tokens": len(self.token_ids)}
        else:
            known = {"token_ids": list(self.token_ids)}
        return {"index": index, "chunks": self.chunks, **known}


class Progress:
    """What was shown of one stream, over all replicas that wrote it."""

    def __init__(self) -> None:
        self._head: dict[str, Any] = {}
        self._seed: int | None = None
        self._choices: dict[int, _Choice] = {}
        self._noted = True
        self._usage_shown = False

    @property
    def resumable(self) -> bool:
        """Whether every chunk so far said which tokens it holds."""
        return self._noted and bool(self._choices)

    def take(self, chunk: dict[str, Any]) -> None:
        """One chunk that is passed on; afterwards it is without its note."""
        note = chunk.pop(NOTE, None)
        if not self._noted:
            return
        choices = chunk.get("choices")
        if not choices:
            self._usage_shown = True
            return
        try:
            self._add(chunk, choices, note)
        except (KeyError, TypeError, ValueError, OverflowError):
            self._noted = False
            self._choices.clear()

    def _add(self, chunk: dict[str, Any], choices: list[dict[str, Any]], note: Any) -> None:
        """Raises what a chunk raises that is not one of our replicas'."""
        (choice,) = choices
        tokens = note["token_ids"]
        if not self._choices:
            self._head = {
                "id": chunk["id"],
                "created": chunk["created"],
                "fingerprint": chunk["system_fingerprint"],
            }
            self._seed = note.get("seed")
        index = choice["index"]
        known = self._choices.get(index)
        if known is None:
            known = self._choices[index] = _Choice()
        known.token_ids.extend(tokens)
        known.chunks += 1
        known.finished = choice["finish_reason"] is not None

    def more(self, index: int, ids: list[bytes]) -> None:
        """As ``take``, of chunks that only go on with a choice which is known: the insides of their
        lists of token ids, each written as JSON."""
        known = self._choices.get(index)
        if known is not None:  # else it is known by now that nobody can go on
            some = b",".join([one for one in ids if one])
            known.token_ids.extend(_decode_ids(b"[%b]" % some))
            known.chunks += len(ids)
            known.finished = False

    def request(self, path: str, body: bytes, cached_tokens: int) -> bytes:
        """The body that asks another replica to go on with what ``path`` and ``body`` asked of the
        first; ``cached_tokens`` as the client was told."""
        begun = {
            **self._head,
            "seed": self._seed,
            "cached_tokens": cached_tokens,
            "usage_shown": self._usage_shown,
            "choices": [choice.body(index) for index, choice in self._choices.items()],
        }
        parts = (_encoder.encode(path), body, _encoder.encode(begun))
        return b'{"path":%b,"request":%b,"begun":%b}' % parts
