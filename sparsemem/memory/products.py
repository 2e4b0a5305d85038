"""What is done with every row of a dense memory, in as few passes over the rows as torch allows.

A pass reads or writes each of the B N W numbers once. What is needed only between two operations
(the factor by which a write erases, a product with a gradient) is made block by block and stays
in the processor's cache; autograd's own formulas would write all of it, several times, and keep
it. Passes of the functions here, forward and backward:

| | forward | backward |
| --- | --- | --- |
| `Scores` | 1 (read) | 2 (read, gradient) |
| `WeightedSum` | 1 (read) | 2 (read, gradient) |
| `Write` | 2 (read old, write new) | 4 (read old, new and the gradient; gradient) |
| `Links`, over N N numbers | 2 (read old, write new) | 3 (read old, gradient; gradient) |

Autograd adds up the gradients that rows get from their four uses in a step (written over, read,
scored for reading and, at the next step, for writing): three sums of 3 passes each. So a step has
5 passes forward and 19 backward, and of numbers for every row and column only the new rows are
kept for the backward pass. Weights [B, H, N] cost H / W of a pass each time they are touched.

Shape letters: B batch, N slots, W slot width, H heads, G heads that erase.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsemem.indexes.metrics import COSINE_EPSILON

# Numbers of a block of rows: a few such blocks fit the cache of a core.
BLOCK = 2**18
FEW = 16  # blocks of rows without data


def blocks(rows: Float[Tensor, "B N W"]) -> Iterator[tuple[slice, slice]]:
    """Batch elements and slots of parts that lie together in memory; on a GPU, of all at once."""
    batch, slots, width = rows.shape
    most = BLOCK if rows.device.type == "cpu" else rows.numel()
    if rows.is_meta:  # the plan of a run: what is alive at once hardly depends on how many blocks
        most = max(BLOCK, rows.numel() // FEW)
    elements, length = max(1, most // (slots * width)), max(1, most // width)
    for element in range(0, batch, elements):
        for slot in range(0, slots, length):
            yield slice(element, element + elements), slice(slot, slot + length)


def weighted_sum(
    weights: Float[Tensor, "B H N"], rows: Float[Tensor, "B N W"]
) -> Float[Tensor, "B H W"]:
    """sum_i w_h(i) M(i), without a gradient; the libraries' product over all N is half as fast."""
    total = rows.new_zeros(*weights.shape[:2], rows.shape[-1])
    for b, n in blocks(rows):
        total[b].baddbmm_(weights[b, :, n], rows[b, n])
    return total


class Scores(torch.autograd.Function):
    """k_h . M(i): keys [B, H, W], rows [B, N, W] -> [B, H, N]."""

    @staticmethod
    def forward(ctx: Any, keys: Tensor, rows: Tensor) -> Tensor:
        """A matrix product."""
        ctx.save_for_backward(keys, rows)
        return torch.bmm(keys, rows.mT)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """sum_i g_h(i) M(i) of the keys, sum_h g_h(i) k_h of the rows."""
        keys, rows = ctx.saved_tensors
        of_keys, of_rows = ctx.needs_input_grad
        return (
            weighted_sum(gradient, rows) if of_keys else None,
            torch.bmm(gradient.mT, keys) if of_rows else None,
        )


class WeightedSum(torch.autograd.Function):
    """r_h = sum_i w_h(i) M(i): weights [B, H, N], rows [B, N, W] -> [B, H, W]."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, rows: Tensor) -> Tensor:
        """Block by block."""
        ctx.save_for_backward(weights, rows)
        return weighted_sum(weights, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """g_h . M(i) of the weights, sum_h w_h(i) g_h of the rows."""
        weights, rows = ctx.saved_tensors
        of_weights, of_rows = ctx.needs_input_grad
        return (
            torch.bmm(gradient, rows.mT) if of_weights else None,
            torch.bmm(weights.mT, gradient) if of_rows else None,
        )


def erase_factors(erases: Float[Tensor, "B G W"]) -> Float[Tensor, "B S W"]:
    """prod_{h in s} -e_h of every set s of heads, the empty set first.

    prod_h (1 - w_h(i) e_h(j)) = sum_s (prod_{h in s} w_h(i)) (prod_{h in s} -e_h(j)): to erase by
    all heads takes one matrix product of these and the `subset_products` of the weights.
    """
    factors = torch.ones_like(erases[:, :1])
    for erase in torch.split(erases, 1, 1):
        factors = torch.cat([factors, factors * -erase], 1)
    return factors


def subset_products(
    factors: Float[Tensor, "B G N"], kept: Float[Tensor, "B _ N"]
) -> Float[Tensor, "B S N"]:
    """kept prod_{h in s} factors_h of every set s of heads, the empty set first."""
    batch, heads, slots = factors.shape
    products = factors.new_empty(batch, 2**heads, slots)
    products[:, :1] = kept
    for head in range(heads):
        without, included = products[:, : 2**head], products[:, 2**head : 2 ** (head + 1)]
        torch.mul(without, factors[:, head : head + 1], out=included)
    return products


def subset_gradients(
    factors: Float[Tensor, "B G N"], products: Float[Tensor, "B S N"], gradient: Tensor
) -> tuple[Float[Tensor, "B G N"], Float[Tensor, "B _ N"]]:
    """Those of `subset_products`' factors and `kept`, from that of its products."""
    found = []
    for head in reversed(range(factors.shape[1])):
        without, included = gradient[:, : 2**head], gradient[:, 2**head :]
        found.append((included * products[:, : 2**head]).sum(1))
        gradient = torch.addcmul(without, included, factors[:, head : head + 1])
    return torch.stack(found[::-1], 1), gradient


