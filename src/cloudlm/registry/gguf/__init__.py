"""GGUF, llama.cpp's file of weights, settings and vocabulary: checked, put in our own terms."""
