"""``solve(problem, "auto")``: an algorithm by the declared structure and the curvature of the lower level."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from bilevel.accuracy import twice_differentiable
from bilevel.algorithms.base import Algorithm, restrictions
from bilevel.measure import draw_oracles
from bilevel.oracle import Oracle, new_counts
from bilevel.probes import beside
from bilevel.problem import BilevelProblem
from bilevel.registry import algorithms
from bilevel.solution import Solution, Start
from bilevel.verify import verify
from implicit import Hessian, SolveError, Status, lanczos, tree
from implicit.tree import Tree

AUTO = "auto"
SMALL = 200
"""Unknowns of the optimality system (x, y and one multiplier per lower row and bound) up to which its matrices, several
starts and a check of the end are cheap."""
DENSE = 300
"""Numbers in y up to which all eigenvalues of g_yy are computed; beyond, the extremes of a Lanczos run."""
LANCZOS_STEPS = 30
SINGULAR = 1e-8
"""An eigenvalue of g_yy below this fraction of the largest counts as zero, and one below minus it as negative."""
SINGULAR_RITZ = 1e-5
"""The same for a Lanczos run, whose smallest value is an overestimate."""
NEIGHBOURS = 8
"""Points around the start where the curvature is measured too: one point says little about a level that is not
quadratic."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """An algorithm for a problem.

    Attributes:
        algorithm: with its default settings.
        reason: one or two sentences: what was declared and measured, and what follows.
        fallback: what to try if the first ends without a verified point, or None.
    """

    algorithm: Algorithm
    reason: str
    fallback: Algorithm | None = None


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What the lower level looks like.

    Attributes:
        smallest, largest: extreme eigenvalues of g_yy over all points looked at; NaN without second derivatives.
        shape: ``"strongly convex"``, ``"singular"``, ``"nonconvex"`` or ``"unknown"``.
        said: the same as a phrase.
    """

    smallest: float
    largest: float
    shape: str
    said: str


