"""GGUF files on their way into the registry, and the tokenizers that come out of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cloudlm.core.errors import BrokenModel, NotFound, UnsafeModel, UnsupportedModel
from cloudlm.registry.gguf.folder import write_model_folder
from cloudlm.registry.hub import parse_hub_address
from cloudlm.registry.importer import import_address, name_from_address
from cloudlm.registry.registry import Registry

pytest.importorskip("gguf")
TEXTS = (
    "Hello world, it's 2026!  Two  spaces\n\n\tand tabs",
    "naïve Ünïcode 東京 🎉", "I'LL don't 12345",
    " leading", "", "<|end|>x<|end|>", "MixedCase-word_s/paths.py", "é vs e\u0301",
)  # fmt: skip


@pytest.fixture
def small(tmp_path: Path) -> Any:
    """Writes a tiny Llama with a tokenizer as a GGUF file."""
    import transformers
    from gguf_models import write_gguf

    def write(tokenizer: dict[str, Any] | None = None, name: str = "Tiny-Q8_0.gguf") -> Path:
        import gguf

        sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
        vocabulary = 400 if tokenizer is None else len(tokenizer["tokens"])
        config = transformers.LlamaConfig(
            vocab_size=vocabulary, num_attention_heads=2, max_position_embeddings=64, **sizes
        )
        model = transformers.AutoModelForCausalLM.from_config(config)
        model.config.architectures = ["LlamaForCausalLM"]
        kind = gguf.GGMLQuantizationType.Q8_0
        return write_gguf(model, tmp_path / name, kind, tokenizer)

    return write


def test_a_file_becomes_a_version_that_says_what_it_is(small: Any, registry: Registry) -> None:
    manifest = import_address(registry, str(small()))
    assert manifest.name == "tiny-q8_0"
    assert (manifest.weights_format, manifest.quantisation) == ("gguf", "gguf Q8_0")
    assert (manifest.precision, manifest.architecture) == ("int8", "LlamaForCausalLM")
    assert {"model.gguf", "config.json", "tokenizer.json"} <= {one.path for one in manifest.files}
    folder = registry.fetch(manifest.ref)
    assert (folder / "model.gguf").is_file()
    assert not list((registry.cache_dir / "incoming").iterdir())


def test_what_lies_beside_it_counts_more(small: Any, registry: Registry, tmp_path: Path) -> None:
    path = small()
    (tmp_path / "only").mkdir()
    path.rename(tmp_path / "only" / path.name)
    own = {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}
    (tmp_path / "only" / "tokenizer.json").write_text(json.dumps(own))
    (tmp_path / "only" / "LICENSE").write_text("MIT License")
    manifest = import_address(registry, str(tmp_path / "only"))
    assert manifest.licence == "mit"
    stored = json.loads((registry.fetch(manifest.ref) / "tokenizer.json").read_text())
    assert stored == own


def test_several_files_are_not_guessed_at(small: Any, registry: Registry, tmp_path: Path) -> None:
    small(name="a.gguf"), small(name="b.gguf")
    with pytest.raises(BrokenModel, match=r"2 GGUF files \(a\.gguf, b\.gguf\)"):
        import_address(registry, str(tmp_path))
    assert import_address(registry, str(tmp_path / "a.gguf")).name == "a"


def test_code_beside_it_is_refused(small: Any, registry: Registry, tmp_path: Path) -> None:
    small()
    (tmp_path / "modeling.py").write_text("")
    with pytest.raises(UnsafeModel, match=r"modeling\.py"):
        import_address(registry, str(tmp_path))
    with pytest.raises(NotFound):
        import_address(registry, str(tmp_path / "absent.gguf"))


def test_an_unknown_way_to_cut_text_is_named(small: Any, registry: Registry) -> None:
    from gguf_models import plain_tokenizer

    path = small({**plain_tokenizer(300), "pre": "martian"})
    with pytest.raises(UnsupportedModel, match=r"martian.*tokenizer\.json beside"):
        import_address(registry, str(path))


def test_a_file_of_the_hub_has_an_address() -> None:
    found = parse_hub_address("hf://org/name/x-Q4_0.gguf@main")
    assert (found.repo, found.file, found.revision) == ("org/name", "x-Q4_0.gguf", "main")
    assert str(found) == "hf://org/name/x-Q4_0.gguf@main"
    assert name_from_address(str(found)) == "x-q4_0"


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "gpt-2", "smollm", "tekken", "gpt-4o"])
def test_a_byte_level_tokenizer_cuts_as_its_original(pre: str, small: Any, tmp_path: Path) -> None:
    """The original is trained with the pre-tokenizer as its makers publish it."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    contraction = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    rest = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    words = contraction + r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
    cased = (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+X|"
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*X|"
    )
    slashed = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    patterns = {
        "llama-bpe": words + r"\p{N}{1,3}" + rest,
        "qwen2": words + r"\p{N}" + rest,
        "tekken": cased.replace("X", "") + r"\p{N}" + slashed,
        "gpt-4o": cased.replace("X", contraction + "?") + r"\p{N}{1,3}" + slashed,
    }
    tokenizer = Tokenizer(models.BPE())
    if pre in patterns:
        cut = pre_tokenizers.Split(Regex(patterns[pre]), "isolated")
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, level])
    else:
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
        digits = [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, plain])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*TEXTS] * 20, trainer)
    body = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(body["vocab"], key=body["vocab"].get)
    types = [3 if token in ("<|begin|>", "<|end|>") else 1 for token in tokens]
    merges = [" ".join(pair) for pair in body["merges"]]
    found = derived(
        small(
            {
                "model": "gpt2",
                "pre": pre,
                "tokens": tokens,
                "types": types,
                "merges": merges,
                "bos": 0,
                "eos": 1,
                "add_bos": True,
            }
        ),
        tmp_path,
    )
    for text in TEXTS:
        if pre == "qwen2" and "\u0301" in text:
            continue  # brought into composed form, as Qwen's own does
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert found.encode(text) == ids
        assert found.decode(ids) == tokenizer.decode(ids)
    assert found.encode("a", add_special_tokens=True)[0] == 0
    assert found.eos_token_ids == (1,)


