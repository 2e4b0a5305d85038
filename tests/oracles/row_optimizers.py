"""Row optimisers as loops: every row is a parameter of its own, with a torch optimiser of its own.

So a row that is skipped is one whose optimiser is not stepped: that is what "lazy" means.
"""

import torch
from torch import nn

from sparsemem import MemoryBank
from sparsemem.optim import RowAdagrad, RowAdam, RowAdamW, RowSGD

N, W = 12, 5  # rows of a small table, and their width
CLOSE = {"rtol": 1e-12, "atol": 1e-12}
# Each with options that are not the default ones, and torch's optimiser of the same equations.
CASES = {
    "sgd": (RowSGD, torch.optim.SGD, {"lr": 0.1}),
    "momentum": (RowSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "nesterov": (RowSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "adagrad": (RowAdagrad, None, {"lr": 0.1, "weight_decay": 0.01}),
    "adam": (RowAdam, torch.optim.Adam, {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-6}),
    "adam-l2": (RowAdam, torch.optim.Adam, {"lr": 0.1, "weight_decay": 0.1}),
    "adamw": (RowAdamW, torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.1}),
}


class RowwiseAdagrad:
    """Adagrad of one row with one accumulator, as a loop over its elements."""

    def __init__(self, parameters, lr, weight_decay=0.0, eps=1e-10):
        (self.row,) = parameters
        self.lr, self.weight_decay, self.eps, self.sum = lr, weight_decay, eps, 0.0

    def step(self):
        row = self.row.data
        gradient = [
            g + self.weight_decay * x
            for g, x in zip(self.row.grad.tolist(), row.tolist(), strict=True)
        ]
        self.sum += sum(g * g for g in gradient) / len(gradient)
        for i, g in enumerate(gradient):
            row[i] -= self.lr * g / (self.sum**0.5 + self.eps)


class RowByRow:
    """A table whose rows are stepped one at a time."""

    def __init__(self, kind: str, table: torch.Tensor):
        _, dense, options = CASES[kind]
        self.rows = [nn.Parameter(row.clone()) for row in table]
        self.optimisers = [(dense or RowwiseAdagrad)([row], **options) for row in self.rows]

    def step(self, ids: list[int], gradients: torch.Tensor):
        """Entries of a repeated row add up."""
        for i in set(ids):
            self.rows[i].grad = sum(g for j, g in zip(ids, gradients, strict=True) if i == j)
            self.optimisers[i].step()

    @property
    def table(self) -> torch.Tensor:
        return torch.stack([row.data for row in self.rows])


def sparse(ids: list[int], values: torch.Tensor, num_rows: int) -> torch.Tensor:
    """A row-sparse gradient as autograd gives it: not coalesced."""
    return torch.sparse_coo_tensor(
        torch.tensor([ids], dtype=torch.int64).view(1, -1),
        values,
        (num_rows, *values.shape[1:]),
        check_invariants=True,
    )


def make(kind, parameters, **more):
    optimiser, _, options = CASES[kind]
    return optimiser(parameters, **{**options, **more})


def table(num_rows=N, width=W, dtype=torch.float64):
    return nn.Parameter(torch.randn(num_rows, width, dtype=dtype))


def make_bank(num_rows=N, dtype=torch.float64, **options):
    bank = MemoryBank(num_rows, W, dtype=dtype, **options)
    bank.append(torch.randn(num_rows, W, dtype=dtype))
    return bank
