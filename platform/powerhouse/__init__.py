"""Train, evaluate, compress and serve language models on one Ray cluster, in plain PyTorch."""

__version__ = "0.1.0"
