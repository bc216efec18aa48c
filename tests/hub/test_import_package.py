"""State dicts of the authors' `xlstm` package load with the logits that the package computes."""

from __future__ import annotations

import dataclasses
import json
import sys
import types

import pytest
import safetensors.torch
import torch
import yaml
from xlstm import (
    FeedForwardConfig,
    mLSTMBlockConfig,
    mLSTMLayerConfig,
    sLSTMBlockConfig,
    sLSTMLayerConfig,
    xLSTMLMModel,
    xLSTMLMModelConfig,
)
from xlstm.blocks.mlstm.backends import parallel_stabilized_simple
from xlstm.blocks.slstm.cell import sLSTMCell_cuda

from xlstm_lm import hub

LENGTHS = [1, 7, 64, 100, 257]
VOCABULARY = 83


def perturb(model: torch.nn.Module, seed: int = 0) -> None:
    """Move every weight away from its initialisation, where whole paths are zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def assert_equal_logits(path, theirs: torch.nn.Module) -> None:
    ours = hub.load(path)
    for length in LENGTHS:
        tokens_BT = torch.randint(0, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            torch.testing.assert_close(
                ours(tokens_BT), theirs(tokens_BT), rtol=1e-4, atol=1e-4, msg=lambda m, n=length: f"length {n}: {m}"
            )


def make_model(
    width: int = 64,
    heads: int = 2,
    blocks: int = 2,
    slstm_at: tuple[int, ...] = (1,),
    mlstm_options: dict | None = None,
    slstm_options: dict | None = None,
    feedforward: dict | None = None,
    **options,
) -> xLSTMLMModel:
    torch.manual_seed(0)
    slstm = {"backend": "vanilla", "num_heads": heads} | (slstm_options or {})
    config = xLSTMLMModelConfig(
        mlstm_block=mLSTMBlockConfig(mlstm=mLSTMLayerConfig(**({"num_heads": heads} | (mlstm_options or {})))),
        slstm_block=sLSTMBlockConfig(
            slstm=sLSTMLayerConfig(**slstm), feedforward=FeedForwardConfig(**(feedforward or {}))
        ),
        context_length=max(LENGTHS),
        num_blocks=blocks,
        embedding_dim=width,
        slstm_at=list(slstm_at),
        vocab_size=VOCABULARY,
        **options,
    )
    model = xLSTMLMModel(config).eval()
    perturb(model)
    return model


def save(model: xLSTMLMModel, folder, form: str = "pt") -> None:
    """The state dict and the whole configuration, in the file formats that people use."""
    config = dataclasses.asdict(model.config)
    if form == "safetensors":
        safetensors.torch.save_file(
            {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()},
            folder / "model.safetensors",
        )
        (folder / "config.json").write_text(json.dumps(config))
    else:
        torch.save(model.state_dict(), folder / f"weights.{form}")
        (folder / "config.yaml").write_text(yaml.safe_dump(config))


@pytest.mark.parametrize(
    "options",
    [
        {"heads": 4, "slstm_at": ()},
        {"slstm_at": (0, 1)},
        {"width": 96, "heads": 4, "blocks": 3, "slstm_at": (1,)},
        {"width": 32, "heads": 1, "slstm_at": (0,)},
        {"tie_weights": True},
        {"feedforward": {"proj_factor": 2.4}, "mlstm_options": {"proj_factor": 3.2, "qkv_proj_blocksize": 8}},
        {"mlstm_options": {"conv1d_kernel_size": 3}, "slstm_options": {"conv1d_kernel_size": 3}},
    ],
    ids=["mlstm", "slstm", "mixed", "one head", "tied", "other widths", "other convolution"],
)
def test_the_first_papers_model(tmp_path, options):
    theirs = make_model(**options)
    save(theirs, tmp_path)
    assert_equal_logits(tmp_path, theirs)
    assert hub.load(tmp_path).model.config.tie_embeddings == options.get("tie_weights", False)


@pytest.mark.parametrize("form", ["pth", "safetensors"])
def test_files_of_every_kind(tmp_path, form):
    theirs = make_model()
    save(theirs, tmp_path, form)
    assert_equal_logits(tmp_path, theirs)
    (file,) = (path for path in tmp_path.iterdir() if path.suffix in (".pth", ".safetensors"))
    assert_equal_logits(file, theirs)


def test_a_state_dict_inside_a_training_checkpoint(tmp_path):
    theirs = make_model()
    wrapped = {f"module._orig_mod.{name}": tensor for name, tensor in theirs.state_dict().items()}
    torch.save({"step": 7, "state_dict": wrapped}, tmp_path / "last.pt")
    (tmp_path / "last.yaml").write_text(yaml.safe_dump({"model": dataclasses.asdict(theirs.config), "training": {}}))
    assert_equal_logits(tmp_path / "last.pt", theirs)


def test_the_cuda_backends_order_of_the_recurrent_weights(tmp_path):
    """The package stores them as the backend wants them; its proxies translate."""
    theirs = make_model(slstm_at=(0, 1), heads=4)
    save(theirs, tmp_path)
    weights = theirs.state_dict()
    for index, block in enumerate(theirs.xlstm_block_stack.blocks):
        vanilla = block.xlstm.slstm_cell
        cuda = sLSTMCell_cuda(block.xlstm.config, skip_backend_init=True)
        cuda.recurrent_kernel[:] = vanilla.recurrent_kernel.clone()
        cuda.bias[:] = vanilla.bias.clone()
        for name, tensor in cuda.state_dict().items():
            weights[f"xlstm_block_stack.blocks.{index}.xlstm.slstm_cell.{name}"] = tensor
    torch.save(weights, tmp_path / "weights.pt")
    assert_equal_logits(tmp_path, theirs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feedforward": {"act_fn": "relu"}}, "act_fn: relu; xlstm-lm's slstm block has gelu"),
        ({"slstm_options": {"num_heads": 4}}, "mLSTM blocks have 2 heads and its sLSTM blocks 4"),
        ({"bias": True}, "left over .*blocks.0.xlstm.k_proj.bias, .*blocks.0.xlstm.proj_down.bias"),
        ({"feedforward": {"proj_factor": 1.3, "round_proj_up_to_multiple_of": 8}}, "width of 88; .* multiples of 64"),
        ({"add_post_blocks_norm": False}, "missing xlstm_block_stack.post_blocks_norm.weight"),
        ({"slstm_options": {"conv1d_kernel_size": 0}}, "missing .*blocks.1.xlstm.conv1d.conv.bias"),
    ],
)
def test_what_our_blocks_do_not_compute_is_refused(tmp_path, options, message):
    save(make_model(**options), tmp_path)
    with pytest.raises(ValueError, match=message):
        hub.load(tmp_path)


def test_damaged_and_foreign_files_are_named(tmp_path):
    save(make_model(), tmp_path)
    (tmp_path / "more.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"several state dicts \(more.pt, weights.pt\); give the path of one"):
        hub.load(tmp_path)
    with pytest.raises(ValueError, match="more.pt cannot be read as a state dict"):
        hub.load(tmp_path / "more.pt")
    whole = (tmp_path / "weights.pt").read_bytes()
    (tmp_path / "more.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="more.pt cannot be read as a state dict"):
        hub.load(tmp_path / "more.pt")
    torch.save([1, 2], tmp_path / "more.pt")
    with pytest.raises(ValueError, match="more.pt holds no state dict"):
        hub.load(tmp_path / "more.pt")
    torch.save(make_model(), tmp_path / "more.pt")
    with pytest.raises(ValueError, match="more.pt cannot be read as a state dict .*model.state_dict"):
        hub.load(tmp_path / "more.pt")
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="config.yaml is not valid YAML"):
        hub.load(tmp_path / "weights.pt")


@dataclasses.dataclass
class StandInConfig:
    chunkwise_kernel: str
    sequence_kernel: str
    step_kernel: str
    mode: str
    chunk_size: int
    return_last_states: bool
    autocast_kernel_dtype: str
    eps: float
    inference_state_dtype: str


class StandIn(torch.nn.Module):
    """In place of the authors' kernels, which xLSTMLarge cannot do without: the parallel form of their first paper."""

    def __init__(self, config: StandInConfig) -> None:
        super().__init__()
        self.eps = config.eps

    def forward(self, q, k, v, i, f, **state):
        return parallel_stabilized_simple(q, k, v, i.unsqueeze(-1), f.unsqueeze(-1), eps=self.eps), None


