import pytest

from sparsemem.distributed.cluster import Wanted
from sparsemem.distributed.needs import groups_of, lines, plan_spread, shard_bytes
from sparsemem.training.errors import ConfigError
from tests.oracles.sharded_runs import CONFIG, config_of


def large(num_rows=10**8, **changes):
    config = config_of()
    return config.model_copy(
        update={"bank": config.bank.model_copy(update={"num_rows": num_rows, **changes})}
    )


def test_shards_share_the_rows():
    one, four = shard_bytes(large(), 1), shard_bytes(large(), 4)
    few = shard_bytes(large(4000), 4)
    assert (one - few) / (four - few) == pytest.approx(4, rel=0.01)


def test_a_shard_takes_rows_state_and_what_is_known_of_them():
    taken = (shard_bytes(large(2 * 10**8), 1) - shard_bytes(large(), 1)) / 10**8
    width, number = CONFIG["bank"]["width"], 8  # float64
    row, moments = width * number, 2 * width * number + number  # Adam's, and its steps
    assert row + moments < taken < row + moments + 100


def test_a_faiss_index_counts():
    exact, index = shard_bytes(large(), 4), shard_bytes(large(index="IVF4096,Flat"), 4)
    assert index - exact > 25_000_000 * 4 * CONFIG["bank"]["width"]


def test_workers_take_their_share_and_no_rows(plain_errors):
    small, big = plan_spread(large(), Wanted(4, 1)), plan_spread(large(10**9), Wanted(4, 1))
    assert small.worker_memory == pytest.approx(big.worker_memory, rel=0.05)
    two = plan_spread(large(), Wanted(4, 2))
    assert two.rows_received == pytest.approx(small.rows_received / 2, rel=0.1)
    assert small.gradients_sent == 0
    assert two.gradients_sent > 0


def test_groups_are_what_is_planned(plain_errors):
    plan = plan_spread(config_of(), Wanted(4, 2))
    shard, worker = groups_of(config_of(), Wanted(4, 2))
    assert (shard.number, worker.number) == (4, 2)
    assert shard.each.memory == pytest.approx(plan.shard_memory, rel=0.1)  # libraries grow
    assert (worker.each.cpus, worker.each.gpus) == (1, 0)


def test_a_plan_is_shown_with_its_sums(plain_errors):
    plan = plan_spread(config_of(), Wanted(4, 2))
    total = 2 * (plan.rows_sent + plan.rows_received + plan.gradients_sent)
    assert plan.step_bytes == total
    text = "\n".join(lines(plan))
    assert "4 shards" in text
    assert "2 workers" in text
    assert f"network   {total / 1024:.3g} KiB a step" in text


def test_what_cannot_be_shared_out_is_not_planned(plain_errors):
    with pytest.raises(ConfigError, match="multiple of the number of workers = 3"):
        plan_spread(config_of(), Wanted(4, 3))
