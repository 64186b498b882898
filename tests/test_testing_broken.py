"""Broken third-party classes: each conformance check fails with the sentence that names the fault."""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import implicit
from implicit import LinearOperator, LinearSolver, Preconditioner, State, Status, tree
from implicit.linear_solvers import FlatSolution
from implicit.testing import (
    ConformanceError,
    CountedMatrix,
    System,
    check_derivatives,
    check_linear_solver,
    check_method,
    check_minimizer,
    check_operator,
    check_preconditioner,
    spaces,
    systems,
)
from implicit.tree import Tree

DOUBLE = [torch.float64]


def square(like: Tree) -> Tensor:
    n = tree.size(like)
    matrix = torch.randn(n, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    return matrix.to(tree.common_dtype(like))


# ---------------------------------------------------------------- broken operators


class Matrix(LinearOperator):
    """A correct operator, written the short way."""

    def __init__(self, like: Tree) -> None:
        super().__init__(like)
        self.matrix = square(like)

    def mv(self, v: Tree) -> Tree:
        return tree.unravel(self.matrix @ tree.ravel(v), self.out)

    @property
    def T(self) -> LinearOperator:
        return implicit.Dense(self.matrix.T, self.out, self.like, symmetric=False)


class WrongTranspose(Matrix):
    @property
    def T(self) -> LinearOperator:
        return self


class ClaimsSymmetry(Matrix):
    symmetric = True


class ClaimsDefiniteness(Matrix):
    symmetric = positive_definite = True

    def __init__(self, like: Tree) -> None:
        super().__init__(like)
        self.matrix = torch.diag(torch.linspace(-1e-3, 1.0, self.size, dtype=self.dtype))


class Singular(ClaimsDefiniteness):
    def __init__(self, like: Tree) -> None:
        super().__init__(like)
        self.matrix = torch.diag(torch.linspace(0.0, 1.0, self.size, dtype=self.dtype))


class DefiniteAlone(Matrix):
    positive_definite = True


class Uncounted(Matrix):
    def flat_mv(self, vector: Tensor) -> Tensor:
        return self.matrix @ vector


class BlocksCountOnce(Matrix):
    def _flat_block(self, rows: Tensor) -> Tensor:
        self.products += 1
        return rows @ self.matrix.T


class Mutating(Matrix):
    def mv(self, v: Tree) -> Tree:
        found = super().mv(v)
        for leaf in tree.leaves(v):
            leaf.mul_(2.0)
        return found


class Aliasing(Matrix):
    symmetric = True

    def mv(self, v: Tree) -> Tree:
        return v


class OneBuffer(Matrix):
    def __init__(self, like: Tree) -> None:
        super().__init__(like)
        self.buffer = tree.clone(like)

    def mv(self, v: Tree) -> Tree:
        tree.copy_(self.buffer, super().mv(v))
        return self.buffer

    def flat_mv(self, vector: Tensor) -> Tensor:
        self.products += 1
        return self.matrix @ vector

    def __matmul__(self, v: Any) -> Any:
        self.products += 1
        return self.mv(tree.map(lambda _, leaf: leaf, self.like, v))


class Dropout(Matrix):
    generator = torch.Generator().manual_seed(0)

    def mv(self, v: Tree) -> Tree:
        noise = 1.0 + 1e-3 * torch.randn((), generator=self.generator, dtype=torch.float64)
        return tree.scale(float(noise), super().mv(v))


class Affine(Matrix):
    def mv(self, v: Tree) -> Tree:
        return tree.map(lambda leaf: leaf + 1.0, super().mv(v))


class Leaking(Matrix):
    def __init__(self, like: Tree) -> None:
        super().__init__(like)
        self.matrix.requires_grad_()


class Casting(Matrix):
    def mv(self, v: Tree) -> Tree:
        return tree.map(lambda leaf: leaf.float(), super().mv(v))


class ByPosition(Matrix):
    def __matmul__(self, v: Any) -> Any:
        single = not isinstance(v, LinearOperator) and tree.size(v) == self.size
        return tree.unravel(self.flat_mv(tree.ravel(v)), self.out) if single else super().__matmul__(v)


class OtherKeyOrder(Matrix):
    def mv(self, v: Tree) -> Tree:
        found = super().mv(v)
        return {key: found[key] for key in reversed(found)} if isinstance(found, dict) else found


class WrongBlocks(Matrix):
    def _flat_block(self, rows: Tensor) -> Tensor:
        self.products += len(rows)
        return rows @ self.matrix


class Drifting(Matrix):
    def mv(self, v: Tree) -> Tree:
        for leaf in tree.leaves(self.like):
            leaf.add_(1.0)
        return super().mv(v)


class Overflowing(Matrix):
    def mv(self, v: Tree) -> Tree:
        return tree.scale(float("inf"), super().mv(v))


class NoScalars(Matrix):
    def mv(self, v: Tree) -> Tree:
        return tree.map(lambda leaf: leaf[None][0] * leaf.shape[0], v)


class Squaring(Matrix):
    def mv(self, v: Tree) -> Tree:
        return tree.map(lambda leaf: leaf**2, v)


class WrongShape(Matrix):
    def mv(self, v: Tree) -> Tree:
        return tree.map(lambda leaf: leaf.reshape(-1), super().mv(v))


class WrongSize(Matrix):
    def __init__(self, like: Tree) -> None:
        super().__init__(like)
        self.shape = (self.size + 1, self.size)


class WrongDtype(Matrix):
    def __init__(self, like: Tree) -> None:
        super().__init__(like)
        self.dtype = torch.float16


class SymmetricBetweenSpaces(implicit.Dense):
    def __init__(self, like: Tree) -> None:
        super().__init__(torch.ones(2, tree.size(like), dtype=tree.common_dtype(like)), like, symmetric=False)
        self.symmetric = True


class ChangesItsTree(Matrix):
    def __init__(self, like: Tree) -> None:
        super().__init__(like)
        for leaf in tree.leaves(like):
            leaf.zero_()


class BlocksInPlace(Matrix):
    def _flat_block(self, rows: Tensor) -> Tensor:
        found = super()._flat_block(rows)
        rows.zero_()
        return found


class HalfBlocks(Matrix):
    def _flat_block(self, rows: Tensor) -> Tensor:
        return super()._flat_block(rows).half()


class EmptyBlocks(Matrix):
    def flat_mm(self, rows: Tensor, chunk: int | None = None) -> Tensor:
        return super().flat_mm(rows, chunk) if len(rows) else torch.zeros(0, dtype=self.dtype)


class WrongScipy(Matrix):
    def to_scipy(self) -> Any:
        return (2.0 * self).to_scipy()


class OddScipy(Matrix):
    def to_scipy(self) -> Any:
        return implicit.Dense(torch.ones(1, self.size, dtype=self.dtype), symmetric=False).to_scipy()


class RefusesTranspose(Matrix):
    symmetric = True

    def __init__(self, like: Tree) -> None:
        super().__init__(like)
        self.matrix = self.matrix + self.matrix.T

    @property
    def T(self) -> LinearOperator:
        raise TypeError("no transpose")


class NarrowTranspose(Matrix):
    @property
    def T(self) -> LinearOperator:
        return implicit.Dense(torch.ones(1, self.size, dtype=self.dtype), self.like, symmetric=False)


class QuietTranspose(Matrix):
    @property
    def T(self) -> LinearOperator:
        turned = Uncounted(self.like)
        turned.matrix = self.matrix.T
        turned.__class__ = type("Quiet", (Uncounted,), {"__matmul__": lambda a, v: a.mv(v)})
        return turned


class LostTranspose(Matrix):
    @property
    def T(self) -> LinearOperator:
        turned = WrongTranspose(self.like)
        turned.matrix = self.matrix.T
        return turned


class Offset(Matrix):
    def mv(self, v: Tree) -> Tree:
        return tree.map(lambda leaf: leaf + 1e-15, super().mv(v))


BROKEN_OPERATORS: list[tuple[type[LinearOperator], str]] = [
    (WrongTranspose, r"<A v, u> and <v, A\.T u> differ by .*; A\.T is not the transpose of A"),
    (ClaimsSymmetry, r"declares symmetric, but <u, A v> and <A u, v> differ by"),
    (ClaimsDefiniteness, r"declares positive_definite, but (its eigenvalues lie in \[-0.001|v\.Av / v\.v = -)"),
    (Singular, r"declares positive_definite, but its eigenvalues lie in \[\S+, 1\]"),
    (DefiniteAlone, r"declares positive_definite without symmetric"),
    (Uncounted, r"(A @ v|flat_mv) counts 0 products instead of 1; add to self\.products"),
    (BlocksCountOnce, r"flat_mm of 5 rows counts 1 products instead of 5"),
    (Mutating, r"(A @ v modifies v|flat_mm modifies its rows) in place; work on a copy"),
    (Aliasing, r"a product shares the memory of its argument"),
    (OneBuffer, r"a later product overwrites an earlier one: both live in one buffer"),
    (Dropout, r"two products with the same vector differ by .*; remove randomness"),
    (Affine, r"A 0 has norm \S+ instead of zero; the map has a constant part"),
    (Leaking, r"requires grad although v does not; detach it"),
    (Casting, r"has dtype torch\.float32, out has torch\.float64; nothing may be cast"),
    (ByPosition, r"reordering the keys of v changes A v by .*; leaves are paired by position"),
    (OtherKeyOrder, r"dict keys in its order, or ravelled products are silently permuted"),
    (WrongBlocks, r"flat_mm and flat_mv differ by"),
    (Drifting, r"a product modifies the point where the operator was taken"),
    (Overflowing, r"a product with a finite vector is not finite"),
    (NoScalars, r"a product raised IndexError"),
    (Squaring, r"A \(2v - 3w\) and 2 A v - 3 A w differ by .*; the operator is not linear"),
    (WrongSize, r"shape is \(12, 11\), but its spaces have \(11, 11\)"),
    (WrongDtype, r"dtype is torch\.float16, its domain has torch\.float64"),
    (SymmetricBetweenSpaces, r"declares symmetric, but maps between two spaces, shape \(2, 11\)"),
    (ChangesItsTree, r"the tree it was built from has been modified"),
    (BlocksInPlace, r"flat_mm modifies its rows in place"),
    (HalfBlocks, r"flat_mm gives \(5, 11\) of torch\.float16, flat_mv \(5, 11\) of torch\.float64"),
    (EmptyBlocks, r"flat_mm of no rows has shape \(0,\) instead of \(0, 11\)"),
    (WrongScipy, r"to_scipy\(\)\.matmat and flat_mv differ by"),
    (OddScipy, r"to_scipy has shape \(1, 11\), the operator \(11, 11\)"),
    (RefusesTranspose, r"declares symmetric, but refuses its transpose"),
    (NarrowTranspose, r"the transpose has shape \(1, 11\), the operator \(11, 11\)"),
    (QuietTranspose, r"the transpose does not count its product"),
    (LostTranspose, r"A\.T\.T v and A v differ by"),
    (Offset, r"A 0 has norm 3\S*e-15 instead of zero; the map has a constant part"),
    (WrongShape, r"a leaf of A @ v has shape \(6,\), out \(2, 3\)"),
]


@pytest.mark.parametrize(("broken", "sentence"), BROKEN_OPERATORS, ids=[b.__name__ for b, _ in BROKEN_OPERATORS])
def test_broken_operators_fail_by_name(broken: type[LinearOperator], sentence: str) -> None:
    check_operator(Matrix, dense=square)
    with pytest.raises(ConformanceError, match=f"^{broken.__name__} .*float64.*(?:{sentence})") as failure:
        check_operator(broken)
    assert "\n" not in str(failure.value)
    assert isinstance(failure.value, AssertionError)


def test_an_operator_is_compared_with_its_matrix() -> None:
    operator = Matrix(spaces(torch.float64)["nested"])
    check_operator(operator, dense=operator.matrix)
    with pytest.raises(ConformanceError, match=r"^Matrix: products differ from those of dense by .*; A v is wrong"):
        check_operator(operator, dense=2.0 * operator.matrix)
    with pytest.raises(TypeError, match="operator must be a LinearOperator or a function that builds one"):
        check_operator(3)  # type: ignore[arg-type]
    with pytest.raises(ConformanceError, match="the function returned int, no operator"):
        check_operator(lambda like: 3)  # type: ignore[arg-type, return-value]


def test_large_operators_are_checked_without_their_matrix() -> None:
    check_operator(implicit.Diagonal(torch.linspace(1.0, 2.0, 2_000)))
    wrong = implicit.Diagonal(torch.linspace(-2.0, -1.0, 2_000))
    wrong.positive_definite = True
    with pytest.raises(ConformanceError, match=r"declares positive_definite, but v\.Av / v\.v = -1\.5"):
        check_operator(wrong)


# ---------------------------------------------------------------- broken linear solvers


@dataclass(frozen=True, kw_only=True)
class Direct(LinearSolver):
    """A correct solver by least squares; the broken ones change one line of it."""

    rtol: float = 1e-6
    max_steps: int = 5

    def init(self, operator: LinearOperator) -> Tensor:
        return operator.to_dense()

    def transpose(self, prepared: Tensor) -> Tensor:
        return prepared.T

    def answer(self, matrix: Tensor, b: Tensor, x0: Tensor | None) -> Tensor:
        """Rows (k, n)."""
        finite = torch.isfinite(matrix).all() & torch.isfinite(b).all()
        if not bool(finite):
            return torch.full((len(b), matrix.shape[1]), torch.nan, dtype=b.dtype)
        return torch.linalg.lstsq(matrix, b.T, driver="gelsd").solution.T

    def solve_flat(self, operator: LinearOperator, prepared: Tensor, b: Tensor, x0: Tensor | None) -> FlatSolution:
        x = self.answer(prepared, b, x0)
        residuals, norms = (b - x @ prepared.T).norm(dim=1), b.norm(dim=1)
        return self.report(x, residuals, norms)

    def report(self, x: Tensor, residuals: Tensor, norms: Tensor) -> FlatSolution:
        solved = bool((residuals <= self.rtol * norms).all())
        status = Status.CONVERGED if solved else Status.STALLED
        if not bool(torch.isfinite(residuals).all()):
            status = Status.NONFINITE
        return FlatSolution(x, residuals, norms, 1, status, False, "lstsq")


class Loose(Direct):
    def answer(self, matrix: Tensor, b: Tensor, x0: Tensor | None) -> Tensor:
        return 0.99 * super().answer(matrix, b, x0)

    def report(self, x: Tensor, residuals: Tensor, norms: Tensor) -> FlatSolution:
        return super().report(x, torch.zeros_like(residuals), norms)


class ByStepCount(Direct):
    def report(self, x: Tensor, residuals: Tensor, norms: Tensor) -> FlatSolution:
        found = super().report(x, residuals, norms)
        return replace(found, status=Status.STEP_LIMIT) if self.max_steps == 1 else found


class TextbookCG(Direct):
    """No look at the sign of the curvature, success read off the recursion."""

    def init(self, operator: LinearOperator) -> Any:
        return None

    def solve_flat(self, operator: LinearOperator, prepared: Any, b: Tensor, x0: Tensor | None) -> FlatSolution:
        x, r, p, steps = torch.zeros_like(b[0]), b[0].clone(), b[0].clone(), 0
        while steps < 10 * len(x) and float(r @ r) > 0:
            ap = operator.flat_mv(p)
            alpha = (r @ r) / (p @ ap).abs()
            x, new, steps = x + alpha * p, r - alpha * ap, steps + 1
            p, r = new + (new @ new) / (r @ r) * p, new
        return FlatSolution(x[None], b.new_zeros(1), b.norm(dim=1), steps, Status.CONVERGED, False, "")


class MutatesB(Direct):
    def answer(self, matrix: Tensor, b: Tensor, x0: Tensor | None) -> Tensor:
        found = super().answer(matrix, b, x0)
        b.zero_()
        return found

    def solve(self, operator: LinearOperator, b: Tree, **options: Any) -> Any:
        found = super().solve(operator, b, **options)
        for leaf in tree.leaves(b):
            leaf.zero_()
        return found


class Uncounting(Direct):
    def init(self, operator: LinearOperator) -> Tensor:
        columns = [
            tree.ravel(operator.mv(tree.unravel(e, operator.like))) for e in torch.eye(operator.size).to(operator.dtype)
        ]
        return torch.stack(columns, 1) if columns else torch.zeros(operator.shape, dtype=operator.dtype)


class ResidualZero(Direct):
    def report(self, x: Tensor, residuals: Tensor, norms: Tensor) -> FlatSolution:
        return replace(super().report(x, residuals, norms), residuals=0.5 * residuals)


class RaisesOnNaN(Direct):
    def answer(self, matrix: Tensor, b: Tensor, x0: Tensor | None) -> Tensor:
        if not bool(torch.isfinite(matrix).all()):
            raise FloatingPointError("NaN")
        return super().answer(matrix, b, x0)


class IgnoresNaN(Direct):
    def report(self, x: Tensor, residuals: Tensor, norms: Tensor) -> FlatSolution:
        found = super().report(x, residuals, norms)
        return replace(found, status=Status.STALLED) if found.status is Status.NONFINITE else found


class StopsAtZeros(Direct):
    """hypertorch's rule: an exact zero in the residual ends the iteration."""

    def answer(self, matrix: Tensor, b: Tensor, x0: Tensor | None) -> Tensor:
        stopped = (b == 0).any(dim=1, keepdim=True)
        return torch.where(stopped, torch.zeros_like(b), super().answer(matrix, b, x0))


class AbsoluteTolerance(Direct):
    def answer(self, matrix: Tensor, b: Tensor, x0: Tensor | None) -> Tensor:
        small = b.norm(dim=1, keepdim=True) <= 1e-12
        return torch.where(small, torch.zeros_like(b), super().answer(matrix, b, x0))


class NormOfAll(Direct):
    """One norm for all right-hand sides: small ones are dropped."""

    def answer(self, matrix: Tensor, b: Tensor, x0: Tensor | None) -> Tensor:
        small = b.norm(dim=1, keepdim=True) <= 1e-3 * b.norm()
        return torch.where(small, torch.zeros_like(b), super().answer(matrix, b, x0))

    def report(self, x: Tensor, residuals: Tensor, norms: Tensor) -> FlatSolution:
        solved = replace(super().report(x, residuals, norms), status=Status.CONVERGED)
        return solved if bool(torch.isfinite(residuals).all()) else super().report(x, residuals, norms)


class AddsX0(Direct):
    def answer(self, matrix: Tensor, b: Tensor, x0: Tensor | None) -> Tensor:
        found = super().answer(matrix, b, None)
        return found if x0 is None else x0.copy_(found)


class IgnoresLimit(Direct):
    def report(self, x: Tensor, residuals: Tensor, norms: Tensor) -> FlatSolution:
        return replace(super().report(x, residuals, norms), steps=7)


class RandomStart(Direct):
    def answer(self, matrix: Tensor, b: Tensor, x0: Tensor | None) -> Tensor:
        return super().answer(matrix, b, x0) * (1.0 + 1e-9 * torch.rand(()))


class ForgetsTranspose(Direct):
    def transpose(self, prepared: Tensor) -> Tensor:
        return prepared


class Singles(Direct):
    def answer(self, matrix: Tensor, b: Tensor, x0: Tensor | None) -> Tensor:
        return super().answer(matrix, b.float().to(b.dtype), x0)


class Endless(Direct):
    def report(self, x: Tensor, residuals: Tensor, norms: Tensor) -> FlatSolution:
        return replace(super().report(x, residuals, norms), status=Status.RUNNING)


class ChangesA(Direct):
    def init(self, operator: LinearOperator) -> Tensor:
        found = super().init(operator)
        if isinstance(operator, CountedMatrix):
            operator.matrix.mul_(2.0)
        return found


class Changed(Direct):
    """Changes the value that ``solve`` returns."""

    def change(self, value: Tree) -> Tree:
        raise NotImplementedError

    def solve(self, operator: LinearOperator, b: Tree, **options: Any) -> Any:
        found = super().solve(operator, b, **options)
        return replace(found, value=self.change(found.value))


class Halves(Changed):
    def change(self, value: Tree) -> Tree:
        return tree.map(lambda leaf: leaf.float(), value)


class Graphs(Changed):
    def change(self, value: Tree) -> Tree:
        return tree.variables(value)


class Flattens(Changed):
    def change(self, value: Tree) -> Tree:
        return tree.ravel(value) if isinstance(value, dict) else value


class Relative(Direct):
    def solve(self, operator: LinearOperator, b: Tree, **options: Any) -> Any:
        return replace(super().solve(operator, b, **options), relative_residual=0.5)


class NeverZero(Direct):
    def answer(self, matrix: Tensor, b: Tensor, x0: Tensor | None) -> Tensor:
        return super().answer(matrix, b, x0) + 1e-310


class DropsAxis(Direct):
    def solve(self, operator: LinearOperator, b: Tree, **options: Any) -> Any:
        found = super().solve(operator, b, **options)
        if options.get("batched") and len(tree.leaves(b)[0]) == 1:
            doubled = tree.map(lambda leaf: torch.cat([leaf, leaf]), found.value)
            return replace(found, value=doubled)
        return found


class LastStepFails(Direct):
    def report(self, x: Tensor, residuals: Tensor, norms: Tensor) -> FlatSolution:
        found = super().report(x, residuals, norms)
        return replace(found, status=Status.LINEAR_SOLVE_FAILED) if self.max_steps == 1 else found


class HidesRandomness(Direct):
    def answer(self, matrix: Tensor, b: Tensor, x0: Tensor | None) -> Tensor:
        torch.rand(())
        return super().answer(matrix, b, x0)


class HalfLeastSquares(Direct):
    def answer(self, matrix: Tensor, b: Tensor, x0: Tensor | None) -> Tensor:
        return 0.5 * super().answer(matrix, b, x0)

    def report(self, x: Tensor, residuals: Tensor, norms: Tensor) -> FlatSolution:
        return replace(super().report(x, residuals, norms), status=Status.CONVERGED)


class KeyOrder(Direct):
    def solve(self, operator: LinearOperator, b: Tree, **options: Any) -> Any:
        return super().solve(
            operator, b if options.get("batched") else tree.unravel(tree.ravel(b), operator.like), **options
        )


BROKEN_SOLVERS: list[tuple[type[LinearSolver], tuple[str, ...], str]] = [
    (Loose, ("spd",), r"the status is CONVERGED, but the true residual is 0\.01 \|\|b\|\|, asked was 1e-06"),
    (ByStepCount, ("spd",), r"max_steps=1.*the status is STEP_LIMIT, but the true residual .* not off the step count"),
    (TextbookCG, (), r"the status is CONVERGED, but the true residual is .*; compute b - A v anew before claiming it"),
    (MutatesB, ("spd",), r"solve modifies b in place"),
    (Uncounting, ("spd",), r"it reports 0 products, the operator was applied to 11 vectors; call flat_mv"),
    (ResidualZero, (), r"residual is reported as .*, it is .*; measure \|\|b - A v\|\|"),
    (RaisesOnNaN, ("spd",), r"NaN in the operator.*solve raised FloatingPointError.*by the status"),
    (IgnoresNaN, ("spd",), r"NaN in the operator.*the status is STALLED instead of NONFINITE"),
    (StopsAtZeros, ("spd",), r"b with exact zeros.*ended as STALLED with relative residual 1"),
    (AbsoluteTolerance, ("spd",), r"b times 1e-30.*ended as STALLED with relative residual 1"),
    (NormOfAll, ("spd",), r"4 right-hand sides.*CONVERGED, but the true residual is 1 \|\|b\|\|"),
    (AddsX0, ("spd",), r"solve modifies x0 in place|value shares the memory of x0 or b; clone it"),
    (IgnoresLimit, ("spd",), r"max_steps=1\): it took 7 steps"),
    (RandomStart, ("spd",), r"two solves of one system differ by|it draws from the global random generator"),
    (ForgetsTranspose, ("general",), r"transposed, prepared for A\): the status is CONVERGED, but the true residual"),
    (Singles, ("spd",), r"this one is easy, but ended as STALLED with relative residual [2-9]\S*e-08"),
    (KeyOrder, ("spd",), r"reordering the keys of b changes the answer; leaves are paired by position"),
    (Endless, ("spd",), r"the status is RUNNING, which is no end of a linear solve"),
    (ChangesA, ("spd",), r"solve modifies the operator"),
    (Halves, ("spd",), r"value has dtype torch\.float32, the operator torch\.float64"),
    (Graphs, ("spd",), r"value requires grad; detach it"),
    (Flattens, ("spd",), r"value is tensor \(11,\) torch\.float64, the domain \['weight'\]"),
    (Relative, ("spd",), r"relative_residual is reported as 0\.5, it is"),
    (NeverZero, ("spd",), r"the answer for b = 0 has entries of size 1e-310 instead of zero"),
    (DropsAxis, ("spd",), r"with a leading axis.*|with one batched right-hand side"),
    (LastStepFails, ("spd",), r"it converges in 1 steps, but with that limit ended as LINEAR_SOLVE_FAILED"),
    (HidesRandomness, ("spd",), r"it draws from the global random generator; seed its own"),
    (Direct, ("rectangular",), r"tall, least squares.*ended as STALLED"),
]


@pytest.mark.parametrize(
    ("broken", "kinds", "sentence"), BROKEN_SOLVERS, ids=[b.__name__ for b, _, _ in BROKEN_SOLVERS]
)
def test_broken_linear_solvers_fail_by_name(broken: type[LinearSolver], kinds: tuple[str, ...], sentence: str) -> None:
    solver = broken(rtol=2e-8) if broken is Singles else broken()  # type: ignore[call-arg]
    with pytest.raises(ConformanceError, match=f"^{broken.__name__} .*(?:{sentence})") as failure:
        check_linear_solver(solver, for_=kinds, dtypes=DOUBLE)
    assert "\n" not in str(failure.value)


def test_least_squares_are_measured_by_the_normal_equations() -> None:
    tall = [system for system in systems(torch.float64) if system.name == "tall, least squares"]
    with pytest.raises(
        ConformanceError, match=r"neither the residual r nor A\^T r vanishes: \|\|A\^T r\|\| / .* is 0\.\d+"
    ):
        check_linear_solver(HalfLeastSquares(), tall, for_=["rectangular"])
    check_linear_solver(implicit.LSMR(), tall, for_=["rectangular"])


def test_an_indefinite_matrix_is_no_success() -> None:
    indefinite = [system for system in systems(torch.float64) if system.kind == "symmetric"]
    with pytest.raises(ConformanceError, match=r"^TextbookCG \(nested, indefinite, float64\): the status is CONVERGED"):
        check_linear_solver(TextbookCG(), indefinite, for_=())
    check_linear_solver(implicit.CG(), indefinite, for_=())


def test_a_correct_third_party_solver_passes() -> None:
    check_linear_solver(Direct(), for_=("spd", "symmetric", "general", "singular"), dtypes=DOUBLE)


def test_a_solver_must_solve_what_it_is_for_and_may_refuse_the_rest() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Never(Direct):
        def answer(self, matrix: Tensor, b: Tensor, x0: Tensor | None) -> Tensor:
            return torch.zeros(len(b), matrix.shape[1], dtype=b.dtype)

    with pytest.raises(ConformanceError, match="this one is easy, but ended as STALLED"):
        check_linear_solver(Never())

    class Refusing(Direct):
        def init(self, operator: LinearOperator) -> Tensor:
            raise ValueError("not for me")

    check_linear_solver(Refusing(), for_=())
    with pytest.raises(ConformanceError, match="it is for these systems, but raised ValueError: not for me"):
        check_linear_solver(Refusing())


def test_tables_of_ones_own_and_misuse() -> None:
    system = System(name="mine", kind="spd", matrix=torch.eye(3), b=torch.ones(3))
    check_linear_solver(implicit.CG(), [system])
    with pytest.raises(ConformanceError, match=r"^Loose \(mine, float64\): the status is CONVERGED"):
        check_linear_solver(Loose(), [system])
    with pytest.raises(ValueError, match="for_ must name kinds among spd, symmetric, general, singular, rectangular"):
        check_linear_solver(implicit.CG(), for_=["dense"])
    with pytest.raises(TypeError, match="solver must be a LinearSolver"):
        check_linear_solver(implicit.Jacobi())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="preconditioner must be a Preconditioner"):
        check_preconditioner(implicit.CG())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="minimizer must be a Minimizer"):
        check_minimizer(implicit.CG())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="method must be an IterativeMethod"):
        check_method(implicit.CG(), None, ())  # type: ignore[arg-type]


