"""A progress bar for any run."""

import sys
from typing import Any, TextIO

from implicit.iterate import StepInfo
from implicit.status import Status


class Progress:
    """A callback that shows a bar with the method's own scalars.

    Args:
        names: which scalars to show; the first three by default.
        file: where to write; standard error by default.
        min_seconds: time between two updates; None means 0.1 on a terminal, and 10 where the text goes to a log.
    """

    def __init__(
        self, names: tuple[str, ...] | None = None, file: TextIO | None = None, min_seconds: float | None = None
    ) -> None:
        self.names = names
        self.file = file
        self.min_seconds = min_seconds
        self._bar: Any = None

    def start(self, info: StepInfo) -> None:
        """Open the bar at the step where the run starts."""
        from tqdm import tqdm

        file = self.file or sys.stderr
        default = 0.1 if file.isatty() else 10.0
        self._bar = tqdm(
            total=info.max_steps,
            initial=info.step,
            unit="step",
            file=file,
            dynamic_ncols=True,
            mininterval=default if self.min_seconds is None else self.min_seconds,
        )

    def __call__(self, info: StepInfo) -> None:
        """Move the bar."""
        names = self.names or tuple(info.values)[:3]
        self._bar.set_postfix({n: f"{info.values[n]:.3g}" for n in names if n in info.values}, refresh=False)
        self._bar.update(info.step - self._bar.n)

    def end(self, info: StepInfo, status: Status) -> None:
        """Close the bar."""
        self._bar.close()
