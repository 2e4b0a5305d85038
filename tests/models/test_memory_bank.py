"""SAM and SDNC over a bank: equal to the same over a dense copy of it."""

import random

import pytest
import torch
from torch.autograd import gradcheck

from sparsemem.bank import MemoryBank
from sparsemem.memory.episode import Episode
from sparsemem.models.registry import make_model, model_options
from sparsemem.models.sam import SAM, SAMCell
from sparsemem.models.sdnc import SDNC
from tests.oracles import dense_sam
from tests.seeds import seeds

F64 = torch.float64
MODELS = [SAM, SDNC]


def bank_of(rows, live=None, **options):
    """A bank with rows [N, W] where live."""
    bank = MemoryBank(*rows.shape, dtype=rows.dtype, **options)
    ids = torch.arange(len(rows)) if live is None else live.nonzero().flatten()
    if len(ids):
        bank.write(ids, rows[ids])
    return bank


def random_rows(draw, slots, width):
    """Rows of which some are equal, some multiples of others and some zero."""
    rows = torch.randn(slots, width, dtype=F64)
    for slot in range(slots):
        kind = draw.choice(["own", "own", "own", "equal", "multiple", "zero"])
        other = draw.randrange(slots)
        rows[slot] = {
            "own": rows[slot],
            "equal": rows[other],
            "multiple": rows[other] * draw.choice([0.3, 1.7]),
            "zero": torch.zeros(width, dtype=F64),
        }[kind]
    return rows


