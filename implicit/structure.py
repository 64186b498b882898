"""Structure that pays between nearby points: quadratic terms written down once, and a Hessian kept as a matrix.

Both help an objective ``g(x, y)`` that is minimized in y for many x. A term of g that is quadratic in y and free of x
is replaced by its matrix and vector (:class:`QuadraticForm`), after which no product touches the data again. And
where the Hessian in y changes with x on its diagonal only, as it does under penalties of single parameters, one
Cholesky factorization per x preconditions every system there (:class:`KeptHessian`). Neither decides what is true:
residuals are measured on the objective itself.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from implicit import tree
from implicit.derivatives import GradientGraph, ScalarFunction, require_scalar, value_and_gradient
from implicit.linear_solvers.base import Apply, Preconditioner
from implicit.operators import Hessian, LinearOperator
from implicit.preconditioners.factorization import inverse_of
from implicit.tree import Tree

CHUNK = 128


@dataclass(frozen=True)
class QuadraticForm:
    """``q(y) = d^T A d / 2 + b^T d + c`` with ``d = y - center``, over trees; to differentiate like any other function.

    Attributes:
        matrix: A, shape ``(n, n)``, symmetric.
        vector: b, shape ``(n,)``, the gradient at the center.
        constant: c, a 0-d tensor, the value there.
        center: shape ``(n,)``. Values far below c drown in its rounding: :meth:`recentred` moves it.
    """

    matrix: Tensor
    vector: Tensor
    constant: Tensor
    center: Tensor

    def __call__(self, y: Tree) -> Tensor:
        """q(y)."""
        d = tree.ravel(y) - self.center
        return 0.5 * torch.dot(d, self.matrix @ d) + torch.dot(self.vector, d) + self.constant

    def recentred(self, fn: ScalarFunction, y: Tree) -> "QuadraticForm | None":
        """The same form around y, with value and gradient of ``fn`` there; None where they contradict it."""
        value, gradient = value_and_gradient(fn, y)
        d, vector = tree.ravel(y) - self.center, tree.ravel(gradient)
        pulled = self.matrix @ d
        scale = torch.linalg.vector_norm(pulled) + torch.linalg.vector_norm(self.vector)
        if not _close(vector, pulled + self.vector, scale):
            return None
        return QuadraticForm(self.matrix, vector, value, tree.ravel(y).clone())

    @classmethod
    def find(cls, fn: ScalarFunction, y: Tree) -> "QuadraticForm | None":
        """The form that equals ``fn(y)``, or None where there is none.

        Products with one random vector at zero and at random points of sizes 1 and 100 must agree, then the gradients
        there with those of the form; n products build it. A function that is quadratic at all three points and not in
        between would be mistaken.

        Example:
            >>> import torch, implicit
            >>> form = implicit.QuadraticForm.find(lambda y: ((y - 2) ** 2).sum(), torch.zeros(2))
            >>> form.matrix
            tensor([[2., 0.],
                    [0., 2.]])
            >>> implicit.QuadraticForm.find(lambda y: (y**4).sum(), torch.zeros(2)) is None
            True
        """
        generator = torch.Generator().manual_seed(0)
        origin = tree.zeros_like(tree.detach(y))
        points = [tree.scale(size, tree.randn_like(origin, generator)) for size in (1.0, 100.0)]
        probe = tree.ravel(tree.randn_like(origin, generator))
        try:
            graphs = [GradientGraph(lambda _, q: fn(q), (), point) for point in (origin, *points)]
            pulled = [Hessian.of(graph).flat_mv(probe) for graph in graphs]
            if not all(_close(other, pulled[0], torch.linalg.vector_norm(pulled[0])) for other in pulled[1:]):
                return None
            matrix = Hessian.of(graphs[0]).to_dense(CHUNK)
        except Exception:  # outside its domain a function may raise anything; or it is not twice differentiable
            return None
        zero = torch.zeros_like(probe)
        form = cls(0.5 * (matrix + matrix.T), tree.ravel(graphs[0].gradient), graphs[0].value, zero)
        for point, graph in zip(points, graphs[1:], strict=True):
            linear = form.matrix @ tree.ravel(point)
            scale = torch.linalg.vector_norm(linear) + torch.linalg.vector_norm(form.vector)
            if not _close(tree.ravel(graph.gradient), linear + form.vector, scale):
                return None
        return form


class FormGraph(GradientGraph):
    """The kept graph of ``form(y) + regularizer(x, y)``: the form's part of every product is one with its matrix.

    Attributes:
        rest: the graph of the regularizer.
    """

    def __init__(self, form: QuadraticForm, regularizer: ScalarFunction, x: Tree, y: Tree) -> None:
        self.rest = GradientGraph(regularizer, x, y, "the regularizer")
        self.form, self.x, self.y = form, self.rest.x, self.rest.y
        self.products = self.passes = 0
        self.notes, self.recorded, self.unrecordable = self.rest.notes, None, "the form needs none"
        own = tree.leaves(self.y)
        self.active = list(range(len(own)))
        self._own = {id(leaf): place for place, leaf in enumerate(own)}
        d = tree.ravel(tree.detach(y)) - form.center
        product = form.matrix @ d
        self.value = self.rest.value + torch.dot(d, torch.add(form.vector, product, alpha=0.5)) + form.constant
        self.gradient = tree.add(tree.unravel(product + form.vector, self.rest.gradient), self.rest.gradient)

    @functools.cached_property
    def obstacle(self) -> str | None:
        """What keeps the regularizer from being differentiated twice."""
        return self.rest.obstacle

    @functools.cached_property
    def traffic(self) -> int:
        """Bytes of the cotangents that flow in one product."""
        return self.rest.traffic + self.form.vector.numel() * self.form.vector.element_size()

    def differentiate(self, cotangents: Sequence[Tensor], wrt: Sequence[Tensor], batched: bool = False) -> Any:
        """Gradients of ``<gradient, cotangents>``; see :meth:`GradientGraph.differentiate`."""
        found = list(self.rest.differentiate([cotangents[i] for i in self.rest.active], wrt, batched))
        if not any(id(leaf) in self._own for leaf in wrt):
            return found
        flat = tree.ravel_batch(list(cotangents)) if batched else tree.ravel(list(cotangents))
        parts = tree.leaves(tree.unravel(flat @ self.form.matrix, self.y))
        for place, leaf in enumerate(wrt):
            if id(leaf) in self._own:
                part, rest = parts[self._own[id(leaf)]], found[place]
                found[place] = part if rest is None else rest + part
        return found


def _close(found: Tensor, expected: Tensor, scale: Tensor) -> bool:
    """Equal up to rounding; false for NaN."""
    tolerance = float(torch.finfo(found.dtype).eps) ** 0.75
    return bool(torch.linalg.vector_norm(found - expected) <= tolerance * scale)


def depends_on(fn: ScalarFunction, x: Tree, y: Tree) -> bool:
    """Whether x enters ``fn(x, y)``, read off the graph of one evaluation."""
    variables = tree.variables(x)
    with torch.enable_grad():
        value = require_scalar(fn(variables, tree.detach(y)), "the objective")
        if not value.requires_grad:
            return False
        found = torch.autograd.grad(value, tree.leaves(variables), allow_unused=True)
    return any(slope is not None for slope in found)


@dataclass(frozen=True)
class Factorized(Preconditioner):
    """The inverse of a fixed symmetric positive definite matrix, from its Cholesky factor, whatever the operator."""

    factor: Tensor

    def init(self, operator: LinearOperator) -> Apply:
        """Two triangular solves per row."""
        return inverse_of(self.factor)


class KeptHessian:
    """A Hessian in y kept as a matrix, with a diagonal that follows x.

    With a regularizer, the matrix is that of ``data(x, y)`` at one point and the diagonal that of
    ``regularizer(x, y)``; without one, the matrix is that of ``data`` and the diagonal the difference to the Hessian
    at the new point. Whether a difference is diagonal is tested with a Gaussian vector, which no other matrix passes.

    Args:
        matrix: the Hessian of the data term at a point of reference, shape ``(n, n)``.
        declared: whether there is a regularizer.
    """

    def __init__(self, matrix: Tensor, *, declared: bool) -> None:
        self.matrix, self.declared = matrix, declared
        n = len(matrix)
        generator = torch.Generator().manual_seed(0)
        probe = torch.randn(n, generator=generator, dtype=torch.float64).to(dtype=matrix.dtype, device=matrix.device)
        self.probes = torch.stack([torch.ones_like(probe), probe])
        self.pulled = self.probes @ matrix

    @classmethod
    def at(cls, data: ScalarFunction, x: Tree, y: Tree, *, declared: bool) -> "KeptHessian | None":
        """Keep the Hessian of ``data(x, y)`` in y; n products. None where it is not finite."""
        matrix = Hessian.of(GradientGraph(data, x, y)).to_dense(CHUNK)
        return cls(0.5 * (matrix + matrix.T), declared=declared) if bool(torch.isfinite(matrix).all()) else None

    def preconditioner(self, graph: GradientGraph) -> Factorized | str | None:
        """The factorized Hessian at the point of ``graph``.

        Args:
            graph: of the regularizer, or of the whole objective where none is declared.

        Returns:
            The preconditioner; None where matrix plus diagonal is not positive definite and finite; a sentence where
            the Hessian differs from the kept one by more than a diagonal.
        """
        found = Hessian.of(graph).flat_mm(self.probes)
        if not bool(torch.isfinite(found).all()):
            return None
        change = found if self.declared else found - self.pulled
        diagonal, probe = change[0], self.probes[1]
        gap = torch.linalg.vector_norm(change[1] - diagonal * probe)
        rounding = 1e3 * torch.finfo(probe.dtype).eps * torch.linalg.vector_norm(self.pulled[1])
        if not bool(gap <= 1e-3 * torch.linalg.vector_norm(diagonal * probe) + rounding):
            owner = "the regularizer's Hessian is not" if self.declared else "the Hessian changes beyond its"
            return f"{owner} diagonal"
        total = self.matrix.clone()
        total.diagonal().add_(diagonal)
        factor, info = torch.linalg.cholesky_ex(total)
        return Factorized(factor) if int(info) == 0 else None
