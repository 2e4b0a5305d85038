"""MemoryLayer: a bank of rows in the place of a transformer's feed-forward block.

Letters: B batch, T steps, D the network's width, H heads, K rows read a head, W and V the widths of
a bank's keys and values.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sparsemem.bank.contract import Bank, check_bank_contract
from sparsemem.bank.reading import Hit, read_sum
from sparsemem.checks import (
    check_at_most,
    check_finite,
    check_like,
    check_positive,
    check_size,
    nearest,
)
from sparsemem.devices import is_device
from sparsemem.models.precision import is_autocast

QUERY_NORMS = ("layer", "batch", "none")


class MemoryLayer(nn.Module):
    """y_t = out( silu(gate(x_t)) * sum over heads h and their K best rows i of s_hi v_i ).

    q_h = norm(W_h x_t + b_h); s_h = softmax over the K rows that score best against q_h of
    (sign score / temperature_h), where sign is -1 for squared distances. Product key memory is
    Lample et al. 2019, arXiv 1907.05242, section 3; the gate and `out` are Berges et al. 2024
    (Memory Layers at Scale), arXiv 2412.09764, section 3.2. Layers that are given the same bank
    share its keys and values; each has queries, gate and output of its own.

    The bank is a part of the layer: its rows are among `layer.parameters()`, with row-sparse
    gradients, so give them to an optimiser that takes those (`sparsemem.optim`). Positions in which
    nothing is live read zeros.

    Args:
        dim: D, width of input and output.
        bank: what is read, a `MemoryBank` or `ShardedBank` of any index. Its metric scores the
            queries.
        num_heads: H, queries a position.
        top_k: K, rows read a head.
        gated: multiply the sum by silu(gate(x)). Without it, y = out(sum), and `out` is there only
            if the values' width is not D.
        query_norm: "layer" (each head's query by itself), "batch" (each element of the queries over
            the batch's positions and, in evaluation, by running averages) or "none".
        temperature: at the start. It is what the width of scores asks for: 1 suits inner products
            of normed queries with rows of length 1, less suits cosines, say 0.1.
        learn_temperature: one for each head, as a parameter, or fixed.
    """

    def __init__(
        self,
        dim: int,
        bank: Bank,
        num_heads: int = 4,
        top_k: int = 32,
        gated: bool = True,
        *,
        query_norm: str = "layer",
        temperature: float = 1.0,
        learn_temperature: bool = True,
    ) -> None:
        super().__init__()
        check_bank_contract(bank)
        self.dim = check_size("dim", dim)
        self.num_heads = check_size("num_heads", num_heads)
        self.top_k = check_at_most(
            "top_k", check_size("top_k", top_k), "bank.num_rows", bank.num_rows
        )
        check_positive("temperature", temperature)
        self.bank = bank
        value_width = bank.width if bank.value_width is None else bank.value_width
        self.query = nn.Linear(dim, num_heads * bank.width)
        self.query_norm = _query_norm(query_norm, num_heads, bank.width)
        self.log_temperature = nn.Parameter(
            torch.full((num_heads,), math.log(temperature)), requires_grad=learn_temperature
        )
        self.gate = nn.Linear(dim, value_width, bias=False) if gated else None
        self.out: nn.Module = nn.Identity()
        if gated or value_width != dim:
            self.out = nn.Linear(value_width, dim, bias=False)

    def forward(self, input: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Each position reads the bank for itself; the result has the dtype of a linear layer's."""
        if input.ndim != 3 or input.shape[2] != self.dim:
            raise ValueError(
                f"input has shape {tuple(input.shape)}, expected [batch, steps, {self.dim}]"
            )
        if not is_autocast(input):
            check_like("input", input, self.query.weight)
        if not self._checks_queries(input):
            check_finite("input", input)
        queries = self.queries(input)
        try:
            read = read_sum(self.bank, queries, self.top_k, self.weights).to(queries.dtype)
        except ValueError:
            check_finite("input", input)  # of which then the queries are not either
            raise
        output: Tensor = self.out(read if self.gate is None else F.silu(self.gate(input)) * read)
        return output

    def queries(self, input: Float[Tensor, "B T D"]) -> Float[Tensor, "B T H W"]:
        """What each head asks at each position."""
        flat: Tensor = self.query(input)
        shape = (*input.shape[:2], self.num_heads, self.bank.width)
        # A batch norm takes positions and all heads' elements, a layer norm each head by itself.
        is_batch = isinstance(self.query_norm, nn.BatchNorm1d)
        normed: Tensor = self.query_norm(flat.flatten(0, 1) if is_batch else flat.view(shape))
        return normed.view(shape)

    def weights(self, hit: Hit) -> Float[Tensor, "B T H K"]:
        """s: how much each row that a head found counts; the rows that are missing, nothing.

        `hit.values` may be empty: on a GPU they are summed where they lie.
        """
        missing = hit.ids < 0
        # Infinite scores must not meet the temperature: its gradient would be 0 * inf.
        scores = hit.scores.masked_fill(missing, 0) * self.bank.metric.sign
        logits = scores * (-self.log_temperature).exp().to(scores.dtype).unsqueeze(-1)
        # A head that found nothing at all weighs its rows, which are zeros, equally.
        none = missing.all(-1, keepdim=True)
        return logits.masked_fill(missing & ~none, -torch.inf).softmax(-1)

    def _checks_queries(self, input: Tensor) -> bool:
        """Whether the bank's check of the queries is enough: on a device, which to look at waits.

        Not where a batch norm's averages would have taken the input in before.
        """
        return is_device(input) and not isinstance(self.query_norm, nn.BatchNorm1d)


def _query_norm(name: str, num_heads: int, width: int) -> nn.Module:
    if name == "layer":
        return nn.LayerNorm(width)
    if name == "batch":
        return nn.BatchNorm1d(num_heads * width)
    if name == "none":
        return nn.Identity()
    raise ValueError(f"query_norm is {name!r}, {nearest(str(name), QUERY_NORMS)}")
