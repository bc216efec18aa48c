"""Shares of sources by passes, and limits of tokens, whatever the number of lanes and wherever a run restarts."""

from __future__ import annotations

import json

import pytest
import torch

from tests.data.test_going_on import go_on, stream_of, tokens
from tests.data.test_stream import config_of
from tests.data.test_tokens import on_ids
from xlstm_lm.data import DataConfig, SourceConfig
from xlstm_lm.data.tokenize_sources import tokenize


def lines_of(path, letter: str, count: int, length: int = 19, **settings) -> SourceConfig:
    path.write_text("".join(letter * length + "\n" for _ in range(count)))
    return SourceConfig(kind="text_lines", paths=[str(path)], **settings)


def shares(stream, batches: int) -> list[float]:
    """Shares of the letters a, b and c among all inputs."""
    given = torch.cat([torch.tensor(batch).flatten() for batch in tokens(stream, batches)])
    counts = torch.bincount(given, minlength=257)[[97, 98, 99]].double()
    return (counts / counts.sum()).tolist()


def test_weights_by_epochs_are_passes_over_each_source(tmp_path):
    sources = [lines_of(tmp_path / "a", "a", 40), lines_of(tmp_path / "b", "b", 120)]
    tokenize(DataConfig(sources=sources), tmp_path / "ids", processes=1)
    read = on_ids(DataConfig(sources=sources), tmp_path / "ids").sources
    for source, weight in zip(read, (3.0, 1.0)):
        source.weight, source.weight_by = weight, "epochs"
    stream = stream_of(*read)
    assert shares(stream, 1500)[:2] == pytest.approx([0.5, 0.5], abs=0.01)  # 3 x 40 documents beside 1 x 120
    epochs = [[state["sources"][index]["epoch"] for state in stream.state_dict().values()] for index in range(2)]
    assert sum(epochs[0]) / sum(epochs[1]) == pytest.approx(3, rel=0.1)
    for source in read:
        source.weight_by = "tokens"
    assert shares(stream_of(*read), 300)[:2] == pytest.approx([0.75, 0.25], abs=0.01)


def test_weights_of_two_units_or_of_unknown_sizes_are_refused():
    with pytest.raises(ValueError, match="weight_by: epochs needs a source whose tokens are counted, and kind is text"):
        SourceConfig(kind="text", paths=["a"], weight_by="epochs")
    sources = [SourceConfig(kind="tokens", paths=["a"], weight_by="epochs"), SourceConfig(kind="text", paths=["a"])]
    with pytest.raises(ValueError, match="weigh all by tokens, or all by epochs"):
        DataConfig(sources=sources)


@pytest.mark.parametrize("lanes", [1, 3, 4])
def test_a_source_ends_at_its_limit(lanes, tmp_path):
    limited = lines_of(tmp_path / "a", "a", 50, max_tokens=600)
    sources = limited, lines_of(tmp_path / "b", "b", 50)
    stream = stream_of(*sources, lanes=lanes)
    given = tokens(stream, 240 // lanes)
    counts = torch.bincount(torch.tensor(given).flatten(), minlength=257)
    assert 600 * 19 / 20 <= counts[97] <= (600 + 20 * lanes) * 19 / 20  # each lane ends with a document
    assert 97 not in torch.tensor(given[-60 // lanes :])
    # Continued in the middle of the limit, it is the same limit.
    again = stream_of(*sources, lanes=lanes)
    tokens(again, 20 // lanes)
    saved = json.loads(json.dumps([again.fingerprint(), again.state_dict()]))
    rest = tokens(go_on(stream_of(*sources, lanes=lanes), saved), 120 // lanes)
    assert rest == given[20 // lanes :][: len(rest)]
    limited.max_tokens = 700
    assert stream_of(*sources, lanes=lanes).differences(*saved) == ["  sources[0].max_tokens: 600 there, 700 now"]


def test_limits_below_the_steps_of_a_run_are_refused_before_it_begins(folder):
    config = config_of("lines", folder)
    config.sources[0].max_tokens = 10 * config.global_batch_size * config.context_length
    config.check_steps(9)
    with pytest.raises(ValueError, match="have a max_tokens of 1,920, but 10 steps need 1,926: raise max_tokens"):
        config.check_steps(10)
    stream = stream_of(*config.sources, lanes=6, context_length=32)
    tokens(stream, 9)
    with pytest.raises(ValueError, match="lane . has read max_tokens of all data.sources: raise max_tokens"):
        tokens(stream, 30)
