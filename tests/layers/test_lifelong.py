"""LifelongMemory against loops over a dictionary, and its losses by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from sparsemem.bank import MemoryBank
from sparsemem.layers.lifelong import (
    UNKNOWN,
    LifelongMemory,
    Recall,
    margin_loss,
    neighbour_loss,
)

W = 3
AXES = torch.eye(W, dtype=torch.float64)


def memory_of(num_rows=8, top_k=2, dtype=torch.float64, **options):
    return LifelongMemory(MemoryBank(num_rows, W, dtype=dtype), top_k, **options)


def labels_of(*labels):
    return torch.tensor(labels)


def recall_of(scores, labels):
    """What was recalled, with scores that take gradients."""
    scores = torch.tensor(scores, dtype=torch.float64, requires_grad=True)
    return Recall(torch.tensor(labels), scores, torch.zeros_like(torch.tensor(labels)))


def test_an_empty_memory_knows_nothing():
    recall = memory_of()(AXES)
    assert recall.predict().tolist() == [UNKNOWN] * 3
    assert recall.ids.tolist() == [[-1, -1]] * 3


def test_what_was_stored_once_is_recalled():
    memory = memory_of()
    assert memory.remember(5 * AXES, labels_of(4, 0, 9)).tolist() == [0, 1, 2]
    recall = memory(torch.tensor([[0.1, 2.0, 0.3], [0.0, 0.6, 0.8]], dtype=torch.float64))
    assert recall.labels.tolist() == [[0, 9], [9, 0]]
    torch.testing.assert_close(
        recall.scores[1], torch.tensor([0.8, 0.6], dtype=torch.float64), atol=1e-5, rtol=0
    )


def test_a_neighbour_that_is_not_near_enough_is_unknown():
    memory = memory_of()
    memory.remember(AXES[:1], labels_of(7))
    recall = memory(torch.tensor([[0.6, 0.8, 0.0], [0.8, 0.0, 0.6]], dtype=torch.float64))
    assert recall.predict().tolist() == [7, 7]
    assert recall.predict(0.7).tolist() == [UNKNOWN, 7]


@pytest.mark.parametrize("inertia", [0.5, 1.0, 3.0, math.inf])
def test_random_lives_equal_plain_loops(inertia):
    """Rows as vectors in a dictionary, one example at a time."""
    memory = memory_of(num_rows=64, inertia=inertia)
    rows = {}
    for query, label in zip(
        torch.randn(200, W, dtype=torch.float64), torch.randint(4, (200,)).tolist(), strict=True
    ):
        unit = query / query.norm()
        best = max(rows, key=lambda i: float(rows[i][0] @ unit / rows[i][0].norm()), default=None)
        predicted = memory(query[None]).predict().item()
        assert predicted == (UNKNOWN if best is None else rows[best][1])
        (row,) = memory.remember(query[None], labels_of(label)).tolist()
        if best is not None and rows[best][1] == label:
            assert row == best
            key = rows[best][0]
            weight = min(1.0, inertia / float(key.norm()))
            rows[best] = (weight * key + unit, label)
        else:
            if len(rows) == 64:
                assert row in rows  # some row gave way
            rows[row] = (unit, label)
        torch.testing.assert_close(memory.bank.gather(labels_of(row))[0], rows[row][0])
        if len(rows) == 64:
            break
    assert len(rows) > 10


def test_infinite_inertia_averages_all_examples():
    memory = memory_of(inertia=math.inf)
    examples = F.normalize(AXES[0] + 0.3 * torch.randn(20, W, dtype=torch.float64), dim=1)
    for example in examples:
        memory.remember(example[None], labels_of(2))
    assert memory.bank.table.num_live == 1
    torch.testing.assert_close(memory.bank.gather(labels_of(0))[0], examples.sum(0))


def test_examples_of_one_call_are_added_to_the_same_row():
    memory = memory_of()
    memory.remember(AXES[:1], labels_of(1))
    near = torch.tensor([[0.8, 0.6, 0.0], [0.8, 0.0, 0.6]], dtype=torch.float64)
    assert memory.remember(near, labels_of(1, 1)).tolist() == [0, 0]
    torch.testing.assert_close(memory.bank.gather(labels_of(0))[0], AXES[0] + near.sum(0))


def test_examples_of_one_call_do_not_see_each_other():
    memory = memory_of()
    assert memory.remember(AXES[[0, 0]], labels_of(1, 1)).tolist() == [0, 1]


def test_rows_that_were_not_found_for_longest_give_way():
    memory = memory_of(num_rows=3, top_k=1)
    memory.remember(AXES, labels_of(0, 1, 2))
    recall = memory(AXES[[0, 2]])  # row 1 is not found
    other = torch.tensor([[1.0, 0.0, 1.0]], dtype=torch.float64)
    assert memory.remember(other, labels_of(5), Recall(*(part[:1] for part in recall))) == 1
    assert memory(AXES[1:2]).predict().item() != 1


def test_a_recall_that_is_out_of_date_adds_nothing_to_another_classs_row():
    memory = memory_of(num_rows=1, top_k=1)
    memory.remember(AXES[:1], labels_of(0))
    recall = memory(AXES[:1])
    memory.remember(AXES[1:2], labels_of(1))  # takes the only row
    assert memory.remember(AXES[:1], labels_of(0), recall).tolist() == [0]
    torch.testing.assert_close(memory.bank.gather(labels_of(0))[0], AXES[0])
    assert memory(AXES[:1]).predict().item() == 0


def test_a_class_is_forgotten():
    memory = memory_of()
    memory.remember(AXES, labels_of(0, 1, 0))
    assert memory.forget(0).tolist() == [0, 2]
    assert memory(AXES).labels.tolist() == [[1, UNKNOWN]] * 3
    assert memory.forget(0).tolist() == []


def test_labels_are_saved_with_the_bank(tmp_path):
    memory = memory_of()
    memory.remember(AXES, labels_of(3, 0, 5))
    memory.bank.save(tmp_path / "bank")
    again = LifelongMemory(MemoryBank.load(tmp_path / "bank"), 1)
    assert again(AXES).predict().tolist() == [3, 0, 5]


def test_half_precision_rows():
    memory = memory_of(dtype=torch.bfloat16)
    memory.remember(AXES.float(), labels_of(0, 1, 2))
    memory.remember(AXES.float() + 0.1, labels_of(0, 1, 2))
    assert memory.bank.table.num_live == 3
    assert memory(AXES.float()).predict().tolist() == [0, 1, 2]


def test_neighbour_loss_by_hand():
    recall = recall_of([[0.9, 0.5, 0.1], [0.8, 0.7, 0.6]], [[1, 2, 1], [3, 3, 4]])
    loss = neighbour_loss(recall, labels_of(1, 4), 0.5)
    first = (math.exp(1.8) + math.exp(0.2)) / sum(map(math.exp, (1.8, 1.0, 0.2)))
    second = math.exp(1.2) / sum(map(math.exp, (1.6, 1.4, 1.2)))
    assert loss.item() == pytest.approx(-(math.log(first) + math.log(second)) / 2)


def test_margin_loss_by_hand():
    recall = recall_of(
        [[0.9, 0.5, 0.1], [0.8, 0.7, 0.6], [0.9, 0.1, 0.0]], [[1, 2, 1], [3, 3, 4], [5, 6, 6]]
    )
    loss = margin_loss(recall, labels_of(1, 4, 5), 0.3)
    assert loss.item() == pytest.approx((0 + (0.8 - 0.6 + 0.3) + 0) / 3)
    loss.backward()
    torch.testing.assert_close(
        recall.scores.grad * 3, torch.tensor([[0, 0, 0], [1, 0, -1], [0, 0, 0]]).double()
    )


@pytest.mark.parametrize("loss", [neighbour_loss, margin_loss])
def test_queries_without_a_right_neighbour_do_not_count(loss):
    both = recall_of([[0.9, 0.5], [0.8, 0.7]], [[1, 2], [3, 3]])
    alone = recall_of([[0.9, 0.5]], [[1, 2]])
    assert loss(both, labels_of(2, 4)).item() == loss(alone, labels_of(2)).item() > 0
    none = loss(both, labels_of(7, 7))
    none.backward()
    assert none.item() == 0
    assert both.scores.grad.tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("loss", [neighbour_loss, margin_loss])
def test_a_memory_that_is_not_full_yet(loss):
    """Missing neighbours are infinitely far: they must not reach loss or gradient."""
    queries = torch.randn(2, W, dtype=torch.float64, requires_grad=True)
    memory = memory_of(top_k=5)
    start = loss(memory(queries), labels_of(0, 1))
    start.backward()
    assert start.item() == 0
    assert not queries.grad.any()
    memory.remember(AXES, labels_of(0, 1, 1))
    value = loss(memory(queries), labels_of(0, 1))
    value.backward()
    assert value.isfinite()
    assert queries.grad.isfinite().all()
    memory.forget(1)
    assert loss(memory(queries), labels_of(0, 0)).item() == 0  # there are no wrong ones


@pytest.mark.parametrize("loss", [neighbour_loss, margin_loss])
def test_gradients_reach_the_queries(loss):
    memory = memory_of(top_k=3)
    memory.remember(AXES, labels_of(0, 1, 1))
    queries = torch.tensor([[1.0, 0.7, 0.2], [0.9, 0.1, 0.5]], dtype=torch.float64)
    assert gradcheck(lambda q: loss(memory(q), labels_of(1, 0), 1.0), queries.requires_grad_())
    loss(memory(queries), labels_of(1, 0), 1.0).backward()
    assert queries.grad.abs().sum() > 0
    assert memory.bank.keys.grad is None


def test_bad_arguments_change_nothing(plain_errors):
    memory = memory_of(num_rows=2)
    memory.remember(AXES[:1], labels_of(0))
    before = memory.bank.keys.clone()
    for message, call in (
        (rf"queries has shape \({W},\), expected \[Q, {W}\]", lambda: memory(AXES[0])),
        (
            "recall is of 2 queries, expected that of these 1",
            lambda: memory.remember(AXES[:1], labels_of(0), memory(AXES[:2])),
        ),
        ("labels holds -1, expected at least 0", lambda: memory.remember(AXES[:1], labels_of(-1))),
        (
            r"labels is torch.int64 \[2\], expected int64 \[1\]",
            lambda: memory.remember(AXES[:1], labels_of(0, 0)),
        ),
        (
            "labels is torch.float32",
            lambda: neighbour_loss(memory(AXES[:1]), torch.zeros(1)),
        ),
        (
            "number of new rows is 3, expected at most num_rows - frozen rows = 2",
            lambda: memory.remember(AXES[[0, 1, 2, 1]], labels_of(0, 1, 2, 3)),
        ),
        ("temperature is 0", lambda: neighbour_loss(memory(AXES[:1]), labels_of(0), 0)),
        ("margin is -1", lambda: margin_loss(memory(AXES[:1]), labels_of(0), -1)),
        ("label is -1, expected at least 0", lambda: memory.forget(-1)),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert torch.equal(memory.bank.keys, before)
    assert memory.bank.table.num_live == 1


def test_banks_that_cannot_serve(plain_errors):
    with pytest.raises(ValueError, match="bank has metric 'ip', expected 'cosine'"):
        LifelongMemory(MemoryBank(4, W, metric="ip"), 1)
    with pytest.raises(TypeError, match="bank is a Linear, expected a MemoryBank"):
        LifelongMemory(torch.nn.Linear(2, 2), 1)
    with pytest.raises(ValueError, match=r"top_k is 5, expected at most bank\.num_rows = 4"):
        LifelongMemory(MemoryBank(4, W), 5)
    with pytest.raises(ValueError, match="inertia is 0, expected a number above 0"):
        LifelongMemory(MemoryBank(4, W), 1, inertia=0)
