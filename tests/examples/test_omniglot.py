"""The Omniglot example: episodes and streams against plain loops, training, the whole program."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "omniglot"
MODULES = ("characters", "recognition", "picture", "omniglot")
DRAWERS = 8


@pytest.fixture(autouse=True)
def _hundred_steps_will_do(example, monkeypatch):
    monkeypatch.setattr(example["recognition"], "WARM_UP", 20)
    monkeypatch.setattr(example["recognition"], "RATE", 3e-3)


@pytest.fixture(scope="module")
def example():
    """The folder's modules by name, imported as the programs import each other."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield {name: __import__(name) for name in MODULES}
    finally:
        sys.path.remove(str(FOLDER))
        for name in MODULES:
            sys.modules.pop(name, None)


def drawings(classes, seed):
    """Bytes [classes, DRAWERS, 28, 28]: a few random strokes a class, and a little noise."""
    generator = torch.Generator().manual_seed(seed)
    strokes = (torch.rand(classes, 1, 7, 7, generator=generator) > 0.7).float()
    noise = torch.rand(classes, DRAWERS, 7, 7, generator=generator)
    coarse = 255 * (0.8 * strokes + 0.2 * noise)
    return coarse.repeat_interleave(4, 2).repeat_interleave(4, 3).byte()


def clouds(classes=12, noise=1.0, width=6):
    """Embeddings [classes, DRAWERS, width] around a centre for each class."""
    return F.normalize(torch.randn(classes, 1, width), dim=2) + noise * torch.randn(
        classes, DRAWERS, width
    ) / math.sqrt(width)


def nearest(query, rows):
    """The label of the (vector, label) that is nearest by cosine."""
    cosines = [F.cosine_similarity(query, row, dim=0).item() for row, _ in rows]
    return rows[int(np.argmax(cosines))][1]


@pytest.mark.parametrize("shot", [1, 3])
def test_an_episode_equals_plain_loops(example, shot):
    recognition, way = example["recognition"], 7
    embedded = clouds(noise=0.8)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        got = recognition.episode(embedded, way, shot, generator)
        generator.manual_seed(seed)
        classes = torch.randperm(len(embedded), generator=generator)[:way].tolist()
        order = torch.rand(way, DRAWERS, generator=generator).argsort(1).tolist()
        rows = []
        for number in range(shot):
            before = list(rows)
            for label, kind in enumerate(classes):
                unit = F.normalize(embedded[kind, order[label][number]], dim=0)
                where = [i for i, (_, known) in enumerate(before) if known == label]
                if before and nearest(unit, before) == label:
                    best = max(where, key=lambda i: float(F.normalize(before[i][0], dim=0) @ unit))
                    rows[best] = (rows[best][0] + unit, label)
                else:
                    rows.append((unit, label))
        asked = [
            (embedded[kind, drawer], label)
            for label, kind in enumerate(classes)
            for drawer in order[label][shot : shot + recognition.QUERIES]
        ]
        right = [nearest(query, rows) == label for query, label in asked]
        assert got == pytest.approx(np.mean(right))


def test_few_shot_is_the_mean_of_its_episodes(example):
    recognition, embedded = example["recognition"], clouds()
    found = recognition.few_shot(embedded, 5, 1, episodes=20, seed=3)
    generator = torch.Generator().manual_seed(3)
    scores = [100 * recognition.episode(embedded, 5, 1, generator) for _ in range(20)]
    assert found["accuracy"] == pytest.approx(np.mean(scores))
    assert found["interval"] == pytest.approx(1.96 * np.std(scores, ddof=1) / math.sqrt(20))
    assert 25 < found["accuracy"] < 95  # neither chance nor certain


def test_a_stream_equals_plain_loops(example):
    recognition, embedded = example["recognition"], clouds(noise=0.8)
    seen = recognition.stream(embedded, seed=5)
    order = torch.randperm(12 * DRAWERS, generator=torch.Generator().manual_seed(5)).tolist()
    rows, sights = [], dict.fromkeys(range(12), 0)
    for number, image in enumerate(order):
        label, drawer = divmod(image, DRAWERS)
        sights[label] += 1
        unit = F.normalize(embedded[label, drawer], dim=0)
        cosines = [float(F.normalize(row, dim=0) @ unit) for row, _ in rows]
        best = int(np.argmax(cosines)) if rows else None
        assert seen.labels[number] == label
        assert seen.sight[number] == sights[label]
        assert seen.predicted[number] == (rows[best][1] if rows else -1)
        assert seen.scores[number].item() == pytest.approx(
            max(cosines, default=-math.inf), abs=1e-5
        )
        if rows and rows[best][1] == label:
            rows[best] = (rows[best][0] + unit, label)
        else:
            rows.append((unit, label))
        assert seen.rows[number] == len(rows)


