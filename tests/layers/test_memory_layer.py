"""MemoryLayer against plain torch: dense attention over the table, gradients, dtypes, errors."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck
from torch.func import functional_call

from sparsemem import MemoryLayer
from sparsemem.bank import MemoryBank

D, W, V, N = 6, 4, 5, 7


def bank_of(num_rows=N, live=N, value_width=V, metric="ip", dtype=torch.float64, **options):
    """A bank whose first `live` rows are random."""
    bank = MemoryBank(num_rows, W, value_width, metric=metric, dtype=dtype, **options)
    values = None if value_width is None else torch.randn(live, value_width, dtype=dtype)
    bank.write(torch.arange(live), torch.randn(live, W, dtype=dtype), values)
    return bank


def dense_attention(layer, input):
    """The layer's equations over the whole table."""
    bank, queries = layer.bank, layer.query(input).unflatten(-1, (layer.num_heads, W))
    if isinstance(layer.query_norm, nn.LayerNorm):
        queries = layer.query_norm(queries)
    keys = bank.keys.detach()[bank.book.live]
    if bank.metric == "ip":
        scores = queries @ keys.mT
    elif bank.metric == "cosine":
        scores = F.normalize(queries, dim=-1) @ F.normalize(keys, dim=-1).mT
    else:
        scores = -torch.cdist(queries, keys.expand(*input.shape[:2], -1, -1)).square()
    weights = (scores / layer.log_temperature.exp().unsqueeze(-1)).softmax(-1)
    values = keys if bank.values is None else bank.values.detach()[bank.book.live]
    read = (weights @ values).sum(2)
    return layer.out(read if layer.gate is None else F.silu(layer.gate(input)) * read)


