"""Results of comparisons that never took place, for the report to be tried on."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path
from typing import Any

from eval.compare.results import Bucket, CurvePoint, Extrapolated, ModelResult, Published, Results, Run, Tested

ENTROPY = 1.55  # bits a byte that the invented text cannot be said in less than
BYTES_PER_TOKEN = 2.9
ARCHITECTURES: dict[str, tuple[str, str, float]] = {
    "xlstm": ("xLSTM[1:1]", "xlstm", 0.00),
    "mlstm": ("xLSTM[1:0]", "xlstm", 0.02),
    "transformer": ("Transformer", "transformer", 0.05),
    "mamba1": ("Mamba", "mamba", 0.03),
    "mamba2": ("Mamba-2", "mamba", 0.015),
    "gated_deltanet": ("Gated DeltaNet", "fla", 0.01),
    "lstm": ("LSTM", "lstm", 0.12),
    "gru": ("GRU", "lstm", 0.15),
    "rnn": ("Plain RNN", "lstm", 0.45),
}
"""Label, family, and how many bits a byte it is behind at the first size."""
SIZES = {"1m": 1.0e6, "8m": 8.5e6}
RATES = (1e-3, 3e-3, 1e-2)
ENVIRONMENT = {
    "date": "2026-11-21T06:00:00+00:00",
    "git_commit": "cb8a9dc0a0c7f34a39d1bbfa0c28c74d3a6a1b9e",
    "python": "3.11.7",
    "torch": "2.13.0+cpu",
    "triton": "3.9.0",
    "device": "cpu",
    "device_name": "Intel(R) Xeon(R) Processor @ 2.50GHz, 2 processors, AVX512",
    "threads": 1,
}
SESSION = {
    "git_commit": ENVIRONMENT["git_commit"],
    "python": "3.11.7",
    "versions": {"torch": "2.13.0+cpu", "deepspeed": "0.19.8"},
    "device": "Intel(R) Xeon(R) Processor @ 2.50GHz",
    "processes": 1,
    "torch_threads": 1,
}


def make_run(
    name: str,
    seed: int,
    bits: float,
    *,
    rate: float = 3e-3,
    status: str = "finished",
    problem: str = "",
    speed: float = 10_000.0,
    flops: float = 6e6,
    tested: bool = True,
    context: int = 256,
    forgets: float = 0.0,
) -> Run:
    """A run that ends at `bits` a byte. `forgets` is what it loses each time the context doubles beyond training."""
    noise = random.Random(f"{name} {seed}")
    curve = []
    steps = 2000 if status == "finished" else 900
    for step in range(100, steps + 1, 100):
        tokens = step * 4096
        at = bits + 1.9 * (step / 100) ** -0.75 - 1.9 * 20**-0.75 + noise.gauss(0, 0.004)
        at = bits if step == 2000 else at
        loss = at * math.log(2) * BYTES_PER_TOKEN
        seconds = tokens / speed
        curve.append(
            CurvePoint(
                step=step,
                tokens=tokens,
                flops=flops * tokens,
                seconds=seconds,
                loss=loss,
                bits_per_byte=at,
                perplexity=math.exp(loss),
            )
        )
    return Run(
        name=name,
        seed=seed,
        learning_rate=rate,
        status=status,
        problem=problem,
        steps=steps,
        tokens=steps * 4096,
        seconds=steps * 4096 / speed,
        tokens_per_second=speed,
        curve=curve if status != "missing" else [],
        tested=make_tested(bits, context, forgets) if tested and status == "finished" else None,
        environment=dict(SESSION) if status != "missing" else {},
    )


def make_tested(bits: float, context: int, forgets: float) -> Tested:
    """The test of a model that says the text in `bits` a byte."""

    def loss(bits_per_byte: float) -> float:
        return bits_per_byte * math.log(2) * BYTES_PER_TOKEN

    edges = [0, 16, 32, 64, 128, 256, 512, 1024, 2048]
    by_position = []
    for first, last in itertools.pairwise(edges):
        at = bits + 1.2 / (1 + first / 8) - 0.02 + forgets * max(0, math.log2(last / context))
        by_position.append(Bucket(first=first, last=last, tokens=last * 40, loss=loss(at), bits_per_byte=at))
    extrapolation = []
    for times in (0.5, 1, 2, 4, 8, 16):
        at = bits + 0.03 / times + forgets * max(0, math.log2(times))
        extrapolation.append(
            Extrapolated(
                context_length=int(context * times),
                times_trained=times,
                tokens=65_536,
                loss=loss(at),
                bits_per_byte=at,
                second_half_bits_per_byte=at - 0.01,
            )
        )
    return Tested(
        how="documents whole, state carried; the transformer in windows of 256 tokens, stride 128",
        tokens=245_000,
        bytes=int(245_000 * BYTES_PER_TOKEN),
        words=110_000,
        loss=loss(bits),
        perplexity=math.exp(loss(bits)),
        word_perplexity=math.exp(loss(bits) * 245 / 110),
        bits_per_byte=bits,
        by_position=by_position,
        extrapolation=extrapolation,
    )


def make_model(
    architecture: str,
    label: str,
    family: str,
    size: str,
    bits: list[float],
    *,
    parameters: int = 1_000_000,
    **of_run: Any,
) -> ModelResult:
    """A model whose seeds end at `bits`, tuned over `RATES`."""
    runs = [make_run(f"{architecture}-{size}-seed{seed}", seed, value, **of_run) for seed, value in enumerate(bits)]
    tried = [
        make_run(f"{architecture}-{size}-lr{rate:g}", 0, bits[0] + worse, rate=rate, **{**of_run, "tested": False})
        for rate, worse in zip(RATES, (0.04, 0.0, 0.09))
    ]
    state = {"transformer": lambda length: length * 2048}.get(family, lambda length: 48_000)
    return ModelResult(
        architecture=architecture,
        label=label,
        size=size,
        parameters=parameters,
        flops_per_token=of_run.get("flops", 6e6),
        state_bytes=[(length, state(length)) for length in (256, 1024, 4096, 16384)],
        recipe=f"family: {family}\nembedding_dim: 128\nnum_blocks: 4\n",
        tried=tried,
        learning_rate=3e-3,
        runs=runs,
        speed_name=f"{architecture}-{size}",
    )


def make_results(models: list[ModelResult], **more: Any) -> Results:
    """A comparison of these models, without measurements of speed."""
    values = {
        "name": "invented",
        "title": "Small language models on WikiText-2",
        "question": "Which architecture of one million parameters says English in the fewest bits?",
        "data": "WikiText-2 (CC BY-SA 3.0), 2.1 million words to train on; its test documents for the end.",
        "context_length": 256,
        "config": "name: invented\nseeds: [0, 1, 2]\n",
        "recipe": "optimizer:\n  weight_decay: 0.1\n",
        "environment": dict(ENVIRONMENT),
        "command": "python -m eval.compare --config configs/compare/invented.yaml",
        "models": models,
    }
    return Results(**{**values, **more})


def full_results() -> Results:
    """Nine architectures, two sizes, three seeds, all measurements, and a few things gone wrong."""
    noise = random.Random(0)
    models = []
    for place, (size, parameters) in enumerate(SIZES.items()):
        for index, (architecture, (label, family, behind)) in enumerate(ARCHITECTURES.items()):
            if size == "8m" and architecture == "rnn":
                continue
            bits = [ENTROPY + 0.3 - 0.22 * place + behind * (1 + 0.4 * place) + noise.gauss(0, 0.004) for _ in range(3)]
            models.append(
                make_model(
                    architecture,
                    label,
                    family,
                    size,
                    bits,
                    parameters=int(parameters * (1 + 0.002 * noise.random())),
                    speed=(14_000 - 900 * index) / (1 + 5 * place),
                    flops=parameters * (6.2 + 0.2 * index),
                    forgets={"transformer": 0.15, "mamba1": 0.02}.get(architecture, -0.004),
                )
            )
    by_name = {(model.architecture, model.size): model for model in models}
    by_name["rnn", "1m"].runs[1] = make_run(
        "rnn-1m-seed1", 1, 3.1, status="diverged", problem="The loss was not a number from step 900 on."
    )
    by_name["lstm", "8m"].runs[2] = make_run(
        "lstm-8m-seed2", 2, 1.9, status="unfinished", problem="It was stopped at step 900 of 2000."
    )
    by_name["gru", "8m"].runs[1:] = [
        make_run(f"gru-8m-seed{seed}", seed, 0, status="missing", problem="It has not been started.") for seed in (1, 2)
    ]
    best_at_edge = by_name["mamba2", "8m"]
    best_at_edge.learning_rate = RATES[0]
    best_at_edge.tried[0], best_at_edge.tried[1] = (
        make_run("mamba2-8m-lr0.001", 0, 1.64, rate=1e-3, tested=False),
        make_run("mamba2-8m-lr0.003", 0, 1.69, rate=3e-3, tested=False),
    )
    training, generation = _speeds(models)
    published = [
        Published(
            model=model,
            size="33M",
            tokens="2M, WikiText-2",
            quantity=f"word perplexity, {part}",
            value=value,
            source="Merity et al., arXiv 1708.02182, table 2",
        )
        for model, part, value in (("AWD-LSTM", "validation", 68.6), ("AWD-LSTM", "test", 65.8))
    ]
    return make_results(
        models,
        training_speed=training,
        generation_speed=generation,
        speed_environments={"training": dict(ENVIRONMENT), "generation": dict(ENVIRONMENT)},
        published=published,
        missing=[
            "Plain RNN at 8m: left out by the configuration.",
            "GRU at 8m, seeds 1 and 2: not started, for the time of the study was over.",
        ],
        notes=["Same tokens in the same order: the data fingerprints of all runs are equal within each size and seed."],
    )


def _speeds(models: list[ModelResult]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    training, generation = [], []
    for model in models:
        base = model.runs[0].tokens_per_second or 1.0
        quadratic = model.architecture == "transformer"
        for length in (256, 1024, 4096, 16384):
            speed = base * 1.3 / (1 + length / 2500 * quadratic)
            training.append(
                {
                    "name": model.speed_name,
                    "parameters": model.parameters,
                    "length": length,
                    "batch_size": 16384 // length,
                    "dtype": "float32",
                    "mode": "eager",
                    "kernels": "mlstm compiled, slstm compiled" if model.architecture == "xlstm" else "torch",
                    "milliseconds": 16384 / speed * 1e3,
                    "spread_milliseconds": 20.0,
                    "tokens_per_second": speed,
                    "ratio": 1.0,
                    "flops_share": speed * model.flops_per_token / 4e11,
                    "peak_bytes": None,
                    "problem": "",
                }
            )
        for length in (256, 1024, 4096):
            for batch in (1, 8):
                decode = 40 * math.sqrt(base) * batch**0.7 / (1 + length / 4000 * quadratic)
                generation.append(
                    {
                        "name": model.speed_name,
                        "parameters": model.parameters,
                        "length": length,
                        "batch_size": batch,
                        "new_tokens": 32,
                        "dtype": "float32",
                        "kernels": "torch",
                        "first_token_milliseconds": batch * length / base * 400 * (1 + length / 4000 * quadratic),
                        "first_token_spread": 1.5,
                        "tokens_per_second": decode,
                        "tokens_per_second_spread": decode * 0.03,
                        "state_bytes": batch * (length * 2048 if quadratic else 48_000),
                        "peak_bytes": None,
                        "problem": "",
                    }
                )
    return training, generation


def sparse_results() -> Results:
    """Two models of one size and one seed, no test, nothing measured."""
    first = make_model("xlstm", "xLSTM[1:1]", "xlstm", "1m", [1.85], tested=False)
    second = make_model("transformer", "Transformer", "transformer", "1m", [1.9], tested=False)
    for model in (first, second):
        model.tried, model.speed_name = [], ""
    return make_results([first, second], missing=["Speeds: not measured, for no machine was free."])


def main() -> None:
    """Write both reports to /tmp/invented, to be looked at: `python tests/eval/invented_results.py`."""
    from eval.compare.report.write import write_report

    for name, results in (("full", full_results()), ("sparse", sparse_results())):
        for path in write_report(results, Path("/tmp/invented") / name):
            print(path)


if __name__ == "__main__":
    main()
