"""Conformance of differentiable solution maps."""

from collections.abc import Callable

import torch
from torch import Tensor

from implicit import tree
from implicit.testing.verdict import Verdict, distance, identical, name_of
from implicit.tree import Tree

DIRECTIONS = 2


def check_derivatives(
    solution: Callable[..., Tree],
    init: Tree,
    *theta: Tree,
    order: int = 2,
    width: float | None = None,
    rtol: float | None = None,
) -> None:
    """Whether a solution map made by ``custom_root`` and its relatives has the derivatives of its solutions.

    With random weights w, the scalar :math:`s(\\theta) = \\langle w, y(\\theta) \\rangle` is differentiated once and
    twice, and compared along random directions with central differences of s and of its gradient. The gradient in
    ``init`` must be zero, and nothing that was passed in may be modified.

    Args:
        solution: ``solution(init, *theta) -> y``, accurate enough to be differenced: solve to rounding.
        init: where the solver starts.
        theta: the arguments, trees of floating-point tensors; float64 is advised.
        order: 1 for the gradient alone.
        width: of the differences; None means ``eps^(1/3)`` (6e-6 in float64). A solver that stops early needs more.
        rtol: relative accuracy; None means ``10 eps^(1/3)``.

    Raises:
        ConformanceError: with one sentence, for the first derivative that is off.

    Example:
        >>> import torch, implicit
        >>> from implicit.testing import check_derivatives
        >>> root = implicit.custom_root(lambda y, a: y**2 - a)(lambda init, a: a.sqrt())
        >>> check_derivatives(root, torch.tensor(1.0).double(), torch.tensor(4.0).double())
    """
    verdict = Verdict(name_of(solution))
    eps = float(torch.finfo(tree.common_dtype(init)).eps)
    step = eps ** (1 / 3) if width is None else width
    accuracy = 10.0 * eps ** (1 / 3) if rtol is None else rtol
    kept = tree.clone((init, theta))
    generator = torch.Generator().manual_seed(0)
    with verdict.runs("solving"):
        weights = tree.randn_like(solution(init, *theta), generator)

    def value(*points: Tree) -> Tensor:
        return tree.dot(weights, solution(init, *points))

    for position, point in enumerate(theta):

        def along(q: Tree, at: int = position) -> Tensor:
            return value(*theta[:at], q, *theta[at + 1 :])

        name = f"theta {position}"
        direction = [tree.randn_like(point, generator) for _ in range(DIRECTIONS)]
        with verdict.runs(f"differentiating in {name}"):
            slope = _gradient(along, point)
        for d in direction:
            ahead, behind = along(tree.axpy(step, d, point)), along(tree.axpy(-step, d, point))
            expected = float((ahead - behind).detach()) / (2.0 * step)
            size = float(tree.norm(slope) * tree.norm(d)) + abs(expected) + accuracy
            found = float(tree.dot(slope, d))
            cause = f"it is {found:.6g} along a direction where differences of solutions give {expected:.6g}"
            verdict.close(abs(found - expected) / size, accuracy, f"the gradient in {name} is off", cause)
        if order > 1:
            _second(along, point, direction[0], step, accuracy, name, verdict)
    with verdict.runs("differentiating in init"):
        slope = _gradient(lambda q: tree.dot(weights, solution(q, *theta)), init)
    size = float(tree.norm(slope))
    verdict(
        size == 0.0, f"the gradient in init has norm {size:.3g} instead of zero; it must not pass through the solver"
    )
    verdict(identical(kept, (init, theta)), "init or theta is modified in place")


def _gradient(fn: Callable[[Tree], Tensor], point: Tree) -> Tree:
    variables = tree.variables(point)
    value = fn(variables)
    own, spec = tree.flatten(variables)
    if not value.requires_grad:
        return tree.zeros_like(tree.detach(point))
    return tree.unflatten(torch.autograd.grad(value, own, materialize_grads=True), spec)


def _second(
    fn: Callable[[Tree], Tensor], point: Tree, d: Tree, step: float, accuracy: float, name: str, verdict: Verdict
) -> None:
    """The derivative of the gradient along d, from the graph and from differences of gradients."""
    variables = tree.variables(point)
    own, spec = tree.flatten(variables)
    with verdict.runs(f"differentiating twice in {name}"):
        first = torch.autograd.grad(fn(variables), own, create_graph=True, materialize_grads=True)
        pulled = tree.dot(tree.unflatten(first, spec), d)
        if pulled.requires_grad:
            second = tree.unflatten(torch.autograd.grad(pulled, own, materialize_grads=True), spec)
        else:
            second = tree.zeros_like(point)
        ahead, behind = _gradient(fn, tree.axpy(step, d, point)), _gradient(fn, tree.axpy(-step, d, point))
    expected = tree.scale(0.5 / step, tree.sub(ahead, behind))
    size = float(tree.norm(second)) + float(tree.norm(expected)) + accuracy
    cause = "the backward pass must itself be differentiable: solve its linear system through the same rule"
    what = f"the second derivative in {name} is off"
    verdict.close(distance(second, expected) / size, accuracy, what, cause)
