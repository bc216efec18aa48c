"""The kernel benchmark runs and reports what it measured."""

from __future__ import annotations

import json

from eval import kernels


def test_the_benchmark_prints_tables_and_writes_json(tmp_path, capsys, monkeypatch):
    out = tmp_path / "kernels.json"
    arguments = ["--device", "cpu", "--rounds", "1", "--lengths", "64", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["eval.kernels", *arguments])
    kernels.main()
    rows = json.loads(out.read_text())["rows"]
    printed = capsys.readouterr().out
    assert {"causal attention (SDPA)", "mlstm", "torch.nn.LSTM(256)", "slstm"} <= {row["name"] for row in rows}
    for row in rows:
        assert f"| {row['name']} | {row['sizes']} |" in printed
        assert row["milliseconds"] > 0
        assert row["error"] is None or row["error"] < 1e-4
    assert {row["name"] for row in rows if row["error"] is not None} == {"mlstm", "slstm"}


def test_contenders_take_turns():
    order = []
    kernels.measure({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2, device="cpu")
    assert order == ["a", "b"] * 3
