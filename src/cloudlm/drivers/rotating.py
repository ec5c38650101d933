"""A log file of bounded size: when it is full it becomes ``.1``, that becomes ``.2``, and so on.

Standard library only (the guard imports it). Writing never raises: a full disk loses lines of the
log, not the process that writes them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

_BLOCK_BYTES = 65_536


class RotatingLog:
    """Appends bytes to ``path``; at most ``files`` files of about ``max_bytes`` each."""

    def __init__(self, path: Path, *, max_bytes: int, files: int) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._files = files
        self._descriptor = -1
        self._size = 0
        self._at_line_start = True
        self._open()

    def write(self, data: bytes) -> None:
        """Append; rotates at the end of a line where there is one."""
        if self._size + len(data) > self._max_bytes and self._size:
            cut = 0 if self._at_line_start else data.find(b"\n") + 1
            self._append(data[:cut])
            self._rotate()
            data = data[cut:]
        self._append(data)
        self._at_line_start = data.endswith(b"\n") if data else self._at_line_start

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _append(self, data: bytes) -> None:
        if self._descriptor < 0:
            self._open()
        while data:
            try:
                written = os.write(self._descriptor, data)
            except OSError:  # also -1: the file could not be opened. What cannot be kept is lost.
                return
            self._size += written
            data = data[written:]

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        with contextlib.suppress(OSError):
            self._descriptor = os.open(self._path, flags, 0o600)
            self._size = os.fstat(self._descriptor).st_size

    def _rotate(self) -> None:
        self.close()
        with contextlib.suppress(OSError):
            for number in range(self._files - 1, 0, -1):
                older = rotated_path(self._path, number)
                newer = rotated_path(self._path, number - 1)
                if newer.exists():
                    newer.replace(older)
            if self._files <= 1:
                self._path.unlink(missing_ok=True)
        self._size = 0
        self._open()


def rotated_path(path: Path, number: int) -> Path:
    """``path`` itself for 0, ``path.1`` for the file before it, and so on."""
    return path if number == 0 else path.with_name(f"{path.name}.{number}")


def last_lines(path: Path, count: int) -> tuple[list[str], int]:
    """The last ``count`` complete lines of the log, oldest first, reaching into rotated files, and
    the byte in ``path`` behind the last of them. Raises OSError only for unreadable files."""
    lines: list[str] = []
    position = 0
    for number in range(100):
        file = rotated_path(path, number)
        if not file.exists():
            break
        found, end = _tail(file, count - len(lines))
        if number == 0:
            position = end
        lines = found + lines
        if len(lines) >= count:
            break
    return lines, position


def _tail(file: Path, count: int) -> tuple[list[str], int]:
    with file.open("rb") as stream:
        end = stream.seek(0, os.SEEK_END)
        data = b""
        start = end
        while start > 0 and data.count(b"\n") <= count:
            step = min(_BLOCK_BYTES, start)
            start -= step
            stream.seek(start)
            data = stream.read(step) + data
    complete = data[: data.rfind(b"\n") + 1]
    position = end - (len(data) - len(complete))
    lines = _decode(complete)
    return (lines[-count:] if count > 0 else []), position


def _decode(data: bytes) -> list[str]:
    return [line.decode("utf-8", "replace") for line in data.split(b"\n")[:-1]]


class LogFollower:
    """Reads what is appended to a rotating log after ``position``; call ``read`` repeatedly."""

    def __init__(self, path: Path, position: int) -> None:
        self._path = path
        self._position = position
        self._inode = self._current_inode()

    def read(self) -> Iterator[str]:
        """Complete lines since the last call, the rest of a file that was rotated away included."""
        inode = self._current_inode()
        if inode is None:
            return
        if self._inode is not None and inode != self._inode:
            rotated = rotated_path(self._path, 1)
            if rotated.exists() and rotated.stat().st_ino == self._inode:
                yield from self._read_from(rotated)
            self._position = 0
        self._inode = inode
        yield from self._read_from(self._path)

    def _read_from(self, file: Path) -> Iterator[str]:
        with file.open("rb") as stream:
            stream.seek(self._position)
            data = stream.read()
        complete = data[: data.rfind(b"\n") + 1]
        self._position += len(complete)
        yield from _decode(complete)

    def _current_inode(self) -> int | None:
        try:
            return self._path.stat().st_ino
        except OSError:
            return None
