"""Tensors in files: cut at any size, they read back by name."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xlstm_lm.base.tensor_files import TensorWriter, read_tensors, tensor_files, tensor_forms

shapes_of_tensors = st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), shapes=shapes_of_tensors, shard_bytes=st.integers(1, 600))
def test_files_of_any_size_hold_the_same_tensors(data, shapes, shard_bytes):
    tensors = {f"layer.{index}": torch.randn(shape) for index, shape in enumerate(shapes)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = {name: tensor.numel() for name, tensor in tensors.items()}
        writer = TensorWriter("model", sizes, lambda file, content: (folder / file).write_bytes(content), shard_bytes)
        for key, tensor in tensors.items():
            writer.add(key, tensor)
        files = tensor_files(folder)
        assert set(files) == set(tensors)
        index = folder / "model.safetensors.index.json"
        assert index.is_file() == (len(set(files.values())) > 1)
        if index.is_file():
            assert json.loads(index.read_text())["metadata"]["total_size"] == 4 * sum(sizes.values())
        for path in set(files.values()):
            held = [sizes[key] for key in files if files[key] == path]
            assert len(held) == 1 or 4 * sum(held) <= shard_bytes
        assert tensor_forms(files) == {key: ("F32", tuple(tensor.shape)) for key, tensor in tensors.items()}
        order = data.draw(st.permutations(list(tensors)))
        read = list(read_tensors(files, order))
        assert [key for key, _ in read] == order
        assert all(torch.equal(tensor, tensors[key]) for key, tensor in read)
        del read
