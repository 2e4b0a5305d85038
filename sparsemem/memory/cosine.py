"""The cosine, softened so that an all-zero row has similarity 0 and a finite gradient."""

from jaxtyping import Float
from torch import Tensor

COSINE_EPSILON = 1e-6


def inverse_norm(rows: Float[Tensor, "*B W"]) -> Float[Tensor, "*B"]:
    """1 / sqrt(|row|^2 + epsilon): the factor that each side contributes to the cosine."""
    return (rows.square().sum(-1) + COSINE_EPSILON).rsqrt()


def cosine(query: Float[Tensor, "*B W"], rows: Float[Tensor, "*B S W"]) -> Float[Tensor, "*B S"]:
    """cos(q, m) = q.m / (sqrt(|q|^2 + eps) sqrt(|m|^2 + eps)) of a query and S rows."""
    dot = (rows * query.unsqueeze(-2)).sum(-1)
    return dot * inverse_norm(rows) * inverse_norm(query).unsqueeze(-1)
