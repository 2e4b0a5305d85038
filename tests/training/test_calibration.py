import pytest
import torch

from sparsemem.training import calibration
from sparsemem.training.calibration import Sizes, plan_seconds
from sparsemem.training.config import make_config
from sparsemem.training.plan import Planned, lengths_of, plan_memory
from sparsemem.training.setup import build_task, resolve

# Plain numbers: an int serves as a float.
pytestmark = pytest.mark.usefixtures("plain_errors")


@pytest.fixture
def timed(monkeypatch):
    """Instead of the machine: times in proportion to what a dense memory computes."""
    asked = []

    def fake(config, task, all_sizes):
        asked.extend(all_sizes)
        return {sizes: seconds(sizes) for sizes in all_sizes}

    monkeypatch.setattr(calibration, "_timed", fake)
    monkeypatch.setattr(calibration, "_data_seconds", lambda config, task: 0.0)
    return asked


def seconds(sizes):
    return 1e-6 * sizes.batch * sizes.steps * (1000 + sizes.slots)


def plan_of(tree):
    """Of time alone: there is no plan of memory in it."""
    config = make_config(tree)
    task = build_task(config, config.training.batch_size)
    config = resolve(config, task)
    return plan_seconds(Planned(config, task, lengths_of(config, task), None))


def test_sizes_that_can_be_run_are_run(tree, timed):
    tree["curriculum"] = {"minimum": 4, "maximum": 4}
    found = plan_of(tree)
    assert timed[0] == Sizes(batch=3, steps=9, hidden=12, slots=2**20)
    assert found.step == seconds(timed[0])
    assert found.total == found.step * 20


def test_sizes_that_were_cut_down_are_extrapolated(tree, timed):
    tree["model"] = {"name": "ntm", "hidden_size": 12, "num_slots": 10**6, "slot_dim": 6}
    tree["curriculum"] = {"minimum": 40, "maximum": 40}
    tree["training"]["batch_size"] = 100
    found = plan_of(tree)
    assert max(sizes.slots for sizes in timed) < 10**6
    assert max(sizes.steps for sizes in timed) <= calibration.DENSE_STEPS
    wanted = Sizes(batch=100, steps=81, hidden=12, slots=10**6)
    assert found.step == pytest.approx(seconds(wanted), rel=0.02)


def test_each_chunk_has_its_constant_cost():
    # 5 s and 1 s a step: 40 steps in chunks of 10.
    assert calibration._whole(5 + 10, 5 + 5, 10, 40, 10) == pytest.approx(4 * 5 + 40)
    assert calibration._whole(5 + 10, 5 + 5, 10, 40, None) == pytest.approx(5 + 40)
    assert calibration._whole(15, 10, 10, 10, None) == 15
    # Of several chunks that were run, each has its own.
    assert calibration._whole(4 * 5 + 40, 2 * 5 + 20, 40, 80, 10) == pytest.approx(8 * 5 + 80)
    assert calibration._whole(60, 30, 40, 40, 10) == 60
    # Noise: half as many steps took longer.
    assert calibration._whole(10, 12, 10, 20, None) == pytest.approx(5 + 10)


@pytest.mark.parametrize(("steps", "level"), [(9, 4), (8, 4), (2, 1)])
def test_sequences_are_of_the_level_that_is_as_long(tree, steps, level):
    """What is scored of them decides which chunks have a backward pass: of a copy, the end."""
    config = make_config(tree | {"curriculum": {"minimum": 1, "maximum": 30}})
    task = build_task(config, config.training.batch_size)
    found = calibration._sequences(resolve(config, task), task, Sizes(2, steps, 12, 2**20))
    whole = task.batch(0, level)
    for part, expected in zip(found, whole, strict=True):
        assert torch.equal(part, expected[:2, -steps:])


def test_sequences_that_are_longer_than_any_level_are_repeated(tree):
    config = make_config(tree | {"curriculum": {"minimum": 1, "maximum": 2}})
    task = build_task(config, config.training.batch_size)
    found = calibration._sequences(resolve(config, task), task, Sizes(2, 12, 12, 2**20))
    assert torch.equal(found.input, torch.cat([task.batch(0, 2).input[:2]] * 3, 1)[:, -12:])


def test_chunks_are_timed_as_they_are_trained(tree, monkeypatch):
    tree["training"]["truncate"] = 4
    config = make_config(tree)
    task = build_task(config, config.training.batch_size)
    taken = []
    monkeypatch.setattr(
        calibration, "train_batch", lambda model, task, steps, batch, *rest: taken.append(rest)
    )
    calibration._training_step(resolve(config, task), task, Sizes(2, 9, 12, 64))()
    assert taken == [(4, config.training.gradient_clip)]


def test_a_real_calibration_tells_a_time_and_leaves_things_alone(tree, monkeypatch):
    monkeypatch.setattr(calibration, "SECONDS", 0.0)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    assert 0 < plan_seconds(plan_memory(make_config(tree))).step < 60
    assert torch.equal(torch.rand(3), expected)


def test_making_a_batch_is_timed_at_its_level_where_that_makes_it_no_longer(tree, monkeypatch):
    """Beyond 128 items a line is drawn through two timings, which noise can turn downwards."""
    task = {"name": "facts", "num_facts": 4096, "min_level": 4096, "key_bits": 12}
    config = make_config(tree | {"task": task, "model": {"name": "lstm", "hidden_size": 5}})
    planned, asked = plan_memory(config), []
    make = planned.task.batch
    monkeypatch.setattr(
        planned.task, "batch", lambda i, level: asked.append(level) or make(i, level)
    )
    assert 0 < calibration._data_seconds(planned.config, planned.task) < 1
    assert asked[-1] == 4096
