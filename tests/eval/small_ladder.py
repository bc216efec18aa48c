"""A ladder of tiny models on a short text, that trains in seconds."""

from __future__ import annotations

import json
from pathlib import Path

from eval.scaling_laws.design import Designer, DesignOptions, Span
from eval.scaling_laws.designed import Design, write_design

BATCH_TOKENS = 64


def write_recipe(folder: Path) -> Path:
    """A recipe of four rows of 16 bytes a step, on text that is easy to learn."""
    text = folder / "text.txt"
    text.write_text("".join(f"{number} and {number} make {2 * number}.\n" for number in range(2000)))
    source = {"kind": "text", "paths": [str(text)]}
    recipe = folder / "recipe.yaml"
    values = {
        "data": {
            "context_length": 16,
            "global_batch_size": 4,
            "num_workers": 0,
            "validation_tokens": 512,
            "sources": [source],
            "validation": [source],
        },
        "training": {"checkpoint_every": 20, "keep_checkpoints": 1, "gate_statistics_every": 0, "precision": "fp32"},
        "optimizer": {"learning_rate": 1e-2},
        "schedule": {"warmup": 4},
    }
    recipe.write_text(json.dumps(values))
    return recipe


def design_small(folder: Path, **choices) -> Design:
    """A written design of tiny LSTMs below `folder`."""
    defaults = {"architectures": ["lstm"], "sizes": Span(1e4, 4e4, 3), "tokens": Span(1280, 5120, 3)}
    options = DesignOptions(recipes=[write_recipe(folder)], out=folder / "ladder", **(defaults | choices))
    designer = Designer(options)
    design = designer.design()
    write_design(design, designer.configs)
    return design
