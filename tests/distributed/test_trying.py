import pytest

from sparsemem.distributed.cluster import Wanted
from sparsemem.distributed.trying import tried
from sparsemem.training.config import make_config
from sparsemem.training.errors import ConfigError
from tests.oracles.sharded_runs import BANKS, CONFIG


def changed(**sections):
    return make_config({name: value for name, value in (CONFIG | sections).items() if value})


def test_a_config_is_resolved():
    setup = tried(changed(), Wanted(4, 2))
    assert setup.config.bank.num_rows == 200
    assert setup.config.bank.dtype == "float64"
    assert setup.config.evaluation.level == 4


def test_workers_may_have_gpus_where_the_driver_has_none():
    training = CONFIG["training"] | {"device": "cuda"}
    assert tried(changed(training=training), Wanted(4, 2)).config.training.device == "cuda"
    with pytest.raises(ConfigError, match=r"device is 'cuda:1', expected 'cpu' or 'cuda'"):
        tried(changed(training=training | {"device": "cuda:1"}), Wanted(4, 2))


@pytest.mark.parametrize("index", BANKS)
def test_a_large_bank_is_not_made(index):
    bank = CONFIG["bank"] | BANKS[index] | {"num_rows": 10**12}
    assert tried(changed(bank=bank), Wanted(4, 2)).config.bank.num_rows == 10**12


@pytest.mark.parametrize(
    ("sections", "wanted", "message"),
    [
        ({}, Wanted(0, 1), "--shards is 0, expected at least 1"),
        ({}, Wanted(2, 0), "--workers is 0, expected at least 1"),
        ({}, Wanted(201, 1), "--shards is 201, expected at most bank.num_rows = 200"),
        (
            {},
            Wanted(2, 3),
            "training.batch_size is 8, expected a multiple of the number of workers",
        ),
        (
            {"model": {"name": "lstm", "hidden_size": 4}, "bank": None},
            Wanted(2, 1),
            "--shards is 2, but the config has no section bank",
        ),
        (
            {"bank": CONFIG["bank"] | BANKS["product-key"] | {"num_rows": 10**6 + 1}},
            Wanted(2, 1),
            "bank.num_rows is 1000001, expected a perfect square",
        ),
        (
            {"bank": CONFIG["bank"] | BANKS["product-key"] | {"metric": "cosine"}},
            Wanted(2, 1),
            "bank.metric is 'cosine', expected 'ip' or 'l2'",
        ),
        ({"bank": CONFIG["bank"] | {"metric": "dot"}}, Wanted(2, 1), r"bank\.?:? ?metric is 'dot'"),
        (
            {"model": {"name": "sam", "hidden_size": 4}},
            Wanted(2, 1),
            "model.name is 'sam', whose episodes copy rows",
        ),
        (
            {"bank": CONFIG["bank"] | {"optimizer": {"name": "adan"}}},
            Wanted(2, 1),
            "bank.optimizer.name is 'adan'",
        ),
        ({"model": CONFIG["model"] | {"top_k": 300}}, Wanted(2, 1), "top_k"),
    ],
)
def test_what_cannot_be_trained_over_shards_is_refused(sections, wanted, message, plain_errors):
    with pytest.raises(ConfigError, match=message):
        tried(changed(**sections), wanted)
