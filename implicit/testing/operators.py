"""Conformance of linear operators."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from implicit import tree
from implicit.operators import LinearOperator
from implicit.testing.spaces import DTYPES, spaces
from implicit.testing.verdict import Verdict, distance, identical, name_of, reordered, shares_memory, short
from implicit.tree import Tree

DENSE = 300
"""Largest dimension for which the matrix is written down and its eigenvalues are computed."""
BLOCK = 5


def check_operator(
    operator: LinearOperator | Callable[[Tree], LinearOperator],
    *,
    dense: Tensor | Callable[[Tree], Tensor] | None = None,
    rtol: float | None = None,
    dtypes: Sequence[torch.dtype] = DTYPES,
) -> None:
    """Whether an operator keeps every promise of :class:`implicit.LinearOperator`.

    It must be linear; give the same product through ``mv``, ``mm`` in chunks, ``@``, ``flat_mv``, ``flat_mm``,
    ``to_dense`` and ``to_scipy``; have the transpose with :math:`\\langle A v, u\\rangle = \\langle v, A^T u\\rangle`,
    or refuse it; be symmetric and positive definite where it declares so (by products, and up to 300 unknowns by
    eigenvalues); count one product per vector; keep structure, dtype and device; pair dicts by key; repeat itself
    to rounding; and neither modify its argument, nor share its memory, nor leave a graph.

    Args:
        operator: an operator, or a function of a domain (a tree of numbers) that builds one. A function is tried in
            every dtype on nested containers, one vector, one number, tied leaves and an empty tree.
        dense: what the operator should equal: the matrix, shape ``(m, n)``, or a function of the domain.
        rtol: accuracy of a product relative to the norm of the operator; None means ``eps^(3/4)`` of the dtype (1.8e-12
            in float64). Operators made of finite differences need more.
        dtypes: where a function is tried.

    Raises:
        ConformanceError: with one sentence, for the first promise that is broken.
        TypeError: if ``operator`` is neither.

    Example:
        >>> import torch, implicit
        >>> from implicit.testing import check_operator
        >>> check_operator(lambda like: implicit.Hessian(lambda y: implicit.tree.dot(y, y) ** 2, like))
        >>> check_operator(implicit.Dense(torch.tensor([[1.0, 2.0], [0.0, 1.0]])))
        Traceback (most recent call last):
        ...
        implicit.testing.verdict.ConformanceError: Dense: declares symmetric, but <u, A v> and ...
    """
    if isinstance(operator, LinearOperator):
        if callable(dense):
            dense = dense(operator.like)
        _Check(operator, dense, rtol, Verdict(type(operator).__name__)).run()
        return
    if not callable(operator):
        raise TypeError(f"operator must be a LinearOperator or a function that builds one, got {operator!r}")
    if isinstance(dense, Tensor):
        raise TypeError("dense must be a function of the domain where operator is one")
    for dtype in dtypes:
        for space, like in spaces(dtype).items():
            verdict = Verdict(name_of(operator), f"{space}, {short(dtype)}")
            kept = tree.clone(like)
            with verdict.runs("building it"):
                built = operator(like)
            verdict(isinstance(built, LinearOperator), f"the function returned {type(built).__name__}, no operator")
            verdict = Verdict(type(built).__name__, verdict.where)
            _Check(built, None if dense is None else dense(like), rtol, verdict).run()
            verdict(identical(like, kept), "the tree it was built from has been modified")


@dataclass
class _Check:
    """One operator with its probes."""

    operator: LinearOperator
    dense: Tensor | None
    rtol: float | None
    verdict: Verdict

    def run(self) -> None:
        operator, verdict = self.operator, self.verdict
        with verdict.runs("reading its declarations"):
            self.declared()
        eps = float(torch.finfo(operator.dtype).eps)
        self.tolerance = eps**0.75 if self.rtol is None else self.rtol
        generator = torch.Generator().manual_seed(0)
        self.v, self.w = (tree.randn_like(operator.like, generator) for _ in range(2))
        self.rows = torch.stack([tree.ravel(tree.randn_like(operator.like, generator)) for _ in range(BLOCK)])
        self.u = tree.randn_like(operator.out, generator)
        with verdict.runs("a product"):
            self.image = operator @ self.v
        self.returned()
        with verdict.runs("a product"):
            self.measure()
            for aspect in (self.effects, self.counted, self.linear, self.forms, self.keys, self.transposed):
                aspect()
            self.definite()

    def declared(self) -> None:
        """Shape, dtype, and what the declarations imply."""
        a, verdict = self.operator, self.verdict
        shape = (tree.size(a.out), tree.size(a.like))
        verdict(a.shape == shape, f"shape is {a.shape}, but its spaces have {shape}; let super().__init__ set it")
        verdict(a.size == shape[1], f"size is {a.size}, its domain has {shape[1]} numbers")
        found = tree.common_dtype(a.like)
        verdict(a.dtype == found, f"dtype is {a.dtype}, its domain has {found}")
        verdict(
            not a.positive_definite or a.symmetric, "declares positive_definite without symmetric; CG relies on both"
        )
        square = tree.structure(a.like) == tree.structure(a.out)
        verdict(not a.symmetric or square, f"declares symmetric, but maps between two spaces, shape {a.shape}")

    def returned(self) -> None:
        """Structure, shapes, dtype and device of a product."""
        a, verdict = self.operator, self.verdict
        with verdict.runs("mv"):
            raw = a.mv(self.v)
        for name, value in (("A @ v", self.image), ("mv(v)", raw)):
            ordered = tree.structure(value) == tree.structure(a.out)
            verdict(
                ordered,
                f"{name} is {tree.describe(value)}, out is {tree.describe(a.out)}; containers must be those of out and "
                "dict keys in its order, or ravelled products are silently permuted",
            )
            for own, leaf in zip(tree.leaves(a.out), tree.leaves(value), strict=True):
                verdict(
                    leaf.shape == own.shape, f"a leaf of {name} has shape {tuple(leaf.shape)}, out {tuple(own.shape)}"
                )
                verdict(
                    leaf.dtype == own.dtype, f"{name} has dtype {leaf.dtype}, out has {own.dtype}; nothing may be cast"
                )
                verdict(leaf.device == own.device, f"{name} is on {leaf.device}, out on {own.device}")
                verdict(
                    not leaf.requires_grad, f"{name} requires grad although v does not; detach it, or graphs pile up"
                )

    def measure(self) -> None:
        """The matrix, column by column, and the norm that errors are compared with."""
        a = self.operator
        self.matrix: Tensor | None = None
        if max(a.shape) <= DENSE:
            identity = torch.eye(a.size, dtype=a.dtype, device=a.device)
            columns = [a.flat_mv(column) for column in identity]
            self.matrix = torch.stack(columns, dim=1) if columns else identity.new_zeros(a.shape)
            self.norm = float(torch.linalg.matrix_norm(self.matrix.double())) if self.matrix.numel() else 0.0
        else:
            images = torch.stack([a.flat_mv(row) for row in self.rows])
            self.norm = float((images.norm(dim=1) / self.rows.norm(dim=1)).max()) * a.size**0.5
        finite = self.norm < float("inf")
        self.verdict(finite, "a product with a finite vector is not finite")
        if self.dense is not None:
            expected = self.dense.to(a.dtype)
            found = a.flat_mm(self.rows)
            error = distance(found, self.rows @ expected.T) / (float(self.rows.norm()) or 1.0)
            scale = float(torch.linalg.matrix_norm(expected.double())) if expected.numel() else 0.0
            self.verdict.close(error, self.tolerance * scale, "products differ from those of dense", "A v is wrong")

    def near(self, found: Tree, expected: Tree, size: float, what: str, cause: str) -> None:
        self.verdict.close(distance(found, expected), self.tolerance * self.norm * size, what, cause)

    def effects(self) -> None:
        """What a product must not do."""
        a, verdict = self.operator, self.verdict
        like, v = tree.clone(a.like), tree.clone(self.v)
        rows = self.rows.clone()
        first = a @ self.v
        kept = tree.clone(first)
        block = a.flat_mm(self.rows)
        verdict(identical(v, self.v), "A @ v modifies v in place; work on a copy")
        verdict(torch.equal(rows, self.rows), "flat_mm modifies its rows in place; work on a copy")
        verdict(identical(like, a.like), "a product modifies the point where the operator was taken")
        shared = shares_memory(first, self.v) or shares_memory(a.mv(self.v), self.v) or shares_memory(block, self.rows)
        verdict(
            not shared, "a product shares the memory of its argument, so writing to one changes the other; clone it"
        )
        _ = a @ self.w
        verdict(identical(first, kept), "a later product overwrites an earlier one: both live in one buffer")
        again = a @ self.v
        # An operator may change its order of computation between two products, and with it the rounding.
        allowed = min(self.tolerance, 100.0 * float(torch.finfo(a.dtype).eps)) * self.norm * float(tree.norm(self.v))
        cause = "remove randomness (Dropout, BatchNorm in training, shuffled data) from it"
        verdict.close(distance(again, first), allowed, "two products with the same vector differ", cause)

    def counted(self) -> None:
        """One product per vector."""
        a = self.operator
        calls: list[tuple[str, Callable[[], object], int]] = [
            ("A @ v", lambda: a @ self.v, 1),
            ("flat_mv", lambda: a.flat_mv(self.rows[0]), 1),
            (f"flat_mm of {BLOCK} rows", lambda: a.flat_mm(self.rows), BLOCK),
            (f"flat_mm of {BLOCK} rows in chunks of 2", lambda: a.flat_mm(self.rows, chunk=2), BLOCK),
            ("flat_mm of no rows", lambda: a.flat_mm(self.rows[:0]), 0),
            (f"mm of {BLOCK} trees", lambda: a.mm(tree.unravel(self.rows, a.like)), BLOCK),
        ]
        for name, call, expected in calls:
            before = a.products
            call()
            counted = a.products - before
            self.verdict(
                counted == expected,
                f"{name} counts {counted} products instead of {expected}; add to self.products in what you override",
            )

    def linear(self) -> None:
        """A (2v - 3w) and A 0."""
        a, v, w = self.operator, self.v, self.w
        zero = float(tree.norm(a @ tree.zeros_like(v)))
        self.verdict(zero == 0.0, f"A 0 has norm {zero:.3g} instead of zero; the map has a constant part")
        mixed = tree.sub(tree.scale(2.0, v), tree.scale(3.0, w))
        parts = tree.sub(tree.scale(2.0, a @ v), tree.scale(3.0, a @ w))
        size = 2.0 * float(tree.norm(v)) + 3.0 * float(tree.norm(w))
        self.near(a @ mixed, parts, size, "A (2v - 3w) and 2 A v - 3 A w differ", "the operator is not linear")

    def forms(self) -> None:
        """The same product through every door."""
        a, k = self.operator, BLOCK
        single = torch.stack([a.flat_mv(row) for row in self.rows])
        size = float(self.rows.norm())
        stacked = tree.unravel(self.rows, a.like)
        doors: list[tuple[str, Callable[[], Tensor]]] = [
            ("A @ v of one tree after the other", lambda: torch.stack([tree.ravel(a @ t) for t in self.trees()])),
            ("mv", lambda: torch.stack([tree.ravel(a.mv(t)) for t in self.trees()])),
            ("flat_mm", lambda: a.flat_mm(self.rows)),
            ("flat_mm of one row", lambda: torch.cat([a.flat_mm(row[None]) for row in self.rows])),
            ("flat_mm in chunks of 2", lambda: a.flat_mm(self.rows, chunk=2)),
            ("mm", lambda: tree.ravel_batch(a.mm(stacked))),
            ("mm in chunks of 3", lambda: tree.ravel_batch(a.mm(stacked, chunk=3))),
            ("A @ k stacked trees", lambda: tree.ravel_batch(a @ stacked)),
        ]
        if self.matrix is not None:
            doors.append(("to_dense", lambda: self.rows @ a.to_dense().T))
        for name, call in doors:
            found = call()
            self.verdict(
                found.shape == single.shape and found.dtype == single.dtype,
                f"{name} gives {tuple(found.shape)} of {found.dtype}, flat_mv {tuple(single.shape)} of {single.dtype}",
            )
            self.near(found, single, size, f"{name} and flat_mv differ", "one of the two is wrong")
        none = a.flat_mm(self.rows[:0])
        shape = (0, a.shape[0])
        self.verdict(tuple(none.shape) == shape, f"flat_mm of no rows has shape {tuple(none.shape)} instead of {shape}")
        if a.device.type == "cpu" and a.dtype in (torch.float32, torch.float64):
            self.numpy(single, k)

    def trees(self) -> list[Tree]:
        return [tree.unravel(row, self.operator.like) for row in self.rows]

    def numpy(self, single: Tensor, k: int) -> None:
        """to_scipy."""
        a, size = self.operator, float(self.rows.norm())
        other, columns = a.to_scipy(), self.rows.numpy().T
        self.verdict(tuple(other.shape) == a.shape, f"to_scipy has shape {other.shape}, the operator {a.shape}")
        block = torch.as_tensor(other.matmat(columns)).T
        self.near(block, single, size, "to_scipy().matmat and flat_mv differ", "one of the two is wrong")
        vector = torch.as_tensor(other.matvec(columns[:, 0]))
        self.near(vector, single[0], size, "to_scipy().matvec and flat_mv differ", "one of the two is wrong")

    def keys(self) -> None:
        """A dict is the same tree whatever the order of its keys."""
        found = self.operator @ reordered(self.v)
        cause = "leaves are paired by position instead of by key; use implicit.tree.map"
        same = tree.structure(found) == tree.structure(self.operator.out)
        self.verdict(same, "the product of a dict with its keys in another order has another structure than out")
        self.near(found, self.image, float(tree.norm(self.v)), "reordering the keys of v changes A v", cause)

    def transposed(self) -> None:
        """<A v, u> = <v, A^T u>."""
        a, verdict = self.operator, self.verdict
        u, size = self.u, float(tree.norm(self.v)) * float(tree.norm(self.u))
        left = float(tree.dot(self.image, u))
        if a.symmetric:
            gap = abs(left - float(tree.dot(a @ u, self.v)))
            what = "declares symmetric, but <u, A v> and <A u, v> differ"
            verdict.close(gap, self.tolerance * self.norm * size, what, "declare symmetric=False, or mend the product")
        try:
            turned = a.T
        except TypeError:
            verdict(not a.symmetric, "declares symmetric, but refuses its transpose")
            return
        verdict(turned.shape == a.shape[::-1], f"the transpose has shape {turned.shape}, the operator {a.shape}")
        before = turned.products
        back = turned @ u
        verdict(turned.products == before + 1, "the transpose does not count its product")
        verdict(tree.structure(back) == tree.structure(a.like), "A.T @ u does not have the structure of the domain")
        gap = abs(left - float(tree.dot(back, self.v)))
        cause = "A.T is not the transpose of A"
        verdict.close(gap, self.tolerance * self.norm * size, "<A v, u> and <v, A.T u> differ", cause)
        twice, what = turned.T @ self.v, "A.T.T v and A v differ"
        self.near(twice, self.image, float(tree.norm(self.v)), what, "the transpose of the transpose is not A")

    def definite(self) -> None:
        """Declared positive definiteness, by products and eigenvalues."""
        a = self.operator
        if not a.positive_definite or not a.size:
            return
        cause = "do not declare positive_definite, or add a shift: CG relies on it"
        for row in self.rows:
            curvature = float(row @ a.flat_mv(row)) / float(row @ row)
            floor = -self.tolerance * self.norm
            self.verdict(curvature > floor, f"declares positive_definite, but v.Av / v.v = {curvature:.3g}; {cause}")
        if self.matrix is None:
            return
        values = torch.linalg.eigvalsh(0.5 * (self.matrix + self.matrix.T).double())
        least, largest = float(values[0]), float(values[-1])
        # No product can tell an eigenvalue below this from zero.
        floor = a.size * max(float(torch.finfo(a.dtype).eps), 0.0 if self.rtol is None else self.rtol) * largest
        self.verdict(
            least > floor,
            f"declares positive_definite, but its eigenvalues lie in [{least:.3g}, {largest:.3g}]; {cause}",
        )
