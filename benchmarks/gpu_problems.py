"""What is wrong in a report of scripts/gpu_check: what did not run to its end, or not as it should.

Figures are searched at any depth. What nobody could expect without a GPU does not count there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Figures = dict[str, Any]
SAID = ("error", "failed", "failure", "stopped")  # by what measured
NONE = (None, 0, "None")  # stats of a bank are in a report as text
# Largest differences from the torch code, in float64, where sums in another order give 1e-14.
DIFFERENCES = ("kernels_output", "kernels_gradients", "captured_output", "captured_gradients")
TOLERANCE = 1e-9
NEEDS_GPU, NO_TIME = "needs a GPU", "no time was left"  # why a figure was skipped
ABSENT = ("needs ", "could not import")  # how reasons begin to skip a test that something would run
FAISS = "faiss"  # the figure that says that a folder with FAISS cannot be used
LONGEST = 350  # characters of a message


def problems(report: Figures) -> list[str]:
    """All of them, a line each; none: everything that was asked for ran, and as it should."""
    on_gpu = not report["settings"].get("device", "cuda").startswith("cpu")
    found = []
    for name, part in report["parts"].items():
        if part["status"] != "done":
            found.append(f"{name}: {part['status']}")
        for key, figures in part["figures"].items():
            # Every part says this one: once is enough.
            where = key if key == FAISS else f"{name}: {key}"
            found += [f"{where}: {text}" for text in of_figures(figures, on_gpu)]
    return list(dict.fromkeys(found))


def of_figures(figures: Figures, on_gpu: bool) -> Iterator[str]:
    """Problems of figures, and of those within them behind their names."""
    yield from said(figures, on_gpu)
    yield from measured(figures)
    if "graphs" in figures and on_gpu and not figures["graphs"]:
        yield "nothing was captured: graphs 0"
    if "built" in figures:
        yield from built(figures, on_gpu)
    if "passed" in figures:
        yield from tested(figures, on_gpu)
    for name, inner in figures.items():
        if isinstance(inner, dict):
            yield from (f"{name}: {text}" for text in of_figures(inner, on_gpu))


def said(figures: Figures, on_gpu: bool) -> Iterator[str]:
    """What the figures themselves call an error, or left out."""
    for name in SAID:
        if figures.get(name) not in NONE:
            yield f"{name}: {' '.join(str(figures[name]).split())[:LONGEST]}"
    skipped = figures.get("skipped")
    if isinstance(skipped, str) and (on_gpu or skipped != NEEDS_GPU):  # of tests it is a number
        yield f"skipped: {skipped}"


def measured(figures: Figures) -> Iterator[str]:
    """Values that are not what they have to be; NaN is none that is."""
    found, floor = figures.get("found", 1), figures.get("floor")
    if not found >= 1:
        yield f"found {found}, expected 1: rows that torch finds are missed"
    if floor is not None and not figures["recall"] >= floor:
        yield f"recall {figures['recall']} is below its floor of {floor}"
    fresh, stale = figures.get("fresh", 1), figures.get("stale", 0)
    if not (fresh >= 1 and stale <= 0):
        yield f"fresh {fresh}, stale {stale}, expected 1 and 0: moved rows are not where they are"
    for name in DIFFERENCES:
        if name in figures and not figures[name] <= TOLERANCE:
            yield f"{name} {figures[name]} is not within {TOLERANCE} of the torch code"


def built(figures: Figures, on_gpu: bool) -> Iterator[str]:
    """What makes the figures of an index be those of something else."""
    if not figures["built"]:
        yield "not built in time: searches are scans"
    elif str(figures.get("stats", {}).get("exact")) == "True":
        yield "the index gave way to exact search"
    if on_gpu and figures.get("on") == "Derived":
        yield "the index is on the host, expected on the GPU"


def tested(figures: Figures, on_gpu: bool) -> Iterator[str]:
    """Tests that did not run, beside those that failed."""
    ended = figures["passed"] + figures["failed"] + figures["skipped"]
    if ended < (figures.get("collected") or 0):
        yield f"only {ended} of {figures['collected']} tests ended"
    if figures.get("fell_with_the_device"):
        yield f"{figures['fell_with_the_device']} tests failed with a broken device at first"
    if on_gpu and not figures["passed"]:
        yield f"no test passed, {figures['skipped']} were skipped"
    for reason in figures.get("skipped_because", ()) if on_gpu else ():
        if reason.removeprefix("Skipped: ").startswith(ABSENT):
            yield f"tests were skipped: {reason.removeprefix('Skipped: ')}"
