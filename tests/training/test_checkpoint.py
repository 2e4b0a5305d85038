import errno
import json
import os

import pytest
import torch

from sparsemem import files
from sparsemem.training.checkpoint import (
    MANIFEST,
    TENSORS,
    check_tensors,
    list_checkpoints,
    load_checkpoint,
    optimiser_tensors,
    prune_checkpoints,
    restore_optimiser,
    save_checkpoint,
)
from sparsemem.training.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("plain_errors")
TENSOR = {"model.w": torch.arange(6.0).view(2, 3), "random.cpu": torch.arange(5, dtype=torch.uint8)}


STATE = {
    "model": {"name": "sam"},
    "task": {"name": "copy", "identity": ""},
    "optimizer": {"scalars": {}, "param_groups": []},
    "schedule": {},
    "curriculum": {},
    "sums": {},
    "validation": None,
    "best": None,
    "seconds": 0.0,
}


def save(folder, step=3, **state):
    folder.mkdir(exist_ok=True)
    return save_checkpoint(folder, step, TENSOR, {**STATE, **state})


def test_what_is_saved_is_loaded(tmp_path):
    path = save(tmp_path / "c", numbers=[0.1, 1e-300, 7])
    checkpoint = load_checkpoint(path)
    assert checkpoint.tensors.keys() == TENSOR.keys()
    assert all(torch.equal(checkpoint.tensors[key], TENSOR[key]) for key in TENSOR)
    assert checkpoint.tensors["random.cpu"].dtype == torch.uint8
    assert checkpoint.manifest["step"] == 3
    assert checkpoint.manifest["numbers"] == [0.1, 1e-300, 7]
    assert checkpoint.part("model").keys() == {"w"}
    assert sorted(file.name for file in path.iterdir()) == [MANIFEST, TENSORS]


def test_tensors_that_share_memory_or_are_not_contiguous(tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    path = save_checkpoint(tmp_path, 1, {"a": whole, "b": whole.T, "c": whole[1]}, STATE)
    loaded = load_checkpoint(path).tensors
    assert torch.equal(loaded["b"], whole.T)
    assert torch.equal(loaded["c"], whole[1])


def damage(path, change):
    data = bytearray(path.read_bytes())
    path.write_bytes(change(data))


def flip_last(data):
    data[-1] ^= 1
    return data


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (TENSORS, lambda data: data[:-4], r"tensors.safetensors is torn: \d+ bytes, expected \d+$"),
        (TENSORS, flip_last, r"tensors.safetensors is damaged: its sha256 is \w{12}\.\.\., expec"),
        (MANIFEST, lambda data: data[:40], r"manifest.json is torn: expected a JSON object"),
        (
            MANIFEST,
            lambda data: b"{}",
            r"manifest.json is not a manifest of a sparsemem checkpoint",
        ),
        (MANIFEST, lambda data: b"[1]", r"manifest.json is not a manifest of a sparsemem checkp"),
        (MANIFEST, lambda data: b"\x80\x04", r"manifest.json is torn"),
        (MANIFEST, lambda data: b"[" * 10**5, r"manifest.json is torn"),
        (
            MANIFEST,
            lambda data: data.replace(b'"seconds": 0.0', b'"seconds": NaN'),
            r"manifest.json is torn: expected a JSON object",
        ),
        (
            MANIFEST,
            lambda data: data.replace(b'"seconds": 0.0', b'"seconds": 1e999'),
            r"manifest.json is damaged",
        ),
        (
            MANIFEST,
            lambda data: data.replace(b'"step": 3', b'"step": 4'),
            r"manifest.json is damaged: its contents do not match their sha256",
        ),
        (
            MANIFEST,
            lambda data: data.replace(b'"version": 1', b'"version": 9'),
            r"manifest.json has format version 9, expected 1",
        ),
    ],
)
def test_damage_is_named(tmp_path, file, change, message):
    path = save(tmp_path / "c")
    damage(path / file, change)
    with pytest.raises(CheckpointError, match=message) as error:
        load_checkpoint(path)
    assert str(path / file) in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"files": {}}, rf"files.{TENSORS}: Field required$"),
        ({"files": 3}, r"files: Input should be"),
        ({"model": {}}, r"model.name: Field required$"),
        ({"task": {}}, r"task.identity: Field required$"),
        ({"best": 4}, r"best: Input should be"),
        ({"schedule": None}, r"schedule: Input should be"),
    ],
)
def test_a_manifest_with_other_keys_is_named(tmp_path, change, message):
    path = save(tmp_path / "c", **change)
    start = r"manifest.json is not of this version of sparsemem: "
    with pytest.raises(CheckpointError, match=start + message):
        load_checkpoint(path)


