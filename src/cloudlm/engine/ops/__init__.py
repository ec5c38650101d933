"""Tensor operations that every architecture shares: norms, rotary positions, paged attention."""
