"""Train xLSTM language models, and compare them with transformers, Mamba and classical LSTMs."""

__version__ = "0.1.0"
