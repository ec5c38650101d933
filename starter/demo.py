"""Writes the questions that ``cloudlm demo`` asks, with every reply that answers each rightly.

python -m starter.demo
"""

from __future__ import annotations

import json
from pathlib import Path

from starter.corpus import demo_questions, replies

TARGET = Path(__file__).parents[1] / "src" / "cloudlm" / "cli" / "demo_questions.json"


def demo_text() -> str:
    """The file's content."""
    right = replies()
    entries = [
        {"question": one.text, "intent": one.intent, "replies": right[one.intent]}
        for one in demo_questions()
    ]
    return json.dumps(entries, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    TARGET.write_text(demo_text(), encoding="utf-8")
