"""Autotuning of the launches of the mLSTM's Triton kernels: off, unless XLSTM_LM_AUTOTUNE=1 is in the environment when
this is imported.

The first call at each head size, type and processor then times a few launches of each kernel on the tensors of that
call, drops those that do not run or do not agree with the one of `triton_launch.TABLE`, and uses the fastest from then
on. It is kept on the node, in PATH, by kernel, sizes, type, processor and version of Triton; delete that file to start
over. Other launches round differently: the ranks of a run share one rank's (`training.kernel_check`).
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from torch import Tensor

from xlstm_lm.base.announce import announce_once
from xlstm_lm.base.node_folder import node_local_folder
from xlstm_lm.ops.mlstm.triton_launch import TUNED, Launch

ENABLED = os.environ.get("XLSTM_LM_AUTOTUNE") == "1"
PATH = (node_local_folder() or Path.home() / ".cache" / "xlstm_lm") / "triton_launches.json"
AGREEMENT = 2e-2
"""Largest difference from the result of the table's launch, relative to its largest entry; other sums round."""

Run = Callable[[Launch], Tensor]


def best_launch(kernel: str, launch: Launch, sizes: tuple[int, ...], like: Tensor, run: Run) -> Launch:
    """`launch`, the table's, or the one found the fastest for the kernel of that name on heads of these sizes.

    `run` runs the kernel and returns its result; `like` has the type and is where it runs.
    """
    if not ENABLED or like.device.type != "cuda":
        return launch
    processor = torch.cuda.get_device_name(like.device)
    key = f"{kernel} {'x'.join(map(str, sizes))} {like.dtype} {processor} triton {triton.__version__}"
    if key not in TUNED:
        announce_once(
            f"XLSTM_LM_AUTOTUNE=1: the first call at each head size tries launches of the mLSTM's kernels, which takes "
            f"some minutes; what is found is kept in {PATH}."
        )
        TUNED.update(_read() | TUNED)
    if key not in TUNED:
        TUNED[key] = choose(candidates(launch), run, triton.testing.do_bench)
        _write(TUNED)
    return TUNED[key]


def candidates(launch: Launch) -> list[Launch]:
    """The launch and its neighbours: another depth of the pipeline, half the columns, parts, or warps, or twice."""
    block_k, block_v, warps, stages = launch
    neighbours = [
        launch,
        Launch(block_k, block_v, warps, 1),
        Launch(block_k, block_v, warps, 3),
        Launch(2 * block_k, block_v, warps, stages),
        Launch(block_k // 2, block_v, warps, stages),
        Launch(block_k, block_v // 2, warps, stages),
        Launch(block_k, block_v // 2, warps // 2, stages),
        Launch(block_k, block_v, 2 * warps, stages),
    ]
    allowed = [each for each in neighbours if min(each[:2]) >= 16 and 4 <= each.warps <= 16]
    return list(dict.fromkeys(allowed))


def choose(launches: list[Launch], run: Run, time: Callable[[Callable[[], Tensor]], float]) -> Launch:
    """The fastest of `launches` by `time`, of those that run and agree with the first."""
    right = run(launches[0]).float()
    times = {launches[0]: time(lambda: run(launches[0]))}
    for launch in launches[1:]:
        with contextlib.suppress(Exception):  # too much shared memory, or a compiler that gives up
            if not (run(launch).float() - right).abs().max() <= AGREEMENT * right.abs().max():
                continue
            times[launch] = time(functools.partial(run, launch))
    return min(times, key=times.__getitem__)


def _read() -> dict[str, Launch]:
    """The launches that earlier processes found; none where the file is missing or no longer makes sense."""
    try:
        return {key: Launch(*map(int, each)) for key, each in json.loads(PATH.read_text()).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as problem:
        announce_once(f"The kernels' launches in {PATH} cannot be read ({problem}): they are tuned again.")
        return {}


def _write(found: dict[str, Launch]) -> None:
    """Keep these launches beside those that other processes found meanwhile; the file is replaced as a whole."""
    try:
        PATH.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=PATH.parent, suffix=".json", delete=False) as file:
            json.dump(_read() | found, file, indent=1)
        Path(file.name).replace(PATH)
    except OSError as problem:
        announce_once(f"The kernels' launches cannot be kept in {PATH} ({problem}): each process tunes them again.")