# ---------------------------------------------------------------- broken preconditioners


class Triangular(Preconditioner):
    def init(self, operator: LinearOperator) -> Any:
        factor = torch.eye(operator.size, dtype=operator.dtype).cumsum(0)
        return lambda rows: rows @ factor


class Negative(Preconditioner):
    def init(self, operator: LinearOperator) -> Any:
        diagonal = operator.to_dense().diagonal().clone()
        return lambda rows: rows / torch.where(diagonal == 0, 1.0, diagonal)


class MixesRows(Preconditioner):
    def init(self, operator: LinearOperator) -> Any:
        return lambda rows: rows - 0.5 * rows.mean(dim=0, keepdim=True) if len(rows) else rows.clone()


class InPlace(Preconditioner):
    def init(self, operator: LinearOperator) -> Any:
        return lambda rows: rows.mul_(2.0)


class Unseeded(Preconditioner):
    def init(self, operator: LinearOperator) -> Any:
        scale = torch.rand(()).to(operator.dtype)
        return lambda rows: rows * (1.0 + scale)


class Growing(Preconditioner):
    calls: ClassVar[list[int]] = []

    def init(self, operator: LinearOperator) -> Any:
        self.calls.append(1)
        scale = float(len(self.calls))
        return lambda rows: rows * scale


