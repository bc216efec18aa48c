"""The small models that the studies are tried on."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from tests.eval.small_models import TEXT, save_own, save_stock
from xlstm_lm.data import train_bpe
from xlstm_lm.data.tokenizer import CONFIG_FILE


@pytest.fixture(scope="session")
def own_folder(tmp_path_factory) -> Path:
    """An export of xlstm-lm."""
    return save_own(tmp_path_factory.mktemp("own"))


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> Path:
    """A BPE as transformers keeps it, without the marks of xlstm-lm."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_text(TEXT)
    train_bpe([str(folder / "text.txt")], vocab_size=300, out=folder / "bpe")
    (folder / "bpe" / CONFIG_FILE).unlink()
    return folder / "bpe"


@pytest.fixture(scope="session")
def stock_folder(tmp_path_factory, tokenizer_folder):
    """Folder of a stock model by kind: llama, misfit, gpt2, mamba, mamba2 or xlstm."""
    transformers.utils.is_xlstm_available = lambda: False  # else its module wants mlstm_kernels beside the package
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = save_stock(kind, tmp_path_factory.mktemp(kind), tokenizer_folder)
        return made[kind]

    return make
