"""The contract that every generated task keeps; bAbI's part is in test_babi.py."""

import pytest
import torch
from torch.utils.data import DataLoader

from sparsemem.tasks import TASKS, Batch, make_task

GENERATED = [
    ("copy", {"max_level": 4}),
    ("repeat-copy", {"max_level": 3, "max_repeats": 3}),
    ("associative-recall", {"max_level": 4}),
    ("associative-recall", {"max_level": 4, "variant": "key-value", "num_queries": 2}),
    ("priority-sort", {"max_level": 5}),
    ("ngrams", {"max_level": 12, "n": 3}),
    ("facts", {"num_facts": 12, "queries": 3}),
]
each_task = pytest.mark.parametrize(("name", "options"), GENERATED)


def build(name, options, **more):
    return make_task(name, **{"batch_size": 3, "seed": 5, **options, **more})


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_every_generated_task_is_covered():
    assert {name for name, _ in GENERATED} == set(TASKS) - {"babi"}


@each_task
def test_batch_is_a_pure_function(name, options):
    task, other = build(name, options), build(name, options)
    forward = [task.batch(i, 3) for i in range(4)]
    backward = [other.batch(i, 3) for i in reversed(range(4))][::-1]
    assert all(equal(a, b) for a, b in zip(forward, backward, strict=True))
    assert all(equal(a, task.batch(i, 3)) for i, a in enumerate(forward))


@each_task
def test_seed_split_index_and_level_each_change_the_batch(name, options):
    task = build(name, options, batch_size=16)
    base = task.batch(0, 3)
    others = [
        build(name, options, batch_size=16, seed=6).batch(0, 3),
        task.with_split("test").batch(0, 3),
        task.with_split("validation").batch(0, 3),
        task.batch(1, 3),
    ]
    length = base.input.shape[1]
    assert all(other.input.shape[1] != length or not equal(other, base) for other in others)
    more = task.batch(0, 4)
    if name == "facts":  # its level is how many facts are asked for, not how many a sequence asks
        assert not equal(more, base)
    else:
        assert more.input.shape[1] != length or name == "repeat-copy"
    assert task.split == "train"


@each_task
def test_global_generators_do_not_matter_and_are_left_alone(name, options):
    task = build(name, options)
    torch.manual_seed(1)
    one, state = task.batch(0), torch.get_rng_state()
    torch.manual_seed(2)
    assert equal(one, task.batch(0))
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


@each_task
def test_shapes_sizes_and_dtype(name, options):
    task = build(name, options, dtype="float64")
    batch = task.batch(0)
    steps = batch.input.shape[1]
    assert batch.input.shape == (3, steps, task.input_size)
    assert batch.target.shape == (3, steps, task.output_size)
    assert batch.mask.shape == (3, steps)
    assert batch.input.dtype == batch.target.dtype == torch.float64
    assert build(name, options).batch(0).input.dtype == torch.float32
    assert set(batch.target.unique().tolist()) <= {0.0, 1.0}
    assert not batch.target[~batch.mask].any() or name == "ngrams"


@each_task
def test_metric_counts_wrong_bits(name, options):
    task = build(name, options)
    batch = task.batch(0)
    perfect = 2 * batch.target - 1
    counted = task.normaliser(batch).item()
    assert task.metric(perfect, batch) == 0
    assert task.metric(-perfect, batch) == counted / 3
    one_off = perfect.clone()
    one_off[1, batch.mask[1].nonzero()[0, 0], 0] *= -1
    assert task.metric(one_off, batch) == pytest.approx(1 / 3)
    outside = torch.where(batch.mask[..., None], perfect, -perfect)
    assert task.metric(outside, batch) == 0
    assert task.score(-perfect, batch) == (counted, 3)


@each_task
def test_loss_is_the_mean_over_the_bits_that_count(name, options):
    task = build(name, options, dtype="float64")
    batch = task.batch(0)
    output = torch.randn_like(batch.target).requires_grad_()
    chance = output.sigmoid()
    terms = -(batch.target * chance.log() + (1 - batch.target) * (1 - chance).log())
    assert task.loss(output, batch).item() == pytest.approx(terms[batch.mask].mean().item())