class Dividing(Preconditioner):
    def init(self, operator: LinearOperator) -> Any:
        size = operator.to_dense().abs().sum()
        return lambda rows: rows / size


class Normalizing(Preconditioner):
    def init(self, operator: LinearOperator) -> Any:
        return lambda rows: rows / rows.abs().sum(dim=1, keepdim=True)


class MovesPoint(Preconditioner):
    def init(self, operator: LinearOperator) -> Any:
        for leaf in tree.leaves(operator.like):
            leaf.add_(1.0)
        return lambda rows: 2.0 * rows


class Squeezes(Preconditioner):
    def init(self, operator: LinearOperator) -> Any:
        return lambda rows: 2.0 * rows if len(rows) else rows[:, :0]


class Rounds(Preconditioner):
    def init(self, operator: LinearOperator) -> Any:
        return lambda rows: (2.0 * rows).float() if rows.dtype is torch.float64 else 2.0 * rows


class KeepsGraph(Preconditioner):
    def init(self, operator: LinearOperator) -> Any:
        scale = torch.ones((), dtype=operator.dtype, requires_grad=True)
        return lambda rows: rows * scale


class Nothing(Preconditioner):
    def init(self, operator: LinearOperator) -> Any:
        return lambda rows: rows


class Raising(Preconditioner):
    def init(self, operator: LinearOperator) -> Any:
        raise KeyError("diagonal")


