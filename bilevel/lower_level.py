"""The lower level at a fixed x, solved on its own."""

from dataclasses import dataclass

import torch
from torch import Tensor

import constrained
from bilevel.flat import FlatProblem
from bilevel.probes import beside, same
from constrained import ConstrainedProblem, KKTResidual, Lagrangian
from constrained.multipliers import FlatMultipliers
from constrained.residual import measure
from implicit import Hessian, Jacobian, Status
from implicit.derivatives import value_and_gradient

QUADRATIC_LIMIT = 2_000
"""Up to this many unknowns and rows the matrices of a quadratic program are formed."""


@dataclass(frozen=True, kw_only=True)
class LowerSolution:
    """A solution of the lower level at one x.

    Attributes:
        y: the point, ``(m,)``.
        multipliers: of its equality and inequality rows and of the bounds on y.
        residual: of the optimality conditions, measured at (y, multipliers).
        status: how the solver ended.
        value: g(x, y).
        convex: whether the level was found to be a convex quadratic program, so that a KKT point is a global minimizer.
    """

    y: Tensor
    multipliers: FlatMultipliers
    residual: KKTResidual
    status: Status
    value: float
    convex: bool = False


def solve_lower_level(
    flat: FlatProblem,
    x: Tensor,
    y: Tensor,
    *,
    multipliers: FlatMultipliers | None = None,
    atol: float | None = None,
    max_steps: int | None = None,
) -> LowerSolution:
    """Minimize g(x, .) over the lower constraints from y.

    A convex quadratic program with affine rows goes to :func:`constrained.solve_qp` (whether it is one is found from
    its derivatives at two more points), everything else to :class:`constrained.InteriorPoint`; an interior-point run
    that does not converge is repeated by :class:`constrained.AugmentedLagrangian` from where it ended. Numerical
    trouble is reported by the status, never raised.

    Args:
        flat: the problem.
        x: ``(n,)``.
        y: where to start, ``(m,)``.
        multipliers: a start for the multipliers.
        atol: on the KKT residual; 1e-8 in float64 and 1e-4 in float32 by default.
        max_steps: of the solver.

    Raises:
        KeyboardInterrupt: if the solver took an interrupt for itself.
    """
    problem = flat.lower_problem(x)
    x, y = x.detach(), y.detach()
    found = _quadratic(flat, problem, x, y) if len(y) <= QUADRATIC_LIMIT else None
    if found is not None:
        return found
    best: LowerSolution | None = None
    start, duals = y, multipliers
    for method in (constrained.InteriorPoint(), constrained.AugmentedLagrangian()):
        given = None if duals is None else Lagrangian(problem, y).multiplier_trees(duals)
        solution = constrained.solve(
            problem, method, start, multipliers=given, atol=atol, max_steps=max_steps, raise_on_failure=False
        )
        pass_on_interrupt(solution.status)
        own = Lagrangian(problem, y).flat_multipliers(*solution.multipliers)
        ended = LowerSolution(
            y=solution.x,
            multipliers=own,
            residual=solution.residual,
            status=solution.status,
            value=solution.objective,
        )
        if best is None or _better(ended, best):
            best = ended
        if solution.status is Status.CONVERGED or not bool(torch.isfinite(solution.x).all()):
            break
        start, duals = solution.x, own
    assert best is not None
    return best


def pass_on_interrupt(status: Status) -> None:
    """Raise what ended a solver without callbacks early: its point answers no question of the caller's."""
    if status is Status.STOPPED:
        raise KeyboardInterrupt


def _better(one: LowerSolution, other: LowerSolution) -> bool:
    worst = one.residual.largest, other.residual.largest
    return one.status is Status.CONVERGED or worst[0] < worst[1] or worst[1] != worst[1]


def _quadratic(flat: FlatProblem, problem: ConstrainedProblem, x: Tensor, y: Tensor) -> LowerSolution | None:
    """The solution by :func:`constrained.solve_qp`, or None where the level is no convex quadratic program."""
    generator = torch.Generator().manual_seed(0)
    points = [y, beside(y, generator), beside(y, generator, 10.0)]
    probe = beside(y, generator)
    curvatures = [Hessian(problem.objective, point) @ probe for point in points]
    if not _all_same(curvatures):
        return None
    level = flat.lower_level
    slopes: dict[str, Jacobian] = {}
    for name in ("inequality", "equality"):
        rows = getattr(problem, name)
        if rows is None:
            continue
        found = [Jacobian(rows, point) for point in points]
        if not _all_same([jacobian @ probe for jacobian in found]):
            return None
        slopes[name] = found[0]
    if len(y) + level.inequalities + level.equalities > QUADRATIC_LIMIT:
        return None
    Q = Hessian(problem.objective, y).to_dense()
    Q = 0.5 * (Q + Q.T)
    lowest = float(torch.linalg.eigvalsh(Q)[0]) if len(y) else 0.0
    if lowest < -1e3 * torch.finfo(y.dtype).eps * float(Q.abs().amax()):
        return None
    _, gradient = value_and_gradient(problem.objective, y, "lower")
    matrices = {name: jacobian.to_dense() for name, jacobian in slopes.items()}
    sides = {name: matrices[name] @ y - slopes[name].value for name in matrices}
    solution = constrained.solve_qp(
        Q,
        gradient - Q @ y,
        A=matrices.get("equality"),
        b=sides.get("equality"),
        G=matrices.get("inequality"),
        h=sides.get("inequality"),
        lower=level.lower,
        upper=level.upper,
        raise_on_failure=False,
    )
    status = solution.status
    assert isinstance(status, Status)
    blank = y.new_zeros(0)
    duals = FlatMultipliers(
        solution.equality if "equality" in matrices else blank,
        solution.inequality if "inequality" in matrices else blank,
        solution.lower,
        solution.upper,
    )
    lagrangian = Lagrangian(problem, y)
    point = lagrangian.at(solution.x)
    residual = KKTResidual(*measure(lagrangian, point, duals).tolist())
    return LowerSolution(
        y=solution.x,
        multipliers=duals,
        residual=residual,
        status=status,
        value=float(point.objective),
        convex=True,
    )


def _all_same(vectors: list[Tensor]) -> bool:
    every = torch.stack(vectors)
    return bool(same(every, every[0], every.abs().amax()).all())