@pytest.mark.parametrize("spaced", [True, False])
def test_a_sentencepiece_tokenizer_cuts_as_its_original(
    spaced: bool, small: Any, tmp_path: Path
) -> None:
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    original = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    blanks = [normalizers.Prepend("▁")] if spaced else []
    original.normalizer = normalizers.Sequence([*blanks, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if spaced else []
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    original.decoder = decoders.Sequence([*back, *strip])
    trainer = trainers.BpeTrainer(vocab_size=380, special_tokens=special, show_progress=False)
    original.train_from_iterator([*TEXTS[:3], *TEXTS[6:]] * 20, trainer)
    body = json.loads(original.to_str())["model"]
    tokens = sorted(body["vocab"], key=body["vocab"].get)
    # SentencePiece scores a union by its rank, and has no other ways to the same union.
    rank = {"".join(pair): -float(number) for number, pair in enumerate(body["merges"], 1)}
    scores = [rank.get(token, -1e6) for token in tokens]
    types = [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)]
    found = derived(
        small(
            {
                "model": "llama",
                "tokens": tokens,
                "types": types,
                "scores": scores,
                "unk": 0,
                "bos": 1,
                "eos": 2,
                "add_space_prefix": spaced,
            }
        ),
        tmp_path,
    )
    for text in ("Hello world", "it's 2026! 東京 🎉", " two  spaces", "MixedCase-word_s/paths.py"):
        ids = original.encode(text, add_special_tokens=False).ids
        assert found.decode(ids) == text
        assert found.encode(text) == ids
    assert found.encode("a", add_special_tokens=True)[0] == 1


def derived(path: Path, tmp_path: Path) -> Any:
    from cloudlm.engine.tokens import Tokenizer

    folder = tmp_path / "derived"
    folder.mkdir()
    write_model_folder(path, folder, {})
    return Tokenizer(folder)
