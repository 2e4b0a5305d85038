"""Adagrad with one accumulator a row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from sparsemem.optim.base import Options, RowOptimizer, State, across, zeros_like_rows
from sparsemem.optim.options import check_above_zero, check_range

if TYPE_CHECKING:
    from sparsemem.kernels.row_gradient import Gradient as RowGradient


class RowAdagrad(RowOptimizer):
    """Adagrad whose state is one number a row (Mudigere et al. 2022, arXiv 2104.05158).

        g = gradient + weight_decay row;  s += mean(g^2);  row -= lr g / (sqrt(s) + eps)

    The mean is over the row's elements, so state takes 1/W of the table's memory. A skipped row
    keeps its s and does not decay; nothing else depends on which steps skipped it.

    Parameters with dense gradients are stepped by the ordinary Adagrad (one accumulator an
    element), equal to `torch.optim.Adagrad`. See `RowOptimizer` for what all row optimisers share.

    Args:
        params: parameters, or groups of them with options of their own.
        lr: learning rate, at least 0.
        weight_decay: factor of the L2 penalty's gradient, at least 0.
        eps: added to the root, above 0.
        rounding_seed: round bfloat16 parameters stochastically; None: to nearest.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        weight_decay: float = 0.0,
        eps: float = 1e-10,
        *,
        rounding_seed: int | None = None,
    ) -> None:
        options: Options = {"lr": lr, "weight_decay": weight_decay, "eps": eps}
        options["rounding_seed"] = rounding_seed
        super().__init__(params, options)

    def _check(self, options: Options) -> None:
        super()._check(options)
        check_range("lr", options["lr"], 0.0)
        check_range("weight_decay", options["weight_decay"], 0.0)
        check_above_zero("eps", options["eps"])

    def _zero_state(self, parameter: Tensor, by_row: bool, options: Options) -> State:
        return {"sum": zeros_like_rows(parameter, narrow=by_row)}

    def _to_rows(self, parameter: Tensor, state: State) -> None:
        if state["sum"].ndim > 1:  # the sum of means is the mean of sums
            state["sum"] = state["sum"].view(len(parameter), -1).mean(1)

    def _update(self, rows: Tensor, gradient: Tensor, state: State, options: Options) -> None:
        if options["weight_decay"]:
            gradient = gradient.add(rows, alpha=options["weight_decay"])
        total, squares = state["sum"], gradient.square()
        if total.shape != squares.shape:
            squares = squares.view(len(squares), -1).mean(1)
        root = total.add_(squares).sqrt().add_(options["eps"])
        rows.addcdiv_(gradient, across(root, rows), value=-float(options["lr"]))

    def _launch(
        self, steps: Any, table: Tensor, gradient: RowGradient, state: State, options: Options
    ) -> Tensor | None:
        return steps.step_adagrad(table, gradient, state, options)  # type: ignore[no-any-return]
