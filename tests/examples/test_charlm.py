"""The character language models: equal arithmetic, learning, and what continual learning leaves."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "charlm"
LINE = "a memory may hold more than it is asked for; "
OTHER = "to be, or not to be: that is the question. "


@pytest.fixture(scope="module")
def example():
    """The folder's modules, imported as the programs import each other."""
    sys.path.insert(0, str(FOLDER))
    try:
        import charlm
        import continual
        import memory_vs_dense

        yield charlm, memory_vs_dense, continual
    finally:
        sys.path.remove(str(FOLDER))
        for name in ("charlm", "memory_vs_dense", "continual"):
            sys.modules.pop(name, None)


@pytest.fixture
def small(example):
    """Sizes that train in a second."""
    return example[0].Size(
        dim=32, blocks=2, heads=2, context=16, hidden=64, num_rows=256, key_width=8,
        value_width=16, top_k=4,
    )  # fmt: skip


@pytest.fixture
def texts(example):
    """Two texts in one alphabet."""
    alphabet = "".join(sorted(set(LINE + OTHER)))
    return [example[0].encode(text * 40, alphabet) for text in (LINE, OTHER)], len(alphabet)


@pytest.mark.parametrize("memory_blocks", [(0,), (0, 1)])
def test_arithmetic_of_both_variants_agrees(example, small, memory_blocks):
    charlm = example[0]
    for size in (charlm.Size(num_rows=2**12, memory_blocks=memory_blocks), small):
        dense, memory = (charlm.multiply_adds(charlm.build(v, 65, size)) for v in charlm.VARIANTS)
        assert dense == pytest.approx(memory, rel=0.02)


def test_arithmetic_by_hand(example, small):
    charlm = example[0]
    assert charlm.multiply_adds(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))) == 3 * 5 + 5 * 2
    attention = charlm.Attention(small)
    assert charlm.multiply_adds(attention) == 32 * 96 + 32 * 32 + 2 * 16 * 32
    layer = charlm.build("memory", 9, small).blocks[1].feed_forward
    query, gates = 32 * 2 * 8, 32 * 16 + 16 * 32 + 16
    head = 2 * 16 * 4 + 4 * 4 + 3 * 12 * 8 + 4 * 16
    assert charlm.multiply_adds(layer) == query + gates + 2 * head


@pytest.mark.parametrize("variant", ["dense", "memory"])
def test_both_variants_learn(example, small, texts, variant):
    (first, _), alphabet = texts
    options = {"steps": 30, "batch_size": 4, "rates": (1e-2, 1e-2), "every": 10}
    model, curve = example[1].train(variant, first, alphabet, small, **options)
    points = curve["points"]
    assert [point["step"] for point in points] == [0, 10, 20, 30]
    assert points[0]["valid"] == pytest.approx(math.log(alphabet), rel=0.1)
    assert points[-1]["valid"] < points[0]["valid"] - 0.5
    assert points[-1]["train"] < points[1]["train"]
    again, _ = example[1].train(variant, first, alphabet, small, **options)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_validation_predicts_each_character_once(example, texts):
    (first, _), _ = texts
    windows = torch.cat(list(first.windows(3, 16)))
    predicted = windows[:, 1:].flatten()
    assert torch.equal(predicted, first.valid[1 : len(predicted) + 1])
    assert len(first.valid) - 1 - len(predicted) < 16


def test_characters_that_are_not_in_the_alphabet_are_left_out(example):
    text = example[0].encode("a-b" * 10, "ab")
    assert torch.cat([text.train, text.valid]).tolist() == [0, 1] * 10


@pytest.mark.parametrize("method", ["selected", "read", "full"])
def test_continual_learning_trains_what_it_says(example, small, texts, method):
    charlm, _, continual = example
    (first, second), alphabet = texts
    model = charlm.build("memory", alphabet, small)
    before = {name: value.clone() for name, value in model.named_parameters()}
    points = continual.learn(
        method, model, first, second, small, steps=4, batch_size=4, rates=(1e-2, 1e-2), top=3,
        every=4,
    )  # fmt: skip
    assert points[-1]["second"] < points[0]["second"]
    changed = {n for n, value in model.named_parameters() if not torch.equal(value, before[n])}
    values = {name for name in before if name.endswith("values")}
    assert (changed == values) == (method != "full")
    assert values <= changed
    (name,) = values
    rows = (model.get_parameter(name) != before[name]).any(1).sum()
    assert (rows <= 4 * 3) == (method == "selected")


def test_commands(example, small, texts, tmp_path, monkeypatch):
    """Both programs from text to picture."""
    charlm, memory_vs_dense, continual = example
    for module in (memory_vs_dense, continual):
        monkeypatch.setattr(module, "Size", lambda: small)
        monkeypatch.setattr(module, "shakespeare", lambda data: LINE * 40)
    monkeypatch.setattr(continual, "wikitext", lambda data: OTHER * 40)
    runner = CliRunner()

    def run(module, *arguments):
        result = runner.invoke(module.app, [*arguments, "--runs", str(tmp_path)])
        assert result.exit_code == 0, result.output
        return result.output

    short = ("--steps", "2", "--batch-size", "2", "--every", "1")
    for variant in charlm.VARIANTS:
        assert "of these, the block that differs" in run(memory_vs_dense, "train", variant, *short)
    run(memory_vs_dense, "draw", "--picture", str(tmp_path / "charlm.png"))
    for method in continual.METHODS:
        run(continual, "learn", method, *short)
    run(continual, "draw", "--picture", str(tmp_path / "continual.png"))
    for name in ("charlm", "continual"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    refused = runner.invoke(memory_vs_dense.app, ["train", "densa"])
    assert refused.exit_code == 2
    assert "did you mean 'dense'?" in refused.output


@pytest.mark.ray
@pytest.mark.timeout(240)
def test_over_shards_it_comes_to_the_same(example, small, tmp_path, monkeypatch):
    program = example[1]
    monkeypatch.setattr(program, "Size", lambda: replace(small, memory_blocks=(0, 1)))
    monkeypatch.setattr(program, "shakespeare", lambda data: (LINE + OTHER) * 20)
    found = []
    for shards in (0, 2):
        runs = tmp_path / str(shards)
        short = ("--steps", "6", "--batch-size", "2", "--every", "3", "--shards", str(shards))
        result = CliRunner().invoke(program.app, ["train", "memory", *short, "--runs", str(runs)])
        assert result.exit_code == 0, result.output
        points = json.loads((runs / "memory.json").read_text())["points"]
        for point in points:
            del point["seconds"]
        assert sorted(path.name for path in runs.iterdir()) == ["memory.json", "memory.safetensors"]
        found.append((points, load_file(runs / "memory.safetensors")))
    (points, tensors), (sharded_points, sharded_tensors) = found
    assert points == sharded_points
    assert points[-1]["valid"] < points[0]["valid"]
    assert tensors.keys() == sharded_tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, sharded_tensors[name]), name


def test_shards_are_for_the_memory(example, tmp_path):
    given = ["train", "dense", "--shards", "2", "--runs", str(tmp_path)]
    refused = CliRunner().invoke(example[1].app, given)
    assert refused.exit_code == 2
    assert "--shards is 2, expected it with variant" in refused.output


def test_real_texts(example, data_dir):
    raw = example[0].shakespeare(data_dir)
    alphabet = "".join(sorted(set(raw)))
    assert (len(raw), len(alphabet)) == (1_115_394, 65)
    other = example[0].wikitext(data_dir)
    left = len(example[0].encode(other, alphabet).train) / 0.9 / len(other)
    assert 0.9 < left < 1
