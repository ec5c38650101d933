"""Text to token ids and back: the tokenizer, incremental detokenisation, stop strings.

Reads tokenizer files; must not import torch and renders no chat templates.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Tokenizer as RustTokenizer

from cloudlm.core.errors import BrokenModel
from cloudlm.engine.architectures.config import read_json

MAX_TEMPLATE_BYTES = 2**20
_SHORT = 4096  # characters or tokens that take less than a millisecond or two
_LONGEST_CHARACTER = 8  # tokens that a decoder without byte tokens may need for one character


class Detokenizer(Protocol):
    """The text of a growing list of tokens. What was emitted never changes."""

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that became certain with these tokens; incomplete characters wait."""
        ...

    def flush(self) -> str:
        """The rest when no more tokens come; an incomplete character becomes U+FFFD."""
        ...


class Tokenizer:
    """The tokenizer of a model folder: ``tokenizer.json`` and what ``tokenizer_config.json``,
    ``generation_config.json``, ``config.json`` and ``chat_template.jinja`` say about it.

    ``eos_token_ids`` are all ids that end an answer; ``bos_token_id`` and ``chat_template`` (text,
    not rendered here) are None if there are none; ``special_tokens`` are the names that templates
    use (``bos_token`` and the like), ``control_tokens`` the texts that are read as special tokens
    wherever they stand. Raises BrokenModel naming the file and the fault.
    """

    def __init__(self, folder: Path) -> None:
        self._rust, decoder = _read_tokenizer(folder / "tokenizer.json")
        self._bytes_of = _byte_reader(decoder)
        config = _optional_json(folder / "tokenizer_config.json")
        self.special_tokens = _special_tokens(config)
        self.chat_template = _chat_template(folder, config)
        self.vocab_size = self._rust.get_vocab_size(with_added_tokens=True)
        self.bos_token_id = self._id_of("bos_token")
        self.eos_token_ids = self._ends(folder)
        added = self._rust.get_added_tokens_decoder()
        special = {id_: token.content for id_, token in added.items() if token.special}
        self._special = frozenset(special)
        self.special_token_ids = self._special
        self.control_tokens = tuple(text for text in special.values() if text)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of ``text``; special tokens written out in it are recognised."""
        if len(text) <= _SHORT:
            return list(self._rust.encode(text, add_special_tokens=add_special_tokens).ids)
        # Of the library's calls only the batched ones let other threads run meanwhile.
        batch = self._rust.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return list(batch[0].ids)

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of all tokens together."""
        ids = list(token_ids)
        if len(ids) <= _SHORT:
            return str(self._rust.decode(ids, skip_special_tokens=skip_special_tokens))
        return str(self._rust.decode_batch([ids], skip_special_tokens=skip_special_tokens)[0])

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that this token stands for; b"" for an id without a token."""
        token = self._rust.id_to_token(token_id)
        if token is None:
            return b""
        if self._bytes_of is None:
            return self.decode([token_id], skip_special_tokens=False).encode()
        return self._bytes_of(token)

    def token_text(self, token_id: int) -> str:
        """The token as text; bytes that are no whole character show as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def vocabulary(self, size: int) -> list[bytes] | None:
        """The bytes that each of ``size`` token ids stands for, b"" for an id without a token; None
        for a tokenizer whose tokens do not stand for bytes. Takes a second for a large one."""
        if self._bytes_of is None:
            return None
        return [self.token_bytes(token_id) for token_id in range(size)]

    def special_token_id(self, text: str) -> int | None:
        """The id of the special token that is written like this, None if there is none."""
        token_id = self._rust.token_to_id(text)
        return token_id if token_id in self._special else None

    def detokenizer(
        self, prompt_ids: Iterable[int], shown: frozenset[int] = frozenset()
    ) -> Detokenizer:
        """A detokenizer for what follows the prompt; special tokens have no text, but those that
        are ``shown``."""
        prompt = list(prompt_ids)
        if self._bytes_of is None:
            marks = {token_id: self.token_text(token_id) for token_id in shown}
            return _WindowDetokenizer(self.decode, prompt[-_LONGEST_CHARACTER:], marks)
        at_start = all(token_id in self._special for token_id in prompt)
        bytes_of: Callable[[int], bytes] = self.visible_bytes
        if shown:
            bytes_of = partial(self.visible_bytes, shown=shown)
        decoder = _ByteDetokenizer(bytes_of, self._strips_space() and at_start)
        decoder.push(prompt[-_LONGEST_CHARACTER:])  # the prompt may end inside a character
        return decoder

    def visible_bytes(self, token_id: int, shown: frozenset[int] = frozenset()) -> bytes:
        """The bytes that this token adds to an answer's text: b"" for a special token that is not
        ``shown``."""
        hidden = token_id in self._special and token_id not in shown
        return b"" if hidden else self.token_bytes(token_id)

    def _strips_space(self) -> bool:
        return self._bytes_of is _sentencepiece_bytes

    def _id_of(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self._rust.token_to_id(token)

    def _ends(self, folder: Path) -> tuple[int, ...]:
        ends = {self._id_of("eos_token")}
        for name in ("generation_config.json", "config.json"):
            found = _optional_json(folder / name).get("eos_token_id")
            listed = found if isinstance(found, list) else [found]
            if not all(one is None or type(one) is int for one in listed):
                raise BrokenModel(f"{name}: eos_token_id is not a token id or a list of them")
            ends.update(listed)
        return tuple(sorted(one for one in ends if one is not None and one >= 0))


class StopChecker:
    """Finds the first stop string in a growing text and holds back what may be the start of one.

    The stop string that is complete first wins; of those complete at the same character, the
    longest. What is emitted altogether does not depend on how the text was cut into pieces.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stops = tuple(one for one in stop if one)
        self._held = ""
        self._matched = False

    def push(self, text: str) -> tuple[str, str | None]:
        """The text that may be shown, and the stop string that ended it. After that: nothing."""
        if self._matched:
            return "", None
        if not self._stops:
            return text, None
        known = self._held + text
        found = [(at + len(one), at, one) for one in self._stops if (at := known.find(one)) >= 0]
        if found:
            _, begin, match = min(found)
            self._held, self._matched = "", True
            return known[:begin], match
        safe = len(known) - max(_overlap(known, one) for one in self._stops)
        self._held = known[safe:]
        return known[:safe], None

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop``, but not all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


class _ByteDetokenizer:
    """For tokens that stand for bytes: UTF-8 is decoded as the bytes come."""

    def __init__(self, bytes_of: Callable[[int], bytes], strip_space: bool) -> None:
        self._bytes_of = bytes_of
        self._strip_space = strip_space
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Iterable[int]) -> str:
        text = self._decoder.decode(b"".join(map(self._bytes_of, token_ids)))
        if self._strip_space and text:
            self._strip_space = False
            return text.removeprefix(" ")
        return text

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _WindowDetokenizer:
    """For any other decoder: the text of a short window of tokens, less that of its known part."""

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        context: list[int],
        marks: Mapping[int, str] | None = None,
    ) -> None:
        self._decode = decode
        self._marks = marks or {}
        self._context = context
        self._pending: list[int] = []

    def push(self, token_ids: Iterable[int]) -> str:
        return "".join(self._push(token_id) for token_id in token_ids)

    def flush(self) -> str:
        known = self._decode(self._context)
        text = self._decode(self._context + self._pending)[len(known) :]
        self._context, self._pending = (self._context + self._pending)[-_LONGEST_CHARACTER:], []
        return text

    def _push(self, token_id: int) -> str:
        if token_id in self._marks:
            return self.flush() + self._marks[token_id]
        self._pending.append(token_id)
        incomplete = self._decode(self._context + self._pending).endswith("�")
        if incomplete and len(self._pending) < _LONGEST_CHARACTER:
            return ""
        return self.flush()


def _read_tokenizer(path: Path) -> tuple[RustTokenizer, Any]:
    """The library's tokenizer, and what the file says about its decoder."""
    decoder = read_json(path).get("decoder")
    try:
        tokenizer = RustTokenizer.from_file(str(path))
    except BaseException as error:
        # The library's own faults (PanicException) are no Exceptions; a real interrupt is not ours.
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise BrokenModel(f"{path.name} is not a tokenizer: {str(error)[:200]}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer, decoder


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """``bos_token`` and the like; older files hold objects with the text in ``content``."""
    tokens: dict[str, str] = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if text is not None and not isinstance(text, str):
            raise BrokenModel(f"tokenizer_config.json: {name} is {str(text)[:80]!r}, not a text")
        if text is not None:
            tokens[name] = text
    return tokens


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            if file.stat().st_size > MAX_TEMPLATE_BYTES:
                raise BrokenModel(f"{file.name} is larger than {MAX_TEMPLATE_BYTES} bytes")
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BrokenModel(f"{file.name} cannot be read: {error}") from None
    template = config.get("chat_template")
    if isinstance(template, list):  # several named ones: the one named "default" counts
        named = [one for one in template if isinstance(one, dict)]
        template = next(
            (one.get("template") for one in named if one.get("name") == "default"), None
        )
    if template is not None and not isinstance(template, str):
        raise BrokenModel("tokenizer_config.json: chat_template is not a text")
    return template


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-ins of byte-level BPE, as GPT-2 defined them, and their bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update((chr(256 + place), byte) for place, byte in enumerate(others))
    return alphabet


_ALPHABET = _byte_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes(_ALPHABET[character] for character in token)
    except KeyError:  # an added token, written as it is
        return token.encode()


def _sentencepiece_bytes(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes.fromhex(token[3:5])
        except ValueError:
            pass
    return token.replace("▁", " ").encode()


def _unstripped_bytes(token: str) -> bytes:
    """As ``_sentencepiece_bytes``, for decoders that keep an answer's first space."""
    return _sentencepiece_bytes(token)


def _byte_reader(decoder: Any) -> Callable[[str], bytes] | None:
    """How tokens stand for bytes, by the ``decoder`` of tokenizer.json; None if they do not."""
    if not isinstance(decoder, dict):
        return None
    steps = decoder.get("decoders") if decoder.get("type") == "Sequence" else [decoder]
    kinds = [step.get("type") for step in steps or [] if isinstance(step, dict)]
    if kinds == ["ByteLevel"]:
        return _byte_level_bytes
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"]:
        replace, *rest = steps or []
        if replace.get("pattern") != {"String": "▁"} or replace.get("content") != " ":
            return None
        if len(rest) == 2:
            return _unstripped_bytes
        strip = rest[2]
        wanted = ("Strip", " ", 1, 0)
        if len(rest) == 3 and tuple(map(strip.get, ("type", "content", "start", "stop"))) == wanted:
            return _sentencepiece_bytes
    return None
