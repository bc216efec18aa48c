"""From sources of documents to packed rows of tokens, in an order that does not depend on the number of ranks."""

from xlstm_lm.data.batch import IGNORED_TARGET, Batch
from xlstm_lm.data.bpe import train_bpe
from xlstm_lm.data.config import DataConfig
from xlstm_lm.data.sources import SourceConfig, open_source
from xlstm_lm.data.stream import TrainingStream
from xlstm_lm.data.tokenizer import Tokenizer, TokenizerConfig, build_tokenizer, load_tokenizer
from xlstm_lm.data.training_data import DocumentData, TrainingData
from xlstm_lm.data.validation import validation_batches

__all__ = [
    "IGNORED_TARGET",
    "Batch",
    "DataConfig",
    "DocumentData",
    "SourceConfig",
    "Tokenizer",
    "TokenizerConfig",
    "TrainingData",
    "TrainingStream",
    "build_tokenizer",
    "load_tokenizer",
    "open_source",
    "train_bpe",
    "validation_batches",
]
