"""README.zh-CN.md says what README.md says, and whatever brings them out of step is found."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from docs.translations import changed_since, differences, with_note

from docs import translations

ROOT = Path(__file__).parents[2]
ENGLISH = (ROOT / translations.ORIGINAL).read_text("utf-8")
CHINESE = (ROOT / translations.TRANSLATION).read_text("utf-8")

ONE = f"""{translations.FIRST_LINES[0]}

# A tool

It has [parts](#parts-of-it), `--flags` and 3 ports.

## Parts of it

- The [first](docs/a.md)
- The second: `b`

| part | speed |
|---|---|
| a | 10 ms |

```bash
tool up  # starts it
# then
tool down
```
"""
OTHER = f"""{translations.FIRST_LINES[1]}

# A tool

3 个端口，`--flags`，以及[组成](#组成部分)。

## 组成部分

- [第一](docs/a.md)
- 第二：`b`

| 部分 | 速度 |
|---|---|
| a 组 | 10 ms |

```bash
tool up  # 启动
# 然后
tool down
```
"""


def test_the_chinese_readme_is_in_step() -> None:
    assert differences(ENGLISH, CHINESE) == []
    assert changed_since(ENGLISH, CHINESE) == [], (
        "translate what was changed, then 'python -m docs.translations --noted'"
    )


def test_a_line_that_only_the_english_one_loses_is_found() -> None:
    lines = ENGLISH.splitlines(keepends=True)
    missed = []
    for number, line in enumerate(lines):
        shorter = "".join([*lines[:number], *lines[number + 1 :]])
        found = differences(shorter, CHINESE) or changed_since(shorter, CHINESE)
        if line.strip() and not found:
            missed.append(line)
    assert missed == []


def test_another_wording_is_found_and_told_by_its_heading() -> None:
    changed = ONE.replace("The second", "The last")
    noted = with_note(ONE, OTHER)
    assert differences(changed, noted) == []
    assert changed_since(changed, noted) == ["## Parts of it"]


def test_lines_that_are_broken_elsewhere_are_no_change() -> None:
    broken = ONE.replace("`--flags` and 3", "`--flags`\nand 3")
    assert broken != ONE
    assert changed_since(broken, with_note(ONE, OTHER)) == []


def test_words_order_and_comments_are_the_translators() -> None:
    assert differences(ONE, OTHER) == []
    assert changed_since(ONE, with_note(ONE, OTHER)) == []


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("\n## 组成", "\n### 组成", "headings"),
        ("(#组成部分)", "(#a-tool)", "links"),
        ("docs/a.md", "docs/b.md", "links"),
        ("`b`", "`c`", "names in code"),
        ("3 个", "4 个", "figures"),
        ("10 ms", "1.0 ms", "figures"),
        ("- 第二", "第二", "list items"),
        ("| 部分 | 速度 |", "| 部分 | 速度 | 备注 |", "tables"),
        ("| a 组 | 10 ms |\n", "| a 组 | 10 ms |\n| a 组 | |\n", "tables"),
        ("\n## 组成", "\n另外。\n\n## 组成", "paragraphs"),
        ("tool up", "tool  up", "code"),
        ("# 然后\n", "", "code"),
        ("第二", "The second", "not in Chinese"),
        ("[English]", "[Englisch]", "first line"),
    ],
)
def test_a_slip_in_a_translation_is_found(old: str, new: str, told: str) -> None:
    assert OTHER.count(old) == 1
    found = differences(ONE, OTHER.replace(old, new))
    assert [one for one in found if told in one], found


def test_code_that_takes_no_comments_is_compared_whole() -> None:
    ours, theirs = (text.replace("```bash", "```text") for text in (ONE, OTHER))
    assert [one.split(": ")[1] for one in differences(ours, theirs)] == ["code"]


def test_a_heading_in_code_is_none() -> None:
    assert len(translations.sections(ONE)) == 3


def test_a_translation_without_its_note_or_with_another_number_is_stale() -> None:
    assert changed_since(ONE, OTHER) == ["all: the last line should note 2 sections, it notes 0"]
    noted = with_note(ONE, OTHER)
    assert with_note(ONE, noted) == noted
    assert changed_since(f"{ONE}\n## More\n", noted)


def test_what_differs_cannot_be_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(translations, "ROOT", tmp_path)
    (tmp_path / translations.ORIGINAL).write_text(ONE, "utf-8")
    target = tmp_path / translations.TRANSLATION
    target.write_text(OTHER.replace("3 个", "4 个"), "utf-8")
    assert translations.main(["--noted"]) == 1
    assert "figures: missing ['3'], too many ['4']" in capsys.readouterr().err
    assert not translations.NOTE.search(target.read_text("utf-8"))

    target.write_text(OTHER, "utf-8")
    assert translations.main([]) == 1
    assert translations.main(["--noted"]) == 0
    assert translations.main([]) == 0


def test_both_are_packed() -> None:
    """The package's page is the English one; a copy of the sources holds both."""
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    assert f'readme = "{translations.ORIGINAL}"' in project
    packed = re.search(r"\[tool\.hatch\.build\.targets\.sdist\]\ninclude = (\[.*\])", project)
    assert packed is not None and '"*.md"' in packed[1]
