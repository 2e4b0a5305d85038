"""Stochastic gradient descent by row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from sparsemem.optim.base import Options, RowOptimizer, State, zeros_like_rows
from sparsemem.optim.options import check_range

if TYPE_CHECKING:
    from sparsemem.kernels.row_gradient import Gradient as RowGradient


class RowSGD(RowOptimizer):
    """SGD (Sutskever et al. 2013's momentum as torch has it) of the rows that have a gradient.

        g = gradient + weight_decay row;  b = momentum b + g
        row -= lr b  (with nesterov: row -= lr (g + momentum b))

    Equal to `torch.optim.SGD` when every row has a gradient at each step. A row that is skipped
    keeps its momentum b as it was, and neither coasts on it nor decays.

    See `RowOptimizer` for what all row optimisers share.

    Args:
        params: parameters, or groups of them with options of their own.
        lr: learning rate, at least 0.
        momentum: from 0 to less than 1; with 0 no state is kept.
        weight_decay: factor of the L2 penalty's gradient, at least 0.
        nesterov: look ahead by the momentum.
        rounding_seed: round bfloat16 parameters stochastically; None: to nearest.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        rounding_seed: int | None = None,
    ) -> None:
        options: Options = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        options |= {"nesterov": nesterov, "rounding_seed": rounding_seed}
        super().__init__(params, options)

    def _check(self, options: Options) -> None:
        super()._check(options)
        check_range("lr", options["lr"], 0.0)
        check_range("momentum", options["momentum"], 0.0, 1.0)
        check_range("weight_decay", options["weight_decay"], 0.0)
        if options["nesterov"] and not options["momentum"]:
            raise ValueError("nesterov is True, expected False where momentum is 0")

    def _zero_state(self, parameter: Tensor, by_row: bool, options: Options) -> State:
        return {"momentum_buffer": zeros_like_rows(parameter)} if options["momentum"] else {}

    def _to_rows(self, parameter: Tensor, state: State) -> None:
        """It is the same."""

    def _update(self, rows: Tensor, gradient: Tensor, state: State, options: Any) -> None:
        if options["weight_decay"]:
            gradient = gradient.add(rows, alpha=options["weight_decay"])
        momentum = options["momentum"]
        if momentum:
            velocity = state["momentum_buffer"].mul_(momentum).add_(gradient)
            gradient = gradient.add(velocity, alpha=momentum) if options["nesterov"] else velocity
        rows.sub_(gradient, alpha=float(options["lr"]))

    def _launch(
        self, steps: Any, table: Tensor, gradient: RowGradient, state: State, options: Options
    ) -> Tensor | None:
        return steps.step_sgd(table, gradient, state, options)  # type: ignore[no-any-return]
