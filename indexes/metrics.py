"""Metrics: how a row scores against a query, and which scores are better.

The cosine is softened so that an all-zero row has similarity 0 and a finite gradient.
"""

from __future__ import annotations

from enum import StrEnum

import torch
from jaxtyping import Float
from torch import Tensor

COSINE_EPSILON = 1e-6
COSINE, PRODUCT, DISTANCE = 0, 1, 2  # metrics, to compiled code


def inverse_norm(rows: Float[Tensor, "*B W"]) -> Float[Tensor, "*B"]:
    """1 / sqrt(|row|^2 + epsilon): the factor that each side contributes to the cosine."""
    return (rows.square().sum(-1) + COSINE_EPSILON).rsqrt()


def cosine(query: Float[Tensor, "*B W"], rows: Float[Tensor, "*B S W"]) -> Float[Tensor, "*B S"]:
    """cos(q, m) = q.m / (sqrt(|q|^2 + eps) sqrt(|m|^2 + eps)) of a query and S rows."""
    dot = (rows * query.unsqueeze(-2)).sum(-1)
    return dot * inverse_norm(rows) * inverse_norm(query).unsqueeze(-1)


def cosine_gradients(
    query: Float[Tensor, "*B W"],
    rows: Float[Tensor, "*B S W"],
    scores: Float[Tensor, "*B S"],
    gradient: Float[Tensor, "*B S"],
) -> tuple[Float[Tensor, "*B W"], Float[Tensor, "*B S W"]]:
    """d cos / dm = q / (|q||m|) - cos m / |m|^2, and the same for q; norms softened by epsilon."""
    query_factor, factors = inverse_norm(query).unsqueeze(-1), inverse_norm(rows)
    across = (gradient * query_factor * factors).unsqueeze(-1)
    along = gradient * scores
    shrink = along.sum(-1, keepdim=True) * query_factor.square()
    of_query = (across * rows).sum(-2).addcmul_(shrink, query, value=-1)
    shrinks = (along * factors.square()).unsqueeze(-1)
    return of_query, (across * query.unsqueeze(-2)).addcmul_(shrinks, rows, value=-1)


class Metric(StrEnum):
    """`cosine` and `ip` (inner product): more is better; `l2` (squared distance): less is."""

    cosine = "cosine"
    ip = "ip"
    l2 = "l2"

    @property
    def sign(self) -> int:
        """1 where a greater score is better, -1 where a smaller one is."""
        return -1 if self is Metric.l2 else 1

    @property
    def code(self) -> int:
        """What compiled code knows it by."""
        return {Metric.cosine: COSINE, Metric.ip: PRODUCT, Metric.l2: DISTANCE}[self]

    @property
    def missing(self) -> float:
        """The score that stands where there is no row: worse than any."""
        return -self.sign * torch.inf

    def scores(
        self, query: Float[Tensor, "*B W"], rows: Float[Tensor, "*B S W"]
    ) -> Float[Tensor, "*B S"]:
        """The score of each of S rows against a query; differentiable.

        Computed row by row, so that equal rows have equal scores wherever they stand.
        """
        if self is Metric.cosine:
            return cosine(query, rows)
        if self is Metric.ip:
            return (rows * query.unsqueeze(-2)).sum(-1)
        return (rows - query.unsqueeze(-2)).square().sum(-1)

    def gradients(
        self,
        query: Float[Tensor, "*B W"],
        rows: Float[Tensor, "*B S W"],
        scores: Float[Tensor, "*B S"],
        gradient: Float[Tensor, "*B S"],
    ) -> tuple[Float[Tensor, "*B W"], Float[Tensor, "*B S W"]]:
        """Those of queries and rows, from that of their scores: what autograd makes of `scores`."""
        if self is Metric.cosine:
            return cosine_gradients(query, rows, scores, gradient)
        gradient = gradient.unsqueeze(-1)
        if self is Metric.ip:
            return (gradient * rows).sum(-2), gradient * query.unsqueeze(-2)
        of_rows = (rows - query.unsqueeze(-2)).mul_(2 * gradient)
        return -of_rows.sum(-2), of_rows
