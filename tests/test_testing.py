"""Conformance: every operator, solver, preconditioner and minimizer of ours passes, in both precisions."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import implicit
from implicit import LinearOperator, LinearSolver, Minimizer, Preconditioner, tree
from implicit.minimizers import ProjectedObjective
from implicit.testing import (
    check_linear_solver,
    check_minimizer,
    check_operator,
    check_preconditioner,
    systems,
)
from implicit.testing.systems import KINDS
from implicit.tree import Tree


def square(like: Tree) -> Tensor:
    n = tree.size(like)
    matrix = torch.randn(n, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    return matrix.to(tree.common_dtype(like))


def definite(like: Tree) -> Tensor:
    return square(like) @ square(like).T + torch.eye(tree.size(like), dtype=tree.common_dtype(like))


def quartic(y: Tree) -> Tensor:
    size = tree.dot(y, y)
    return size**2 / 4 + size


def quartic_hessian(like: Tree) -> Tensor:
    flat = tree.ravel(like)
    return 2 * torch.outer(flat, flat) + (flat @ flat + 2) * torch.eye(len(flat), dtype=flat.dtype)


def features(y: Tree) -> Tensor:
    """Three observations with two outputs each."""
    flat = torch.cat([tree.ravel(y), torch.ones(1, dtype=tree.common_dtype(y))])
    matrix = torch.cos(torch.arange(6 * len(flat), dtype=flat.dtype) ** 2).reshape(6, len(flat))
    return torch.sin(matrix @ flat).reshape(3, 2)


def cosh(outputs: Tensor) -> Tensor:
    return torch.cosh(outputs).sum()


def penalties(like: Tree) -> Tree:
    return {"log": torch.full((2,), 0.3, dtype=tree.common_dtype(like)), "none": []}


def coupled(x: Tree, y: Tree) -> Tensor:
    return (x["log"].exp() * features(y) ** 2).sum()


FISHERS: dict[str, dict[str, Any]] = {
    "exact": {"likelihood": "categorical"},
    "sampled": {"likelihood": "bernoulli", "samples": 2},
    "empirical": {"likelihood": "categorical", "targets": torch.tensor([0, 1, 1])},
}


def image(like: Tree) -> Tree:
    return {"first": torch.zeros(3, dtype=tree.common_dtype(like)), "none": torch.zeros(0), "last": torch.zeros(())}


def rectangular(like: Tree) -> implicit.Dense:
    out = tree.map(lambda leaf: leaf.to(tree.common_dtype(like)), image(like))
    n = tree.size(like)
    matrix = torch.randn(4, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    return implicit.Dense(matrix.to(tree.common_dtype(like)), like, out, symmetric=False)


def accumulated(like: Tree, memory: int) -> implicit.Accumulated:
    batches = [torch.ones(1), torch.ones(3)]
    return implicit.Accumulated(
        lambda batch: implicit.Hessian(lambda y: len(batch) * quartic(y), like), batches, memory=memory
    )


def accumulated_hessian(like: Tree) -> Tensor:
    return (1 * 1 + 3 * 3) / 4 * quartic_hessian(like)


def stacked(like: Tree) -> Tree:
    """Three blocks."""
    return tree.map(lambda leaf: torch.stack([leaf, 2 * leaf, leaf - 1]), like)


def scales(like: Tree) -> Tensor:
    return torch.tensor([1.0, 10.0, 100.0], dtype=tree.common_dtype(like))


def thinned(matrix: Tensor) -> Tensor:
    """The large entries, in coordinates."""
    return torch.where(matrix.abs() > 0.5, matrix, 0.0).to_sparse()


# ---------------------------------------------------------------- ours

Make = Callable[[Tree], LinearOperator]
OPERATORS: dict[str, list[tuple[Make, Callable[[Tree], Tensor] | None, dict[torch.dtype, float]]]] = {
    "Accumulated": [
        (lambda like: accumulated(like, memory=2**30), accumulated_hessian, {}),
        (lambda like: accumulated(like, memory=0), accumulated_hessian, {}),
        (
            lambda like: implicit.Accumulated(
                lambda scale: scale * rectangular(like), [1.0, 3.0], weights=lambda scale: scale
            ),
            lambda like: 2.5 * rectangular(like).matrix,
            {},
        ),
    ],
    "BlockHessian": [
        (
            lambda like: implicit.BlockHessian(lambda y, scale: scale * quartic(y), stacked(like), scales(like)),
            None,
            {},
        ),
    ],
    "Dense": [
        (lambda like: implicit.Dense(definite(like), like), definite, {}),
        (lambda like: implicit.Dense(square(like), like, symmetric=False), square, {}),
        (lambda like: implicit.Dense(square(like), like, symmetric=False).T, lambda like: square(like).T, {}),
        (rectangular, None, {}),
        (lambda like: rectangular(like).T, None, {}),
    ],
    "Diagonal": [(implicit.Diagonal, lambda like: torch.diag(tree.ravel(like)), {})],
    "Fisher": [
        (
            lambda like, kind=kind, options=options: implicit.Fisher(
                features, like, kind=kind, positive_definite=False, **options
            ),
            None,
            {},
        )
        for kind, options in FISHERS.items()
    ],
    "GaussNewton": [
        (
            lambda like, order=order: implicit.GaussNewton(features, cosh, like, order=order, positive_definite=False),
            None,
            {},
        )
        for order in ("auto", "forward", "linearize")
    ]
    + [(lambda like: implicit.GaussNewton(lambda y: y, quartic, like), quartic_hessian, {})],
    "GradientDifference": [
        (
            lambda like: implicit.GradientDifference(quartic, like),
            quartic_hessian,
            {torch.float64: 1e-8, torch.float32: 1e-2},
        )
    ],
    "Hessian": [
        *[
            (lambda like, order=order: implicit.Hessian(quartic, like, order=order), quartic_hessian, {})
            for order in ("auto", "reverse-over-reverse", "linearize", "forward-over-reverse")
        ],
        (
            lambda like: implicit.Hessian.of(implicit.GradientGraph(lambda _, y: quartic(y), (), like)),
            quartic_hessian,
            {},
        ),
    ],
    "Identity": [
        (implicit.Identity, lambda like: torch.eye(tree.size(like), dtype=tree.common_dtype(like)), {}),
    ],
    "Jacobian": [
        *[
            (lambda like, order=order: implicit.Jacobian(features, like, order=order), None, {})
            for order in ("auto", "reverse", "forward", "linearize")
        ],
        (lambda like: implicit.Jacobian(features, like).T, None, {}),
    ],
    "MixedDerivative": [
        (lambda like: implicit.MixedDerivative(coupled, penalties(like), like), None, {}),
        (lambda like: implicit.MixedDerivative(coupled, penalties(like), like).T, None, {}),
    ],
    "Product": [
        (
            lambda like: implicit.Product(
                implicit.Dense(square(like), like, symmetric=False),
                implicit.Diagonal(like),
                implicit.Hessian(quartic, like),
            ),
            lambda like: square(like) @ torch.diag(tree.ravel(like)) @ quartic_hessian(like),
            {},
        ),
        (lambda like: implicit.Product(*[implicit.Dense(definite(like), like)] * 2), None, {}),
        (lambda like: rectangular(like) @ implicit.Identity(like), None, {}),
    ],
    "Scaled": [
        (lambda like: -3.0 * implicit.Dense(square(like), like, symmetric=False), lambda like: -3.0 * square(like), {}),
        (lambda like: implicit.Identity(like) / 4, None, {}),
    ],
    "Shifted": [
        (lambda like: implicit.Shifted(implicit.Hessian(quartic, like), 0.7), None, {}),
        (lambda like: implicit.Shifted(implicit.Dense(square(like), like, symmetric=False), -0.7), None, {}),
    ],
    "Sparse": [
        (
            lambda like: implicit.Sparse(thinned(definite(like)), like=like),
            lambda like: thinned(definite(like)).to_dense(),
            {},
        ),
        (
            lambda like: implicit.Sparse(thinned(square(like)), like=like, symmetric=False),
            lambda like: thinned(square(like)).to_dense(),
            {},
        ),
        (
            lambda like: implicit.Sparse(thinned(square(like)), like=like, symmetric=False).T,
            lambda like: thinned(square(like)).to_dense().T,
            {},
        ),
        (
            lambda like: implicit.Sparse(rectangular(like).matrix.to_sparse(), like=like, out=rectangular(like).out),
            lambda like: rectangular(like).matrix,
            {},
        ),
    ],
    "Sum": [
        (lambda like: implicit.Hessian(quartic, like) + 2 * implicit.Identity(like), None, {}),
        (lambda like: rectangular(like) - 0.5 * rectangular(like), None, {}),
    ],
}

SQUARE = ("spd", "symmetric", "general")
SOLVERS: dict[str, list[tuple[LinearSolver, tuple[str, ...]]]] = {
    "AutoSolver": [
        (implicit.AutoSolver(), (*SQUARE, "singular", "rectangular")),
        (implicit.AutoSolver(dense_size=1), (*SQUARE, "singular", "rectangular")),
    ],
    "BiCGSTAB": [(implicit.BiCGSTAB(), ("spd", "general"))],
    "CG": [
        (implicit.CG(), ("spd", "singular")),
        (implicit.CG(rtol=1e-3, preconditioner=implicit.Nystrom(rank=3)), ("spd",)),
    ],
    "Cholesky": [(implicit.Cholesky(), ("spd", "singular"))],
    "GMRES": [(implicit.GMRES(), (*SQUARE, "singular"))],
    "LDLT": [(implicit.LDLT(), ("spd", "symmetric", "singular"))],
    "LSMR": [(implicit.LSMR(), (*SQUARE, "singular", "rectangular"))],
    "LU": [(implicit.LU(), (*SQUARE, "singular"))],
    "MINRES": [(implicit.MINRES(), ("spd", "symmetric", "singular"))],
    "Neumann": [(implicit.Neumann(max_steps=2_000), ("spd",))],
    "NormalCG": [(implicit.NormalCG(), (*SQUARE, "singular", "rectangular"))],
    "SparseLU": [(implicit.SparseLU(), SQUARE)],
}

PRECONDITIONERS: dict[str, list[Preconditioner]] = {
    "Factorization": [implicit.Factorization()],
    "Jacobi": [implicit.Jacobi(), implicit.Jacobi(regularizer=0.3, samples=0)],
    "Kept": [implicit.Kept(), implicit.Kept(preconditioner=implicit.Nystrom(rank=4))],
    "Nystrom": [implicit.Nystrom(rank=4), implicit.Nystrom(rank=2, regularizer=0.1, max_rank=8)],
}


def unconstrained(objective: Any) -> ProjectedObjective:
    return ProjectedObjective(objective, lambda point: point)


MINIMIZERS: dict[str, tuple[Minimizer[Any], Any]] = {
    "GradientRegularizedNewton": (implicit.GradientRegularizedNewton(), None),
    "LBFGS": (implicit.LBFGS(), None),
    "NewtonCG": (implicit.NewtonCG(), None),
    "SpectralProjectedGradient": (implicit.SpectralProjectedGradient(), unconstrained),
}


def rows(table: dict[str, list[Any]]) -> list[Any]:
    """Every row of a table by name and position."""
    found = []
    for name, entries in table.items():
        for index in range(len(entries)):
            found.append(pytest.param(name, index, id=f"{name}-{index}"))
    return found


TABLES = [
    (LinearOperator, OPERATORS),
    (LinearSolver, SOLVERS),
    (Preconditioner, PRECONDITIONERS),
    (Minimizer, MINIMIZERS),
]


@pytest.mark.parametrize(("base", "table"), TABLES, ids=[base.__name__ for base, _ in TABLES])
def test_whatever_is_exported_is_in_a_table(base: type, table: dict[str, Any]) -> None:
    found = {name: getattr(implicit, name) for name in implicit.__all__}
    classes = {n for n, c in found.items() if inspect.isclass(c) and issubclass(c, base) and not inspect.isabstract(c)}
    assert classes == set(table)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(("name", "index"), rows(OPERATORS))
def test_our_operators_conform(name: str, index: int, dtype: torch.dtype) -> None:
    make, dense, rtol = OPERATORS[name][index]
    check_operator(make, dense=dense, rtol=rtol.get(dtype), dtypes=[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(("name", "index"), rows(SOLVERS))
def test_our_linear_solvers_conform(name: str, index: int, dtype: torch.dtype) -> None:
    solver, kinds = SOLVERS[name][index]
    assert type(solver).__name__ == name
    check_linear_solver(solver, for_=kinds, dtypes=[dtype])


@pytest.mark.parametrize(("name", "index"), rows(PRECONDITIONERS))
def test_our_preconditioners_conform(name: str, index: int) -> None:
    preconditioner = PRECONDITIONERS[name][index]
    assert type(preconditioner).__name__ == name
    check_preconditioner(preconditioner)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", list(MINIMIZERS))
def test_our_minimizers_conform(name: str, dtype: torch.dtype) -> None:
    minimizer, wrap = MINIMIZERS[name]
    assert type(minimizer).__name__ == name
    check_minimizer(minimizer, wrap=wrap, dtypes=[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_the_systems_are_what_they_say(dtype: torch.dtype) -> None:
    found = systems(dtype)
    assert {system.kind for system in found} == set(KINDS)
    assert all(any(system.easy for system in found if system.kind == kind) for kind in KINDS)
    for system in found:
        matrix = system.matrix.double()
        assert system.matrix.dtype == system.b.dtype == dtype
        operator = system.operator()
        torch.testing.assert_close(operator.to_dense(), system.matrix)
        assert operator.total == matrix.shape[1]
        if system.kind != "rectangular" and matrix.numel():
            values = torch.linalg.eigvalsh(matrix) if system.kind != "general" else torch.linalg.svdvals(matrix)
            rank = int((values.abs() > 1e2 * torch.finfo(dtype).eps * values.abs().max()).sum()) if matrix.any() else 0
            assert (rank < len(values)) == (system.kind == "singular")
            assert (system.kind != "spd") or float(values.min()) > 0
            assert (system.kind != "symmetric") or float(values.min()) < 0
        if system.kind == "singular":
            best = torch.linalg.lstsq(matrix, system.b.double()[:, None], driver="gelsd", rcond=1e-5).solution[:, 0]
            solvable = float((matrix @ best - system.b.double()).norm()) < 1e-5
            assert solvable == system.easy
