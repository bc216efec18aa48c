"""Causal attention over packed rows: a token sees its own document up to itself.

Three forms: whole rows, with a mask of every pair of positions where they hold several documents (the definition, on
any device), and two that leave out what the mask would: document by document with torch's causal kernel, and all
documents at once as a jagged tensor, for which torch has flash attention on a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from xlstm_lm.ops.announce import announce_once
from xlstm_lm.ops.selfcheck import asked_once, some_resets, what_is_wrong

SHORT = 128  # mean steps of a document below which one masked product beats a call for each, on a CPU


@dataclass(frozen=True)
class Packing:
    """Where the documents of packed rows lie; made once a batch and used by every layer."""

    B: int
    T: int
    document_BT: Tensor | None = None
    """The number of each token's document in its row; None where a row is one document and sees no earlier keys."""
    seen_BS: Tensor | None = None
    """Which of the S keys of earlier calls belong to document 0."""
    offsets: Tensor | None = None
    """First positions of the documents in the rows laid end to end, and the end, where all keys are the rows' own."""
    window: int | None = None
    """Keys that a query sees back, itself included; None where that hides none."""

    @functools.cached_property
    def mask_B1TS(self) -> Tensor | None:
        """True where a query (T) sees a key (S); None: all that is not after it."""
        if self.document_BT is None:
            return None
        causal_TT = torch.ones(self.T, self.T, dtype=torch.bool, device=self.document_BT.device).tril()
        if self.window is not None:
            causal_TT = causal_TT.triu(1 - self.window)
        mask_BTS = (self.document_BT[:, :, None] == self.document_BT[:, None]) & causal_TT
        if self.seen_BS is not None:
            seen_BTS = (self.document_BT == 0)[:, :, None] & self.seen_BS[:, None]
            if self.window is not None:
                seen_BTS = seen_BTS.triu(seen_BTS.shape[2] - self.window + 1)
            mask_BTS = torch.cat((seen_BTS, mask_BTS), dim=2)
        return mask_BTS[:, None]


def pack(
    B: int,
    T: int,
    device: torch.device,
    resets_BT: Tensor | None = None,
    seen_BS: Tensor | None = None,
    window: int | None = None,
) -> Packing:
    """How rows of T tokens see each other, and the keys before them.

    Args:
        resets_BT: (B, T) bool, true where a document starts.
        seen_BS: (B, S) bool, which of the S keys of earlier calls belong to the document that goes on at the first
            token; None or S = 0 for none.
        window: keys that a query sees back, itself included; None for all.
    """
    earlier = 0 if seen_BS is None else seen_BS.shape[1]
    if window is not None and window < earlier + T:
        document_BT = torch.zeros(B, T, dtype=torch.int64, device=device) if resets_BT is None else resets_BT.cumsum(1)
        return Packing(B, T, document_BT, seen_BS if earlier else None, window=window)
    if seen_BS is not None and seen_BS.shape[1]:
        if resets_BT is None:
            return Packing(B, T, torch.zeros(B, T, dtype=torch.int64, device=device), seen_BS)
        return Packing(B, T, resets_BT.cumsum(1), seen_BS)
    if resets_BT is None or not bool(resets_BT[:, 1:].any()):
        return Packing(B, T)
    starts_BT = resets_BT.clone()
    starts_BT[:, 0] = True
    offsets = F.pad(starts_BT.flatten().nonzero().flatten(), (0, 1), value=B * T)
    return Packing(B, T, resets_BT.cumsum(1), offsets=offsets)


def attention(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, packing: Packing, *, backend: str = "auto") -> Tensor:
    """softmax(q k^T / sqrt(K)) v over the keys that `packing` lets each query see (arXiv 1706.03762, eq. 1).

    Args:
        q_BTHK: queries (B, T, H, K). k_BSGK, v_BSGK: keys and values (B, S, G, K) where G divides H: each serves
            H / G heads (arXiv 2305.13245). The last T of the S are the rows' own.
        backend: "auto" or a name in `BACKENDS`.

    Returns:
        (B, T, H, K).

    Raises:
        ValueError: an unknown backend.
    """
    if backend == "auto":
        backend = choose_backend(q_BTHK, packing)
    elif backend not in BACKENDS:
        raise ValueError(
            f"unknown attention backend {backend!r}: choose 'auto' or one of {', '.join(map(repr, BACKENDS))}"
        )
    return BACKENDS[backend](q_BTHK, k_BSGK, v_BSGK, packing)


