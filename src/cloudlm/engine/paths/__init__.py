"""The ways to compute hidden states and logits: PyTorch's modules or the native kernels."""
