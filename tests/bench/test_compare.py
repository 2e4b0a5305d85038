import pytest

from sparsemem.bench.compare import changes, differing_grounds, unmatched
from sparsemem.bench.measuring import Summary
from sparsemem.bench.results import Measured, Result


def result(points, **machine):
    return Result(
        benchmark="scaling", machine={"cpu": "x", **machine}, settings={}, seconds=1, points=points
    )


def point(seconds, name="sam", size=1024, steps=10, peak=1000.0):
    return Measured(
        kind="model",
        name=name,
        size=size,
        steps=steps,
        times={"step": Summary.of(seconds)},
        figures={"peak_tensor_bytes": peak},
    )


def change(a, b, measure):
    return next(c for c in changes(result([a]), result([b])) if c.measure == measure)


def test_a_change_within_the_spread_of_both_runs_is_noise():
    found = change(point([1.0, 1.1, 1.2]), point([1.05, 1.15, 1.3]), "step time")
    assert found.ratio == pytest.approx(1.15 / 1.1)
    assert not found.beyond_noise
    assert "within noise" in found.line()


def test_a_change_beyond_the_spread_is_told_with_its_direction():
    faster = change(point([1.0, 1.02, 1.04]), point([0.5, 0.51, 0.52]), "step time")
    assert faster.beyond_noise
    assert (faster.ratio, faster.low, faster.high) == pytest.approx(
        (0.5, 0.505 / 1.03, 0.515 / 1.01)
    )
    assert faster.line().startswith("model sam N=2^10, step time: 0.500 (0.490 .. 0.510) less")
    slower = change(point([0.5, 0.5]), point([1.0, 1.0]), "step time")
    assert slower.beyond_noise
    assert slower.line().endswith("more")


def test_memory_is_compared_by_the_step():
    a, b = point([1.0], steps=10, peak=1000.0), point([1.0], steps=5, peak=500.0)
    assert change(a, b, "peak tensor bytes").ratio == pytest.approx(1.0)
    assert not change(a, point([1.0], peak=1010.0), "peak tensor bytes").beyond_noise
    assert change(a, point([1.0], peak=1100.0), "peak tensor bytes").beyond_noise


def test_points_and_grounds_that_differ_are_told():
    a = result([point([1.0]), point([1.0], size=2048)], torch="1")
    b = result([point([1.0]), point([1.0], name="ntm")], torch="2")
    assert len(changes(a, b)) == 2
    assert unmatched(a, b) == ["only in A: model sam N=2048", "only in B: model ntm N=1024"]
    assert differing_grounds(a, b) == ["torch differs: 1 and 2"]
