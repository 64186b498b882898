"""Bilevel problems whose lower level is declared in cvxpy."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bilevel.conic_lower import ConicLower
from bilevel.problem import BilevelProblem
from constrained import Box, ConvexSet, WholeSpace
from implicit.cvx.compiled import from_cvxpy as structure
from implicit.cvx.compiled import objective_constant
from implicit.cvx.declaration import check_problem, compile_problem
from implicit.cvx.program import Limits
from implicit.cvx.solution import Solution
from implicit.status import SolveError
from implicit.tree import Tree

AUXILIARY = "auxiliary"
"""The key of y for the columns that cvxpy's compilation adds."""
PROBES = 20
"""Random points at which an upper set is compared with the bounds that parameters declare."""


@dataclass(frozen=True)
class CvxpyProblem(BilevelProblem):
    """A :class:`BilevelProblem` that knows its starting point and the cvxpy objects it came from.

    Attributes:
        start: ``(x0, y0)``; ``solve`` uses it where none is given.
        parameters: the cvxpy parameters, by the keys or positions of x.
        variables: the cvxpy variables, by the keys of y.
    """

    start: tuple[Tree, Tree] = field(default=((), ()), kw_only=True)
    parameters: Any = field(default=(), kw_only=True)
    variables: Mapping[str, Any] = field(default_factory=dict, kw_only=True)

    def load_into_cvxpy(self, x: Tree, y: Tree) -> None:
        """Write a solution into the values of the cvxpy parameters and variables.

        Raises:
            ValueError: from cvxpy, if a value breaks what its object was declared to be.
        """
        for key, parameter in _keyed(self.parameters):
            parameter.value = x[key].detach().cpu().numpy()
        for key, variable in self.variables.items():
            variable.save_value(y[key].detach().cpu().numpy())