@pytest.mark.parametrize("metric", ["ip", "cosine", "l2"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("query_norm", ["layer", "none"])
def test_with_all_rows_it_is_dense_attention_over_the_table(metric, gated, query_norm):
    bank = bank_of(metric=metric)
    layer = MemoryLayer(D, bank, 3, N, gated, query_norm=query_norm, temperature=0.5).double()
    with torch.no_grad():
        layer.log_temperature += torch.randn(3)
    input = torch.randn(2, 3, D, dtype=torch.float64)
    # The bank's cosine is softened by 1e-6 under the roots.
    tolerance = 1e-5 if metric == "cosine" else 1e-11
    torch.testing.assert_close(layer(input), dense_attention(layer, input), rtol=0, atol=tolerance)


def test_only_the_best_rows_of_each_head_count():
    layer = MemoryLayer(D, bank_of(), num_heads=2, top_k=3, gated=False).double()
    input = torch.randn(2, 3, D, dtype=torch.float64)
    expected = torch.zeros(2, 3, V, dtype=torch.float64)
    for place in [(b, t) for b in range(2) for t in range(3)]:
        for query in layer.queries(input)[place]:
            scores = (layer.bank.keys @ query).tolist()
            best = sorted(range(N), key=lambda i, scores=scores: -scores[i])[:3]
            total = sum(math.exp(scores[i]) for i in best)
            for i in best:
                expected[place] += math.exp(scores[i]) / total * layer.bank.values[i]
    torch.testing.assert_close(layer(input), layer.out(expected), rtol=0, atol=1e-12)


class Densify(torch.autograd.Function):
    """The identity; gradcheck takes no sparse gradients of dense inputs."""

    @staticmethod
    def forward(ctx, table):
        return table.view_as(table)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.to_dense() if gradient.is_sparse else gradient


def test_gradcheck_of_input_keys_values_and_parameters():
    layer = MemoryLayer(D, bank_of(), num_heads=2, top_k=3, temperature=0.7).double()
    input = torch.randn(1, 2, D, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    assert {"bank.keys", "bank.values", "log_temperature", "gate.weight"} <= set(names)

    def call(input, *parameters):
        named = dict(zip(names, map(Densify.apply, parameters), strict=True))
        return functional_call(layer, named, (input,))

    assert gradcheck(call, (input, *parameters))


def test_gradients_of_a_bank_are_row_sparse():
    layer = MemoryLayer(D, bank_of(num_rows=1000, live=100), num_heads=2, top_k=3).double()
    input = torch.randn(1, 2, D, dtype=torch.float64)
    layer(input).sum().backward()
    read = set(layer.bank.read(layer.queries(input), 3).ids.flatten().tolist())
    for table in (layer.bank.keys, layer.bank.values):
        assert table.grad.is_sparse
        assert set(table.grad.coalesce().indices()[0].tolist()) == read


def test_layers_share_a_bank():
    bank = bank_of()
    stack = nn.Sequential(MemoryLayer(D, bank, 2, 3), MemoryLayer(D, bank, 2, 3)).double()
    assert sum(p is bank.values for p in stack.parameters()) == 1
    input = torch.randn(1, 2, D, dtype=torch.float64)
    both, alone = stack(input), stack[1](stack[0](input).detach())
    torch.testing.assert_close(both, alone, rtol=0, atol=0)
    both.sum().backward()
    together = bank.values.grad.to_dense()
    bank.zero_grad()
    alone.sum().backward()
    assert not torch.allclose(together, bank.values.grad.to_dense())  # the first layer's share


def test_product_keys():
    """All pairs of sub-keys as keys, by hand; the best of them only in a large table."""
    bank = MemoryBank(
        16, W, V, index="product-key", metric="ip", initial="normal", dtype=torch.float64
    )
    layer, input = MemoryLayer(D, bank, 2, 16).double(), torch.randn(1, 2, D, dtype=torch.float64)
    first, second = bank.keys.detach()
    keys = torch.stack([torch.cat([a, b]) for a in first for b in second])
    scores = layer.queries(input) @ keys.mT  # temperature 1
    read = (scores.softmax(-1) @ bank.values).sum(2)
    expected = layer.out(F.silu(layer.gate(input)) * read)
    torch.testing.assert_close(layer(input), expected, rtol=0, atol=1e-11)
    layer.top_k = 3
    layer(input).sum().backward()
    best = scores.topk(3).indices.unique()
    assert torch.equal(bank.values.grad.coalesce().indices()[0], best)
    assert bank.keys.grad.shape == (2, 4, 2)


def test_keys_can_be_the_values():
    layer = MemoryLayer(D, bank_of(value_width=None), 2, N).double()
    input = torch.randn(1, 2, D, dtype=torch.float64)
    torch.testing.assert_close(layer(input), dense_attention(layer, input), rtol=0, atol=1e-12)


def test_missing_rows_count_nothing():
    layer = MemoryLayer(D, bank_of(num_rows=N, live=2), num_heads=2, top_k=5).double()
    input = torch.randn(1, 2, D, dtype=torch.float64)
    output = layer(input)
    torch.testing.assert_close(output, dense_attention(layer, input), rtol=0, atol=1e-12)
    output.sum().backward()
    for name, parameter in layer.named_parameters():
        gradient = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
        assert gradient.isfinite().all(), name
    assert layer.log_temperature.grad.abs().min() > 0


def test_an_empty_bank_reads_zeros():
    layer = MemoryLayer(D, bank_of(live=0), num_heads=2, top_k=3).double()
    input = torch.randn(1, 2, D, dtype=torch.float64, requires_grad=True)
    output = layer(input)
    output.sum().backward()
    assert not output.any()
    assert input.grad.isfinite().all()


def test_batch_norm_of_the_queries():
    layer = MemoryLayer(D, bank_of(), 2, 3, query_norm="batch").double()
    input = torch.randn(8, 4, D, dtype=torch.float64)
    queries = layer.queries(input).flatten(0, 1)
    torch.testing.assert_close(queries.mean(0), torch.zeros(2, W).double(), rtol=0, atol=1e-12)
    layer.eval()
    torch.testing.assert_close(  # evaluation: a position by itself
        layer(input)[:1, :1], layer(input[:1, :1]), rtol=0, atol=1e-12
    )


def test_temperature_can_be_fixed():
    layer = MemoryLayer(D, bank_of(), temperature=0.25, top_k=3, learn_temperature=False)
    assert not layer.log_temperature.requires_grad
    assert layer.log_temperature.exp().tolist() == pytest.approx([0.25] * 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    bank = bank_of(dtype=dtype)
    layer = MemoryLayer(D, bank, 2, N)
    for part in (layer.query, layer.query_norm, layer.gate, layer.out):
        part.to(dtype)
    input = torch.randn(2, 3, D, dtype=dtype, requires_grad=True)
    output = layer(input)
    assert output.dtype == dtype
    output.sum().backward()
    assert input.grad.isfinite().all()
    exact = MemoryLayer(D, bank, 2, N).double()
    exact.load_state_dict(layer.state_dict())
    expected = dense_attention(exact, input.detach().double())
    torch.testing.assert_close(output.double(), expected, rtol=0.05, atol=0.05)


def test_autocast_leaves_the_sum_in_the_banks_precision():
    layer = MemoryLayer(D, bank_of(dtype=torch.float32), 2, N)
    input = torch.randn(2, 3, D)
    exact = layer(input)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(input)
        hit = layer.bank.read(layer.queries(input), N)
        assert layer.weights(hit).dtype == torch.float32
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), exact, rtol=0.05, atol=0.05)
    output.float().sum().backward()
    assert layer.bank.values.grad.dtype == torch.float32


def test_state_dict_round_trip():
    layer, other = (MemoryLayer(D, bank_of(), 2, 3).double() for _ in range(2))
    input = torch.randn(1, 2, D, dtype=torch.float64)
    assert not torch.allclose(other(input), layer(input))
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other(input), layer(input), rtol=0, atol=0)


@pytest.mark.usefixtures("plain_errors")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 0}, r"dim is 0, expected at least 1"),
        ({"num_heads": 0}, r"num_heads is 0, expected at least 1"),
        ({"top_k": 0}, r"top_k is 0, expected at least 1"),
        ({"top_k": N + 1}, r"top_k is 8, expected at most bank.num_rows = 7"),
        ({"query_norm": "bach"}, r"query_norm is 'bach', did you mean 'batch'\? known: batch, la"),
        ({"temperature": 0.0}, r"temperature is 0.0, expected a number above 0"),
        ({"temperature": math.inf}, r"temperature is inf, expected a number above 0"),
    ],
)
def test_refused_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        MemoryLayer(**{"dim": D, "bank": bank_of(), "top_k": 3} | arguments)


