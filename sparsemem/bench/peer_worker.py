"""One peer in a process of its own, driven by JSON lines on standard input.

Run by whatever Python (3.9 or newer) the peer is installed in, so it imports the standard
library, torch, and what the peer needs, each where it is needed. Requests and answers, one a line:

    {"command": "make", "peer": NAME, "threads": 1, "settings": {...}}  -> {"figures": {...}}
    {"command": "step"}                                                 -> {"seconds": 0.1}

or {"error": "..."} to either. The process ends when its standard input does.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Step = Callable[[], Any]
Settings = dict[str, Any]
RATE = 1e-3


def own_model(name: str) -> Callable[[Settings], Step]:
    """A model of this library."""

    def make(s: Settings) -> Step:
        import torch

        from sparsemem.models.registry import make_model

        sizes = {"num_slots": s["slots"], "slot_dim": s["width"], "num_heads": s["heads"]}
        if name != "dnc":
            sizes["top_k"] = s["top_k"]
        ends = {"input_size": s["inputs"], "output_size": s["inputs"], "hidden_size": s["hidden"]}
        model = make_model(name, **ends, **sizes)

        def step() -> None:
            output, _ = model(torch.randn(s["batch"], s["steps"], s["inputs"]))
            output.square().mean().backward()

        return step

    return make


def dnc_model(name: str) -> Callable[[Settings], Step]:
    """A model of the package dnc (ixaxaar/pytorch-dnc)."""

    def make(s: Settings) -> Step:
        import dnc  # type: ignore[import-not-found]
        import torch

        options = {
            "input_size": s["inputs"],
            "hidden_size": s["hidden"],
            "num_layers": 1,
            "num_hidden_layers": 1,
            "nr_cells": s["slots"],
            "cell_size": s["width"],
            "read_heads": s["heads"],
            "batch_first": True,
            "gpu_id": -1,
        }
        if name != "DNC":
            options["sparse_reads"] = s["top_k"]
        model = getattr(dnc, name)(**options)

        def step() -> None:
            input = torch.randn(s["batch"], s["steps"], s["inputs"])
            output = model(input, (None, None, None), reset_experience=True)[0]
            output.square().mean().backward()

        return step

    return make


def trained(layer: Any, optimisers: Any, s: Settings) -> Step:
    """Forward, backward and optimiser steps on random tokens."""
    import torch

    def step() -> None:
        for optimiser in optimisers:
            optimiser.zero_grad()
        layer(torch.randn(1, s["tokens"], s["value_width"])).square().mean().backward()
        for optimiser in optimisers:
            optimiser.step()

    return step


def own_product_keys(s: Settings) -> Step:
    """A MemoryLayer over a bank with product keys."""
    from sparsemem import MemoryBank
    from sparsemem.layers import MemoryLayer
    from sparsemem.optim import RowAdam

    bank = MemoryBank(
        s["subkeys"] ** 2,
        2 * s["half"],
        s["value_width"],
        index="product-key",
        metric="ip",
        initial="normal",
    )
    layer = MemoryLayer(s["value_width"], bank, s["heads"], s["top_k"], gated=False)
    return trained(layer, [RowAdam(layer.parameters(), lr=RATE)], s)


def product_key_memory(s: Settings) -> Step:
    """PKM of the package product-key-memory, with Adam as in its README."""
    import torch
    from product_key_memory import (  # type: ignore[import-not-found]
        PKM,
        fetch_optimizer_parameters,
    )

    layer = PKM(
        s["value_width"],
        heads=s["heads"],
        num_keys=s["subkeys"],
        topk=s["top_k"],
        dim_head=s["half"],
    )
    return trained(layer, [torch.optim.Adam(fetch_optimizer_parameters(layer), lr=RATE)], s)


def embedding_bag(s: Settings) -> Step:
    """Product keys in plain torch over EmbeddingBag(sparse=True), stepped by SparseAdam."""
    import torch
    from torch import nn

    class Layer(nn.Module):
        """Sub-keys that all heads share, and an embedding bag."""

        def __init__(self) -> None:
            super().__init__()
            self.query = nn.Linear(s["value_width"], s["heads"] * 2 * s["half"])
            self.norm = nn.LayerNorm(2 * s["half"])
            subkeys = torch.randn(2, s["subkeys"], s["half"]) / (2 * s["half"]) ** 0.5
            self.subkeys = nn.Parameter(subkeys)
            self.values = nn.EmbeddingBag(
                s["subkeys"] ** 2, s["value_width"], mode="sum", sparse=True
            )

        def forward(self, input: Any) -> Any:
            """[1, T, D] -> [1, T, D]."""
            queries = self.norm(self.query(input).view(-1, s["heads"], 2 * s["half"]))
            first, second = (
                (part @ keys.T).topk(s["top_k"])
                for part, keys in zip(queries.chunk(2, -1), self.subkeys)  # noqa: B905  new in Python 3.10
            )
            sums = first.values.unsqueeze(-1) + second.values.unsqueeze(-2)
            scores, places = sums.flatten(-2).topk(s["top_k"])
            pairs = first.indices.unsqueeze(-1) * s["subkeys"] + second.indices.unsqueeze(-2)
            ids, weights = pairs.flatten(-2).gather(-1, places), scores.softmax(-1)
            return self.values(ids.flatten(1), per_sample_weights=weights.flatten(1)).unsqueeze(0)

    layer = Layer()
    rest = [p for p in layer.parameters() if p is not layer.values.weight]
    sparse = torch.optim.SparseAdam([layer.values.weight], lr=RATE)
    return trained(layer, [torch.optim.Adam(rest, lr=RATE), sparse], s)


def searched(rows: Any, s: Settings) -> Any:
    """Queries near to rows."""
    import torch

    return rows[torch.randint(len(rows), (s["queries"],))] + 0.1


def own_bank(s: Settings) -> Step:
    """A bank with inverted lists: read, backward, RowSGD; the index knows."""
    import torch

    from sparsemem import MemoryBank
    from sparsemem.optim import RowSGD

    bank = MemoryBank(s["rows"], s["row_width"], index=f"IVF{s['lists']},Flat")
    rows = torch.randn(s["rows"], s["row_width"])
    bank.write(torch.arange(s["rows"]), rows)
    while bank.index.current is None and s["rows"] >= bank.index.exact_below:  # type: ignore[attr-defined]
        time.sleep(0.02)
    optimiser = RowSGD(bank.parameters(), lr=RATE)

    def step() -> None:
        optimiser.zero_grad()
        hit = bank.read(searched(rows, s), 8)
        loss = (hit.scores.softmax(-1).unsqueeze(-1) * hit.values).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()

    return step


def faiss_rebuilt(s: Settings) -> Step:
    """Rows in a sparse embedding, and a FAISS index of them made anew at each step."""
    import faiss
    import torch
    import torch.nn.functional as F

    table = torch.nn.Embedding(s["rows"], s["row_width"], sparse=True)
    optimiser = torch.optim.SGD(table.parameters(), lr=RATE)

    def step() -> None:
        optimiser.zero_grad()
        unit = F.normalize(table.weight.detach(), dim=-1).numpy()
        name, metric = f"IVF{s['lists']},Flat", faiss.METRIC_INNER_PRODUCT
        index: Any = faiss.index_factory(s["row_width"], name, metric)
        index.nprobe = 16
        index.train(unit)
        index.add(unit)
        queries = searched(table.weight.detach(), s)
        ids = torch.from_numpy(index.search(F.normalize(queries, dim=-1).numpy(), 8)[1]).clamp(0)
        rows = table(ids)
        scores = torch.cosine_similarity(queries.unsqueeze(1), rows, -1)
        loss = (scores.softmax(-1).unsqueeze(-1) * rows).sum()
        loss.backward()
        optimiser.step()

    return step


PEERS: dict[str, Callable[[Settings], Step]] = {
    "sparsemem DNC": own_model("dnc"),
    "dnc DNC": dnc_model("DNC"),
    "sparsemem SDNC": own_model("sdnc"),
    "dnc SDNC": dnc_model("SDNC"),
    "sparsemem SAM": own_model("sam"),
    "dnc SAM": dnc_model("SAM"),
    "sparsemem product keys": own_product_keys,
    "product-key-memory": product_key_memory,
    "EmbeddingBag + SparseAdam": embedding_bag,
    "sparsemem bank": own_bank,
    "FAISS rebuilt each step": faiss_rebuilt,
}


def resident(name: str) -> int:
    """Bytes: VmRSS, now; VmHWM, at most so far."""
    with open("/proc/self/status") as file:
        lines = file.read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


class Server:
    """Makes the peer that is asked for, and steps it."""

    def __init__(self) -> None:
        self.step: Step = lambda: None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to one request."""
        start = time.perf_counter()
        if request["command"] == "step":
            self.step()
            return {"seconds": time.perf_counter() - start}
        import torch

        torch.set_num_threads(request["threads"])
        torch.manual_seed(0)
        before = resident("VmRSS")
        self.step = PEERS[request["peer"]](request["settings"])
        self.step()  # to warm up, and for the peak
        peak = float(max(resident("VmHWM") - before, 0))
        return {
            "figures": {"peak_rss_bytes": peak, "make_seconds": time.perf_counter() - start},
            "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
        }


def serve() -> None:
    """Answer until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a peer prints must not get between the answers
    server = Server()
    for line in sys.stdin:
        try:
            answer = server.answer(json.loads(line))
        except Exception as error:
            found = str(error).splitlines() or [""]
            answer = {"error": f"{type(error).__name__}: {found[0]}"}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    sys.path.pop(0)  # this folder: its modules are not the peer's
    serve()
