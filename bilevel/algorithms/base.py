"""What all bilevel algorithms share."""

from abc import abstractmethod
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Generic, TypeVar

import torch

from bilevel.oracle import Counts, new_counts
from bilevel.problem import BilevelProblem
from bilevel.solution import Accuracy, Start
from implicit import IterativeMethod, State, Status
from implicit.tree import Tree


@dataclass(kw_only=True)
class BilevelState(State):
    """Fields that every algorithm has.

    Attributes:
        x, y: the iterates, owned copies.
        counts: oracle calls so far.
        generator: the only one of the run.
    """

    x: Tree
    y: Tree
    generator: torch.Generator
    counts: Counts = field(default_factory=new_counts)


B = TypeVar("B", bound=BilevelState)


@dataclass(frozen=True, kw_only=True)
class Algorithm(IterativeMethod[B], Generic[B]):
    """Base of the bilevel algorithms: frozen settings, validated when built, resolved against a problem.

    Args:
        rtol: relative tolerance on the stationarity measure; None picks what the method can reach.
        atol: absolute tolerance on it.
        check_every: steps between looks at the state; each look synchronises the device once. None lets the
            algorithm choose.
    """

    rtol: float | None = None
    atol: float = 0.0
    check_every: int | None = None

    guarantee: ClassVar[str]
    """EXACT, BIAS or STATISTICAL on full data."""
    default_max_steps: ClassVar[int]
    handles: ClassVar[frozenset[str]] = frozenset()
    """Sets and constraint functions it can deal with, by their names in the declaration."""

    def __post_init__(self) -> None:
        if self.rtol is not None and not self.rtol >= 0:
            raise ValueError(f"rtol must be >= 0 or None, got {self.rtol}")
        if not self.atol >= 0:
            raise ValueError(f"atol must be >= 0, got {self.atol}")
        require_positive_int(self, "check_every")

    @property
    def name(self) -> str:
        """The class name, which is how the command line finds it."""
        return type(self).__name__

    def refuses(self, problem: BilevelProblem) -> str | None:
        """Why this algorithm does not fit ``problem``, naming the field and an algorithm that does; None if it fits.

        Here for what is declared beyond :attr:`handles`; algorithms add reasons of their own.
        """
        from bilevel.registry import algorithms

        declared = restrictions(problem)
        missing = [name for name in declared if name not in self.handles]
        if not missing:
            return None
        able = [name for name, cls in algorithms().items() if cls.handles >= set(declared)]
        cure = f"use {' or '.join(able)}" if able else "no algorithm handles all of " + ", ".join(declared)
        return f"{self.name} cannot handle {missing[0]}; {cure}"

    def multipliers(self, problem: BilevelProblem, state: B) -> dict[str, Tree]:
        """Lagrange multipliers at the end, by the name of the constraint or set, shaped like its values."""
        return {}

    def starts(self, problem: BilevelProblem, state: B) -> tuple[Start, ...]:
        """What each start led to, for algorithms that try several."""
        return ()

    @abstractmethod
    def assess(self, problem: BilevelProblem, state: B, status: Status) -> tuple[Accuracy, Status, str]:
        """Measure the end point on all data, and confirm or correct the status; with a sentence about it."""

    def settings(self) -> dict[str, Any]:
        """Fields and values, for reports."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


def restrictions(problem: BilevelProblem) -> tuple[str, ...]:
    """Sets and constraint functions that restrict something, by their names in the declaration."""
    sets = tuple(name for name in ("upper_set", "lower_set") if not getattr(problem, name).is_whole_space)
    return sets + problem.constraints


def require_positive_int(algorithm: Any, *names: str) -> None:
    """Refuse a field that is neither None nor a positive integer."""
    for name in names:
        value = getattr(algorithm, name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{name} must be a positive integer, got {value!r}")


def require_positive(algorithm: Any, *names: str) -> None:
    """Refuse a field that is neither None nor a positive number."""
    for name in names:
        value = getattr(algorithm, name)
        if value is not None and not (isinstance(value, int | float) and value > 0):
            raise ValueError(f"{name} must be positive, got {value!r}")
