"""Reads and writes of a whole memory against loops."""

import pytest
import torch
from torch.autograd import gradcheck

from sparsemem.memory import addressing, products
from sparsemem.memory.dense import DenseMemory

B, H, N, W = 2, 3, 5, 4


@pytest.fixture(params=[1, 2 * 4, 5 * 4, 2**18])
def block(request, monkeypatch):
    """Rows in blocks of one row, of two (the last is smaller), of one element, and all at once."""
    monkeypatch.setattr(products, "BLOCK", request.param)


def rand(*shape):
    return torch.rand(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("heads", [1, H, 4, 9])  # those above 4 erase in groups
@pytest.mark.parametrize("freeing", [False, True])
def test_write_and_read_equal_loops(freeing, heads, block):
    H = heads
    rows, weights, erases, words = rand(B, N, W), rand(B, H, N), rand(B, H, W), rand(B, H, W)
    kept = rand(B, N) if freeing else None
    memory = DenseMemory(rows).write(weights, erases, words, kept)
    expected = torch.empty(B, N, W, dtype=torch.float64)
    for b in range(B):
        for i in range(N):
            for j in range(W):
                value = rows[b, i, j].item() * (kept[b, i].item() if freeing else 1)
                for h in range(H):
                    value *= 1 - weights[b, h, i].item() * erases[b, h, j].item()
                for h in range(H):
                    value += weights[b, h, i].item() * words[b, h, j].item()
                expected[b, i, j] = value
    torch.testing.assert_close(memory.rows, expected, rtol=0, atol=1e-14)
    read = memory.read(weights)
    for b in range(B):
        for h in range(H):
            terms = [weights[b, h, i] * expected[b, i] for i in range(N)]
            torch.testing.assert_close(read[b, h], sum(terms), rtol=0, atol=1e-13)


def test_write_leaves_the_old_memory_alone():
    rows = torch.ones(1, 2, 2)
    one = torch.ones(1, 1, 2)
    written = DenseMemory(rows).write(torch.tensor([[[1.0, 0.0]]]), one, 7 * one)
    assert written.rows.tolist() == [[[7.0, 7.0], [1.0, 1.0]]]
    assert rows.tolist() == [[[1.0, 1.0], [1.0, 1.0]]]


@pytest.mark.parametrize("heads", [1, pytest.param(H, marks=pytest.mark.slow), 5])
def test_gradients(heads, block):
    def step(rows, weights, erases, words, kept):
        memory = DenseMemory(rows).write(weights, erases, words, kept)
        return memory.rows, memory.read(weights), memory.similarity(words)

    words = [rand(B, heads, W) for _ in range(2)]
    assert gradcheck(step, (rand(B, N, W), rand(B, heads, N), *words, rand(B, N)))


def test_gradients_of_links(block):
    assert gradcheck(addressing.links, (rand(B, N, N), rand(B, N), rand(B, N)))


def test_inverse_norms_are_those_of_the_rows(block):
    memory = DenseMemory(rand(B, N, W)).write(rand(B, H, N), rand(B, H, W), rand(B, H, W))
    anew = DenseMemory(memory.rows)
    keys = rand(B, H, W)
    torch.testing.assert_close(memory.similarity(keys), anew.similarity(keys), rtol=0, atol=1e-14)


def test_similarity_is_under_the_mask():
    memory = DenseMemory(torch.tensor([[[1.0, -3.0], [0.0, 4.0]]]))
    keys = torch.tensor([[[1.0, 4.0]]])
    masks = torch.tensor([[[1.0, 0.0]]])
    torch.testing.assert_close(memory.similarity(keys, masks), torch.tensor([[[1.0, 0.0]]]))
    expected = torch.tensor([[[-11 / 170**0.5, 4 / 17**0.5]]])
    torch.testing.assert_close(memory.similarity(keys), expected)
