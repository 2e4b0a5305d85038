import pytest

from sparsemem.training.config import dump_config, load_config, make_config, override, parse_yaml
from sparsemem.training.errors import ConfigError

pytestmark = pytest.mark.usefixtures("plain_errors")


def test_overrides_are_yaml_values_at_dotted_paths(tree):
    settings = [
        "training.steps=7",
        "training.optimizer.learning_rate=1e-3",
        "evaluation.level=null",
    ]
    changed = override(tree, [*settings, "curriculum.maximum=9", "task={name: copy, bits: 2}"])
    config = make_config(changed)
    assert config.training.steps == 7
    assert config.training.optimizer.learning_rate == 0.001
    assert config.evaluation.level is None
    assert config.curriculum.maximum == 9
    assert config.task.options == {"bits": 2}
    assert tree["training"]["steps"] == 20, "the caller's tree is as it was"


@pytest.mark.parametrize("text", ["1e-3", "+1E-3", "1.0e-3", "0.001"])
def test_numbers_as_people_write_them(text):
    assert parse_yaml(text, "here") == 0.001


def test_dump_and_load_give_the_same_config(tree, tmp_path):
    config = make_config(tree)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["trainin.steps=3"],
            r"^unknown key trainin: did you mean 'training'\? known: bank",
        ),
        (["training.stepz=3"], r"^unknown key training.stepz: did you mean 'steps'\? known: batch"),
        (["training.schedule.warmpu=3"], r"^unknown key training.schedule.warmpu: .*'warmup'"),
        (["training.steps=-3"], "^training.steps is -3, expected greater than or equal to 1$"),
        (["training.steps=1.5"], "^training.steps is 1.5, expected a valid integer"),
        (["training.steps=ten"], "^training.steps is 'ten', expected a valid integer"),
        (["training.gradient_clip=true"], "^training.gradient_clip is True, expected a number"),
        (["training.gradient_clip=.nan"], "^training.gradient_clip is nan, expected a finite"),
        (["training.schedule.name=cosin"], "^training.schedule.name is 'cosin', expected 'const"),
        (["training.threads=1025"], "^training.threads is 1025, expected less than or equal to 10"),
        ([f"training.seed={2**63}"], "^training.seed is 9223372036854775808, expected less than"),
        (["training=3"], "^training is 3, expected a section"),
        (
            ["training.stop_below=0.1", "training.evaluate_every=null"],
            "^training: stop_below needs",
        ),
        (
            ["curriculum.minimum=3", "curriculum.maximum=2"],
            "^curriculum: minimum is 3, expected at",
        ),
        (["curriculum.initial=3"], "^curriculum: initial is for the exponential curriculum"),
        (["model={}"], "^model.name is missing$"),
    ],
)
def test_errors_name_path_value_and_expectation(tree, settings, message):
    with pytest.raises(ConfigError, match=message):
        make_config(override(tree, settings))


def test_every_problem_is_a_line(tree):
    with pytest.raises(ConfigError) as error:
        make_config(override(tree, ["training.steps=0", "training.seed=-1"]))
    assert [line.split()[0] for line in str(error.value).splitlines()] == [
        "training.steps",
        "training.seed",
    ]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("foo", r"^--set foo: expected key=value"),
        ("a..b=1", r"^--set a..b=1: expected key=value"),
        ("training.steps.x=1", r"^--set training.steps.x=1: training.steps has no keys"),
        ("model={", r"^--set model, line 1, column 2: not valid YAML"),
    ],
)
def test_bad_settings(tree, setting, message):
    with pytest.raises(ConfigError, match=message):
        override(tree, [setting])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {name: sam\ntask: 3", r"c.yaml, line 2, column 5: not valid YAML"),
        ("when: 2020-13-45", r"c.yaml: not valid YAML: month must be in 1..12$"),
        ("? [a]\n: 1", r"c.yaml: not valid YAML: "),
        ("a: " + "[" * 10**4, r"c.yaml: not valid YAML: nested too deep$"),
        (
            "- 1",
            r"c.yaml: expected sections \(model, task, bank, training, curriculum",
        ),
        ("task: {name: a}\ntask: {name: b}", r"c.yaml, line 2, column 1: .* 'task' is given twice"),
    ],
)
def test_bad_files(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "c.yaml")


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read config .*c.yaml: No such file"):
        load_config(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"cannot read config .*c.yaml: expected text in UTF-8"):
        load_config(tmp_path / "c.yaml")
