"""The report of scripts/gpu_check as Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from gpu_problems import DIFFERENCES, NO_TIME

Figures = dict[str, Any]
SHOWN_MESSAGE = 350  # characters of a failure
GIB = 2**30


def markdown(report: Figures) -> str:
    """All parts, as far as they have figures."""
    lines = ["# scripts/gpu_check", ""]
    if report["settings"]["tiny"]:
        lines += ["Tiny sizes: this shows that the scripts run, and nothing about speed.", ""]
    lines += ["## Problems", "", *(f"- {text}" for text in report["problems"] or ["none"]), ""]
    for name, part in report["parts"].items():
        lines += [
            f"## {name}",
            "",
            f"{part['measures']}: {part['status']}, {part['seconds']} s",
            "",
        ]
        figures = {key: f for key, f in part["figures"].items() if is_there(f)}
        show = SECTIONS.get(name, rest)
        try:
            lines += [*show(figures), ""]
        except (KeyError, TypeError, ValueError) as error:
            lines += [f"(cannot be shown: {error!r})", ""]
        for key, figure in part["figures"].items():
            if "error" in figure:
                lines += [f"- **{key} failed**: {figure['error'][:SHOWN_MESSAGE]}"]
        lines += [""]
    return "\n".join(lines)


def is_there(figure: Figures) -> bool:
    """Whether there is something to show: what could not be measured is among the problems."""
    return "error" not in figure and figure.get("skipped") != NO_TIME


def table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> list[str]:
    """A Markdown table."""
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines]


def environment(figures: Figures) -> list[str]:
    """Device and versions in a few lines."""
    device, versions = figures.get("device", {}), figures.get("versions", {})
    smi = device.get("nvidia_smi", {})
    lines = [f"- {device.get('name')}, {device.get('multiprocessors')} multiprocessors, {smi}"]
    lines += ["- " + ", ".join(f"{k} {v}" for k, v in versions.items() if k != "seconds")]
    if "copy" in figures:
        speed = figures["copy"]["bytes_a_second"] / 1e12
        lines += [f"- copying on the device: {speed:.2f} TB/s, read and written"]
    if "launches" in figures:
        costs = figures["launches"]
        lines += [f"- microseconds: {', '.join(f'{k} {v}' for k, v in costs.items())}"]
    return lines


def tests(figures: Figures) -> list[str]:
    """Counts and failures."""
    found = figures.get("pytest")
    if not found:
        return []
    lines = [
        f"{found['passed']} passed, {found['failed']} failed, {found['skipped']} skipped;"
        f" {found['fell_with_the_device']} failed with a broken device at first",
        "",
    ]
    for name, message in found["failures"].items():
        tail = " / ".join(line.strip() for line in message.strip().splitlines()[-4:])
        lines += [f"- `{name}`: {message.splitlines()[0][:200]} ... {tail[-SHOWN_MESSAGE:]}"]
    slow = ", ".join(
        f"{name.split('::')[-1]} {s}" for name, s in list(found["slowest"].items())[:6]
    )
    return [*lines, "", f"slowest, seconds: {slow}"]


def models(figures: Figures) -> list[str]:
    """Times of a pass, beside those of captured SAM."""
    base = figures.get("sam captured", {}).get("ms")
    rows = []
    for name, found in figures.items():
        if "ms" not in found:
            continue
        spread = f"{found['lower_ms']:.3f} .. {found['upper_ms']:.3f}"
        ratio = f"{found['ms'] / base:.2f}" if base and "batch" not in name else ""
        peak = found.get("peak_bytes")
        notes = []
        if "graphs" in found:
            notes += [found["failure"] or f"{found['graphs']} graph"]
        if "slots" in found:
            notes += [f"{found['slots']} slots, {found['steps']} steps"]
            notes += [f"{found['us_a_step_at_all_slots']} us a step at all slots"]
            notes += ["extrapolated"] * found["extrapolated"]
        step = found.get("us_a_step", "")
        row = [name, f"{found['ms']:.3f}", spread, step, ratio]
        rows.append([*row, f"{peak / GIB:.2f}" if peak else "", "; ".join(map(str, notes))])
    header = ("pass", "ms", "quartiles", "us a step", "to SAM", "GiB", "")
    lines = table(header, rows)
    if "sam agreement" in figures:
        figure = figures["sam agreement"]
        found = {name: f"{figure[name]:.1e}" for name in DIFFERENCES}
        lines += ["", f"largest difference from the torch code, by largest value: {found}"]
    if "sam kernels" in figures:
        found = figures["sam kernels"]
        lines += [
            "",
            f"one captured pass: {found['kernels']} kernels, {found['busy_ms']} ms busy",
            "",
        ]
        rows = [(e["name"][:60], e["calls"], e["us"]) for e in found["top"][:12]]
        lines += table(("kernel", "calls", "us"), rows)
    return lines


def banks(figures: Figures) -> list[str]:
    """Times of reads and steps, beside the limit of moving all rows once."""
    rows = []
    for size, found in figures.items():
        limit = found.get("limit_ms")
        for name, part in found.items():
            if isinstance(part, dict) and "ms" in part:
                spread = f"{part['lower_ms']:.3f} .. {part['upper_ms']:.3f}"
                shown = f"{limit:.3f}" if limit else ""
                row = [size, name, f"{part['ms']:.3f}", spread, shown]
                rows.append([*row, part.get("to_limit", ""), part.get("products_ms", "")])
            elif isinstance(part, dict):
                rows.append([size, name, "", str(part)[:SHOWN_MESSAGE], "", "", ""])
    heads = ("bank", "queries, what", "ms", "quartiles", "limit, ms", "to limit", "products, ms")
    return table(heads, rows)


def rest(figures: Figures) -> list[str]:
    """Figures one by one."""
    lines = []
    for name, found in figures.items():
        shown = ", ".join(f"{key} {value}" for key, value in found.items() if key != "seconds")
        lines.append(f"- {name}: {shown}")
    return lines


SECTIONS = {"environment": environment, "tests": tests, "models": models, "banks": banks}
