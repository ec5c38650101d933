"""Keys with which services that are not ours are asked: kept privately, each for one origin alone.

A *secret* is a name for such a key. It lies in a file of mode 0600 in home, or in the variables
``CLOUDLM_SECRET_<NAME>`` and ``CLOUDLM_ORIGIN_<NAME>`` of the processes that use it. It is handed
out for its own scheme, host and port only, so that nobody who may write a deployment can have it
sent elsewhere. A changed file is used at once. Must not log or show a key.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cloudlm.core.errors import (
    CloudlmError,
    InvalidRequest,
    NotFound,
    StorageFailed,
    UpstreamFailed,
)
from cloudlm.core.external import check_secret_name, check_url, origin_of
from cloudlm.state.drafts import draft_of

MAX_KEY_LENGTH = 8192
KEY_VARIABLE = "CLOUDLM_SECRET_"
ORIGIN_VARIABLE = "CLOUDLM_ORIGIN_"
_Mark = tuple[int, int, int]


class NoCredential(UpstreamFailed):
    """The key for an endpoint is not there, or belongs to another address."""


@dataclass(frozen=True, slots=True)
class Credential:
    """One key. ``tenant`` is whose deployments may use it (empty: those of the installation),
    ``set_at`` Unix seconds (0: out of the environment)."""

    name: str
    origin: str
    value: str = field(repr=False)
    tenant: str = ""
    set_at: float = 0.0


class Credentials:
    """The secrets of an installation. ``folder`` is home's; variables of ``environment`` come
    before files."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._folder = folder
        self._environment = environment
        self._read: dict[str, tuple[_Mark, Credential]] = {}

    def key_for(self, name: str, url: str) -> str:
        """The key to send to ``url``. Raises NoCredential, which says why there is none, and
        StorageFailed."""
        found = self.find(name)
        if found is None:
            raise NoCredential(
                f"there is no secret {name!r} here; 'cloudlm secrets set {name} --for "
                f"{origin_of(url)}' keeps one"
            )
        if found.origin != origin_of(url):
            raise NoCredential(
                f"the secret {name!r} is for {found.origin} and not for {origin_of(url)}"
            )
        return found.value

    def find(self, name: str) -> Credential | None:
        """The secret of that name. Raises StorageFailed, and NoCredential for variables that do
        not make one."""
        check_secret_name(name)
        return self._from_environment(name) or self._from_file(name)

    def names(self) -> list[str]:
        """All names in home, sorted."""
        return sorted(path.stem for path in self._folder.glob("*.json"))

    def put(self, credential: Credential) -> None:
        """Keep a secret in home, in place of the one of its name. Raises InvalidRequest and
        StorageFailed."""
        check_secret_name(credential.name)
        check_key(credential.value)
        path = self._path(credential.name)
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with draft_of(path, json.dumps(asdict(credential)).encode()) as draft:
                draft.replace(path)
        except OSError as error:
            raise StorageFailed(f"cannot write {path}: {error.strerror}") from None

    def remove(self, name: str) -> None:
        """Forget a secret in home. Raises NotFound and StorageFailed."""
        try:
            self._path(check_secret_name(name)).unlink()
        except FileNotFoundError:
            raise NotFound(f"there is no secret {name!r} in this home") from None
        except OSError as error:
            raise StorageFailed(f"cannot remove the secret {name!r}: {error.strerror}") from None

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.json"

    def _from_environment(self, name: str) -> Credential | None:
        suffix = name.upper().replace("-", "_")
        value = self._environment.get(KEY_VARIABLE + suffix, "").strip()
        if not value:
            return None
        url = self._environment.get(ORIGIN_VARIABLE + suffix, "")
        try:
            return Credential(name, origin_of(check_url(url.rstrip("/"))), check_key(value))
        except InvalidRequest:
            raise NoCredential(
                f"{KEY_VARIABLE}{suffix} is set and must hold a key, and {ORIGIN_VARIABLE}{suffix} "
                "the address that it is for, such as https://api.example.com"
            ) from None

    def _from_file(self, name: str) -> Credential | None:
        path = self._path(name)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except FileNotFoundError:
            self._read.pop(name, None)
            return None
        except OSError as error:
            raise StorageFailed(f"cannot read the secret {name!r}: {error.strerror}") from None
        with os.fdopen(descriptor, "rb") as file:
            about = os.fstat(file.fileno())
            mark = (about.st_mtime_ns, about.st_size, about.st_ino)
            known = self._read.get(name)
            if known is not None and known[0] == mark:
                return known[1]
            if about.st_uid != os.getuid() or stat.S_IMODE(about.st_mode) & 0o077:
                raise StorageFailed(
                    f"the secret {name!r} can be read or written by others: 'chmod 600 {path}' as "
                    "the user that runs the gateway, and change the key if they may have read it"
                )
            try:
                credential = Credential(**json.loads(file.read()))
                check_key(credential.value)
            except (ValueError, TypeError, CloudlmError):
                raise StorageFailed(
                    f"the secret {name!r} is damaged; 'cloudlm secrets set {name}' writes it anew"
                ) from None
        self._read[name] = (mark, credential)
        return credential


def check_key(value: str) -> str:
    """Return ``value`` if a header can carry it. Raises InvalidRequest, which does not show it."""
    if not (0 < len(value) <= MAX_KEY_LENGTH and value.isascii() and value.isprintable()):
        raise InvalidRequest(
            f"a key must have 1 to {MAX_KEY_LENGTH} characters of printable ASCII", param="key"
        )
    if " " in value:
        raise InvalidRequest("a key holds no space; give it alone, without 'Bearer'", param="key")
    return value
