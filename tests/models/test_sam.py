import random

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

from sparsemem.indexes.metrics import inverse_norm
from sparsemem.memory import addressing
from sparsemem.models.sam import SAM
from sparsemem.models.sdnc import SDNC
from tests.oracles import dense_sam
from tests.seeds import seeds

F64 = torch.float64
MODELS = [SAM, SDNC]


def small(model_class=SAM, **options):
    options = {"num_slots": 40, "slot_dim": 5, "num_heads": 2, "top_k": 3} | options
    return model_class(3, 6, 2, **options).double()


def random_case(model_class, seed):
    """A model and an input: memories that overflow, heads that collide, sharp and flat gates."""
    draw = random.Random(seed)
    slots = draw.choice([2, 3, 5, 8, 40])
    options = {
        "num_slots": slots,
        "slot_dim": draw.randint(1, 6),
        "num_heads": draw.randint(1, min(4, slots)),
        "top_k": draw.randint(1, min(6, slots)),
        "interpolation_bias": draw.choice([-4.0, 0.0, 2.0]),
    }
    if model_class is SDNC:
        options["num_links"] = draw.choice([1, 2, 8])
    torch.manual_seed(seed)
    model = model_class(3, 5, 2, **options).double()
    for parameter in model.parameters():
        parameter.data *= draw.choice([1, 3])
    shape = (draw.randint(1, 3), draw.randint(1, 24), 3)
    return model, torch.randn(shape, dtype=F64, requires_grad=True)


@pytest.mark.parametrize("model_class", MODELS)
@pytest.mark.parametrize("seed", seeds(40))
def test_equals_the_dense_transcription(model_class, seed):
    model, input = random_case(model_class, seed)
    inputs = [input, *model.parameters()]
    output, state = model(input)
    expected, dense = dense_sam.run(model, input)
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
    weights = torch.randn_like(output)
    ours = torch.autograd.grad((output * weights).sum(), inputs)
    for gradient, truth in zip(
        ours, torch.autograd.grad((expected * weights).sum(), inputs), strict=True
    ):
        torch.testing.assert_close(gradient, truth, rtol=1e-9, atol=1e-9)
    rows = state.episode.rows()
    extent = rows.shape[1]
    torch.testing.assert_close(rows, dense.memory[:, :extent].detach(), rtol=1e-9, atol=1e-9)
    assert not dense.memory[:, extent:].any(), "an untouched row holds the base"


def test_gradcheck():
    """SAM alone: SDNC's links depend on the input, and no gradient flows through them."""
    model = small(num_slots=4)
    model.requires_grad_(False)
    torch.manual_seed(5)
    input = torch.randn(2, 5, 3, dtype=F64, requires_grad=True)
    assert gradcheck(lambda x: model(x)[0], input)


def test_reading_all_rows_equals_the_dense_content_read():
    """K = N: softmax over all slots of beta cos, as NTM and DNC read by content."""
    torch.manual_seed(8)
    model = small(num_slots=6, top_k=6)
    input = torch.randn(2, 9, 3, dtype=F64)
    _, before = model(input[:, :8])
    _, state = model(input[:, 8:], before)
    memory = state.episode.rows()
    query, _, strength, *_ = dense_sam.gates(model.cell, state.controller[0])
    similarity = addressing.cosine_similarity(query, memory, inverse_norm(memory))
    weights = addressing.content_weights(similarity, strength)
    torch.testing.assert_close(state.reads.view(2, 2, 5), weights @ memory, rtol=0, atol=1e-12)
    ours = torch.zeros(2, 2, 6, dtype=F64).scatter(2, *state.read)
    torch.testing.assert_close(ours, weights, rtol=0, atol=1e-12)


def gradients(model, output, *inputs):
    weights = torch.linspace(-1, 1, output.numel(), dtype=F64).view_as(output)
    return torch.autograd.grad((output * weights).sum(), [*inputs, *model.parameters()])


