"""Rows that several processes share: each has a slice of every row, and needs the state before it.

A mixer with `DividedRows` first gets the state before its slice by an exchange with the other processes. It then
computes its slice from this state, as if an earlier call had returned it. Values and gradients are therefore those of
whole rows.

Gradients flow back through the exchanges. The number and order of exchanges must be the same on every process, in the
backward pass too. Otherwise processes wait for each other forever, because ZeRO has its own exchanges between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from xlstm_lm.ops.conv import last_inputs
from xlstm_lm.ops.slices import (
    DELTA_RULES,
    MLSTM_RULES,
    SCAN_RULES,
    Effect,
    State,
    StateRules,
    delta_effect,
    mlstm_effect,
    scan_effect,
)
from xlstm_lm.ops.slstm import slstm
from xlstm_lm.ops.ssd import for_each_head, log_input
from xlstm_lm.parallel.exchange import all_gather, all_to_all, receive, send
from xlstm_lm.parallel.process_group import Axis

MOST_GATHERED = 8
"""Largest number of processes at which each gathers the effects of all slices. More processes exchange columns instead,
because the bytes of this do not grow with the number of processes."""


@dataclass(frozen=True)
class DividedRows:
    """Rows whose tokens the processes of an axis divide into equal slices. Process r has slice r of every row."""

    axis: Axis
    """The processes."""
    most_gathered: int = MOST_GATHERED
    """Largest number of processes at which each gathers the effects of all slices."""

    def convolution_inputs_before(
        self, x_BTD: Tensor, resets_BT: Tensor | None, past: int, carried: Tensor | None = None
    ) -> Tensor:
        """The last `past` inputs before this slice (B, past, D), zero before the start of their document.

        Args:
            x_BTD: this slice's inputs (B, T, D).
            resets_BT: (B, T) bool, true where a document starts; None for no resets.
            past: number of earlier inputs that an output depends on; at most T.
            carried: the last inputs before the whole row (B, past, D); None for zeros.
        """
        assert past <= x_BTD.shape[1], "a slice is shorter than the reach of the convolution"
        documents_BT = None if resets_BT is None else resets_BT.cumsum(1)
        every_SBWD = all_gather(last_inputs(x_BTD, documents_BT, past), self.axis.group)
        rank = self.axis.rank
        before_BWD = every_SBWD[max(rank - 1, 0) : rank].sum(0)  # for the first process an empty sum, with gradients
        return before_BWD if carried is None or rank > 0 else carried + before_BWD

    def mlstm_state_before(
        self,
        k_BTHK: Tensor,
        v_BTHV: Tensor,
        input_BTH: Tensor,
        forget_BTH: Tensor,
        resets_BT: Tensor | None,
        input_gate: str,
        carried: State | None = None,
    ) -> State:
        """The mLSTM's state (C, n, m) before this slice, from keys, values and gates before their activation."""
        dtype = torch.promote_types(k_BTHK.dtype, torch.float32)
        log_input_BTH = input_BTH.to(dtype) if input_gate == "exp" else F.logsigmoid(input_BTH.to(dtype))
        effect = mlstm_effect(k_BTHK, v_BTHV, log_input_BTH, F.logsigmoid(forget_BTH.to(dtype)), resets_BT)
        if carried is not None:
            C_BHKV, n_BHK, m_BH = carried
            carried = (torch.cat((C_BHKV, n_BHK[..., None]), dim=-1), m_BH)
        both_BHKV, m_BH = self._state_before(effect, MLSTM_RULES, carried)
        return both_BHKV[..., :-1], both_BHKV[..., -1], m_BH

    def ssd_state_before(
        self,
        x_BTHP: Tensor,
        dt_BTH: Tensor,
        a_H: Tensor,
        b_BTGN: Tensor,
        resets_BT: Tensor | None,
        carried: Tensor | None = None,
    ) -> Tensor:
        """SSD's state (B, H, N, P) before this slice, from its inputs."""
        b_BTHN = for_each_head(b_BTGN, x_BTHP.shape[2])
        effect = mlstm_effect(b_BTHN, x_BTHP, log_input(dt_BTH), dt_BTH * a_H, resets_BT)
        state = None if carried is None else (F.pad(carried, (0, 1)), carried.new_zeros(carried.shape[:2]))
        both_BHNP, m_BH = self._state_before(effect, MLSTM_RULES, state)
        return both_BHNP[..., :-1] * m_BH.exp()[..., None, None]

    def scan_state_before(
        self,
        x_BTE: Tensor,
        dt_BTE: Tensor,
        a_EN: Tensor,
        b_BTN: Tensor,
        resets_BT: Tensor | None,
        backend: str,
        carried: Tensor | None = None,
    ) -> Tensor:
        """The selective scan's state (B, E, N) before this slice, from its inputs."""
        effect = scan_effect(x_BTE, dt_BTE, a_EN, b_BTN, resets_BT, backend)
        return self._state_before(effect, SCAN_RULES, None if carried is None else (carried.mT,))[0].mT

    def delta_state_before(
        self,
        k_BTHK: Tensor,
        v_BTHV: Tensor,
        log_decay_BTH: Tensor,
        beta_BTH: Tensor,
        resets_BT: Tensor | None,
        chunk_length: int | None,
        backend: str,
        carried: Tensor | None = None,
    ) -> Tensor:
        """The gated delta rule's state (B, H, K, V) before this slice, from its inputs."""
        effect = delta_effect(k_BTHK, v_BTHV, log_decay_BTH, beta_BTH, resets_BT, chunk_length, backend)
        return self._state_before(effect, DELTA_RULES, None if carried is None else (carried,))[0]

    def slstm(
        self,
        wx_BTGHD: Tensor,
        r_GHDD: Tensor,
        bias_GHD: Tensor,
        *,
        resets: Tensor | None,
        initial_state: State | None,
        return_state: bool,
        backend: str,
    ) -> Tensor | tuple[Tensor, State]:
        """The sLSTM over this slice. Arguments and results as of `xlstm_lm.ops.slstm.slstm`.

        The cell is not linear in its state, so each process waits for the one before it. It waits for one row at a
        time: while it computes a row, the process before it computes the next row.
        """
        # ZeRO reduces the gradient of a parameter as soon as it is complete, and waits for the other processes. They
        # may still wait for gradients of states from this process. The gradient of a view is complete only after all
        # rows have sent theirs.
        r_GHDD, bias_GHD = r_GHDD.view_as(r_GHDD), bias_GHD.view_as(bias_GHD)
        ys, states = [], []
        for row in range(wx_BTGHD.shape[0]):
            wx = wx_BTGHD[row : row + 1]
            state = None if initial_state is None else tuple(part[row : row + 1] for part in initial_state)
            if self.axis.rank > 0:
                dtype = torch.promote_types(wx.dtype, torch.float32)
                template = torch.stack([wx[:, 0, 0]] * 4).to(dtype)  # y, c, n and m, each (1, H, D)
                state = receive(template, self.axis.rank - 1, self.axis.group).unbind(0)
            y, after = slstm(
                wx,
                r_GHDD,
                bias_GHD,
                resets=None if resets is None else resets[row : row + 1],
                initial_state=state,
                return_state=True,
                backend=backend,
            )
            if self.axis.rank < self.axis.size - 1:
                y = send(y, torch.stack(after), self.axis.rank + 1, self.axis.group)
            ys.append(y)
            states.append(after)
        y_BTHD = torch.cat(ys)
        return (y_BTHD, tuple(map(torch.cat, zip(*states, strict=True)))) if return_state else y_BTHD

    def keys_before(self, keys_BTHK: Tensor) -> Tensor:
        """Keys or values (B, S, H, K) of all slices before this one."""
        every_SBTHK = all_gather(keys_BTHK, self.axis.group)
        return every_SBTHK[: self.axis.rank].transpose(0, 1).flatten(1, 2)

    def documents_before(self, B: int, T: int, resets_BT: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
        """Whether each token before this slice (B, S) is in the document that continues into it; their number (B,)."""
        if resets_BT is None:
            resets_BT = torch.zeros(B, T, dtype=torch.bool, device=device)
        every_SBT = all_gather(resets_BT.to(device, torch.uint8), self.axis.group)
        starts_BS = every_SBT[: self.axis.rank].transpose(0, 1).flatten(1)
        number_BS = starts_BS.cumsum(1)
        seen_BS = number_BS == number_BS[:, -1:]
        return seen_BS, seen_BS.sum(1)

    def _state_before(self, effect: Effect, rules: StateRules, carried: State | None) -> State:
        """The state before this slice.

        Args:
            effect: effect of this slice.
            rules: rules of the operation.
            carried: the state before the whole row; None for an empty one.
        """
        if self.axis.rank > 0:
            carried = None  # the first process adds it to the effect of its slice
        elif carried is not None:
            columns, *shared = rules.after_slice(carried, effect)
            effect = Effect(self._with_state(effect.columns, columns), (*shared, *effect.shared[len(shared) :]))
        if self.axis.size > self.most_gathered:
            state = self._exchange_columns(effect, rules)
        else:
            state = self._gather(effect, rules)
        if carried is None:
            return state
        # The exchange gives the first process only zeros. Adding them makes the exchange part of its backward pass.
        return tuple(own + each if each.requires_grad else own for own, each in zip(carried, state, strict=True))

    @staticmethod
    def _with_state(columns: Tensor, state: Tensor) -> Tensor:
        """An effect's columns with another state after the slice, which is their upper part."""
        return torch.cat((state, columns[..., state.shape[-2] :, :]), dim=-2)

    def _gather(self, effect: Effect, rules: StateRules) -> State:
        """The state before this slice, in one exchange. Every process gathers all effects and uses those before it."""
        tensors = (effect.columns, *effect.shared)
        columns_S, *shared_S = _split(all_gather(_join(tensors), self.axis.group), tensors)
        state = rules.start(columns_S[:0].sum(0))  # zeros, through which gradients reach the exchange
        for j in range(self.axis.rank):
            state = rules.after_slice(state, Effect(columns_S[j], tuple(each[j] for each in shared_S)))
        return state

    def _exchange_columns(self, effect: Effect, rules: StateRules) -> State:
        """The state before this slice. Every process computes some columns of the states before all slices.

        The first exchange gives each process its columns of all effects. The last gives it all columns of its state.
        """
        columns, shared = effect
        V = columns.shape[-1]
        padded = F.pad(columns, (0, -V % self.axis.size))
        parts_S = padded.unflatten(-1, (self.axis.size, -1)).movedim(-2, 0)
        columns_S = all_to_all(parts_S, self.axis.group)
        shared_S = _split(all_gather(_join(shared), self.axis.group), shared) if shared else []
        state = rules.start(columns_S[:0].sum(0))  # as in _gather
        states = [state]
        for j in range(self.axis.size - 1):
            state = rules.after_slice(state, Effect(columns_S[j], tuple(each[j] for each in shared_S)))
            states.append(state)
        before_S = all_to_all(torch.stack([columns for columns, *_ in states]), self.axis.group)
        own = before_S.movedim(0, -2).flatten(-2)[..., :V]
        return own, *states[self.axis.rank][1:]


def _join(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([each.flatten() for each in tensors])


def _split(joined_SX: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    parts = joined_SX.split([each.numel() for each in like], dim=1)
    return [part.unflatten(1, each.shape) for part, each in zip(parts, like, strict=True)]
