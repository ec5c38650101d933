"""Native kernels in the place of a network's own modules: what the runner asks, and when."""