def from_cvxpy(
    problem: Any,
    *,
    parameters: Sequence[Any] | Mapping[str, Any],
    upper: Callable[..., Any],
    upper_set: ConvexSet | None = None,
    upper_inequality: Callable[[Tree, Tree], Any] | None = None,
    upper_equality: Callable[[Tree, Tree], Any] | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    **declaration: Any,
) -> CvxpyProblem:
    """A bilevel problem with the parameters of a convex cvxpy problem as x and its solution as y.

        min f(x, y)  over the parameters x,  where y solves the cvxpy problem at x

    The cvxpy problem is compiled once, to a conic program whose data are affine in the parameters, and written in
    torch: a (convex quadratic) objective, rows and bounds. cvxpy is not called again. A ``Maximize`` problem becomes
    the minimization of minus its objective: ``lower`` has the other sign.

    x has the structure of ``parameters``: a list, a tuple, or a dict with your keys, of tensors shaped like the
    parameters. y is a dict of tensors by the names of the variables. Variables that compilation adds, such as bounds
    of absolute values, are taken out again where an equality determines them; those that stay are the vector
    ``y["auxiliary"]``, which is not there where none stays.

    What becomes of the constraints: rows with one entry and no parameter are the Box ``lower_set``; other linear rows
    are ``lower_inequality`` and ``lower_equality``; a second-order cone ``|v| <= t`` is ``|v|^2 - t^2 <= 0`` and
    ``-t <= 0``. The last two describe the cone exactly, but at its apex t = 0 they have no multipliers: a solution
    there (norms that are exactly zero, as in a group lasso) is hard for every algorithm. Constraints on parameters
    alone, which belong to the upper level, are put there, but for those that need auxiliary columns that stay
    (``norm1(p) <= 2``). Bounds that parameters declare (nonneg, bounds, ...) are the
    Box ``upper_set``, closed also for pos and neg.

    Args:
        problem: a ``cvxpy.Problem`` that follows the rules of disciplined parametrized programming (DPP).
        parameters: all of its parameters. Their values are the start of x.
        upper: f(x, y), or f(x, y, *, batch), as in :class:`BilevelProblem`.
        upper_set: X, in place of the bounds that the parameters declare. It must lie within those: outside, the lower
            level need not be convex.
        upper_inequality, upper_equality: as in :class:`BilevelProblem`.
        dtype, device: of the start. float64 by default, whatever torch's default: constraints are met to its rounding.
        declaration: further fields of :class:`BilevelProblem`: upper_data, metrics, strong_convexity, name.

    Raises:
        TypeError: if an argument is not what it should be.
        ValueError: if the problem is not convex or not DPP, has integer or complex variables, parameters that are not
            listed, have a structure or have no value; variables without a name or with the same; or if it compiles to
            exponential, power or semidefinite cones.
        SolveError: if it has no solution at the parameters' values.

    Example:
        >>> import cvxpy as cp, torch, bilevel
        >>> y, price = cp.Variable(2, name="y", nonneg=True), cp.Parameter(2, value=[0.5, 0.5], nonneg=True)
        >>> lower = cp.Problem(cp.Minimize(cp.sum_squares(y - 1) + price @ y))
        >>> problem = bilevel.from_cvxpy(lower, parameters={"price": price}, upper=lambda x, y: -x["price"] @ y["y"])
        >>> problem.start[1]["y"], problem.constraints
        (tensor([0.7500, 0.7500], dtype=torch.float64), ())
    """
    if not isinstance(parameters, (list, tuple, dict)):
        raise TypeError(f"parameters = {parameters!r}: give a list or a dict of cvxpy.Parameter objects")
    _check_declaration(declaration)
    keyed = _keyed(parameters)
    given = [parameter for _, parameter in keyed]
    check_problem(problem, given, problem.variables() if hasattr(problem, "variables") else [])
    variables = _variables(problem)
    theta = _values(keyed)
    compiled, places = compile_problem(problem, given, list(variables.values()))
    user = np.concatenate([np.arange(p, p + v.size) for p, v in zip(places, variables.values(), strict=True)])
    program = structure(compiled, given, user.tolist())
    like = torch.zeros(0, dtype=dtype, device=device)
    lower = ConicLower(program, objective_constant(compiled, given), user, like)
    shapes = {name: tuple(v.shape) for name, v in variables.items()}
    if lower.added:
        shapes[AUXILIARY] = (lower.added,)
    form = _Form(parameters, shapes, like)
    try:
        point, _ = Solution.apply(theta[None], program)
    except SolveError as error:
        names = ", ".join(parameter.name() for parameter in given)
        raise SolveError(f"at the values of the parameters {names}, where x starts, {error}") from error
    x0, y0 = form.x(theta.to(like)), form.y(lower.y(point[0, : program.n].to(like)))
    if upper_set is None:
        upper_set = _declared_set(program.limits, form, theta)
    else:
        _check_within(upper_set, program.limits, form, theta)
    return CvxpyProblem(
        upper,
        lambda x, y: lower.objective(*form.flat(x, y)),
        upper_set=upper_set,
        lower_set=_box(lower.lower, lower.upper, form.y),
        lower_inequality=(lambda x, y: lower.inequality(*form.flat(x, y))) if lower.inequalities else None,
        lower_equality=(lambda x, y: lower.equality(*form.flat(x, y))) if lower.equalities else None,
        upper_inequality=_joined(upper_inequality, lower.parameter_inequality, lower.parameter_inequalities, form),
        upper_equality=_joined(upper_equality, lower.parameter_equality, lower.parameter_equalities, form),
        start=(x0, y0),
        parameters=parameters,
        variables=variables,
        **declaration,
    )


class _Form:
    """Between trees and vectors; matrices by columns, as cvxpy orders them."""

    def __init__(self, parameters: Any, variables: Mapping[str, tuple[int, ...]], like: Tensor) -> None:
        self.like, self._variables = like, variables
        self._parameters = {key: tuple(p.shape) for key, p in _keyed(parameters)}
        self._kind = type(parameters)

    def flat(self, x: Tree, y: Tree) -> tuple[Tensor, Tensor]:
        """theta and the vector of y."""
        return self.theta(x), _vector(y, self._variables, "y")

    def theta(self, x: Tree) -> Tensor:
        """x as one vector."""
        return _vector(x, self._parameters, "x")

    def x(self, theta: Tensor) -> Tree:
        """theta with the structure of the parameters."""
        found = _parts(theta, self._parameters)
        return found if issubclass(self._kind, dict) else self._kind(found.values())

    def y(self, y: Tensor) -> dict[str, Tensor]:
        """The vector of y by names."""
        return _parts(y, self._variables)


def _vector(point: Tree, shapes: Mapping[Any, tuple[int, ...]], name: str) -> Tensor:
    parts = []
    for key, shape in shapes.items():
        leaf = point[key]
        if tuple(leaf.shape) != shape:
            raise ValueError(f"{name}[{key!r}] has shape {tuple(leaf.shape)}, cvxpy declares {shape}: reshape it")
        parts.append(_reversed_axes(leaf).reshape(-1))
    return torch.cat(parts)


