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
        self.test = 0
        self._check = jaxtyping.jaxtyped

    def new_test(self) -> None:
        """From here on first calls are first calls again."""
        self.test += 1

    def install(self, package: str) -> None:
        """Check what is imported of a package from here on."""
        jaxtyping.jaxtyped = self.decorator
        jaxtyping.install_import_hook(package, "beartype.beartype")

    def decorator(self, *, typechecker):
        """In the place of jaxtyping's."""
        check = self._check(typechecker=typechecker)
        return lambda f: self.sampled(f, check) if isinstance(f, FunctionType) else check(f)

    def sampled(self, function, check):
        """A function whose first calls in a test are checked."""
        checked, test, calls = None, -1, 0

        @functools.wraps(function)
        def call(*args, **kwargs):
            __tracebackhide__ = True
            nonlocal checked, test, calls
            if test != self.test:
                test, calls = self.test, 0
            if calls >= CALLS:
                return function(*args, **kwargs)
            calls += 1
            if checked is None:  # many functions are never called
                checked = check(function)
            return checked(*args, **kwargs)

        return call


sampler = Sampler()
