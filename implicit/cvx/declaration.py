"""What cvxpy problems may be declared for differentiation, and how cvxpy compiles them."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

SIGNS = ("nonneg", "nonpos", "pos", "neg", "bounds")
SHAPES = ("symmetric", "diag", "PSD", "NSD", "hermitian", "sparsity", "complex", "imag", "boolean", "integer")


def compile_problem(problem: Any, parameters: Sequence[Any], variables: Sequence[Any]) -> tuple[Any, list[int]]:
    """cvxpy's affine map from parameters to a conic program, and where each variable starts in its x."""
    import cvxpy
    from cvxpy.settings import PARAM_PROB

    # Compiling replaces variables that have attributes; plain copies of those stay where they can be found.
    copies = [cvxpy.Variable(v.shape) if _attributes(v, SIGNS + SHAPES) else v for v in variables]
    ties = [copy == v for copy, v in zip(copies, variables, strict=True) if copy is not v]
    tied = cvxpy.Problem(problem.objective, problem.constraints + ties)
    before = [p.value for p in parameters]
    try:
        for p in parameters:  # compiling evaluates the map once
            p.value = p.project(np.ones(p.shape))
        data, _, _ = tied.get_problem_data(cvxpy.CLARABEL, enforce_dpp=True)
    finally:
        for p, value in zip(parameters, before, strict=True):
            p.value = value
    compiled = data[PARAM_PROB]
    dims = compiled.cone_dims
    if dims.p3d or getattr(dims, "pnd", None):
        raise ValueError(
            "the problem compiles to power cones, which have no derivative here: leave approx=True in power, pnorm and "
            "geo_mean, or write the constraint with second-order cones"
        )
    return compiled, [compiled.var_id_to_col[copy.id] for copy in copies]


def _attributes(leaf: Any, names: tuple[str, ...]) -> list[str]:
    return [name for name in names if leaf.attributes.get(name) not in (None, False)]


def check_problem(problem: Any, parameters: Sequence[Any], variables: Sequence[Any]) -> None:
    """Refuse what has no differentiable solution map.

    Raises:
        TypeError, ValueError: as :class:`implicit.cvx.Layer` says.
    """
    import cvxpy

    if not isinstance(problem, cvxpy.Problem):
        raise TypeError(f"problem = {problem!r}: give a cvxpy.Problem")
    for field, given, kind in (("parameters", parameters, cvxpy.Parameter), ("variables", variables, cvxpy.Variable)):
        if not isinstance(given, (list, tuple)) or not all(isinstance(entry, kind) for entry in given):
            raise TypeError(f"{field} = {given!r}: give a list of cvxpy.{kind.__name__} objects")
        known = problem.parameters() if kind is cvxpy.Parameter else problem.variables()
        foreign = [entry.name() for entry in given if entry.id not in {k.id for k in known}]
        if foreign:
            raise ValueError(f"{field}: {', '.join(foreign)} do not occur in the problem")
        if not given or len({entry.id for entry in given}) != len(given):
            raise ValueError(f"{field} = {[entry.name() for entry in given]}: give at least one, and none twice")
    missing = [p.name() for p in problem.parameters() if p.id not in {g.id for g in parameters}]
    if missing:
        raise ValueError(f"the problem also has the parameters {', '.join(missing)}: list all of them in `parameters`")
    whole = [v.name() for v in problem.variables() if _attributes(v, ("boolean", "integer"))]
    whole += [str(c) for c in problem.constraints if isinstance(c, cvxpy.FiniteSet)]
    if whole:
        raise ValueError(
            f"the problem has integer or boolean variables, whose solutions have no derivatives: {', '.join(whole)}"
        )
    parts = [leaf.name() for leaf in [*problem.variables(), *problem.parameters()] if leaf.is_complex()]
    if parts:
        raise ValueError(
            "the problem has complex variables or parameters: write real and imaginary parts of "
            f"{', '.join(parts)} as two"
        )
    for p in parameters:
        structured = _attributes(p, SHAPES)
        if structured:
            raise ValueError(
                f"parameter {p.name()} is declared {structured[0]}: declare it without, and build the structure in the "
                "expression (such as cvxpy.diag(p))"
            )
    if not problem.is_dcp():
        where = _first(problem, lambda part: not part.is_dcp())
        raise ValueError(f"the problem is not convex by cvxpy's rules in {where}: see dcp.stanford.edu")
    if not problem.is_dpp():
        where = _first(problem, lambda part: not part.is_dcp(dpp=True))
        raise ValueError(
            f"the problem is not DPP in {where}, so that its data are not affine in the parameters: keep products of "
            "parameters out, for instance by a new parameter for each product"
        )


def _first(problem: Any, wrong: Callable[[Any], bool]) -> str:
    """The objective or the first constraint that is ``wrong``, in cvxpy's words."""
    return str(next(part for part in (problem.objective, *problem.constraints) if wrong(part)))