@pytest.mark.parametrize("file", [TENSORS, MANIFEST])
def test_a_missing_file_is_named(tmp_path, file):
    path = save(tmp_path / "c")
    (path / file).unlink()
    with pytest.raises(CheckpointError, match=rf"cannot read .*{file}: No such file"):
        load_checkpoint(path)


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["os.replace", "os.fsync"])
def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch, call):
    good = save(tmp_path / "c")
    monkeypatch.setattr(files.os, call.removeprefix("os."), no_space)
    with pytest.raises(CheckpointError, match=r"cannot write .*step-00000004: No space left"):
        save(tmp_path / "c", step=4)
    monkeypatch.undo()
    assert list_checkpoints(tmp_path / "c") == [(3, good)]
    assert [path.name for path in (tmp_path / "c").iterdir()] == [good.name], "nothing is left over"
    assert load_checkpoint(good).manifest["step"] == 3


class Killed(BaseException):
    """Stands for the process's death: nothing but `finally` could run, and here not even that."""


def test_a_crash_while_saving_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    good = save(tmp_path / "c")

    def die(*args):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", die)
        patch.setattr(files.shutil, "rmtree", lambda *args, **kwargs: None)  # the dead don't tidy
        with pytest.raises(Killed):
            save(tmp_path / "c", step=4)
    assert (tmp_path / "c" / ".step-00000004.part" / TENSORS).exists()
    assert list_checkpoints(tmp_path / "c") == [(3, good)]
    again = save(tmp_path / "c", step=4)
    assert load_checkpoint(again).manifest["step"] == 4
    prune_checkpoints(tmp_path / "c", keep=2, best=None)
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == [good.name, again.name]


def test_no_permission(tmp_path):
    folder = tmp_path / "file"
    folder.write_text("not a folder")
    with pytest.raises(CheckpointError, match=r"cannot write checkpoint .*step-00000003: "):
        save_checkpoint(folder, 3, TENSOR, {})
    assert folder.read_text() == "not a folder"


def test_a_checkpoint_is_never_overwritten(tmp_path):
    path = save(tmp_path / "c")
    before = (path / MANIFEST).read_bytes()
    with pytest.raises(CheckpointError, match="cannot write checkpoint"):
        save(tmp_path / "c", other=1)
    assert (path / MANIFEST).read_bytes() == before


def test_the_last_and_the_best_are_kept(tmp_path):
    for step in (1, 2, 3, 4, 10):
        save(tmp_path / "c", step=step)
    prune_checkpoints(tmp_path / "c", keep=2, best=2)
    assert [step for step, _ in list_checkpoints(tmp_path / "c")] == [2, 4, 10]


def test_other_folders_are_not_checkpoints(tmp_path):
    (tmp_path / "step-x").mkdir()
    (tmp_path / "step-00000001").write_text("a file")
    assert list_checkpoints(tmp_path) == []
    assert list_checkpoints(tmp_path / "missing") == []


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({}, r"c is of another model: it lacks the parameter 'w', which sam as configured has"),
        ({"w": torch.ones(2), "v": torch.ones(2)}, r"it has the parameter 'v', which sam .* lacks"),
        ({"w": torch.ones(3)}, r"parameter 'w' is torch.float32 \[3\], expected torch.float32 \[2"),
        ({"w": torch.ones(2).double()}, r"'w' is torch.float64 \[2\], expected torch.float32 \[2"),
    ],
)
def test_parameters_of_another_model(tmp_path, found, message):
    with pytest.raises(CheckpointError, match=message):
        check_tensors(found, {"w": torch.zeros(2)}, tmp_path / "c", "sam")


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.8, 0.9), amsgrad=True),
        lambda p: torch.optim.AdamW(p, lr=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.5, centered=True),
    ],
)
def test_optimisers_survive_the_round_trip_bit_for_bit(tmp_path, make):
    def step(optimiser, weight, seed):
        generator = torch.Generator().manual_seed(seed)
        weight.grad = torch.randn(weight.shape, generator=generator)
        optimiser.step()

    weight = torch.nn.Parameter(torch.ones(4))
    optimiser = make([weight])
    step(optimiser, weight, 1)
    tensors, values = optimiser_tensors(optimiser)
    path = save_checkpoint(
        tmp_path,
        1,
        {f"optimizer.{k}": v for k, v in tensors.items()},
        {**STATE, "optimizer": values},
    )
    copy = torch.nn.Parameter(weight.detach().clone())
    restored = make([copy])
    checkpoint = load_checkpoint(path)
    restore_optimiser(restored, checkpoint.part("optimizer"), checkpoint.manifest["optimizer"])
    for seed in (2, 3):
        step(optimiser, weight, seed)
        step(restored, copy, seed)
    assert torch.equal(weight, copy)
    assert json.dumps(values["param_groups"])  # nothing in it but JSON values