class Write(torch.autograd.Function):
    """M'(i) = kept(i) M(i) prod_h (1 - w_h(i) e_h) + sum_h u_h(i) a_h, and the inverse norms of M'.

    rows [B, N, W], kept [B, 1, N], w [B, G, N], `erase_factors` of e [B, 2^G, W], u [B, H, N],
    a [B, H, W] -> rows [B, N, W], inverse norms [B, N].
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        kept: Tensor,
        erasing: Tensor,
        factors: Tensor,
        weights: Tensor,
        words: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Block by block."""
        written, norms = torch.empty_like(rows), torch.empty_like(rows[..., 0])
        for b, n in blocks(rows):
            products = subset_products(erasing[b, :, n], kept[b, :, n])
            new = torch.bmm(weights[b, :, n].mT, words[b], out=written[b, n])
            new.addcmul_(rows[b, n], torch.bmm(products.mT, factors[b]))
            norms[b, n] = torch.linalg.vector_norm(new, dim=-1)
        inverse_norms = norms.square_().add_(COSINE_EPSILON).rsqrt_()
        ctx.save_for_backward(rows, kept, erasing, factors, weights, words, written, inverse_norms)
        ctx.set_materialize_grads(False)
        return written, inverse_norms

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, of_written: Tensor | None, of_norms: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """d|m|^-1 / dm = -m |m|^-3, then the rules of products, block by block."""
        rows, kept, erasing, factors, weights, words, written, inverse_norms = ctx.saved_tensors
        if of_written is None:
            of_written = torch.zeros_like(rows)
        shrink = None if of_norms is None else (of_norms * inverse_norms**3).unsqueeze(-1)
        of_rows = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        of_kept, of_erasing = torch.empty_like(kept), torch.empty_like(erasing)
        of_factors, of_words = torch.zeros_like(factors), torch.zeros_like(words)
        of_weights = torch.empty_like(weights)
        for b, n in blocks(rows):
            gradient, products = of_written[b, n], subset_products(erasing[b, :, n], kept[b, :, n])
            if shrink is not None:
                gradient = torch.addcmul(gradient, shrink[b, n], written[b, n], value=-1)
            of_weights[b, :, n] = torch.bmm(words[b], gradient.mT)
            of_words[b].baddbmm_(weights[b, :, n], gradient)
            erased = gradient * rows[b, n]
            of_factors[b].baddbmm_(products, erased)
            of_erasing[b, :, n], of_kept[b, :, n] = subset_gradients(
                erasing[b, :, n], products, torch.bmm(factors[b], erased.mT)
            )
            if of_rows is not None:
                torch.mul(gradient, torch.bmm(products.mT, factors[b]), out=of_rows[b, n])
        return of_rows, of_kept, of_erasing, of_factors, of_weights, of_words


class Links(torch.autograd.Function):
    """L'[i,j] = (1 - w(i) - w(j)) L[i,j] + w(i) p(j), L'[i,i] = 0 (DNC).

    L [B, N, N], p [B, N], w [B, N] -> [B, N, N].
    """

    @staticmethod
    def forward(ctx: Any, previous: Tensor, precedence: Tensor, weights: Tensor) -> Tensor:
        """Block by block."""
        ctx.save_for_backward(previous, precedence, weights)
        since, updated = precedence.unsqueeze(1), torch.empty_like(previous)
        for b, i in blocks(previous):
            new = link_factors(weights, b, i, out=updated[b, i]).mul_(previous[b, i])
            new.baddbmm_(weights[b, i].unsqueeze(-1), since[b])
        updated.diagonal(dim1=1, dim2=2).zero_()
        return updated

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """The rules of products; nothing flows through the diagonal."""
        previous, precedence, weights = ctx.saved_tensors
        of_previous = torch.empty_like(previous) if ctx.needs_input_grad[0] else None
        of_precedence, of_weights = torch.zeros_like(precedence), torch.zeros_like(weights)
        since = precedence.unsqueeze(-1)
        # Taken out of the sums at the end: the gradient is autograd's, and a copy of it a pass.
        on_diagonal = gradient.diagonal(dim1=1, dim2=2)
        diagonal = previous.diagonal(dim1=1, dim2=2)
        for b, i in blocks(previous):
            part, old = gradient[b, i], previous[b, i]
            of_precedence[b] += (weights[b, i].unsqueeze(1) @ part).squeeze(1)
            of_weights[b, i] += (part @ since[b]).squeeze(-1)
            product = part * old
            of_weights[b, i] -= product.sum(-1)
            of_weights[b] -= product.sum(-2)
            if of_previous is not None:
                link_factors(weights, b, i, out=of_previous[b, i]).mul_(part)
        of_precedence -= on_diagonal * weights
        of_weights += on_diagonal * (2 * diagonal - precedence)
        if of_previous is not None:
            of_previous.diagonal(dim1=1, dim2=2).zero_()
        return of_previous, of_precedence, of_weights


def link_factors(weights: Tensor, b: slice, i: slice, out: Tensor) -> Tensor:
    """1 - w(i) - w(j) for elements `b` and slots `i` of weights [B, N]: [b, i, N]."""
    return torch.sub((1 - weights[b, i]).unsqueeze(-1), weights[b].unsqueeze(1), out=out)
