"""The log: records whole or not at all, and nothing read whose checksum is wrong."""

import errno
import json
import os
import struct
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemem import MemoryBank
from sparsemem.bank import journal
from sparsemem.bank.errors import BankError, DamagedError
from sparsemem.bank.journal import HEADER_BYTES, Kind, Log, LogReader, encode_record

BANK = "0123456789abcdef0123456789abcdef"


def arrays(number):
    return {"ids": torch.tensor([number, number + 7]), "tags": torch.tensor([1, number])}


def write_log(path, count=3):
    """A log of `count` operations and where each record ends."""
    log = Log.create(path, BANK, 5, sync=False)
    ends = [log.size]
    for number in range(count):
        log.append(Kind.PUT, arrays(number))
        ends.append(log.size)
    log.close()
    return ends


def read(path):
    reader = LogReader(path)
    return list(reader), reader


def test_records_come_back_in_order_with_their_arrays(tmp_path):
    ends = write_log(tmp_path / "log")
    records, reader = read(tmp_path / "log")
    assert [(r.kind, r.sequence) for r in records] == [
        (Kind.START, 5),
        (Kind.PUT, 6),
        (Kind.PUT, 7),
        (Kind.PUT, 8),
    ]
    assert [r.offset for r in records] == [0, *ends[:-1]]
    assert bytes(records[0].arrays["bank"].tolist()).hex() == BANK
    for number, record in enumerate(records[1:]):
        assert record.arrays.keys() == arrays(number).keys()
        for name, array in arrays(number).items():
            assert torch.equal(record.arrays[name], array)
    assert (reader.end, reader.torn, reader.sequence) == (ends[-1], 0, 9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rows_of_any_dtype_come_back_bit_for_bit(tmp_path, dtype):
    rows = torch.randn(4, 3).to(dtype)
    log = Log.create(tmp_path / "log", BANK, 0, sync=False)
    log.append(Kind.NEW, {"keys": rows.mT.contiguous().mT, "frozen": torch.tensor([True, False])})
    log.close()
    (_, record), _ = read(tmp_path / "log")
    assert record.arrays["keys"].dtype == dtype
    assert torch.equal(record.arrays["keys"], rows)
    assert record.arrays["frozen"].tolist() == [True, False]


def test_a_record_has_the_bytes_that_the_format_says(tmp_path):
    data = encode_record(Kind.DROP, 258, {"ids": torch.tensor([3, 1])})
    magic, kind, sequence, length, crc = struct.unpack("<4sB3xQQI", data[:28])
    assert (magic, kind, sequence, length) == (b"SMBL", 2, 258, len(data) - 32)
    assert crc == zlib.crc32(data[32:])
    assert data[28:32] == struct.pack("<I", zlib.crc32(data[:28]))
    (size,) = struct.unpack("<Q", data[32:40])
    header = json.loads(data[40 : 40 + size])
    assert header == {"ids": {"dtype": "I64", "shape": [2], "data_offsets": [0, 16]}}
    assert struct.unpack("<2q", data[40 + size :]) == (3, 1)


def test_a_log_cut_off_at_any_byte_gives_the_records_before(tmp_path):
    ends = write_log(tmp_path / "log")
    data = (tmp_path / "log").read_bytes()
    for length in range(len(data) + 1):
        (tmp_path / "cut").write_bytes(data[:length])
        records, reader = read(tmp_path / "cut")
        whole = [end for end in [0, *ends] if end <= length]
        assert len(records) == len(whole) - 1
        assert (reader.end, reader.torn) == (whole[-1], length - whole[-1])


@pytest.mark.parametrize("zeros", [1, 31, 32, 33, 5000])
def test_zeros_to_the_end_are_a_torn_tail(tmp_path, zeros):
    ends = write_log(tmp_path / "log")
    with open(tmp_path / "log", "ab") as file:
        file.write(bytes(zeros))
    records, reader = read(tmp_path / "log")
    assert (len(records), reader.end, reader.torn) == (4, ends[-1], zeros)


def test_zeros_with_something_behind_them_are_damage(tmp_path):
    ends = write_log(tmp_path / "log")
    with open(tmp_path / "log", "ab") as file:
        file.write(bytes(5000) + b"x")
    with pytest.raises(DamagedError, match=f"record at byte {ends[-1]}: its header does not match"):
        read(tmp_path / "log")


def test_any_flipped_bit_is_refused_with_the_name_of_its_record(tmp_path):
    ends = write_log(tmp_path / "log", count=2)
    data = (tmp_path / "log").read_bytes()
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        (tmp_path / "bad").write_bytes(changed)
        offset = max(end for end in [0, *ends] if end <= place)
        with pytest.raises(DamagedError, match=f"bad is damaged: the record at byte {offset}:"):
            read(tmp_path / "bad")


@settings(max_examples=40)
@given(st.data())
def test_a_bit_flipped_in_a_torn_tail_changes_nothing_or_is_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("log") / "log"
    ends = write_log(path)
    whole = path.read_bytes()
    length = data.draw(st.integers(ends[2] + 1, ends[3] - 1))
    changed = bytearray(whole[:length])
    changed[data.draw(st.integers(ends[2], length - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(changed)
    try:
        records, reader = read(path)
    except DamagedError as error:
        assert f"record at byte {ends[2]}" in str(error)  # noqa: PT017 (either is right)
    else:
        assert (len(records), reader.end, reader.torn) == (3, ends[2], length - ends[2])


def test_a_record_out_of_order_or_of_an_unknown_kind_is_refused(tmp_path, plain_errors):
    write_log(tmp_path / "log")
    data = (tmp_path / "log").read_bytes()
    for kind, number, message in (
        (Kind.PUT, 8, "it has number 8, expected 9"),
        (Kind.PUT, 10, "it has number 10, expected 9"),
        (Kind.START, 9, "it is of kind 0, which does not belong there"),
        (77, 9, "it is of kind 77"),
    ):
        (tmp_path / "bad").write_bytes(data + encode_record(kind, number, arrays(0)))
        with pytest.raises(DamagedError, match=message):
            read(tmp_path / "bad")
    (tmp_path / "bad").write_bytes(encode_record(Kind.PUT, 0, arrays(0)))
    with pytest.raises(DamagedError, match="record at byte 0: it is of kind 1"):
        read(tmp_path / "bad")


def test_a_record_that_is_no_safetensors_file_is_refused(tmp_path):
    payload = b"cos\nsystem\n(S'true'\ntR."  # a pickle
    head = struct.pack("<4sB3xQQI", b"SMBL", 0, 0, len(payload), zlib.crc32(payload))
    (tmp_path / "log").write_bytes(head + struct.pack("<I", zlib.crc32(head)) + payload)
    with pytest.raises(DamagedError, match="at byte 0: its contents are not in the safetensors"):
        read(tmp_path / "log")


def test_a_missing_log_is_named(tmp_path):
    with pytest.raises(DamagedError, match=r"cannot read .*/log-7: No such file"):
        read(tmp_path / "log-7")


def half_a_write(error):
    """An os.write that takes ten bytes of a record, then raises."""
    real, calls = os.write, []

    def write(file, data):
        calls.append(len(data))
        if len(calls) > 1:
            raise error
        return real(file, bytes(data)[:10])

    return write


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), BankError, "No space left on device"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
)
def test_a_write_that_fails_halfway_is_taken_back(tmp_path, monkeypatch, error, raised, message):
    log = Log.create(tmp_path / "log", BANK, 0, sync=False)
    log.append(Kind.PUT, arrays(1))
    size = log.size
    with monkeypatch.context() as patch:
        patch.setattr(journal.os, "write", half_a_write(error))
        with pytest.raises(raised, match=message):
            log.append(Kind.PUT, arrays(2))
    assert (tmp_path / "log").stat().st_size == log.size == size
    log.append(Kind.PUT, arrays(3))
    log.close()
    records, reader = read(tmp_path / "log")
    assert [r.arrays["ids"][0].item() for r in records[1:]] == [1, 3]
    assert reader.torn == 0


def test_a_write_that_could_not_be_taken_back_is_taken_back_before_the_next(tmp_path, monkeypatch):
    log = Log.create(tmp_path / "log", BANK, 0, sync=False)
    size = log.size

    def no_truncate(file, length):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(journal.os, "write", half_a_write(OSError(errno.ENOSPC, "full")))
        patch.setattr(journal.os, "ftruncate", no_truncate)
        with pytest.raises(BankError, match="full"):
            log.append(Kind.PUT, arrays(1))
        assert (tmp_path / "log").stat().st_size == size + 10
        with pytest.raises(BankError, match="Input/output error"):
            log.append(Kind.PUT, arrays(1))
    assert (tmp_path / "log").stat().st_size == size + 10
    log.append(Kind.PUT, arrays(2))
    log.close()
    records, reader = read(tmp_path / "log")
    assert [r.arrays["ids"][0].item() for r in records[1:]] == [2]
    assert reader.torn == 0


@pytest.mark.parametrize("sync", [False, True])
def test_an_interrupt_behind_a_whole_record_takes_it_back(tmp_path, monkeypatch, sync):
    log = Log.create(tmp_path / "log", BANK, 0, sync=sync)

    def no_truncate(file, length):
        raise OSError(errno.EIO, "Input/output error")

    def interrupt(file, data):
        real(file, data)
        raise KeyboardInterrupt

    real = journal._write_whole
    for fails in (False, True):  # whether the record cannot be taken back at once
        with monkeypatch.context() as patch:
            patch.setattr(journal, "_write_whole", interrupt)
            if fails:
                patch.setattr(journal.os, "ftruncate", no_truncate)
            with pytest.raises(KeyboardInterrupt):
                log.append(Kind.PUT, arrays(1))
    log.append(Kind.PUT, arrays(2))
    log.close()
    records, reader = read(tmp_path / "log")
    assert [r.arrays["ids"][0].item() for r in records[1:]] == [2]
    assert (reader.sequence, reader.torn) == (2, 0)


def test_an_interrupt_before_a_record_counts_takes_it_back(tmp_path, monkeypatch):
    log = Log.create(tmp_path / "log", BANK, 0, sync=False)

    class Interrupted(Log):
        def __setattr__(self, name, value):
            if name in ("size", "_end"):  # behind the record, before it counts
                raise KeyboardInterrupt
            super().__setattr__(name, value)

    log.__class__ = Interrupted
    with pytest.raises(KeyboardInterrupt):
        log.append(Kind.PUT, arrays(1))
    log.__class__ = Log
    log.append(Kind.PUT, arrays(2))
    log.close()
    records, _ = read(tmp_path / "log")
    assert [r.arrays["ids"][0].item() for r in records[1:]] == [2]


def test_a_write_in_several_parts_is_one_record(tmp_path, monkeypatch):
    real = os.write
    log = Log.create(tmp_path / "log", BANK, 0, sync=False)
    monkeypatch.setattr(journal.os, "write", lambda file, data: real(file, bytes(data)[:100]))
    log.append(Kind.PUT, arrays(1))
    log.close()
    assert len(read(tmp_path / "log")[0]) == 2


@pytest.mark.parametrize(("sync", "waits"), [(False, 0), (True, 3)])
def test_sync_waits_for_the_disk_at_each_record(tmp_path, monkeypatch, sync, waits):
    log = Log.create(tmp_path / "log", BANK, 0, sync=sync)
    calls = []
    monkeypatch.setattr(journal.os, "fsync", calls.append)
    for number in range(3):
        log.append(Kind.PUT, arrays(number))
    assert len(calls) == waits
    log.close()


def test_going_on_cuts_off_what_is_torn(tmp_path):
    ends = write_log(tmp_path / "log")
    os.truncate(tmp_path / "log", ends[3] - 1)
    log = Log(tmp_path / "log", ends[2], 8, sync=False)
    log.append(Kind.DROP, {"ids": torch.tensor([4])})
    log.close()
    records, reader = read(tmp_path / "log")
    assert [r.kind for r in records] == [Kind.START, Kind.PUT, Kind.PUT, Kind.DROP]
    assert reader.torn == 0


def test_a_log_that_cannot_be_begun_leaves_nothing(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(journal.os, "write", half_a_write(OSError(errno.ENOSPC, "full")))
        with pytest.raises(BankError, match="full"):
            Log.create(tmp_path / "log", BANK, 0, sync=False)
    assert list(tmp_path.iterdir()) == []


def test_the_header_is_32_bytes():
    assert HEADER_BYTES == 32


def test_one_tensor_for_two_tables_is_recorded(tmp_path):
    rows = torch.randn(3, 4)
    bank = MemoryBank(10, 4, 4, path=tmp_path / "bank")
    bank.append(rows, rows)
    bank.write(torch.arange(2), rows[:2], rows[1:])
    bank.close()
    loaded = MemoryBank.load(tmp_path / "bank")
    assert torch.equal(loaded.keys[:3], rows)
    assert torch.equal(loaded.values[:3], torch.cat([rows[1:], rows[2:]]))
    loaded.close()
