"""What a crash leaves on the disk, at every moment of what is done."""

import os
import shutil
import subprocess
from pathlib import Path


class Crashes:
    """Copies a folder as a crash would leave it, before every call that changes the disk."""

    def __init__(self, monkeypatch, path, copies):
        self.path, self.copies, self.states = path, copies, []
        watched = [(os, name) for name in ("fsync", "replace", "ftruncate", "write", "mkdir")]
        for module, name in [*watched, (Path, "unlink"), (shutil, "rmtree")]:
            self.watch(monkeypatch, module, name)

    def watch(self, monkeypatch, module, name):
        real = getattr(module, name)

        def watched(*arguments, **options):
            self.crash(name)
            return real(*arguments, **options)

        monkeypatch.setattr(module, name, watched)

    def crash(self, name):
        copy = self.copies / f"{len(self.states)}-{name}"
        subprocess.run(["cp", "-r", self.path, copy], check=True)
        self.states.append(copy)
