"""What a person sees during training: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
import os
import sys
from typing import TextIO

from tqdm import tqdm


def _columns(terminal: TextIO) -> int:
    """Width of a terminal; 0 if it does not say, as under some job runners."""
    try:
        return os.get_terminal_size(terminal.fileno()).columns
    except (OSError, ValueError):
        return 0


class Progress:
    """Progress over training steps; `stream` is standard error unless given."""

    def __init__(
        self, total: int, start: int, metric_name: str, stream: TextIO | None = None
    ) -> None:
        self.metric_name = metric_name
        self._total = total
        self._stream = sys.stderr if stream is None else stream
        self._bar = None
        if self._stream.isatty() and _columns(self._stream) > 0:
            self._bar = tqdm(
                total=total, initial=start, file=self._stream, unit="step", dynamic_ncols=True
            )

    def step(self, values: dict[str, float]) -> None:
        """Advance by one step; on a terminal the values show beside the bar."""
        if self._bar is not None:
            self._bar.set_postfix_str(self._text(values), refresh=False)
            self._bar.update()

    def log(self, step: int, values: dict[str, float]) -> None:
        """Values that were recorded: a line, unless the bar shows them already."""
        if self._bar is None:
            seconds = f"{values['seconds']:.0f} s"
            self.say(f"step {step}/{self._total}: {self._text(values)}, {seconds}")

    def say(self, line: str) -> None:
        """A line that stays."""
        if self._bar is not None:
            self._bar.write(line, file=self._stream)
        else:
            print(line, file=self._stream, flush=True)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()

    def _text(self, values: dict[str, float]) -> str:
        return (
            f"loss {values['loss']:.4f}, {self.metric_name} {values['metric']:.3g},"
            f" touched {values['touched']:.0f}, level {values['level']:.3g}"
        )


class Silent(Progress):
    """Progress of which nobody is told."""

    def __init__(self) -> None:
        super().__init__(0, 0, "", io.StringIO())

    def say(self, line: str) -> None:
        """Nothing."""
