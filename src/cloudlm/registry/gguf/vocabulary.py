"""From a GGUF file's vocabulary to the ``tokenizer.json`` of the Tokenizers library, and the
``tokenizer_config.json`` and ``generation_config.json`` beside it.

Two kinds: byte-level BPE (``gpt2``), whose pre-tokenizer is known by name only, and SentencePiece's
BPE (``llama``), whose merges follow from the scores of its pieces. Source of the latter: Kudo and
Richardson, "SentencePiece", 2018: the neighbours whose union scores highest are joined first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cloudlm.core.errors import BrokenModel, UnsupportedModel
from cloudlm.registry.gguf.header import GgufHeader
from cloudlm.registry.gguf.settings import Settings

_MAX_TOKENS = 1 << 20
_MAX_CHARACTERS = 1 << 24  # of all pieces together: the work of finding merges grows with them
_MAX_PIECE = 1 << 10
_UNKNOWN, _CONTROL, _USER = 2, 3, 4
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _REST
_QWEN2 = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _REST
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = r"[^\r\n\p{L}\p{N}]?"
_SLASHED_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = f"{_CASED}{_UPPER}*{_LOWER}+|{_CASED}{_UPPER}+{_LOWER}*|" + r"\p{N}|" + _SLASHED_REST
_GPT4O = (
    f"{_CASED}{_UPPER}*{_LOWER}+{_CONTRACTION}?|{_CASED}{_UPPER}+{_LOWER}*{_CONTRACTION}?|"
    + r"\p{N}{1,3}|"
    + _SLASHED_REST
)


@dataclass(frozen=True, slots=True)
class _Split:
    """How a byte-level vocabulary cuts text before it merges. ``digits``: each for itself first;
    ``whole``: a piece that is a token needs no merges; ``bos``: a begin token is usual;
    ``composed``: text is brought into Unicode's composed form."""

    pattern: str
    digits: bool = False
    whole: bool = False
    bos: bool = False
    composed: bool = False


_LLAMA3_SPLIT = _Split(_LLAMA3, whole=True, bos=True)
_SPLITS = {
    "gpt-2": _Split(_GPT2),
    "phi-2": _Split(_GPT2),
    "olmo": _Split(_GPT2),
    "smollm": _Split(_GPT2, digits=True),
    "llama-bpe": _LLAMA3_SPLIT,
    "llama3": _LLAMA3_SPLIT,
    "llama-v3": _LLAMA3_SPLIT,
    "falcon3": _LLAMA3_SPLIT,
    "dbrx": _Split(_LLAMA3),
    "smaug-bpe": _Split(_LLAMA3),
    "qwen2": _Split(_QWEN2, composed=True),
    "deepseek-r1-qwen": _Split(_QWEN2, composed=True),
    "tekken": _Split(_TEKKEN, whole=True, bos=True),
    "gpt-4o": _Split(_GPT4O),
}


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """The tokens by number and by text, and what each is for (llama.cpp's token types)."""

    tokens: list[str]
    ids: dict[str, int]
    types: list[int]


def tokenizer_of(header: GgufHeader, rows: int) -> dict[str, dict[str, Any]]:
    """The tokenizer's files by name. ``rows``: how many tokens the network knows. Raises
    BrokenModel, UnsupportedModel."""
    settings = Settings(header, "tokenizer.")
    kind = settings.text("ggml.model")
    if kind not in ("gpt2", "llama"):
        raise UnsupportedModel(
            f"{header.name}: tokenizer.ggml.model is {kind[:40]!r}, expected gpt2 or llama; put "
            "the model's tokenizer.json beside the file and import the folder"
        )
    vocabulary = _vocabulary(header, settings, rows)
    body, bos_usual = (
        _byte_level(header, settings, vocabulary)
        if kind == "gpt2"
        else (_sentencepiece(header, settings, vocabulary), True)
    )
    bos = _special(settings, vocabulary, "bos")
    if bos is not None and settings.flag("ggml.add_bos_token", bos_usual):
        body["post_processor"] = _beginning_with(bos, vocabulary)
    return {
        "tokenizer.json": body,
        "tokenizer_config.json": _named(settings, vocabulary),
        "generation_config.json": _ends(settings, vocabulary),
    }


