"""Kernels of other projects, called as documented, on our tensors, for comparison in `eval.kernels`.

Each builder returns a contender for a case and our inputs. A kernel of another function (attention, linear attention,
LSTM) comes with the definition of that function.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from eval.bench.kernel_cases import CHECKED_TOKENS, MLSTM, SLSTM, Case, Check, Contender, Function
from eval.bench.measure import dtype_name
from xlstm_lm.ops.slstm import slstm

Builder = Callable[..., Contender]


def _attention(run: Callable[[Tensor, Tensor, Tensor], Tensor], case: MLSTM, inputs: list[Tensor]) -> Contender:
    """Causal attention over as many tokens, of the width that `case` names."""
    heads, D = case.attention_heads, case.attention_dim
    tokens = [torch.randn(case.B, case.T, heads, D, device=case.device, dtype=case.dtype) for _ in range(3)]
    per_token = case.B * case.T * heads * D
    return Contender(
        run,
        tokens,
        [Check(_attention_definition, [each[:1, :CHECKED_TOKENS, :2].contiguous() for each in tokens])],
        operations=2.0 * per_token * case.T,
        moved_bytes=(4 + (8 if case.backward else 0)) * case.dtype.itemsize * per_token,
    )


def _attention_definition(q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor) -> Tensor:
    scores_BHTS = torch.einsum("bthd,bshd->bhts", q_BTHD, k_BTHD) * q_BTHD.shape[-1] ** -0.5
    later_TS = torch.ones_like(scores_BHTS[0, 0]).triu(1).bool()
    return torch.einsum("bhts,bshd->bthd", scores_BHTS.masked_fill(later_TS, -torch.inf).softmax(-1), v_BTHD)


def sdpa(backend: SDPBackend | None, case: MLSTM, inputs: list[Tensor]) -> Contender:
    """torch's causal attention, in whatever way it picks or in a given one."""

    def run(q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor) -> Tensor:
        heads_first = (each.transpose(1, 2) for each in (q_BTHD, k_BTHD, v_BTHD))
        if backend is None:
            return F.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)

    return _attention(run, case, inputs)


def flash_attention_2(case: MLSTM, inputs: list[Tensor]) -> Contender:
    """The package flash-attn."""
    from flash_attn import flash_attn_func

    return _attention(partial(flash_attn_func, causal=True), case, inputs)


def flash_attention_3(case: MLSTM, inputs: list[Tensor]) -> Contender:
    """flash-attn's package for Hopper; older builds return the log-sum-exp too."""
    from flash_attn_interface import flash_attn_func

    def run(*tensors: Tensor) -> Tensor:
        out = flash_attn_func(*tensors, causal=True)
        return out[0] if isinstance(out, tuple) else out

    return _attention(run, case, inputs)


