"""Which constraints are active at the solutions of a batch, and which of those depend on the others."""

from dataclasses import dataclass

import torch
from torch import Tensor

from constrained.batch.functions import BatchFunctions, Derivatives
from constrained.multipliers import FlatMultipliers
from constrained.qp.active_set import kernel


@dataclass(frozen=True)
class Solved:
    """The end of a run as the optimality conditions see it.

    Their Jacobian in ``y = (x, l, v, z)`` is symmetric once the multipliers of inactive constraints, which are zero,
    are left out. ``unit`` scales its rows and columns so that the gradients of constraints have length one and the
    largest entry of the Hessian is one.

    Attributes:
        y: x, multipliers of h and c, and of the upper minus those of the lower bounds, shape (B, n + m + p + n).
        active: inequalities that hold with equality, (B, p).
        held: variables at a bound, (B, n).
        bound: the value of that bound, (B, n).
        present: the entries of y that are no multipliers of inactive constraints, (B, n + m + p + n).
        unit: the scale, (B, n + m + p + n).
        dependent: an orthonormal basis of the combinations of constraints whose gradients cancel, in the scaled y,
            (B, n + m + p + n, w); zero columns where an element has fewer.
        loose: of the other directions in which the scaled system is singular, (B, n + m + p + n, w').
        converged, degenerate: flags of elements, (B,).
    """

    y: Tensor
    active: Tensor
    held: Tensor
    bound: Tensor
    present: Tensor
    unit: Tensor
    dependent: Tensor
    loose: Tensor
    converged: Tensor
    degenerate: Tensor


def inspect(
    functions: BatchFunctions, x: Tensor, multipliers: FlatMultipliers, converged: Tensor, atol: float
) -> Solved:
    """Read off the active constraints: those whose multipliers are larger than their distances, in common units.

    Lengths of constraint gradients are taken out, and multipliers are divided by the larger one of the Hessian and the
    gradient of f, so that they are compared with distances in x.
    """
    m, n = functions.equalities, functions.n
    equality, inequality, lower, upper = multipliers
    weights = torch.cat([equality, inequality], dim=1)
    d = functions.derivatives(x, weights, functions.leaves)
    assert d.hessian is not None
    bend = d.hessian.flatten(1).abs().amax(dim=1, keepdim=True)
    force = _safe(torch.maximum(bend, d.gradient.abs().amax(dim=1, keepdim=True)))
    length = _safe(torch.linalg.vector_norm(d.jacobian, dim=2))
    gaps = -d.constraints[:, m:] / length[:, m:]
    duals = inequality * length[:, m:] / force
    below, above = x - functions.lower, functions.upper - x
    fixed = functions.lower >= functions.upper
    at_lower, at_upper = fixed | (lower / force > below), upper / force > above
    room = [torch.where(fixed, torch.inf, g.maximum(v / force)) for g, v in ((below, lower), (above, upper))]
    larger = torch.cat([gaps.maximum(duals), *room], dim=1)
    active, held = duals > gaps, at_lower | at_upper
    # On the central path the smaller of the two is the complementarity, at most atol, over the larger.
    degenerate = (larger <= 2 * (atol * (1 / force).clamp(min=1.0)).sqrt()).any(dim=1)
    always = torch.ones_like(x, dtype=torch.bool)
    present = torch.cat([always, torch.ones_like(equality, dtype=torch.bool), active, held], dim=1)
    root = _safe(bend).sqrt()
    unit = torch.cat([(1 / root).expand(-1, n), root / length, root.expand(-1, n)], dim=1)
    dependent, loose = _singular(d, present, unit, converged, atol)
    return Solved(
        y=torch.cat([x, equality, inequality, upper - lower], dim=1),
        active=active,
        held=held,
        bound=torch.where(at_lower, functions.lower, torch.where(at_upper, functions.upper, 0.0)),
        present=present,
        unit=unit,
        dependent=dependent,
        loose=loose,
        converged=converged,
        degenerate=degenerate & converged,
    )


def _safe(size: Tensor) -> Tensor:
    return torch.where((size > 0) & torch.isfinite(size), size, 1.0)


def _singular(d: Derivatives, present: Tensor, unit: Tensor, converged: Tensor, atol: float) -> tuple[Tensor, Tensor]:
    """The two null spaces of :class:`Solved`, in the elements that converged."""
    assert d.hessian is not None
    k, n = d.gradient.shape
    eye = torch.eye(n, dtype=unit.dtype, device=unit.device).expand(k, n, n)
    normals = torch.cat([d.jacobian, eye], dim=1) * present[:, n:, None]
    matrix = torch.cat(
        [torch.cat([d.hessian, normals.mT], dim=2), torch.nn.functional.pad(normals, (0, normals.shape[1]))], dim=1
    )
    matrix = scaled(matrix, present & converged[:, None], unit)
    part = _dependent(matrix[:, n:, :n], present[:, n:] & converged[:, None], atol)
    dependent = torch.cat([part.new_zeros(k, n, part.shape[2]), part], dim=1)
    return dependent, kernel(without(matrix, dependent))


def scaled(matrix: Tensor, present: Tensor, unit: Tensor) -> Tensor:
    """The Jacobian of the conditions in the units of :class:`Solved`, with the identity where nothing is present."""
    both = present[:, :, None] & present[:, None, :]
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return torch.where(both, unit[:, :, None] * matrix * unit[:, None, :], eye * ~both)


def without(matrix: Tensor, basis: Tensor) -> Tensor:
    """The symmetric matrix outside the span of an orthonormal basis, and the identity in it."""
    if not basis.shape[2]:
        return matrix
    inside = basis @ basis.mT
    outside = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device) - inside
    return outside @ matrix @ outside + inside


def _dependent(rows: Tensor, present: Tensor, atol: float) -> Tensor:
    """Combinations of the rows that cancel to the accuracy of the solution, orthonormal or zero, (B, r, w)."""
    k, r, _ = rows.shape
    tolerance = max(atol**1.5, 64 * torch.finfo(rows.dtype).eps)
    # Rows that are not there count as orthogonal to all others.
    gram = rows @ rows.mT + torch.diag_embed((~present).to(rows.dtype))
    shift = tolerance * torch.eye(r, dtype=rows.dtype, device=rows.device)
    index = (torch.linalg.cholesky_ex(gram - shift)[1] != 0).nonzero()[:, 0]
    if not len(index):
        return rows.new_zeros(k, r, 0)
    values, vectors = torch.linalg.eigh(gram[index])
    null = values <= tolerance
    width = int(null.sum(dim=1).amax())
    return rows.new_zeros(k, r, width).index_copy(0, index, (vectors * null[:, None])[:, :, :width])
