"""The model card of the shipped folder, filled with what was measured."""

from __future__ import annotations

from typing import Any

from starter.model import Shape

FRONT = """\
---
language: en
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [llama, customer-service, demonstration]
datasets: [PolyAI/banking77]
model-index:
  - name: bank-helper
    results:
      - task: {{type: text-generation, name: Answering a bank's customers}}
        dataset: {{name: banking77 (held-out tenth), type: PolyAI/banking77}}
        metrics:
          - {{type: accuracy, name: answered with a reply of the right intent, value: {share}}}
---
"""

BODY = """\
# bank-helper

A small Llama decoder, trained from scratch on an ordinary computer, that answers questions of a
bank's customers. It demonstrates the path from a model file to a service. **It is not a general
assistant**, and its advice describes an imaginary banking app.

| | |
|---|---|
| architecture | `LlamaForCausalLM`, {layers} layers, width {width}, {heads} heads ({kv} kv) |
| parameters | {parameters:,} |
| weights | bfloat16, {size:.2f} MB, safetensors only |
| vocabulary | {vocab} (own byte-level BPE) |
| context | {context} tokens |
| language | English |

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
chat = [{{"role": "user", "content": "How do I activate my card?"}}]
inputs = tokenizer.apply_chat_template(
    chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
reply = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(reply, skip_special_tokens=True))
```

Roles are `system`, `user` and `assistant`; a turn ends with `<|end|>`, which is also the stop
token. The last question of a conversation is the one that is answered.

## How good it is

Measured by `python -m starter.evaluate`: greedy answers, through the chat template, counted as
right only if they are word for word one of the replies of the question's intent.

| held-out questions | asked | right | share | 95 % interval (Wilson) |
|---|--:|--:|--:|---|
| bank questions, 77 intents | {b_asked} | {b_right} | {b_share:.1%} | {b_low:.1%} to {b_high:.1%} |
| the same, asked second | {s_asked} | {s_right} | {s_share:.1%} | {s_low:.1%} to {s_high:.1%} |
| small talk, six kinds | {t_asked} | {t_right} | {t_share:.1%} | {t_low:.1%} to {t_high:.1%} |

Each intent's tenth of the questions was set aside before anything was trained, by a hash of the
text, and was used neither for training nor for choosing settings. {unknown} of the bank answers
were no known reply at all (a mixture of replies).

Weakest intents (right of asked): {weak}.

Most frequent confusions (asked as, answered as): {confusions}.

## Data and training

- Questions: {data} of banking77 (CC-BY 4.0, see `LICENSE-DATA.md`): Casanueva et al.,
  "Efficient Intent Detection with Dual Sentence Encoders", 2020,
  PolyAI-LDN/task-specific-datasets, commit 57ec275d. Some of its labels are known to be wrong or
  to overlap, which limits any figure measured on it.
- Replies and small talk: written for this project (Apache-2.0). The small talk is a modest
  handwritten set; its held-out questions partly come from the same templates as the trained ones,
  so that figure flatters the model on chat in the wild.
- Method: next-token training on altered questions (typing errors, missing words, greetings),
  first on single questions, then on conversations. The first token of a reply also learns from a
  ridge-regression classifier over character n-grams, fitted on the training questions in the same
  run.
- Command: `python -m starter.train` (seed {seed}). It took {minutes:.0f} minutes on two CPU cores.
- When the recipe was made, those cores were shared with other jobs (load above 4) and it took 34
  minutes; about 18 are estimated, from CPU time, for two idle ones. The second stage was started
  from the saved result of the first, as the command does within one run.
- The stage on conversations was added after trying dialogues by hand. In that run it changed the
  held-out share from 89.1% to 87.1% for single questions, and from 83.3% (of 210) to 86.1% (of
  837) for questions asked second; both changes are within what chance can do.

## Limits

- It knows two replies for each of 77 intents and six kinds of small talk, and nothing else. A
  question outside these gets the nearest reply or an honest refusal; the refusal is not reliable.
- It cannot see accounts, does not calculate, and does not combine answers; of two questions in
  one message it answers one.
- Earlier turns hardly influence an answer, and a question that only makes sense with them ("and
  how long does that take?") is often misread.
- Short messages after a greeting can go wrong: "hi", then "I lost my card", was answered with
  the reply about a PIN.
- Instructions in a system message are ignored.
- English only. Sampling at high temperature can mix replies; greedy decoding is the default.

## Licence

Weights: Apache-2.0. Training questions: CC-BY 4.0, attribution in `LICENSE-DATA.md`.
"""


def render(
    found: dict[str, Any], shape: Shape, parameters: int, size: int, seed: int, seconds: float
) -> str:
    """The card as Markdown."""
    bank, talk = found["bank_questions"], found["small_talk"]
    second = found["bank_questions_second_turn"]
    weak = ", ".join(f"`{k}` {right} of {asked}" for k, right, asked in bank["weakest_intents"])
    confusions = "; ".join(f"`{a}` as `{b}` ({n})" for a, b, n in bank["confusions"][:5])
    body = BODY.format(
        layers=shape.num_layers,
        width=shape.hidden_size,
        heads=shape.num_heads,
        kv=shape.num_kv_heads,
        vocab=shape.vocab_size,
        context=shape.max_positions,
        parameters=parameters,
        size=size / 1e6,
        b_asked=bank["questions"],
        b_right=bank["right"],
        b_share=bank["share"],
        b_low=bank["interval_95"][0],
        b_high=bank["interval_95"][1],
        s_asked=second["questions"],
        s_right=second["right"],
        s_share=second["share"],
        s_low=second["interval_95"][0],
        s_high=second["interval_95"][1],
        t_asked=talk["questions"],
        t_right=talk["right"],
        t_share=talk["share"],
        t_low=talk["interval_95"][0],
        t_high=talk["interval_95"][1],
        unknown=bank["no_known_reply"],
        weak=weak,
        confusions=confusions or "none",
        data="8,366",
        seed=seed,
        minutes=seconds / 60,
    )
    return FRONT.format(share=bank["share"]) + body
