"""A look at supplied derivatives before the first step: wrong ones otherwise look like a hard problem."""

import warnings

import torch
from torch import Tensor

from constrained.lagrangian import Lagrangian

_TOLERANCE = 1e-2  # wrong signs, factors and transposes are off by order one; differences are good to 1e-5 or better


def check_supplied(lagrangian: Lagrangian, x: Tensor) -> None:
    """Compare supplied derivatives at x with central differences along one random direction.

    Costs two evaluations and, where a Hessian is supplied, two gradients and Jacobians; nothing is counted. Where
    a value is not finite, nothing is compared.

    Warns:
        UserWarning: naming the field, where the two differ by more than a hundredth.

    Raises:
        Exception: whatever a supplied function raises.
    """
    problem = lagrangian.problem
    jacobians = problem.equality_jacobian is not None or problem.inequality_jacobian is not None
    if not (problem.gradient or jacobians or problem.has_hessian):
        return
    counts = dict(lagrangian.counts)
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(lagrangian.n, generator=generator, dtype=torch.float64).to(x)
    length = float(torch.finfo(x.dtype).eps) ** (1 / 3)
    step = length * torch.clamp(x.abs(), min=1.0) * direction
    here, above, below = (lagrangian.at(point) for point in (x, x + step, x - step))
    v = step / length
    if here.finite and above.finite and below.finite:
        agree = True
        if problem.gradient is not None:
            slope = here.gradient * v
            agree = _agree(
                "gradient", slope.sum()[None], (above.objective - below.objective)[None] / (2 * length), slope
            )
        for kind, start, end in (
            ("equality_jacobian", 0, lagrangian.equalities),
            ("inequality_jacobian", lagrangian.equalities, lagrangian.constraints),
        ):
            if getattr(problem, kind) is not None:
                field = "jacobian" if hasattr(problem, "jacobian") else kind
                found = (here.jacobian @ v)[start:end]
                agree &= _agree(field, found, (above.constraints - below.constraints)[start:end] / (2 * length), found)
        if problem.has_hessian and agree:  # it is compared with differences of the first derivatives
            multiplier = torch.randn(lagrangian.constraints, generator=generator, dtype=torch.float64).to(x)
            change = above.lagrangian_gradient(multiplier) - below.lagrangian_gradient(multiplier)
            found = here.hessian(multiplier) @ v
            _agree("hessian", found, change / (2 * length), found)
    lagrangian.counts.update(counts)


def _agree(field: str, supplied: Tensor, differences: Tensor, terms: Tensor) -> bool:
    if not len(supplied):
        return True
    size = torch.maximum(terms.abs().amax(), differences.abs().amax()).clamp(min=1e-3)
    gap = (supplied - differences).abs()
    worst = int(gap.argmax())
    wrong = bool(gap[worst] > _TOLERANCE * size)
    if wrong:
        row = f"row {worst} of " if len(gap) > 1 else ""
        warnings.warn(
            f"the supplied {field} disagrees with differences of what it differentiates, at x0 along a random "
            f"direction: {row}its product is {float(supplied[worst]):.6g}, by differences "
            f"{float(differences[worst]):.6g}; check signs, factors and transposes, and of a hessian that it has both "
            "triangles and is that of the whole Lagrangian",
            UserWarning,
            stacklevel=4,
        )
    return not wrong