BROKEN_PRECONDITIONERS: list[tuple[type[Preconditioner], str]] = [
    (MovesPoint, r"init modifies the point where the operator was taken"),
    (Squeezes, r"no rows \(0, 0\); shapes must be kept"),
    (Rounds, r"rows of torch\.float64 become torch\.float32; nothing may be cast"),
    (KeepsGraph, r"its rows require grad; detach what it is made of"),
    (Nothing, r"it returns the memory of its argument; clone it"),
    (Raising, r"init raised KeyError: 'diagonal'"),
    (Triangular, r"P and its transpose differ by .*; CG needs a symmetric preconditioner"),
    (Negative, r"indefinite.*its eigenvalues lie in \[-.*also where the operator is indefinite"),
    (MixesRows, r"rows alone and rows together differ by .*; it must map row by row"),
    (InPlace, r"it modifies the rows in place"),
    (Unseeded, r"it draws from the global random generator; seed its own"),
    (Growing, r"built twice for one operator it differs by .*; seed what is random"),
    (Dividing, r"zero.*it is not finite; where the operator has nothing to divide by"),
    (Normalizing, r"P\(2v - 3w\) and 2 Pv - 3 Pw differ by .*; it is not linear"),
]


@pytest.mark.parametrize(
    ("broken", "sentence"), BROKEN_PRECONDITIONERS, ids=[b.__name__ for b, _ in BROKEN_PRECONDITIONERS]
)
def test_broken_preconditioners_fail_by_name(broken: type[Preconditioner], sentence: str) -> None:
    with pytest.raises(ConformanceError, match=f"^{broken.__name__} .*(?:{sentence})"):
        check_preconditioner(broken())