def _parts(vector: Tensor, shapes: Mapping[Any, tuple[int, ...]]) -> dict[Any, Tensor]:
    pieces = vector.split([math.prod(shape) for shape in shapes.values()])
    return {
        key: _reversed_axes(piece.reshape(shape[::-1])).contiguous()
        for (key, shape), piece in zip(shapes.items(), pieces, strict=True)
    }


def _reversed_axes(leaf: Tensor) -> Tensor:
    return leaf.permute(tuple(range(leaf.ndim - 1, -1, -1)))


def _keyed(entries: Any) -> list[tuple[Any, Any]]:
    return list(entries.items()) if isinstance(entries, Mapping) else list(enumerate(entries))


def _check_declaration(declaration: Mapping[str, Any]) -> None:
    owned = [name for name in declaration if name.startswith("lower") or name in ("regularizer", "start", "variables")]
    if owned:
        raise TypeError(f"{owned[0]} comes from the cvxpy problem: leave it out, or declare it there")
    foreign = [name for name in declaration if name not in {f.name for f in fields(BilevelProblem)}]
    if foreign:
        raise TypeError(f"from_cvxpy has no argument {foreign[0]}, and BilevelProblem no such field")


def _variables(problem: Any) -> dict[str, Any]:
    from cvxpy.settings import VAR_PREFIX

    found: dict[str, Any] = {}
    for variable in problem.variables():
        name = variable.name()
        if name == f"{VAR_PREFIX}{variable.id}":
            raise ValueError(
                f"a variable of shape {tuple(variable.shape)} has no name, which is its key in y: "
                "cvxpy.Variable(..., name='w')"
            )
        if name in found:
            raise ValueError(f"two variables have the name {name!r}, which is their key in y: rename one of them")
        if name == AUXILIARY:
            raise ValueError(f"a variable has the name {name!r}, the key of what compilation adds: rename it")
        found[name] = variable
    return found


def _values(keyed: Sequence[tuple[Any, Any]]) -> Tensor:
    for key, parameter in keyed:
        if parameter.value is None:
            raise ValueError(
                f"parameters[{key!r}], {parameter.name()}, has no value: set .value, which is where x starts"
            )
    return torch.as_tensor(np.concatenate([np.asarray(p.value, dtype=float).flatten(order="F") for _, p in keyed]))


def _declared_set(limits: Sequence[Limits], form: _Form, theta: Tensor) -> ConvexSet:
    low, high = torch.full_like(theta, -torch.inf), torch.full_like(theta, torch.inf)
    for limit in limits:
        low[limit.entries], high[limit.entries] = limit.lower, limit.upper
    return _box(low.to(form.like), high.to(form.like), form.x)


def _box(low: Tensor, high: Tensor, shaped: Callable[[Tensor], Tree]) -> ConvexSet:
    bounded = bool((low.isfinite() | high.isfinite()).any())
    return Box(shaped(low), shaped(high)) if bounded else WholeSpace()


def _check_within(upper_set: ConvexSet, limits: Sequence[Limits], form: _Form, theta: Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(PROBES):
        far = theta + 10.0 * (1.0 + theta.abs()) * torch.randn(theta.shape, generator=generator, dtype=theta.dtype)
        found = form.theta(upper_set.project(form.x(far.to(form.like))))
        for limit in limits:
            values = found[limit.entries].cpu().double()
            outside = (limit.lower - values).clamp(min=0) + (values - limit.upper).clamp(min=0)
            if float(outside.max()) > 1e-6 * (1.0 + float(values.abs().max())):
                raise ValueError(
                    f"upper_set reaches beyond what parameter {limit.name} is declared to be, where the lower level "
                    "need not be convex: give a smaller set, or leave it out and declare Parameter(bounds=[low, high])"
                )


def _joined(
    declared: Callable[[Tree, Tree], Any] | None,
    rows: Callable[[Tensor, Tensor], Tensor],
    count: int,
    form: _Form,
) -> Callable[[Tree, Tree], Any] | None:
    """The declared upper rows and those of the cvxpy problem that depend on parameters alone."""
    if not count:
        return declared
    if declared is None:
        return lambda x, y: rows(*form.flat(x, y))
    return lambda x, y: {"declared": declared(x, y), "parameters": rows(*form.flat(x, y))}
