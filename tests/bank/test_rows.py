import subprocess
import sys

import pytest
import torch

from sparsemem import MemoryBank
from sparsemem.bank.errors import BankError
from sparsemem.bank.rows import bank_of, gather_pairs, mapped_zeros, zeros
from tests.oracles.bank_state import fill, new_bank, rows_of

MEGABYTE = 2**20


def test_zeros():
    tensor = zeros(3, 2, dtype=torch.bfloat16)
    assert tensor.dtype == torch.bfloat16
    assert tensor.tolist() == [[0.0, 0.0]] * 3
    assert zeros(0, 2, dtype=torch.float32).shape == (0, 2)


LAZY = """
import sys, time
import torch
from sparsemem import MemoryBank

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

MemoryBank(10, 64).append(torch.ones(1, 64))  # what is loaded at first use
for storage in sys.argv[1:]:
    before, start = resident(), time.perf_counter()
    bank = MemoryBank(10**8, 64, 32, dtype=torch.bfloat16, storage=storage)
    seconds = time.perf_counter() - start
    bank.append(torch.ones(10, 64))
    bank.write(torch.tensor([10**8 - 1]), torch.ones(1, 64))
    bank.remove(torch.tensor([3]))
    print(seconds, resident() - before)
    del bank
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_hundred_million_rows_cost_what_is_touched(tmp_path, repository):
    run = subprocess.run(
        [sys.executable, "-c", LAZY, "ram", str(tmp_path / "rows")],
        capture_output=True,
        text=True,
        cwd=repository,
        check=True,
    )
    lines = run.stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        seconds, size = map(float, line.split())
        assert seconds < 1
        assert size < 32 * MEGABYTE  # all of it would be 24 GB


def test_mapped_tables_lie_one_after_another_in_a_new_file(tmp_path):
    path = tmp_path / "rows"
    first, second = mapped_zeros(path, [(3, 2), (3, 1)], torch.float32)
    first[1] = torch.tensor([1.0, 2.0])
    second[2] = 3.0
    stored = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.float32)
    assert stored.tolist() == [0, 0, 1, 2, 0, 0, 0, 0, 3]
    with pytest.raises(FileExistsError):
        mapped_zeros(path, [(3, 2)], torch.float32)
    assert path.stat().st_size == 9 * 4


def test_a_bank_in_a_file_is_as_one_in_memory(tmp_path):
    banks = [MemoryBank(20, 4, 3, storage=where) for where in ("ram", tmp_path / "rows")]
    rows, values, queries = torch.randn(30, 4), torch.randn(30, 3), torch.randn(5, 4)
    hits = []
    for bank in banks:
        bank.append(rows[:20], values[:20])
        bank.append(rows[20:], values[20:])
        hits.append(bank.read(queries, 4))
        hits[-1].values.sum().backward()
    assert torch.equal(hits[0].ids, hits[1].ids)
    assert torch.equal(hits[0].scores, hits[1].scores)
    assert torch.equal(banks[0].values.grad.to_dense(), banks[1].values.grad.to_dense())
    with pytest.raises(FileExistsError):
        MemoryBank(20, 4, storage=tmp_path / "rows")


def test_pairs_are_the_product():
    subkeys = torch.arange(12.0).view(2, 3, 2)
    ids = torch.arange(-1, 9).view(2, 5)
    rows = gather_pairs(subkeys, ids, torch.float32)
    assert rows[0, 0].tolist() == [0, 0, 0, 0]
    for n in range(9):
        expected = torch.cat([subkeys[0, n // 3], subkeys[1, n % 3]])
        assert torch.equal(rows.view(10, 4)[n + 1], expected)


def test_bank_of_a_parameter():
    bank = MemoryBank(4, 2, 2)
    assert bank_of(bank.keys) is bank_of(bank.values) is bank
    assert bank_of(torch.nn.Parameter(torch.ones(4, 2))) is None
    keys = bank.keys
    del bank
    assert bank_of(keys) is None


def test_tables_that_fit_no_memory_are_refused_by_size():
    message = "num_rows is 100000000000000, width is 4, value_width is None: .* 1600000000000000 b"
    with pytest.raises(MemoryError, match=message):
        MemoryBank(10**14, 4)
    with pytest.raises(MemoryError, match="num_rows is 1"):
        MemoryBank(10**30, 4)


def test_a_bank_that_cannot_be_made_leaves_no_tables(tmp_path, plain_errors):
    (tmp_path / "file").touch()
    where = tmp_path / "tables"
    for options, kind, message in (
        ({"seed": -1}, ValueError, "seed is -1"),
        ({"path": tmp_path / "file" / "bank"}, BankError, "cannot write to"),
        ({"nprobe": 3}, ValueError, "unknown option 'nprobe'"),
    ):
        with pytest.raises(kind, match=message):
            new_bank(storage=where, **options)
        assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_load_that_fails_leaves_no_tables(tmp_path):
    fill(new_bank()).save(tmp_path / "bank")
    shard = next((tmp_path / "bank").glob("rows-*"))
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(BankError, match=shard.name):
        MemoryBank.load(tmp_path / "bank", storage=tmp_path / "tables")
    assert not (tmp_path / "tables").exists()
    shard.write_bytes(data)
    bank = MemoryBank.load(tmp_path / "bank", storage=tmp_path / "tables")
    for make in (
        lambda: MemoryBank.load(tmp_path / "bank", storage=tmp_path / "tables"),
        lambda: new_bank(storage=tmp_path / "tables"),
    ):
        with pytest.raises(FileExistsError, match=r"storage is '.*tables', which is there"):
            make()
    assert len(rows_of(bank)) == 7
    assert (tmp_path / "tables").stat().st_size == 12 * (3 + 2) * 4