# ---------------------------------------------------------------- broken methods


@dataclass(kw_only=True)
class DescentState(State):
    point: Tensor
    generator: torch.Generator
    momentum: Tensor
    hidden: Any = field(default=None, metadata={"transient": True})
    other: torch.Generator | None = None


@dataclass(frozen=True, kw_only=True)
class Descent(implicit.IterativeMethod[DescentState]):
    """Noisy descent on a function with momentum: correct; the broken ones change one line."""

    length: float | None = None

    def resolve(self, problem: Any, *start: Any, max_steps: int | None = None) -> Any:
        return replace(self, length=0.1 if self.length is None else self.length)

    def init(self, problem: Any, *start: Any, generator: torch.Generator | None = None) -> DescentState:
        assert generator is not None
        point = start[0].clone()
        return DescentState(point=point, generator=generator, momentum=torch.zeros_like(point))

    def gradient(self, problem: Any, state: DescentState) -> Tensor:
        noise = torch.randn(state.point.shape, generator=state.generator)
        return torch.func.grad(problem)(state.point) + 1e-3 * noise

    def step(self, problem: Any, state: DescentState) -> dict[str, Any]:
        assert self.length is not None
        state.momentum = 0.5 * state.momentum + self.gradient(problem, state)
        state.point = state.point - self.length * state.momentum
        return {"value": problem(state.point)}

    def terminate(self, problem: Any, state: DescentState) -> Status:
        return Status.RUNNING


