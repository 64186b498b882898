"""The hypergradient where the lower level has many solutions or constraints: pseudo-inverses of its KKT matrix."""

import functools
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.flat import FlatProblem
from bilevel.lower_multipliers import LIMIT, recover_multipliers
from bilevel.problem import BilevelProblem
from constrained import KKTResidual, Lagrangian
from constrained.multipliers import FlatMultipliers
from constrained.residual import largest, measure
from implicit import MINRES, ConvergenceWarning, Hessian, Jacobian, MixedDerivative, tree
from implicit.curvature import lanczos
from implicit.derivatives import value_and_gradient, value_and_gradients
from implicit.tree import Tree

DENSE = 1_000
"""Up to this many unknowns and active rows the matrix is formed and its eigenvalues decide the rank."""
WEAK = 0.4
"""A row is on the edge where its force and its distance are both below ``eps ** WEAK``: about 5e-7 in float64."""
DOUBT = 100.0
"""Eigenvalues within this factor of the rank tolerance leave the rank in doubt."""
LOOKS = 10
"""Products with the Hessian of the lower Lagrangian that measure its size."""
NAMES = tuple(f"{level}_{kind}" for level in ("lower", "upper") for kind in ("inequality", "equality", "set"))
"""What multipliers may be of; those of the upper level play no part."""


@dataclass(frozen=True, eq=False, kw_only=True)
class SingularHypergradient:
    """What :func:`singular_hypergradient` returns.

    Attributes:
        value: the hypergradient, shaped like x.
        upper_value: f(x, y).
        rank: of the matrix K; None where it is not formed.
        size: of K: entries of y that no bound holds, plus active rows.
        active: which entries of each declared constraint are active, as a tree of flags shaped like its values;
            ``"lower_set"`` has the entries of y at a bound with force.
        residual: ``||K w - b|| / ||b||``. Not small: f changes to first order within the set of lower solutions, so
            that y is not the one of them that is best for f, and ``value`` is not the hypergradient.
        motion: how far the right-hand sides of the derivative of the lower solution are from the range of K, relative
            to their size. Not small: lower solutions do not move smoothly with x. None where K is not formed.
        notes: what makes the value doubtful, one sentence each; also where y does not satisfy the lower optimality
            conditions.
    """

    value: Tree
    upper_value: float
    rank: int | None
    size: int
    active: dict[str, Tree]
    residual: float
    motion: float | None
    notes: tuple[str, ...] = ()