@pytest.mark.parametrize("model_class", MODELS)
def test_memory_size_changes_nothing_bit_for_bit(model_class):
    torch.manual_seed(2)
    small_memory = small(model_class, num_slots=4096)
    huge = small(model_class, num_slots=2**40)
    huge.load_state_dict(small_memory.state_dict())
    input = torch.randn(2, 150, 3, dtype=F64)  # long enough that the overlay grows twice
    ours, truth = (model(input)[0] for model in (huge, small_memory))
    assert torch.equal(ours, truth)
    for a, b in zip(gradients(huge, ours), gradients(small_memory, truth), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("model_class", MODELS)
def test_chunks_with_a_carried_state_give_the_same(model_class):
    """To 1e-12: the output layer is one product for all steps of a call."""
    torch.manual_seed(3)
    model = small(model_class, num_slots=9)
    input = torch.randn(2, 12, 3, dtype=F64, requires_grad=True)
    whole, end = model(input)
    first, state = model(input[:, :5])
    second, state = model(input[:, 5:], state)
    chunks = torch.cat([first, second], 1)
    torch.testing.assert_close(chunks, whole, rtol=0, atol=1e-12)
    assert torch.equal(state.episode.rows(), end.episode.rows()), "the memory is bit for bit"
    for ours, truth in zip(
        gradients(model, chunks, input), gradients(model, whole, input), strict=True
    ):
        torch.testing.assert_close(ours, truth, rtol=0, atol=1e-12)
    first, state = model(input[:, :5])
    cut, _ = model(input[:, 5:], state.detach())
    torch.testing.assert_close(cut, second, rtol=0, atol=1e-12)


@pytest.mark.parametrize("model_class", MODELS)
def test_a_batch_equals_its_sequences_one_by_one(model_class):
    """To 1e-12: matrix products of other shapes add in another order."""
    torch.manual_seed(4)
    model = small(model_class, num_slots=11)
    input = torch.randn(3, 15, 3, dtype=F64)
    together = model(input)[0]
    alone = torch.cat([model(sequence[None])[0] for sequence in input])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-12)
    for ours, truth in zip(gradients(model, alone), gradients(model, together), strict=True):
        torch.testing.assert_close(ours, truth, rtol=0, atol=1e-12)


def test_the_same_call_twice_is_equal_bit_for_bit():
    torch.manual_seed(4)
    model = small().float()
    input = torch.randn(3, 30, 3)
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(input)[0].square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_truncated_bptt_stops_at_the_detach():
    model = small()
    input = torch.randn(1, 6, 3, dtype=F64, requires_grad=True)
    _, state = model(input[:, :3])
    output, _ = model(input[:, 3:], state.detach())
    output.sum().backward()
    assert not input.grad[:, :3].any()
    assert input.grad[:, 3:].all()


@pytest.mark.parametrize("model_class", MODELS)
def test_a_clone_goes_its_own_way_and_gives_gradients(model_class):
    torch.manual_seed(6)
    model = small(model_class, num_slots=7)
    head, left, right = torch.randn(3, 2, 4, 3, dtype=F64)
    head.requires_grad_()
    _, state = model(head)
    fork = state.clone()
    losses = [model(left, state)[0].sum(), model(right, fork)[0].sum()]
    (gradient,) = torch.autograd.grad(sum(losses), head)
    alone = [
        torch.autograd.grad(model(torch.cat([head, tail], 1))[0][:, 4:].sum(), head)[0]
        for tail in (left, right)
    ]
    torch.testing.assert_close(gradient, sum(alone), rtol=0, atol=1e-12)


def test_a_clone_of_a_full_memory_goes_on_the_same():
    torch.manual_seed(6)
    model, input = small(num_slots=5), torch.randn(2, 20, 3, dtype=F64)
    _, state = model(input[:, :11])
    fork = state.clone()
    assert torch.equal(model(input[:, 11:], state)[0], model(input[:, 11:], fork)[0])


@pytest.mark.parametrize("model_class", MODELS)
def test_moving_to_a_device_keeps_the_dtype(model_class):
    torch.manual_seed(6)
    model, input = small(model_class), torch.randn(2, 8, 3, dtype=F64)
    _, state = model(input[:, :4])
    copy = state.to("cpu")
    assert copy.reads.dtype == copy.read.weights.dtype == F64
    assert torch.equal(model(input[:, 4:], state)[0], model(input[:, 4:], copy)[0])


@pytest.mark.parametrize("model_class", MODELS)
def test_a_state_moves_to_another_dtype(model_class):
    torch.manual_seed(6)
    model = small(model_class)
    input = torch.randn(2, 8, 3, dtype=F64)
    whole = model(input)[0]
    _, state = model(input[:, :4])
    model.float()
    output, _ = model(input[:, 4:].float(), state.to(torch.float32))
    torch.testing.assert_close(output.double(), whole[:, 4:], rtol=1e-3, atol=1e-4)


def test_bypass_dropout_hides_the_controller_from_the_output_in_training_only():
    model, input = small(bypass_dropout=1.0), torch.randn(2, 5, 3, dtype=F64)
    model.output.weight.data[:, 6:] = 0  # what is left is the controller's share
    assert torch.equal(model(input)[0], model.output.bias.expand(2, 5, 2))
    model.eval()
    assert not torch.equal(model(input)[0], model.output.bias.expand(2, 5, 2))


class Rectifier(nn.Module):
    """A controller without state."""

    def __init__(self, input_size, hidden_size):
        super().__init__()
        self.layer = nn.Linear(input_size, hidden_size)

    def forward(self, input, state=None):
        return self.layer(input).relu(), None


def test_any_controller_serves():
    torch.manual_seed(7)
    model = small(controller=Rectifier)
    input = torch.randn(2, 10, 3, dtype=F64)
    output, state = model(input)
    torch.testing.assert_close(output, dense_sam.run(model, input)[0], rtol=0, atol=1e-12)
    model(input, state.detach())[0].sum().backward()
    assert model.cell.controller.layer.weight.grad.any()


