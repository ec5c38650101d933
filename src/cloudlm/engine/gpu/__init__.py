"""What a step needs on a GPU: operations as Triton kernels, with a PyTorch twin, and graphs."""
