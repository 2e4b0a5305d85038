"""A reader of bank folders written from docs/bank-format.md alone: stdlib and NumPy."""

import hashlib
import json
import re
import struct
import zlib

import numpy as np

DTYPES = {
    "F32": "<f4",
    "F64": "<f8",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "BOOL": "?",
    "U8": "u1",
}


def tensors(data):
    """The arrays of a safetensors file."""
    (size,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + size])
    found = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        raw = data[8 + size + start : 8 + size + stop]
        found[name] = np.frombuffer(raw, DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return found


def records(path):
    """Kind, sequence number and arrays of each record of a log without damage."""
    data = path.read_bytes()
    offset = 0
    while offset < len(data):
        magic, kind, sequence, length, crc = struct.unpack_from("<4sB3xQQI", data, offset)
        (own,) = struct.unpack_from("<I", data, offset + 28)
        payload = data[offset + 32 : offset + 32 + length]
        assert magic == b"SMBL"
        assert zlib.crc32(data[offset : offset + 28]) == own
        assert zlib.crc32(payload) == crc
        yield kind, sequence, tensors(payload)
        offset += 32 + length


def read_manifest(folder):
    """The manifest of a folder, its checksum checked."""
    data = (folder / "manifest.json").read_bytes()
    manifest = json.loads(data)
    blank = data.replace(manifest["sha256"].encode(), b"0" * 64, 1)
    assert hashlib.sha256(blank).hexdigest() == manifest["sha256"]
    return manifest


def read_folder(folder):
    """The live rows {id: {field: value}} and the usage {id: {field: value}} of a folder."""
    manifest = read_manifest(folder)
    live, usage = {}, {}
    for table, shards in ((live, manifest["rows"]), (usage, manifest["usage"])):
        for shard in shards:
            data = (folder / shard["file"]).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (
                shard["bytes"],
                shard["sha256"],
            )
            arrays = tensors(data)
            for place, row in enumerate(arrays.pop("ids").tolist()):
                assert row // 65536 == shard["shard"]
                table[row] = {name: array[place].tolist() for name, array in arrays.items()}
    if manifest["durable"]:
        replay(folder, manifest, live, usage)
    return live, usage


def replay(folder, manifest, live, usage):
    """Apply the operations of a folder's logs."""
    numbers = sorted(int(re.sub("log-", "", file.name)) for file in folder.glob("log-*"))
    sequence = manifest["sequence"]
    for log in numbers:
        for kind, number, arrays in records(folder / f"log-{log:08d}"):
            assert number == sequence
            sequence += 1
            if kind == 0:
                assert arrays["bank"].tobytes().hex() == manifest["bank"]
                continue
            clock, ids = int(arrays.pop("clock")), arrays.pop("ids").tolist()
            for place, row in enumerate(ids):
                given = {name: array[place].tolist() for name, array in arrays.items()}
                apply(kind, row, given, clock, manifest["arguments"], live, usage)


def apply(kind, row, given, clock, arguments, live, usage):
    """One operation on one row."""
    if kind in (2, 4):
        live.pop(row, None)
        known = usage.setdefault(row, {"last_access": 0})
        known.update(last_access=max(1, known["last_access"]), accesses=0, background=0)
    if kind == 3:
        live[row].update(given)
    if kind not in (1, 4):
        return
    if row not in live:
        live[row] = {"keys": [0.0] * arguments["width"], "frozen": False}
        if arguments["value_width"] is not None:
            live[row]["values"] = [0.0] * arguments["value_width"]
    live[row].update(given)
    if "keys" in given or "values" in given:
        known = usage.setdefault(row, {"accesses": 0, "background": 0})
        known.update(last_access=clock, accesses=known["accesses"] + 1)
