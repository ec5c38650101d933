"""Finds the store for an address, ours or a plug-in's. Must not import one by itself."""

from __future__ import annotations

import re
from typing import cast

from cloudlm.core.errors import BadSetting
from cloudlm.core.plugins import installed, load
from cloudlm.registry.stores.base import Store

_GROUP = "cloudlm.stores"
_OBJECT_SCHEMES = ("s3", "gs", "az", "oss", "http", "https")


def open_store(url: str) -> Store:
    """The store at ``url``: a path or ``file://``, ``s3://``, ``gs://``, ``az://``, ``oss://``,
    ``http(s)://``, or the scheme of an installed plug-in of the group ``cloudlm.stores``.

    Raises BadSetting for an address that no store understands.
    """
    match = re.match(r"([a-zA-Z][a-zA-Z0-9+.-]*)://", url)
    scheme = match[1].lower() if match else "file"
    name = "object" if scheme in _OBJECT_SCHEMES else scheme
    known = [plugin.name for plugin in installed(_GROUP)]
    if name not in known:
        raise BadSetting(
            f"no store for {url!r}: expected a folder, file://, "
            f"{', '.join(f'{s}://' for s in _OBJECT_SCHEMES)} or a plug-in's scheme "
            f"(installed: {', '.join(known) or 'none'})"
        )
    return cast(Store, load(_GROUP, name)(url))
