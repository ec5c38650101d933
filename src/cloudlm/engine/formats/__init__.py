"""How models lie on disk: each format's tensors under the names of the network's parameters."""