def singular_hypergradient(
    problem: BilevelProblem,
    x: Tree,
    y: Tree,
    *,
    multipliers: Mapping[str, Tree] | None = None,
    rtol: float | None = None,
    dense: bool | None = None,
) -> SingularHypergradient:
    """The gradient of ``psi(x) = min f(x, y) over the lower solutions y at x``, in closed form at the best of them.

    With I the lower constraints that are active with force, v the multipliers, and ``L = g + v . c``:

    .. math:: \\nabla\\psi = \\nabla_x f -
              \\begin{bmatrix} \\nabla^2_{xy} L & J_{I,x}^T \\end{bmatrix} K^\\dagger
              \\begin{bmatrix} \\nabla_y f \\\\ 0 \\end{bmatrix}, \\qquad
              K = \\begin{bmatrix} \\nabla^2_{yy} L & J_{I,y}^T \\\\ J_{I,y} & 0 \\end{bmatrix} ,

    where ``J_x`` and ``J_y`` are the Jacobians of the active rows. Without constraints this is
    ``grad_x f - grad2_xy g (grad2_yy g)^+ grad_y f``, and the implicit hypergradient where g is strongly convex. It is
    the gradient where lower solutions move smoothly and the active set does not change; ``residual``, ``motion`` and
    ``notes`` say where that fails. Entries of y at a bound with force do not move and are left out of K.

    Args:
        problem: the declaration. Data are used in full.
        x, y: the point; y must be the lower solution that is best for f: at another one the formula is wrong, which
            shows in ``residual``.
        multipliers: of the lower constraints by name, as in ``Solution.multipliers``; found by nonnegative least
            squares if None, and in any case where ``lower_set`` is not made of bounds.
        rtol: eigenvalues of K below ``rtol`` times the largest count as zero; None means ``sqrt(eps)``. It must exceed
            the error of y, which perturbs them.
        dense: whether K is formed (and factorised, in n^3 operations); otherwise MINRES finds the solution of minimum
            norm from products. None decides by size, up to 1,000.

    Raises:
        TypeError, ValueError: if something does not fit; the message names it.

    Example:
        >>> import torch, bilevel
        >>> a = torch.tensor([1.0, 1.0], dtype=torch.float64)
        >>> problem = bilevel.BilevelProblem(
        ...     upper=lambda x, y: (y**2).sum() + x**2, lower=lambda x, y: (a @ y - x) ** 2 / 2
        ... )
        >>> x = torch.tensor(2.0, dtype=torch.float64)
        >>> found = bilevel.singular_hypergradient(problem, x, a * x / 2)  # psi(x) = x**2 / 2 + x**2
        >>> round(float(found.value), 8), found.rank, found.size, found.residual < 1e-8
        (6.0, 1, 2, True)
        >>> bilevel.singular_hypergradient(problem, x, torch.stack([x, 0 * x])).residual > 0.5
        True
    """
    if not isinstance(problem, BilevelProblem):
        raise TypeError(f"problem must be a bilevel.BilevelProblem, got {type(problem).__name__}")
    if rtol is not None and not 0 < rtol < 1:
        raise ValueError(f"rtol must lie in (0, 1) or be None, got {rtol!r}")
    for name, point in (("x", x), ("y", y)):
        if not all(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in tree.leaves(point)):
            raise TypeError(
                f"{name} must have floating-point tensors only, got {tree.describe(point)}: torch.tensor(...).double()"
            )
    flat = FlatProblem(problem, x, y)
    at_x, at_y = flat.flat_x(x).detach(), flat.flat_y(y).detach()
    duals = flat_multipliers(flat, at_x, at_y, multipliers)
    motion = LowerMotion(flat, at_x, at_y, duals, rtol=rtol, dense=dense)
    value, slope_x, slope_y = value_and_gradients(flat.upper, at_x, at_y, "upper")
    pulled, residuals = motion.pull(slope_y[None])
    notes = list(motion.notes)
    lagrangian = Lagrangian(flat.lower_problem(at_x), at_y)
    kkt = KKTResidual(*measure(lagrangian, lagrangian.at(at_y), duals).tolist())
    if not kkt.largest <= motion.rtol**0.5:
        notes.append(
            f"y does not satisfy the lower optimality conditions ({kkt.largest:.3g}): solve the lower level first, or "
            "more accurately, or correct the multipliers; the value is no hypergradient"
        )
    if float(residuals[0]) > motion.rtol**0.5:
        notes.append(
            "grad_y f does not lie in the range of the lower KKT matrix (relative residual "
            f"{float(residuals[0]):.3g}): y is not the lower solution that is best for upper, or the matrix is "
            "singular there for another reason; the value is no hypergradient"
        )
    return SingularHypergradient(
        value=flat.x_tree(slope_x + pulled[0]),
        upper_value=float(value),
        rank=motion.rank,
        size=motion.size,
        active=motion.named_active(),
        residual=float(residuals[0]),
        motion=motion.unreachable,
        notes=tuple(notes),
    )


def flat_multipliers(flat: FlatProblem, x: Tensor, y: Tensor, given: Mapping[str, Tree] | None) -> FlatMultipliers:
    """Multipliers of all lower rows and bounds as vectors: those given by name, or recovered at the point.

    Raises:
        ValueError: if a name or shape does not fit, or the level is too large to recover them.
    """
    level = flat.lower_level
    kinds = (level.kept_equality, level.equalities), (level.kept_inequality, level.inequalities)
    complete = all(sum(len(kept.rows) for kept in rows) == count for rows, count in kinds)
    foreign = [name for name in given or () if name not in NAMES]
    if foreign:
        raise ValueError(f"multipliers has {foreign[0]!r}, which is none of {', '.join(NAMES)}: rename it")
    if given is None or not complete:
        found = recover_multipliers(flat, x, y)
        if found is None:
            cure = "give multipliers" if complete else "declare lower_set by lower_inequality, and give multipliers"
            raise ValueError(f"the lower level is too large (over {LIMIT:,}) to recover its multipliers; {cure}")
        return found[0]
    blank = torch.zeros_like(y)
    likes = flat.multipliers(y.new_zeros(level.inequalities), y.new_zeros(level.equalities), blank, blank)
    values = {name: _shaped(name, like, given) for name, like in likes.items()}
    equality, inequality = (
        torch.cat([y.new_zeros(0), *[values[kept.field][kept.rows] for kept in rows]]) for rows, _ in kinds
    )
    bound = values.get("lower_set", blank)
    return FlatMultipliers(equality, inequality, (-bound).clamp(min=0), bound.clamp(min=0))


def _shaped(name: str, like: Tree, given: Mapping[str, Tree]) -> Tensor:
    """One entry of ``given`` as a vector, leaves in the order of ``like``."""
    if name not in given:
        raise ValueError(f"multipliers[{name!r}] is missing: give all of the lower level, or multipliers=None")

    def aligned(own: Tensor, leaf: Tensor) -> Tensor:
        if leaf.shape != own.shape:
            raise ValueError
        return leaf.detach().to(own)

    try:
        return tree.ravel(tree.map(aligned, like, given[name]))
    except (AttributeError, ValueError) as error:
        raise ValueError(
            f"multipliers[{name!r}] must be shaped like the constraint, {tree.describe(like)}, got "
            f"{tree.describe(given[name])}"
        ) from error