class TwoGenerators(Descent):
    def init(self, problem: Any, *start: Any, generator: torch.Generator | None = None) -> DescentState:
        state = super().init(problem, *start, generator=generator)
        state.other = state.generator
        return state


class Forgetful(Descent):
    """Keeps its momentum where a checkpoint does not see it."""

    def step(self, problem: Any, state: DescentState) -> dict[str, Any]:
        before = state.hidden if state.hidden is not None else torch.zeros_like(state.point)
        state.hidden = 0.5 * before + self.gradient(problem, state)
        assert self.length is not None
        state.point = state.point - self.length * state.hidden
        return {}


class GlobalNoise(Descent):
    def gradient(self, problem: Any, state: DescentState) -> Tensor:
        return torch.func.grad(problem)(state.point) + 1e-3 * torch.randn(state.point.shape)


class KeepsStart(Descent):
    def init(self, problem: Any, *start: Any, generator: torch.Generator | None = None) -> DescentState:
        state = super().init(problem, *start, generator=generator)
        state.point = start[0]
        return state


class CountsItself(Descent):
    def step(self, problem: Any, state: DescentState) -> dict[str, Any]:
        state.step += 1
        return super().step(problem, state)


class Meddling(Descent):
    def terminate(self, problem: Any, state: DescentState) -> Status:
        state.momentum = 0.9 * state.momentum
        return Status.RUNNING


