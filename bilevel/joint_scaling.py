"""Scales of variables, objectives and constraint rows in (x, y) together, measured at a point.

Variables are equilibrated as the columns of a KKT matrix are in D. Ruiz, "A scaling algorithm to equilibrate both rows
and columns norms in matrices", RAL-TR-2001-034, here with column norms from random products.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bilevel.flat import FlatProblem
from bilevel.oracle import Oracle
from implicit import GradientDifference, Jacobian, lanczos, tree
from implicit.derivatives import value_and_gradient

SLOPE = 0.1
"""A gradient counts as the curvature that would build it up over ten times the size of the point: linear objectives
have no other scale."""
SMALL = 1e-8
ROUNDS = 4
"""Of equilibration. All but the last find units, from the sizes of single derivatives; the last counts them. More that
count make the weights of support vector machines too slow."""
PROBES = 8
"""Products per round and objective, from which column norms are known up to a fourth of themselves."""
MILD = 4.0
"""Lengths that differ by less are made one."""
FURTHEST = 256.0
"""A length is at most so many times their geometric mean, and at least its inverse: one point says no more."""


def variable_lengths(flat: FlatProblem, x: Tensor, y: Tensor, oracles: Sequence[Oracle]) -> tuple[float, ...]:
    """Lengths s of the leaves of x and then of y, in which gradient steps of one size suit all of them.

    With H_F and H_f the Hessians of both objectives, each divided by its largest column norm, and J the Jacobian of the
    rows of the lower level, all columns of

    .. math:: \\begin{pmatrix} S H_F S \\\\ S H_f S \\\\ R J S \\end{pmatrix}

    (in the mean over a leaf) and all rows of RJS come nearer to the same norm. In all rounds but the last, norms of J
    are divided by the roots of the numbers of their entries, which takes out the units of variables. The last counts
    the entries: where variables enter many rows, as the weights of a machine do, they get short lengths, and others
    that enter one, as slacks do, long ones, which no scaling of rows can do. One such round does not make the norms
    equal, since derivatives at one point tell no more. Powers of two with geometric mean about one over all variables;
    one 1.0 for all where they would hardly differ.

    Args:
        flat: the problem.
        x, y: where, ``(n,)`` and ``(m,)``.
        oracles: of the batches that are used in turn.
    """
    point = torch.cat([x, y]).detach()
    generator = torch.Generator().manual_seed(0)
    sizes = [leaf.numel() for leaf in tree.leaves((flat.x_like, flat.y_like))]
    jacobian = _jacobian(flat, point)
    s, r = torch.ones_like(point), point.new_ones(len(jacobian))
    hessians = [
        [GradientDifference(_of_pair(flat, level, oracle), point) for oracle in oracles] for level in ("upper", "lower")
    ]
    units = [_columns(each, s, generator).amax() for each in hessians]
    entries = [(jacobian != 0).sum(dim=k).clamp(min=1) for k in (0, 1)]
    for k in range(ROUNDS):
        of_column, of_row = entries if k < ROUNDS - 1 else (1, 1)
        scaled = (r[:, None] * jacobian * s).square().nan_to_num(0.0, 0.0, 0.0)
        columns = scaled.sum(dim=0) / of_column
        for each, unit in zip(hessians, units, strict=True):
            columns = columns + torch.where(unit > 0, _columns(each, s, generator) / unit, 0.0)
        s = s * _inverse_root(_averaged(columns, sizes).sqrt())
        r = r * _inverse_root((scaled.sum(dim=1) / of_row).sqrt())
    if float(s.amax()) <= MILD * float(s.amin()):
        return (1.0,)
    s = (s / s.log().mean().exp()).clamp(1.0 / FURTHEST, FURTHEST)
    first = [part[0] if len(part) else s.new_ones(()) for part in s.split(sizes)]
    return tuple(2.0**exponent for exponent in torch.log2(torch.stack(first)).round().tolist())


def by_variable(flat: FlatProblem, lengths: tuple[float, ...]) -> Tensor:
    """Every variable's length, ``(n + m,)``, from one for every leaf or one for all.

    Raises:
        ValueError: if there are neither as many as leaves nor one.
    """
    leaves = tree.leaves((flat.x_like, flat.y_like))
    if len(lengths) == 1:
        lengths = lengths * len(leaves)
    if len(lengths) != len(leaves):
        raise ValueError(
            f"lengths must have one number for each of the {len(leaves)} leaves of x and y, or one for all, got "
            f"{lengths}"
        )
    whole = [leaf.new_full((leaf.numel(),), length) for leaf, length in zip(leaves, lengths, strict=True)]
    return torch.cat(whole).to(flat.dtype)


def _columns(hessians: list[GradientDifference], s: Tensor, generator: torch.Generator) -> Tensor:
    """Squared norms of the columns of SHS, from products with random signs."""
    found = torch.zeros_like(s)
    for k in range(PROBES):
        signs = torch.sign(tree.randn_like(s, generator))
        found = found + (s * (hessians[k % len(hessians)] @ (s * signs))).square().nan_to_num(0.0, 0.0, 0.0)
    return found / PROBES


def _averaged(values: Tensor, sizes: list[int]) -> Tensor:
    """The mean of every leaf in place of its entries."""
    return torch.cat([part.mean().expand(len(part)) if len(part) else part for part in values.split(sizes)])


def _inverse_root(norms: Tensor) -> Tensor:
    """``norms^(-1/2)``, and one where they are next to nothing."""
    visible = norms > SMALL * norms.amax() if len(norms) else norms > 0
    return torch.where(visible, norms, 1.0).rsqrt()


def joint_curvature(
    flat: FlatProblem, level: str, x: Tensor, y: Tensor, oracles: Sequence[Oracle], lengths: Tensor | float = 1.0
) -> float:
    """The scale L of an objective, by which it is divided, for variables in these lengths.

    The largest absolute eigenvalue of its Hessian in (x, y), from Lanczos steps on gradient differences, but at least a
    tenth of its gradient over ``1 + |(x, y)|``; the largest over the given batches.
    """
    point = torch.cat([x, y]).detach() / lengths
    largest = 0.0
    for oracle in oracles:
        objective = _of_pair(flat, level, oracle, lengths)
        spectrum = lanczos(GradientDifference(objective, point), 20)
        _, slope = value_and_gradient(objective, point)
        steep = float(torch.linalg.vector_norm(slope)) / (1.0 + float(torch.linalg.vector_norm(point)))
        largest = max(largest, abs(spectrum.largest), abs(spectrum.smallest), SLOPE * steep)
    return largest if largest > SMALL else 1.0


def _of_pair(
    flat: FlatProblem, level: str, oracle: Oracle, lengths: Tensor | float = 1.0
) -> Callable[[Tensor], Tensor]:
    function = flat.upper if level == "upper" else flat.lower

    def objective(u: Tensor) -> Tensor:
        z = lengths * u
        return function(z[: flat.n], z[flat.n :], oracle) + 0.0 * z.sum()

    return objective


def row_weights(flat: FlatProblem, x: Tensor, y: Tensor, lengths: Tensor | float = 1.0) -> Tensor:
    """Factors that give every row of the lower level a gradient of length one, and all of them a Jacobian of norm one.

    Gradients are in variables of these lengths. Inequalities first, then equations, ``(p + q,)``. Where a row has no
    gradient at the point, as at the center of a ball, it is measured beside it.
    """
    point = torch.cat([x, y]).detach()
    noise = tree.randn_like(point, torch.Generator().manual_seed(0))
    matrix = _jacobian(flat, point) * lengths
    here = torch.linalg.vector_norm(matrix, dim=1)
    there = torch.linalg.vector_norm(_jacobian(flat, point + (1.0 + point.abs()) * noise) * lengths, dim=1)
    size = torch.where(here > SMALL * there.nan_to_num(0.0, 0.0, 0.0), here, there)
    weights = torch.where(torch.isfinite(size) & (size > 0), 1.0 / size, 1.0)
    if not len(weights):
        return weights
    # A row without a finite gradient here, as of a root at zero, does not count.
    norm = torch.linalg.matrix_norm((matrix * weights[:, None]).nan_to_num(0.0, 0.0, 0.0), 2)
    return weights / norm.clamp(min=1.0)


def _jacobian(flat: FlatProblem, point: Tensor) -> Tensor:
    """Of the rows of the lower level in (x, y), dense."""
    level, n = flat.lower_level, flat.n
    if not level.inequalities + level.equalities:
        return point.new_zeros(0, len(point))

    def rows(z: Tensor) -> Tensor:
        return torch.cat([level.inequality(z[:n], z[n:]), level.equality(z[:n], z[n:])]) + 0.0 * z.sum()

    return Jacobian(rows, point).to_dense()