@pytest.fixture
def xlstm_large(monkeypatch):
    """The package's `xlstm_large.model`, without its kernels."""
    names = ("ChunkwiseKernelType", "SequenceKernelType", "StepKernelType", "DtypeType", "BackendModeType")
    module = types.ModuleType("mlstm_kernels.torch.backend_module")
    module.mLSTMBackend, module.mLSTMBackendConfig = StandIn, StandInConfig
    for name in names:
        setattr(module, name, str)
    for name in ("mlstm_kernels", "mlstm_kernels.torch"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    import xlstm.xlstm_large.model
    import xlstm.xlstm_large.utils

    return xlstm.xlstm_large


@pytest.mark.parametrize("weight_mode", ["single", "fused"])
def test_the_large_model(tmp_path, xlstm_large, weight_mode):
    sizes = {"embedding_dim": 64, "num_heads": 2, "num_blocks": 2, "vocab_size": VOCABULARY}
    config = xlstm_large.model.xLSTMLargeConfig(
        **sizes, qk_dim_factor=1.0, ffn_proj_factor=1.5, gate_soft_cap=5.0, output_logit_soft_cap=4.0
    )
    torch.manual_seed(0)
    theirs = xlstm_large.model.xLSTMLarge(config)
    perturb(theirs)
    weights = theirs.state_dict()
    if weight_mode == "fused":
        weights = xlstm_large.utils.convert_single_weights_to_fused_weights(dict(weights))
        xlstm_large.model.xLSTMLarge(dataclasses.replace(config, weight_mode="fused")).load_state_dict(weights)
    half = len(weights) // 2
    for index, names in enumerate((list(weights)[:half], list(weights)[half:])):  # the shards of its from_pretrained
        safetensors.torch.save_file({name: weights[name] for name in names}, tmp_path / f"model_{index}.safetensors")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(config)))
    assert_equal_logits(tmp_path, theirs)