def test_what_was_read_and_written_can_be_seen():
    model = small()
    state = model.initial_state(2)
    assert state.access.read_ids.shape[2] == 0
    assert state.touched.tolist() == [0, 0]
    _, state = model(torch.randn(2, 1, 3, dtype=F64), state)
    access = state.access
    assert access.write_ids.tolist() == [[[0], [1]]] * 2, "the first step writes the first slots"
    assert access.read_ids.shape == (2, 2, 3)
    torch.testing.assert_close(access.read_weights.sum(-1), torch.ones(2, 2, dtype=F64))
    assert not access.read_weights.requires_grad
    assert state.touched.tolist() == [int(access.read_ids[b].max()) + 1 for b in range(2)]


def test_evaluation_without_gradients_gives_the_same():
    model, input = small(), torch.randn(2, 7, 3, dtype=F64)
    with torch.no_grad():
        quiet = model(input)[0]
    assert torch.equal(quiet, model(input)[0])
    with torch.inference_mode():
        assert torch.equal(quiet, model(input)[0])


@pytest.mark.usefixtures("plain_errors")
class TestRefusals:
    @pytest.mark.parametrize("model_class", MODELS)
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"top_k": 41}, "top_k is 41, expected at most num_slots = 40"),
            ({"num_heads": 41}, "num_heads is 41, expected at most num_slots = 40"),
            ({"slot_dim": 0}, "slot_dim is 0, expected at least 1"),
            ({"num_slots": 0}, "num_slots is 0, expected at least 1"),
            ({"index_after": 0}, "index_after is 0, expected at least 1"),
        ],
    )
    def test_sizes(self, model_class, options, message):
        with pytest.raises(ValueError, match=message):
            small(model_class, **options)

    def test_a_dropout_that_is_no_fraction(self):
        with pytest.raises(ValueError, match=r"bypass_dropout is 1\.5, expected a number"):
            small(bypass_dropout=1.5)

    @pytest.mark.parametrize("model_class", MODELS)
    def test_a_state_of_another_dtype_or_hidden_size(self, model_class):
        input = torch.zeros(1, 2, 3, dtype=F64)
        _, state = small(model_class)(input)
        with pytest.raises(TypeError, match=r"state is torch\.float64 on cpu, .* torch\.float32"):
            small(model_class).float()(input.float(), state)
        other = model_class(3, 7, 2, num_slots=40, slot_dim=5, num_heads=2, top_k=3).double()
        with pytest.raises(ValueError, match="state has hidden_size 6, the controller has 7"):
            other(input, state)

    def test_num_links(self):
        with pytest.raises(ValueError, match="num_links is 0, expected at least 1"):
            small(SDNC, num_links=0)

    def test_a_size_that_is_no_int(self):
        with pytest.raises(TypeError, match=r"num_slots is 4\.0, expected an int"):
            small(num_slots=4.0)

    @pytest.mark.parametrize("model_class", MODELS)
    def test_an_input(self, model_class):
        model = small(model_class)
        with pytest.raises(
            ValueError, match=r"input has shape \(2, 5, 4\), expected \[batch, steps, 3\]"
        ):
            model(torch.zeros(2, 5, 4, dtype=F64))
        with pytest.raises(
            TypeError, match=r"input is torch\.float32 on cpu, .* torch\.float64 on cpu"
        ):
            model(torch.zeros(2, 5, 3))
        input = torch.zeros(2, 5, 3, dtype=F64)
        input[1, 2, 0] = torch.nan
        with pytest.raises(ValueError, match=r"input\[1, 2, 0\] is nan, expected finite values"):
            model(input)

    @pytest.mark.parametrize("model_class", MODELS)
    def test_a_state_of_another_batch_size(self, model_class):
        model = small(model_class)
        _, state = model(torch.zeros(2, 5, 3, dtype=F64))
        with pytest.raises(ValueError, match="state has batch size 2, input has batch size 3"):
            model(torch.zeros(3, 5, 3, dtype=F64), state)
        model(torch.zeros(2, 5, 3, dtype=F64), state)  # nothing had changed

    def test_a_state_of_another_model(self):
        _, state = small(SDNC)(torch.zeros(2, 5, 3, dtype=F64))
        with pytest.raises(TypeError, match="state is a SDNCState, SAMCell expects SAMState"):
            small()(torch.zeros(2, 5, 3, dtype=F64), state)
        _, state = small(num_slots=39)(torch.zeros(2, 5, 3, dtype=F64))
        with pytest.raises(ValueError, match=r"= \(39, 2, 10\), expected \(40, 2, 10\)"):
            small()(torch.zeros(2, 5, 3, dtype=F64), state)

    def test_an_advanced_state(self):
        model, input = small(), torch.zeros(1, 2, 3, dtype=F64)
        _, state = model(input)
        model(input, state)
        with pytest.raises(RuntimeError, match=r"already advanced .*state\.clone\(\) forks it"):
            model(input, state)
