"""Train xLSTM language models, and compare them with transformers, Mamba and classical LSTMs."""

from xlstm_lm.base.threads import bound_spinning

__version__ = "0.1.0"

bound_spinning()  # before anything imports torch
