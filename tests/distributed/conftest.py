"""Ray on this machine, as several nodes, for the tests that need it."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.oracles.shard_kills import restock

ROOT = Path(__file__).resolve().parents[2]
# A node that is gone is missed after two seconds instead of twenty; one that is slow is not taken
# for gone.
QUICK = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 20_000,
    "health_check_failure_threshold": 4,
}
# Nobody looks at them, nor at the log.
SILENT = {"include_dashboard": False, "include_log_monitor": False}
# Actors import this tree, whatever is installed; one thread each, as the tests have.
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def _cluster():
    """A head without room for actors, and two nodes."""
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    from ray.cluster_utils import Cluster

    os.environ["RAY_DEDUP_LOGS"] = "0"
    os.environ["REPORTER_UPDATE_INTERVAL_MS"] = "60000"  # of nodes' load, which nobody reads
    head = {"num_cpus": 0, "_system_config": QUICK}
    cluster = Cluster(initialize_head=True, head_node_args=head | SILENT)
    nodes = [cluster.add_node(num_cpus=8) for _ in range(2)]
    ray.init(address=cluster.address, runtime_env={"env_vars": ENVIRONMENT}, log_to_driver=False)
    yield SimpleNamespace(cluster=cluster, nodes=nodes, address=cluster.address)
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def cluster(_cluster):
    """Two nodes for shards, both there."""
    restock(_cluster)
    return _cluster
