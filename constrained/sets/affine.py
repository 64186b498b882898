"""Affine sets and half-spaces: linear equations and one linear inequality over the whole point."""

import math
from dataclasses import dataclass, field
from numbers import Real

import torch
from torch import Tensor

from constrained.sets.base import (
    Bound,
    ConvexSet,
    check_fit,
    check_scalar,
    check_values,
    compute_dtype,
    leaf_name,
    mismatch,
    spread,
)
from implicit import tree
from implicit.tree import Tree


@dataclass(frozen=True, eq=False)
class HalfSpace(ConvexSet):
    """One linear inequality, ``C = {z : <normal, z> <= offset}``, the inner product over all leaves together.

    Args:
        normal: the outward normal a, not zero; given like the bounds of :class:`Box`, where a number stands for a
            constant leaf and ``None`` for zeros (a leaf that the inequality does not see).
        offset: b, a finite number or a tensor of shape ``()`` with the dtype and device of the point.

    Raises:
        TypeError: if an entry is not a number, a floating-point tensor or (``normal`` only) None.
        ValueError: if an entry is not finite, or ``normal`` is zero.

    Example:
        >>> HalfSpace(torch.tensor([1.0, 1.0]), 1.0).project(torch.tensor([2.0, 1.0]))
        tensor([1., 0.])
    """

    normal: Bound
    offset: float | Tensor = 0.0

    def __post_init__(self) -> None:
        check_values("HalfSpace.normal", self.normal, (math.inf, -math.inf), "give finite values, or None for zeros")
        check_scalar("HalfSpace.offset", self.offset)
        entries = [entry for entry in tree.leaves(self.normal) if entry is not None]
        if not any(bool((torch.as_tensor(entry) != 0).any()) for entry in entries):
            raise ValueError("HalfSpace.normal is zero: give a normal with a nonzero entry")

    def project(self, point: Tree) -> Tree:
        """``argmin_{<a, p> <= b} ||p - point||_2 = point - max(<a, point> - b, 0) / ||a||^2 a``.

        The derivative in the point is the identity inside and on the boundary and ``I - a a' / ||a||^2`` outside.
        ``normal`` and ``offset`` receive gradients where they are tensors that require them. The norm is scaled
        against overflow and sums are accumulated in at least float32. A NaN anywhere makes every leaf that the
        inequality sees NaN. See :meth:`ConvexSet.project`.
        """
        self.check(point, "point")
        values, spec = tree.flatten(point)
        if not tree.size(point):
            return point
        dtype = compute_dtype(values)
        entries = spread("HalfSpace.normal", self.normal, point, "point")
        normals = [_expanded(entry, value, dtype) for entry, value in zip(entries, values, strict=True)]
        largest = tree.max_abs([a.detach() for a in normals])
        units = [a / largest.to(a.device) for a in normals]
        squared = torch.stack([u.square().sum().to(largest.device) for u in units]).sum()
        inner = torch.stack([(u * v.to(dtype)).sum().to(largest.device) for u, v in zip(units, values, strict=True)])
        excess = inner.sum() - self.offset / largest
        step = excess / squared
        moved = [(v.to(dtype) - step.to(u.device) * u).to(v.dtype) for u, v in zip(units, values, strict=True)]
        return tree.where(~(excess <= 0), tree.unflatten(moved, spec), point)  # moved for a NaN, too

    def check(self, point: Tree, name: str) -> None:
        """See :meth:`ConvexSet.check`; tensors must broadcast to the leaves and have their dtype and device."""
        super().check(point, name)
        check_fit("HalfSpace.normal", self.normal, point, name)
        check_fit("HalfSpace.offset", self.offset, point, name)


def _expanded(entry: Tensor | float | None, leaf: Tensor, dtype: torch.dtype) -> Tensor:
    if isinstance(entry, Tensor):
        return entry.to(dtype).expand(leaf.shape)
    return torch.full(leaf.shape, 0.0 if entry is None else float(entry), dtype=dtype, device=leaf.device)


