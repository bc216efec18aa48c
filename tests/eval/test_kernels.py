"""The kernel benchmark runs, reports what it measured, and gets over contenders that are wrong, crash or hang."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from eval import kernels
from eval.bench.kernel_cases import MLSTM, SLSTM, Contender, GatedDelta, MLSTMStep, gpu_cases
from eval.bench.measure import TOGETHER, Ceilings, _cycles, measure, summarize
from eval.bench.peers import PEERS, torch_lstm
from eval.study.journal import Journal, run_in_children, supervise
from xlstm_lm.ops.mlstm import MLSTM as MLSTM_OPERATION
from xlstm_lm.ops.mlstm import mlstm
from xlstm_lm.ops.mlstm.chunkwise import mlstm_chunkwise
from xlstm_lm.ops.selfcheck import errors

SMALL = MLSTM(
    device="cpu", dtype=torch.float32, B=1, T=80, H=2, K=8, V=16, attention_heads=2, attention_dim=16, backward=True
)
CEILINGS = Ceilings(1e10, 1e11)


def test_the_benchmark_prints_tables_and_writes_json_and_a_picture(tmp_path, capsys):
    out = tmp_path / "kernels.json"
    kernels.main(["--device", "cpu", "--rounds", "1", "--lengths", "64", "100", "--only", "mlstm", "--out", str(out)])
    written = json.loads(out.read_text())
    rows = written["rows"]
    printed = capsys.readouterr().out
    assert {"causal attention (SDPA)", "mlstm / compiled", "mlstm / chunkwise"} <= {row["name"] for row in rows}
    for row in rows:
        assert f"| {row['name']} | {row['milliseconds']:.3f} ± " in printed and row["sizes"] in printed
        assert row["error"] < 1e-4 and row["gradient_error"] < 1e-4 and not row["problem"]
        assert row["teraflops"] > 0 and row["gigabytes"] > 0 and row["roofline_share"] > 0
    assert written["environment"]["torch"] == torch.__version__ and written["environment"]["git_commit"]
    assert written["ceilings"]["bytes_per_second"] > 1e8
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_the_gated_delta_rule_equals_that_of_transformers():
    case = GatedDelta(device="cpu", dtype=torch.float32, B=1, T=80, H=2, K=8, V=16)
    rows = kernels.run_case(case, Journal(), 1, CEILINGS)
    assert [row.name for row in rows] == [
        "transformers / Qwen3-Next",
        "gated_delta / compiled",
        "gated_delta / chunkwise",
    ]
    assert all(row.error < 1e-5 and row.gradient_error < 1e-5 and row.milliseconds > 0 for row in rows)


def test_contenders_take_turns():
    order = []
    measure({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2, device="cpu")
    assert order == ["a", "b"] * 3


def test_what_others_do_meanwhile_does_not_count_on_one_thread(monkeypatch):
    def waits():
        time.sleep(0.2)

    for threads, counts in ((1, False), (2, True)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        (seconds,) = measure({"waits": waits}, rounds=1, device="cpu", warm_up=0)["waits"]
        assert (seconds >= 0.2) == counts


def test_a_gpu_waits_while_the_host_launches_a_step(monkeypatch):
    """The timed span begins after the caches are filled and 5 ms are over. The GPU has 1e9 cycles a second."""
    happened, device_clock = [], [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = device_clock[0]
            happened.append("event")

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return (end.time - self.time) * 1e3

    def sleep(cycles):
        device_clock[0] += cycles / 1e9
        happened.append(cycles / 1e9)

    def step():
        device_clock[0] += 2e-3
        happened.append("step")
        time.sleep(0.01)

    def empty(size, **kind):
        return SimpleNamespace(zero_=lambda: happened.append("filled"))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", sleep, raising=False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=2**36))
    monkeypatch.setattr(torch, "empty", empty)
    _cycles.cache_clear()
    host = {}
    seconds = measure({"ours": step}, rounds=2, device="cuda", host_seconds=host)
    timing = summarize(seconds["ours"], host["ours"])
    assert timing.milliseconds == pytest.approx(2.0)
    assert 10 <= timing.host_milliseconds < 200
    assert happened[-5:] == ["filled", pytest.approx(5e-3), "event", "step", "event"]
    _cycles.cache_clear()


def wrong_gradient(q, k, v, i, f):
    return mlstm(q, k, v, i, f.detach()) + 0 * f.sum()


def without_normalizer_gradient(q, k, v, i, f):
    """The mLSTM's values; gradients as if the denominator were a constant: right only where a norm follows."""
    h = mlstm(q, k, v, i, f)
    numerator = mlstm(q, k, v, i, f, normalize=False)
    return numerator * (h / numerator).detach()


def crashes(*inputs):
    raise RuntimeError("no kernel image is available\nfor this device")