class LowerMotion:
    """The derivative of the lower solution in x, transposed: ``v -> (dy/dx)' v`` from the KKT matrix at (x, y).

    Rows are divided by the norm of their gradient in y and multiplied by the size of ``grad2_yy L``. Where the systems
    have solutions that changes no value, and the rank no longer depends on the units of g and of the rows.

    Args:
        flat: the problem.
        x, y: the point.
        multipliers: of the lower level.
        rtol, dense: see :func:`singular_hypergradient`.
        max_steps: of MINRES; None means ten times the size.

    Attributes:
        strong: rows with force, of equalities then inequalities, ``(q + p,)``.
        sizes: norms of the gradients of all rows in y, 1 for those without, ``(q + p,)``.
        weak: inequalities on the edge, with neither force nor distance, ``(p,)``.
        held: entries of y at a bound with force, ``(m,)``; ``edge`` those on the edge.
        size, rank: of the matrix.
        unreachable: see ``SingularHypergradient.motion``.
        notes: sentences.
    """

    def __init__(
        self,
        flat: FlatProblem,
        x: Tensor,
        y: Tensor,
        multipliers: FlatMultipliers,
        *,
        rtol: float | None = None,
        dense: bool | None = None,
        max_steps: int | None = None,
    ) -> None:
        self.max_steps = max_steps
        self.flat, self.x, self.y, self.duals = flat, x, y, multipliers
        self.level = flat.lower_level
        eps = float(torch.finfo(y.dtype).eps)
        self.rtol = eps**0.5 if rtol is None else rtol
        self._activate(eps**WEAK)
        self.free = (~self.held).nonzero().reshape(-1)
        self.rows = self.strong.nonzero().reshape(-1)
        self.size = len(self.free) + len(self.rows)
        self.weight = self._curvature() if len(self.rows) else 1.0
        point = torch.cat([y[self.free], y.new_zeros(len(self.rows))])
        self.matrix = Hessian(lambda z: self._extended(x, z), point, positive_definite=False)
        self.cross = MixedDerivative(self._extended, x, point)
        self.dense = self.size <= DENSE if dense is None else dense
        self.notes = self._edge_notes()
        self.rank: int | None = None
        self.unreachable: float | None = None
        if self.dense:
            self._measure()

    def _activate(self, edge: float) -> None:
        level, duals = self.level, self.duals
        norms = torch.linalg.vector_norm(self.row_slopes()[:, len(self.x) :], dim=1)
        self.sizes = torch.where(norms > 0, norms, 1.0)
        _, gradient = value_and_gradient(lambda y: self.flat.lower(self.x, y), self.y, "lower")
        self.force = float(gradient.abs().amax().clamp(min=1.0))
        lengths = 1.0 + float(self.y.abs().amax())
        with torch.no_grad():
            gap = level.inequality(self.x, self.y).neg().clamp(min=0)
        force = duals.inequality * norms[level.equalities :] / self.force
        distance = gap / self.sizes[level.equalities :] / lengths
        self.weak = (force < edge) & (distance < edge)
        strong = (force > distance) & ~self.weak
        self.strong = torch.cat([strong.new_ones(level.equalities), strong])
        fixed = level.lower == level.upper
        self.held, self.edge = fixed, torch.zeros_like(fixed)
        for pressure, room in ((duals.lower, self.y - level.lower), (duals.upper, level.upper - self.y)):
            pressure, room = pressure / self.force, room.clamp(min=0) / lengths
            edges = (pressure < edge) & (room < edge)
            self.held = self.held | ((pressure > room) & ~edges)
            self.edge = self.edge | edges
        self.edge = self.edge & ~self.held

    def _curvature(self) -> float:
        """The size of ``grad2_yy L`` at free entries of y; 1 where it is rounding."""
        y = self.y
        found = lanczos(
            Hessian(
                lambda v: self.lagrangian(self.x, y.index_copy(0, self.free, v)), y[self.free], positive_definite=False
            ),
            LOOKS,
        )
        size = max(abs(found.smallest), abs(found.largest))
        return size if size > float(torch.finfo(self.y.dtype).eps) * self.force else 1.0

    def row_slopes(self) -> Tensor:
        """Gradients of all rows in (x, y), ``(q + p, n + m)``."""
        n = len(self.x)
        if not (self.level.inequalities + self.level.equalities):
            return self.y.new_zeros(0, n + len(self.y))
        both = torch.cat([self.x, self.y])
        return Jacobian(lambda z: self._rows(z[:n], z[n:]) + 0.0 * z.sum(), both).to_dense()

    def second_derivatives(self) -> tuple[Tensor, Tensor]:
        """``grad2_yy L`` and ``grad2_xy L`` at all entries of y, ``(m, m)`` and ``(n, m)``."""
        in_y = Hessian(lambda y: self.lagrangian(self.x, y), self.y, positive_definite=False).to_dense()
        return 0.5 * (in_y + in_y.T), MixedDerivative(self.lagrangian, self.x, self.y).to_dense()

    def lagrangian(self, x: Tensor, y: Tensor) -> Tensor:
        """``g + v . c`` with the multipliers of the rows with force."""
        value = self.flat.lower(x, y)
        if not len(self.sizes):
            return value
        forces = torch.where(self.strong, torch.cat([self.duals.equality, self.duals.inequality]), 0.0)
        return value + self._rows(x, y) @ forces

    def _rows(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([self.level.equality(x, y), self.level.inequality(x, y)])

    def _extended(self, x: Tensor, z: Tensor) -> Tensor:
        """``L + mu . c_I`` at free entries of y and changes mu of the multipliers: its Hessian in z is K."""
        count = len(self.free)
        y = self.y.index_copy(0, self.free, z[:count])
        value = self.lagrangian(x, y)
        if not len(self.rows):
            return value
        return value + self.weight * (self._rows(x, y) / self.sizes)[self.rows] @ z[count:]

    @functools.cached_property
    def _spectrum(self) -> tuple[Tensor, Tensor, Tensor]:
        """Eigenvalues and eigenvectors of K, and which of them count."""
        matrix = self.matrix.to_dense()
        values, vectors = torch.linalg.eigh(0.5 * (matrix + matrix.T))
        return values, vectors, values.abs() > self.rtol * largest(values)

    def _measure(self) -> None:
        values, vectors, kept = self._spectrum
        self.rank = int(kept.sum())
        size = values.abs() / max(float(largest(values)), 1e-300)
        doubtful = (size < DOUBT * self.rtol) & (size > self.rtol / DOUBT)
        if bool(doubtful.any()):
            found = float(size[doubtful][0])
            self.notes += (
                f"the rank is in doubt: an eigenvalue is {found:.2g} of the largest, the tolerance is {self.rtol:.2g}; "
                "solve the lower level more accurately, or give rtol",
            )
        self.unreachable = 0.0
        if not bool(kept.all()):
            null = self.cross.flat_mm(vectors[:, ~kept].T.contiguous())
            scale = float(torch.linalg.vector_norm(self.cross.to_dense()))
            self.unreachable = float(torch.linalg.vector_norm(null)) / max(scale, 1e-300)
            if self.unreachable > self.rtol**0.5:
                self.notes += (
                    f"lower solutions do not move smoothly with x (relative part outside the range "
                    f"{self.unreachable:.3g}): there may be none at a nearby x, or they jump",
                )

    def _edge_notes(self) -> tuple[str, ...]:
        count = int(self.weak.sum()) + int(self.edge.sum())
        if not count:
            return ()
        return (
            f"{count} lower constraint{'s' if count > 1 else ''} hold with equality and without force: psi may have a "
            "kink at x, and the value is that of one side, where they are not active",
        )

    def pull(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """``(dy/dx)' v`` for the rows v of ``(k, m)``, shape (k, n), and the relative residuals of the systems."""
        rhs = torch.cat([vectors[:, self.free], vectors.new_zeros(len(vectors), len(self.rows))], dim=1)
        norms = torch.linalg.vector_norm(rhs, dim=1)
        if not self.size:
            return vectors.new_zeros(len(vectors), self.flat.n), torch.zeros_like(norms)
        if self.dense:
            values, basis, kept = self._spectrum
            inverse = torch.where(kept, 1.0 / torch.where(kept, values, 1.0), 0.0)
            solved = ((rhs @ basis) * inverse) @ basis.T
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # the residual is measured below
                solved = (
                    MINRES(rtol=0.01 * self.rtol, max_steps=self.max_steps).solve(self.matrix, rhs, batched=True).value
                )
        left = torch.linalg.vector_norm(self.matrix.flat_mm(solved) - rhs, dim=1)
        residuals = torch.where(norms > 0, left / torch.where(norms > 0, norms, 1.0), 0.0)
        return -self.cross.flat_mm(solved), residuals

    def named_active(self) -> dict[str, Tree]:
        """The active rows and held entries under the names of the declaration."""
        q = self.level.equalities
        flags = self.strong.to(self.y.dtype)
        held = self.held.to(self.y.dtype)
        named = self.flat.multipliers(flags[q:], flags[:q], torch.zeros_like(held), held)
        return {name: tree.map(lambda leaf: leaf > 0, value) for name, value in named.items()}