def _vocabulary(header: GgufHeader, settings: Settings, rows: int) -> _Vocabulary:
    tokens = settings.texts("ggml.tokens")
    if not tokens or len(tokens) > min(rows, _MAX_TOKENS):
        raise settings.fault("ggml.tokens", f"1 to {min(rows, _MAX_TOKENS)} texts")
    if max(map(len, tokens)) > _MAX_PIECE or sum(map(len, tokens)) > _MAX_CHARACTERS:
        raise settings.fault("ggml.tokens", f"texts of at most {_MAX_PIECE} characters")
    ids = {token: number for number, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        twice = next(token for number, token in enumerate(tokens) if ids[token] != number)
        raise BrokenModel(f"{header.name}: token {twice[:80]!r} occurs twice in the vocabulary")
    types = [1] * len(tokens)
    if "ggml.token_type" in settings:
        types = [int(one) for one in settings.numbers("ggml.token_type", len(tokens))]
    return _Vocabulary(tokens, ids, types)


def _frame(vocabulary: _Vocabulary) -> dict[str, Any]:
    """What both kinds have; control tokens are special, those of a user are only never cut."""
    added = [
        {
            "id": number,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind != _USER,
        }
        for number, (token, kind) in enumerate(
            zip(vocabulary.tokens, vocabulary.types, strict=True)
        )
        if kind in (_UNKNOWN, _CONTROL, _USER) and token
    ]
    frame = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
    return {**frame, "normalizer": None, "pre_tokenizer": None, "post_processor": None}


def _byte_level(
    header: GgufHeader, settings: Settings, vocabulary: _Vocabulary
) -> tuple[dict[str, Any], bool]:
    """Byte-level BPE, and whether a begin token is usual."""
    name = settings.text("ggml.pre", "default")
    split = _SPLITS.get(name)
    if split is None:
        raise UnsupportedModel(
            f"{header.name}: tokenizer.ggml.pre is {name[:40]!r}, whose way to cut text is not "
            f"known here; known: {', '.join(_SPLITS)}. Put the model's tokenizer.json beside the "
            "file and import the folder"
        )
    body = _frame(vocabulary)
    cut = {"type": "Split", "pattern": {"Regex": split.pattern}}
    steps: list[dict[str, Any]] = [{**cut, "behavior": "Isolated", "invert": False}]
    if split.digits:
        steps.insert(0, {"type": "Digits", "individual_digits": True})
    level = {"add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    steps.append({"type": "ByteLevel", **level})
    body["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    body["normalizer"] = {"type": "NFC"} if split.composed else None
    body["decoder"] = {"type": "ByteLevel", **level}
    merges = _written_merges(header, settings, vocabulary)
    body["model"] = _bpe(vocabulary, merges, ignore_merges=split.whole)
    return body, split.bos


def _written_merges(
    header: GgufHeader, settings: Settings, vocabulary: _Vocabulary
) -> list[list[str]]:
    merges = []
    for merge in settings.texts("ggml.merges"):
        left, blank, right = merge.partition(" ")
        known = all(one in vocabulary.ids for one in (left, right, left + right))
        if not blank or not left or not right or not known:
            raise BrokenModel(
                f"{header.name}: tokenizer.ggml.merges has {merge[:80]!r}, expected two tokens "
                "whose union is one"
            )
        merges.append([left, right])
    return merges


def _sentencepiece(
    header: GgufHeader, settings: Settings, vocabulary: _Vocabulary
) -> dict[str, Any]:
    unknown = next((n for n, kind in enumerate(vocabulary.types) if kind == _UNKNOWN), None)
    if unknown is None:
        raise BrokenModel(f"{header.name}: the vocabulary has no unknown token")
    spaced = settings.flag("ggml.add_space_prefix", True)
    scores = settings.numbers("ggml.scores", len(vocabulary.tokens))
    body = _frame(vocabulary)
    blanks: dict[str, Any] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend = [{"type": "Prepend", "prepend": "▁"}] if spaced else []
    body["normalizer"] = {"type": "Sequence", "normalizers": [*prepend, blanks]}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if spaced else []
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    steps = [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]
    body["decoder"] = {"type": "Sequence", "decoders": steps}
    body["model"] = _bpe(
        vocabulary,
        _scored_merges(vocabulary, scores),
        unk_token=vocabulary.tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    return body


def _scored_merges(vocabulary: _Vocabulary, scores: list[float]) -> list[list[str]]:
    """Every pair of pieces whose union is a piece, the best unions first."""
    ids = vocabulary.ids
    found: list[tuple[float, int, int, str, str]] = []
    for token, score in zip(vocabulary.tokens, scores, strict=True):
        for cut in range(1, len(token)):
            left, right = ids.get(token[:cut]), ids.get(token[cut:])
            if left is not None and right is not None:
                found.append((-score, left, right, token[:cut], token[cut:]))
    return [[left, right] for *_, left, right in sorted(found)]


def _bpe(vocabulary: _Vocabulary, merges: list[list[str]], **fields: Any) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        **fields,
        "vocab": vocabulary.ids,
        "merges": merges,
    }


def _beginning_with(bos: int, vocabulary: _Vocabulary) -> dict[str, Any]:
    text = vocabulary.tokens[bos]
    mark = {"SpecialToken": {"id": text, "type_id": 0}}
    parts = [{"Sequence": {"id": name, "type_id": place}} for place, name in enumerate("AB")]
    return {
        "type": "TemplateProcessing",
        "single": [mark, parts[0]],
        "pair": [mark, parts[0], mark, parts[1]],
        "special_tokens": {text: {"id": text, "ids": [bos], "tokens": [text]}},
    }


def _special(settings: Settings, vocabulary: _Vocabulary, name: str) -> int | None:
    """The number of a token with a purpose, None if the file names none."""
    key = f"ggml.{name}_token_id"
    if key not in settings:
        return None
    number = settings.integer(key, low=0, high=(1 << 32) - 1)
    return number if number < len(vocabulary.tokens) else None  # 2**32 - 1 also means none


def _named(settings: Settings, vocabulary: _Vocabulary) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for name, field in (
        ("bos", "bos_token"), ("eos", "eos_token"), ("padding", "pad_token"),
        ("unknown", "unk_token"),
    ):  # fmt: skip
        number = _special(settings, vocabulary, name)
        if number is not None:
            named[field] = vocabulary.tokens[number]
    if "chat_template" in settings:
        named["chat_template"] = settings.text("chat_template")
    return named


def _ends(settings: Settings, vocabulary: _Vocabulary) -> dict[str, Any]:
    """All tokens that end an answer."""
    numbers = {_special(settings, vocabulary, name) for name in ("eos", "eot", "eom")}
    ends = sorted(number for number in numbers if number is not None)
    return {"eos_token_id": ends} if ends else {}