def test_a_stream_of_distinct_classes_is_named_from_the_second_sight_on(example):
    recognition = example["recognition"]
    embedded = torch.eye(6).unsqueeze(1).expand(6, DRAWERS, 6)
    seen = recognition.stream(embedded, seed=0)
    assert recognition.by_sight(recognition.correct(seen), seen) == [0] + [100] * (DRAWERS - 1)
    assert recognition.by_sight(recognition.correct(seen, 0.5), seen) == [100] * DRAWERS
    assert seen.rows[-1] == 6


def test_the_best_threshold_is_the_best_of_all(example):
    recognition = example["recognition"]
    for noise in (0.3, 1.0):
        seen = recognition.stream(clouds(noise=noise), seed=1)

        def balanced(threshold, seen=seen):
            right, first = recognition.correct(seen, threshold), seen.sight == 1
            return (right[first].float().mean() + right[~first].float().mean()).item()

        best = max(balanced(threshold) for threshold in seen.scores.tolist())
        assert balanced(recognition.best_threshold(seen)) == pytest.approx(best)


def test_quarter_turns_are_other_classes(example):
    images = drawings(3, 0)
    turned = example["characters"].turned(images)
    assert torch.equal(turned[:3], images)
    for label in range(3):
        assert torch.equal(turned[3 + label], torch.rot90(images[label], 1, (-2, -1)))
        assert torch.equal(turned[9 + label], torch.rot90(images[label], 3, (-2, -1)))


def test_distortions(example, monkeypatch):
    characters = example["characters"]
    image = torch.zeros(1, 1, 28, 28)
    image[0, 0, 9, 20] = 1

    def distorted(**deviations):
        for name in ("ROTATION", "SCALE", "SHEAR", "SHIFT"):
            monkeypatch.setattr(characters, name, deviations.get(name, 0))
        return characters.distort(image, torch.Generator().manual_seed(2))

    draws = torch.randn(1, 6, generator=torch.Generator().manual_seed(2))[0].tolist()
    torch.testing.assert_close(distorted(), image, atol=1e-4, rtol=0)
    turned = distorted(ROTATION=math.pi / 2 / draws[0])
    torch.testing.assert_close(turned, image.rot90(1, (-2, -1)), atol=1e-3, rtol=0)
    image = torch.zeros(1, 1, 28, 28)
    image[..., 20] = 1  # a line, which what happens down the image leaves alone
    # The grid says where a pixel comes from, in half widths: the ink moves the other way.
    moved = distorted(SHIFT=2 / 14 / draws[4])
    assert int(moved[0, 0].sum(0).argmax()) == 18
    grown = distorted(SCALE=math.log(0.5) / draws[2])
    assert int(grown[0, 0].sum(0).argmax()) in (26, 27)  # twice as far from the middle
    sheared = distorted(SHEAR=1 / draws[1])[0, 0]
    assert int(sheared[13].argmax()) - int(sheared[7].argmax()) == -6


def test_training_learns_to_recognise_new_characters(example):
    recognition = example["recognition"]

    def learn(steps):
        torch.manual_seed(0)
        encoder = recognition.Encoder((4, 8, 8), 8)
        curve = recognition.train(encoder, drawings(20, 1), steps=steps, batch_size=32, seed=0)
        embedded = recognition.embed(encoder, drawings(20, 2))
        return encoder, curve, recognition.few_shot(embedded, 20, 1, episodes=20, seed=0)

    encoder, _, before = learn(10)
    _, curve, after = learn(100)
    assert after["accuracy"] > before["accuracy"] + 5
    assert curve[-1]["step"] == 100
    assert curve[-1]["accuracy"] > 0.15  # of 80 classes
    again = learn(10)[0].state_dict()
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, again[name]), name


