"""What the command line must know about a kind of problem; everything else it does alike for all of them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from implicit import StepInfo, tree
from implicit.tree import Tree

EXACT = "known exactly for this case"


@dataclass(frozen=True)
class Automatic:
    """Stands on the command line for the choice that ``solve`` makes itself."""

    @property
    def name(self) -> str:
        """As it is typed."""
        return "auto"

    def settings(self) -> dict[str, Any]:
        """None: those of an algorithm are set by naming it."""
        return {}


class Row(NamedTuple):
    """One number of a summary, with what it means."""

    name: str
    value: float
    meaning: str = ""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """What the picture of a run shows.

    Attributes:
        value, label: the column of the history in the upper row, and its name on the axis.
        residuals: columns for the lower row with their names; a history has one of them.
        optimum: the exact answer that is drawn as a line.
    """

    value: str
    label: str
    residuals: Mapping[str, str]
    optimum: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A solution in the terms that all kinds share.

    Attributes:
        method: with every setting resolved.
        headline: the value that says most.
        numbers: everything special to the kind, for ``result.json``.
        variables: what is saved as tensors, by name.
        rows: further values, for the summary.
        accuracy, notes: how good it is.
        like: has the dtype and the device of the run.
    """

    method: Any
    headline: Row
    numbers: Mapping[str, Any]
    variables: Mapping[str, Tree]
    rows: Sequence[Row] = ()
    accuracy: Sequence[Row]
    notes: Sequence[str] = ()
    like: Tensor


@dataclass(frozen=True, kw_only=True)
class Job:
    """A problem ready to be solved.

    Attributes:
        kind: what it is.
        problem, start: the declaration, and ``(x0, y0)`` or ``(x0,)``.
        settings: what it was built with.
        max_steps: the step budget it suggests.
        report: writes what is special to it into a directory.
        exact: compares a solution with the exact answer, where one is known.
        source: where the problem or its data come from.
        best_known: the best known value of what is minimized (at the upper level).
        lower_class: of the lower level, such as ``"convex"``; empty where nothing says it.
    """

    kind: "Kind"
    problem: Any
    start: tuple[Tree, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    max_steps: int | None = None
    report: Callable[[Any, Path], Any] | None = None
    exact: Callable[[Any], dict[str, float]] | None = None
    source: str = ""
    best_known: float | None = None
    lower_class: str = ""


class Kind(ABC):
    """A kind of problem: its declarations, its methods, and how its results read.

    Attributes:
        name: as the registry of cases and ``result.json`` have it.
        declarations: the classes that declare such a problem, for messages.
        starts: names of the variables a run starts from.
        tolerances: which of ``rtol`` and ``atol`` its ``solve`` takes, and of what.
        chart: what is drawn.
        accuracy_title: heads the accuracy rows of the summary.
        counted: names of the evaluations that are counted.
        meanings: of exact answers, where :data:`EXACT` does not say it.
        automatic_text: what "auto" does.
        solve: its entry point, called with the problem, the method and the start.
    """

    name: ClassVar[str]
    declarations: ClassVar[tuple[str, ...]]
    starts: ClassVar[tuple[str, ...]]
    tolerances: ClassVar[Mapping[str, str]]
    chart: ClassVar[Chart]
    accuracy_title: ClassVar[str]
    counted: ClassVar[Mapping[str, str]]
    automatic_text: ClassVar[str]
    meanings: ClassVar[Mapping[str, str]] = MappingProxyType({})
    solve: ClassVar[Callable[..., Any]]

    @abstractmethod
    def declares(self, value: Any) -> bool:
        """Whether ``value`` is a problem of this kind."""

    @abstractmethod
    def methods(self) -> dict[str, type[Any]]:
        """The classes of its methods by name."""

    @abstractmethod
    def default(self, problem: Any) -> Any:
        """The method for those who name none.

        Raises:
            ValueError: if none fits.
        """

    @abstractmethod
    def automatic(self) -> Any:
        """What ``solve`` takes as its method to choose one itself."""

    @abstractmethod
    def entrants(self) -> tuple[str, ...]:
        """The methods that a comparison tries if it is told none."""

    @abstractmethod
    def job(self, case: Any) -> Job:
        """A registered case as a job."""

    def start(self, problem: Any) -> tuple[Tree, ...] | None:
        """Where ``problem`` itself says that runs start, if it does."""
        return None

    def resumable(self, problem: Any) -> bool:
        """Whether runs can be saved."""
        return True

    @abstractmethod
    def opening(self, job: Job, state: Any) -> tuple[list[str], Tensor]:
        """What is about to be solved, in phrases, and a tensor with the dtype and device of the run."""

    @abstractmethod
    def evaluations(self, info: StepInfo) -> dict[str, int]:
        """How often the functions of the problem have been evaluated so far."""

    @abstractmethod
    def verdict(self, job: Job, solution: Any) -> tuple[bool, str]:
        """Whether a check that does not rest on the run accepts the point, and if not, why."""

    @abstractmethod
    def outcome(self, job: Job, solution: Any) -> Outcome:
        """What was found."""


def count(point: Tree) -> str:
    """``12 numbers in 2 tensors``."""
    size, parts = tree.size(point), len(tree.leaves(point))
    return amount(size, "number") + (f" in {parts} tensors" if parts > 1 else "")


def amount(number: int, noun: str, plural: str | None = None) -> str:
    """``1 equality``, ``2 equalities``."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
