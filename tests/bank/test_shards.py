"""Shards: exactly the live rows, and nothing read that is not what the manifest says."""

import hashlib

import pytest
import safetensors.torch
import torch

from sparsemem.bank import MemoryBank, shards
from sparsemem.bank.errors import BankError, DamagedError
from sparsemem.bank.manifest import Arguments, Shard
from sparsemem.bank.shards import (
    SHARD_ROWS,
    Layout,
    check_numbers,
    put_rows,
    read_shard,
    take_rows,
    take_usage,
)
from tests.oracles.bank_state import rows_of, usage_of

ARGUMENTS = {"num_rows": 70_000, "width": 3, "metric": "cosine", "index": "exact"}


def layout(value_width=2, dtype="float32"):
    return Layout.of(Arguments(value_width=value_width, dtype=dtype, **ARGUMENTS))


def filled(value_width=2, dtype=torch.float32):
    bank = MemoryBank(70_000, 3, value_width, dtype=dtype)
    ids = torch.tensor([0, 5, 65_535, 65_536, 69_999])
    values = None if value_width is None else torch.randn(5, value_width)
    bank.write(ids, torch.randn(5, 3), values, tags=torch.tensor([1, 2, 3, 4, 5]), ttl=9)
    bank.freeze(ids[1:3])
    bank.remove(ids[3:4])
    bank.read(torch.randn(2, 3), 2)
    return bank


@pytest.mark.parametrize("value_width", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_is_taken_and_put_is_the_same(value_width, dtype):
    bank, copy = filled(value_width, dtype), MemoryBank(70_000, 3, value_width, dtype=dtype)
    wanted = layout(value_width, str(dtype).removeprefix("torch."))
    assert wanted.num_shards == 2
    rows = [take_rows(bank, wanted, number) for number in range(2)]
    assert [part["ids"].tolist() for part in rows] == [[0, 5, 65_535], [69_999]]
    usage = [take_usage(bank, wanted, number) for number in range(2)]
    assert [part["ids"].tolist() for part in usage] == [[0, 5, 65_535], [65_536, 69_999]]
    for part in rows:
        put_rows(copy, part)
        copy.book.live[part["ids"]] = True
    for part in usage:
        put_rows(copy, part)
    assert rows_of(copy) == rows_of(bank)
    assert usage_of(copy) == usage_of(bank)


def test_of_a_shard_without_rows_nothing_is_taken():
    bank = MemoryBank(70_000, 3, 2)
    bank.write(torch.tensor([69_999]), torch.randn(1, 3))
    assert take_rows(bank, layout(), 0) is take_usage(bank, layout(), 0) is None
    bank.remove(torch.tensor([69_999]))
    assert take_rows(bank, layout(), 1) is None
    assert take_usage(bank, layout(), 1)["ids"].tolist() == [69_999]


def test_what_is_taken_is_a_copy():
    bank = filled()
    taken = take_rows(bank, layout(), 0)
    before = {name: tensor.clone() for name, tensor in taken.items()}
    bank.write(torch.tensor([0, 5]), torch.zeros(2, 3), torch.zeros(2, 2))
    for name, tensor in taken.items():
        assert torch.equal(tensor, before[name])


def test_no_row_of_a_bank_is_in_two_shards_or_none():
    assert SHARD_ROWS == 65_536
    for num_rows, count in ((1, 1), (65_536, 1), (65_537, 2), (10**8, 1526)):
        arguments = {**ARGUMENTS, "num_rows": num_rows}
        made = Layout.of(Arguments(value_width=None, dtype="float32", **arguments))
        assert made.num_shards == count


def good(**changes):
    tensors = {
        "ids": torch.tensor([65_536, 69_999]),
        "keys": torch.randn(2, 3),
        "values": torch.randn(2, 2),
        "frozen": torch.tensor([True, False]),
        "tags": torch.tensor([0, 1]),
        "expiry": torch.tensor([0, 0]),
    }
    return {name: t for name, t in {**tensors, **changes}.items() if t is not None}


def write(folder, tensors, **changes):
    data = safetensors.torch.save(tensors)
    (folder / "rows-00001-00000004.safetensors").write_bytes(data)
    entry = {
        "file": "rows-00001-00000004.safetensors",
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "shard": 1,
        "rows": 2,
    }
    return Shard(**{**entry, **changes})


def test_a_whole_shard_is_read(tmp_path):
    tensors = good()
    read = read_shard(tmp_path, write(tmp_path, tensors), layout(), layout().rows)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(read[name], tensor)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keys": None}, r"holds \['expiry', 'frozen', 'ids', 'tags', 'values'\], expected \["),
        ({"extra": torch.zeros(2)}, "expected"),
        ({"keys": torch.randn(2, 4)}, r"keys is torch.float32 \[2, 4\], expected .* \[2, 3\]"),
        ({"keys": torch.randn(2, 3).double()}, r"keys is torch.float64 \[2, 3\], expected"),
        ({"tags": torch.tensor([0, 1, 2])}, r"tags is torch.int64 \[3\], expected"),
        ({"ids": torch.tensor([65_537, 65_537])}, "not ascending row numbers from 65536 to 69999"),
        ({"ids": torch.tensor([65_538, 65_537])}, "not ascending"),
        ({"ids": torch.tensor([65_535, 65_537])}, "not ascending"),
        ({"ids": torch.tensor([65_537, 70_000])}, "not ascending"),
        ({"ids": torch.tensor([-1, 65_537])}, "not ascending"),
        (
            {"keys": torch.tensor([[0.0, 0, 0], [0, torch.nan, 0]])},
            "keys of row 69999 hold NaN or infinity",
        ),
        (
            {"values": torch.tensor([[torch.inf, -torch.inf], [0, 0]])},
            "values of row 65536 hold NaN or infinity",
        ),
    ],
)
def test_contents_of_another_bank_are_refused_by_name(tmp_path, changes, message):
    shard = write(tmp_path, good(**changes))
    with pytest.raises(BankError, match=f"rows-00001-00000004.safetensors.*{message}"):
        read_shard(tmp_path, shard, layout(), layout().rows)


