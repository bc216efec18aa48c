"""`xlstm-lm generate`: continue a prompt."""

from __future__ import annotations

import argparse
import os

from xlstm_lm.base import console
from xlstm_lm.base.fields import Count, NonNegative, PositiveRatio, Seed, argument


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the model, the prompt, and the fields of SamplingConfig."""
    parser.add_argument(
        "--model", required=True, metavar="FOLDER", help="A run, a checkpoint, an export, or an id on the hub."
    )
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="The text to continue.")
    parser.add_argument("--max-new-tokens", type=argument(Count), default=256, metavar="N", help="Default: 256.")
    parser.add_argument(
        "--temperature", type=argument(NonNegative), default=0.8, metavar="T", help="0 is greedy. Default: 0.8."
    )
    parser.add_argument(
        "--top-p", type=argument(PositiveRatio), default=0.95, metavar="P", help="Nucleus of the draw. Default: 0.95."
    )
    parser.add_argument("--seed", type=argument(Seed), default=0, metavar="S", help="Default: 0.")


def run(options: argparse.Namespace) -> None:
    """Print the continuation as it is generated."""
    import torch

    from xlstm_lm.models.generation import SamplingConfig, continue_text

    sampling = SamplingConfig(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
    )
    if not options.prompt:
        raise ValueError("--prompt is empty; give at least one character to continue.")
    try:
        prompt = os.fsencode(options.prompt).decode("utf-8")  # whatever the encoding of the locale
    except UnicodeDecodeError:
        raise ValueError(f"--prompt {options.prompt!a} is not UTF-8; give it as UTF-8 text.") from None
    from xlstm_lm.hub import load

    console.stage(f"loading {options.model}")
    trained = load(options.model)
    trained.to("cuda" if torch.cuda.is_available() else "cpu")
    console.end_stage()
    print(prompt, end="", flush=True)
    for text in continue_text(trained.model, trained.tokenizer, prompt, sampling):
        print(text, end="", flush=True)
    print()
