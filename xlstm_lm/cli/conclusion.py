"""Result of a finished run, a sample of its text, and the commands that continue with it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from xlstm_lm.base import console
from xlstm_lm.base.durable_files import RunError
from xlstm_lm.base.finite import NotFiniteError
from xlstm_lm.parallel.launcher import program_command
from xlstm_lm.runs.folder import RunFolder

SAMPLE_PROMPT = "def "  # beginning of the sample at the end of a run
SAMPLE_TOKENS = 400


def conclude(run_dir: Path, recipes: list[str], overrides: dict[str, Any]) -> None:
    """Print the results of a finished run, a sample, and commands to continue with.

    Args:
        run_dir: Folder of the run.
        recipes: Recipes that the run was started with.
        overrides: Values of the flags that it was started with, by field: {"training.steps": 200}.

    Raises:
        RunError: The run has diverged.
    """
    from xlstm_lm.hub import load
    from xlstm_lm.models.generation import SamplingConfig, continue_text

    folder = RunFolder(run_dir)
    final, step = folder.last_validation(), max(folder.checkpoints())
    numbers = {"bits per byte": "bits_per_byte", "nats a token": "loss"}
    shown = [f"{final[key]:.4f} {unit}" for unit, key in numbers.items() if final and final.get(key) is not None]
    if final:
        console.say(f"\nFinal validation: {', '.join(shown) or 'not finite'}")
    trained = load(run_dir)
    sampling = SamplingConfig(max_new_tokens=SAMPLE_TOKENS)
    try:
        text = "".join(continue_text(trained.model, trained.tokenizer, SAMPLE_PROMPT, sampling))
        problem = "Its validation loss is not finite." if final and final.get("loss") is None else ""
    except NotFiniteError as error:
        problem = str(error)
    if problem:
        raise RunError(
            f"The run has diverged by step {step}. {problem} All of it is kept, the last checkpoint is "
            f"{trained.folder}. Start a new run, in another training.run_dir, with a lower optimizer.learning_rate."
        )
    folder.add_sample(step, SAMPLE_PROMPT, text)
    console.say(f"\nA sample:\n{SAMPLE_PROMPT}{text}")
    again = [part for recipe in recipes for part in ("--config", recipe)]
    longer = overrides | {"training.steps": 2 * step}
    again += [part for name, value in longer.items() for part in (f"--{name}", _as_flag(value))]
    program, name = program_command(), str(run_dir)
    console.say(f"\nLearning curve: {folder.curve_path}")
    console.say(f"Resume, longer:   {shlex.join([*program_command(launched=True), 'train', *again])}")
    console.say(f"Generate:         {shlex.join([*program, 'generate', '--model', name, '--prompt', SAMPLE_PROMPT])}")
    console.say(f"Export:           {shlex.join([*program, 'export', '--run', name, '--out', f'{name}-export'])}")


def _as_flag(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
