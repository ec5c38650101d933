"""Keeps README.zh-CN.md in step with README.md, also for those who read no Chinese.

    python -m docs.translations           say what is not in step; exit 1 if anything is not
    python -m docs.translations --noted   note that the translation says what README.md says now

Two comparisons, section by section. What every translation leaves as it is must be the same: levels
of headings, code but for its comments, links, names in code, figures, lists, tables, paragraphs. A
change of wording shows in none of them; so the last line of the translation keeps a fingerprint of
each section of README.md as it was translated. A test runs both. Must not judge how well anything
is said, and must not note by itself: that is for whoever has translated.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
ORIGINAL = "README.md"
TRANSLATION = "README.zh-CN.md"
FIRST_LINES = (f"English | [简体中文]({TRANSLATION})", f"[English]({ORIGINAL}) | 简体中文")
HEADING = re.compile(r"#+ +.")
BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
CODE_COMMENT = re.compile(r"(^|(?<=\s))#\s.*$", re.MULTILINE)
COMMENTED = frozenset({"bash", "console", "python", "sh", "toml", "yaml"})
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
FIGURE = re.compile(r"\d+(?:[.,]\d+)*")
ITEM = re.compile(r"^( *)(?:[-*]|\d+\.) ", re.MULTILINE)
ROW = re.compile(r"^ *(\|.*\|) *$", re.MULTILINE)
HIDDEN = re.compile(r"<!--.*?-->", re.DOTALL)
NOTE = re.compile(r"^<!-- README\.md when this was translated: ([0-9a-f ]+) -->$", re.MULTILINE)
CHINESE = re.compile(r"[\u4e00-\u9fff]")


def anchor(heading: str) -> str:
    """What GitHub makes of a heading's words: lower case, hyphens for spaces, no other signs."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def sections(text: str) -> list[str]:
    """Each heading with what stands under it, in order; first what stands above all of them."""
    parts: list[list[str]] = [[]]
    in_code = False
    for line in text.splitlines():
        in_code ^= line.lstrip().startswith("```")
        if not in_code and HEADING.match(line):
            parts.append([])
        parts[-1].append(line)
    return ["\n".join(part) for part in parts]


def differences(original: str, translation: str) -> list[str]:
    """What a translation has in another way than its original, a line for each; none if nothing."""
    found = [
        f"first line: not {line!r}"
        for line, text in zip(FIRST_LINES, (original, translation), strict=True)
        if sections(text)[0].strip() != line
    ]
    ours, theirs = sections(original)[1:], sections(translation)[1:]
    if _levels(ours) != _levels(theirs):
        return [*found, f"headings: levels are {_levels(theirs)} instead of {_levels(ours)}"]
    here, there = _places(ours), _places(theirs)
    for one, other in zip(ours, theirs, strict=True):
        wanted, had = _facts(one, here), _facts(other, there)
        found += [
            f"{_heading(one)}: {what}: {_told(wanted[what], had[what])}"
            for what in wanted
            if wanted[what] != had[what]
        ]
    return found + [f"not in Chinese: {piece}" for piece in _untranslated(theirs)]


def changed_since(original: str, translation: str) -> list[str]:
    """The original's headings whose sections were changed after they were translated."""
    noted = NOTE.search(translation)
    before = noted[1].split() if noted else []
    parts = sections(original)[1:]
    if len(before) != len(parts):
        return [f"all: the last line should note {len(parts)} sections, it notes {len(before)}"]
    pairs = zip(before, _fingerprints(original), strict=True)
    return [_heading(part) for part, (old, new) in zip(parts, pairs, strict=True) if old != new]


def with_note(original: str, translation: str) -> str:
    """The translation with a last line which says that it says what ``original`` says."""
    body = NOTE.sub("", translation).rstrip("\n")
    prints = " ".join(_fingerprints(original))
    return f"{body}\n\n<!-- README.md when this was translated: {prints} -->\n"


def _untranslated(parts: list[str]) -> list[str]:
    """Paragraphs and list items without one Chinese character, each by its beginning."""
    text = HIDDEN.sub("", BLOCK.sub("", "\n".join(parts)))
    pieces = [piece.strip() for piece in re.split(r"\n\s*\n|\n(?= *- )", text)]
    return [
        piece[:60] for piece in pieces if piece and piece[0] != "#" and not CHINESE.search(piece)
    ]


def _levels(parts: list[str]) -> list[int]:
    return [len(part) - len(part.lstrip("#")) for part in parts]


def _heading(part: str) -> str:
    return part.partition("\n")[0]


def _places(parts: list[str]) -> dict[str, str]:
    """Which heading a link within the page leads to: its number, the same in every language."""
    names = [anchor(_heading(part).lstrip("#")) for part in parts]
    return {f"#{name}": f"heading {number}" for number, name in enumerate(names, 1)}


def _facts(part: str, places: Mapping[str, str]) -> dict[str, list[str]]:
    """What every translation of a section leaves as it is; sorted where languages order freely."""
    prose = HIDDEN.sub("", BLOCK.sub("```", part))
    words = SPAN.sub("", LINK.sub("]", prose))
    paragraphs = [piece for piece in re.split(r"\n\s*\n", prose) if piece.strip()]
    return {
        "code": [_without_comments(match[2], match[3]) for match in BLOCK.finditer(part)],
        "links": sorted(places.get(target, target) for target in LINK.findall(prose)),
        "names in code": sorted(SPAN.findall(prose)),
        "figures": sorted(FIGURE.findall(words)),
        "list items": [f"indented by {len(indent)}" for indent in ITEM.findall(prose)],
        "tables": [f"row of {row.count('|') - 1}" for row in ROW.findall(prose)],
        "paragraphs": [f"{len(paragraphs)} in all"],
    }


def _without_comments(language: str, code: str) -> str:
    """Comments may be translated; that there is one, and where, stays."""
    bare = CODE_COMMENT.sub("#", code) if language in COMMENTED else code
    return f"{language}\n{bare}"


def _told(wanted: list[str], had: list[str]) -> str:
    missing, added = Counter(wanted) - Counter(had), Counter(had) - Counter(wanted)
    told = [f"missing {list(missing.elements())}"] if missing else []
    told += [f"too many {list(added.elements())}"] if added else []
    return ", ".join(told) or f"in another order than {wanted}"


def _fingerprints(original: str) -> list[str]:
    """Eight hexadecimal digits of SHA-256 a section; where lines are broken makes no difference."""
    words = [" ".join(part.split()) for part in sections(original)[1:]]
    return [hashlib.sha256(one.encode()).hexdigest()[:8] for one in words]


def main(arguments: list[str]) -> int:
    """Say what is not in step; with ``--noted`` note that it is, unless the two still differ."""
    original = (ROOT / ORIGINAL).read_text("utf-8")
    translation = (ROOT / TRANSLATION).read_text("utf-8")
    wrong = differences(original, translation)
    if "--noted" not in arguments:
        stale = changed_since(original, translation)
        wrong += [f"README.md was changed since it was translated: {one}" for one in stale]
    elif not wrong:
        (ROOT / TRANSLATION).write_text(with_note(original, translation), "utf-8")
    for one in wrong:
        print(f"{TRANSLATION}: {one}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
