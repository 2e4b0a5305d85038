"""What long episodes find: python benchmarks/episode_recall.py (1 minute).

Of 200,000 rows of 32 numbers, entered one after another as an episode does, the share of the four
nearest to a query by cosine that its tree proposes; and what the found ones score, over what the
nearest do. Queries are rows with some noise. Writes episode_recall.json.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import machine, recalls
from torch import Tensor

from sparsemem.indexes.metrics import inverse_norm
from sparsemem.memory.row_tree import PROBED_GROUPS, PROBED_LISTS, RowTrees

WIDTH, TOP_K, QUERIES, NOISE = 32, 4, 512, 0.1
# Clusters of the rows, and how far these are from their centres, in units of N(0, 1); without
# clusters rows are of N(0, 1), where the nearest are hardly nearer than many others.
KINDS = {"clustered": (3_000, 0.3), "loosely": (3_000, 1.0), "not clustered": (0, 1.0)}


def made(count: int, clusters: int, spread: float, seed: int) -> Tensor:
    """Rows [count, WIDTH]."""
    generator = torch.Generator().manual_seed(seed)
    rows = spread * torch.randn(count, WIDTH, generator=generator)
    if clusters:
        centres = torch.randn(clusters, WIDTH, generator=generator)
        rows += centres[torch.randint(clusters, (count,), generator=generator)]
    return rows


def best(queries: Tensor, rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and ids of the TOP_K nearest of some rows of each query."""
    scores = (rows[ids.clamp(min=0)] @ queries.unsqueeze(-1)).squeeze(-1)
    found = scores.masked_fill(ids < 0, -torch.inf).topk(TOP_K, 1)
    return found.values, ids.gather(1, found.indices)


def measured(count: int, clusters: int, spread: float, seed: int) -> dict[str, float]:
    """Enter rows of one kind, then ask."""
    rows = made(count, clusters, spread, seed)
    norms, trees = inverse_norm(rows), RowTrees(1, WIDTH, 1)
    start = time.perf_counter()
    trees.absorb(torch.tensor([count]), rows.unsqueeze(0), norms.unsqueeze(0))
    entered = time.perf_counter() - start
    generator = torch.Generator().manual_seed(seed + 1)
    near = rows[torch.randint(count, (QUERIES,), generator=generator)]
    queries = near + NOISE * torch.randn(QUERIES, WIDTH, generator=generator)
    start = time.perf_counter()
    proposed = trees.proposed(queries.unsqueeze(0), TOP_K).squeeze(0)
    asked = time.perf_counter() - start
    directions = rows * norms.unsqueeze(1)
    queries = queries * inverse_norm(queries).unsqueeze(1)
    scores, ids = best(queries, directions, proposed)
    truth = (queries @ directions.mT).topk(TOP_K, 1)
    shares = recalls(ids, truth.indices)
    return {
        "recall": sum(shares) / QUERIES,
        "nearest_found": float((ids[:, 0] == truth.indices[:, 0]).double().mean()),
        "score_over_that_of_the_nearest": float(scores.mean() / truth.values.mean()),
        "microseconds_to_enter_a_row": 1e6 * entered / count,
        "microseconds_a_query": 1e6 * asked / QUERIES,
    }


def main(
    rows: Annotated[int, typer.Option(min=1_000, help="Rows of an episode.")] = 200_000,
    seeds: Annotated[int, typer.Option(min=1, help="How many of each kind.")] = 3,
) -> None:
    """Measure each kind, and write the JSON beside this file."""
    torch.set_num_threads(1)
    measured(1_000, *KINDS["clustered"], seed=0)  # what is compiled on first use
    result: dict[str, Any] = {
        "machine": machine(),
        "setting": f"{rows} x {WIDTH} rows, {QUERIES} queries, top {TOP_K}, {PROBED_LISTS} lists"
        f" of {PROBED_GROUPS} groups, means of {seeds} seeds",
    }
    for name, kind in KINDS.items():
        found = [measured(rows, *kind, seed) for seed in range(seeds)]
        result[name] = {key: sum(one[key] for one in found) / seeds for key in found[0]}
        print(name, result[name])
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