@pytest.mark.usefixtures("plain_errors")
def test_refused_banks_and_inputs():
    with pytest.raises(TypeError, match=r"bank is a Linear, expected a MemoryBank"):
        MemoryLayer(D, nn.Linear(2, 2))
    layer = MemoryLayer(D, bank_of(), top_k=3).double()
    with pytest.raises(ValueError, match=r"input has shape \(2, 3, 7\), expected \[batch, steps,"):
        layer(torch.zeros(2, 3, 7).double())
    with pytest.raises(ValueError, match=r"input has shape \(3, 6\), expected \[batch, steps, 6\]"):
        layer(torch.zeros(3, D).double())
    with pytest.raises(TypeError, match=r"input is torch.float32 .* parameters are torch.float64"):
        layer(torch.zeros(1, 2, D))
    bad = torch.zeros(1, 2, D).double()
    bad[0, 1, 3] = torch.nan
    with pytest.raises(ValueError, match=r"input\[0, 1, 3\] is nan, expected finite values"):
        layer(bad)
    assert layer.bank.stats()["clock"] == bank_of().stats()["clock"]  # nothing was read
    with pytest.raises(
        ValueError, match=r"query_norm is None, did you mean 'none'\? known: batch, layer"
    ):
        MemoryLayer(D, bank_of(), top_k=3, query_norm=None)
