"""The registry: numbered model versions, the aliases that point at them, and verified local copies.

    registry = open_registry("", home=Path("~/.cloudlm").expanduser(), settings=settings.registry)
    manifest = registry.import_folder(Path("./my-model"), "my-model", alias="champion")
    with registry:
        folder = registry.fetch("models:/my-model@champion")

All calls block; run them in a thread where that matters. Must not know how a store keeps its
objects, and must not load a model.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from cloudlm.core.clock import Clock, SystemClock
from cloudlm.core.errors import (
    BrokenModel,
    CloudlmError,
    Conflict,
    CorruptModel,
    ModelNotFound,
    NotFound,
    UnsafeModel,
)
from cloudlm.core.model import Manifest, ModelRef, check_alias, check_name, parse_ref
from cloudlm.core.settings import RegistrySettings
from cloudlm.registry.cache import Lease, ModelCache
from cloudlm.registry.download import download_version
from cloudlm.registry.garbage import collect_garbage, delete_upload
from cloudlm.registry.inspect import inspect_folder
from cloudlm.registry.model_json import check_object, parsed
from cloudlm.registry.opening import open_store
from cloudlm.registry.owner import this_process
from cloudlm.registry.policy import may_be_in_a_version
from cloudlm.registry.publish import ImportedManifest, Publisher, version_numbers
from cloudlm.registry.records import (
    ALIASES,
    MANIFESTS,
    StoredVersion,
    alias_key,
    encode_alias,
    files_prefix,
    manifest_key,
    name_and_stem,
    read_alias,
    read_stored_version,
)
from cloudlm.registry.removals import forget_dead, intend, is_intended, withdraw
from cloudlm.registry.stores.base import Store
from cloudlm.registry.verify import Progress, remember_verified, verify_folder

_NAMES_IN_ERROR = 20
_MARK = "verified.json"


class Registry:
    """Model versions in ``store``; copies of remote ones in ``cache_dir``, at most ``cache_bytes``.

    What was fetched from a remote store stays locked in the cache until ``close`` (or the end of
    the process). Safe for threads and for several processes on one store.
    """

    def __init__(
        self,
        store: Store,
        *,
        cache_dir: Path,
        cache_bytes: int,
        clock: Clock,
        owner: str | None = None,
    ) -> None:
        self.store = store
        self.cache_dir = cache_dir
        self._cache = ModelCache(cache_dir, cache_bytes)
        self._clock = clock
        self._owner = owner or this_process()
        self._leases: dict[str, Lease] = {}
        self._lock = threading.Lock()

    # -- reading

    def list_models(self) -> list[str]:
        """The names of all models that have a version, sorted."""
        found = (name_and_stem(key) for key in self.store.list(f"{MANIFESTS}/"))
        names = sorted({parts[0] for parts in found if parts is not None})
        return [name for name in names if self._manifests(name)]

    def list_versions(self, name: str) -> list[Manifest]:
        """The living versions, oldest first. Raises ModelNotFound."""
        manifests = self._manifests(check_name(name, "model"))
        if not manifests:
            raise self._unknown_model(name)
        return manifests

    def list_aliases(self, name: str) -> dict[str, int]:
        """Alias to version number, by alias."""
        prefix = f"{ALIASES}/{check_name(name, 'model')}/"
        found = {}
        for key in self.store.list(prefix):
            parts = name_and_stem(key)
            if parts is not None:
                with suppress(NotFound):  # removed between the listing and the reading
                    found[parts[1]] = read_alias(self.store.get(key), key)
        return found

    def resolve(self, ref: ModelRef | str) -> Manifest:
        """The manifest of a version, of an alias' version, or of the newest version.

        Raises ModelNotFound naming what there is, CorruptModel for a damaged manifest.
        """
        return self._stored(ref)[0]

    def configuration(self, ref: ModelRef | str) -> dict[str, Any]:
        """A version's ``config.json``, verified; its weights are not fetched.

        Raises BrokenModel if it has none or it is no object, CorruptModel, ModelNotFound.
        """
        manifest, stored = self._stored(ref)
        file = next((one for one in manifest.files if one.path == "config.json"), None)
        if file is None:
            raise BrokenModel(f"{manifest.ref} has no config.json", param="model")
        data = self.store.get(files_prefix(manifest.name, stored.upload) + file.path)
        if hashlib.sha256(data).hexdigest() != file.sha256:
            raise CorruptModel(f"{manifest.ref}: {file.path} is not what the manifest says")
        name = f"{manifest.ref}: config.json"
        return check_object(parsed(data, name), name)

    # -- changing

    def import_folder(
        self,
        folder: Path,
        name: str,
        *,
        alias: str | None = None,
        lineage: Mapping[str, str] | None = None,
        licence: str | None = None,
        description: str = "",
        progress: Progress | None = None,
    ) -> ImportedManifest:
        """Check ``folder``, copy it into the store and publish it as the next version of ``name``.

        If a version of ``name`` holds the same bytes, that one is returned and nothing is added
        (``already_registered``). ``alias`` is then set. Raises UnsafeModel, BrokenModel,
        StorageFailed; after an error no version was added.
        """
        check_name(name, "name")
        if alias is not None:
            check_alias(alias)
        with suppress(CloudlmError):  # whatever is wrong there is no fault of this import
            collect_garbage(self.store, self._clock.now(), records_only=True)
        folder = Path(folder).expanduser()
        inspection = inspect_folder(folder)
        origin = {"source": folder.resolve().as_uri()} if lineage is None else lineage
        if inspection.base:
            origin = {**origin, "base": inspection.base}
        publisher = Publisher(self.store, self._clock, self._owner, name, inspection, progress)
        manifest = publisher.publish(origin, licence, description)
        if alias is not None:
            self._write_alias(name, alias, manifest.version)
        return manifest

    def set_alias(self, name: str, alias: str, version: int) -> Manifest:
        """Point ``alias`` at ``version``, wherever it pointed before. Raises ModelNotFound, and
        Conflict if the version is being removed at this moment; it then points where it did."""
        check_alias(alias)
        manifest = self.resolve(ModelRef(check_name(name, "model"), version=version))
        self._write_alias(name, alias, version)
        return manifest

    def remove_alias(self, name: str, alias: str) -> None:
        """Raises NotFound if there is no such alias."""
        key = alias_key(check_name(name, "model"), check_alias(alias))
        if next((found for found in self.store.list(key) if found == key), None) is None:
            raise NotFound(f"model {name!r} has no alias {alias!r}")
        self.store.delete(key)

    def remove(self, ref: ModelRef | str) -> list[Manifest]:
        """Remove a version, or every version if ``ref`` is only a name; returns what was removed.

        Raises Conflict if an alias points there, or is being set to (``removals``), ModelNotFound.
        The numbers are not given again.
        """
        ref = parse_ref(ref) if isinstance(ref, str) else ref
        if ref.version is None and ref.alias is None:
            doomed = self.list_versions(ref.name)
        else:
            doomed = [self.resolve(ref)]
        numbers = {manifest.version for manifest in doomed}
        noted: list[str] = []
        try:
            for number in numbers:
                noted.append(intend(self.store, ref.name, number, self._owner, self._clock.now()))
            self._check_no_alias(ref.name, numbers)
            for manifest in doomed:
                self._remove_version(manifest)
        finally:
            withdraw(self.store, noted)
        return doomed

    def collect_garbage(self) -> int:
        """Remove what killed imports and removals left behind; how many were cleaned up."""
        now = self._clock.now()
        return forget_dead(self.store, now) + collect_garbage(self.store, now)

    # -- local copies

    def fetch(self, ref: ModelRef | str, progress: Progress | None = None) -> Path:
        """A local folder with exactly the version's files under their names, all verified.

        In place if the store is a folder of this machine, else a copy in the cache, which stays
        until ``close``. Raises CorruptModel naming the file, UnsafeModel, ModelNotFound,
        StorageFailed. The files must not be changed.
        """
        manifest, stored = self._stored(ref)
        for file in manifest.files:
            if not may_be_in_a_version(file.path):
                raise UnsafeModel(f"{manifest.ref}: {file.path} may run code; refused")
        prefix = files_prefix(manifest.name, stored.upload)
        folder = self._in_place(manifest, prefix)
        if folder is not None:
            verify_folder(folder, manifest, self._mark(manifest, stored), progress)
            return folder
        return self._cached(manifest, stored, progress)

    def release(self, folder: Path) -> None:
        """The folder that ``fetch`` gave is no longer used: its copy may be evicted."""
        with self._lock:
            lease = self._leases.pop(str(folder), None)
        if lease is not None:
            lease.release()

    def close(self) -> None:
        """Release every fetched folder."""
        with self._lock:
            leases = list(self._leases.values())
            self._leases.clear()
        for lease in leases:
            lease.release()

    def __enter__(self) -> Registry:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- inside

    def _manifests(self, name: str) -> list[Manifest]:
        """Living versions; a damaged manifest is left out here and named by ``resolve``."""
        manifests = []
        for version in version_numbers(self.store, name):
            key = manifest_key(name, version)
            with suppress(BrokenModel, NotFound):
                stored = read_stored_version(self.store.get(key), key)
                if stored.manifest is not None:
                    manifests.append(stored.manifest)
        return manifests

    def _stored(self, ref: ModelRef | str) -> tuple[Manifest, StoredVersion]:
        ref = parse_ref(ref) if isinstance(ref, str) else ref
        check_name(ref.name, "model")
        version = ref.version
        if ref.alias is not None:
            version = self._alias_version(ref.name, ref.alias)
        if version is None:
            version = self.list_versions(ref.name)[-1].version
        key = manifest_key(ref.name, version)
        try:
            stored = read_stored_version(self.store.get(key), key)
        except NotFound:
            raise self._unknown_version(ref, version) from None
        if stored.manifest is None:
            raise self._unknown_version(ref, version)
        return stored.manifest, stored

    def _alias_version(self, name: str, alias: str) -> int:
        key = alias_key(name, check_alias(alias))
        try:
            return read_alias(self.store.get(key), key)
        except NotFound:
            if not self._manifests(name):
                raise self._unknown_model(name) from None
            known = ", ".join(sorted(self.list_aliases(name))) or "none"
            raise ModelNotFound(
                f"model {name!r} has no alias {alias!r}; it has: {known}", param="model"
            ) from None

    def _unknown_model(self, name: str) -> ModelNotFound:
        names = self.list_models()
        listed = ", ".join(names[:_NAMES_IN_ERROR]) or "none"
        more = f" and {len(names) - _NAMES_IN_ERROR} more" if len(names) > _NAMES_IN_ERROR else ""
        return ModelNotFound(
            f"model {name!r} is not registered; registered: {listed}{more}", param="model"
        )

    def _unknown_version(self, ref: ModelRef, version: int) -> ModelNotFound:
        manifests = self._manifests(ref.name)
        if not manifests:
            return self._unknown_model(ref.name)
        known = ", ".join(str(manifest.version) for manifest in manifests[-_NAMES_IN_ERROR:])
        return ModelNotFound(
            f"{ref}: model {ref.name!r} has no version {version}; it has: {known}", param="model"
        )

    def _check_no_alias(self, name: str, numbers: Collection[int]) -> None:
        aliases = self.list_aliases(name).items()
        pointing = [f"{name}@{alias}" for alias, version in aliases if version in numbers]
        if pointing:
            raise Conflict(
                f"{', '.join(pointing)} points at what would be removed; remove or move the "
                "alias first"
            )

    def _write_alias(self, name: str, alias: str, version: int) -> None:
        """Point an alias at a version. If that is removed meanwhile, all is as it was before."""
        key = alias_key(name, alias)
        try:
            before: bytes | None = self.store.get(key)
        except NotFound:
            before = None
        written = encode_alias(version, self._clock.now())
        self.store.put(key, written)
        if self._stays(name, version):
            return
        with suppress(NotFound):
            if self.store.get(key) == written:  # nobody has set it since
                self._put_back(name, key, before)
        raise Conflict(
            f"models:/{name}/{version} is being removed at this moment: {name}@{alias} was not set"
        )

    def _put_back(self, name: str, key: str, before: bytes | None) -> None:
        if before is not None:
            self.store.put(key, before)
            with suppress(CorruptModel):
                if self._stays(name, read_alias(before, key)):
                    return
        self.store.delete(key)

    def _stays(self, name: str, version: int) -> bool:
        """Whether a version is there and nobody is about to remove it; in this order, for an intent
        goes after the version."""
        if is_intended(self.store, name, version, self._clock.now()):
            return False
        key = manifest_key(name, version)
        try:
            return read_stored_version(self.store.get(key), key).manifest is not None
        except NotFound:
            return False

    def _remove_version(self, manifest: Manifest) -> None:
        key = manifest_key(manifest.name, manifest.version)
        stored = read_stored_version(self.store.get(key), key)
        self.store.put(key, StoredVersion(None, stored.upload).encode())
        delete_upload(self.store, manifest.name, stored.upload)
        with suppress(OSError):
            self._mark(manifest, stored).unlink(missing_ok=True)

    def _in_place(self, manifest: Manifest, prefix: str) -> Path | None:
        """The folder of the version if the store keeps it as one on this machine."""
        for file in manifest.files:
            path = self.store.local_path(prefix + file.path)
            if path is not None:
                return path.parents[file.path.count("/")]
        return None

    def _mark(self, manifest: Manifest, stored: StoredVersion) -> Path:
        """What remembers that a version read in place was verified."""
        return self.cache_dir / "marks" / f"{_entry(manifest, stored)}.json"

    def _cached(self, manifest: Manifest, stored: StoredVersion, progress: Progress | None) -> Path:
        def download(folder: Path) -> None:
            prefix = files_prefix(manifest.name, stored.upload)
            download_version(self.store, prefix, manifest, folder, progress)
            remember_verified(folder, manifest, folder.parent / _MARK)

        def waiting() -> None:
            if progress is not None:
                progress(0, manifest.size_bytes, "waiting for another download")

        def lease_verified() -> Lease:
            lease = self._cache.lease(entry, manifest.size_bytes, download, waiting)
            try:
                verify_folder(lease.folder, manifest, lease.folder.parent / _MARK, progress)
            except BaseException:
                lease.release()
                raise
            return lease

        entry = _entry(manifest, stored)
        try:
            return self._keep(lease_verified())
        except CorruptModel:  # damaged on this disk, or in the store: fetching anew tells
            self._cache.discard(entry)
            return self._keep(lease_verified())

    def _keep(self, lease: Lease) -> Path:
        with self._lock:
            if str(lease.folder) in self._leases:  # one lock per folder is enough
                lease.release()
            else:
                self._leases[str(lease.folder)] = lease
        return lease.folder


def _entry(manifest: Manifest, stored: StoredVersion) -> str:
    """A folder name for one import's bytes."""
    return f"{manifest.name}-{manifest.version}-{stored.upload[:12]}"


def open_registry(
    url: str, *, home: Path, settings: RegistrySettings, clock: Clock | None = None
) -> Registry:
    """The registry at ``url`` (empty: the folder ``registry`` in ``home``), its local copies in
    ``home/cache/models``. Creates nothing until something is written. Raises BadSetting."""
    return Registry(
        open_store(url or str(home / "registry")),
        cache_dir=home / "cache" / "models",
        cache_bytes=settings.cache_mb << 20,
        clock=clock or SystemClock(),
    )
