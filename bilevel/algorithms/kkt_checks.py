"""What is looked at before a lower level is replaced by its KKT system."""

import torch
from torch import Tensor

from bilevel.algorithms.relaxed_kkt import RelaxedKKT
from bilevel.flat import FlatProblem
from bilevel.probes import beside
from constrained import Lagrangian
from implicit import Hessian, Jacobian, tree
from implicit.derivatives import value_and_gradient

POINTS = (0.0, 1.0, 10.0)
"""How far from the start, relative to its size, derivatives are looked at."""
NEGATIVE = 1e-9
"""Relative to the largest eigenvalue in size, curvature below this is rounding."""
MODERATE = 1e2
"""Lower objectives whose derivatives are within this factor of one keep their size."""
STEPS = (1e-5, 1e-3)
WRONG = 0.1
"""Relative deviation of a derivative from differences that is no rounding."""


def _near(origin: Tensor) -> list[Tensor]:
    """The start and random points around it."""
    generator = torch.Generator().manual_seed(0)
    return [beside(origin, generator, reach) for reach in POINTS]


def looks_convex(flat: FlatProblem, origin: Tensor) -> bool:
    """Whether g and the inequalities have no negative curvature in y at the start and around it, and the equalities
    are affine.

    Curved inequalities are looked at in sums with random positive weights. Points with values that are not finite say
    nothing.
    """
    level, n = flat.lower_level, flat.n
    if level.equalities and not level.affine_equality:
        return False
    generator = torch.Generator().manual_seed(1)
    for at in _near(origin):
        x, y = at[:n], at[n:]
        functions = [lambda v, x=x: flat.lower(x, v)]
        if level.inequalities and not level.affine:
            weights = torch.rand((2, level.inequalities), generator=generator, dtype=y.dtype).to(y.device)
            functions += [lambda v, x=x, w=w: w @ level.inequality(x, v) + 0.0 * v.sum() for w in weights]
        for function in functions:
            matrix = Hessian(function, y).to_dense()
            if not bool(torch.isfinite(matrix).all()):
                continue
            values = torch.linalg.eigvalsh(0.5 * (matrix + matrix.T))
            if bool(values[0] < -NEGATIVE * values.abs().amax().clamp(min=torch.finfo(y.dtype).tiny)):
                return False
    return True


def moves_with_x(flat: FlatProblem, origin: Tensor) -> bool:
    """Whether the lower constraints depend on x."""
    level, n = flat.lower_level, flat.n
    direction = tree.randn_like(origin[:n], torch.Generator().manual_seed(2))
    for at in _near(origin):
        y = at[n:]
        for rows, count in ((level.inequality, level.inequalities), (level.equality, level.equalities)):
            if count:
                slopes = Jacobian(lambda v, rows=rows, y=y: rows(v, y) + 0.0 * v.sum(), at[:n]) @ direction
                if bool((slopes != 0).any()):
                    return True
    return False


def lower_scale(flat: FlatProblem, origin: Tensor) -> float:
    """The factor that brings first and second derivatives of g in y to about one; one if they are moderate."""
    n, sizes = flat.n, []
    for at in _near(origin)[:2]:
        x, y = at[:n], at[n:]

        def lower(v: Tensor, x: Tensor = x) -> Tensor:
            return flat.lower(x, v)

        _, slope = value_and_gradient(lower, y, "lower")
        curvature = Hessian(lower, y).to_dense()
        sizes += [float(slope.abs().amax()), float(curvature.abs().amax())]
    size = max((v for v in sizes if v == v and v < float("inf")), default=1.0)
    return 1.0 if not size or 1.0 / MODERATE <= size <= MODERATE else 1.0 / size


def require_third_derivatives(kkt: RelaxedKKT, origin: Tensor) -> None:
    """Refuse lower functions that torch cannot differentiate three times: by an error, or with wrong results.

    Raises:
        ValueError: with what torch says, or with the deviation from differences.
    """
    generator = torch.Generator().manual_seed(3)
    noise, direction = (tree.randn_like(origin.new_empty(kkt.size), generator) for _ in range(2))
    z = 1.0 + 0.1 * noise
    z[: len(origin)] = origin + 1e-2 * noise[: len(origin)]
    lagrangian = Lagrangian(kkt.relaxed(1.0, origin.new_zeros(0, kkt.flat.m), 0.0), z)
    try:
        point = lagrangian.at(z)
        weights = torch.ones_like(point.constraints)
        second, third = point.jacobian @ direction, point.hessian(weights) @ direction
        if not bool(torch.isfinite(second).all() & torch.isfinite(third).all()):
            return  # says nothing about the graph; the run itself ends NONFINITE where that stays
        errors = {"second": [], "third": []}
        for step in STEPS:
            ahead, behind = lagrangian.at(z + step * direction), lagrangian.at(z - step * direction)
            change = (ahead.constraints - behind.constraints) / (2 * step)
            bend = (ahead.lagrangian_gradient(weights) - behind.lagrangian_gradient(weights)) / (2 * step)
            for name, exact, found in (("second", second, change), ("third", third, bend)):
                size = torch.maximum(exact.abs().amax(), found.abs().amax()).clamp(min=1e-6)
                errors[name].append(float((exact - found).abs().amax() / size))
    except RuntimeError as error:
        raise ValueError(
            "KKTRelaxation needs third derivatives of the lower functions (and second ones of the upper), and torch "
            f"does not give them: {error}. Use operations that can be differentiated repeatedly, or Penalty or LVHBA, "
            "which need first derivatives only"
        ) from error
    for name, found in errors.items():
        if not min(found) <= WRONG:
            raise ValueError(
                f"{name} derivatives of the lower functions by torch deviate by {min(found):.1g} (relative) from "
                "differences at the start: the graph of a gradient seems to be cut (a custom backward with .detach() "
                "or numpy?), or the functions have kinks. Use operations that can be differentiated three times, or "
                "Penalty or LVHBA, which need first derivatives only"
            )
