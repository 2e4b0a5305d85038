from pathlib import Path

import pytest
import torch

from sparsemem.training.config import dump_config, make_config, override, parse_yaml
from sparsemem.training.errors import ConfigError
from sparsemem.training.launch import start
from sparsemem.training.setup import (
    build_task,
    check_split,
    describe,
    differing_keys,
    prepare,
    resolve,
)

pytestmark = pytest.mark.usefixtures("plain_errors")


def test_defaults_are_written_out(tree):
    del tree["model"]["num_slots"]
    config = prepare(make_config(tree)).config
    assert config.model.options["num_slots"] == 1_048_576
    assert config.model.options["strength_bias"] == 8.0
    assert (config.curriculum.minimum, config.curriculum.maximum) == (1, 4)
    assert config.evaluation.level == 4
    assert prepare(config).config == config, "resolving again changes nothing"


def test_defaults_of_the_task_are_written_out_and_paths_are_absolute(babi_tree, monkeypatch):
    folder = Path(babi_tree["task"]["path"])
    monkeypatch.chdir(folder.parent)
    babi_tree["task"]["path"] = folder.name
    config = prepare(make_config(babi_tree)).config
    assert config.task.model_dump() == {
        "name": "babi",
        "path": str(folder),
        "tasks": [1, 2],
        "variant": "en",
        "qa3_path": None,
        "validation_fraction": 0.25,
        "max_sentences": None,
        "max_words": None,
    }
    monkeypatch.chdir("/")
    assert prepare(config).config == config
    assert load_dumped(config) == config


def test_tuples_among_the_task_s_defaults_become_lists(babi_tree, monkeypatch):
    del babi_tree["task"]["tasks"]
    task = build_task(make_config(override(babi_tree, ["task.tasks=[1]"])), 1)
    config = resolve(make_config(babi_tree), task)
    assert config.task.options["tasks"] == list(range(1, 21))
    assert load_dumped(config) == config


def load_dumped(config):
    return make_config(parse_yaml(dump_config(config), "dumped"))


@pytest.mark.parametrize(
    ("curriculum", "minimum", "maximum"),
    [
        ({"name": "exponential", "initial": 1}, 1, 2),
        ({"name": "exponential", "initial": 1, "maximum": 2}, 1, 2),
        ({"name": "exponential", "maximum": 1}, 1, 1),
        ({"maximum": 1}, 1, 1),
        ({}, 2, 2),
    ],
)
def test_the_minimum_is_not_above_the_levels_given(babi_tree, curriculum, minimum, maximum):
    babi_tree["curriculum"] = curriculum  # the bAbI stories have two questions, shown whole
    config = prepare(make_config(babi_tree)).config
    assert (config.curriculum.minimum, config.curriculum.maximum) == (minimum, maximum)


def test_the_seed_decides_the_parameters(tree):
    one, other = prepare(make_config(tree)).model, prepare(make_config(tree)).model
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    third = prepare(make_config(override(tree, ["training.seed=1"]))).model
    assert not torch.equal(one.output.weight, third.output.weight)


def test_dtype_reaches_model_and_data(tree):
    setup = prepare(make_config(override(tree, ["training.dtype=float64"])))
    assert setup.model.output.weight.dtype == torch.float64
    assert setup.task.batch(0, 1).input.dtype == torch.float64


def test_batch_sizes(tree):
    setup = prepare(make_config(tree))
    assert setup.task.batch(0, 1).input.shape[0] == 3
    assert next(setup.evaluation_task.evaluation_batches("test", 1, 2)).input.shape[0] == 4


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.name=samm", r"^model: unknown model 'samm': did you mean 'sam'\? known: dnc, lst"),
        ("model.num_slot=3", r"^model: unknown option 'num_slot' .* did you mean 'num_slots'\?"),
        ("model.num_slots=many", r"^model.num_slots is 'many', expected a valid integer$"),
        ("model.top_k=2000000", r"^model.top_k is 2000000, expected at most num_slots = 1048576$"),
        ("model.input_size=3", r"^model.input_size is given by the task \(4\): leave it out$"),
        ("model={name: sam}", r"^model: model 'sam' needs the option 'hidden_size'$"),
        ("task.name=coppy", r"^task: unknown task 'coppy': did you mean 'copy'\?"),
        ("task.bit=3", r"^task: unknown option 'bit' of task 'copy': did you mean 'bits'\?"),
        ("task.bits=0", r"^task.bits is 0, expected at least 1$"),
        ("task.seed=3", r"^task.seed is not an option here: say training.seed$"),
        ("task={name: babi, path: /no/babi}", r"^task.path is '/no/babi', which does not exist"),
        ("training.device=cuda:99", r"^training.device is 'cuda:99', not usable here: "),
        ("training.device=meta", r"^training.device is 'meta', which holds no values"),
        ("training.device=gpu", r"^training.device is 'gpu', not usable here: "),
        ("curriculum.minimum=9", r"^curriculum: minimum is 9, expected at most maximum = 4$"),
    ],
)
def test_what_is_refused_names_its_place(tree, setting, message):
    with pytest.raises(ConfigError, match=message):
        prepare(make_config(override(tree, [setting])))


def test_a_level_that_the_task_lacks(tree):
    tree["task"] = {"name": "associative-recall"}
    tree["curriculum"] = {"minimum": 1}
    with pytest.raises(ConfigError, match=r"^curriculum.minimum is 1, expected at least 2$"):
        prepare(make_config(tree))


def test_an_empty_split_is_refused_before_training(tree, tmp_path):
    folder = tmp_path / "en-10k"
    folder.mkdir()
    story = "1 Mary went to the hall.\n2 Where is Mary?\thall\t1\n"
    for part in ("train", "test"):
        (folder / f"qa1_single-supporting-fact_{part}.txt").write_text(story)
    options = {"path": str(tmp_path), "tasks": [1], "validation_fraction": 0.0}
    tree["task"] = {"name": "babi", **options}
    setup = prepare(make_config(tree))
    check_split(setup, "test")
    with pytest.raises(ConfigError, match=r"^split is 'validation', which has no stories"):
        check_split(setup, "validation")
    with pytest.raises(ConfigError, match=r"which has no stories"):
        start(setup.config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_description_says_what_runs(tree):
    setup = prepare(make_config(tree))
    text = describe(setup.config, setup.model)
    count = sum(parameter.numel() for parameter in setup.model.parameters())
    assert f"model SAM, {count:,} parameters, 1,048,576 slots of width 6; task copy" in text
    assert "cpu, 1 thread, float32; sparsemem" in text
    assert f"torch {torch.__version__}" in text


def test_differing_keys():
    old = {"a": {"b": 1, "c": 2}, "d": 3}
    assert differing_keys(old, old) == []
    assert differing_keys(old, {"a": {"b": 1, "c": 5}, "e": 1}) == ["a.c", "d", "e"]
