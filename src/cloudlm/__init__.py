"""cloudlm: from a model file to a secured, elastic service."""

__version__ = "0.1.0"