def random_case(model_class, seed):
    """A model over a bank, and an input: memories that overflow, equal rows, free slots."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    slots = draw.choice([2, 3, 5, 8, 40, 300])
    rows = random_rows(draw, slots, draw.randint(1, 6))
    live = torch.rand(slots) < draw.choice([0.0, 0.3, 0.8, 1.0])
    options = {
        "num_heads": draw.randint(1, min(4, slots)),
        "top_k": draw.choice([1, min(6, slots), min(slots, 8)]),
        "interpolation_bias": draw.choice([-4.0, 0.0, 2.0]),
    }
    if model_class is SDNC:
        options["num_links"] = draw.choice([1, 2, 8])
    model = model_class(3, 5, 2, memory=bank_of(rows, live), **options).double()
    for name, parameter in model.named_parameters():
        if "memory" not in name:
            parameter.data *= draw.choice([1, 3])
    shape = (draw.randint(1, 3), draw.randint(1, 24), 3)
    return model, rows, live, torch.randn(shape, dtype=F64, requires_grad=True)


def own_parameters(model):
    return [p for name, p in model.named_parameters() if "memory" not in name]


def gradients(output, inputs):
    weights = torch.linspace(-1, 1, output.numel(), dtype=F64).view_as(output)
    found = torch.autograd.grad((output * weights).sum(), inputs)
    return [gradient.to_dense() if gradient.is_sparse else gradient for gradient in found]


def assert_close(ours, truth, tolerance=1e-9):
    torch.testing.assert_close(ours, truth, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("model_class", MODELS)
@pytest.mark.parametrize("seed", seeds(40))
def test_equals_a_dense_copy_of_the_bank(model_class, seed):
    model, rows, live, input = random_case(model_class, seed)
    bank, before = model.cell.memory, model.cell.memory.keys.detach().clone()
    output, state = model(input)
    dense = rows.clone().requires_grad_()
    expected, end = dense_sam.run(model, input, dense, live)
    assert_close(output, expected)
    inputs = [input, *own_parameters(model)]
    ours, truth = gradients(output, [*inputs, bank.keys]), gradients(expected, [*inputs, dense])
    for gradient, of in zip(ours, truth, strict=True):
        assert_close(gradient, of)
    assert torch.equal(bank.keys.detach(), before), "copy-on-write: the bank is as it was"
    episode = state.episode
    for element, slots in enumerate(episode.slots):
        taken = slots[slots >= 0]
        assert len(taken) == state.touched[element] == len(set(taken.tolist()))
        memory = (rows * live[:, None]).index_copy(0, taken, episode.rows()[element, : len(taken)])
        assert_close(memory, end.memory[element].detach())
    order = end.last_access.sort(dim=1, stable=True).indices
    least = episode.slots_of(episode.least_recent(len(rows)))
    assert torch.equal(least, order)


def small(model_class=SAM, rows=None, live=None, **options):
    """A model over a bank of 30 random rows, some slots free."""
    if rows is None:
        rows = torch.randn(30, 5, generator=torch.Generator().manual_seed(9), dtype=F64)
        live = torch.arange(30) % 4 > 0
    options = {"num_heads": 2, "top_k": 3} | options
    return model_class(3, 6, 2, memory=bank_of(rows, live), **options).double()


@pytest.mark.parametrize("model_class", MODELS)
def test_an_empty_bank_equals_rows_of_zeros_bit_for_bit(model_class, monkeypatch):
    monkeypatch.setenv("SPARSEMEM_KERNELS", "reference")  # a kernel adds up in another order
    torch.manual_seed(2)
    sizes = {"num_heads": 2, "top_k": 3}
    over = model_class(3, 6, 2, memory=MemoryBank(100, 5, dtype=F64), **sizes).double()
    plain = model_class(3, 6, 2, num_slots=100, slot_dim=5, **sizes).double()
    plain.load_state_dict({n: p for n, p in over.state_dict().items() if "memory" not in n})
    input = torch.randn(2, 90, 3, dtype=F64, requires_grad=True)  # grows, and goes on to a new lap
    (ours, state), (truth, end) = over(input), plain(input)
    assert torch.equal(ours, truth)
    for a, b in zip(
        gradients(ours, [input, *own_parameters(over)]),
        gradients(truth, [input, *plain.parameters()]),
        strict=True,
    ):
        assert torch.equal(a, b)
    assert torch.equal(state.episode.rows(), end.episode.rows())
    for mine, theirs in zip(state.access, end.access, strict=True):
        assert torch.equal(mine, theirs)


def test_reading_all_rows_of_a_bank_equals_a_dense_read():
    """K = N."""
    torch.manual_seed(8)
    rows = torch.randn(6, 5, dtype=F64)
    model, input = small(rows=rows, top_k=6), torch.randn(2, 9, 3, dtype=F64, requires_grad=True)
    dense = rows.clone().requires_grad_()
    output, expected = model(input)[0], dense_sam.run(model, input, dense)[0]
    assert_close(output, expected)
    for ours, truth in zip(
        gradients(output, [input, model.cell.memory.keys]),
        gradients(expected, [input, dense]),
        strict=True,
    ):
        assert_close(ours, truth)


@pytest.mark.parametrize("model_class", MODELS)
def test_chunks_with_a_carried_state_give_the_same(model_class):
    torch.manual_seed(3)
    model = small(model_class)
    input = torch.randn(2, 12, 3, dtype=F64, requires_grad=True)
    inputs = [input, *model.parameters()]
    whole, end = model(input)
    first, state = model(input[:, :5])
    second, state = model(input[:, 5:], state)
    chunks = torch.cat([first, second], 1)
    torch.testing.assert_close(chunks, whole, rtol=0, atol=1e-12)
    assert torch.equal(state.episode.rows(), end.episode.rows()), "the memory is bit for bit"
    assert torch.equal(state.episode.slots, end.episode.slots)
    for ours, truth in zip(gradients(chunks, inputs), gradients(whole, inputs), strict=True):
        torch.testing.assert_close(ours, truth, rtol=0, atol=1e-12)


def test_truncated_bptt_equals_dense_memories_cut_at_the_same_place():
    """After the cut, rows touched before are constants and others still the bank's."""
    torch.manual_seed(3)
    model, input = small(), torch.randn(2, 10, 3, dtype=F64)
    bank = model.cell.memory
    _, state = model(input[:, :4])
    slots = state.episode.slots
    output, _ = model(input[:, 4:], state.detach())

    dense, live = bank.keys.detach().clone().requires_grad_(), bank.table.live
    _, end = dense_sam.run(model, input[:, :4], dense, live)
    touched = torch.zeros(2, 31, dtype=torch.bool).scatter(1, slots.masked_fill(slots < 0, 30), 1)
    fresh = dense * live[:, None]
    end.memory = torch.where(touched[:, :30, None], end.memory.detach(), fresh)
    end.read_weights, end.reads = end.read_weights.detach(), end.reads.detach()
    end.controller = tuple(part.detach() for part in end.controller)
    steps = [model.output(end.step(step)) for step in input[:, 4:].unbind(1)]
    expected = torch.stack(steps, 1)
    assert_close(output, expected)
    own = own_parameters(model)
    for ours, truth in zip(
        gradients(output, [*own, bank.keys]), gradients(expected, [*own, dense]), strict=True
    ):
        assert_close(ours, truth)


