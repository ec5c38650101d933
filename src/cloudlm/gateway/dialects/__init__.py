"""One file per API spoken to clients. A dialect reads and writes bytes; it decides nothing."""