def mlstm_kernels(kernel: str, chunk_size: int, case: MLSTM, inputs: list[Tensor]) -> Contender:
    """The authors' mLSTM, with heads before time, and whole chunks only."""
    from mlstm_kernels.torch import get_mlstm_kernel

    compute = get_mlstm_kernel(kernel)

    def run(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> Tensor:
        return compute(q=q, k=k, v=v, i=i, f=f, chunk_size=chunk_size, autocast_kernel_dtype=case.dtype)

    def heads_first(definition: Function, *tensors: Tensor) -> Tensor:
        return definition(*(each.transpose(1, 2) for each in tensors)).transpose(1, 2)

    def take(tensors: list[Tensor]) -> list[Tensor]:
        whole_chunks = tensors[0].shape[1] // chunk_size * chunk_size
        return [each[:, :whole_chunks].transpose(1, 2).contiguous() for each in tensors]

    checks = [Check(partial(heads_first, each.definition), take(each.inputs)) for each in case.checks(inputs)]
    return Contender(run, take(inputs), checks)


def mlstm_kernels_step(kernel: str, case: Case, inputs: list[Tensor]) -> Contender:
    """The authors' decode step: no time dimension, gates and stabilizer with one at the end."""
    from mlstm_kernels.torch import get_mlstm_step_kernel

    compute = get_mlstm_step_kernel(kernel)

    def run(*tensors: Tensor) -> Tensor:
        q, k, v, i, f = (each[:, 0] for each in tensors[:5])
        C, n, m = tensors[5:]
        h_BHV, _ = compute(q=q, k=k, v=v, i=i[..., None], f=f[..., None], c=C, n=n, m=m[..., None])
        return h_BHV[:, None]

    return Contender(run, inputs, case.checks(inputs))


def simple_gla(case: MLSTM, inputs: list[Tensor]) -> Contender:
    """Linear attention with one forget gate a head, of flash-linear-attention: an mLSTM without input gate and norm."""
    from fla.ops.simple_gla import chunk_simple_gla

    tensors = [*inputs[:3], F.logsigmoid(inputs[4])]
    return _linear_attention(lambda *each: chunk_simple_gla(*each)[0], case, tensors)


def gla(case: MLSTM, inputs: list[Tensor]) -> Contender:
    """Linear attention with a forget gate for every key unit, of flash-linear-attention."""
    from fla.ops.gla import chunk_gla

    gates_BTHK = F.logsigmoid(3 + torch.randn_like(inputs[0], dtype=torch.float32))
    return _linear_attention(lambda *each: chunk_gla(*each)[0], case, [*inputs[:3], gates_BTHK])


def _linear_attention(run: Callable[..., Tensor], case: MLSTM, tensors: list[Tensor]) -> Contender:
    tensors = [each.contiguous() for each in tensors]
    sample = [each[:1, :CHECKED_TOKENS, :2].contiguous() for each in tensors]
    return Contender(run, tensors, [Check(_linear_attention_definition, sample)])


def _linear_attention_definition(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, log_forget: Tensor) -> Tensor:
    """S_t = exp(g_t) S_(t-1) + k_t v_t^T and h_t = S_t^T q_t / sqrt(K), for g of a head or of a key unit."""
    forget_BTHK = (log_forget if log_forget.dim() == 4 else log_forget[..., None]).exp()
    q_BTHK = q_BTHK * q_BTHK.shape[-1] ** -0.5
    S_BHKV, out = torch.zeros((), dtype=q_BTHK.dtype, device=q_BTHK.device), []
    for t in range(q_BTHK.shape[1]):
        S_BHKV = forget_BTHK[:, t, :, :, None] * S_BHKV + k_BTHK[:, t, :, :, None] * v_BTHV[:, t, :, None]
        out.append((q_BTHK[:, t, :, :, None] * S_BHKV).sum(-2))
    return torch.stack(out, 1)


def torch_lstm(case: SLSTM, inputs: list[Tensor]) -> Contender:
    """torch.nn.LSTM of the same width, its input projection included; its definition is itself in float64."""
    width = case.H * case.D
    lstm = torch.nn.LSTM(width, width, batch_first=True).to(case.device, case.dtype)
    names = [name for name, _ in lstm.named_parameters()]
    x_BTD = torch.randn(case.B, case.T, width, device=case.device, dtype=case.dtype)
    exact = torch.nn.LSTM(width, width, batch_first=True).to(case.device, torch.float64)

    def run(module: torch.nn.LSTM, x_BTD: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, weights, strict=True)), x_BTD)[0]

    weights = [each.detach() for each in lstm.parameters()]
    return Contender(
        partial(run, lstm),
        [x_BTD, *weights],
        [Check(partial(run, exact), [x_BTD[:2, :CHECKED_TOKENS], *weights])],
        operations=case.B * case.T * 16.0 * width**2,
        moved_bytes=case.dtype.itemsize * case.B * case.T * 2 * width * (3 if case.backward else 1),
    )


