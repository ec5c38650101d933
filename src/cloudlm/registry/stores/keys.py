"""What may be a key of a store. One rule for all stores, so that a registry can move between them.

Must not touch a disk or a network.
"""

from __future__ import annotations

from cloudlm.core.errors import InvalidRequest

MAX_KEY_BYTES = 900  # S3, GCS and Azure allow 1024; the bucket's prefix needs room too
MAX_PART_BYTES = 255  # the longest file name of the usual file systems


def check_key(key: str) -> tuple[str, ...]:
    """The parts of ``key``. Raises InvalidRequest if it is not a plain relative path.

    A part is not empty, not ``.`` or ``..``, and holds no backslash or control character, so that
    no key leaves a store's folder and every store reads it alike. The first part does not begin
    with a dot: those names are the stores' own.
    """
    parts = tuple(key.split("/"))
    for part in parts:
        if part in ("", ".", "..") or _has_odd_characters(part):
            raise InvalidRequest(
                f"store key {key[:120]!r} is not valid: expected a relative path without empty "
                "parts, '.', '..', backslashes or control characters",
                param="key",
            )
        if len(part.encode()) > MAX_PART_BYTES:
            raise InvalidRequest(
                f"store key part {part[:80]!r}… is longer than {MAX_PART_BYTES} bytes", param="key"
            )
    if parts[0].startswith("."):
        raise InvalidRequest(
            f"store key {key[:120]!r} begins with a dot, which is reserved", param="key"
        )
    if len(key.encode()) > MAX_KEY_BYTES:
        raise InvalidRequest(
            f"store key {key[:80]!r}… is longer than {MAX_KEY_BYTES} bytes", param="key"
        )
    return parts


def check_prefix(prefix: str) -> tuple[tuple[str, ...], str]:
    """Split a list prefix into its complete folders and the beginning of the next part.

    Raises InvalidRequest as ``check_key`` does.
    """
    *folders, beginning = prefix.split("/")
    if folders:
        check_key("/".join(folders))
    if beginning and _has_odd_characters(beginning):
        raise InvalidRequest(f"list prefix {prefix[:120]!r} is not valid", param="prefix")
    return tuple(folders), beginning


def is_key(key: str) -> bool:
    """Whether ``check_key`` accepts ``key``; for what a listing finds."""
    try:
        check_key(key)
    except InvalidRequest:
        return False
    return True


def _has_odd_characters(part: str) -> bool:
    try:
        part.encode()
    except UnicodeEncodeError:  # a file name that is not UTF-8
        return True
    return "\\" in part or any(ord(c) < 32 or ord(c) == 127 for c in part)
