"""A disk that is full, broken, or not to be written to, at one call or for as long as it lasts."""

import builtins
import errno
import io
import os
from contextlib import contextmanager
from pathlib import Path

import pytest

from sparsemem import files

ENOSPC, EIO, EROFS, EACCES = errno.ENOSPC, errno.EIO, errno.EROFS, errno.EACCES
NOBODY = 65534  # the user


def error(code):
    return OSError(code, os.strerror(code))


def fail_at(monkeypatch, module, name, number, code):
    """Let one call of a function fail, counting from 0."""
    real, calls = getattr(module, name), []

    def failing(*arguments, **options):
        calls.append(name)
        if len(calls) == number + 1:
            raise error(code)
        return real(*arguments, **options)

    monkeypatch.setattr(module, name, failing)


def fail_half_way(monkeypatch, number, code):
    """Let one `os.write` fail that has written half: a short write, and then an error."""
    real, calls = os.write, []

    def failing(file, data):
        calls.append(file)
        if len(calls) == number + 1:
            real(file, data[: len(data) // 2])
            raise error(code)
        return real(file, data)

    monkeypatch.setattr(os, "write", failing)


def fail_file(monkeypatch, method, number, code):
    """Let one `write` or `flush` of a whole file fail, half-written; returns its name in a list.

    Of those files that `sparsemem.files` writes: shards and manifests.
    """
    calls, failed = [], []

    class File:
        """A file that fails at its turn."""

        def __init__(self, path, mode):
            self.path, self.file = Path(path), builtins.open(path, mode)  # noqa: SIM115

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            self.fail("write", data[: len(data) // 2])
            return self.file.write(data)

        def flush(self):
            self.fail("flush", b"")
            self.file.flush()

        def fail(self, name, data):
            if name == method:
                calls.append(name)
                if len(calls) == number + 1:
                    failed.append(self.path.name)
                    self.file.write(data)
                    raise error(code)

    monkeypatch.setattr(files, "open", File, raising=False)
    return failed


def forbid(monkeypatch, path, code):
    """Let all fail that would make, remove or rename something in a folder, or open it to write."""

    def refuse(*names):
        if any(path == Path(name).parent for name in names):
            raise error(code)

    def guard(module, name, writes):
        real = getattr(module, name)

        def guarded(*arguments, **options):
            if writes(*arguments, **options):
                refuse(*(name for name in arguments if isinstance(name, str | Path)))
            return real(*arguments, **options)

        monkeypatch.setattr(module, name, guarded)

    def to_write(path, mode="r", *_, **__):
        return not set(mode).isdisjoint("wax+")

    for module in (builtins, io):
        guard(module, "open", to_write)
    guard(os, "open", lambda path, flags, *_, **__: flags & (os.O_WRONLY | os.O_RDWR))
    for name in ("replace", "mkdir", "unlink", "remove", "truncate"):
        guard(os, name, lambda *_, **__: True)


@contextmanager
def without_permission(path):
    """As a user who may not write to a folder, whoever runs the tests; skips where that cannot be.

    The superuser may write anywhere, and so becomes another one for a while.
    """
    superuser, mode = os.geteuid() == 0, path.stat().st_mode
    path.chmod(0o500)
    try:
        if superuser:
            try:
                os.seteuid(NOBODY)
            except OSError:
                pytest.skip("the superuser may write anywhere, and cannot be another user here")
        yield
    finally:
        if superuser:
            os.seteuid(0)
        path.chmod(mode)
