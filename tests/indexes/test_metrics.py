"""Metrics against their formulas in Python's floats."""

import math

import pytest
import torch
from torch.nn.functional import cosine_similarity

from sparsemem.indexes.metrics import COSINE_EPSILON, Metric, cosine, inverse_norm

metrics = pytest.mark.parametrize("metric", list(Metric))


def formula(metric: Metric, query: list[float], row: list[float]) -> float:
    dot = math.fsum(q * m for q, m in zip(query, row, strict=True))
    if metric is Metric.ip:
        return dot
    if metric is Metric.l2:
        return math.fsum((q - m) ** 2 for q, m in zip(query, row, strict=True))
    squares = [math.fsum(x * x for x in vector) for vector in (query, row)]
    return dot / math.sqrt((squares[0] + COSINE_EPSILON) * (squares[1] + COSINE_EPSILON))


@metrics
def test_scores_are_the_formulas(metric):
    queries = torch.randn(2, 3, 5, dtype=torch.float64)
    rows = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    rows[0, 0, 0] = 0
    scores = metric.scores(queries, rows)
    assert scores.shape == (2, 3, 4)
    for i in range(2):
        for j in range(3):
            expected = [formula(metric, queries[i, j].tolist(), r) for r in rows[i, j].tolist()]
            assert scores[i, j].tolist() == pytest.approx(expected, rel=1e-13, abs=1e-14)


def test_cosine_is_torchs_away_from_zero():
    query, rows = torch.randn(6), torch.randn(10, 6)
    expected = cosine_similarity(query.unsqueeze(0), rows)
    torch.testing.assert_close(cosine(query, rows), expected, atol=1e-5, rtol=1e-5)


@metrics
def test_scores_pass_gradcheck(metric):
    query = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(metric.scores, (query, rows))


@metrics
def test_gradients_are_those_of_autograd(metric):
    query = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    rows[0, 1, 2] = 0
    rows.requires_grad_()
    scores, gradient = metric.scores(query, rows), torch.randn(2, 3, 4, dtype=torch.float64)
    expected = torch.autograd.grad(scores, (query, rows), gradient)
    with torch.no_grad():
        found = metric.gradients(query, rows, scores, gradient)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_an_all_zero_row_has_similarity_zero_and_a_finite_gradient():
    query, rows = torch.ones(4), torch.zeros(2, 4, requires_grad=True)
    scores = cosine(query, rows)
    assert scores.tolist() == [0.0, 0.0]
    scores.sum().backward()
    # q / (|q| sqrt(eps)): at most 1000 in any direction.
    assert rows.grad is not None
    torch.testing.assert_close(rows.grad, torch.full((2, 4), 500.0))
    assert inverse_norm(torch.zeros(4)).item() == pytest.approx(1000.0)


@metrics
@pytest.mark.parametrize("width", [1, 3, 7, 32, 100])
def test_a_score_depends_on_nothing_but_its_row(metric, width):
    query, rows = torch.randn(width), torch.randn(50, width)
    rows[33] = rows[5]
    together = metric.scores(query, rows)
    assert together[33] == together[5]
    alone = torch.stack([metric.scores(query, row.unsqueeze(0)).squeeze(0) for row in rows])
    assert torch.equal(alone, together)
    spread = metric.scores(query.expand(50, -1), rows.unsqueeze(1)).squeeze(1)
    assert torch.equal(spread, together)


def test_directions():
    assert [metric.sign for metric in (Metric.cosine, Metric.ip, Metric.l2)] == [1, 1, -1]
    for metric in Metric:
        assert metric.missing == -metric.sign * math.inf
    assert Metric("l2") is Metric.l2
