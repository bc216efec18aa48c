"""Description of an export format, and the check of all formats before a tensor is written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

NamedTensors = Iterable[tuple[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class ExportFormat:
    """A way to write the models of one family for transformers to load."""

    name: str
    """Name for --format."""
    suits: str
    """Recommended uses, in a sentence for the model card."""
    limits: tuple[str, ...]
    """Limitations, for the model card."""
    objections: Callable[[Any], list[str]]
    """Why it cannot hold a model of this configuration; empty where it can."""
    make_config: Callable[[Any], Any]
    """Makes transformers' configuration from ours."""
    model_class: Callable[[], type]
    """The class that will load it."""
    convert: Callable[[Any, NamedTensors], Iterator[tuple[str, Tensor]]]
    """Gives the names and tensors of the format for ours, in our order."""
    write_code: Callable[[Path], None] | None
    """Writes the source files that the model needs beside transformers, if it needs any."""
    leaves_out_padding: bool
    """Whether padding on the left changes nothing."""
    obstacle: Callable[[], str | None] = lambda: None
    """Obstacle to loading it with transformers in this environment, with the remedy; None if there is none."""


def expected_shapes(export_format: ExportFormat, config: Any) -> dict[str, torch.Size]:
    """The tensors that the class will look for in the files, by name; a tied one under one name alone."""
    with torch.device("meta"):
        model = export_format.model_class()(config)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def converted_sizes(
    export_format: ExportFormat, model_config: Any, config: Any, model: torch.nn.Module
) -> dict[str, int]:
    """Number of elements of every tensor to be written, in the order of `convert`.

    Raises:
        AssertionError: a name or shape is not what the class will look for.
    """
    without_memory = ((name, parameter.to("meta")) for name, parameter in model.named_parameters())
    shapes = {name: tensor.shape for name, tensor in export_format.convert(model_config, without_memory)}
    expected = expected_shapes(export_format, config)
    different = sorted(
        f"{name}: {tuple(shapes.get(name, ()))} written, {tuple(expected.get(name, ()))} expected"
        for name in shapes.keys() | expected.keys()
        if shapes.get(name) != expected.get(name)
    )
    assert not different, f"the format {export_format.name} writes what cannot be loaded: {'; '.join(different)}"
    return {name: shape.numel() for name, shape in shapes.items()}
