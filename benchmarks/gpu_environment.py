"""A part of scripts/gpu_check: device, versions, bandwidth, the cost of a launch and of a wait."""

from __future__ import annotations

import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version

import torch
from gpu_common import Figures, Options, Results, copy_bandwidth, measure, options, wait

PACKAGES = ("torch", "triton", "faiss-gpu", "numpy", "numba", "jaxtyping", "beartype", "pydantic")
PACKAGES += ("pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "safetensors")
QUERY = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.draw"
LAUNCHES = 1000


def main() -> None:
    """Measure what the other parts are judged by."""
    given = options(__doc__ or "")
    results = Results(given.results, given.seconds)
    results.run("versions", versions)
    results.run("device", lambda: device_figures(given))
    results.run("copy", lambda: {"bytes_a_second": copy_bandwidth(given.device, given.tiny)})
    results.run("launches", lambda: launches(given))


def versions() -> Figures:
    """Of Python and the packages."""
    found: Figures = {"python": platform.python_version(), "kernel": platform.release()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    found["torch"] = torch.__version__
    try:
        import faiss

        found["faiss"] = f"{faiss.__version__}, {faiss.get_num_gpus()} GPUs"
    except (ImportError, AttributeError) as error:
        found["faiss"] = f"{type(error).__name__}: {error}"
    command = ["git", "rev-parse", "HEAD"]
    try:
        found["commit"] = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        found["commit"] = ""
    return found


def device_figures(given: Options) -> Figures:
    """What the device is."""
    if given.device.type != "cuda":
        return {"name": platform.processor() or "cpu"}
    properties = torch.cuda.get_device_properties(given.device)
    found: Figures = {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "bytes": properties.total_memory,
        "free_bytes": torch.cuda.mem_get_info(given.device)[0],
        "l2_bytes": getattr(properties, "L2_cache_size", None),
    }
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
        found["nvidia_smi"] = dict(zip(QUERY.split(","), answer.split(", "), strict=False))
    except (OSError, subprocess.TimeoutExpired) as error:
        found["nvidia_smi"] = str(error)
    return found


def launches(given: Options) -> Figures:
    """Microseconds of a small kernel launched by the host, of one in a graph, and of a wait."""
    number = torch.ones(1, device=given.device)

    def many() -> None:
        for _ in range(LAUNCHES):
            number.mul_(1.0)

    many()
    wait(given.device)
    start = time.perf_counter()
    many()
    host = time.perf_counter() - start
    wait(given.device)
    found = {
        "host_us": 1e6 * host / LAUNCHES,
        "launch_us": 1e3 * measure(many, given.device, repetitions=10)["ms"] / LAUNCHES,
    }
    start = time.perf_counter()
    for _ in range(100):
        number.item()
    found["wait_us"] = 1e6 * (time.perf_counter() - start) / 100
    if given.device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            many()
        found["graph_kernel_us"] = 1e3 * measure(graph.replay, given.device)["ms"] / LAUNCHES
    return {name: round(value, 3) for name, value in found.items()}


if __name__ == "__main__":
    main()