def test_a_file_that_is_not_what_the_manifest_says_is_damaged(tmp_path):
    shard = write(tmp_path, good())
    path = tmp_path / shard.file
    data = path.read_bytes()

    def refused(message):
        with pytest.raises(DamagedError, match=f"{shard.file}{message}"):
            read_shard(tmp_path, shard, layout(), layout().rows)

    path.write_bytes(data[:-1])
    refused(f" is torn: {len(data) - 1} bytes, expected {len(data)}")
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    refused(f" is damaged: its sha256 is .*, expected {shard.sha256[:12]}")
    path.unlink()
    refused(": No such file")


def test_a_file_that_is_no_safetensors_file_is_damaged(tmp_path):
    data = b"\x80\x04K\x01."  # a pickle
    shard = write(tmp_path, good(), bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    (tmp_path / shard.file).write_bytes(data)
    with pytest.raises(DamagedError, match="is not a safetensors file"):
        read_shard(tmp_path, shard, layout(), layout().rows)


def test_numbers_whose_sum_overflows_are_finite():
    large = torch.full((2, 2), 1e308, dtype=torch.float64)
    check_numbers({"keys": large}, "here")
    with pytest.raises(BankError, match="here: keys of row 1 hold NaN"):
        check_numbers({"keys": torch.tensor([[0.0], [torch.nan]])}, "here")


def test_small_shards_cover_a_bank(monkeypatch):
    monkeypatch.setattr(shards, "SHARD_ROWS", 4)
    bank = MemoryBank(10, 3)
    bank.append(torch.randn(10, 3))
    bank.remove(torch.tensor([1, 9]))
    wanted = Layout.of(
        Arguments(value_width=None, dtype="float32", **{**ARGUMENTS, "num_rows": 10})
    )
    ids = [take_rows(bank, wanted, number)["ids"].tolist() for number in range(wanted.num_shards)]
    assert ids == [[0, 2, 3], [4, 5, 6, 7], [8]]
