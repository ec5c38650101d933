"""Server-sent events out of bytes that arrive in any pieces.

Follows the WHATWG HTML standard, "Interpreting an event stream": UTF-8 with an optional byte order
mark, lines end with LF, CR or CRLF, lines that begin with a colon are comments, ``data`` lines are
joined by LF, a blank line ends the event. Works on bytes: UTF-8 never hides CR or LF inside a
character, so a split character needs no care. Buffers are bounded. Must not read JSON.
"""

from __future__ import annotations

from cloudlm.core.errors import UpstreamFailed

MAX_EVENT_BYTES = 4 * 1024 * 1024
_BOM = b"\xef\xbb\xbf"
_BEGIN = b"data: "
PING = b": ping\n\n"
"""A comment, which clients skip: it says that a stream lives while nothing comes. Whole, so that
it may stand between any two events."""


class SseParser:
    """Feed bytes, get the ``data`` of each complete event. Other fields are ignored."""

    def __init__(self, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self._rest = b""
        self._data: list[bytes] = []
        self._data_bytes = 0
        self._began = False
        self._after_cr = False
        self._max_event_bytes = max_event_bytes

    def feed(self, piece: bytes) -> list[bytes]:
        """The events that ``piece`` completes. Raises UpstreamFailed if one grows too large."""
        if self._is_one_event(piece):
            return [piece[len(_BEGIN) : -2]]
        if self._after_cr and piece:
            self._after_cr = False
            if piece.startswith(b"\n"):  # the second half of a CRLF
                piece = piece[1:]
        text = self._rest + piece if self._rest else piece
        if not self._began:
            if len(text) < len(_BOM) and _BOM.startswith(text):
                self._rest = text
                return []
            self._began = True
            text = text.removeprefix(_BOM)
        if b"\r" in text:
            self._after_cr = text.endswith(b"\r")
            text = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *lines, self._rest = text.split(b"\n")
        events: list[bytes] = []
        for line in lines:
            if not line:
                if self._data_bytes > 1:  # one empty data line alone makes no event
                    events.append(b"\n".join(self._data))
                self._data.clear()
                self._data_bytes = 0
            elif line.startswith(b"data"):
                self._take(line)
        if self._data_bytes + len(self._rest) > self._max_event_bytes:
            raise UpstreamFailed("a replica sent an event that is too large")
        return events

    @property
    def between(self) -> bool:
        """Whether nothing is open: the next byte may begin an event."""
        return self._began and not (self._rest or self._data or self._after_cr)

    def _is_one_event(self, piece: bytes) -> bool:
        """Whether ``piece`` is one event in the form that nearly all have, and nothing is open."""
        return (
            piece.startswith(_BEGIN)
            and piece.endswith(b"\n\n")
            and piece.count(b"\n") == 2
            and b"\r" not in piece
            and len(_BEGIN) + 2 < len(piece) <= self._max_event_bytes
            and self.between
        )

    def _take(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        if name != b"data":
            return
        value = value.removeprefix(b" ")
        self._data.append(value)
        self._data_bytes += len(value) + 1
        if self._data_bytes > self._max_event_bytes:
            raise UpstreamFailed("a replica sent an event that is too large")


def event(data: bytes) -> bytes:
    """One event on the wire. ``data`` must hold no line end (JSON never does)."""
    return b"data: " + data + b"\n\n"
