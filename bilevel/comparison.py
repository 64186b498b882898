"""What a comparison of algorithms found: one row per case, algorithm and seed, and what the rows add up to."""

import csv
import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from bilevel.settings import plain

SOLVED_RTOL = 1e-2
"""A verified point counts as solved up to this distance from the best known value, relative to max(1, |F*|)."""
REFUSED, ERROR = "REFUSED", "ERROR"
UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One algorithm on one case with one seed.

    Attributes:
        case: its name.
        lower_class: of the lower level: ``"strongly convex"``, ``"convex"``, ``"nonconvex"`` or ``"unknown"``.
        algorithm: the label of the row; ``chosen`` is the algorithm that solved it, another one for "auto".
        seed: of the run.
        status: name of the :class:`Status`; REFUSED where the algorithm does not fit, ERROR where something was raised.
        verified: whether an independent check accepts the point: :func:`bilevel.verify` at its default tolerance, the
            KKT residual for problems of one level.
        value: the upper objective at the point, NaN where there is none.
        best_known: F*, or None.
        steps: of the run.
        seconds: of the whole call, with resolving, several starts and the final report, without the check.
        counts: oracle calls by kind.
        starts: how many starting points were tried.
        message: one sentence from the algorithm, the reason of a refusal, or the error.
        choice: why "auto" chose what it did.
        reasons: why the check did not accept the point.
        warnings: what was warned about meanwhile.
        trace: ``(step, seconds, upper value, oracle calls)`` at every check of the run.
    """

    case: str
    lower_class: str = UNKNOWN
    algorithm: str
    seed: int = 0
    status: str
    verified: bool = False
    value: float = float("nan")
    best_known: float | None = None
    steps: int = 0
    seconds: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)
    starts: int = 0
    chosen: str = ""
    message: str = ""
    choice: str = ""
    reasons: str = ""
    warnings: str = ""
    trace: tuple[tuple[float, float, float, float], ...] = ()

    @property
    def key(self) -> tuple[str, str, int]:
        """What tells it from the others."""
        return self.case, self.algorithm, self.seed

    @property
    def fits(self) -> bool:
        """Whether the algorithm accepted the problem."""
        return self.status != REFUSED

    @property
    def claimed(self) -> bool:
        """Whether it says CONVERGED."""
        return self.status == "CONVERGED"

    @property
    def false_claim(self) -> bool:
        """CONVERGED at a point that the independent check does not accept."""
        return self.claimed and not self.verified

    @property
    def gap(self) -> float | None:
        """``(F - F*) / max(1, |F*|)``; None where F* is unknown."""
        return None if self.best_known is None else (self.value - self.best_known) / max(1.0, abs(self.best_known))

    @property
    def solved(self) -> bool | None:
        """Verified, and at most :data:`SOLVED_RTOL` above the best known value; None where that is unknown."""
        return None if self.gap is None else self.verified and self.gap <= SOLVED_RTOL

    @property
    def calls(self) -> int:
        """Oracle calls of all kinds."""
        return sum(self.counts.values())

    @property
    def verdict(self) -> str:
        """In one or two words."""
        if self.status in (REFUSED, ERROR):
            return self.status.lower()
        if self.false_claim:
            return "FALSE CLAIM"
        if not self.verified:
            return "unverified"
        return {True: "solved", False: "worse point", None: "verified"}[self.solved]

    def row(self) -> dict[str, Any]:
        """The columns of the table, as plain data; calls by kind are columns of their own."""
        return {
            "case": self.case,
            "lower_class": self.lower_class,
            "algorithm": self.algorithm,
            "chosen": self.chosen,
            "seed": self.seed,
            "status": self.status,
            "verified": self.verified,
            "upper_value": self.value,
            "best_known": self.best_known,
            "gap": self.gap,
            "solved": self.solved,
            "false_claim": self.false_claim,
            "steps": self.steps,
            "seconds": self.seconds,
            "calls": self.calls,
            **{f"calls_{name}": number for name, number in self.counts.items()},
            "starts": self.starts,
            "message": self.message,
            "choice": self.choice,
            "reasons": self.reasons,
            "warnings": self.warnings,
        }

    def record(self) -> dict[str, Any]:
        """Every field as plain data, for :meth:`from_record`."""
        return {f.name: plain(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Trial":
        """The trial that :meth:`record` described."""
        trace = tuple((float(a), float(b), float(c), float(d)) for a, b, c, d in record["trace"])
        return cls(**{**record, "value": float(record["value"]), "trace": trace})


@dataclass(frozen=True, kw_only=True)
class Tally:
    """What one algorithm did on the cases of one lower class.

    Attributes:
        algorithm, lower_class: of which; the class ``"all"`` sums up.
        fitting: runs that the algorithm accepted.
        claimed: of them, those that say CONVERGED.
        verified: those whose point the independent check accepts.
        solved: those that also reach the best known value; out of ``known`` where it is known.
        known: fitting runs with a best known value.
        false_claims: those that say CONVERGED at a point that is not accepted.
        seconds, calls: medians over the fitting runs.
    """

    algorithm: str
    lower_class: str
    fitting: int
    claimed: int
    verified: int
    solved: int
    known: int
    false_claims: int
    seconds: float
    calls: float


@dataclass(frozen=True, repr=False)
class Comparison:
    """The outcome of :func:`bilevel.compare`.

    Attributes:
        trials: in the order of cases, algorithms and seeds.
        missing: how many runs are not there because the comparison was interrupted.
        kind: of the problems, ``"bilevel"`` or ``"constrained"``.
    """

    trials: tuple[Trial, ...]
    missing: int = 0
    kind: str = "bilevel"

    def __repr__(self) -> str:
        return self.text()

    @property
    def cases(self) -> tuple[str, ...]:
        """Names of the cases, in order."""
        return tuple(dict.fromkeys(trial.case for trial in self.trials))

    @property
    def algorithms(self) -> tuple[str, ...]:
        """Labels of the algorithms, in order."""
        return tuple(dict.fromkeys(trial.algorithm for trial in self.trials))

    @property
    def false_claims(self) -> tuple[Trial, ...]:
        """Runs that say CONVERGED at a point that is not accepted."""
        return tuple(trial for trial in self.trials if trial.false_claim)

    def of(self, **wanted: Any) -> tuple[Trial, ...]:
        """The trials whose attributes have these values, such as ``of(algorithm="Penalty", solved=True)``."""
        return tuple(t for t in self.trials if all(getattr(t, name) == value for name, value in wanted.items()))

    def summary(self) -> list[Tally]:
        """One tally per algorithm and lower class, and over all classes where there are several."""
        classes = list(dict.fromkeys(trial.lower_class for trial in self.trials))
        groups: list[tuple[str, Iterable[str]]] = [(name, (name,)) for name in sorted(classes, key=_class_order)]
        if len(classes) > 1:
            groups.append(("all", classes))
        return [
            _tally(label, name, [t for t in self.trials if t.algorithm == label and t.lower_class in members])
            for label in self.algorithms
            for name, members in groups
        ]

    def csv(self) -> str:
        """The rows as CSV; of columns that some rows lack the cells stay empty."""
        rows = [plain(trial.row()) for trial in self.trials]
        names = _columns(rows)
        text = io.StringIO()
        writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def text(self, width: int = 100) -> str:
        """The tables, for a terminal of ``width`` columns: the runs of one case, or a case per line; then the tally."""
        from bilevel.comparison_text import tables

        return tables(self, width)

    def draw(self, path: Path) -> Path:
        """The picture: curves of the upper value for one case, else shares of the cases that were solved."""
        from bilevel.comparison_picture import draw

        return draw(path, self)


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """All names, each after the one that it follows in its row."""
    names: list[str] = []
    for row in rows:
        place = 0
        for name in row:
            if name in names:
                place = names.index(name) + 1
            else:
                names.insert(place, name)
                place += 1
    return names


def _class_order(name: str) -> tuple[int, str]:
    known = ("strongly convex", "convex", "nonconvex", UNKNOWN)
    return (known.index(name) if name in known else len(known), name)


def _tally(algorithm: str, lower_class: str, trials: Sequence[Trial]) -> Tally:
    fitting = [trial for trial in trials if trial.fits]
    nan = float("nan")
    return Tally(
        algorithm=algorithm,
        lower_class=lower_class,
        fitting=len(fitting),
        claimed=sum(t.claimed for t in fitting),
        verified=sum(t.verified for t in fitting),
        solved=sum(t.solved is True for t in fitting),
        known=sum(t.best_known is not None for t in fitting),
        false_claims=sum(t.false_claim for t in fitting),
        seconds=statistics.median(t.seconds for t in fitting) if fitting else nan,
        calls=statistics.median(t.calls for t in fitting) if fitting else nan,
    )