def choose_backend(q_BTHK: Tensor, packing: Packing) -> str:
    """What "auto" means: "jagged" on a GPU for 16-bit types where it proves right, "by_document" on a CPU unless the
    documents are short, "banded" where a window leaves out half of the keys, else "sdpa"."""
    if packing.window is not None:
        return "banded" if 2 * packing.window <= packing.T else "sdpa"
    if packing.offsets is None:
        return "sdpa"
    if q_BTHK.device.type == "cuda" and q_BTHK.dtype in (torch.bfloat16, torch.float16):
        return "jagged" if _jagged_is_right(q_BTHK.device, q_BTHK.dtype) else "sdpa"
    long = SHORT * (len(packing.offsets) - 1) <= packing.B * packing.T
    return "by_document" if long and q_BTHK.device.type == "cpu" else "sdpa"


def _causal(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask_B1TS: Tensor | None = None) -> Tensor:
    out_BHTK = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q_BTHK, k_BSGK, v_BSGK)),
        attn_mask=mask_B1TS,
        is_causal=mask_B1TS is None and q_BTHK.shape[1] > 1,
        enable_gqa=q_BTHK.shape[2] != k_BSGK.shape[2],
    )
    return out_BHTK.transpose(1, 2)


def _sdpa(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, packing: Packing) -> Tensor:
    return _causal(q_BTHK, k_BSGK, v_BSGK, packing.mask_B1TS)


def _by_document(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, packing: Packing) -> Tensor:
    lengths = packing.offsets.diff().tolist()
    documents = (x.flatten(0, 1).split(lengths) for x in (q_BTHK, k_BSGK, v_BSGK))
    out = [_causal(*(x[None] for x in document))[0] for document in zip(*documents, strict=True)]
    return torch.cat(out).unflatten(0, (packing.B, packing.T))


def _jagged(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, packing: Packing) -> Tensor:
    repeat = q_BTHK.shape[2] // k_BSGK.shape[2]
    k_BSHK, v_BSHK = (x if repeat == 1 else x.repeat_interleave(repeat, dim=2) for x in (k_BSGK, v_BSGK))
    q, k, v = (
        torch.nested.nested_tensor_from_jagged(x.flatten(0, 1), packing.offsets).transpose(1, 2)
        for x in (q_BTHK, k_BSHK, v_BSHK)
    )
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return out.transpose(1, 2).values().unflatten(0, (packing.B, packing.T))


def _banded(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, packing: Packing) -> Tensor:
    """Queries in blocks of a window W, each over the W keys before it and its own: 2 T W products instead of T S."""
    W, T = packing.window, packing.T
    earlier = min(k_BSGK.shape[1] - T, W)
    end = -T % W
    document_BS = packing.document_BT
    if packing.seen_BS is not None:
        document_BS = torch.cat((packing.seen_BS[:, -W:].to(document_BS.dtype) - 1, document_BS), dim=1)
    document_BS = F.pad(document_BS, (W - earlier, end), value=-1)

    def with_window_before(x_BS: Tensor) -> Tensor:
        return x_BS.unfold(1, 2 * W, W).movedim(-1, 2).flatten(0, 1)

    band_WS = torch.ones(W, 2 * W, dtype=torch.bool, device=q_BTHK.device).tril(W).triu(1)
    mask_NWS = band_WS & (document_BS[:, W:].reshape(-1, W, 1) == with_window_before(document_BS)[:, None])
    q_NWHK = F.pad(q_BTHK, (0, 0, 0, 0, 0, end)).reshape(-1, W, *q_BTHK.shape[2:])
    k_NSGK, v_NSGK = (
        with_window_before(F.pad(x[:, x.shape[1] - T - earlier :], (0, 0, 0, 0, W - earlier, end)))
        for x in (k_BSGK, v_BSGK)
    )
    return _causal(q_NWHK, k_NSGK, v_NSGK, mask_NWS[:, None]).reshape(packing.B, -1, *q_BTHK.shape[2:])[:, :T]


BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, Packing], Tensor]] = {
    "sdpa": _sdpa,
    "by_document": _by_document,
    "jagged": _jagged,
    "banded": _banded,
}
"""Every form by its name. "by_document" and "jagged" are for rows of several documents that see no earlier keys,
"banded" is for packings with a window."""


@asked_once
def _jagged_is_right(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether jagged attention agrees with the mask on this device, values and gradients; if not, says so."""

    def prepare() -> tuple[Callable, Callable, list[Tensor]]:
        inputs = [torch.randn(2, 100, 2, 64, device=device, dtype=dtype) for _ in range(3)]
        packing = pack(2, 100, device, some_resets(inputs))
        return *(functools.partial(attention, packing=packing, backend=name) for name in ("jagged", "sdpa")), inputs

    found = what_is_wrong(prepare, device, dtype)
    if found is not None:
        verdict, reason = found
        slow = "attention takes one mask for all pairs (`sdpa`), which is slower"
        announce_once(f"jagged attention's kernels {verdict} on {device}, {dtype} ({reason}): {slow}")
    return found is None
