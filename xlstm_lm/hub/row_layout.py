"""The rows of a batch as a recurrent model reads them: padding out of the way, a restart wherever a document begins.

Padding is no token. The tokens of a row are moved together behind its padding, and the row restarts at the first of
them. Documents packed into one row are told apart by `resets`, or by the arguments with which the collators of
transformers and TRL describe such rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PACKING_OPTIONS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""Arguments of a forward pass that flash attention needs for packed rows, under transformers' names."""


class RowLayout(NamedTuple):
    """The order in which the positions of each row are read, and where the state is emptied."""

    order_BT: Tensor | None
    """Positions with padding first; None without padding."""
    back_BT: Tensor | None
    """The inverse of `order_BT`."""
    resets_BT: Tensor | None
    """True where a document starts, in the order of reading; None where none does."""

    def arrange(self, x_BTD: Tensor) -> Tensor:
        """`x_BTD` in the order of reading."""
        return x_BTD if self.order_BT is None else _take(x_BTD, self.order_BT)

    def restore(self, x_BTD: Tensor) -> Tensor:
        """`x_BTD`, which is in the order of reading, in the order of the batch."""
        return x_BTD if self.back_BT is None else _take(x_BTD, self.back_BT)


def lay_out_rows(
    shape: tuple[int, int],
    held: int,
    device: torch.device,
    *,
    attention_mask: Tensor | None = None,
    resets: Tensor | None = None,
    position_ids: Tensor | None = None,
    seq_idx: Tensor | None = None,
    **packing: Any,
) -> RowLayout:
    """Find the layout of rows of `shape` (B, T), behind `held` tokens in the cache.

    A document starts where `resets` (B, T) is true, where `position_ids` (B, T) or (1, T) do not go on by one, where
    `seq_idx` (B, T) changes, and at the boundaries `cu_seq_lens_q` of a single flattened row. Several of these have to
    agree, except that positions that never start over are compatible with all others.

    Args:
        attention_mask: (B, T), or (B, held + T); 0 where there is padding.
        packing: `PACKING_OPTIONS`.

    Raises:
        ValueError: shapes that do not fit, descriptions of documents that contradict each other, or padding behind
            tokens that the cache holds already.
    """
    B, T = shape
    order_BT, first_B = None, torch.zeros(B, dtype=torch.long, device=device)
    starts_BT = None
    if attention_mask is not None:
        order_BT, first_B, starts_BT = _leave_out_padding(attention_mask.to(device), T, held)

    def ordered(x_BT: Tensor) -> Tensor:
        return x_BT if order_BT is None else x_BT.gather(1, order_BT)

    found: dict[str, Tensor] = {}
    if resets is not None:
        found["resets"] = ordered(_rows("resets", resets, shape, device).bool())
    if seq_idx is not None:
        documents_BT = ordered(_rows("seq_idx", seq_idx, shape, device))
        found["seq_idx"] = F.pad(documents_BT.diff(dim=1) != 0, (1, 0))
    boundaries_BT = _at_boundaries(shape, held, device, **packing)
    if boundaries_BT is not None:
        found["cu_seq_lens_q"] = ordered(boundaries_BT)
    if position_ids is not None:
        position_BT = ordered(_rows("position_ids", position_ids, shape, device))
        starts_over_BT = F.pad(position_BT.diff(dim=1) != 1, (1, 0))
        if held:
            starts_over_BT[:, 0] = position_BT[:, 0] == 0
        found["position_ids"] = starts_over_BT
    if len(found) > 1 and not torch.compiler.is_compiling():
        _check_agreement(found, first_B)
    for found_BT in found.values():
        starts_BT = found_BT if starts_BT is None else starts_BT | found_BT
    return RowLayout(order_BT, None if order_BT is None else order_BT.argsort(dim=1), starts_BT)


def _leave_out_padding(mask_BS: Tensor, length: int, held: int) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """The order of positions (B, T) that puts padding first, each row's number of them (B,), and its first token as a
    start (B, T). No order and no start where there is no padding."""
    if mask_BS.dim() != 2 or mask_BS.shape[1] not in (length, held + length):
        raise ValueError(
            f"attention_mask is {tuple(mask_BS.shape)}; it must be (B, {length}) to go with the tokens, or "
            f"(B, {held + length}) with the {held} in the cache."
        )
    mask_BT = mask_BS[:, -length:].bool()
    padding_B = (~mask_BT).sum(1)
    # A traced program has to serve every mask, so it always moves tokens.
    if not torch.compiler.is_compiling() and not bool(padding_B.any()):
        return None, padding_B, None
    starts_BT = torch.arange(length, device=mask_BT.device) == padding_B[:, None]
    if held:
        started_B = torch.ones_like(padding_B, dtype=torch.bool)
        if mask_BS.shape[1] > length:
            started_B = mask_BS[:, :-length].bool().any(1)
        problem = (
            "There is padding behind tokens that the cache holds already. A recurrent state cannot leave it out: pad "
            "on the left, give every row its own cache, or give all tokens again without a cache."
        )
        allowed = ~(started_B & (padding_B > 0)).any()
        if torch.compiler.is_compiling():
            torch._assert_async(allowed, problem)
        elif not bool(allowed):
            raise ValueError(problem)
        starts_BT = starts_BT & ~started_B[:, None]
    return mask_BT.to(torch.uint8).argsort(dim=1, stable=True), padding_B, starts_BT


