"""Small models of xlstm-lm and of transformers in folders; their answers depend on earlier tokens."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from xlstm_lm import hub
from xlstm_lm.data import TokenizerConfig, build_tokenizer
from xlstm_lm.models import XLSTMConfig, build_model

TEXT = "The quick brown fox jumps over the lazy dog, and the dog sleeps on.\n" * 40


def shake(module: torch.nn.Module) -> torch.nn.Module:
    """Give every parameter some noise: fresh models hardly look at their context."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def save_own(folder: Path, format_name: str = "xlstm_lm", **changes) -> Path:
    """An export of xlstm-lm over bytes: mLSTM and sLSTM, with the `changes`."""
    build_tokenizer(TokenizerConfig()).save(folder / "source" / "tokenizer")
    torch.manual_seed(0)
    sizes = {"vocab_size": 257, "embedding_dim": 32, "num_blocks": 2, "num_heads": 2, "pattern": ["mlstm", "slstm"]}
    trained = hub.TrainedModel(shake(build_model(XLSTMConfig(**(sizes | changes)))), folder / "source")
    return hub.save_export(trained, folder / "export", format_name)


def save_stock(kind: str, folder: Path, tokenizer_folder: Path) -> Path:
    """A model of transformers' own with random weights, and its tokenizer."""
    torch.manual_seed(0)
    if kind in ("llama", "misfit"):  # the second has fewer tokens than the tokenizer
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = transformers.LlamaConfig(
            vocab_size=300 if kind == "llama" else 280, max_position_embeddings=64, **sizes
        )
        module = transformers.LlamaForCausalLM(config)
    elif kind == "gpt2":
        ends = {"bos_token_id": None, "eos_token_id": None}
        config = transformers.GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=64, **ends)
        module = transformers.GPT2LMHeadModel(config)
    elif kind == "mamba2":
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "num_heads": 4, "head_dim": 16}
        module = transformers.Mamba2ForCausalLM(
            transformers.Mamba2Config(vocab_size=300, n_groups=1, chunk_size=16, **sizes)
        )
    elif kind == "mamba":
        config = transformers.MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, state_size=4)
        module = transformers.MambaForCausalLM(config)
    else:
        sizes = {"hidden_size": 128, "embedding_dim": 128, "num_hidden_layers": 2, "num_blocks": 2, "num_heads": 2}
        module = transformers.xLSTMForCausalLM(transformers.xLSTMConfig(vocab_size=300, **sizes))
    shake(module).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
    return folder
