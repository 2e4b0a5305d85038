"""Clipping by the norm of sparse and dense gradients together."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils import get_total_norm

from sparsemem.bank.gradients import by_row
from sparsemem.optim.options import check_above_zero, check_range
from sparsemem.optim.remote import team_norm, team_tables


@torch.no_grad()
def clip_grad_norm(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> Float[Tensor, ""]:
    """Scale all gradients by one factor, so that their norm is at most `max_norm`.

    Equal to `torch.nn.utils.clip_grad_norm_` of the same gradients made dense: it counts row-sparse
    gradients as what they add up to where a row is in them more than once, and leaves them in that
    form (coalesced), which saves the optimiser doing so; on a GPU a repeated row's sum becomes one
    of its entries and the others zeros, so that nothing waits. Call it between backward and step,
    after `GradScaler.unscale_` if there is one.

    Where a bank's rows are elsewhere and several workers train them, each calls it, with dense
    gradients that have been averaged: what counts is the mean of all workers' gradients, so the
    norm and the factor are the same on all. Between this and the step the gradients stay as they
    are.

    Args:
        parameters: one or more; those without a gradient do not count.
        max_norm: at least 0; `inf`: nothing is scaled.
        norm_type: p of the p-norm, above 0; `inf`: the largest absolute value. With several
            workers only 2.
        error_if_nonfinite: raise RuntimeError, and change nothing, if the norm is NaN or infinite.

    Returns:
        The norm before clipping, of all gradients taken as one vector.
    """
    if max_norm != math.inf:
        check_range("max_norm", max_norm, 0.0)
    if norm_type != math.inf:
        check_above_zero("norm_type", norm_type)
    own = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    summed = [(parameter, _summed(parameter)) for parameter in own]
    teams = team_tables(own)
    if teams and norm_type != 2:
        raise ValueError(f"norm_type is {norm_type}, expected 2 where several workers train rows")
    shared = {id(table) for tables in teams.values() for table in tables}
    filled = [gradient for _, gradient in summed if gradient is not None]
    counted = [x for parameter, x in summed if x is not None and id(parameter) not in shared]
    counted += [team_norm(bank, tables) for bank, tables in teams.items()]
    total = get_total_norm(counted, norm_type, error_if_nonfinite)
    # As torch's: always a product, so that nothing waits for a GPU.
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for gradient in filled:
        gradient.mul_(factor.to(gradient.device))
    for bank, tables in teams.items():
        bank.scale([bank.table_name(table) for table in tables], factor.item())
    return total


def _summed(parameter: Tensor) -> Tensor | None:
    """What counts of a gradient: its elements; of a sparse one, from now on, a sum for each row."""
    gradient = parameter.grad
    if gradient is not None and gradient.is_sparse:
        parameter.grad = gradient = by_row(gradient, gradient.dtype)
        gradient = gradient._values()
    return gradient if gradient is not None and gradient.numel() else None
