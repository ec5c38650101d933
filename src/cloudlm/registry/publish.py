"""Brings a checked folder into the store and makes it a version, all at once or not at all.

Order: a record that an import has begun; the files, under a prefix of their own; the manifest,
last, by ``put_if_absent``, which also allots the number. Whoever looks meanwhile, or after a kill
at any write, sees the version complete or not at all.

Must not read weights except to hash them, and must not delete what another import wrote.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

from cloudlm.core.clock import Clock
from cloudlm.core.errors import BrokenModel, CloudlmError, Conflict, NotFound
from cloudlm.core.model import Manifest, ModelFile
from cloudlm.registry.garbage import delete_upload
from cloudlm.registry.inspect import FolderFile, Inspection
from cloudlm.registry.records import (
    MANIFESTS,
    StoredVersion,
    Upload,
    files_digest,
    files_prefix,
    manifest_key,
    name_and_stem,
    read_stored_version,
    upload_key,
)
from cloudlm.registry.stores.base import Store
from cloudlm.registry.stores.failures import storage_failures
from cloudlm.registry.verify import Progress, sha256_of


@dataclass(frozen=True, slots=True, eq=False)
class ImportedManifest(Manifest):
    """The manifest that an import ended with, and how.

    ``already_registered``: the same bytes were a version of that name before; nothing was added.
    ``notes``: sentences about files that were left behind. Equal to a Manifest of equal fields.
    """

    already_registered: bool = False
    notes: tuple[str, ...] = ()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Manifest):
            return NotImplemented
        return self.body() == other.body()

    __hash__ = None  # type: ignore[assignment]


def imported(manifest: Manifest, already: bool, notes: tuple[str, ...]) -> ImportedManifest:
    """``manifest`` with the import's outcome."""
    fields = {name: getattr(manifest, name) for name in Manifest.__dataclass_fields__}
    return ImportedManifest(**fields, already_registered=already, notes=notes)


class Publisher:
    """Publishes one inspected folder as a version of ``name``."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        owner: str,
        name: str,
        inspection: Inspection,
        progress: Progress | None,
    ) -> None:
        self._store = store
        self._clock = clock
        self._owner = owner
        self._name = name
        self._inspection = inspection
        self._progress = progress
        self._total = 2 * sum(file.size_bytes for file in inspection.files)
        self._done = 0
        self._upload = secrets.token_hex(16)

    def publish(
        self, lineage: Mapping[str, str], licence: str | None, description: str
    ) -> ImportedManifest:
        """Hash, upload, write the manifest. Raises BrokenModel if a file changes meanwhile."""
        notes = self._inspection.notes
        stamps = {file.path: _stamp(file) for file in self._inspection.files}
        files = tuple(self._hash(file) for file in self._inspection.files)
        same = find_same(self._store, self._name, files)
        if same is not None:
            return imported(same, True, notes)
        facts = self._inspection.facts
        draft = Manifest(
            name=self._name,
            version=1,
            files=files,
            task=facts.task,
            architecture=facts.architecture,
            precision=facts.storage.precision,
            parameters=facts.storage.parameters,
            context_length=facts.context_length,
            licence=licence or facts.licence,
            lineage=dict(lineage),
            description=description,
            created_at=self._clock.now(),
            weights_format=facts.storage.format,
            quantisation=facts.storage.quantisation,
        )
        try:
            self._upload_files(stamps)
            manifest, already = self._write_manifest(draft)
        except BaseException:
            self._clean_up()
            raise
        with suppress(CloudlmError):  # the version is there; the rest is garbage for later
            if already:
                delete_upload(self._store, self._name, self._upload)
            else:
                self._store.delete(upload_key(self._name, self._upload))
        return imported(manifest, already, notes)

    # -- bytes

    def _hash(self, file: FolderFile) -> ModelFile:
        with storage_failures(file.source, "read"), file.source.open("rb") as stream:
            digest = sha256_of(stream, self._reporter(f"checking {file.path}"))
        self._done += file.size_bytes
        return ModelFile(file.path, file.size_bytes, digest)

    def _upload_files(self, stamps: Mapping[str, tuple[int, ...]]) -> None:
        prefix = files_prefix(self._name, self._upload)
        for file in self._inspection.files:
            self._sign_of_life()
            report = self._reporter(f"storing {file.path}")
            self._store.put_file(prefix + file.path, file.source, report)
            self._done += file.size_bytes
            if _stamp(file) != stamps[file.path]:
                raise BrokenModel(f"{file.path}: changed while it was imported; import it again")

    def _sign_of_life(self) -> None:
        record = Upload(self._owner, self._clock.now())
        self._store.put(upload_key(self._name, self._upload), record.encode())

    def _reporter(self, what: str) -> Callable[[int], None]:
        def moved(file_bytes: int) -> None:
            if self._progress is not None:
                self._progress(self._done + file_bytes, self._total, what)

        return moved

    # -- the manifest

    def _write_manifest(self, draft: Manifest) -> tuple[Manifest, bool]:
        """The version as written, and whether somebody else had published the same bytes."""
        record = upload_key(self._name, self._upload)
        if next(self._store.list(record), None) != record:
            raise Conflict(
                f"the import of {self._name} was given up by a garbage collection because it "
                "showed no sign of life for long; import it again"
            )
        while True:
            version = max(version_numbers(self._store, self._name), default=0) + 1
            manifest = replace(draft, version=version)
            key = manifest_key(self._name, version)
            ours = StoredVersion(manifest, self._upload)
            if self._store.put_if_absent(key, ours.encode()):
                return manifest, False
            # taken: by another importer, or by us if an answer was lost and the put repeated
            theirs = _read(self._store, key)
            if theirs is not None and theirs.upload == self._upload:
                return manifest, False
            same = find_same(self._store, self._name, draft.files)
            if same is not None:
                return same, True

    def _clean_up(self) -> None:
        """Best effort; what cannot be deleted now is garbage for later, never a version.

        If the manifest may have been written (its put failed half-way), everything stays.
        """
        try:
            for version in version_numbers(self._store, self._name):
                key = manifest_key(self._name, version)
                if read_stored_version(self._store.get(key), key).upload == self._upload:
                    return
            delete_upload(self._store, self._name, self._upload)
        except Exception:  # the first failure is the one to report
            return


def version_numbers(store: Store, name: str) -> list[int]:
    """Every number that was ever given, removed versions included; ascending."""
    numbers = []
    for key in store.list(f"{MANIFESTS}/{name}/"):
        found = name_and_stem(key)
        if found is not None and found[1].isdigit():
            numbers.append(int(found[1]))
    return sorted(numbers)


def find_same(store: Store, name: str, files: tuple[ModelFile, ...]) -> Manifest | None:
    """The newest version of ``name`` that holds exactly these files."""
    wanted = files_digest(files)
    for version in reversed(version_numbers(store, name)):
        key = manifest_key(name, version)
        stored = _read(store, key)
        if stored is None or stored.manifest is None:
            continue
        if files_digest(stored.manifest.files) == wanted:
            return stored.manifest
    return None


def _read(store: Store, key: str) -> StoredVersion | None:
    """None if it is unreadable: another version's damage must not stop an import."""
    try:
        return read_stored_version(store.get(key), key)
    except (BrokenModel, NotFound):
        return None


def _stamp(file: FolderFile) -> tuple[int, ...]:
    with storage_failures(file.source, "read"):
        facts = os.stat(file.source, follow_symlinks=False)  # noqa: PTH116
    if facts.st_size != file.size_bytes:
        raise BrokenModel(f"{file.path}: changed while it was imported; import it again")
    return facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns
