"""A part of scripts/gpu_check: how the exact search is best cut into programs, by its shapes."""

from __future__ import annotations

from functools import partial

import torch
from gpu_common import Figures, Options, Results, copy_bandwidth, options
from gpu_scan_tuning import filled, shapes, tune

WIDTH, TOP_K = 64, 8
SETTINGS = (
    (10**7, torch.float32, 64),
    (10**7, torch.bfloat16, 64),
    (10**7, torch.float32, 128),
    (10**7, torch.bfloat16, 128),
    (10**6, torch.float32, 64),
    (10**7, torch.float32, 16),
)


def main() -> None:
    """Setting by setting."""
    given = options(__doc__ or "")
    results = Results(given.results, given.seconds)
    results.run("copy", lambda: {"bytes_a_second": copy_bandwidth(given.device, given.tiny)})
    speed = results.figures["copy"].get("bytes_a_second", float("nan"))
    for rows, dtype, queries in SETTINGS:
        name = f"{rows:,} {str(dtype).removeprefix('torch.')}, {queries} queries"
        results.run(name, partial(tuned, given, speed, rows, dtype, queries))


def tuned(given: Options, speed: float, rows: int, dtype: torch.dtype, queries: int) -> Figures:
    """By shape: milliseconds of a search and of its first step; the library's own shape first."""
    if given.device.type != "cuda":
        product = "rough float32" if dtype == torch.float32 else "rough"
        return {"shapes": len(shapes(WIDTH, product, queries)), "skipped": "needs a GPU"}
    table = filled(rows, WIDTH, dtype, given.device)
    limit = 1e3 * (table.rows.nbytes + table.live.nbytes) / speed
    asked = torch.randn(queries, WIDTH, device=given.device)
    found = {
        str(tuple(shape)): [round(whole, 4), round(first, 4), round(whole / limit, 2)]
        for shape, whole, first in tune(table, asked, TOP_K)
    }
    return {"limit_ms": round(limit, 4), "ms_first_step_ms_to_limit": found}


if __name__ == "__main__":
    main()
