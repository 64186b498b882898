"""Memory of one hypergradient against the number of lower steps: implicit, unrolled, checkpointed, truncated.

    python tests/benchmarks/memory_of_unrolling.py [--steps 10 100 1000] [--size 200]

Counts the bytes of the distinct tensors that autograd keeps for a backward pass, at their highest; forward mode keeps
none. No clock is read: the table is the same on every machine. docs/hypergradients.md states it.
"""

import argparse
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

import implicit


class _Held:
    """A saved tensor that reports when autograd lets go of it."""

    def __init__(self, owner: "SavedBytes", tensor: Tensor) -> None:
        self.owner, self.tensor = owner, tensor
        owner.add(tensor, 1)

    def __del__(self) -> None:
        self.owner.add(self.tensor, -1)


class SavedBytes:
    """Bytes of the distinct storages that autograd holds for backward passes.

    Attributes:
        now: at this moment.
        peak: at most.
    """

    def __init__(self) -> None:
        self.now = self.peak = 0
        self._holders: Counter[int] = Counter()

    def add(self, tensor: Tensor, holders: int) -> None:
        """Count one more or one less holder of the memory of ``tensor``."""
        storage = tensor.untyped_storage()
        key, before = storage.data_ptr(), self._holders[storage.data_ptr()]
        self._holders[key] = before + holders
        if (before == 0) != (self._holders[key] == 0):
            self.now += storage.nbytes() * holders
            self.peak = max(self.peak, self.now)

    def watch(self) -> AbstractContextManager[Any]:
        """A context in which everything saved is counted."""
        return torch.autograd.graph.saved_tensors_hooks(lambda t: _Held(self, t), lambda held: held.tensor)


def measure(run: Callable[[], object]) -> int:
    """Peak bytes saved while ``run`` runs."""
    counter = SavedBytes()
    with counter.watch():
        run()
    return counter.peak


class Task:
    """Nonlinear regression with a log-penalty per feature; float64, ``size`` lower variables."""

    def __init__(self, size: int = 200, rows: int = 50) -> None:
        generator = torch.Generator().manual_seed(0)
        self.train = torch.randn(rows, size, generator=generator, dtype=torch.float64) / size**0.5
        self.target = torch.sin(self.train.sum(dim=1))
        self.x = torch.full((2,), -3.0, dtype=torch.float64)
        self.y0 = torch.zeros(size, dtype=torch.float64)
        self.optimizer = implicit.SGD(lr=0.3)

    def lower(self, x: Tensor, y: Tensor) -> Tensor:
        """Data term and penalties."""
        half = len(y) // 2
        penalty = x[0].exp() * (y[:half] ** 2).sum() + x[1].exp() * (y[half:] ** 2).sum()
        return ((torch.tanh(self.train @ y) - self.target) ** 2).mean() + penalty

    def upper(self, x: Tensor, y: Tensor) -> Tensor:
        """Distance from the target of the next row."""
        return ((torch.tanh(self.train @ y) - self.target.roll(1)) ** 2).mean()

    def implicit(self, steps: int) -> Tensor:
        """The implicit hypergradient after ``steps`` steps."""
        y = implicit.unroll(self.lower, self.x, self.y0, steps=steps, optimizer=self.optimizer)
        return implicit.hypergradient(self.upper, self.lower, self.x, y, accuracy=False).value

    def unrolled(self, steps: int, **options: Any) -> Tensor:
        """The unrolled hypergradient through ``steps`` steps."""
        return implicit.unrolled(
            self.upper, self.lower, self.x, self.y0, steps=steps, optimizer=self.optimizer, accuracy=False, **options
        ).value

    def ways(self) -> dict[str, Callable[[int], Tensor]]:
        """Every way to get one hypergradient, by name."""
        return {
            "implicit": self.implicit,
            "unrolled": self.unrolled,
            "unrolled, checkpointing=True": lambda steps: self.unrolled(steps, checkpointing=True),
            "unrolled, truncation=10": lambda steps: self.unrolled(steps, truncation=10),
        }


def table(steps: list[int], size: int) -> str:
    """Peak KiB for every way and number of steps, as Markdown."""
    lines = ["| KiB saved for backward | " + " | ".join(f"{t} steps" for t in steps) + " |"]
    lines.append("|---|" + "---|" * len(steps))
    for name, run in Task(size).ways().items():
        cells = [f"{measure(lambda t=t, run=run: run(t)) / 1024:.0f}" for t in steps]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--size", type=int, default=200)
    options = parser.parse_args()
    print(table(options.steps, options.size))


if __name__ == "__main__":
    main()