@each_task
def test_losses_of_slices_add_up(name, options):
    task = build(name, options, dtype="float64")
    batch = task.batch(0)
    output = torch.randn_like(batch.target).requires_grad_()
    whole = task.loss(output, batch)
    (gradient,) = torch.autograd.grad(whole, output)
    normaliser = task.normaliser(batch)
    parts = [
        task.loss(output[:, t : t + 2], batch.steps(t, t + 2), normaliser)
        for t in range(0, batch.input.shape[1], 2)
    ]
    torch.testing.assert_close(sum(parts), whole)
    (from_parts,) = torch.autograd.grad(sum(parts), output)
    torch.testing.assert_close(from_parts, gradient)


def test_loss_of_a_slice_without_answer_is_zero_with_a_gradient():
    task = build("copy", {"max_level": 4})
    batch = task.batch(0).steps(0, 3)
    assert not batch.mask.any()
    output = torch.randn(3, 3, 8, requires_grad=True)
    loss = task.loss(output, batch)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(output.grad, torch.zeros_like(output))
    assert task.metric(output, batch) == 0


def test_iteration_follows_the_level():
    task = build("copy", {"max_level": 4})
    batches = iter(task)
    assert equal(next(batches), task.batch(0, 4))
    task.level = 2
    assert equal(next(batches), task.batch(1, 2))


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_yields_each_batch_once_and_in_order(workers):
    task = build("copy", {"max_level": 2})
    loader = iter(DataLoader(task, batch_size=None, num_workers=workers))
    for index in range(5):
        batch = next(loader)
        assert isinstance(batch, Batch)
        assert equal(batch, task.batch(index))


def test_evaluation_batches():
    task = build("copy", {"max_level": 4})
    batches = list(task.evaluation_batches("test", 2, 7))
    assert len(batches) == 2
    assert all(equal(b, task.with_split("test").batch(i, 7)) for i, b in enumerate(batches))
    assert len(list(task.evaluation_batches())) == 10


def test_steps_are_views_of_the_batch():
    batch = build("copy", {"max_level": 4}).batch(0)
    part = batch.steps(2, 5)
    assert equal(part, (batch.input[:, 2:5], batch.target[:, 2:5], batch.mask[:, 2:5]))
    assert part.input._is_view()
    assert equal(batch.steps(2), batch.steps(2, 9))
    assert equal(batch.to("cpu"), batch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "seed is -1, expected at least 0"),
        ({"seed": "1"}, "seed is '1', expected an int"),
        ({"batch_size": 0}, "batch_size is 0, expected at least 1"),
        ({"split": "valid"}, "split is 'valid', expected one of train, validation, test"),
        ({"dtype": "int64"}, "dtype is 'int64', expected a floating point dtype"),
        ({"dtype": "nn"}, "dtype is 'nn', expected a floating point dtype"),
        ({"min_level": 0}, "min_level is 0, expected at least 1"),
        ({"max_level": 0}, "max_level is 0, expected at least 1"),
        ({"min_level": 5, "max_level": 4}, "min_level is 5, expected at most max_level = 4"),
        ({"bits": 0}, "bits is 0, expected at least 1"),
        ({"input_values": "1"}, "input_values is '1', .*known: 01, ±1"),
    ],
)
def test_bad_options(options, message, plain_errors):
    with pytest.raises((TypeError, ValueError), match=message):
        make_task("copy", **options)


def test_bad_calls(plain_errors):
    task = build("copy", {"max_level": 4})
    with pytest.raises(ValueError, match="index is -1, expected at least 0"):
        task.batch(-1)
    with pytest.raises(ValueError, match="level is 0, expected at least 1"):
        task.batch(0, 0)
    with pytest.raises(ValueError, match="split is 'dev', expected one of"):
        task.with_split("dev")
    with pytest.raises(ValueError, match="count is 0, expected at least 1"):
        task.evaluation_batches("test", 0)
    batch = task.batch(0)
    wrong = torch.zeros(3, 9, 7)
    with pytest.raises(ValueError, match=r"output has shape \(3, 9, 7\), expected \(3, 9, 8\)"):
        task.loss(wrong, batch)
    with pytest.raises(ValueError, match=r"output has shape \(3, 9, 7\), expected \(3, 9, 8\)"):
        task.metric(wrong, batch)
