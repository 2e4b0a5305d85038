"""Triton's gradients through scores, against autograd in float64."""

import pytest
import torch

from sparsemem.indexes.metrics import Metric


@pytest.mark.parametrize("metric", Metric)
@pytest.mark.parametrize("has_rows", [True, False])
@pytest.mark.parametrize("shape", [(3, 4, 5), (1, 1, 1), (2, 3, 1030), (0, 2, 4)], ids=str)
def test_gradients_of_queries_and_rows(triton_device, metric, has_rows, shape):
    from sparsemem.kernels.gpu.score_gradients import score_gradients

    queries, rows = torch.randn(shape[0], shape[2]), torch.randn(shape)
    by_score, by_row = torch.randn(shape[:2]), torch.randn(shape)
    ids = torch.arange(rows[..., 0].numel()).view(shape[:2])
    ids[:1, -1] = -1  # no row: zeros, an infinite score
    rows[ids < 0] = 0
    exact = [part.double().requires_grad_() for part in (queries, rows)]
    scores = metric.scores(*exact)
    total = (scores * by_score).masked_fill(ids < 0, 0).sum()
    (total + has_rows * (exact[1] * by_row).sum()).backward()
    known = scores.detach().float().masked_fill(ids < 0, metric.missing)
    given = (queries, rows, known, ids, by_score, by_row if has_rows else None)
    given = [None if part is None else part.to(triton_device) for part in given]
    made = score_gradients(metric, *given)
    for found, expected in zip(made, exact, strict=True):
        torch.testing.assert_close(found.double().cpu(), expected.grad, rtol=1e-5, atol=1e-4)


def test_what_is_not_contiguous(triton_device):
    from sparsemem.kernels.gpu.score_gradients import score_gradients

    queries, rows = torch.randn(4, 2).T, torch.randn(3, 4, 2).permute(2, 0, 1)
    ids, by_score = torch.arange(6).view(3, 2).T, torch.randn(3, 2).T
    given = (queries, rows, Metric.ip.scores(queries, rows), ids, by_score, None)
    given = [None if part is None else part.to(triton_device) for part in given]
    of_queries, of_rows = (part.cpu() for part in score_gradients(Metric.ip, *given))
    torch.testing.assert_close(of_queries, (by_score.unsqueeze(-1) * rows).sum(1))
    torch.testing.assert_close(of_rows, by_score.unsqueeze(-1) * queries.unsqueeze(1))
