"""Compare algorithms: run each of them on each case, check what they return, and count what was solved."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch

from bilevel import report
from bilevel.auto import AUTO
from bilevel.comparison import Comparison, Trial
from bilevel.comparison_run import Entrant, Journal, Plan, Source, run_plan
from bilevel.kinds import KINDS, Job, Kind, declarations, kind_of, method
from bilevel.settings import plain
from implicit import runs

JOURNAL, TABLE, RESULT, PICTURE = "compare.jsonl", "compare.csv", "compare.json", "compare.png"
FILES = (JOURNAL, TABLE, RESULT, PICTURE)

Progress = Callable[[Trial, int, int], None]


def compare(
    cases: Any,
    algorithms: Iterable[Any] | Mapping[str, Any] | None = None,
    *,
    start: tuple[Any, ...] | None = None,
    seeds: int = 1,
    max_steps: int | None = None,
    time_limit: float | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Comparison:
    """Run several algorithms on one or several cases and check every answer independently.

    Each run is :func:`bilevel.solve` with the case's start, and its point goes to :func:`bilevel.verify`. Whatever a
    run does, it becomes a row: a refusal, a numerical failure, an exception. Ctrl-C ends the comparison with the runs
    that are done.

    Args:
        cases: a problem, a case of ``problems``, or a sequence of cases; all of one kind.
        algorithms: names or objects, such as ``["Penalty", bilevel.ImplicitGradient(), "auto"]``, or a dict from labels
            to them; None tries every registered algorithm and "auto".
        start: ``(x0, y0)``, for a problem; cases bring theirs.
        seeds: how many runs each, with generators seeded 0, 1, ...
        max_steps: steps of every run; None means what the case suggests, else the algorithm's own.
        time_limit: seconds of every run.
        out: a directory for ``compare.csv``, ``compare.json``, ``compare.png`` and, as runs finish, ``compare.jsonl``;
            an earlier comparison there is moved aside.
        resume: keep the finished runs of ``out``, and run what is missing.
        progress: called after every run with the trial, how many are done, and how many there will be.

    Returns:
        Rows, tallies and texts; printing it shows the tables.

    Raises:
        TypeError, ValueError: for misuse.
        FileNotFoundError: if there is nothing to resume.

    Example:
        >>> import torch, bilevel
        >>> problem = bilevel.BilevelProblem(lambda x, y: (y - 1).square() + x.square(), lambda x, y: (y - x).square())
        >>> found = bilevel.compare(problem, ["ImplicitGradient"], start=(torch.tensor(0.0), torch.tensor(0.0)))
        >>> found.trials[0].status, found.trials[0].verified, round(found.trials[0].value, 3)
        ('CONVERGED', True, 0.5)
    """
    runs.check_budgets(max_steps, time_limit=time_limit)
    if isinstance(seeds, bool) or not isinstance(seeds, int) or seeds < 1:
        raise ValueError(f"seeds must be a positive integer, how many runs each, got {seeds!r}")
    jobs = _jobs(cases, start)
    kind = _one_kind(jobs)
    plan = Plan(
        sources=tuple(Source(name, lambda seed, job=job: job) for name, job in jobs.items()),
        entrants=entrants(kind, algorithms),
        seeds=tuple(range(seeds)),
        max_steps=max_steps,
        time_limit=time_limit,
    )
    journal = None if out is None else open_journal(Path(out), request(plan), resume)
    if resume and out is None:
        raise ValueError("resume=True needs out, the directory of the comparison to go on with")
    found = run_plan(plan, kind=kind.name, journal=journal, progress=progress)
    if out is not None:
        write(found, Path(out), request(plan))
    return found


def entrants(kind: Kind, algorithms: Iterable[Any] | Mapping[str, Any] | None) -> tuple[Entrant, ...]:
    """Labels and methods; None stands for those that ``kind`` tries by default.

    Raises:
        TypeError, ValueError: for a name that nobody has, something that is no method, methods of another kind, and
            labels given twice.
    """
    chosen = kind.entrants() if algorithms is None else algorithms
    if isinstance(chosen, str) or not isinstance(chosen, Iterable):
        raise TypeError(f"algorithms must be a list of names and objects, got {algorithms!r}")
    pairs = list(chosen.items()) if isinstance(chosen, Mapping) else [(None, each) for each in chosen]
    found: dict[str, Entrant] = {}
    for label, each in pairs:
        made = _method(kind, each)
        name = label or (AUTO if made is None else made.name)
        if name in found:
            raise ValueError(f"algorithms has {name!r} twice; give a dict from labels to algorithms to tell them apart")
        found[name] = Entrant(name, made)
    if not found:
        raise ValueError("algorithms is empty; leave it out to try all that fit")
    return tuple(found.values())


def _method(kind: Kind, given: Any) -> Any:
    """An object; None for "auto"."""
    if isinstance(given, str):
        if given.lower() == AUTO:
            return None
        given = method(given)()
    if type(given) not in kind.methods().values() and not hasattr(given, "refuses"):
        known = ", ".join(kind.methods())
        raise TypeError(f"algorithms must be names or objects such as {known} or 'auto', got {given!r}")
    for other in KINDS.values():
        if other is not kind and type(given) in other.methods().values():
            raise ValueError(
                f"{given.name} solves {other.name} problems, but the cases are {kind.name} problems; use some of "
                f"{', '.join(kind.methods())}"
            )
    return given


def _jobs(cases: Any, start: tuple[Any, ...] | None) -> dict[str, Job]:
    kind = kind_of(cases)
    if kind is not None:
        begin = start or kind.start(cases)
        if begin is None or len(begin) != len(kind.starts):
            raise TypeError(f"start must be ({', '.join(kind.starts)}), where the runs begin, got {start!r}")
        return {cases.name: Job(kind=kind, problem=cases, start=tuple(begin))}
    if start is not None:
        raise TypeError("start goes with a problem; cases bring their own")
    several = list(cases) if isinstance(cases, Iterable) else [cases]
    found: dict[str, Job] = {}
    for case in several:
        own = kind_of(getattr(case, "problem", None))
        if own is None:
            raise TypeError(
                f"cases must be {declarations()}, a case of the package problems, or several cases, got "
                f"{type(case).__name__}"
            )
        if case.name in found:
            raise ValueError(f"cases has {case.name!r} twice; rename one: dataclasses.replace(case, name=...)")
        found[case.name] = own.job(case)
    if not found:
        raise ValueError("cases is empty: there is nothing to compare on")
    return found


def _one_kind(jobs: Mapping[str, Job]) -> Kind:
    kinds = {job.kind.name: name for name, job in jobs.items()}
    if len(kinds) > 1:
        listing = " and ".join(f"{case} ({kind})" for kind, case in kinds.items())
        raise ValueError(f"{listing} are cases of different kinds; compare them apart")
    return next(iter(jobs.values())).kind


def request(plan: Plan, texts: Sequence[str] = ()) -> dict[str, Any]:
    """What must be the same for finished runs to be of use: budgets and settings."""
    given = {
        entrant.label: _differences(entrant.method)
        for entrant in plan.entrants
        if entrant.method is not None and _differences(entrant.method)
    }
    return plain(
        {
            "max_steps": plan.max_steps,
            "time_limit": plan.time_limit,
            "settings": sorted(texts),
            "algorithms": given,
            "problem_seeds": plan.seeds != (None,),
        }
    )


def _differences(chosen: Any) -> dict[str, Any]:
    """The settings that are not the defaults."""
    if not is_dataclass(chosen):
        return {}
    plainly = type(chosen)()
    return {
        f.name: plain(getattr(chosen, f.name))
        for f in fields(chosen)
        if plain(getattr(chosen, f.name)) != plain(getattr(plainly, f.name))
    }


def open_journal(folder: Path, asked: dict[str, Any], resume: bool) -> Journal:
    """The journal of ``folder``: of the comparison there, or a new one, for which the old one is moved aside.

    Raises:
        FileNotFoundError, ValueError: if there is nothing to resume, or it was asked for differently.
    """
    journal = Journal(folder / JOURNAL, asked)
    if resume:
        journal.read()
    else:
        report.move_aside(folder, FILES)
        journal.begin()
    return journal


def write(found: Comparison, folder: Path, asked: Mapping[str, Any]) -> list[Path]:
    """``compare.csv``, ``compare.json`` and ``compare.png`` in ``folder``."""
    data = {
        "request": asked,
        "kind": found.kind,
        "missing": found.missing,
        "summary": [vars(tally) for tally in found.summary()],
        "runs": [trial.row() for trial in found.trials],
        "versions": {"bilevel": report.version(), "torch": torch.__version__},
    }
    files = [report.write(folder / TABLE, found.csv().encode()), report.write_json(folder / RESULT, data)]
    return [*files, found.draw(folder / PICTURE)] if found.trials else files
