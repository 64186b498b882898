"""An independent check of any point of a bilevel problem."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bilevel.flat import FlatProblem
from bilevel.lower_multipliers import recover_multipliers
from bilevel.lower_search import Search, search_lower_level
from bilevel.problem import BilevelProblem
from bilevel.upper_stationarity import Stationarity, upper_stationarity
from constrained import KKTResidual
from constrained.multipliers import FlatMultipliers
from implicit import Status, tree
from implicit.tree import Tree

FLOOR = 1e3
"""Multiples of eps(dtype) below which a tolerance cannot be checked."""
STARTS = 5
"""Random starts of the lower level besides y, by default."""
IRREGULAR = 1e-2
"""A minimizer with a larger KKT residual has no multipliers."""


@dataclass(frozen=True, repr=False, eq=False, kw_only=True)
class Verification:
    """What :func:`verify` found out about (x, y).

    Attributes:
        accepted: whether (x, y) satisfies all constraints and no lower feasible point with a smaller g was found,
            within ``tolerance``. Also the truth value of this object.
        proved: whether that is certain. A violation and a better y are; that there is none is proved where the lower
            level is a convex quadratic program (as its derivatives at three points tell), which was solved.
        reasons: why not, one sentence each; empty if accepted.
        notes: what limits the check, or is worth knowing and does not decide.
        tolerance: the one in use: the requested, but at least a thousand roundings of the dtype.
        upper_feasibility, lower_feasibility: largest violation of the level's constraints and set at (x, y), rows
            divided by ``max(1, |gradient|)``.
        optimality_gap: g(x, y) minus the smallest value at a lower feasible point that was found; negative where y
            gains from a violation within the tolerance. None if no lower feasible point was found.
        lower_value: g(x, y).
        lower_kkt: residuals of the lower optimality conditions at y, with ``multipliers``; None if too large.
        multipliers: of the lower constraints at y, by nonnegative least squares, named as declared.
        better_y: the lower feasible point with the smallest g, if that is smaller by more than the tolerance.
        stationarity: a first-order measure of the upper level, which does not decide; None where none is available,
            and then a note says why.
    """

    accepted: bool
    proved: bool
    reasons: tuple[str, ...]
    notes: tuple[str, ...]
    tolerance: float
    upper_feasibility: float
    lower_feasibility: float
    optimality_gap: float | None
    lower_value: float
    lower_kkt: KKTResidual | None
    multipliers: dict[str, Tree]
    better_y: Tree | None
    stationarity: float | None

    def __bool__(self) -> bool:
        return self.accepted

    def __str__(self) -> str:
        gap = "not known" if self.optimality_gap is None else f"{self.optimality_gap:.3g}"
        verdict = "not accepted" if not self.accepted else "accepted, with proof," if self.proved else "accepted"
        lines = [
            f"{verdict} at tolerance {self.tolerance:.3g}",
            f"  upper feasibility  {self.upper_feasibility:.3g}",
            f"  lower feasibility  {self.lower_feasibility:.3g}",
            f"  optimality gap     {gap} (g = {self.lower_value:.8g})",
        ]
        if self.lower_kkt is not None:
            kkt = self.lower_kkt
            lines.append(
                f"  lower KKT          stationarity {kkt.stationarity:.3g}, feasibility {kkt.feasibility:.3g}, "
                f"complementarity {kkt.complementarity:.3g}"
            )
        lines.append(f"  stationarity       {'-' if self.stationarity is None else format(self.stationarity, '.3g')}")
        lines += [f"  because: {reason}" for reason in self.reasons]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)

    __repr__ = __str__


def verify(
    problem: BilevelProblem,
    x: Tree,
    y: Tree,
    *,
    tolerance: float = 1e-6,
    starts: int = STARTS,
    generator: torch.Generator | None = None,
) -> Verification:
    """Check that (x, y) is bilevel feasible, independently of how it was found.

    1. The sets and constraints of both levels hold, rows divided by ``max(1, |gradient|)``.
    2. No y' with a smaller g(x, y') is found: the lower level is minimized from y and from elsewhere, every end is
       moved onto the lower constraints up to rounding, and the smallest value g' counts. ``g(x, y) - g'`` must not
       exceed ``tolerance max(1, |g(x, y)|)``.

    With at most 8 unknowns, 2,048 quasi-random points are compared first (with finite bounds, within these; otherwise
    up to a hundred times the size of y), and minimization starts at the lowest of them; with more, at ``starts`` random
    points. For a nonconvex lower level that is a search and no proof: not accepted is certain, accepted is not.

    The residuals of the lower optimality conditions and the stationarity of the upper level are reported and do not
    decide. Where the lower constraints satisfy no constraint qualification, solutions need not be KKT points.

    Args:
        problem: the declaration. Data are used in full.
        x, y: the point, shaped as for :func:`solve`.
        tolerance: on violations, and on the gap relative to ``max(1, |g|)``. Raised to a thousand roundings of the
            dtype: 1.2e-4 in float32.
        starts: random starts of the lower level besides y.
        generator: a CPU generator for the starts; one seeded with 0 by default. Its state is not changed.

    Returns:
        A :class:`Verification`; print it for a report.

    Raises:
        TypeError, ValueError: if an argument or the problem is misdeclared.

    The cost is one solve of the lower level from y, at most 32 + ``starts`` more from elsewhere (in one batch if y and
    the constraints have at most 64 entries together and ``torch.func.vmap`` accepts the functions, otherwise
    ``starts``), and with at most 8 unknowns some 10,000 batched evaluations of the lower functions.

    Example:
        >>> import torch, bilevel
        >>> problem = bilevel.BilevelProblem(
        ...     upper=lambda x, y: (x - 1) ** 2 + y**2, lower=lambda x, y: (y**2 - x) ** 2 + y / 10
        ... )
        >>> x = torch.tensor(1.0, dtype=torch.float64)
        >>> bool(bilevel.verify(problem, x, -torch.tensor(1.012272, dtype=torch.float64)))
        True
        >>> found = bilevel.verify(problem, x, torch.tensor(0.98725, dtype=torch.float64))
        >>> found.accepted, round(float(found.better_y), 4), round(found.optimality_gap, 4)
        (False, -1.0123, 0.2)
    """
    _check_arguments(problem, tolerance, starts, generator)
    _check_trees(x, y)
    allowed = max(tolerance, FLOOR * float(torch.finfo(tree.common_dtype(y, "y")).eps))
    own = torch.Generator().manual_seed(0)
    if generator is not None:
        own.set_state(generator.get_state())
    broken = [f"{name} contains NaN or infinity" for name, point in (("x", x), ("y", y)) if not tree.all_finite(point)]
    if broken:
        return _nothing(broken, allowed)
    flat = FlatProblem(problem, x, y)
    return verify_flat(flat, flat.flat_x(x).detach(), flat.flat_y(y).detach(), allowed, starts, own)


def verify_flat(
    flat: FlatProblem, x: Tensor, y: Tensor, tolerance: float, starts: int, generator: torch.Generator
) -> Verification:
    """:func:`verify` at finite vectors, for algorithms that have a :class:`FlatProblem`, which counts the calls."""
    violations = flat.violations(x, y)
    with torch.no_grad():
        value = float(flat.lower(x, y))
    if not math.isfinite(value):
        return replace(
            _nothing([f"lower(x, y) is {value}"], tolerance),
            upper_feasibility=violations["upper"],
            lower_feasibility=violations["lower"],
            lower_value=value,
        )
    search = search_lower_level(flat, x, y, starts=starts, generator=generator)
    found = recover_multipliers(flat, x, y)
    kkt = None if found is None else found[1]
    reached = search.y is not None and search.violation <= tolerance
    gap = value - search.value if reached else None
    better = gap is not None and not gap <= tolerance * max(1.0, abs(value))
    reasons = [
        *_upper_reasons(flat, violations["upper"], tolerance),
        *_lower_reasons(flat, violations["lower"], search, tolerance),
    ]
    if better and gap is not None:
        reasons.append(_better_reason(flat, search, gap, value))
    open_end = gap is None and violations["lower"] <= tolerance
    if open_end:
        reasons.append("no lower feasible point was found to compare y with, so that its optimality is not established")
    notes = [*flat.notes, *search.notes]
    if kkt is not None and not better and gap is not None and not kkt.largest <= IRREGULAR:
        notes.append(
            f"y has no smaller value beside it, but is no KKT point of the lower level (residual {kkt.largest:.3g}): "
            "its constraints seem to satisfy no constraint qualification at y, and the gap decides"
        )
    named = {} if found is None else _named(flat, found[0])
    if better or (kkt is not None and not kkt.largest <= IRREGULAR):
        why = "does not solve the lower level" if better else "is no KKT point of the lower level"
        upper = Stationarity(value=None, notes=(f"stationarity is not measured: y {why}",))
    else:
        duals = search.own.multipliers if found is None else found[0]
        upper = _stationarity(flat, x, y, duals, tolerance)
    notes += upper.notes
    return Verification(
        accepted=not reasons,
        proved=(search.own.convex and search.own.status is Status.CONVERGED) or (bool(reasons) and not open_end),
        reasons=tuple(reasons),
        notes=tuple(notes),
        tolerance=tolerance,
        upper_feasibility=violations["upper"],
        lower_feasibility=violations["lower"],
        optimality_gap=gap,
        lower_value=value,
        lower_kkt=kkt,
        multipliers=named,
        better_y=flat.y_tree(search.y) if better and search.y is not None else None,
        stationarity=upper.value,
    )


def _nothing(reasons: list[str], tolerance: float) -> Verification:
    """A refusal of a point at which nothing can be measured."""
    return Verification(
        accepted=False,
        proved=True,
        reasons=tuple(reasons),
        notes=(),
        tolerance=tolerance,
        upper_feasibility=math.nan,
        lower_feasibility=math.nan,
        optimality_gap=None,
        lower_value=math.nan,
        lower_kkt=None,
        multipliers={},
        better_y=None,
        stationarity=None,
    )


def _stationarity(flat: FlatProblem, x: Tensor, y: Tensor, duals: FlatMultipliers, tolerance: float) -> Stationarity:
    try:
        return upper_stationarity(flat, x, y, duals, tolerance)
    except (RuntimeError, ValueError) as error:
        return Stationarity(value=None, notes=(f"stationarity was not measured: {error}",))


def _named(flat: FlatProblem, found: FlatMultipliers) -> dict[str, Tree]:
    return flat.multipliers(found.inequality, found.equality, found.lower, found.upper)


def _upper_reasons(flat: FlatProblem, violation: float, tolerance: float) -> list[str]:
    if violation <= tolerance:
        return []
    return [f"the upper constraints are violated by {violation:.3g} at (x, y), which exceeds {tolerance:.3g}"]


def _lower_reasons(flat: FlatProblem, violation: float, search: Search, tolerance: float) -> list[str]:
    if violation <= tolerance:
        return []
    reasons = [f"the lower constraints are violated by {violation:.3g} at (x, y), which exceeds {tolerance:.3g}"]
    if search.y is None or search.violation > tolerance:
        least = "" if search.y is None else f" (the least violation found is {search.violation:.3g})"
        reasons.append(f"no y was found that is lower feasible at x{least}: choose another x")
    return reasons


def _better_reason(flat: FlatProblem, search: Search, gap: float, value: float) -> str:
    assert search.y is not None
    if search.own.status is Status.UNBOUNDED or not math.isfinite(search.value):
        return f"lower seems to be unbounded below at x: it is {search.value:.3g} at y = {_shown(flat, search.y)}"
    return (
        f"y is not a minimizer of lower at x: y = {_shown(flat, search.y)} has a value lower by {gap:.3g} "
        f"({search.value:.8g} instead of {value:.8g}); solve the lower level again from there (.better_y)"
    )


def _shown(flat: FlatProblem, y: Tensor) -> str:
    entries = ", ".join(f"{v:.6g}" for v in y[:6].tolist())
    return f"[{entries}{', ...' if len(y) > 6 else ''}]"


def _check_arguments(problem: object, tolerance: object, starts: object, generator: object) -> None:
    if not isinstance(problem, BilevelProblem):
        raise TypeError(f"problem must be a bilevel.BilevelProblem, got {type(problem).__name__}")
    if not (isinstance(tolerance, int | float) and 0 < tolerance < math.inf):
        raise ValueError(f"tolerance must be a positive number, got {tolerance!r}")
    if not isinstance(starts, int) or isinstance(starts, bool) or starts < 0:
        raise ValueError(f"starts must be an integer of at least 0, got {starts!r}")
    if generator is not None and not (isinstance(generator, torch.Generator) and generator.device.type == "cpu"):
        raise TypeError("generator must be a torch.Generator on the CPU, or None")


def _check_trees(x: Tree, y: Tree) -> None:
    for name, point in (("x", x), ("y", y)):
        if not tree.leaves(point):
            raise ValueError(f"{name} has no tensors")
        for path, leaf in zip(tree.paths(point), tree.leaves(point), strict=True):
            if not isinstance(leaf, Tensor):
                raise TypeError(f"{name}{path} must be a tensor, got {type(leaf).__name__}; use torch.tensor(...)")
            if not leaf.is_floating_point():
                raise TypeError(f"{name}{path} has dtype {leaf.dtype}; variables must be floating point: .double()")
            if torch.finfo(leaf.dtype).bits < 32:
                raise TypeError(f"{name}{path} has dtype {leaf.dtype}, too coarse to check anything: .float()")
