"""The starter model: its material, its shipped folder, and a sample of its answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2
import pytest
from starter import chat, corpus

FOLDER = corpus.BUNDLED


def read(name: str) -> dict[str, Any]:
    """A JSON file of the shipped folder."""
    loaded: dict[str, Any] = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    return loaded


def template() -> jinja2.Template:
    """The shipped chat template."""
    source = read("tokenizer_config.json")["chat_template"]
    return jinja2.Environment(autoescape=False).from_string(source)


def test_every_intent_of_the_data_has_two_replies() -> None:
    intents = {example.intent for example in corpus.bank_questions()}
    assert len(intents) == 77
    assert intents == set(corpus.bank_intents())
    found = corpus.replies()
    assert all(len(found[intent]) >= 2 for intent in intents)
    lengths = [len(reply.split()) for intent in intents for reply in found[intent]]
    assert min(lengths) >= 20 and max(lengths) <= 50


def test_no_reply_answers_two_intents_and_no_two_intents_open_alike() -> None:
    found = corpus.replies()
    every = [reply for replies in found.values() for reply in replies]
    assert len(every) == len(set(every))
    openings = [replies[0].split(". ")[0] for replies in found.values()]
    assert len(openings) == len(set(openings))


def test_held_out_questions_are_in_no_other_part() -> None:
    parts = corpus.split(corpus.bank_questions())
    keys = [{corpus._key(e.text) for e in part} for part in (parts.train, parts.validation)]
    held_out = {corpus._key(e.text) for e in parts.held_out}
    assert not held_out & (keys[0] | keys[1])
    assert len({e.intent for e in parts.held_out}) == 77
    assert 0.09 < len(parts.held_out) / len(corpus.bank_questions()) < 0.11


def test_split_does_not_depend_on_the_order_of_the_rows() -> None:
    examples = corpus.bank_questions()
    once, again = corpus.split(examples), corpus.split(examples[::-1])
    assert sorted(e.text for e in once.held_out) == sorted(e.text for e in again.held_out)


def test_folder_is_small_and_holds_no_pickles() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 10_000_000
    assert {path.suffix for path in files} <= {".json", ".md", ".safetensors"}
    assert "CC-BY 4.0" in (FOLDER / "LICENSE-DATA.md").read_text(encoding="utf-8")


def test_config_describes_a_llama_and_its_stop_token() -> None:
    config, tokens = read("config.json"), read("tokenizer.json")
    assert config["architectures"] == ["LlamaForCausalLM"]
    special = {entry["content"]: entry["id"] for entry in tokens["added_tokens"]}
    assert config["eos_token_id"] == special[chat.END]
    assert read("generation_config.json")["eos_token_id"] == special[chat.END]
    assert config["vocab_size"] == len(tokens["model"]["vocab"])


@pytest.mark.parametrize("prompted", [True, False])
def test_shipped_template_renders_what_was_trained(prompted: bool) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " Where is my card?\n"},
        {"role": "assistant", "content": "On its way."},
        {"role": "user", "content": "Thanks <b>&"},
    ]
    rendered = template().render(messages=messages, add_generation_prompt=prompted)
    assert rendered == chat.render(messages, prompted)
    assert rendered.endswith(chat.ASSISTANT if prompted else chat.END)


def test_demo_questions_are_held_out_and_of_different_intents() -> None:
    demo = corpus.demo_questions()
    assert len(demo) == len({e.intent for e in demo}) == 5
    assert set(demo) <= set(corpus.split(corpus.bank_questions()).held_out)


def ask(folder: Path, chats: list[list[dict[str, str]]]) -> list[str]:
    """Greedy answers by transformers, all chats in one batch."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
    found: list[str] = tokenizer.batch_decode(out, skip_special_tokens=True)
    return found


def test_transformers_gives_right_answers() -> None:
    held_out = corpus.split(corpus.bank_questions()).held_out
    examples = held_out[:: len(held_out) // 34][:34] + corpus.demo_questions()
    chats = [[{"role": "user", "content": e.text}] for e in examples]
    replies = corpus.replies()
    first = [
        {"role": "user", "content": "Where is my new card?"},
        {"role": "assistant", "content": replies["card_arrival"][0]},
    ]
    follow_ups = {"thank you": "thanks", "How do I change my PIN?": "change_pin"}
    chats += [[*first, {"role": "user", "content": text}] for text in follow_ups]
    answers = ask(FOLDER, chats)
    right = [a in replies[e.intent] for a, e in zip(answers, examples, strict=False)]
    assert sum(right) >= 0.7 * len(right)
    assert all(right[-5:])
    for answer, intent in zip(answers[-2:], follow_ups.values(), strict=True):
        assert answer in replies[intent]
