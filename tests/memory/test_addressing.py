"""Each equation against plain loops, by value, by property and by gradcheck."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from sparsemem.indexes.metrics import COSINE_EPSILON, inverse_norm
from sparsemem.memory import addressing

B, H, N, W, S = 2, 3, 5, 4, 3


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def positive(*shape):
    return torch.rand(*shape, dtype=torch.float64).mul(0.8).add(0.1).requires_grad_()


def distribution(*shape):
    return torch.rand(*shape, dtype=torch.float64).softmax(-1).requires_grad_()


CASES = {
    "oneplus": (normal, (B, H)),
    "cosine_similarity": (normal, (B, H, W), normal, (B, N, W), positive, (B, N)),
    "masked_cosine_similarity": (normal, (B, H, W), positive, (B, H, W), normal, (B, N, W)),
    "content_weights": (normal, (B, H, N), normal, (B, H)),
    "interpolate": (distribution, (B, H, N), distribution, (B, H, N), positive, (B, H)),
    "circular_shift": (distribution, (B, H, N), distribution, (B, H, S)),
    "sharpen_links": (positive, (B, H, N), positive, (B, H)),
    "retention": (positive, (B, H), distribution, (B, H, N)),
    "usage": (positive, (B, N), positive, (B, N), positive, (B, N)),
    "allocation": (positive, (B, N)),
    "gated_write_weights": (
        *(distribution, (B, N), distribution, (B, N)),
        *(positive, (B, 1), positive, (B, 1)),
    ),
    "precedence": (positive, (B, N), distribution, (B, N)),
    "links": (positive, (B, N, N), positive, (B, N), distribution, (B, N)),
    "forward_weights": (positive, (B, N, N), distribution, (B, H, N)),
    "backward_weights": (positive, (B, N, N), distribution, (B, H, N)),
    "mixed_read_weights": (
        *(positive, (B, H, N), positive, (B, H, N), positive, (B, H, N)),
        *(distribution, (B, H, 3)),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients(name):
    case = CASES[name]
    arguments = [make(*shape) for make, shape in zip(case[::2], case[1::2], strict=True)]
    assert gradcheck(getattr(addressing, name), arguments)


def test_gradients_of_sharpen():
    # The exponents' lower bound keeps the gradient finite at weights of exactly 0.
    weights = distribution(B, H, N)
    exponents = (1 + torch.rand(B, H, dtype=torch.float64) * 3).requires_grad_()
    assert gradcheck(addressing.sharpen, [weights, exponents])
    zero = torch.tensor([[[0.0, 1.0]]], dtype=torch.float64, requires_grad=True)
    addressing.sharpen(zero, torch.ones(1, 1, dtype=torch.float64)).sum().backward()
    assert zero.grad.isfinite().all()


def test_oneplus_values():
    x = torch.tensor([-800.0, 0.0, 800.0], dtype=torch.float64)
    expected = torch.tensor([1.0, 1 + torch.log(torch.tensor(2.0).double()), 801.0]).double()
    torch.testing.assert_close(addressing.oneplus(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
def test_similarity_equals_loops(masked):
    keys, rows = normal(B, H, W), normal(B, N, W)
    masks = positive(B, H, W) if masked else torch.ones(B, H, W, dtype=torch.float64)
    expected = torch.empty(B, H, N, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            for i in range(N):
                key, row = keys[b, h] * masks[b, h], rows[b, i] * masks[b, h]
                lengths = [(v.dot(v) + COSINE_EPSILON).sqrt() for v in (key, row)]
                expected[b, h, i] = key.dot(row) / (lengths[0] * lengths[1])
    if masked:
        actual = addressing.masked_cosine_similarity(keys, masks, rows)
    else:
        actual = addressing.cosine_similarity(keys, rows, inverse_norm(rows))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("masked", [False, True])
def test_empty_rows_have_similarity_zero_and_finite_gradients(dtype, masked):
    keys = torch.zeros(1, 2, W, dtype=dtype)
    keys[0, 1] = 1
    keys.requires_grad_()
    rows = torch.zeros(1, N, W, dtype=dtype, requires_grad=True)
    if masked:
        masks = torch.zeros(1, 2, W, dtype=dtype, requires_grad=True)
        similarity = addressing.masked_cosine_similarity(keys, masks, rows)
    else:
        similarity = addressing.cosine_similarity(keys, rows, inverse_norm(rows))
    assert torch.equal(similarity, torch.zeros(1, 2, N, dtype=dtype))
    similarity.sum().backward()
    assert keys.grad.isfinite().all()
    assert rows.grad.isfinite().all()
    if not masked:  # 1 / sqrt(4 eps), from the key of ones: the gradient is there, and finite
        expected = torch.full((N, W), 0.5 / COSINE_EPSILON**0.5, dtype=dtype)
        torch.testing.assert_close(rows.grad[0], expected, rtol=1e-6, atol=1e-6)


def test_masked_similarity_ignores_what_the_mask_hides():
    keys = torch.tensor([[[1.0, 0.0, 5.0]]])
    rows = torch.tensor([[[1.0, 0.0, -9.0], [0.0, 1.0, 5.0]]])
    mask = torch.tensor([[[1.0, 1.0, 0.0]]])
    similarity = addressing.masked_cosine_similarity(keys, mask, rows)
    torch.testing.assert_close(similarity, torch.tensor([[[1.0, 0.0]]]))


def test_content_weights_of_one_strong_head():
    similarity = torch.tensor([[[0.0, 1.0], [0.0, 1.0]]])
    weights = addressing.content_weights(similarity, torch.tensor([[0.0, 2.0]]))
    expected = torch.tensor([[[0.5, 0.5], [1 / (1 + 2.718281828**2), 0.880797]]])
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-6)


def test_interpolate_ends():
    content, previous = distribution(1, 2, N), distribution(1, 2, N)
    gates = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    mixed = addressing.interpolate(content, previous, gates)
    assert torch.equal(mixed[0, 0], content[0, 0])
    assert torch.equal(mixed[0, 1], previous[0, 1])


@given(
    slots=st.integers(1, 7), reach=st.integers(0, 4), seed=st.integers(0, 2**31)
)  # a reach beyond the slots wraps around more than once
@settings(max_examples=40, deadline=None)
def test_circular_shift_equals_the_convolution(slots, reach, seed):
    torch.manual_seed(seed)
    weights, shifts = distribution(1, 1, slots), distribution(1, 1, 2 * reach + 1)
    expected = [0.0] * slots
    for j in range(slots):
        for offset in range(-reach, reach + 1):
            expected[(j + offset) % slots] += (
                weights[0, 0, j] * shifts[0, 0, reach + offset]
            ).item()
    actual = addressing.circular_shift(weights, shifts)
    torch.testing.assert_close(actual[0, 0].tolist(), expected, rtol=0, atol=1e-14)


def test_circular_shift_by_plus_one_moves_to_the_next_slot():
    weights = torch.tensor([[[0.0, 0.0, 1.0]]])
    moved = addressing.circular_shift(weights, torch.tensor([[[0.0, 0.0, 1.0]]]))
    assert moved.tolist() == [[[1.0, 0.0, 0.0]]]


def test_sharpen_values():
    weights = torch.tensor([[[0.2, 0.8], [0.2, 0.8]]])
    sharp = addressing.sharpen(weights, torch.tensor([[1.0, 2.0]]))
    expected = torch.tensor([[[0.2, 0.8], [0.04 / 0.68, 0.64 / 0.68]]])
    torch.testing.assert_close(sharp, expected)


def test_sharpen_does_not_underflow():
    # 1e-4 ** 21 is 0 in float32: unscaled, this would be 0 / 0.
    weights = torch.full((1, 1, 10_000), 1e-4)
    sharp = addressing.sharpen(weights, torch.tensor([[21.0]]))
    torch.testing.assert_close(sharp, weights)


def test_sharpen_links_of_nothing_is_uniform():
    sharp = addressing.sharpen_links(torch.zeros(1, 1, 4), torch.tensor([[5.0]]))
    torch.testing.assert_close(sharp, torch.full((1, 1, 4), 0.25))


@given(
    st.lists(
        st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]), min_size=6, max_size=6),
        min_size=1,
        max_size=3,
    )
)
@settings(max_examples=60, deadline=None)
def test_allocation_equals_loops(rows):
    usage = torch.tensor(rows, dtype=torch.float64, requires_grad=True)
    actual = addressing.allocation(usage)
    for row, values in zip(actual.tolist(), rows, strict=True):
        expected, less_used = [0.0] * 6, 1.0
        for i in sorted(range(6), key=lambda i: (values[i], i)):
            expected[i] = (1 - values[i]) * less_used
            less_used *= values[i]
        assert row == pytest.approx(expected, abs=1e-15)
        assert sum(row) <= 1 + 1e-12
    (gradient,) = torch.autograd.grad(actual.square().sum(), usage)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("zeros", [0, 1, 2, 6])
def test_products_before_have_the_gradient_of_cumprod_also_at_zeros(zeros):
    ordered = torch.rand(3, 6, dtype=torch.float64).sort().values
    ordered[1, :zeros] = 0
    ordered.requires_grad_()
    products = addressing.ProductsBefore.apply(ordered)
    plain = torch.cat([torch.ones(3, 1, dtype=torch.float64), ordered[:, :-1]], 1).cumprod(1)
    assert torch.equal(products, plain)
    seed = torch.randn_like(products)
    (ours,), (truth,) = (torch.autograd.grad(p, ordered, seed) for p in (products, plain))
    torch.testing.assert_close(ours, truth, rtol=0, atol=1e-12)


@pytest.mark.parametrize("slots", [1, 2])
def test_allocation_of_one_or_two_slots_has_gradients(slots):
    usage = torch.tensor([[0.25, 0.5][:slots]], dtype=torch.float64, requires_grad=True)
    assert gradcheck(addressing.allocation, [usage])


def test_allocation_of_unused_memory_is_the_first_slot():
    assert addressing.allocation(torch.zeros(1, 4)).tolist() == [[1.0, 0.0, 0.0, 0.0]]


def test_freed_slots_lose_their_usage():
    retained = addressing.retention(
        torch.tensor([[1.0, 0.5]]), torch.tensor([[[1.0, 0.0, 0.0], [0.0, 0.5, 0.0]]])
    )
    torch.testing.assert_close(retained, torch.tensor([[0.0, 0.75, 1.0]]))
    used = addressing.usage(
        torch.tensor([[1.0, 0.5, 0.5]]), torch.tensor([[0.0, 0.5, 0.5]]), retained
    )
    torch.testing.assert_close(used, torch.tensor([[0.0, 0.5625, 0.75]]))


@given(steps=st.integers(1, 6), seed=st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_links_are_loops_and_stay_distributions(steps, seed):
    torch.manual_seed(seed)
    links, before = torch.zeros(1, N, N).double(), torch.zeros(1, N).double()
    expected, expected_before = [[0.0] * N for _ in range(N)], [0.0] * N
    for _ in range(steps):
        write = torch.rand(1, N, dtype=torch.float64).mul(3).softmax(-1) * torch.rand(1)
        w = write[0].tolist()
        for i in range(N):
            for j in range(N):
                decayed = (1 - w[i] - w[j]) * expected[i][j] + w[i] * expected_before[j]
                expected[i][j] = 0.0 if i == j else decayed
        expected_before = [(1 - sum(w)) * p + v for p, v in zip(expected_before, w, strict=True)]
        links, before = (
            addressing.links(links, before, write),
            addressing.precedence(before, write),
        )
    torch.testing.assert_close(links[0].tolist(), expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(before[0].tolist(), expected_before, rtol=0, atol=1e-13)
    assert links.min() >= 0
    assert links.sum(1).max() <= 1 + 1e-12
    assert links.sum(2).max() <= 1 + 1e-12


def test_links_lead_from_each_write_to_the_next():
    slots = torch.eye(3).unsqueeze(1)
    links, before = torch.zeros(1, 3, 3), torch.zeros(1, 3)
    for slot in (0, 2, 1):
        links = addressing.links(links, before, slots[slot])
        before = addressing.precedence(before, slots[slot])
    at_two = slots[2].unsqueeze(0)
    assert addressing.forward_weights(links, at_two).tolist() == [[[0.0, 1.0, 0.0]]]
    assert addressing.backward_weights(links, at_two).tolist() == [[[1.0, 0.0, 0.0]]]


def test_read_modes_are_backward_content_forward():
    parts = [torch.full((1, 1, 2), value) for value in (1.0, 10.0, 100.0)]
    modes = torch.tensor([[[0.5, 0.3, 0.2]]])
    mixed = addressing.mixed_read_weights(*parts, modes)
    torch.testing.assert_close(mixed, torch.full((1, 1, 2), 23.5))
