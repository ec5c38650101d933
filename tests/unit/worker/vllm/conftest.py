"""A replica whose vLLM is the mock server."""

from __future__ import annotations

from vllm_bench import bench, options

__all__ = ["bench", "options"]
