"""See: structured logs, metrics with bounded labels."""