def flashrnn(backend: str, case: SLSTM, inputs: list[Tensor]) -> Contender:
    """The authors' sLSTM; its recurrent matrices are transposed."""
    from flashrnn import flashrnn as compute

    dtype = dtype_name(case.dtype)

    def run(wx_BTGHD: Tensor, r_GHED: Tensor, bias_GHD: Tensor) -> Tensor:
        return compute(wx_BTGHD, r_GHED, bias_GHD, function="slstm", backend=backend, dtype=dtype)[0][0]

    def definition(wx_BTGHD: Tensor, r_GHED: Tensor, bias_GHD: Tensor) -> Tensor:
        return slstm(wx_BTGHD, r_GHED.transpose(-1, -2), bias_GHD, backend="recurrence")

    wx_BTGHD, r_GHDE, bias_GHD = inputs
    weights = [r_GHDE.transpose(-1, -2).contiguous(), bias_GHD]
    # Some of its backends take whole blocks of steps only.
    sample = wx_BTGHD[:, : CHECKED_TOKENS // 64 * 64].contiguous()
    return Contender(run, [wx_BTGHD, *weights], [Check(definition, [sample, *weights])])


def xlstm_cell(backend: str, case: SLSTM, inputs: list[Tensor]) -> Contender:
    """The sLSTM of the package `xlstm`, whose parameters hold the same numbers in another order."""
    from xlstm.blocks.slstm.cell import sLSTMCell, sLSTMCellConfig

    H, D = case.H, case.D
    dtype = dtype_name(case.dtype)
    cell = sLSTMCell(sLSTMCellConfig(hidden_size=H * D, num_heads=H, backend=backend, dtype=dtype)).to(case.device)

    def run(wx_BTGHD: Tensor, r_GHDE: Tensor, bias_GHD: Tensor) -> Tensor:
        weights = {
            "_recurrent_kernel_": r_GHDE.permute(1, 0, 3, 2).reshape(H, 4 * D, D),
            "_bias_": bias_GHD.reshape(cell._bias_.shape),
        }
        out_BHTD, _ = torch.func.functional_call(cell, weights, wx_BTGHD.flatten(2))
        return out_BHTD.transpose(1, 2)

    return Contender(run, inputs, case.checks(inputs))


def gated_delta_of_transformers(case: Case, inputs: list[Tensor]) -> Contender:
    """The rule of Qwen3-Next in transformers, in chunks of 64: what its models run where fla is not installed."""
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    return Contender(lambda *each: torch_chunk_gated_delta_rule(*each)[0], inputs, case.checks(inputs))


PEERS: dict[tuple[str, str], dict[str, tuple[str, Builder]]] = {
    ("mlstm", "cpu"): {
        "causal attention (SDPA)": ("torch", partial(sdpa, None)),
        "mlstm_kernels / native, chunks of 64": (
            "mlstm_kernels",
            partial(mlstm_kernels, "chunkwise--native_custbw", 64),
        ),
    },
    ("mlstm", "cuda"): {
        "causal attention (SDPA, flash)": ("torch", partial(sdpa, SDPBackend.FLASH_ATTENTION)),
        "causal attention (SDPA, cuDNN)": ("torch", partial(sdpa, SDPBackend.CUDNN_ATTENTION)),
        "flash-attn 2": ("flash_attn", flash_attention_2),
        "flash-attn 3": ("flash_attn_interface", flash_attention_3),
        "mlstm_kernels / xl_chunk, chunks of 128": (
            "mlstm_kernels",
            partial(mlstm_kernels, "chunkwise--triton_xl_chunk", 128),
        ),
        "mlstm_kernels / limit_chunk, chunks of 64": (
            "mlstm_kernels",
            partial(mlstm_kernels, "chunkwise--triton_limit_chunk", 64),
        ),
        "fla / simple_gla": ("fla", simple_gla),
        "fla / gla": ("fla", gla),
    },
    ("mlstm step", "cpu"): {"mlstm_kernels / native": ("mlstm_kernels", partial(mlstm_kernels_step, "native"))},
    ("mlstm step", "cuda"): {"mlstm_kernels / triton": ("mlstm_kernels", partial(mlstm_kernels_step, "triton"))},
    ("gated delta", "cpu"): {"transformers / Qwen3-Next": ("transformers", gated_delta_of_transformers)},
    ("slstm", "cpu"): {
        "torch.nn.LSTM": ("torch", torch_lstm),
        "xlstm / vanilla": ("xlstm", partial(xlstm_cell, "vanilla")),
        "flashrnn / vanilla": ("flashrnn", partial(flashrnn, "vanilla")),
    },
    ("slstm", "cuda"): {
        "torch.nn.LSTM (cuDNN)": ("torch", torch_lstm),
        "flashrnn / cuda_fused": ("flashrnn", partial(flashrnn, "cuda_fused")),
        "flashrnn / cuda": ("flashrnn", partial(flashrnn, "cuda")),
        "flashrnn / triton": ("flashrnn", partial(flashrnn, "triton")),
        "xlstm / cuda": ("xlstm", partial(xlstm_cell, "cuda")),
    },
}
"""Peers by operation and device: the package that must be installed, and the builder of a contender."""
