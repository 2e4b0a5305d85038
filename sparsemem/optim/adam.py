"""Lazy Adam and AdamW."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from sparsemem.optim.base import (
    Options,
    RowOptimizer,
    State,
    across,
    reach,
    two_like_rows,
    zeros_like_rows,
)
from sparsemem.optim.options import check_above_zero, check_betas, check_range

if TYPE_CHECKING:
    from sparsemem.kernels.row_gradient import Gradient as RowGradient


class RowAdam(RowOptimizer):
    """Adam (Kingma & Ba 2015, algorithm 1), lazily: only of the rows that have a gradient.

        g = gradient + weight_decay row;  t += 1
        m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2
        row -= lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    Each row has its own m, v and t (the number of its steps). Equal to `torch.optim.Adam` when
    every row has a gradient at each step. What differs for a skipped row: its moments do not fade
    and its t does not count, so that after a long pause its next step is as long as if there had
    been none, and it neither coasts on old momentum nor decays. (`torch.optim.SparseAdam`
    counts one t for all rows, so the first step of a row that comes late is about
    (1 - beta1) / sqrt(1 - beta2) = 3.2 lr long, and here lr.)

    See `RowOptimizer` for what all row optimisers share.

    Args:
        params: parameters, or groups of them with options of their own.
        lr: learning rate, at least 0.
        betas: decay of the two moments, from 0 to less than 1.
        eps: added to the root, above 0.
        weight_decay: at least 0; here the factor of the L2 penalty's gradient.
        rounding_seed: round bfloat16 parameters stochastically; None: to nearest.
    """

    decoupled: ClassVar[bool] = False  # weight decay past the moments

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rounding_seed: int | None = None,
    ) -> None:
        options: Options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        options["rounding_seed"] = rounding_seed
        super().__init__(params, options)

    def _check(self, options: Options) -> None:
        super()._check(options)
        check_range("lr", options["lr"], 0.0)
        check_betas(options["betas"])
        check_above_zero("eps", options["eps"])
        check_range("weight_decay", options["weight_decay"], 0.0)

    def _zero_state(self, parameter: Tensor, by_row: bool, options: Options) -> State:
        count = zeros_like_rows(parameter, narrow=True)
        if by_row:
            mean, square = two_like_rows(parameter)
            return {"exp_avg": mean, "exp_avg_sq": square, "step": count}
        mean, square = zeros_like_rows(parameter), zeros_like_rows(parameter)
        return {"exp_avg": mean, "exp_avg_sq": square, "step": count.new_zeros(())}

    def _reach(self, state: State, ids: Tensor) -> None:
        if ids.device.type == "cpu":
            reach(state["exp_avg"], ids[state["step"].index_select(0, ids) == 0])

    def _to_rows(self, parameter: Tensor, state: State) -> None:
        if not state["step"].ndim:
            state["step"] = state["step"].expand(len(parameter)).clone()

    def _update(self, rows: Tensor, gradient: Tensor, state: State, options: Options) -> None:
        lr, decay = float(options["lr"]), options["weight_decay"]
        if decay and self.decoupled:
            rows.mul_(1 - lr * decay)
        elif decay:
            gradient = gradient.add(rows, alpha=decay)
        beta1, beta2 = options["betas"]
        count = across(state["step"].add_(1), rows).to(rows.dtype)
        mean = state["exp_avg"].lerp_(gradient, 1 - beta1)
        square = state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = square.div(_correction(beta2, count)).sqrt_().add_(options["eps"])
        rows.addcdiv_(mean.div(_correction(beta1, count)), root, value=-lr)

    def _launch(
        self, steps: Any, table: Tensor, gradient: RowGradient, state: State, options: Options
    ) -> Tensor | None:
        return steps.step_adam(table, gradient, state, options, self.decoupled)  # type: ignore[no-any-return]


class RowAdamW(RowAdam):
    """AdamW (Loshchilov & Hutter 2019, algorithm 2), lazily: as `RowAdam`, but for the decay.

        row *= 1 - lr weight_decay, beside Adam's step and not through its moments

    Equal to `torch.optim.AdamW` when every row has a gradient at each step; a skipped row does
    not decay.

    Args:
        params: parameters, or groups of them with options of their own.
        lr: learning rate, at least 0.
        betas: decay of the two moments, from 0 to less than 1.
        eps: added to the root, above 0.
        weight_decay: at least 0.
        rounding_seed: round bfloat16 parameters stochastically; None: to nearest.
    """

    decoupled: ClassVar[bool] = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        rounding_seed: int | None = None,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, rounding_seed=rounding_seed)


def _correction(beta: float, count: Tensor) -> Tensor:
    """1 - beta^count, exact to the last digits where beta^count is near 1."""
    return torch.expm1(count * (math.log(beta) if beta else -math.inf)).neg_()
