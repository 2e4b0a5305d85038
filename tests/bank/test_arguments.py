"""Each wrong argument is refused by name, value and what was expected, before anything changes."""

from functools import partial

import pytest
import torch

from sparsemem import MemoryBank
from tests.oracles.sharded import sharded, snapshot

pytestmark = pytest.mark.usefixtures("plain_errors")


@pytest.fixture(params=[0, 3], ids=["one", "3 shards"])
def bank(request):
    make = partial(sharded, request.param) if request.param else MemoryBank
    bank = make(6, 4, 3)
    bank.append(torch.ones(4, 4), torch.ones(4, 3))
    bank.freeze(torch.tensor([0, 1]))
    return bank


def ids_of(*ids):
    return torch.tensor(ids, dtype=torch.int64)


ROWS, VALUES = torch.ones(2, 4), torch.ones(2, 3)
NAN = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, float("nan"), 1.0, 1.0]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_rows": 0}, "num_rows is 0, expected at least 1"),
        ({"num_rows": 2.5}, "num_rows is 2.5, expected an int"),
        ({"width": 0}, "width is 0, expected at least 1"),
        ({"value_width": -1}, "value_width is -1, expected at least 1"),
        ({"metric": "cosinus"}, "metric is 'cosinus', did you mean 'cosine'"),
        ({"dtype": torch.int8}, r"dtype is torch.int8, expected one of torch.float32, "),
        ({"initial": "zero"}, "initial is 'zero', known: empty, normal"),
        ({"index": None}, "index is None, expected 'exact', 'product-key' or a FAISS factory"),
        ({"sync": "no"}, "sync is 'no', expected True or False"),
        ({"seed": -1}, "seed is -1, expected at least 0"),
        ({"min_recall": 1.5}, "min_recall is 1.5, expected a number from 0 to 1"),
        ({"index": "exact", "nprobe": 3}, "unknown option 'nprobe' of index 'exact'"),
        ({"storage": "/tmp/x", "device": "meta"}, "storage is '/tmp/x', expected 'ram' for a bank"),
        ({"index": "product-key", "metric": "ip"}, "value_width is None, expected a width"),
        (
            {"index": "product-key", "metric": "ip", "value_width": 2},
            "num_rows is 6, expected a perfect square",
        ),
        (
            {"index": "product-key", "num_rows": 9, "width": 5, "value_width": 2},
            "width is 5, expected an even one",
        ),
    ],
)
def test_construction(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        MemoryBank(**{"num_rows": 6, "width": 4, **options})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b: b.read(torch.ones(2, 5), 1), r"queries has shape \[2, 5\], expected \[..., 4\]"),
        (lambda b: b.read(torch.ones(()), 1), r"queries has shape \[\], expected \[..., 4\]"),
        (lambda b: b.read(torch.ones(4).long(), 1), "queries is torch.int64, expected a floating"),
        (lambda b: b.read(NAN, 1), r"queries\[1, 1\] is nan, expected finite values"),
        (lambda b: b.read(ROWS.to("meta"), 1), "queries is on meta, expected cpu, where the bank"),
        (lambda b: b.read(ROWS, 0), "top_k is 0, expected at least 1"),
        (lambda b: b.read(ROWS, 7), "top_k is 7, expected at most num_rows = 6"),
        (lambda b: b.read(ROWS, True), "top_k is True, expected an int"),
        (lambda b: b.append(torch.ones(4)), r"rows has shape \[4\], expected \[n, 4\]"),
        (lambda b: b.append(NAN), r"rows\[1, 1\] is nan, expected finite values"),
        (lambda b: b.append(ROWS, torch.ones(3, 3)), r"values has shape \[3, 3\], expected \[2, 3"),
        (lambda b: b.append(ROWS, VALUES.int()), "values is torch.int32, expected a floating"),
        (lambda b: b.append(ROWS, tags=-1), "tags is -1, expected at least 0"),
        (
            lambda b: b.append(ROWS, tags=ids_of(1)),
            r"tags is torch.int64 \[1\], expected int64 \[2",
        ),
        (lambda b: b.append(ROWS, tags=ids_of(1, -2)), "tags holds -2, expected at least 0"),
        (lambda b: b.append(ROWS.numpy()), "rows is a ndarray, expected a Tensor"),
        (lambda b: b.append(ROWS, [[1.0]]), "values is a list, expected a Tensor"),
        (lambda b: b.read(ROWS.tolist(), 1), "queries is a list, expected a Tensor"),
        (lambda b: b.remove([1]), "ids is a list, expected a Tensor"),
        (lambda b: b.append(ROWS, ttl=2**63), "ttl is 9223372036854775808, expected at most the"),
        (lambda b: b.write(ids_of(1), ttl=2**63), "ttl is 9223372036854775808, expected at most"),
        (lambda b: b.append(ROWS, tags=2**63), "tags is 9223372036854775808, expected at most"),
        (lambda b: b.append(ROWS, ttl=-1), "ttl is -1, expected at least 0"),
        (lambda b: b.append(ROWS, ttl=1.5), "ttl is 1.5, expected an int"),
        (
            lambda b: b.append(torch.ones(5, 4)),
            r"len\(rows\) is 5, expected at most num_rows - frozen rows = 4",
        ),
        (lambda b: b.write(ids_of(1, 1), ROWS), "ids holds 1 more than once"),
        (lambda b: b.write(ids_of(1, 6), ROWS), "ids holds 6, expected 0 .. 5"),
        (lambda b: b.write(ids_of(-1, 2), ROWS), "ids holds -1, expected 0 .. 5"),
        (lambda b: b.write(ids_of(1, 2).int(), ROWS), "ids is torch.int32"),
        (lambda b: b.write(ids_of(1), ROWS), r"rows has shape \[2, 4\], expected \[1, 4\]"),
        (lambda b: b.write(ids_of(1)), "nothing to write, expected rows, values, tags or ttl"),
        (
            lambda b: b.write(ids_of(1, 4), values=VALUES),
            "ids holds 4, which is not live: expected rows",
        ),
        (lambda b: b.write(ids_of(4), tags=1), "ids holds 4, which is not live"),
        (lambda b: b.write(ids_of(1), tags=True), "tags is True, expected an int"),
        (lambda b: b.remove(), "ids is None and tag is None, expected one of them"),
        (lambda b: b.remove(ids_of(1), tag=2), "tag is 2, expected one of them"),
        (lambda b: b.remove(ids_of(9)), "ids holds 9, expected 0 .. 5"),
        (lambda b: b.remove(tag=0), "tag is 0, expected at least 1"),
        (lambda b: b.freeze(ids_of(2, 5)), "ids holds 5, which is not live: only live rows"),
        (lambda b: b.unfreeze(ids_of(6)), "ids holds 6, expected 0 .. 5"),
    ],
)
def test_calls(bank, call, message):
    before = snapshot(bank), bank.stats()["clock"]
    with pytest.raises((ValueError, TypeError), match=message):
        call(bank)
    assert all(map(torch.equal, snapshot(bank), before[0]))
    assert bank.stats()["clock"] == before[1]


def test_values_of_a_bank_without():
    bank = MemoryBank(6, 4)
    with pytest.raises(ValueError, match="values is given, expected None: this bank's keys are"):
        bank.append(ROWS, ROWS)


def test_a_bank_that_is_refused_leaves_no_file(tmp_path):
    with pytest.raises(ValueError, match="unknown option 'nprobe'"):
        MemoryBank(6, 4, storage=tmp_path / "rows", nprobe=2)
    assert not any(tmp_path.iterdir())


def test_numbers_too_large_for_the_tables_dtype():
    bank = MemoryBank(6, 4, dtype=torch.float16)
    with pytest.raises(
        ValueError, match=r"rows holds 70000, expected at most 65504 in torch.float"
    ):
        bank.append(torch.full((1, 4), 70_000.0))
    assert bank.stats()["num_live"] == 0


def test_product_keys_cannot_be_written():
    bank = MemoryBank(9, 4, 3, index="product-key", metric="ip")
    with pytest.raises(ValueError, match=r"append is not for product keys.*write\(ids, values="):
        bank.append(ROWS, VALUES)
    with pytest.raises(ValueError, match="rows is given, expected None with product keys"):
        bank.write(ids_of(1, 2), ROWS)
