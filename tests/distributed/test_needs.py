import pytest

from sparsemem.distributed.cluster import Wanted
from sparsemem.distributed.needs import groups_of, lines, plan_spread, shard_bytes, worker_plan
from sparsemem.distributed.opening import open_bank
from sparsemem.distributed.traffic import Traffic
from sparsemem.distributed.transport import LocalShards
from sparsemem.distributed.trying import create_bank
from sparsemem.training.banks import NoBank, dense_parameters
from sparsemem.training.errors import ConfigError
from sparsemem.training.setup import prepare
from sparsemem.training.trainer import Trainer
from tests.oracles.sharded_runs import BANKS, CONFIG, config_of


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


def of_pairs(num_rows=10**8):
    """A config with product keys, and the plan of its only worker."""
    config = config_of("product-key")
    bank = config.bank.model_copy(update={"num_rows": num_rows})
    config = config.model_copy(update={"bank": bank})
    return config, worker_plan(config, 1).plan.memory


def test_shards_of_product_keys_take_values_alone():
    (small, _), (big, _) = of_pairs(), of_pairs(4 * 10**8)
    taken = (shard_bytes(big, 1) - shard_bytes(small, 1)) / (3 * 10**8)
    row = BANKS["product-key"]["value_width"] * 8
    assert 3 * row < taken < 3 * row + 100  # with Adam's moments


def test_each_worker_has_all_sub_keys(plain_errors):
    (_, small), (_, big) = of_pairs(), of_pairs(4 * 10**8)
    more = 10**4 * CONFIG["bank"]["width"] * 8  # 10^4 more of either half, of half the width
    assert big.bank - small.bank == pytest.approx(more, rel=0.01)
    assert big.row_optimiser - small.row_optimiser == pytest.approx(2 * more, rel=0.01)
    assert big.gradients - small.gradients == pytest.approx(more, rel=0.01)
    assert big.saving - small.saving == pytest.approx(4 * 3 * more, rel=0.01)


@pytest.mark.parametrize("index", BANKS)
def test_a_step_takes_what_is_planned(tmp_path, index):
    config = config_of(index)
    config.curriculum.minimum = config.curriculum.maximum = 4
    plan = plan_spread(config, Wanted(3, 1))
    create_bank(tmp_path / "bank", config, 3)
    shards = LocalShards(tmp_path / "bank")
    bank = open_bank(tmp_path / "bank", shards)
    trainer = Trainer(prepare(config, bank), keeper=NoBank())
    found, read = [], bank.read
    bank.read = lambda *asked: found.append(read(*asked)) or found[-1]
    for _ in range(2):  # the first one asks, too, whether all rows are there
        shards.traffic = traffic = Traffic()
        trainer._train_batch(4)
    shards.close()
    ids = found[-1].ids.flatten()
    again = len(ids) - len(ids.unique())  # rows of which one gradient is sent, not several
    width = 8 * found[-1].values.shape[-1]
    assert traffic.received == pytest.approx(plan.rows_received, rel=0.1)
    assert traffic.sent == pytest.approx(plan.rows_sent - again * (width + 8), rel=0.1)


def test_workers_send_one_another_all_dense_gradients():
    config = config_of("product-key")
    dense = dense_parameters(prepare(config).model)
    keys = 2 * 14 * CONFIG["bank"]["width"] // 2 * 8
    size = sum(parameter.nbytes for parameter in dense) + keys
    assert plan_spread(config, Wanted(4, 2)).gradients_sent == size
    assert plan_spread(config, Wanted(4, 4)).gradients_sent == 3 * size // 2


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
