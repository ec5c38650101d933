"""Keeps a version's removal and an alias that is set to it at the same moment apart.

A store can neither lock nor compare and swap, so both sides write before they look, as in Dekker's
algorithm: a removal notes its intent and then looks for aliases; whoever sets an alias writes it
and then looks for intents, and for the version. At least one sees the other, and gives way.

    removals/<name>/<version>.<token>.json    somebody is about to remove that version

An intent whose process has ended, or of more than a day ago, counts no longer. Must not touch
manifests or aliases.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from contextlib import suppress

from cloudlm.core.errors import CloudlmError, NotFound
from cloudlm.registry.garbage import UPLOAD_AGE_S
from cloudlm.registry.owner import is_gone
from cloudlm.registry.records import Upload, read_upload
from cloudlm.registry.stores.base import Store

REMOVALS = "removals"


def intend(store: Store, name: str, version: int, owner: str, now: float) -> str:
    """Note that a version is about to be removed; returns the key of the note, for the caller to
    delete once that is done or given up. ``now`` is Unix seconds."""
    key = f"{_prefix(name, version)}{secrets.token_hex(8)}.json"
    store.put(key, Upload(owner, now).encode())
    return key


def withdraw(store: Store, keys: Iterable[str]) -> None:
    """Delete the notes of a removal that is done or given up, as many as can be. One that stays
    does not hide what the removal came to: garbage collection sees to it."""
    for key in keys:
        with suppress(CloudlmError):
            store.delete(key)


def is_intended(store: Store, name: str, version: int, now: float) -> bool:
    """Whether somebody may be about to remove a version."""
    return any(not _is_dead(store, key, now) for key in store.list(_prefix(name, version)))


def forget_dead(store: Store, now: float) -> int:
    """Delete the notes of killed removals; how many there were."""
    dead = [key for key in store.list(f"{REMOVALS}/") if _is_dead(store, key, now)]
    for key in dead:
        store.delete(key)
    return len(dead)


def _is_dead(store: Store, key: str, now: float) -> bool:
    try:
        note = read_upload(store.get(key))
    except NotFound:  # done or given up between the listing and the reading
        return True
    return note is not None and (is_gone(note.owner) or now - note.refreshed_at > UPLOAD_AGE_S)


def _prefix(name: str, version: int) -> str:
    return f"{REMOVALS}/{name}/{version}."