def choose(problem: BilevelProblem, x0: Tree, y0: Tree) -> Choice:
    """The algorithm that "auto" takes for ``problem`` from this start.

    What restricts y decides first. Constraint functions go to :class:`KKTRelaxation` on small problems, to
    :class:`LVHBA` on large ones and on minibatches; a lower set with a projection goes to :class:`KKTRelaxation` on
    small problems, else to :class:`Penalty`. Without any of them the eigenvalues of g_yy are measured at the start and,
    on small problems, at eight points around it: all positive means :class:`ImplicitGradient`, some zero means
    :class:`Penalty`; negative ones mean :class:`KKTRelaxation` with its several starts on small problems and
    :class:`Penalty` on large ones. Of these the first that is registered and does not refuse the problem is taken; the
    next one is the fallback.

    Args:
        problem: the declaration.
        x0, y0: where the run would start.

    Raises:
        TypeError, ValueError: if the problem or its start is misdeclared, or no algorithm fits, with the reasons.

    Example:
        >>> import torch, bilevel
        >>> problem = bilevel.BilevelProblem(lambda x, y: (y - 1).square() + x.square(), lambda x, y: (y - x).square())
        >>> bilevel.choose(problem, torch.tensor(0.0), torch.tensor(0.0)).algorithm.name
        'ImplicitGradient'
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run validates again, aloud
        problem.validate(x0, y0)
    order, why = _order(problem, x0, y0, unknowns(problem, x0, y0) <= SMALL)
    known = algorithms()
    names = [*(name for name in order if name in known), *(name for name in known if name not in order)]
    reasons = {name: known[name]().refuses(problem) for name in names}
    fitting = [known[name]() for name, reason in reasons.items() if reason is None]
    if not fitting:
        raise ValueError(f"no algorithm fits this problem: {'; '.join(str(reason) for reason in reasons.values())}")
    spared = [f"{name} does not fit ({reasons[name]})" for name in order if name in known and reasons[name] is not None]
    first = fitting[0]
    named = [candidate for candidate in fitting[1:] if candidate.name in order]
    aside = f"; {'; '.join(spared)}" if spared and first.name != order[0] else ""
    return Choice(
        algorithm=first,
        reason=f"{first.name}: x has {tree.size(x0):,} and y has {tree.size(y0):,} numbers, {why}{aside}",
        fallback=named[0] if named else None,
    )


def unknowns(problem: BilevelProblem, x: Tree, y: Tree) -> int:
    """The size of the optimality system of the lower level together with x."""
    with torch.no_grad():
        rows = [tree.size(problem.constraint(name, x, y)) for name in problem.constraints if name.startswith("lower")]
    sides = 0 if problem.lower_set.is_whole_space else 2 * tree.size(y)
    return tree.size(x) + tree.size(y) + sum(rows) + sides


def _order(problem: BilevelProblem, x0: Tree, y0: Tree, small: bool) -> tuple[list[str], str]:
    """Names of algorithms, the best first, and why."""
    declared = restrictions(problem)
    exact = ["KKTRelaxation"] if small and not problem.stochastic else []
    if problem.constraints:
        what = f"{', '.join(problem.constraints)} declared"
        if problem.stochastic:
            return ["LVHBA", "Penalty"], f"{what}, minibatches"
        if small:
            return [*exact, "LVHBA", "Penalty"], f"{what}, small enough for its optimality system"
        return ["LVHBA", "Penalty"], f"{what}, too large for an optimality system with matrices"
    if "lower_set" in declared:
        said = "y in a set with a projection"
        return [*exact, "Penalty", "LVHBA"], f"{said}, small enough for its optimality system" if exact else said
    probe = probe_lower_level(problem, x0, y0, small)
    said = f"no constraint on y{', minibatches' if problem.stochastic else ''}, {probe.said}"
    if probe.shape == "strongly convex":
        return ["ImplicitGradient", *exact, "Penalty"], said
    if probe.shape == "nonconvex":
        return [*exact, "Penalty", "ImplicitGradient"], said
    return ["Penalty", *exact], said


def probe_lower_level(problem: BilevelProblem, x0: Tree, y0: Tree, around: bool = True) -> Probe:
    """Extreme eigenvalues of g_yy at the start and, if asked, at points around it.

    Up to :data:`DENSE` numbers in y they are those of the matrix, beyond that of a Lanczos run, which sees the smallest
    one late. On minibatches two draws are looked at. Points where g is not finite are passed over.
    """
    if problem.strong_convexity is not None:
        mu = problem.strong_convexity
        return Probe(
            smallest=mu, largest=float("nan"), shape="strongly convex", said=f"strong convexity {mu:g} declared"
        )
    oracles = draw_oracles(problem, new_counts())[:2]
    if not twice_differentiable(oracles[0], tree.detach(x0), tree.detach(y0)):
        said = "a lower objective whose gradient cannot be differentiated"
        return Probe(smallest=float("nan"), largest=float("nan"), shape="unknown", said=said)
    points = [(tree.detach(x0), tree.detach(y0))]
    if around:
        generator = torch.Generator().manual_seed(0)
        points += [(problem.upper_set.project(beside(x0, generator)), beside(y0, generator)) for _ in range(NEIGHBOURS)]
    dense = tree.size(y0) <= DENSE
    found = [_extremes(oracle, x, y, dense) for oracle in oracles for x, y in points]
    finite = [pair for pair in found if pair is not None]
    if not finite:
        said = "a lower objective without finite curvature"
        return Probe(smallest=float("nan"), largest=float("nan"), shape="unknown", said=said)
    eps = torch.finfo(tree.common_dtype(y0)).eps
    zero = max(SINGULAR if dense else SINGULAR_RITZ, 1e3 * eps)
    smallest, largest = min(low for low, _ in finite), max(high for _, high in finite)
    size = max(abs(largest), abs(smallest))
    if any(low < -zero * max(abs(low), abs(high)) for low, high in finite):
        shape = "nonconvex"
    elif any(low <= zero * max(abs(low), abs(high)) for low, high in finite):
        shape = "singular"
    else:
        shape = "strongly convex"
    many = f"{len(points)} points" if around else "the start"
    tail = {
        "nonconvex": "not convex in y",
        "singular": "convex but singular, so that y may not be unique",
        "strongly convex": "strongly convex there",
    }[shape]
    shown = 0.0 if abs(smallest) <= zero * size else smallest
    return Probe(
        smallest=smallest,
        largest=largest,
        shape=shape,
        said=f"eigenvalues of g_yy from {shown:.3g} to {largest:.3g} at {many}: {tail}",
    )


def _extremes(oracle: Oracle, x: Tree, y: Tree, dense: bool) -> tuple[float, float] | None:
    """The smallest and the largest eigenvalue of g_yy; None where it is not finite."""
    hessian = Hessian(lambda q: oracle.lower(x, q), y)
    if dense:
        matrix = hessian.to_dense()
        if not bool(torch.isfinite(matrix).all()):
            return None
        values = torch.linalg.eigvalsh(0.5 * (matrix + matrix.T))
        return float(values[0]), float(values[-1])
    spectrum = lanczos(hessian, LANCZOS_STEPS)
    pair = spectrum.smallest, spectrum.largest
    return pair if all(v == v and abs(v) != float("inf") for v in pair) else None


Attempt = Callable[[Algorithm, int | None, float | None], Solution]


def solve_automatically(
    problem: BilevelProblem, x0: Tree, y0: Tree, attempt: Attempt, max_steps: int | None, time_limit: float | None
) -> Solution:
    """Run the choice and, where it ends without a verified point and budget is left, its fallback.

    A run that is UNBOUNDED at a point that is accepted is an answer.

    Args:
        problem, x0, y0: what to solve, from where.
        attempt: runs one algorithm with a step and a time budget; it must not raise on numerical failures.
        max_steps, time_limit: of both runs together.

    Returns:
        The better of both, with ``choice`` and, if both ran, what each led to in ``starts``; seconds and counts are
        those of both together. On small full-batch problems the end is verified, and CONVERGED becomes STALLED where
        that fails.
    """
    choice = choose(problem, x0, y0)
    checked = not problem.stochastic and unknowns(problem, x0, y0) <= SMALL
    refused: ValueError | None = None
    try:
        first = _confirmed(problem, attempt(choice.algorithm, max_steps, time_limit), checked)
    except ValueError as error:  # its own reasons against this start; misuse stops the fallback as well
        if choice.fallback is None:
            raise
        first, refused = None, error
    if first is not None and not _unsettled(first, checked):
        return replace(first.solution, choice=choice.reason)
    left = max_steps, time_limit
    if first is not None:
        spent = first.solution
        left = (
            None if max_steps is None else max_steps - spent.steps,
            None if time_limit is None else time_limit - spent.seconds,
        )
    if choice.fallback is None or any(budget is not None and budget <= 0 for budget in left):
        assert first is not None
        return replace(first.solution, choice=choice.reason)
    try:
        second = _confirmed(problem, attempt(choice.fallback, *left), checked)
    except ValueError:
        if first is None:
            assert refused is not None
            raise refused from None
        return replace(first.solution, choice=choice.reason)
    if first is None:
        return replace(second.solution, choice=f"{choice.fallback.name}: {choice.algorithm.name} refused ({refused})")
    return _better(choice, first, second)


@dataclass(frozen=True)
class _Ended:
    """A run and whether its point was accepted; None where that was not checked."""

    solution: Solution
    accepted: bool | None

    @property
    def rank(self) -> tuple[bool, bool, bool, float]:
        """The smaller the better."""
        solution, value = self.solution, self.solution.upper_value
        failed = solution.status.is_failure
        return not self.accepted, failed, not solution.success, value if value == value else float("inf")


def _confirmed(problem: BilevelProblem, solution: Solution, checked: bool) -> _Ended:
    if not checked:
        return _Ended(solution, solution.success)
    try:
        found = verify(problem, solution.x, solution.y)
    except (ValueError, SolveError, RuntimeError) as error:
        accepted, reasons = False, f"the check failed: {error}"
    except KeyboardInterrupt:
        message = f"{solution.algorithm.name} ended {solution.status.name}, and the check of its point was interrupted"
        return _Ended(replace(solution, status=Status.STOPPED, message=message), None)
    else:
        accepted, reasons = found.accepted, "; ".join(found.reasons)
    if solution.success and not accepted:
        message = f"{solution.algorithm.name} converged to a point that bilevel.verify does not accept: {reasons}"
        solution = replace(solution, status=Status.STALLED, message=message)
    return _Ended(solution, accepted)


def _unsettled(ended: _Ended, checked: bool) -> bool:
    """Whether a second algorithm should try. On large problems a run that used its budget is an answer."""
    status = ended.solution.status
    if status in (Status.STOPPED, Status.TIME_LIMIT):
        return False
    if checked:
        return not (ended.accepted and (ended.solution.success or status is Status.UNBOUNDED))
    return status.is_failure or status is Status.STALLED


def _better(choice: Choice, first: _Ended, second: _Ended) -> Solution:
    best, other = (second, first) if second.rank < first.rank else (first, second)
    if first.solution.status is Status.INFEASIBLE and not second.accepted:
        best, other = first, second  # that no feasible point was found is the answer, and not where another run stopped
    if second.solution.status is Status.UNBOUNDED and second.accepted:
        best, other = second, first  # where the first ended is no minimum then
    counts = dict(best.solution.counts)
    for name, number in other.solution.counts.items():
        counts[name] = counts.get(name, 0) + number
    name, then = first.solution.algorithm.name, second.solution.algorithm.name
    kept = "whose point is better" if best is second else "whose point is not better"
    return replace(
        best.solution,
        counts=counts,
        seconds=first.solution.seconds + second.solution.seconds,
        starts=(*_starts(first), *_starts(second)),
        choice=f"{choice.reason}. {name} ended {first.solution.status.name}, so {then} was tried too, {kept}",
    )


def _starts(ended: _Ended) -> tuple[Start, ...]:
    """What the run reports, or the run itself as one start."""
    solution = ended.solution
    name = solution.algorithm.name
    if solution.starts:
        return tuple(replace(start, name=f"{name}, {start.name}") for start in solution.starts)
    return (
        Start(
            name=name,
            status=solution.status,
            upper_value=solution.upper_value,
            accepted=bool(ended.accepted),
            note=solution.message,
        ),
    )
