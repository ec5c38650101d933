"""Brings a model from the Hugging Face hub (or a mirror, ``HF_ENDPOINT``) into a local folder.

Through ``huggingface_hub`` and its own cache (``HF_HOME``), so that what other tools have
downloaded is used and an interrupted download goes on. Only files of safe kinds are asked for.
Must not judge what arrived: that is the inspection's.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from cloudlm.core.errors import (
    AuthenticationFailed,
    CloudlmError,
    InvalidRequest,
    MissingExtra,
    ModelNotFound,
    PermissionDenied,
    Unavailable,
)
from cloudlm.registry.policy import SAFE_PATTERNS
from cloudlm.registry.stores.failures import storage_failure
from cloudlm.registry.verify import Progress

_ADDRESS = re.compile(
    r"(?:hf://)?(?P<repo>[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96})(?:/(?P<file>[\w.-]{1,120}\.gguf))?"
    r"(?:@(?P<revision>[\w./-]{1,96}))?/?",
    re.ASCII,
)
DEFAULT_ENDPOINT = "https://huggingface.co"


@dataclass(frozen=True, slots=True)
class HubAddress:
    """A repository ``org/name`` and a branch, tag or commit (None is the default branch); ``file``
    is the one GGUF file that is meant, None for the repository's safetensors."""

    repo: str
    revision: str | None
    file: str | None = None

    def __str__(self) -> str:
        path = f"hf://{self.repo}" + (f"/{self.file}" if self.file else "")
        return path + (f"@{self.revision}" if self.revision else "")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A downloaded repository: where it lies and which commit it is."""

    folder: Path
    commit: str


class Download(Protocol):
    """The part of ``huggingface_hub.snapshot_download`` that is used here."""

    def __call__(self, repo_id: str, **options: Any) -> str: ...


def parse_hub_address(text: str) -> HubAddress:
    """Read ``hf://org/name[/file.gguf][@revision]``; ``hf://`` may be left out. Raises
    InvalidRequest."""
    match = _ADDRESS.fullmatch(text)
    if match is None or ".." in text or "--" in match["repo"]:
        raise InvalidRequest(
            f"{text[:120]!r} is not a hub address: expected hf://org/name or hf://org/name@revision",
            param="model",
        )
    return HubAddress(match["repo"], match["revision"], match["file"])


def fetch_from_hub(
    address: HubAddress, progress: Progress | None = None, download: Download | None = None
) -> Snapshot:
    """Download the safe files of a repository, or find them in the hub's local cache.

    Raises Unavailable without a network, ModelNotFound (no such repository or revision),
    PermissionDenied (gated), AuthenticationFailed (bad token), MissingExtra, StorageFailed.
    """
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or DEFAULT_ENDPOINT
    fetch = download or _library_download()
    options: dict[str, Any] = {
        "revision": address.revision,
        "allow_patterns": list(SAFE_PATTERNS if address.file is None else _beside(address.file)),
        "endpoint": endpoint,
        "local_files_only": _is_offline(),
        "library_name": "cloudlm",
    }
    if download is None:
        options["tqdm_class"] = _bar_class(_reporter(progress, address))
    try:
        folder = Path(fetch(address.repo, **options))
    except CloudlmError:  # a progress callback that cancels
        raise
    except Exception as error:
        raise _translate(error, address, endpoint) from error
    commit = folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else ""
    return Snapshot(folder, commit)


def _beside(file: str) -> tuple[str, ...]:
    """What is wanted of a repository of GGUF files: one, and what is said about it."""
    return (file, "README.md", "LICENSE*", "NOTICE*")


def _is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")


def _library_download() -> Download:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise MissingExtra("engine", "downloading from the Hugging Face hub") from None
    return cast(Download, snapshot_download)


def _reporter(progress: Progress | None, address: HubAddress) -> Callable[[int, int], None]:
    def report(done_bytes: int, total_bytes: int) -> None:
        if progress is not None:
            progress(done_bytes, max(done_bytes, total_bytes), f"downloading {address.repo}")

    return report


def _bar_class(report: Callable[[int, int], None]) -> Any:
    """A progress bar for the library that draws nothing and reports bytes to ``report``."""
    from huggingface_hub import utils

    base: Any = utils.tqdm  # type: ignore[attr-defined]

    class Bar(base):  # type: ignore[misc]
        monitor_interval = 0  # no watching thread

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._counts_bytes = kwargs.get("unit") == "B"
            self._is_transfer = "transfer" in str(kwargs.get("name", ""))
            kwargs.update(file=io.StringIO(), disable=False, mininterval=0.2)
            super().__init__(*args, **kwargs)

        def update(self, n: float | None = 1) -> Any:
            shown = super().update(n)
            if self._counts_bytes and not self._is_transfer:
                report(int(self.n), int(self.total or 0))
            return shown

    return Bar


def _translate(error: Exception, address: HubAddress, endpoint: str) -> CloudlmError:
    """Judged by class names and status, so that a fake downloader needs no library."""
    names = {cls.__name__ for cls in type(error).__mro__}
    status = getattr(getattr(error, "response", None), "status_code", None)
    if "GatedRepoError" in names or status == 403:
        return PermissionDenied(
            f"{address}: access is restricted; accept the model's terms at "
            f"{endpoint}/{address.repo} and set HF_TOKEN"
        )
    if "RevisionNotFoundError" in names:
        return ModelNotFound(f"{address}: the hub has no such revision", param="model")
    if "RepositoryNotFoundError" in names or status == 404:
        return ModelNotFound(
            f"{address}: the hub at {endpoint} has no such model, or it is private (set HF_TOKEN)",
            param="model",
        )
    if "HFValidationError" in names or "RevisionResolutionError" in names:
        return InvalidRequest(f"{address} is not a valid hub address: {error}", param="model")
    if status == 401:
        return AuthenticationFailed(f"{address}: the hub refused the token; check HF_TOKEN")
    if _is_offline():
        return Unavailable(
            f"no network: HF_HUB_OFFLINE is set and {address.repo} is not in the hub's local "
            "cache; give a folder or a registered model"
        )
    if names & _UNREACHABLE:
        return Unavailable(
            f"no network: cannot reach {endpoint} for {address.repo}; give a folder or a "
            "registered model"
        )
    if isinstance(error, OSError) and error.errno:
        return storage_failure(error, error.filename or "the hub's local cache", "write")
    reason = " ".join(str(error).split())[:200]
    return Unavailable(f"downloading {address} from {endpoint} failed: {reason}")


_UNREACHABLE = {
    "LocalEntryNotFoundError", "ConnectError", "ConnectTimeout", "ConnectionError", "ProxyError",
    "TimeoutException", "NetworkError", "OfflineModeIsEnabled",
}  # fmt: skip
