"""What the chunks of one stream have in common, so that most need not be read to be passed on.

A replica writes one chunk like the other: only the text, two counts of the usage and the note of
its tokens differ. ``learn`` takes a chunk that was read and finds where these stand; it believes
that only after it has put others there, read the chunk anew and found just those. Whatever is then
not made of the same bytes around a sound text and sound numbers has not this form, and is to be
read. What is passed on is byte for byte what reading it would have given. Must not know streams,
attempts or whom a chunk is for. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import msgspec

from cloudlm.core.resuming import NOTE

MAX_DIGITS = 9
_BEGIN = b"data: "
_END = b"\n\n"
_N = rb"(?:0|[1-9][0-9]{0,%d})" % (MAX_DIGITS - 1)
_ANY_TEXT = re.compile(rb'(?:[^"\\\x00-\x1f]|\\.)*')
_SOUND_TEXT = re.compile(rb'[^"\\\x00-\x1f]*(?:\\["\\bfnrt][^"\\\x00-\x1f]*)*')
"""As our encoder writes it: with those escapes alone, and none that it would not use."""
_SOUND_IDS = re.compile(rb"(?:%b(?:,%b)*)?" % (_N, _N))
_COUNTS = re.compile(
    rb'(".*"usage":\{"prompt_tokens":%b,"(?:completion|total)_tokens":)%b'
    rb'(,"(?:completion|total)_tokens":)%b'
    rb'((?:,"prompt_tokens_details":\{"cached_tokens":%b\})?\})'
    rb'(?:(,"%b":\{"token_ids":\[)%b(\]\}))?(\})'
    % (_N, _N, _N, _N, NOTE.encode(), _SOUND_IDS.pattern),
    re.DOTALL,
)
_OTHER_TEXT, _OTHER_COUNTS, _OTHER_ID = b"~another text~", (123454321, 987656789), 135797531
_decoder = msgspec.json.Decoder()


class Form:
    """One form; made by ``learn``. ``ids`` are the notes of the chunks that were passed on, for
    whoever keeps them to take away; ``tokens`` is the count that was stated last."""

    def __init__(
        self, index: int, usage: dict[str, Any] | None, raw: list[bytes], out: list[bytes]
    ) -> None:
        self.index = index
        self.usage = usage  # the learned chunk's
        self.says_usage = usage is not None
        self.tokens = b""
        self.texts = 0  # how many texts were passed on, empty ones left out
        self.ids: list[bytes] = []
        self._begin = _BEGIN + raw[0]
        self._begin_bytes = len(self._begin)
        self._middle, self._between, self._after, self._end = raw[1:5]
        self._end_bytes = len(self._end)
        self._total_first = _says_total(self._middle)
        self._out_begin, self._out_middle = out[0], out[1]
        self._out_end = out[2] if len(out) > 2 else b""
        self._repeats_usage = len(out) > 2
        self._shown = b""

    def take(self, events: list[bytes], out: list[bytes]) -> int:
        """Add to ``out`` what the client gets of the first ``events``, lines without their ends;
        how many have this form. The next one has not."""
        done = 0
        begin, begin_bytes, middle = self._begin, self._begin_bytes, self._middle
        for event in events:
            head, found, tail = event.partition(middle)
            if not found or head[:begin_bytes] != begin:
                return done
            text = head[begin_bytes:]
            if not _is_sound(text):
                return done
            if self.says_usage:
                if not self._count(tail):
                    return done
            elif tail:
                return done
            out.append(self._out_begin)
            out.append(text)
            out.append(self._out_middle)
            if self._repeats_usage:
                out.append(self._shown)
                out.append(self._out_end)
            if text:
                self.texts += 1
            done += 1
        return done

    def _count(self, tail: bytes) -> bool:
        """Whether what follows the text is the usage and, where the form has it, a note."""
        counts, found, note = tail.partition(self._after)
        first, _, second = counts.partition(self._between)
        if not (found and _is_number(first) and _is_number(second)):
            return False
        if self._end:
            cut = len(note) - self._end_bytes
            ids = note[:cut]
            if note[cut:] != self._end or cut < 0 or not _are_ids(ids):
                return False
            self.ids.append(ids)
        elif note:
            return False
        self.tokens = second if self._total_first else first
        self._shown = counts
        return True


def learn(data: bytes, shape: Callable[[dict[str, Any]], bytes]) -> Form | None:
    """The form of a chunk that goes on with one choice by one text; None if it has none that would
    save anything. ``shape`` says what a client gets of a chunk, whose note was taken out; it must
    do with one text and count as with any other."""
    chunk = _decoder.decode(data)
    place = _place(chunk)
    if place is None:
        return None
    begin, mark, tail = data.partition(b'"%b":"' % place.encode())
    text = _ANY_TEXT.match(tail)
    if not mark or text is None:
        return None
    middle, between, after, end = _parts(tail[text.end() :])
    usage = chunk.get("usage")
    counted, noted = isinstance(usage, dict), NOTE in chunk
    if counted != bool(between) or noted != bool(end):
        return None
    known = dict(usage) if isinstance(usage, dict) else None
    raw = [begin + mark, middle, between, after, end]
    _alter(chunk, place, total_first=_says_total(middle))
    try:
        if _decoder.decode(_altered(raw)) != chunk:
            return None
    except msgspec.DecodeError:
        return None
    chunk.pop(NOTE, None)
    out = _split(shape(chunk), between)
    return None if out is None else Form(chunk["choices"][0]["index"], known, raw, out)


def _place(chunk: dict[str, Any]) -> str | None:
    """The name of the one text that a chunk brings; None if it brings anything else."""
    choices = chunk.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        return None
    choice = choices[0]
    if choice.get("finish_reason") is not None or type(choice.get("index")) is not int:
        return None
    delta = choice.get("delta")
    if not isinstance(delta, dict):
        return "text" if isinstance(choice.get("text"), str) else None
    names = [name for name, value in delta.items() if value and name != "role"]
    if len(names) != 1 or choice.get("text") or not isinstance(delta[names[0]], str):
        return None
    return names[0] if names[0].isidentifier() and names[0].isascii() else None


def _says_total(middle: bytes) -> bool:
    """Whether the first count is the sum."""
    return middle.endswith(b'"total_tokens":')


def _parts(tail: bytes) -> tuple[bytes, bytes, bytes, bytes]:
    """What stands around the counts and the note behind a text: in front of the first count,
    between them, behind them up to the note or the end, and behind the note."""
    found = _COUNTS.fullmatch(tail)
    if found is None:
        return tail, b"", b"", b""
    middle, between, after, opens, closes, end = found.groups()
    if opens is None:
        return middle, between, after + end, b""
    return middle, between, after + opens, closes + end


def _alter(chunk: dict[str, Any], place: str, *, total_first: bool) -> None:
    """Put another text, other counts and another note into a chunk that was read."""
    choice = chunk["choices"][0]
    holder = choice["delta"] if isinstance(choice.get("delta"), dict) else choice
    holder[place] = _OTHER_TEXT.decode()
    usage = chunk.get("usage")
    if isinstance(usage, dict):
        names = ("completion_tokens", "total_tokens")
        for name, count in zip(names[::-1] if total_first else names, _OTHER_COUNTS, strict=True):
            usage[name] = count
    if NOTE in chunk:
        chunk[NOTE]["token_ids"] = [_OTHER_ID]


def _altered(raw: list[bytes]) -> bytes:
    """The same as it is written."""
    begin, middle, between, after, end = raw
    text = begin + _OTHER_TEXT + middle
    if between:
        text += b"%d%b%d%b" % (_OTHER_COUNTS[0], between, _OTHER_COUNTS[1], after)
    return text + (b"%d%b" % (_OTHER_ID, end) if end else b"")


def _split(shaped: bytes, between: bytes) -> list[bytes] | None:
    """What the client gets, around the text and, where it gets them, around the counts."""
    begin, found, rest = shaped.partition(_OTHER_TEXT)
    if not found or _OTHER_TEXT in rest:
        return None
    if not between:
        return [begin, rest]
    first, second = (b"%d" % count for count in _OTHER_COUNTS)
    middle, shown, end = rest.partition(first + between + second)
    if any(count in part for count in (first, second) for part in (begin, middle, end)):
        return None
    return [begin, middle, end] if shown else [begin, middle]


def _is_sound(text: bytes) -> bool:
    """Whether it is the inside of a JSON string, as our encoder would write it."""
    try:
        known = text.decode()
    except UnicodeDecodeError:
        return False
    if known.isprintable() and '"' not in known and "\\" not in known:
        return True
    return _SOUND_TEXT.fullmatch(text) is not None


def _is_number(text: bytes) -> bool:
    """Whether JSON has such a number, neither negative nor of too many digits."""
    return text.isdigit() and len(text) <= MAX_DIGITS and (text >= b"1" or text == b"0")


def _are_ids(text: bytes) -> bool:
    """Whether it is the inside of a list of such numbers."""
    return _is_number(text) or _SOUND_IDS.fullmatch(text) is not None
