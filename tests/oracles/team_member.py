"""A team of processes: python team_member.py SIZE FOLDER.

Each trains a small model with the others, and writes down what it had of it. They are forks of one
process, which has imported all that they need.
"""

import gc
import json
import multiprocessing
import sys
import time
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sparsemem.distributed.bank import ShardedBank
from sparsemem.distributed.opening import open_bank
from sparsemem.distributed.team import GroupTeam, average_gradient, join, leave
from sparsemem.distributed.transport import LocalShards
from sparsemem.layers import MemoryLayer
from sparsemem.training.config import make_config
from sparsemem.training.run import RunFolder
from sparsemem.training.setup import prepare
from sparsemem.training.signals import Stop
from sparsemem.training.trainer import Trainer

CONFIG = {
    "model": {"name": "lstm", "hidden_size": 8},
    "task": {"name": "copy", "bits": 3},
    "training": {
        "steps": 8,
        "batch_size": 8,
        "dtype": "float64",
        "log_every": 1,
        "evaluate_every": 4,
        "checkpoint_every": 4,
        "truncate": 4,
        "optimizer": {"learning_rate": 0.01},
    },
    "curriculum": {"minimum": 1, "maximum": 4},
    "evaluation": {"batches": 1, "batch_size": 4},
}


def agree(folder, rank):
    """Member 0's address by way of a file."""
    file = folder / "address.json"

    def agreed(own):
        if own is not None:
            (folder / "written.json").write_text(json.dumps(own))
            (folder / "written.json").rename(file)
        while not file.exists():
            time.sleep(0.01)
        return tuple(json.loads(file.read_text()))

    return agreed


def train(run, team=None, stop=None):
    """The config's run, as a member of a team or alone; its losses are the run's."""
    trainer = Trainer(prepare(make_config(CONFIG)), *([] if team is None else [team]))
    if team is None or team.rank == 0:
        RunFolder.create(run.path, trainer.config)
    outcome = trainer.train(run, stop=stop)
    return trainer, outcome


def member(rank, size, folder):
    """Join, train, and say what came of it."""
    join(rank, size, "127.0.0.1", agree(folder, rank))
    values = train_twice(rank, size, folder) | averaged(rank, folder)
    leave()
    values["models"] = sum(type(kept) is DistributedDataParallel for kept in gc.get_objects())
    (folder / f"member-{rank}.json").write_text(json.dumps(values))


def train_twice(rank, size, folder):
    """To the end, and on until one is asked to stop; what came of it."""
    team = GroupTeam()
    means, told = team.means([float(rank), 1.0]), team.told([float(rank + 5)])
    trainer, outcome = train(RunFolder(folder / "run"), team)
    stop = Stop()
    stop.number = 2 if rank == size - 1 else None  # one of them is asked to stop
    trainer.config.training.steps = 100
    after = trainer.train(RunFolder(folder / "run"), stop=stop)
    return {
        "means": means,
        "told": told,
        "outcomes": [outcome.name, after.name],
        "step": trainer.step,
        "validation": trainer.validation,
        "parameters": [parameter.sum().item() for parameter in trainer.model.parameters()],
    }


def averaged(rank, folder):
    """Gradients of sub-keys and of rows elsewhere: a member's own, and in the team."""
    sizes = {"num_shards": 2, "index": "product-key", "metric": "ip", "initial": "normal"}
    path = ShardedBank.create(folder / f"bank-{rank}", 25, 6, 3, **sizes)
    bank = open_bank(path, LocalShards(path))
    torch.manual_seed(0)
    layer, apart = MemoryLayer(4, bank, 1, 2), torch.ones(2, requires_grad=True)
    input = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(rank))
    found = {}
    for name, model in (("own", layer), ("team", GroupTeam().wrapped(layer))):
        layer.zero_grad()
        model(input).square().sum().backward()
        found[name] = [x.grad.to_dense().tolist() for x in (bank.keys, bank.values)]
    average_gradient(apart)
    (apart * (rank + 1)).sum().backward()
    bank.close()
    return {"gradients": found, "apart": apart.grad.tolist()}


def main():
    """All members; fails where one has failed."""
    size, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    torch.optim.SGD([torch.zeros(1)])  # torch imports much more with the first optimiser
    fork = multiprocessing.get_context("fork").Process
    members = [fork(target=member, args=(rank, size, folder)) for rank in range(size)]
    for process in members:
        process.start()
    for process in members:
        process.join()
    sys.exit(any(process.exitcode for process in members))


if __name__ == "__main__":
    main()
