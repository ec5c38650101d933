"""Generates tokens: continuous batching over a paged key-value cache. Knows nothing of HTTP."""