def test_a_peer_that_is_wrong_or_crashes_keeps_its_row(monkeypatch):
    peers = {
        name: ("torch", lambda case, inputs, name=name: Contender(globals()[name], inputs, case.checks(inputs)))
        for name in ("wrong_gradient", "without_normalizer_gradient", "crashes")
    } | {"absent": ("a_package_that_is_not_there", None)}
    monkeypatch.setitem(PEERS, ("mlstm", "cpu"), peers)
    rows = {row.name: row for row in kernels.run_case(SMALL, Journal(), 1, CEILINGS)}
    assert "absent" not in rows
    assert rows["wrong_gradient"].problem == "wrong gradients (allowed 1e-04)"
    assert rows["wrong_gradient"].error < 1e-4 < 1e-2 < rows["wrong_gradient"].gradient_error
    assert "; behind a norm of each head" in rows["without_normalizer_gradient"].problem
    assert rows["wrong_gradient"].milliseconds > 0
    assert rows["crashes"].problem == "fails: RuntimeError: no kernel image is available"
    assert rows["crashes"].milliseconds is None
    assert rows["mlstm / compiled"].problem == "" and rows["mlstm / compiled"].ratio > 0
    assert not any(map(kernels.is_ours_and_bad, rows.values()))
    table = kernels.as_markdown(list(rows.values()))
    assert len({line.count("|") for line in table.splitlines()}) == 1


def test_who_killed_an_earlier_process_is_not_tried_again(tmp_path):
    path = tmp_path / "journal"
    for lines in (
        [{"trying": f"{SMALL.title} | mlstm / chunkwise"}, {"died": "the process died of SIGSEGV"}],
        [{"trying": f"{SMALL.title} | {TOGETHER}"}, {"died": "it did not return within 150 s"}],
    ):
        with path.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        rows = {row.name: row for row in kernels.run_case(SMALL, Journal(path), 1, CEILINGS)}
        assert rows["mlstm / chunkwise"].problem == "fails: the process died of SIGSEGV"
    assert "did not return" in rows["mlstm / compiled"].problem and rows["mlstm / compiled"].milliseconds is None
    assert kernels.is_ours_and_bad(rows["mlstm / compiled"])


def test_a_wrong_kernel_of_ours_makes_the_benchmark_fail(monkeypatch):
    def wrong(*inputs, **options):
        h, state = mlstm_chunkwise(*inputs, **options)
        return h * 1.01, state

    monkeypatch.setattr(MLSTM_OPERATION["chunkwise"], "function", wrong)
    with pytest.raises(SystemExit, match="mlstm / chunkwise, B 2 H 4 T 64 .*: wrong values"):
        kernels.main(["--device", "cpu", "--rounds", "1", "--lengths", "64", "--only", "mlstm"])


CHILD = """
import os, pathlib, sys, time
from eval.study.journal import Journal
journal = Journal(pathlib.Path(sys.argv[1]))
for name, act in (("fine", int), ("aborts", os.abort), ("hangs", lambda: time.sleep(600)), ("exits", sys.exit)):
    if name in journal.results or name in journal.failed:
        continue
    journal.trying(name)
    act() if name != "exits" else act(3)
    journal.done(name, name)
journal.trying(None)
journal.done("all", sorted(journal.failed))
"""


def test_the_supervisor_gets_over_crashes_and_hangs(tmp_path):
    path = tmp_path / "journal"
    assert supervise([sys.executable, "-c", CHILD, str(path)], path, silence=10) == 0
    journal = Journal(path)
    assert journal.results == {"fine": "fine", "all": ["aborts", "exits", "hangs"]}
    assert journal.failed["aborts"] == "the process died of SIGABRT"
    assert journal.failed["hangs"] == "it did not return within 10 s"
    assert journal.failed["exits"] == "the process ended with 3"


def test_the_supervisor_does_not_repeat_a_mistake_in_the_command(tmp_path):
    command = [sys.executable, "-c", f"open({str(tmp_path / 'ran')!r}, 'a').write('x'); raise SystemExit(2)"]
    assert supervise(command, tmp_path / "journal", silence=30) == 2
    assert (tmp_path / "ran").read_text() == "x"


def test_the_benchmark_runs_under_supervision(tmp_path):
    out = tmp_path / "kernels.json"
    assert run_in_children("eval.kernels", ["--device", "cpu", "--only", "mlstm step", "--out", str(out)], 60) == 0
    assert [row["name"] for row in json.loads(out.read_text())["rows"]] == ["mlstm / step"]


def test_what_is_left_out_for_want_of_time_is_named(tmp_path, capsys):
    out = tmp_path / "kernels.json"
    arguments = ["--device", "cpu", "--rounds", "1", "--lengths", "64", "--budget", "1", "--begin", "0"]
    kernels.main([*arguments, "--out", str(out)])
    assert "Left out, for want of time (--budget 1) or memory: B 2 H 4 T 64" in capsys.readouterr().out
    assert len(json.loads(out.read_text())["left_out"]) == 6