def _at_boundaries(
    shape: tuple[int, int],
    held: int,
    device: torch.device,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
) -> Tensor | None:
    """True (1, T) at the boundaries of documents in a flattened row; None where no boundaries are given."""
    if cu_seq_lens_q is None:
        for name, value in (
            ("cu_seq_lens_k", cu_seq_lens_k),
            ("max_length_q", max_length_q),
            ("max_length_k", max_length_k),
        ):
            if value is not None:
                raise ValueError(f"{name} describes packed documents, but cu_seq_lens_q, their boundaries, is missing.")
        return None
    B, T = shape
    if B != 1 or held:
        raise ValueError(
            f"cu_seq_lens_q gives boundaries in one flattened row and without a cache, but the batch has {B} rows and "
            f"the cache {held} tokens: give resets (B, T) instead."
        )
    boundaries = torch.as_tensor(cu_seq_lens_q, device=device).long()
    if not torch.compiler.is_compiling():
        _check_boundaries(boundaries, T, cu_seq_lens_k, max_length_q, max_length_k)
    # One more position takes the end of the last document.
    starts_BT = torch.zeros(1, T + 1, dtype=torch.bool, device=device)
    return starts_BT.index_fill(1, boundaries, True)[:, :T]


def _check_boundaries(
    boundaries: Tensor, length: int, cu_seq_lens_k: Tensor | None, max_length_q: int | None, max_length_k: int | None
) -> None:
    ends = boundaries.tolist() if boundaries.dim() == 1 else []
    if not ends or ends != sorted(ends) or ends[0] != 0 or ends[-1] != length:
        raise ValueError(
            f"cu_seq_lens_q is {boundaries.tolist()}; it must rise from 0 to the {length} tokens of the row."
        )
    if cu_seq_lens_k is not None and torch.as_tensor(cu_seq_lens_k).tolist() != ends:
        raise ValueError(
            f"cu_seq_lens_k is {torch.as_tensor(cu_seq_lens_k).tolist()}, but cu_seq_lens_q is {ends}; a recurrent "
            "model reads the same documents in both."
        )
    longest = int(boundaries.diff().max()) if len(ends) > 1 else 0
    for name, value in (("max_length_q", max_length_q), ("max_length_k", max_length_k)):
        if value is not None and int(value) < longest:
            raise ValueError(f"{name} is {int(value)}, but cu_seq_lens_q has a document of {longest} tokens.")


def _check_agreement(found: dict[str, Tensor], first_B: Tensor) -> None:
    """Compare where documents start behind the first token of each row, padding aside."""
    name, starts_BT = next(iter(found.items()))
    behind_first_BT = torch.arange(starts_BT.shape[1], device=first_B.device) > first_B[:, None]
    for other, other_BT in found.items():
        if other == "position_ids" and not bool((other_BT & behind_first_BT).any()):
            continue  # plain positions, which say nothing about documents
        different_BT = (starts_BT != other_BT) & behind_first_BT
        if bool(different_BT.any()):
            row, position = different_BT.nonzero()[0].tolist()
            yes, no = (name, other) if bool(starts_BT[row, position]) else (other, name)
            raise ValueError(
                f"{yes} starts a document at token {position - int(first_B[row])} of row {row}, and {no} does not: "
                "give one of them, or make them agree."
            )


def _rows(name: str, x: Tensor, shape: tuple[int, int], device: torch.device) -> Tensor:
    if x.dim() != 2 or x.shape[1] != shape[1] or x.shape[0] not in (1, shape[0]):
        raise ValueError(f"{name} is {tuple(x.shape)}; it must be {shape}, a value for each token.")
    return x.to(device).expand(shape)


def _take(x_BTD: Tensor, order_BT: Tensor) -> Tensor:
    """Position t of each row becomes what was at position order[t]."""
    return x_BTD.gather(1, order_BT.to(x_BTD.device)[..., None].expand_as(x_BTD))
