"""Causal attention over packed rows: a token sees its own document up to itself.

Three forms: whole rows, with a mask of every pair of positions where they hold several documents (the definition, on
any device), and two that leave out what the mask would: document by document with torch's causal kernel, and all
documents at once as a jagged tensor, for which torch has flash attention on a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from xlstm_lm.base.announce import announce_once
from xlstm_lm.ops.backend import Backend, Call, Cost, Sample
from xlstm_lm.ops.operation import Operation
from xlstm_lm.ops.selfcheck import Checked, some_resets

SHORT = 128  # mean steps of a document below which one masked product beats a call for each, on a CPU


@dataclass(frozen=True)
class Packing:
    """Positions of the documents in packed rows; made once a batch and used by every layer."""

    B: int
    T: int
    document_BT: Tensor | None = None
    """The number of each token's document in its row; None where a row is one document and sees no earlier keys."""
    seen_BS: Tensor | None = None
    """Which of the S keys of earlier calls belong to document 0."""
    offsets: Tensor | None = None
    """First positions of the documents in the rows laid end to end, and the end, where all keys are the rows' own."""
    lengths: tuple[int, ...] | None = None
    """Steps of each document; None where they are not known on the host."""
    window: int | None = None
    """Keys that a query sees back, itself included; None where that hides none."""

    @property
    def mask_B1TS(self) -> Tensor | None:
        """True where a query (T) sees a key (S); None: all that is not after it."""
        # At the lock of a cached property torch.compile breaks the graph; a graph has no need of a cache.
        return self._make_mask() if torch.compiler.is_compiling() else self._mask_B1TS

    @functools.cached_property
    def _mask_B1TS(self) -> Tensor | None:
        return self._make_mask()

    def _make_mask(self) -> Tensor | None:
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
    """Describe how rows of T tokens see each other, and the keys before them.

    No value is read from a device, and none in a graph of torch.compile. The lengths of documents, which the faster
    forms need, are known where the resets are given on the host.

    Args:
        device: device of the queries.
        resets_BT: (B, T) bool, on `device` or, better, on the host: true where a document starts; None for none.
        seen_BS: (B, S) bool, true for those of the S keys of earlier calls that belong to the document that continues
            at the first token; None or S = 0 for none.
        window: keys that a query sees back, itself included; None for all.
    """
    earlier = 0 if seen_BS is None else seen_BS.shape[1]
    if resets_BT is None:
        document_BT = torch.zeros(B, T, dtype=torch.int64, device=device)
    else:
        document_BT = resets_BT.to(device, non_blocking=True).cumsum(1)
    if window is not None and window < earlier + T:
        return Packing(B, T, document_BT, seen_BS if earlier else None, window=window)
    if earlier:
        return Packing(B, T, document_BT, seen_BS)
    if resets_BT is None:
        return Packing(B, T)
    if torch.compiler.is_compiling():
        return Packing(B, T, document_BT)
    if resets_BT.device.type != "cpu":
        announce_once("attention takes one mask for all pairs (`sdpa`), which is slower: give resets on the host")
        return Packing(B, T, document_BT)
    if not bool(resets_BT[:, 1:].any()):
        return Packing(B, T)
    starts_BT = resets_BT.clone()
    starts_BT[:, 0] = True
    offsets = F.pad(starts_BT.flatten().nonzero().flatten(), (0, 1), value=B * T)
    lengths = tuple(offsets.diff().tolist())
    return Packing(B, T, document_BT, offsets=offsets.to(device, non_blocking=True), lengths=lengths)


def attention(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, packing: Packing, *, backend: str = "auto") -> Tensor:
    """softmax(q k^T / sqrt(K)) v over the keys that `packing` lets each query see (arXiv 1706.03762, eq. 1).

    Args:
        q_BTHK: queries (B, T, H, K).
        k_BSGK, v_BSGK: keys and values (B, S, G, K) where G divides H: each serves H / G heads (arXiv 2305.13245).
            The last T of the S are the rows' own.
        backend: "auto" or the name of a backend of `ATTENTION`.

    Returns:
        (B, T, H, K).

    Raises:
        ValueError: an unknown backend.
    """
    chosen = ATTENTION.backend_for((q_BTHK, k_BSGK, v_BSGK), backend, options=_kind_of_rows(packing))
    return chosen.loaded(q_BTHK, k_BSGK, v_BSGK, packing)


def _kind_of_rows(packing: Packing) -> str:
    """The property of packed rows that decides which backend is fastest."""
    if packing.window is not None:
        return "narrow" if 2 * packing.window <= packing.T else "whole"
    if packing.lengths is None:
        return "whole"
    return "short" if SHORT * len(packing.lengths) > packing.B * packing.T else "long"


def _causal(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask_B1TS: Tensor | None = None) -> Tensor:
    q_BHTK, k_BGSK, v_BGSK = (x.transpose(1, 2) for x in (q_BTHK, k_BSGK, v_BSGK))
    out_BHTK = F.scaled_dot_product_attention(
        q_BHTK,
        k_BGSK,
        v_BGSK,
        attn_mask=mask_B1TS,
        is_causal=mask_B1TS is None and q_BTHK.shape[1] > 1,
        enable_gqa=q_BTHK.shape[2] != k_BSGK.shape[2],
    )
    return out_BHTK.transpose(1, 2)


