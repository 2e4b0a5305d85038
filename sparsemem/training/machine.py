"""The machine that a plan is made on: its memory, and whether it has the config's device."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import torch

from sparsemem.training.config import Config
from sparsemem.training.errors import ConfigError
from sparsemem.training.setup import device_of

MEMORY_INFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
GPU = re.compile(r"cuda(:(0|[1-9]\d*))?")


class Where(NamedTuple):
    """The device that a config names, and why it cannot be used here, if so."""

    device: torch.device
    missing: str | None = None

    @property
    def here(self) -> bool:
        """Whether this machine has it."""
        return self.missing is None

    @property
    def trial(self) -> torch.device:
        """Where passes are run in earnest."""
        return self.device if self.here else torch.device("cpu")


def where_of(config: Config) -> Where:
    """Where a config is to run. ConfigError for a device that is not here, but for GPUs."""
    try:
        return Where(device_of(config))
    except ConfigError as error:
        if not GPU.fullmatch(config.training.device):
            raise
        return Where(torch.device("cuda"), str(error))


def machine_bytes(device: torch.device) -> int | None:
    """Memory of a device (of the CPU: of the machine, or its control group); None: unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type != "cpu" or not MEMORY_INFO.exists():
        return None
    total = kib(MEMORY_INFO, "MemTotal")
    limit = CGROUP.read_text().strip() if CGROUP.exists() else "max"
    return min(total, int(limit)) if limit.isdigit() else total


def taken_bytes(device: torch.device) -> int:
    """What is in use of a GPU's memory, by whomever, but for this process's tensors."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


def kib(path: Path, name: str) -> int:
    """Bytes that a file of /proc names, in KiB."""
    lines = path.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
