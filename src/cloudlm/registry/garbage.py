"""Removes what imports and removals left behind when they were killed.

Safe beside running imports: an import records that it has begun before it writes a file, renews
the record before each file, and takes it away after the manifest. Files are garbage only if
neither a manifest nor a living record names them. A record is dead when its process is known to
have ended (same machine), or when it was not renewed for ``UPLOAD_AGE_S``.

Must not delete a manifest.
"""

from __future__ import annotations

from collections.abc import Iterable

from cloudlm.core.errors import BrokenModel, NotFound
from cloudlm.registry.owner import is_gone
from cloudlm.registry.records import (
    FILES,
    MANIFESTS,
    UPLOADS,
    files_prefix,
    name_and_stem,
    read_stored_version,
    read_upload,
    upload_key,
)
from cloudlm.registry.stores.base import Store

UPLOAD_AGE_S = 24 * 3600.0


def collect_garbage(store: Store, now: float, *, records_only: bool = False) -> int:
    """Delete garbage; how many imports or removals were cleaned up.

    ``now`` is Unix time in seconds. With ``records_only`` only dead imports are looked for, which
    costs one listing; otherwise all files are compared with all manifests.
    """
    files = [] if records_only else _uploads_with_files(store)  # before records, see below
    living, dead = _records(store, now)
    if not dead and not files:
        return store.sweep()
    # An import's record is there before its files and goes after its manifest came: files that
    # were listed first and have no record now belong to a manifest that is listed next.
    published = _published(store, {name for name, _ in [*dead, *files]})
    count = 0
    for name, upload in sorted({*dead, *files}):
        if (name, upload) in living:
            continue
        if (name, upload) in published:
            store.delete(upload_key(name, upload))
        else:
            delete_upload(store, name, upload)
            count += 1
    return count + store.sweep()


def delete_upload(store: Store, name: str, upload: str) -> None:
    """Delete the files of an import, then its record."""
    for key in store.list(files_prefix(name, upload)):
        store.delete(key)
    store.delete(upload_key(name, upload))


def _uploads_with_files(store: Store) -> list[tuple[str, str]]:
    found: set[tuple[str, str]] = set()
    for key in store.list(f"{FILES}/"):
        parts = key.split("/", 3)
        if len(parts) == 4:
            found.add((parts[1], parts[2]))
    return sorted(found)


def _records(store: Store, now: float) -> tuple[set[tuple[str, str]], set[tuple[str, str]]]:
    """The (name, upload) pairs of imports that may be alive, and of dead ones."""
    living: set[tuple[str, str]] = set()
    dead: set[tuple[str, str]] = set()
    for key in store.list(f"{UPLOADS}/"):
        found = name_and_stem(key)
        if found is None:
            continue
        try:
            record = read_upload(store.get(key))
        except NotFound:  # ended between the listing and the reading
            living.add(found)
            continue
        if record is None:  # of a form that we do not know: leave it alone
            living.add(found)
        elif is_gone(record.owner) or now - record.refreshed_at > UPLOAD_AGE_S:
            dead.add(found)
        else:
            living.add(found)
    return living, dead


def _published(store: Store, names: Iterable[str]) -> set[tuple[str, str]]:
    """The uploads that living versions are made of."""
    found: set[tuple[str, str]] = set()
    for name in names:
        for key in store.list(f"{MANIFESTS}/{name}/"):
            try:
                stored = read_stored_version(store.get(key), key)
            except BrokenModel as error:  # its files cannot be told from garbage
                raise BrokenModel(f"garbage of {name} is left alone: {error.message}") from error
            if stored.manifest is not None:
                found.add((name, stored.upload))
    return found