def _sdpa(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, packing: Packing) -> Tensor:
    return _causal(q_BTHK, k_BSGK, v_BSGK, packing.mask_B1TS)


def _by_document(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, packing: Packing) -> Tensor:
    documents = (x.flatten(0, 1).split(packing.lengths) for x in (q_BTHK, k_BSGK, v_BSGK))
    out = [_causal(*(x[None] for x in document))[0] for document in zip(*documents, strict=True)]
    return torch.cat(out).unflatten(0, (packing.B, packing.T))


def _jagged(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, packing: Packing) -> Tensor:
    assert packing.lengths is not None
    repeat = q_BTHK.shape[2] // k_BSGK.shape[2]
    k_BSHK, v_BSHK = (x if repeat == 1 else x.repeat_interleave(repeat, dim=2) for x in (k_BSGK, v_BSGK))
    shortest, longest = min(packing.lengths), max(packing.lengths)  # else read from the device
    q, k, v = (
        torch.nested.nested_tensor_from_jagged(
            x.flatten(0, 1), packing.offsets, min_seqlen=shortest, max_seqlen=longest
        ).transpose(1, 2)
        for x in (q_BTHK, k_BSHK, v_BSHK)
    )
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return out.transpose(1, 2).values().unflatten(0, (packing.B, packing.T))


def _banded(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, packing: Packing) -> Tensor:
    """Queries in blocks of a window W, each over the W keys before it and its own: 2 T W products instead of T S."""
    W, T, document_BS = packing.window, packing.T, packing.document_BT
    assert W is not None and document_BS is not None
    earlier = min(k_BSGK.shape[1] - T, W)
    end = -T % W
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


def _definition(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, packing: Packing) -> Tensor:
    """All scores at once, hidden by the mask."""
    k_BSHK, v_BSHK = (x.repeat_interleave(q_BTHK.shape[2] // x.shape[2], dim=2) for x in (k_BSGK, v_BSGK))
    scores_BHTS = torch.einsum("bthk,bshk->bhts", q_BTHK, k_BSHK) * q_BTHK.shape[-1] ** -0.5
    seen_TS = torch.ones(scores_BHTS.shape[-2:], dtype=torch.bool, device=q_BTHK.device).tril()
    seen = seen_TS if packing.mask_B1TS is None else packing.mask_B1TS
    return torch.einsum("bhts,bshk->bthk", scores_BHTS.masked_fill(~seen, -torch.inf).softmax(-1), v_BSHK)


def samples(call: Call, backend: str) -> Iterator[Sample]:
    """Rows of several documents, twice as many heads of queries as of keys; a window for "banded"."""
    K = 16 if call.device.type == "cpu" else 64
    inputs = [torch.randn(2, 100, heads, K, device=call.device, dtype=call.dtype) for heads in (4, 2, 2)]
    window = 24 if backend == "banded" else None
    packing = pack(2, 100, inputs[0].device, some_resets(inputs).cpu(), window=window)
    yield Sample(inputs, {"packing": packing}, "definition")


def run(backend: Backend, sample: Sample) -> Checked:
    """The attention of a sample's packed rows as a function of q, k and v."""

    def function(*inputs: Tensor) -> Tensor:
        return backend.loaded(*inputs, sample.options["packing"])

    return function


def cost(*, B: int, T: int, H: int, K: int, G: int | None = None, window: int | None = None, itemsize: int = 2) -> Cost:
    """4 K for each key that a query of a head sees; q, k, v read and the output written once.

    On average a query sees T / 2 of T keys, with a window W - W^2 / 2 T, whatever documents are in the row.
    """
    W = min(window or T, T)
    return Cost(4 * B * H * K * (T * W - W**2 / 2), itemsize * 2 * B * T * K * (H + (H if G is None else G)))


def _not_jagged(call: Call) -> str | None:
    if call.dtype not in (torch.bfloat16, torch.float16):
        return "torch has flash attention over jagged rows on a GPU in 16-bit types only"
    return None if call.options in ("short", "long") else "no row holds several documents whole"


def _not_by_document(call: Call) -> str | None:
    if call.device.type != "cpu":
        return "a call for each document is slow on a GPU"
    return None if call.options == "long" else "no row holds several long documents"


def _not_banded(call: Call) -> str | None:
    return None if call.options == "narrow" else "no window leaves out half of the keys"


ATTENTION = Operation(
    name="attention",
    title="attention",
    subject="q",
    backends=(
        # "banded" is for a window, "jagged" and "by_document" for rows of several documents that see no earlier keys.
        Backend(name="banded", function="xlstm_lm.ops.attention:_banded", unsuited=_not_banded),
        Backend(
            name="jagged",
            function="xlstm_lm.ops.attention:_jagged",
            devices=("cuda",),
            unsuited=_not_jagged,
            checked_on=("cuda",),
        ),
        Backend(name="by_document", function="xlstm_lm.ops.attention:_by_document", unsuited=_not_by_document),
        Backend(
            name="sdpa",
            function="xlstm_lm.ops.attention:_sdpa",
            slow="with one mask for all pairs",
            fast_on=("cpu", "cuda"),
        ),
        Backend(name="definition", function="xlstm_lm.ops.attention:_definition"),
    ),
    samples=samples,
    run=run,
    cost=cost,
    options="long",
)
