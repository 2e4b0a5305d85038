"""Shapes in public signatures are executed: sparsemem's functions are type-checked in tests.

Of each function the first calls in every test: checking all of them takes longer than the tests.
"""

import functools
from types import FunctionType

import jaxtyping

CALLS = 10  # of a function in a test that are checked


class Sampler:
    """What jaxtyping's import hook decorates functions with."""

    def __init__(self) -> None:
        self._calls: dict[int, int] = {}  # in the present test, by the function's code
        self._check = jaxtyping.jaxtyped

    def new_test(self) -> None:
        """From here on first calls are first calls again."""
        self._calls.clear()

    def install(self, package: str) -> None:
        """Check what is imported of a package from here on."""
        jaxtyping.jaxtyped = self.decorator
        jaxtyping.install_import_hook(package, "beartype.beartype")

    def decorator(self, *, typechecker):
        """In the place of jaxtyping's."""
        check = self._check(typechecker=typechecker)
        return lambda f: self.sampled(f, check) if isinstance(f, FunctionType) else check(f)

    def sampled(self, function, check):
        """A function whose first calls in a test are checked.

        Those of all functions of one code, which a function in a function is made of every time.
        """
        checked, code = None, id(function.__code__)

        @functools.wraps(function)
        def call(*args, **kwargs):
            __tracebackhide__ = True
            nonlocal checked
            calls = self._calls.get(code, 0)
            if calls >= CALLS:
                return function(*args, **kwargs)
            self._calls[code] = calls + 1
            if checked is None:  # many functions are never called
                checked = check(function)
            return checked(*args, **kwargs)

        return call


sampler = Sampler()
