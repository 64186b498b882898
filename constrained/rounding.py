"""What the rounding of x does to the constraints."""

import torch
from torch import Tensor

from constrained.lagrangian import Lagrangian, Point
from constrained.residual import bound_gaps, largest
from implicit import Dense

FACTOR = 10.0
PROBES = 16


def rounding(point: Point) -> Tensor:
    """Ten times ``eps |J| |x|``, shape (m + p,): what is below it in a constraint's value may be rounding.

    Every row has its own, so that one large variable does not excuse constraints on others. Where the Jacobian is not
    formed, ``|J| |x|`` is estimated from below by products with ``x`` under random signs.
    """
    eps = FACTOR * torch.finfo(point.x.dtype).eps
    if not len(point.constraints):
        return point.constraints
    if isinstance(point.jacobian, Dense):
        return eps * (point.jacobian.matrix.abs() @ point.x.abs())
    draws = torch.rand((PROBES, len(point.x)), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    signs = torch.where(draws.to(point.x) < 0.5, -1.0, 1.0)
    return eps * point.jacobian.flat_mm(signs * point.x).abs().amax(dim=0)


def excess(lagrangian: Lagrangian, point: Point) -> float:
    """The largest violation of a constraint beyond its rounding, or of a bound; NaN where one is."""
    hidden = rounding(point)
    strict, loose = point.equality.abs() - hidden[: lagrangian.equalities], point.inequality
    loose = loose - hidden[lagrangian.equalities :]
    return float(largest(torch.cat([strict, loose, *bound_gaps(lagrangian, point.x)]).clamp(min=0.0)))
