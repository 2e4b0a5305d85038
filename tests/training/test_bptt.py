import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sparsemem import captured
from sparsemem.models.registry import make_model
from sparsemem.tasks import make_task
from sparsemem.training import bptt
from sparsemem.training.bptt import Diverged, chunks, train_batch
from tests.oracles.fake_graphs import FakeGraphs


def parts(model="sam", dtype=torch.float64, **options):
    torch.manual_seed(1)
    sizes = {"hidden_size": 8, **options}
    if model != "lstm":
        sizes |= {"num_slots": 32, "slot_dim": 5, "num_heads": 2}
    task = make_task("copy", bits=3, batch_size=4, dtype=dtype)
    made = make_model(model, input_size=4, output_size=3, **sizes).to(dtype)
    return made, task, task.batch(0, 5)  # 11 steps, of which the last 5 count


class Still(torch.optim.SGD):
    """An optimiser that keeps the gradients it is given and changes nothing."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.0)
        self.seen = []

    def step(self, closure=None):
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        self.seen.append([None if g is None else g.clone() for g in grads])


def full_gradient(model, task, batch):
    output, _ = model(batch.input)
    loss = task.loss(output, batch)
    return loss, torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("model", ["sam", "sdnc", "dnc", "ntm", "lstm"])
@pytest.mark.parametrize("truncate", [None, 11, 50])
def test_no_truncation_is_the_full_gradient(model, truncate):
    made, task, batch = parts(model)
    loss, expected = full_gradient(made, task, batch)
    still = Still(made.parameters())
    result = train_batch(made, task, still, batch, truncate)
    assert len(still.seen) == 1
    for found, wanted in zip(still.seen[0], expected, strict=True):
        assert torch.equal(found, wanted)
    norm = math.sqrt(sum(grad.square().sum().item() for grad in expected))
    assert result.loss == loss.item()
    assert result.gradient_norm == pytest.approx(norm, rel=1e-12)


@pytest.mark.parametrize("model", ["sam", "sdnc", "dnc", "ntm", "lstm"])
def test_chunks_carry_the_state_and_share_the_loss(model):
    made, task, batch = parts(model)
    loss, _ = full_gradient(made, task, batch)
    still = Still(made.parameters())
    result = train_batch(made, task, still, batch, truncate=4)
    # Nothing counts in steps 0-3, so two of the three chunks take an optimiser step.
    assert len(still.seen) == 2
    assert result.loss == pytest.approx(loss.item(), rel=1e-12)
    output, _ = made(batch.input)
    assert result.metric == task.metric(output, batch).item()


def test_a_chunk_has_no_gradient_into_the_chunk_before_it():
    made, task, batch = parts("lstm")
    still = Still(made.parameters())
    train_batch(made, task, still, batch, truncate=8)
    first, state = made(batch.input[:, :8])
    start = task.loss(first, batch.steps(0, 8), task.normaliser(batch))
    second, _ = made(batch.input[:, 8:], state.detach())
    end = task.loss(second, batch.steps(8, 11), task.normaliser(batch))
    for seen, loss in zip(still.seen, (start, end), strict=True):
        expected = torch.autograd.grad(loss, list(made.parameters()))
        for found, wanted in zip(seen, expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-15)


def test_chunks_are_the_batch_in_pieces():
    _, _, batch = parts()
    pieces = list(chunks(batch, 4))
    assert [piece.input.shape[1] for piece in pieces] == [4, 4, 3]
    assert torch.equal(torch.cat([piece.target for piece in pieces], 1), batch.target)
    assert [piece.input.shape[1] for piece in chunks(batch, None)] == [11]


def test_clipping_bounds_the_gradient_and_reports_its_norm_before():
    made, task, batch = parts()
    _, gradient = full_gradient(made, task, batch)
    before = math.sqrt(sum(grad.square().sum().item() for grad in gradient))
    still = Still(made.parameters())
    result = train_batch(made, task, still, batch, clip=before / 10)
    after = math.sqrt(sum(grad.square().sum().item() for grad in still.seen[0]))
    assert after == pytest.approx(before / 10, rel=1e-3)
    assert result.gradient_norm == pytest.approx(before, rel=1e-12)


def test_touched_is_the_mean_over_sequences():
    made, task, batch = parts()
    _, state = made(batch.input)
    result = train_batch(made, task, Still(made.parameters()), batch)
    assert result.touched == state.touched.double().mean().item()


@pytest.mark.usefixtures("plain_errors")
def test_a_loss_that_is_not_finite_stops_before_the_optimiser():
    made, task, batch = parts("lstm")
    with torch.no_grad():
        made.output.bias[0] = math.nan
    still = Still(made.parameters())
    with pytest.raises(Diverged, match=r"^the loss is nan$"):
        train_batch(made, task, still, batch)
    assert still.seen == []


@pytest.mark.parametrize(("truncate", "replays"), [(None, 3), (11, 3), (4, 0)])
def test_captured_batches_are_replayed_where_they_are_whole(monkeypatch, truncate, replays):
    graphs = FakeGraphs.stand_in(monkeypatch)
    results = []
    for wrap in (lambda model: model, captured):
        made, task, batch = parts()
        model = wrap(made)
        adam = torch.optim.Adam(made.parameters(), lr=0.01)
        results.append([train_batch(model, task, adam, batch, truncate) for _ in range(4)])
    assert graphs.replays == replays
    for ours, theirs in zip(*results, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9)


def test_a_whole_batch_makes_the_host_wait_three_times(monkeypatch):
    made, task, batch = parts("lstm")
    waits = []
    numbers = bptt.numbers
    monkeypatch.setattr(bptt, "numbers", lambda *s: waits.append(len(s)) or numbers(*s))
    mode = CountWaits()
    with mode:
        train_batch(made, task, Still(made.parameters()), batch)
    assert waits == [1, 2, 2]  # anything scored; loss and gradient; touched and metric
    assert mode.count == 1  # whether the input is finite


class CountWaits(TorchDispatchMode):
    """Counts what would have the host wait for a GPU."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        waits = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        self.count += function in waits
        return function(*args, **(kwargs or {}))
