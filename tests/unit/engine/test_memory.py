"""Giving memory back: what belongs to a file goes and comes again, nothing else is touched."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

if not Path("/proc/self/maps").is_file():
    pytest.skip("needs Linux", allow_module_level=True)

SIZE = 16 << 20


def resident_file_bytes() -> int:
    status = Path("/proc/self/status").read_text("utf-8")
    found = re.search(r"RssFile:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) << 10


def test_pages_of_a_file_go_and_come_again(tmp_path: Path) -> None:
    from cloudlm.engine.memory import forget_mapped

    file = tmp_path / "weights"
    file.write_bytes(bytes(range(256)) * (SIZE // 256))
    mapped = torch.from_file(str(file), shared=False, size=SIZE, dtype=torch.uint8)
    total = int(mapped.sum())
    before = resident_file_bytes()
    forget_mapped([mapped[100:]])
    assert resident_file_bytes() < before - SIZE // 2
    assert int(mapped.sum()) == total


def test_memory_of_no_file_keeps_its_content() -> None:
    from cloudlm.engine.memory import forget_mapped

    own = torch.full((SIZE,), 7, dtype=torch.uint8)
    forget_mapped([own])
    assert bool((own == 7).all())