class LeavesNone(Descent):
    def resolve(self, problem: Any, *start: Any, max_steps: int | None = None) -> Any:
        return self


class KeepsResolving(Descent):
    def resolve(self, problem: Any, *start: Any, max_steps: int | None = None) -> Any:
        return replace(self, length=0.1 if self.length is None else 0.5 * self.length)


class Unpicklable(Descent):
    def init(self, problem: Any, *start: Any, generator: torch.Generator | None = None) -> DescentState:
        state = super().init(problem, *start, generator=generator)
        state.other = {"a set": {1, 2}}  # type: ignore[assignment]
        return state


class ReportsVectors(Descent):
    def step(self, problem: Any, state: DescentState) -> dict[str, Any]:
        super().step(problem, state)
        return {"point": state.point}


class SpeaksText(Descent):
    def terminate(self, problem: Any, state: DescentState) -> Any:
        return "running"


class EarlyClaim(Descent):
    def terminate(self, problem: Any, state: DescentState) -> Status:
        return Status.CONVERGED if state.step >= 8 else Status.RUNNING


class Changeling(Descent):
    def resolve(self, problem: Any, *start: Any, max_steps: int | None = None) -> Any:
        return Descent(length=0.1)


class Stateless(Descent):
    def init(self, problem: Any, *start: Any, generator: torch.Generator | None = None) -> Any:
        return {"point": start[0].clone()}


class LateStart(Descent):
    def init(self, problem: Any, *start: Any, generator: torch.Generator | None = None) -> DescentState:
        state = super().init(problem, *start, generator=generator)
        state.step = 3
        return state


class MovesStart(Descent):
    def init(self, problem: Any, *start: Any, generator: torch.Generator | None = None) -> DescentState:
        state = super().init(problem, *start, generator=generator)
        start[0].add_(1.0)
        return state


class SpendsRandomness(Descent):
    def step(self, problem: Any, state: DescentState) -> dict[str, Any]:
        torch.rand(())
        return super().step(problem, state)


@dataclass(kw_only=True)
class RoundedState(DescentState):
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.point = self.point.float().double()


class RoundsOnLoad(Descent):
    def init(self, problem: Any, *start: Any, generator: torch.Generator | None = None) -> DescentState:
        assert generator is not None
        point = start[0].clone()
        return RoundedState(point=point, generator=generator, momentum=torch.zeros_like(point))


class FailsLater(Descent):
    def step(self, problem: Any, state: DescentState) -> dict[str, Any]:
        if state.step == 2:
            raise KeyError("momentum")
        return super().step(problem, state)


BROKEN_METHODS: list[tuple[type[Descent], str]] = [
    (Changeling, r"resolve returns Descent; it must return the same class"),
    (Stateless, r"init returns dict, which is no implicit\.State"),
    (LateStart, r"a fresh state has step = 3 instead of 0"),
    (MovesStart, r"the run modifies its starting point|two runs from one start with one seed differ"),
    (SpendsRandomness, r"it draws from the global random generator; draw from the state's own"),
    (RoundsOnLoad, r"state\.point is not what was saved once the state is loaded"),
    (FailsLater, r"step 3 raised KeyError: 'momentum'"),
    (TwoGenerators, r"state\.generator and state\.other are one generator, which becomes two after a load"),
    (Forgetful, r"the resumed and the uninterrupted run differ in state\.point; keep everything"),
    (GlobalNoise, r"two runs from one start with one seed differ in state\.\w+; draw from the state's generator only"),
    (KeepsStart, r"state\.point lives in the memory of the starting point; init must copy it"),
    (CountsItself, r"step sets state\.step to 1; the driver counts"),
    (Meddling, r"terminate changes state\.momentum; it may only look"),
    (LeavesNone, r"resolve leaves length=None; fill it in"),
    (KeepsResolving, r"resolving twice changes the settings"),
    (Unpicklable, r"raised \w+"),
    (ReportsVectors, r"step reports point=.*; values must be numbers or 0-d tensors"),
    (SpeaksText, r"terminate returns 'running', which is no implicit\.Status"),
    (EarlyClaim, r"the status is CONVERGED, but the measured residual is .*, asked was 1e-08"),
]


def bowl(point: Tensor) -> Tensor:
    return (torch.arange(1.0, 4.0) * (point - 1.0) ** 2).sum()


def slope(state: DescentState) -> tuple[float, float]:
    return float(torch.func.grad(bowl)(state.point).norm()), 1e-8


@pytest.mark.parametrize(("broken", "sentence"), BROKEN_METHODS, ids=[b.__name__ for b, _ in BROKEN_METHODS])
def test_broken_methods_fail_by_name(broken: type[Descent], sentence: str) -> None:
    check_method(Descent(), bowl, (torch.zeros(3),))
    with pytest.raises(ConformanceError, match=f"^{broken.__name__}: (?s:.*)(?:{sentence})"):
        check_method(broken(), bowl, (torch.zeros(3),), measure=slope)


def test_settings_must_be_frozen() -> None:
    class Plain(implicit.IterativeMethod[DescentState]):
        init = Descent.init
        step = Descent.step
        terminate = Descent.terminate

    with pytest.raises(ConformanceError, match="it is not a frozen dataclass"):
        check_method(Plain(), bowl, (torch.zeros(3),))
    optional = LeavesNone(length=None)
    with pytest.raises(ConformanceError, match="step raised"):
        check_method(optional, bowl, (torch.zeros(3),), optional=["length"])


# ---------------------------------------------------------------- broken minimizers


class ClaimsEarly(implicit.LBFGS):
    def terminate(self, problem: Any, state: Any) -> Status:
        found = super().terminate(problem, state)
        return Status.CONVERGED if found is Status.RUNNING and state.step >= 3 else found


