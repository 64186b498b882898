"""The accuracy report: what is measured about a point, independently of how it was found."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from bilevel.oracle import Oracle
from bilevel.problem import BilevelProblem
from bilevel.solution import Accuracy
from implicit import (
    CG,
    LBFGS,
    GradientGraph,
    Hessian,
    LinearSolver,
    NewtonCG,
    SpectralProjectedGradient,
    lanczos,
    tree,
)
from implicit.derivatives import value_and_gradient
from implicit.hypergradient import Hypergradient, hypergradient, measure_accuracy
from implicit.minimizers import ProjectedObjective, gradient_objective, graph_objective
from implicit.tree import Tree

PROBES = 20
"""Products spent on looking for negative curvature of the lower level."""
SAFETY = 2.0
"""Factor on the estimated distance: the estimate is right to first order only."""
QUICK = CG(rtol=1e-4, max_steps=100)
"""The linear solver of reports on minibatch runs: a report on all data must not cost more than the run."""
NOT_CONVEX = "the hyper-objective is not convex along a direction tested at the solution"
SADDLE = "the lower Hessian has a direction of negative curvature at (x, y)"
LEFT_OVER = 0.05
"""CG on the upper level stops at this fraction of its first residual."""


def solve_lower(
    fn: Callable[[Tree], Tensor], y: Tree, problem: BilevelProblem, reference: float = 0.0, *, first_order: bool = False
) -> Tree:
    """Minimize ``fn`` over the lower set from y, until the gradient is 1e-12 of ``reference`` (of the gradient at y, if
    that is larger), or to rounding. From a warm start the gradient at y alone would ask for the impossible."""
    start = tree.ravel(tree.detach(y))
    rtol = max(1e-12, 10 * float(torch.finfo(start.dtype).eps))
    objective = gradient_objective(fn, y, "lower")
    if not problem.lower_set.is_whole_space:
        projected = ProjectedObjective(
            objective, lambda flat: tree.ravel(problem.lower_set.project(tree.unravel(flat, y)))
        )
        state, _ = SpectralProjectedGradient(rtol=rtol).run(projected, start, reference)
    elif first_order:
        state, _ = LBFGS(rtol=rtol).run(objective, start, reference)
    else:
        with_graph = graph_objective(lambda _, q: fn(q), (), y, "lower")
        state, _ = NewtonCG(rtol=rtol).run(with_graph, start, reference)
    return tree.unravel(state.point, y)


def twice_differentiable(oracle: Oracle, x: Tree, y: Tree, level: str = "lower") -> bool:
    """Whether the backward pass of the objective of ``level`` can be differentiated; some fused kernels refuse."""
    try:
        graph = GradientGraph(getattr(oracle, level), x, y)
        graph.joint(graph.gradient)
    except (RuntimeError, ValueError):  # the engine explains torch's refusal by a ValueError
        return False
    return True


def stationarity(problem: BilevelProblem, x: Tree, h: Tree) -> float:
    """``||x - P_X(x - h)||``; the norm of h without a set."""
    if problem.upper_set.is_whole_space:
        return float(tree.norm(h))
    return float(tree.norm(tree.sub(x, problem.upper_set.project(tree.sub(x, h)))))


def lower_residual(problem: BilevelProblem, oracle: Oracle, x: Tree, y: Tree) -> float:
    """``||grad_y g||``, or ``||y - P(y - grad_y g)||`` with a lower set."""
    _, gradient = value_and_gradient(lambda q: oracle.lower(x, q), y)
    if problem.lower_set.is_whole_space:
        return float(tree.norm(gradient))
    return float(tree.norm(tree.sub(y, problem.lower_set.project(tree.sub(y, gradient)))))


def assess_implicit(
    problem: BilevelProblem, oracle: Oracle, x: Tree, y: Tree, solver: LinearSolver, adjoint: Tree | None
) -> tuple[Accuracy, Hypergradient]:
    """The report of one implicit hypergradient at (x, y), without the distance."""
    graph = oracle.graph(x, y)
    found = hypergradient(
        oracle.upper, oracle.lower, x, y, linear_solver=solver, adjoint=adjoint, graph=graph, accuracy=False
    )
    report = measure_accuracy(
        oracle.upper, oracle.lower, x, y, graph, found.value, found.linear, solver, problem.strong_convexity
    )
    notes = () if found.linear.success else (f"adjoint system: {found.linear.message}",)
    lowest = lowest_curvature(graph)
    if lowest < 0:
        notes = (*notes, f"{SADDLE} (eigenvalue at most {lowest:.3g}): y is a saddle point, not a lower solution")
    return (
        Accuracy(
            lower_residual=report.lower_residual,
            lower_error=report.lower_error,
            linear_residual=report.linear_residual,
            stationarity=stationarity(problem, x, found.value),
            hypergradient_error=report.error,
            hypergradient_error_kind=report.kind,
            notes=notes,
        ),
        found,
    )


def saddle_note(accuracy: Accuracy) -> str | None:
    """The note that y is a saddle point, if the report has one."""
    return next((note for note in accuracy.notes if note.startswith(SADDLE)), None)


def lowest_curvature(graph: GradientGraph) -> float:
    """A Ritz value of g_yy from a random start, negative only where g_yy has a negative eigenvalue; zero otherwise.

    The adjoint system alone sees the directions that grad_y f excites, and can be solved at a saddle of g.
    """
    spectrum = lanczos(Hessian.of(graph), steps=PROBES)
    return spectrum.smallest if spectrum.smallest < -1e-6 * abs(spectrum.largest) else 0.0


class ImplicitMap:
    """x -> accurate hypergradient, lower level and adjoint warm-started; counts its calls."""

    def __init__(
        self, problem: BilevelProblem, oracle: Oracle, y: Tree, adjoint: Tree, solver: LinearSolver, reference: float
    ) -> None:
        self.problem, self.oracle, self.y, self.adjoint = problem, oracle, y, adjoint
        self.solver, self.reference = solver, reference

    def __call__(self, x: Tree) -> Tree:
        self.y = solve_lower(lambda q: self.oracle.lower(x, q), self.y, self.problem, self.reference)
        found = hypergradient(
            self.oracle.upper,
            self.oracle.lower,
            x,
            self.y,
            linear_solver=self.solver,
            adjoint=self.adjoint,
            accuracy=False,
        )
        self.adjoint = found.adjoint
        return found.value


def distance_budget(x: Tree, spent: int) -> int:
    """Hypergradients for :func:`distance_to_solution`: enough for an exact answer in small dimensions, else a quarter
    of what the run itself has ``spent``."""
    n = tree.size(x)
    return n if n <= 16 else max(4, spent // 4)


def distance_to_solution(
    problem: BilevelProblem, hyper: Callable[[Tree], Tree], x: Tree, h: Tree, budget: int
) -> tuple[float | None, str | None]:
    """Estimate ``||x - x*||`` as the length of a Newton correction of the upper level, times :data:`SAFETY`.

    Solves ``P B P d = P r`` by CG, with B the Hessian of the hyper-objective from differences of hypergradients, r
    the projected-gradient residual and P the derivative of the projection onto X (the identity without a set). What
    CG leaves over is bounded by its own smallest Ritz value.

    Args:
        problem: for the upper set.
        hyper: x -> accurate hypergradient.
        x: the point.
        h: the hypergradient there.
        budget: how many hypergradients may be spent.

    Returns:
        The estimate, or None and the reason.
    """
    flat, gradient = tree.ravel(x), tree.ravel(h)
    eps = float(torch.finfo(flat.dtype).eps)

    def project(point: Tensor) -> Tensor:
        return tree.ravel(problem.upper_set.project(tree.unravel(point, x)))

    target = flat - gradient
    landed = project(target)
    residual = flat - landed
    size = float(torch.linalg.vector_norm(residual))
    scale = float(torch.linalg.vector_norm(flat)) + 1.0

    def tangent(v: Tensor) -> Tensor:
        if problem.upper_set.is_whole_space:
            return v
        width = eps**0.5 * scale / (float(torch.linalg.vector_norm(v)) + 1e-300)
        return (project(target + width * v) - landed) / width

    base = tree.ravel(hyper(x))

    def curvature(v: Tensor) -> Tensor:
        norm = float(torch.linalg.vector_norm(v))
        if norm == 0.0:
            return torch.zeros_like(v)
        width = eps ** (1 / 3) * scale / norm
        return tangent((tree.ravel(hyper(tree.unravel(flat + width * v, x))) - base) / width)

    generator = torch.Generator().manual_seed(0)
    probe = tangent(torch.randn(flat.shape, generator=generator, dtype=flat.dtype).to(flat.device))
    if float(probe @ curvature(probe)) < -(eps ** (1 / 3)) * float(probe @ probe):
        # Whatever the gradient is: this is a maximum or a saddle of F.
        return None, NOT_CONVEX
    if size == 0.0:
        return 0.0, None
    r = tangent(residual)
    normal = float(torch.linalg.vector_norm(residual - r))
    d, p = torch.zeros_like(r), r.clone()
    rr = float(r @ r)
    first = math.sqrt(rr)
    alphas: list[float] = []
    betas: list[float] = []
    for _ in range(min(budget, flat.numel())):
        if math.sqrt(rr) <= LEFT_OVER * first:
            break
        bp = curvature(p)
        pbp = float(p @ bp)
        if not pbp > 0:
            return None, NOT_CONVEX
        alphas.append(rr / pbp)
        d, r = d + alphas[-1] * p, r - alphas[-1] * bp
        betas.append(float(r @ r) / rr)
        p = r + betas[-1] * p
        rr *= betas[-1]
    rest = 0.0
    if math.sqrt(rr) > LEFT_OVER * first:
        if not alphas:
            return None, "no hypergradient was left to measure the curvature of the hyper-objective"
        rest = math.sqrt(rr) / _smallest_ritz(alphas, betas)
    return SAFETY * (normal + float(torch.linalg.vector_norm(d)) + rest), None


def _smallest_ritz(alphas: list[float], betas: list[float]) -> float:
    """Smallest eigenvalue of the Lanczos matrix behind CG."""
    n = len(alphas)
    t = torch.zeros(n, n, dtype=torch.float64)
    for k in range(n):
        t[k, k] = 1.0 / alphas[k] + (betas[k - 1] / alphas[k - 1] if k else 0.0)
        if k + 1 < n:
            t[k, k + 1] = t[k + 1, k] = math.sqrt(betas[k]) / alphas[k]
    return max(float(torch.linalg.eigvalsh(t)[0]), torch.finfo(torch.float64).tiny)