@pytest.mark.parametrize("model_class", MODELS)
def test_a_clone_goes_its_own_way_and_gives_gradients(model_class):
    torch.manual_seed(6)
    model = small(model_class)
    head, left, right = torch.randn(3, 2, 4, 3, dtype=F64)
    head.requires_grad_()
    inputs = [head, *model.parameters()]
    _, state = model(head)
    fork = state.clone()
    both = torch.stack([model(left, state)[0], model(right, fork)[0]])
    alone = [model(torch.cat([head, tail], 1))[0][:, 4:] for tail in (left, right)]
    for ours, truth in zip(
        gradients(both, inputs), gradients(torch.stack(alone), inputs), strict=True
    ):
        torch.testing.assert_close(ours, truth, rtol=0, atol=1e-12)


@pytest.mark.parametrize("model_class", MODELS)
def test_a_batch_equals_its_sequences_one_by_one(model_class):
    torch.manual_seed(4)
    model, input = small(model_class), torch.randn(3, 15, 3, dtype=F64)
    together = model(input)[0]
    alone = torch.cat([model(sequence[None])[0] for sequence in input])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-12)
    parameters = list(model.parameters())
    for ours, truth in zip(
        gradients(alone, parameters), gradients(together, parameters), strict=True
    ):
        torch.testing.assert_close(ours, truth, rtol=0, atol=1e-12)


def test_gradcheck_of_the_rows_of_the_bank():
    torch.manual_seed(5)
    model = small(rows=torch.zeros(4, 5, dtype=F64))
    model.requires_grad_(False)
    input = torch.randn(2, 5, 3, dtype=F64)

    class OverRows(torch.autograd.Function):
        """The model's output over a bank of dense rows."""

        @staticmethod
        def forward(ctx, rows):
            model.cell.memory = ctx.bank = bank_of(rows)
            with torch.enable_grad():
                ctx.output = model(input)[0]
            return ctx.output.detach()

        @staticmethod
        def backward(ctx, gradient):
            (rows,) = torch.autograd.grad(ctx.output, ctx.bank.keys, gradient, retain_graph=True)
            return rows.to_dense()

    assert gradcheck(OverRows.apply, torch.randn(4, 5, dtype=F64, requires_grad=True))


def test_training_through_episodes_teaches_the_rows_of_the_bank():
    """Between two chunks: rows untouched so far are seen as the optimiser left them."""
    torch.manual_seed(7)
    model = small()
    bank, input = model.cell.memory, torch.randn(2, 5, 3, dtype=F64)
    optimiser = torch.optim.SGD([bank.keys], lr=0.1)
    losses = []
    for _ in range(20):
        output, state = model(input)
        losses.append(output.square().sum().item())
        optimiser.zero_grad()
        output.square().sum().backward()
        optimiser.step()
    assert losses[-1] < 0.9 * losses[0]
    assert not bank.keys.detach()[::4].any(), "free slots stay as they are"
    episode = state.episode.detach()
    left = sorted(set(range(30)) - set(episode.slots.flatten().tolist()))
    assert left
    at = episode.positions(torch.tensor([left, left]))
    rows, _ = episode.read(at.unsqueeze(1))
    assert torch.equal(rows[:, 0].detach(), bank.keys.detach()[left].expand(2, -1, -1))


def test_the_bank_is_a_part_of_the_model():
    model = small()
    bank = model.cell.memory
    assert any(parameter is bank.keys for parameter in model.parameters())
    other = SDNC(3, 6, 2, memory=bank).double()
    assert other.cell.memory is bank, "two models may share one"
    assert (other.cell.num_slots, other.cell.slot_dim) == (30, 5)
    state = model.initial_state(2)
    assert state.episode.bank is bank
    assert (state.touched == 0).all()


def test_what_was_read_and_written_is_told_by_slots():
    model = small()
    _, state = model(torch.randn(2, 1, 3, dtype=F64))
    access = state.access
    assert access.write_ids.tolist() == [[[0], [4]]] * 2, "the free slots with the lowest ids"
    at = state.read.ids
    assert torch.equal(access.read_ids, state.episode.slots.gather(1, at.flatten(1)).view_as(at))
    _, later = model(torch.randn(2, 8, 3, dtype=F64), state)
    assert torch.equal(state.access.read_ids, access.read_ids), "of a state that was advanced"
    assert later.access.read_ids.max() < 30


def test_evaluation_without_gradients_gives_the_same():
    model, input = small(), torch.randn(2, 7, 3, dtype=F64)
    with torch.no_grad():
        quiet = model(input)[0]
    assert torch.equal(quiet, model(input)[0])
    with torch.inference_mode():
        assert torch.equal(quiet, model(input)[0])