def test_embedding_is_that_of_single_images(example):
    recognition, images = example["recognition"], drawings(3, 0)
    encoder = recognition.Encoder((4, 4, 4), 5)
    embedded = recognition.embed(encoder, images)
    single = encoder(images[2, 3].view(1, 1, 28, 28).float() / 255)[0]
    torch.testing.assert_close(embedded[2, 3], single)


@pytest.fixture
def small_program(example, monkeypatch):
    """The program on a few drawings, with a small encoder."""
    recognition, characters, omniglot = (
        example[n] for n in ("recognition", "characters", "omniglot")
    )
    parts = [characters.Characters(drawings(8, seed), ["x"] * 8) for seed in range(3)]
    monkeypatch.setattr(omniglot, "load", lambda data: characters.Parts(*parts))
    monkeypatch.setattr(omniglot, "Encoder", lambda: recognition.Encoder((4, 8, 8), 8))
    monkeypatch.setattr(omniglot, "EPISODES", {2: 2, 8: 6})
    monkeypatch.setattr(omniglot, "SHOTS", (1, 3))
    return omniglot


def invoke(module, *arguments):
    app = module.typer.Typer()
    app.command()(module.main)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_whole_program(small_program, tmp_path, data_file):
    common = ("--data", data_file, "--picture", tmp_path / "picture.png", "--batch-size", 16)
    result = invoke(small_program, *common, "--run", tmp_path / "run", "--steps", 60)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    first = json.loads((tmp_path / "run" / "results.json").read_text())
    one, three = (first["evaluation"][f"8-way {shot}-shot"]["accuracy"] for shot in (1, 3))
    assert 25 < one < three
    assert len(first["stream"]["named"]) == DRAWERS
    assert json.loads((tmp_path / "run" / "training.json").read_text())["curve"][-1]["step"] == 60
    weights = tmp_path / "run" / "encoder.safetensors"
    again = invoke(small_program, *common, "--run", tmp_path / "again", "--encoder", weights)
    assert again.exit_code == 0, again.output
    assert json.loads((tmp_path / "again" / "results.json").read_text()) == first


@pytest.mark.ray
@pytest.mark.timeout(240)
def test_over_shards_it_comes_to_the_same(small_program, tmp_path, data_file):
    found = []
    for shards in (0, 2):
        run = tmp_path / str(shards)
        options = ("--data", data_file, "--picture", tmp_path / "picture.png", "--batch-size", 16)
        result = invoke(small_program, *options, "--run", run, "--steps", 20, "--shards", shards)
        assert result.exit_code == 0, result.output
        curve = json.loads((run / "training.json").read_text())["curve"]
        found.append((curve, json.loads((run / "results.json").read_text())))
    assert found[0] == found[1]


@pytest.fixture
def data_file(tmp_path):
    """A folder in which the data seem to be."""
    (tmp_path / "data" / "omniglot").mkdir(parents=True)
    (tmp_path / "data" / "omniglot" / "omniglot-28.npz").touch()
    return tmp_path / "data"


def test_without_the_data_it_says_what_is_missing(small_program, tmp_path):
    result = invoke(small_program, "--data", tmp_path)
    assert result.exit_code == 2
    assert "does not exist" in result.output


def test_the_real_characters(example, data_dir):
    training, validation, evaluation = example["characters"].load(data_dir)
    assert [len(part.images) for part in (training, validation, evaluation)] == [813, 151, 659]
    names = [set(part.alphabets) for part in (training, validation, evaluation)]
    assert [len(alphabets) for alphabets in names] == [25, 5, 20]
    assert not names[0] & names[1] | names[0] & names[2] | names[1] & names[2]
    assert evaluation.images.shape == (659, 20, 28, 28)


def test_a_little_training_on_the_real_characters(example, data_dir):
    recognition, parts = example["recognition"], example["characters"].load(data_dir)
    torch.manual_seed(0)
    encoder = recognition.Encoder((8, 16, 32), 32)

    def accuracies(*shots):
        embedded = recognition.embed(encoder, parts.evaluation.images[:60])
        found = [recognition.few_shot(embedded, 20, s, episodes=30, seed=0) for s in shots]
        return [result["accuracy"] for result in found]

    (before,) = accuracies(1)
    recognition.train(encoder, parts.training.images[:100], steps=100, batch_size=64, seed=0)
    one, five = accuracies(1, 5)
    assert before + 7 < one < five
