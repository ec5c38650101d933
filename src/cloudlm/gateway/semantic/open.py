"""Making the semantic cache out of the settings and what was calibrated."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cloudlm.core.errors import BadSetting
from cloudlm.core.settings import GatewaySettings
from cloudlm.gateway.semantic import calibration
from cloudlm.gateway.semantic.deployed import DeployedEmbedder, Means
from cloudlm.gateway.semantic.index import Index
from cloudlm.gateway.semantic.likeness import BUILT_IN, BuiltInEmbedder, Embedder, Likeness
from cloudlm.telemetry.logs import get_logger

_log = get_logger(__name__)


def open_likeness(
    settings: GatewaySettings, home: Path, weights: Mapping[str, float], means: Means
) -> Likeness | None:
    """The semantic cache of a gateway. None, with a warning, if its calibration was made with
    other rules than this version's: nobody knows what it would do wrong. Raises BadSetting if
    there is no calibration, or one of another embedder, MissingExtra without numpy."""
    wanted = settings.semantic_embedder
    known = calibration.load(home)
    calibrate = f"run 'cloudlm cache calibrate --embedder {wanted}'"
    if known is None:
        raise BadSetting(
            "gateway.semantic_models is set, but nobody has measured how often such answers would "
            f"be wrong: {calibrate}, or empty the setting",
            param="gateway.semantic_models",
        )
    if known.embedder != wanted:
        raise BadSetting(
            f"gateway.semantic_embedder is {wanted!r}, but what was calibrated is "
            f"{known.embedder!r}: {calibrate}",
            param="gateway.semantic_embedder",
        )
    if known.rules != calibration.rules():
        _log.warning("semantic_cache_off", extra={"fields": {"reason": f"old rules: {calibrate}"}})
        return None
    embedder: Embedder = BuiltInEmbedder()
    if wanted != BUILT_IN:
        timeout_s = settings.semantic_timeout_s
        embedder = DeployedEmbedder(wanted, known.fingerprint, timeout_s, means)
    index = Index(settings.semantic_mb * 1024 * 1024, settings.cache_ttl_s, weights)
    return Likeness(known, settings.semantic_threshold, embedder, index, means.clock)
