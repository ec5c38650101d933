"""One model over several processes: split layers (tensor) and stages of layers (pipeline)."""