@pytest.mark.parametrize("name", ["sam", "sdnc"])
def test_a_config_cannot_say_a_bank(name):
    assert "memory" not in model_options(name)
    sizes = {"input_size": 3, "hidden_size": 4, "output_size": 2}
    with pytest.raises(ValueError, match="unknown option 'memory' of model"):
        make_model(name, **sizes, memory=None)


@pytest.mark.usefixtures("plain_errors")
class TestRefusals:
    @pytest.mark.parametrize("model_class", MODELS)
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_slots": 29}, "num_slots is 29, expected memory's num_rows = 30"),
            ({"slot_dim": 6}, "slot_dim is 6, expected memory's width = 5"),
            ({"num_slots": 1_048_576}, "num_slots is 1048576, expected memory's num_rows = 30"),
            ({"slot_dim": 32}, "slot_dim is 32, expected memory's width = 5"),
            ({"top_k": 31}, "top_k is 31, expected at most num_slots = 30"),
        ],
    )
    def test_sizes(self, model_class, options, message):
        with pytest.raises(ValueError, match=message):
            small(model_class, **options)
        model = small(model_class, num_slots=30, slot_dim=5)
        assert model.cell.num_slots == 30

    def test_sizes_of_a_cell(self):
        bank = MemoryBank(30, 5)
        with pytest.raises(ValueError, match="num_slots is 1048576, expected memory's num_rows"):
            SAMCell(3, 6, 1_048_576, 5, 1, 1, memory=bank)

    @pytest.mark.parametrize("model_class", MODELS)
    def test_what_is_no_bank_of_such_rows(self, model_class):
        with pytest.raises(TypeError, match="memory is a Tensor, expected a MemoryBank"):
            model_class(3, 6, 2, memory=torch.zeros(3, 4))
        with pytest.raises(ValueError, match="memory has metric 'ip', expected 'cosine'"):
            model_class(3, 6, 2, memory=MemoryBank(9, 5, metric="ip"))
        with pytest.raises(ValueError, match="memory has value_width 2, expected None"):
            model_class(3, 6, 2, memory=MemoryBank(9, 5, value_width=2))

    def test_a_bank_of_another_dtype(self):
        model = SAM(3, 6, 2, memory=MemoryBank(9, 5, dtype=F64))
        message = r"memory is computed in torch\.float64 on cpu, .* torch\.float32 on cpu"
        with pytest.raises(TypeError, match=message):
            model(torch.zeros(1, 2, 3))
        assert model.double()(torch.zeros(1, 2, 3, dtype=F64))[0].dtype == F64

    @pytest.mark.parametrize("model_class", MODELS)
    def test_a_state_over_another_memory(self, model_class):
        input = torch.zeros(1, 2, 3, dtype=F64)
        _, state = small(model_class)(input)
        with pytest.raises(ValueError, match="state was made over another memory"):
            small(model_class)(input, state)
        plain = model_class(3, 6, 2, num_slots=30, slot_dim=5, num_heads=2, top_k=3).double()
        with pytest.raises(ValueError, match="state was made over another memory"):
            plain(input, state)

    @pytest.mark.parametrize("model_class", MODELS)
    def test_a_state_that_moves_away(self, model_class):
        model, input = small(model_class), torch.randn(1, 4, 3, dtype=F64)
        _, state = model(input[:, :2])
        with pytest.raises(TypeError, match=r"cannot go to .* on cpu: move the bank"):
            state.to(torch.float32)
        copy = state.to("cpu")
        assert torch.equal(model(input[:, 2:], state)[0], model(input[:, 2:], copy)[0])


def test_half_precision_rows_are_computed_in_float32():
    torch.manual_seed(1)
    rows = torch.randn(30, 5).bfloat16()
    bank = MemoryBank(30, 5, dtype=torch.bfloat16)
    bank.write(torch.arange(30), rows)
    model = SAM(3, 6, 2, memory=bank, top_k=3)
    input = torch.randn(2, 6, 3)
    output, state = model(input)
    expected = dense_sam.run(model, input, rows.float())[0]
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    assert state.episode.rows().dtype == torch.float32
    output.sum().backward()
    assert bank.keys.grad.dtype == torch.bfloat16
    assert bank.keys.grad.to_dense().any()
    assert Episode.over(bank, 1).rows().shape == (1, 0, 5)
