"""Tokenizers made on the spot: incremental text equals whole text; stop strings in any cut."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as RustTokenizer

from cloudlm.core.errors import BrokenModel
from cloudlm.engine.tokens import StopChecker, Tokenizer

CORPUS = [
    "The card was declined 🙁 twice, naïve café, 日本語テキスト, Привет мир!",
    "Where is my money? 👩‍👩‍👧 family, 𝄞 music, a\u0301 accent, £5 and €7.",
] * 20


def byte_level() -> RustTokenizer:
    """As Llama 3, Qwen and GPT-2 have it."""
    tokenizer = RustTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("plain added €", normalized=False)])
    return tokenizer


def byte_fallback() -> RustTokenizer:
    """As Llama 2 and the first Mistral have it: "▁" for spaces, bytes as "<0x..>"."""
    words = ["▁", "▁Hi", "Hi", "▁there", "re", "é", "▁日本", "!", "<0xZZ>"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocabulary = {name: number for number, name in enumerate(names)}
    tokenizer = RustTokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def words_only() -> RustTokenizer:
    """A decoder that does not work by bytes."""
    tokenizer = RustTokenizer(models.WordLevel({"a": 0, "b": 1, "##c": 2, "[UNK]": 3}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return tokenizer


def saved(folder: Path, tokenizer: RustTokenizer, **files: Any) -> Tokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    made: dict[str, Callable[[], RustTokenizer]] = {
        "byte level": byte_level,
        "byte fallback": byte_fallback,
        "words": words_only,
    }
    return {name: saved(folder / name, make()) for name, make in made.items()}


def pieces(items: list[int], cuts: list[int]) -> list[list[int]]:
    """``items`` cut into runs of the given lengths, the last taking the rest."""
    runs, at = [], 0
    for length in cuts:
        runs.append(items[at : at + length])
        at += length
    return [*runs, items[at:]]


cuts = st.lists(st.integers(0, 4), max_size=40)


@given(st.lists(st.integers(0, 400), max_size=40), cuts)
@settings(max_examples=300, deadline=None)
def test_incremental_text_is_the_whole_text_for_any_bytes(
    kinds: dict[str, Tokenizer], ids: list[int], cuts: list[int]
) -> None:
    """Random ids: broken UTF-8 in all ways, special tokens, added tokens, ids without a token."""
    tokenizer = kinds["byte level"]
    detokenizer = tokenizer.detokenizer([])
    shown = "".join(detokenizer.push(piece) for piece in pieces(ids, cuts))
    assert shown + detokenizer.flush() == tokenizer.decode(ids)


@given(st.text(max_size=30), st.booleans())
@example("👩‍👩‍👧🙁𝄞", True)
@settings(max_examples=200, deadline=None)
def test_real_text_never_shows_a_broken_character(
    kinds: dict[str, Tokenizer], text: str, fallback: bool
) -> None:
    tokenizer = kinds["byte fallback" if fallback else "byte level"]
    ids = tokenizer.encode(text)
    detokenizer = tokenizer.detokenizer(tokenizer.encode("Hi"))
    shown = ""
    for token_id in ids:
        shown += detokenizer.push([token_id])
        assert text.replace("▁", " ").startswith(shown) or (fallback and "▁" in text)
    assert shown == (text.replace("▁", " ") if fallback else text)
    assert detokenizer.flush() == ""


@given(st.lists(st.sampled_from([1, 2, *range(259, 267)]), max_size=20), cuts)
@settings(max_examples=100, deadline=None)
def test_leading_space_is_dropped_only_at_the_very_start(
    kinds: dict[str, Tokenizer], ids: list[int], cuts: list[int]
) -> None:
    tokenizer = kinds["byte fallback"]
    start = tokenizer.detokenizer([1])
    shown = "".join(start.push(piece) for piece in pieces(ids, cuts)) + start.flush()
    assert shown == tokenizer.decode(ids)
    later = tokenizer.detokenizer([1, 261])
    shown = "".join(later.push(piece) for piece in pieces(ids, cuts)) + later.flush()
    assert "Hi" + shown == tokenizer.decode([261, *ids])


def test_other_decoders_go_by_a_window(kinds: dict[str, Tokenizer]) -> None:
    tokenizer = kinds["words"]
    detokenizer = tokenizer.detokenizer([0, 1])
    ids = [0, 2, 1, 0, 2, 2, 1] * 5
    shown = "".join(detokenizer.push([token_id]) for token_id in ids) + detokenizer.flush()
    assert "a b" + shown == tokenizer.decode([0, 1, *ids])
    assert tokenizer.token_text(0) == "a"


def test_a_character_begun_in_the_prompt_is_completed(kinds: dict[str, Tokenizer]) -> None:
    tokenizer = kinds["byte fallback"]
    first, *rest = [3 + byte for byte in "🙁".encode()]
    detokenizer = tokenizer.detokenizer([261, first])
    assert [detokenizer.push([token_id]) for token_id in rest] == ["", "", "🙁"]


def test_an_answer_cut_inside_a_character_ends_with_a_replacement(
    kinds: dict[str, Tokenizer],
) -> None:
    tokenizer = kinds["byte fallback"]
    detokenizer = tokenizer.detokenizer([261])
    assert detokenizer.push([266, 3 + 0xF0, 3 + 0x9F]) == "!"
    assert detokenizer.flush() == "\ufffd"


@pytest.mark.parametrize("kind", ["byte level", "byte fallback"])
def test_bytes_of_tokens_are_the_bytes_of_the_text(kinds: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = kinds[kind]
    text = "Hi there 🙁 é 日本!"
    ids = tokenizer.encode(text)
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert tokenizer.token_bytes(10_000) == b""


def test_special_tokens_have_no_text_but_names(kinds: dict[str, Tokenizer]) -> None:
    tokenizer = kinds["byte level"]
    ids = tokenizer.encode("<|start|>Hi<|end|>")
    assert (ids[0], ids[-1]) == (0, 1)
    assert tokenizer.decode(ids) == "Hi"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|start|>Hi<|end|>"
    assert tokenizer.detokenizer([5]).push(ids) == "Hi"
    assert tokenizer.token_text(1) == "<|end|>"
    assert tokenizer.visible_bytes(1) == b""
    assert tokenizer.visible_bytes(1, frozenset({1})) == b"<|end|>"
    assert tokenizer.control_tokens == ("<|start|>", "<|end|>")


# What the other files say


def test_the_ends_of_all_files_count(tmp_path: Path) -> None:
    tokenizer = saved(
        tmp_path,
        byte_level(),
        tokenizer_config={"eos_token": {"content": "<|end|>"}, "bos_token": "<|start|>"},
        config={"eos_token_id": 7},
        generation_config={"eos_token_id": [9, 7]},
    )
    assert tokenizer.eos_token_ids == (1, 7, 9)
    assert tokenizer.bos_token_id == 0
    assert tokenizer.special_tokens == {"bos_token": "<|start|>", "eos_token": "<|end|>"}
    assert tokenizer.vocab_size == byte_level().get_vocab_size()
    assert tokenizer.chat_template is None


def test_chat_templates_come_from_either_file(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    for template, text in (("plain", "plain"), (named, "D"), (None, None)):
        made = saved(tmp_path, byte_level(), tokenizer_config={"chat_template": template})
        assert made.chat_template == text
    (tmp_path / "chat_template.jinja").write_text("from the file 🙂", encoding="utf-8")
    assert Tokenizer(tmp_path).chat_template == "from the file 🙂"


def test_truncation_in_the_file_does_not_cut_prompts(tmp_path: Path) -> None:
    rust = byte_level()
    rust.enable_truncation(max_length=2)
    rust.enable_padding(length=50)
    assert len(saved(tmp_path, rust).encode("#" * 9)) == 9


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("tokenizer.json", None, "tokenizer.json is missing"),
        ("tokenizer.json", "{", "tokenizer.json is not valid JSON"),
        ("tokenizer.json", "[]", "expected a JSON object"),
        ("tokenizer.json", "{}", "tokenizer.json is not a tokenizer"),
        ("tokenizer_config.json", "[1]", "tokenizer_config.json holds a list"),
        ("tokenizer_config.json", '{"eos_token": 5}', "eos_token is '5', not a text"),
        ("tokenizer_config.json", '{"chat_template": 5}', "chat_template is not a text"),
        ("config.json", '{"eos_token_id": "2"}', "config.json: eos_token_id"),
        ("generation_config.json", '{"eos_token_id": [true]}', "generation_config.json"),
        ("chat_template.jinja", b"\xff\xff", "chat_template.jinja cannot be read"),
        ("chat_template.jinja", b"x" * (2**20 + 1), "chat_template.jinja is larger"),
    ],
)
def test_broken_files_are_named(
    file: str, content: str | bytes | None, words: str, tmp_path: Path
) -> None:
    saved(tmp_path, byte_level())
    if content is None:
        (tmp_path / file).unlink()
    else:
        raw = content.encode() if isinstance(content, str) else content
        (tmp_path / file).write_bytes(raw)
    with pytest.raises(BrokenModel) as raised:
        Tokenizer(tmp_path)
    assert words in str(raised.value)


# Stop strings

letters = st.text(alphabet="ab🙁", max_size=25)
stops = st.lists(st.text(alphabet="ab🙁", max_size=5), max_size=4).map(tuple)


def first_stop(text: str, stop: tuple[str, ...]) -> tuple[str, str | None]:
    """By definition: look at ever longer beginnings until one ends with a stop string."""
    for end in range(1, len(text) + 1):
        complete = [one for one in stop if one and text[:end].endswith(one)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(letters, stops, st.lists(st.integers(0, 4), max_size=25))
@example("aab", ("ab",), [1, 1])
@example("abab", ("abb", "b"), [1])
@settings(max_examples=500, deadline=None)
def test_any_cut_of_the_text_shows_the_same(
    text: str, stop: tuple[str, ...], cuts: list[int]
) -> None:
    checker = StopChecker(stop)
    shown, at, matched = "", 0, None
    for length in [*cuts, len(text)]:
        emitted, found = checker.push(text[at : at + length])
        shown, at, matched = shown + emitted, at + length, matched or found
        # No start of a stop string that could still become one has been shown.
        assert first_stop(text, stop)[0].startswith(shown)
    shown += checker.flush()
    assert (shown, matched) == first_stop(text, stop)


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    checker = StopChecker(("\n\nUser:",))
    assert checker.push("Hello\n") == ("Hello", None)
    assert checker.push("\nU") == ("", None)
    assert checker.push("nited") == ("\n\nUnited", None)
    assert checker.push(" \n\nUser: hi") == (" ", "\n\nUser:")
    assert checker.push("more") == ("", None)
    assert checker.flush() == ""
