import pytest
import torch

from sparsemem.tasks import AssociativeRecallTask


@pytest.mark.parametrize("queries", [1, 3])
def test_next_item_answers_follow_the_query(queries):
    task = AssociativeRecallTask(
        bits=4, item_length=2, num_queries=queries, input_values="01", batch_size=32
    )
    batch = task.batch(0, 5)
    assert batch.input.shape == (32, 5 * 3 + queries * 6, 6)
    shown = batch.input[:, :15].view(32, 5, 3, 6)
    assert (shown[:, :, 0] == torch.tensor([0, 0, 0, 0, 1, 0])).all()  # item delimiters
    assert not shown[:, :, 1:, 4:].any()
    items = shown[:, :, 1:, :4].flatten(2)
    for start in range(15, 15 + 6 * queries, 6):
        part = batch.steps(start, start + 6)
        ends = torch.tensor([0, 0, 0, 0, 0, 1])
        assert (part.input[:, [0, 3]] == ends).all()
        assert not part.input[:, 4:].any()
        assert part.mask.tolist() == [[False] * 4 + [True] * 2] * 32
        query, answer = part.input[:, 1:3, :4].flatten(1), part.target[:, 4:].flatten(1)
        for row in range(32):
            where = (items[row] == query[row]).all(1).nonzero().flatten().tolist()
            assert len(where) == 1  # the items of a sequence all differ
            assert torch.equal(items[row, where[0] + 1], answer[row])
    assert not batch.mask[:, :15].any()


@pytest.mark.parametrize(("length", "queries"), [(1, 1), (2, 3)])
def test_key_value_answers_are_the_values(length, queries):
    task = AssociativeRecallTask(
        variant="key-value", bits=3, item_length=length, num_queries=queries,
        input_values="01", batch_size=32,
    )  # fmt: skip
    batch = task.batch(0, 6)
    assert batch.input.shape == (32, (6 + 2 * queries) * length, 7)
    shown = batch.input[:, : 6 * length].reshape(32, 6, length, 7)
    assert not shown[..., 6].any()
    keys, values = shown[..., :3].flatten(2), shown[..., 3:6].flatten(2)
    for query in range(queries):
        start = (6 + 2 * query) * length
        part = batch.steps(start, start + 2 * length)
        asked = part.input[:, :length]
        assert (asked[..., 6] == 1).all()
        assert not asked[..., 3:6].any()
        assert not part.input[:, length:].any()
        assert part.mask.tolist() == [[False] * length + [True] * length] * 32
        for row in range(32):
            where = (keys[row] == asked[row, :, :3].flatten()).all(1).nonzero().flatten().tolist()
            assert len(where) == 1
            assert torch.equal(values[row, where[0]], part.target[row, length:].flatten())


def test_every_item_is_asked_for():
    task = AssociativeRecallTask(variant="key-value", bits=2, max_level=4, batch_size=200)
    batch = task.batch(0, 4)
    keys, query = batch.input[:, :4, :2], batch.input[:, 4, :2]
    places = (keys == query[:, None]).all(2).int().argmax(1)
    assert sorted(set(places.tolist())) == [0, 1, 2, 3]


def test_as_many_items_as_there_are():
    task = AssociativeRecallTask(variant="key-value", bits=2, max_level=4, batch_size=4)
    codes = (task.batch(0, 4).input[:, :4, :2] > 0).int() @ torch.tensor([1, 2], dtype=torch.int)
    assert [sorted(row) for row in codes.tolist()] == [[0, 1, 2, 3]] * 4


def test_items_wider_than_a_machine_word():
    task = AssociativeRecallTask(variant="key-value", bits=100, batch_size=200, input_values="01")
    batch = task.batch(0, 3)
    assert batch.input[:, :3, :100].mean((0, 1)).sub(0.5).abs().max() < 0.15  # each bit is free


def test_defaults_are_the_papers():
    task = AssociativeRecallTask()
    assert (task.bits, task.item_length, task.min_level, task.max_level) == (6, 3, 2, 6)
    pairs = AssociativeRecallTask(variant="key-value")
    assert (pairs.item_length, pairs.min_level) == (1, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_level": 1}, "min_level is 1, expected at least 2"),
        ({"max_level": 1}, "max_level is 1, expected at least 2"),
        ({"variant": "pairs"}, "variant is 'pairs', .*known: key-value, next-item"),
        ({"bits": 1, "item_length": 2}, "max_level is 6, .* the number of different items = 4"),
        ({"num_queries": 0}, "num_queries is 0, expected at least 1"),
        ({"item_length": 0}, "item_length is 0, expected at least 1"),
    ],
)
def test_bad_options(options, message, plain_errors):
    with pytest.raises(ValueError, match=message):
        AssociativeRecallTask(**options)


def test_bad_level(plain_errors):
    task = AssociativeRecallTask(bits=3, item_length=1)
    with pytest.raises(
        ValueError, match="level is 9, expected at most the number of different items = 8"
    ):
        task.batch(0, 9)
    with pytest.raises(ValueError, match="level is 1, expected at least 2"):
        task.batch(0, 1)