@dataclass(frozen=True, eq=False)
class Affine(ConvexSet):
    """Linear equations, ``C = {z : matrix z = offset}``, m of them over all leaves together.

    The pseudo-inverse of ``matrix`` is computed once, by a singular value decomposition in at least float32, and kept.
    Rows that are combinations of others (singular values up to ``max(m, n) eps`` times the largest) are redundant:
    they are fine as long as ``offset`` agrees with them.

    Args:
        matrix: A, a pytree matching the point (one tensor where the point is one tensor; dicts by key) with an entry
            of shape ``(m, *shape of the leaf)`` for every leaf, dtype and device of the leaf.
        offset: b, a tensor of shape ``(m,)`` on the device of the point, or a number for all m equations.

    Raises:
        TypeError: if an entry is not a floating-point tensor (or, for ``offset``, a number).
        ValueError: if values are not finite, shapes do not fit together, the equations contradict each other, or
            ``matrix`` requires gradients and has redundant rows, where the projection is not differentiable in it.

    Example:
        >>> Affine(torch.tensor([[2.0, 0.0]]), 6.0).project(torch.tensor([5.0, 7.0]))
        tensor([3., 7.])
    """

    matrix: Tree
    offset: Tensor | float = 0.0
    _inverse: Tensor = field(init=False, repr=False)  # (n, m), the leaves of the matrix below each other

    def __post_init__(self) -> None:
        rows = _row_count(self.matrix)
        check_values("Affine.matrix", self.matrix, (math.inf, -math.inf), "give finite values")
        if isinstance(self.offset, bool) or not isinstance(self.offset, (Tensor, Real)):
            raise TypeError(f"Affine.offset = {self.offset!r}: give a tensor of shape ({rows},), or a number")
        check_values("Affine.offset", self.offset, (math.inf, -math.inf), "give finite values")
        if isinstance(self.offset, Tensor) and self.offset.shape != (rows,):
            raise ValueError(
                f"Affine.offset has shape {tuple(self.offset.shape)}, but Affine.matrix has {rows} rows: give a tensor "
                f"of shape ({rows},), or a number"
            )
        with torch.no_grad():
            matrix = self._flat_matrix()
            tolerance = max(matrix.shape) * torch.finfo(matrix.dtype).eps
            object.__setattr__(self, "_inverse", torch.linalg.pinv(matrix, rtol=tolerance))
            self._check_consistent(matrix)
            redundant = int(torch.linalg.matrix_rank(matrix, rtol=tolerance)) < rows
        if redundant and self._learns_matrix:
            raise ValueError(
                "Affine.matrix requires gradients and has redundant rows, where the projection is not differentiable "
                "in it: drop those rows, or detach the matrix"
            )

    def project(self, point: Tree) -> Tree:
        """``argmin_{A p = b} ||p - point||_2 = point - A^+ (A point - b)``.

        The derivative in the point is ``I - A^+ A``. ``matrix`` and ``offset`` receive gradients where they are
        tensors that require them (with redundant rows: along right-hand sides that have a solution); for the matrix
        the pseudo-inverse is then computed again in every call. A NaN or an infinity anywhere makes every leaf NaN.
        See :meth:`ConvexSet.project`.
        """
        self.check(point, "point")
        matrix, own, spec = self._flat_matrix(), tree.structure(self.matrix), tree.structure(point)
        inverse = torch.linalg.pinv(matrix) if self._learns_matrix else self._inverse
        parts = tree.aligned_leaves(point, own)
        flat = torch.cat([part.reshape(-1).to(matrix.dtype) for part in parts])
        steps = (inverse @ (matrix @ flat - self.offset)).split([part.numel() for part in parts])
        moved = [
            (part.to(matrix.dtype) - step.reshape(part.shape)).to(part.dtype)
            for part, step in zip(parts, steps, strict=True)
        ]
        return tree.unflatten(tree.aligned_leaves(tree.unflatten(moved, own), spec), spec)

    @property
    def is_whole_space(self) -> bool:
        """True where the matrix is zero."""
        return not bool(self._inverse.any())

    def check(self, point: Tree, name: str) -> None:
        """See :meth:`ConvexSet.check`; the matrix must match the leaves in structure, shape, dtype and device."""
        super().check(point, name)
        try:
            entries = tree.aligned_leaves(self.matrix, tree.structure(point))
        except ValueError as error:
            cure = f"give one entry for each leaf of {name}, under the same keys"
            raise mismatch("Affine.matrix", self.matrix, point, name, cure) from error
        for i, (entry, leaf) in enumerate(zip(entries, tree.leaves(point), strict=True)):
            if (entry.shape[1:], entry.dtype, entry.device) != (leaf.shape, leaf.dtype, leaf.device):
                raise ValueError(
                    f"Affine.matrix{tree.paths(point)[i]} is {entry.dtype} of shape {tuple(entry.shape)} on "
                    f"{entry.device}, but {leaf_name(name, point, i)} is {leaf.dtype} of shape {tuple(leaf.shape)} on "
                    f"{leaf.device}: give the matrix the shape (m, *shape of the leaf), dtype and device of the leaf"
                )

    @property
    def _learns_matrix(self) -> bool:
        return any(entry.requires_grad for entry in tree.leaves(self.matrix))

    def _flat_matrix(self) -> Tensor:
        entries = tree.leaves(self.matrix)
        dtype = compute_dtype(entries)
        return torch.cat([entry.reshape(len(entry), -1).to(dtype) for entry in entries], dim=1)

    def _check_consistent(self, matrix: Tensor) -> None:
        offset = torch.zeros(len(matrix), dtype=matrix.dtype, device=matrix.device) + self.offset
        gap = torch.linalg.vector_norm(matrix @ (self._inverse @ offset) - offset)
        if bool(gap > math.sqrt(torch.finfo(matrix.dtype).eps) * torch.linalg.vector_norm(offset)):
            raise ValueError(
                f"Affine: the {len(matrix)} equations contradict each other (the nearest right-hand side that has a "
                f"solution is {float(gap):.3g} away from Affine.offset): correct the matrix or the offset"
            )


def _row_count(matrix: Tree) -> int:
    """The number m of equations, after checks of the entries' types and leading sizes."""
    counts = {}
    for path, entry in zip(tree.paths(matrix), tree.leaves(matrix), strict=True):
        if not isinstance(entry, Tensor) or not entry.is_floating_point():
            raise TypeError(f"Affine.matrix{path} = {entry!r}: give a floating-point tensor of shape (m, *leaf shape)")
        if not entry.ndim or not len(entry):
            raise ValueError(f"Affine.matrix{path} has shape {tuple(entry.shape)}: give it (m, *leaf shape), m > 0")
        counts[f"Affine.matrix{path}"] = len(entry)
    if len(set(counts.values())) != 1:
        raise ValueError(f"the entries of Affine.matrix differ in their numbers of rows, {counts}: give all m rows")
    return next(iter(counts.values()))
