"""The installation's folder: where state, registry, logs and secrets lie on this machine.

Reads the settings' file and environment, and makes the two secrets of an installation on first
use: the pepper of key digests and the token that opens workers. Both are files of mode 0600.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cloudlm.core.errors import BadSetting, StorageFailed
from cloudlm.core.settings import SettingRow, Settings, read_settings
from cloudlm.core.yaml_text import NotYaml, parse_yaml
from cloudlm.state.drafts import draft_of

PEPPER_BYTES = 32
MIN_TOKEN_CHARACTERS = 32


def load_settings(
    flags: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None
) -> tuple[Settings, list[SettingRow]]:
    """The settings of this process: ``config.yaml`` in home < environment < flags.

    ``CLOUDLM_CONFIG`` names another file. Raises BadSetting for an unreadable file or value.
    """
    environ = os.environ if environ is None else environ
    named = environ.get("CLOUDLM_CONFIG")
    path = settings_path(flags, environ)
    tree = _read_tree(path, required=bool(named))
    if not named and "home" in tree:
        # Processes are told the home and would look for another file there.
        raise BadSetting(
            f"the settings file {path} lies in the home and cannot name another; set CLOUDLM_HOME "
            "or --home, or name a file elsewhere with CLOUDLM_CONFIG",
            param="home",
        )
    return read_settings(tree, environ, flags, file_name=str(path))


def settings_path(
    flags: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None
) -> Path:
    """The file that ``load_settings`` reads, whether it is there or not. Raises BadSetting."""
    environ = os.environ if environ is None else environ
    if named := environ.get("CLOUDLM_CONFIG"):
        return Path(named)
    home = (flags or {}).get("home") or environ.get("CLOUDLM_HOME") or Settings().home
    return _expanded(home) / "config.yaml"


def read_yaml(path: Path, what: str) -> Any:
    """The content of a YAML file. Raises BadSetting naming ``what`` it is and where the fault."""
    try:
        return parse_yaml(path.read_bytes())
    except OSError as error:
        raise BadSetting(f"the {what} {path} cannot be read: {error.strerror}") from None
    except NotYaml as error:
        raise BadSetting(f"the {what} {path} is not YAML: {error}") from None


def _read_tree(path: Path, *, required: bool) -> dict[str, Any]:
    if not required and not path.exists():
        return {}
    tree = read_yaml(path, "settings file")
    if not isinstance(tree, dict | None):
        raise BadSetting(f"the settings file {path} must hold a mapping of settings")
    return tree or {}


def _expanded(path: str | Path) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise BadSetting(
            f"the home {str(path)!r} begins with '~', and that user has no folder; give another "
            "with CLOUDLM_HOME or --home",
            param="home",
        ) from None


class Home:
    """The folder of one installation. Nothing is touched until ``ensure``."""

    def __init__(self, path: str | Path) -> None:
        self.path = _expanded(path).absolute()

    @property
    def run(self) -> Path:
        """State of running replicas and the control's lock."""
        return self.path / "run"

    @property
    def logs(self) -> Path:
        """Output of replicas and of the processes that ``cloudlm up`` starts."""
        return self.path / "logs"

    @property
    def tls(self) -> Path:
        """Certificates and keys that the installation makes for itself."""
        return self.path / "tls"

    def ensure(self) -> Home:
        """Create the folders, readable by their owner alone. Raises StorageFailed."""
        for folder in (self.path, self.run, self.logs, self._secrets):
            try:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise StorageFailed(
                    f"cannot create {folder}: {error.strerror}. Give another folder with "
                    "CLOUDLM_HOME or --home, or make this one writable"
                ) from None
        return self

    def state_url(self, settings: Settings) -> str:
        """Where the state lives: the setting, or SQLite in home."""
        if not settings.state.url and "?" in str(self.path):
            raise BadSetting(f"the home {self.path} holds a '?', which ends a database address")
        return settings.state.url or f"sqlite:///{self.path / 'state.db'}"

    def registry_url(self, settings: Settings) -> str:
        """Where versions live: the setting, or a folder in home."""
        return settings.registry.url or str(self.path / "registry")

    def pepper(self) -> bytes:
        """The secret that key digests are made with; created on first use."""
        text = self._secret("pepper", secrets.token_hex(PEPPER_BYTES))
        try:
            pepper = bytes.fromhex(text)
        except ValueError:
            pepper = b""
        if len(pepper) != PEPPER_BYTES:
            raise self._damaged("pepper")
        return pepper

    def worker_token(self) -> str:
        """The bearer token that workers of this installation demand; created on first use."""
        token = self._secret("worker-token", secrets.token_urlsafe(32))
        if len(token) < MIN_TOKEN_CHARACTERS or not token.isprintable():
            raise self._damaged("worker-token")
        return token

    def audit_seed(self) -> bytes:
        """The secret half of the key that signs audit checkpoints; created on first use."""
        text = self._secret("audit-key", secrets.token_hex(PEPPER_BYTES))
        try:
            seed = bytes.fromhex(text)
        except ValueError:
            seed = b""
        if len(seed) != PEPPER_BYTES:
            raise self._damaged("audit-key")
        return seed

    @property
    def audit_checkpoints(self) -> Path:
        """Where signed checkpoints are kept beside the state, one line each."""
        return self.path / "audit-checkpoints.jsonl"

    @property
    def credentials(self) -> Path:
        """Keys of providers of external endpoints, a file each."""
        return self._secrets / "endpoints"

    @property
    def _secrets(self) -> Path:
        return self.path / "secrets"

    def _damaged(self, name: str) -> StorageFailed:
        return StorageFailed(
            f"the secret {self._secrets / name} is damaged: restore it from a copy, or remove it "
            "to have a new one made (keys made with a lost pepper are then refused)"
        )

    def _secret(self, name: str, fresh: str) -> str:
        """Read a secret, or write ``fresh`` if there is none; the first of two writers wins."""
        path = self._secrets / name
        try:
            if not path.exists():
                with (
                    draft_of(path, fresh.encode("ascii")) as draft,
                    contextlib.suppress(FileExistsError),
                ):
                    os.link(draft, path)
            return path.read_text("ascii").strip()
        except UnicodeDecodeError:
            raise self._damaged(name) from None
        except OSError as error:
            raise StorageFailed(
                f"cannot read or write the secret {path}: {error.strerror}. "
                "Make the folder writable for this user, or give another with CLOUDLM_HOME"
            ) from None
