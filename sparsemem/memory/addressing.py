"""Addressing of a dense memory: one equation, one pure function.

Shape letters: B batch, N slots, W slot width, H heads (R read heads in the DNC), S shifts.
Sources: Graves et al. 2014, arXiv 1410.5401 (NTM); Graves et al. 2016, Nature 538, 471-476,
doi:10.1038/nature20101 (DNC); Csordas & Schmidhuber 2019, arXiv 1904.10278 (options of the DNC).
"""

from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsemem.indexes.metrics import COSINE_EPSILON, inverse_norm
from sparsemem.memory.products import Links, Scores

# Added to linked weights before they are sharpened, as the authors of the option do: reading a
# slot without links gives the uniform distribution instead of 0 / 0.
LINK_EPSILON = 1e-6


def oneplus(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """1 + log(1 + e^x), at least 1 (DNC)."""
    return 1 + F.softplus(x)


def cosine_similarity(
    keys: Float[Tensor, "B H W"],
    rows: Float[Tensor, "B N W"],
    inverse_norms: Float[Tensor, "B N"],
) -> Float[Tensor, "B H N"]:
    """cos(k, M[i]) of every key with every row; 0 for an all-zero key or row.

    `inverse_norms` are the rows' (`metrics.inverse_norm`), which the caller computes only once.
    """
    dots = Scores.apply(keys * inverse_norm(keys).unsqueeze(-1), rows)  # type: ignore[no-untyped-call]
    return dots * inverse_norms.unsqueeze(-2)  # type: ignore[no-any-return]


def masked_cosine_similarity(
    keys: Float[Tensor, "B H W"], masks: Float[Tensor, "B H W"], rows: Float[Tensor, "B N W"]
) -> Float[Tensor, "B H N"]:
    """cos(k * m, M[i] * m): each head compares only where its mask m in [0, 1] lets it.

    Csordas & Schmidhuber 2019, section 3.1. |M[i] * m|^2 = M[i]^2 . m^2, so no row is masked
    on its own.
    """
    masked = keys * masks
    dots = (masked * inverse_norm(masked).unsqueeze(-1) * masks) @ rows.mT
    return dots * (masks.square() @ rows.square().mT + COSINE_EPSILON).rsqrt()


def content_weights(
    similarity: Float[Tensor, "B H N"], strengths: Float[Tensor, "B H"]
) -> Float[Tensor, "B H N"]:
    """C = softmax over slots of beta cos (NTM Eq. 5, DNC's content-based addressing)."""
    return torch.softmax(strengths.unsqueeze(-1) * similarity, -1)


def interpolate(
    content: Float[Tensor, "B H N"], previous: Float[Tensor, "B H N"], gates: Float[Tensor, "B H"]
) -> Float[Tensor, "B H N"]:
    """wg = g wc + (1 - g) w_{t-1} (NTM Eq. 7)."""
    return torch.lerp(previous, content, gates.unsqueeze(-1))


def circular_shift(
    weights: Float[Tensor, "B H N"], shifts: Float[Tensor, "B H S"]
) -> Float[Tensor, "B H N"]:
    """ws(i) = sum_j wg(j) s(i - j), circular (NTM Eq. 8).

    S is odd; its entries weigh the offsets -(S // 2) .. S // 2 towards higher slots.
    """
    return CircularShift.apply(weights, shifts)  # type: ignore[no-untyped-call, no-any-return]


class CircularShift(torch.autograd.Function):
    """`circular_shift`: no weights moved and kept for each offset."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, shifts: Tensor) -> Tensor:
        """ws(i) = sum_j wg(i - j) s(j)."""
        ctx.save_for_backward(weights, shifts)
        return shifted_sum(weights, shifts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """The shifts reversed for the weights; for a shift, the gradient's product with them."""
        weights, shifts = ctx.saved_tensors
        reach = shifts.shape[-1] // 2
        products = [
            torch.linalg.vecdot(gradient, weights.roll(offset, -1) if offset else weights)
            for offset in range(-reach, reach + 1)
        ]
        return shifted_sum(gradient, shifts.flip(-1)), torch.stack(products, -1)


def shifted_sum(
    weights: Float[Tensor, "B H N"], shifts: Float[Tensor, "B H S"]
) -> Float[Tensor, "B H N"]:
    """`circular_shift`, without a gradient."""
    reach, slots = shifts.shape[-1] // 2, weights.shape[-1]
    total = weights * shifts[..., reach : reach + 1]
    for offset, shift in zip(range(-reach, reach + 1), torch.split(shifts, 1, -1), strict=True):
        if offset == 0:
            continue
        start = offset % slots  # where slot 0 goes
        total[..., start:].addcmul_(weights[..., : slots - start], shift)
        total[..., :start].addcmul_(weights[..., slots - start :], shift)
    return total


def sharpen(
    weights: Float[Tensor, "B H N"], exponents: Float[Tensor, "B H"]
) -> Float[Tensor, "B H N"]:
    """w(i)^gamma / sum_j w(j)^gamma, for gamma >= 1 (NTM Eq. 9)."""
    return Sharpen.apply(weights, exponents)  # type: ignore[no-untyped-call, no-any-return]


class Sharpen(torch.autograd.Function):
    """`sharpen` as the softmax of gamma log w, which cannot underflow and is finite at w = 0."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, exponents: Tensor) -> Tensor:
        """w' = softmax(gamma log w)."""
        sharp = torch.softmax(weights.log().mul_(exponents.unsqueeze(-1)), -1)
        ctx.save_for_backward(weights, exponents, sharp)
        return sharp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """With l = w' (g - sum w' g): gamma l / w of the weights, sum l log w of gamma."""
        weights, exponents, sharp = ctx.saved_tensors
        # Where w = 0, so is l: any positive number does in w's place.
        weights = weights.clamp(min=torch.finfo(weights.dtype).tiny)
        mean = torch.linalg.vecdot(gradient, sharp).unsqueeze(-1)
        of_logits = (gradient - mean).mul_(sharp)
        of_exponents = torch.linalg.vecdot(of_logits, weights.log())
        return of_logits.mul_(exponents.unsqueeze(-1)).div_(weights), of_exponents


def sharpen_links(
    linked: Float[Tensor, "B R N"], exponents: Float[Tensor, "B R"]
) -> Float[Tensor, "B R N"]:
    """Forward or backward weights made sharp and summing to 1 (Csordas & Schmidhuber, 3.3)."""
    return sharpen(linked + LINK_EPSILON, exponents)


def retention(
    free_gates: Float[Tensor, "B R"], read_weights: Float[Tensor, "B R N"]
) -> Float[Tensor, "B N"]:
    """psi = prod over read heads of (1 - f wR_{t-1}): how much of each slot is not freed (DNC)."""
    # Not `prod`, whose backward pass has the host look for zeros.
    return reduce(torch.mul, (1 - free_gates.unsqueeze(-1) * read_weights).unbind(1))


def usage(
    previous: Float[Tensor, "B N"],
    write_weights: Float[Tensor, "B N"],
    retained: Float[Tensor, "B N"],
) -> Float[Tensor, "B N"]:
    """u = (u_{t-1} + wW_{t-1} - u_{t-1} wW_{t-1}) psi, in [0, 1] (DNC)."""
    return (previous + write_weights - previous * write_weights) * retained


def allocation(usage: Float[Tensor, "B N"]) -> Float[Tensor, "B N"]:
    """a[phi_j] = (1 - u[phi_j]) prod_{i<j} u[phi_i], phi = slots by ascending usage (DNC).

    Equally used slots come in the order of their ids. Gradients flow through the values of u,
    not through their order.
    """
    ordered, order = usage.sort(dim=-1, stable=True)
    less_used = ProductsBefore.apply(ordered)  # type: ignore[no-untyped-call]
    return torch.zeros_like(usage).scatter(-1, order, (1 - ordered) * less_used)


class ProductsBefore(torch.autograd.Function):
    """p_j = prod_{i<j} u_i of ascending u [B, N] >= 0.

    The backward pass of `cumprod` has the host look for zeros. Here they can only come first.
    """

    @staticmethod
    def forward(ctx: Any, ordered: Tensor) -> Tensor:
        """A shifted cumulative product."""
        products = F.pad(ordered[..., :-1], (1, 0), value=1.0).cumprod(-1)
        ctx.save_for_backward(ordered, products)
        return products

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """sum_{j>k} g_j p_j / u_k; that of u_0 from products without it, as it may be 0.

        Where another u_k is 0, so is u_0, and with it all products that u_k is in.
        """
        ordered, products = ctx.saved_tensors
        behind = (gradient * products).flip(-1).cumsum(-1).flip(-1).roll(-1, -1)
        of_ordered: Tensor = (behind / ordered).masked_fill_(ordered == 0, 0)
        of_ordered[..., -1].zero_()
        without = F.pad(ordered[..., 1:], (1, 0), value=1.0).cumprod(-1)[..., :-1]
        of_ordered[..., 0] = torch.linalg.vecdot(gradient[..., 1:], without)
        return of_ordered


def gated_write_weights(
    allocated: Float[Tensor, "B N"],
    content: Float[Tensor, "B N"],
    allocation_gate: Float[Tensor, "B 1"],
    write_gate: Float[Tensor, "B 1"],
) -> Float[Tensor, "B N"]:
    """wW = g_w (g_a a + (1 - g_a) cW) (DNC)."""
    return write_gate * torch.lerp(content, allocated, allocation_gate)


def precedence(
    previous: Float[Tensor, "B N"], write_weights: Float[Tensor, "B N"]
) -> Float[Tensor, "B N"]:
    """p = (1 - sum wW) p_{t-1} + wW: how much each slot was the last one written (DNC)."""
    return (1 - write_weights.sum(-1, keepdim=True)) * previous + write_weights


def links(
    previous: Float[Tensor, "B N N"],
    precedence: Float[Tensor, "B N"],
    write_weights: Float[Tensor, "B N"],
) -> Float[Tensor, "B N N"]:
    """L[i,j] = (1 - wW[i] - wW[j]) L_{t-1}[i,j] + wW[i] p_{t-1}[j], L[i,i] = 0 (DNC).

    L[i,j] is how much slot i was written right after slot j; `precedence` is p_{t-1}.
    """
    return Links.apply(previous, precedence, write_weights)  # type: ignore[no-untyped-call, no-any-return]


def forward_weights(
    links: Float[Tensor, "B N N"], read_weights: Float[Tensor, "B R N"]
) -> Float[Tensor, "B R N"]:
    """f = L wR_{t-1}: the slots written right after those read (DNC)."""
    return read_weights @ links.mT


def backward_weights(
    links: Float[Tensor, "B N N"], read_weights: Float[Tensor, "B R N"]
) -> Float[Tensor, "B R N"]:
    """b = L^T wR_{t-1}: the slots written right before those read (DNC)."""
    return read_weights @ links


def mixed_read_weights(
    backward: Float[Tensor, "B R N"],
    content: Float[Tensor, "B R N"],
    forward: Float[Tensor, "B R N"],
    modes: Float[Tensor, "B R 3"],
) -> Float[Tensor, "B R N"]:
    """wR = pi1 b + pi2 c + pi3 f (DNC)."""
    before, same, after = modes.unsqueeze(-2).unbind(-1)
    return before * backward + same * content + after * forward