@pytest.mark.parametrize(
    ("operation", "name"),
    [
        (operation, name)
        for (operation, device), peers in PEERS.items()
        for name, (package, _) in peers.items()
        if device == "cpu" and importlib.util.find_spec(package)
    ],
)
def test_a_peer_meets_its_own_definition(operation, name):
    sizes = {"device": "cpu", "dtype": torch.float32, "B": 2, "T": 40, "H": 2}
    cases = {"mlstm": SMALL, "slstm": SLSTM(**sizes, D=8), "gated delta": GatedDelta(**sizes, K=8, V=16)}
    case = cases[operation]
    contender = PEERS[operation, "cpu"][name][1](case, case.inputs())
    (check,) = contender.checks
    assert max(errors(contender.function, check.definition, check.inputs)) < 1e-5
    assert (contender.operations or case.operations()) > 0


def test_the_definition_of_linear_attention_tells_right_from_wrong():
    from eval.bench.peers import _linear_attention

    case, T = SMALL, SMALL.T

    def attention_like(q, k, v, log_forget):
        """The same as one masked product over all pairs."""
        decay_BTSH = (log_forget.cumsum(1)[:, :, None] - log_forget.cumsum(1)[:, None]).exp()
        weights = torch.einsum("bthk,bshk->btsh", q, k) * case.K**-0.5 * decay_BTSH
        return torch.einsum("btsh,bshv->bthv", weights.masked_fill(torch.ones(T, T).triu(1).bool()[..., None], 0), v)

    q, k, v, _, f = case.inputs()
    tensors = [q, k, v, torch.nn.functional.logsigmoid(f)]
    right = _linear_attention(attention_like, case, tensors)
    assert max(errors(attention_like, right.checks[0].definition, right.checks[0].inputs)) < 1e-5
    assert max(errors(lambda *each: attention_like(*each) * 1.01, right.checks[0].definition, tensors)) > 1e-3


def test_the_cases_of_a_gpu_are_the_published_ones():
    cases = list(gpu_cases([2048, 8192, 65536], torch.bfloat16, 65536))
    mlstms = [case for case in cases if isinstance(case, MLSTM)]
    assert {case.B * case.T for case in mlstms} == {65536}
    assert {(case.H, case.K, case.V) for case in mlstms} == {(8, 256, 512), (16, 128, 256), (32, 64, 128)}
    assert {case.attention_heads * case.attention_dim for case in mlstms} == {4096}
    assert {case.T for case in mlstms[:3]} == {8192}
    assert {(case.H, case.D) for case in cases if isinstance(case, SLSTM)} == {(12, 64), (6, 128), (3, 256)}
    assert len({case.title for case in cases}) == len(cases)


def test_bytes_and_operations_are_counted_as_stated():
    """By hand, for one token and one head in float32."""
    sizes = {"device": "cpu", "dtype": torch.float32, "B": 1, "T": 1, "H": 1}
    cell = MLSTM(**sizes, K=3, V=5, attention_heads=1, attention_dim=5, backward=False)
    assert cell.operations() == 4 * 15 + 1 * 8 + 4 * 1 + 4 * 3, "a chunk of one token, its gates, the normalizer"
    assert cell.moved_bytes() == 4 * (3 + 3 + 5 + 5) + 8
    cell = MLSTM(**sizes, K=3, V=5, attention_heads=1, attention_dim=5)
    assert cell.moved_bytes() == 4 * (3 + 3 + 5 + 5) + 8 + 4 * (3 + 3 + 5 + 5 + 5) + 8 + 4 * (3 + 3 + 5) + 8
    cell = SLSTM(**sizes, D=3, backward=False)
    assert cell.moved_bytes() == 4 * (4 * 3 + 3 + 4 * (9 + 3))
    assert SLSTM(**sizes, D=3).moved_bytes() == 3 * cell.moved_bytes()
    lstm = torch_lstm(cell, cell.inputs())
    assert lstm.operations == 2 * (4 * 3 * 3 + 4 * 3 * 3) and lstm.moved_bytes == 4 * (3 + 3)
    step = MLSTMStep(device="cpu", dtype=torch.float32, B=1, H=1, K=3, V=5)
    assert step.operations() == 5 * 15
    heads = MLSTMStep(device="cpu", dtype=torch.float32, B=2, H=3, K=3, V=5)
    assert (heads.operations(), heads.moved_bytes()) == (6 * step.operations(), 6 * step.moved_bytes())
    assert step.moved_bytes() == 2 * 4 * (15 + 3 + 1) + 4 * (3 + 3 + 5 + 5)
    assert CEILINGS.share(1e11, 2e10, 4.0) == pytest.approx(0.5)


def test_the_input_projection_adds_the_operations_of_its_product():
    case = SLSTM(device="cpu", dtype=torch.float32, B=2, T=3, H=2, D=4)
    contender = dict(case.own(case.inputs()))["slstm and its input projection"]
    x, weight, *rest = contender.inputs
    with FlopCounterMode(display=False) as counted:
        torch.nn.functional.linear(x, weight)
    assert contender.operations == case.operations() + counted.get_total_flops() == case.operations() + 8 * 6 * 8**2
    assert case.with_projection(x, weight, *rest).shape == (2, 3, 2, 4)
