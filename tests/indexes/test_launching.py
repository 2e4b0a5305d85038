"""Which launches go through Triton, and what the kept kernels are given."""

import pytest
import torch

from sparsemem.indexes import launching
from sparsemem.indexes.launching import kind_of, launch


class Program:
    """A kernel of Triton's, as far as a launch sees it: (a, b, SIZE, FLAG) -> None."""

    arg_names = ("a", "b", "SIZE", "FLAG")

    def __init__(self):
        self.compiled, self.launched = [], []

    def __getitem__(self, grid):
        def run(*arguments, **constants):
            self.compiled.append((grid, arguments, constants))
            return Compiled(self)

        return run


class Compiled:
    def __init__(self, program):
        self.program = program

    def __getitem__(self, grid):
        return lambda *arguments: self.program.launched.append((grid, arguments))


@pytest.fixture
def program(monkeypatch):
    monkeypatch.setattr(launching, "_compiled", {})
    return Program()


def test_a_kept_kernel_gets_all_arguments_in_order(program):
    first, second = torch.zeros(4), torch.zeros(8)
    launch(program, (3,), first, 7, FLAG=True, SIZE=16, num_warps=2)
    assert program.compiled == [((3,), (first, 7), {"FLAG": True, "SIZE": 16, "num_warps": 2})]
    launch(program, (5, 2), second, 9, FLAG=True, SIZE=16, num_warps=2)
    assert len(program.compiled) == 1
    ((grid, arguments),) = program.launched
    assert grid == (5, 2, 1)
    assert arguments[0] is second
    assert arguments[1:] == (9, 16, True)


def test_other_constants_and_options_are_other_kernels(program):
    for size, flag, warps in ((1, True, 1), (2, True, 1), (1, False, 1), (1, True, 4)):
        launch(program, (1,), torch.zeros(4), 7, SIZE=size, FLAG=flag, num_warps=warps)
    assert len(program.compiled) == 4
    assert not program.launched


def test_nothing_is_kept_of_an_interpreter(program, monkeypatch):
    monkeypatch.setattr(Program, "__getitem__", lambda self, grid: lambda *a, **c: self.ran(grid))
    program.ran = program.launched.append
    for _ in range(2):
        launch(program, (1,), torch.zeros(4), 7, SIZE=1, FLAG=True)
    assert program.launched == [(1,), (1,)]


def test_what_a_kernel_is_compiled_for():
    aligned = torch.zeros(8)
    differ = [
        aligned, aligned[1:], aligned.long(), 0, 1, 5, True, 2**31, 2**31 + 1, -(2**31), 2**63,
        1.0, None,
    ]  # fmt: skip
    assert len({kind_of(value) for value in differ}) == len(differ) - 1, "0 and -(2^31) are alike"
    for one, other in ((aligned, torch.zeros(3)), (aligned, aligned[4:]), (3, 5), (16, 32)):
        assert kind_of(one) == kind_of(other)


@pytest.mark.gpu
def test_rows_out_of_line_after_rows_in_line(triton_device):
    # A kernel that is compiled for addresses divisible by 16 must not be given others.
    from sparsemem.kernels.gpu.rows import weigh_rows

    numbers = torch.randn(65, device=triton_device)
    ids, weights = torch.arange(4, device=triton_device).view(1, 4), torch.ones(1, 4).to(numbers)
    for start in (0, 0, 1, 1, 0):
        table = numbers[start : start + 64].view(4, 16)
        torch.testing.assert_close(weigh_rows(table, ids, weights)[0], table.sum(0))