class AcceptsNaN(implicit.LBFGS):
    def step(self, problem: Any, state: Any) -> Any:
        point = state.point - 1e-2 * state.gradient
        self.accept(state, problem(point), point)
        state.evaluations += 1
        return {}


class Miscounts(implicit.LBFGS):
    def step(self, problem: Any, state: Any) -> Any:
        found = super().step(problem, state)
        state.evaluations -= 1
        return found


class StaleGradient(implicit.LBFGS):
    def accept(self, state: Any, trial: Any, point: Tensor) -> None:
        state.point, state.value, state.extra = point, trial.value, trial.extra


class Swallows(implicit.LBFGS):
    def run(self, objective: Any, point: Tensor, reference: float = 0.0) -> Any:
        try:
            return super().run(objective, point, reference)
        except RuntimeError:
            return super().run(lambda p: implicit.minimizers.Evaluation(0.0, torch.zeros_like(p)), point, reference)


class NeverMoves(implicit.LBFGS):
    def step(self, problem: Any, state: Any) -> Any:
        state.stalled = True
        return {}


class ByCount(implicit.LBFGS):
    def run(self, objective: Any, point: Tensor, reference: float = 0.0) -> Any:
        state, status = super().run(objective, point, reference)
        return state, Status.STEP_LIMIT if state.step >= self.max_steps else status


class StaleValue(implicit.LBFGS):
    def accept(self, state: Any, trial: Any, point: Tensor) -> None:
        super().accept(state, trial, point)
        state.value = state.value + 1.0


class TakesNaN(implicit.LBFGS):
    def step(self, problem: Any, state: Any) -> Any:
        found = super().step(problem, state)
        if state.stalled:
            trial = problem(state.point)
            state.evaluations += 1
            if trial.value != trial.value:
                self.accept(state, trial, float("nan") * state.point)
        return found


class IgnoresNaNAtStart(implicit.LBFGS):
    def terminate(self, problem: Any, state: Any) -> Status:
        found = super().terminate(problem, state)
        return Status.STALLED if found is Status.NONFINITE else found


class IgnoresMaxSteps(implicit.LBFGS):
    def run(self, objective: Any, point: Tensor, reference: float = 0.0) -> Any:
        return implicit.LBFGS(rtol=self.rtol).run(objective, point, reference)


BROKEN_MINIMIZERS: list[tuple[type[implicit.LBFGS], str]] = [
    (StaleValue, r"the state's value is \S+, the objective at its point"),
    (TakesNaN, r"NaN after 1 evaluations.*NaN replaced the last finite point; its value is nan"),
    (IgnoresNaNAtStart, r"NaN at the start ends as STALLED instead of NONFINITE"),
    (IgnoresMaxSteps, r"with max_steps=1 it took \d+ steps"),
    (ClaimsEarly, r"nested quadratic.*the status is CONVERGED, but the gradient norm is"),
    (AcceptsNaN, r"nested quadratic.*minimizing raised|this case is easy|NaN replaced the last finite point"),
    (Miscounts, r"it reports \d+ evaluations, the objective was called \d+ times"),
    (StaleGradient, r"the state's gradient has norm .*, that at its point|this case is easy"),
    (Swallows, r"it swallows an exception of the objective; let it through"),
    (NeverMoves, r"this case is easy, but it ended as STALLED after 1 steps"),
    (ByCount, r"the status is STEP_LIMIT, but the gradient norm .* not off the step count"),
]


@pytest.mark.parametrize(("broken", "sentence"), BROKEN_MINIMIZERS, ids=[b.__name__ for b, _ in BROKEN_MINIMIZERS])
def test_broken_minimizers_fail_by_name(broken: type[implicit.LBFGS], sentence: str) -> None:
    with pytest.raises(ConformanceError, match=f"^{broken.__name__} .*(?:{sentence})"):
        check_minimizer(broken(), dtypes=DOUBLE)


# ---------------------------------------------------------------- broken solution maps


def halving(init: Tensor, a: Tensor, b: dict[str, Tensor]) -> Tensor:
    """The fixed point of cos(a y) b / 2."""
    y = init.detach()
    for _ in range(80):
        y = 0.5 * torch.cos(a * y) * b["scale"]
    return y


def gap(y: Tensor, a: Tensor, b: dict[str, Tensor]) -> Tensor:
    return y - 0.5 * torch.cos(a * y) * b["scale"]


class OnceDifferentiable(torch.autograd.Function):
    """The first derivative alone, as a library that saves detached tensors gives it."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, a: Tensor) -> Tensor:
        ctx.save_for_backward(y, a)
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        y, a = ctx.saved_tensors
        slope = 0.5 * torch.sin(a * y)
        return None, -(cotangents[0] * slope * y / (1 + a * slope)).detach().sum()


def first_order(init: Tensor, a: Tensor) -> Tensor:
    scale = {"scale": torch.ones(())}
    return OnceDifferentiable.apply(halving(init, a.detach(), scale), a)


def test_solution_maps() -> None:
    init, a, b = torch.zeros(3), torch.tensor(0.7), {"scale": torch.tensor([1.0, 0.5, 2.0])}
    solution = implicit.custom_root(gap)(halving)
    check_derivatives(solution, init, a, b)
    check_derivatives(halving, init, a, b)  # unrolled
    with pytest.raises(
        ConformanceError, match=r"the gradient in theta 1 is off by .*; it is 0 along a direction where"
    ):
        check_derivatives(lambda i, p, q: solution(i, p, tree.detach(q)), init, a, b)
    check_derivatives(first_order, init, a, order=1)
    with pytest.raises(ConformanceError, match=r"^first_order: the second derivative in theta 0 is off by"):
        check_derivatives(first_order, init, a)
    with pytest.raises(ConformanceError, match=r"the gradient in init has norm \S+ instead of zero"):
        check_derivatives(lambda i, p: halving(i, p, b) + 1e-3 * i, init, a)
    with pytest.raises(ConformanceError, match=r"solving raised ZeroDivisionError"):
        check_derivatives(lambda i: 1 / 0, init)
