"""Sparse operators and their factorisation against dense linear algebra."""

import warnings

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch import Tensor

import implicit
from implicit import (
    ConvergenceWarning,
    Dense,
    Diagonal,
    Hessian,
    Identity,
    LinearOperator,
    Product,
    Shifted,
    Sparse,
    SparseLU,
    Status,
    Sum,
    tree,
)
from tests.systems import normal, relative


def sprinkled(rows: int, columns: int, seed: int = 1, share: float = 0.3) -> Tensor:
    """A dense matrix most of whose entries are zero."""
    kept = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed + 50)) < share
    return torch.where(kept, normal(rows, columns, seed=seed), 0.0)


def kkt(n: int, m: int, seed: int = 1) -> Tensor:
    """A sparse saddle-point matrix with an indefinite Hessian."""
    h = sprinkled(n, n, seed, 0.1)
    h = h + h.T + torch.diag(torch.where(torch.arange(n) % 4 == 0, -3.0, 3.0))
    j = torch.cat([torch.eye(m), sprinkled(m, n - m, seed + 1)], dim=1)
    return torch.cat([torch.cat([h, j.T], 1), torch.cat([j, torch.zeros(m, m)], 1)])


FORMS = {
    "scipy csr": lambda m: sp.csr_array(m.numpy()),
    "scipy csc": lambda m: sp.csc_array(m.numpy()),
    "scipy coo matrix": lambda m: sp.coo_matrix(m.numpy()),
    "torch coo": lambda m: m.to_sparse_coo(),
    "torch csr": lambda m: m.to_sparse_csr(),
    "torch csc": lambda m: m.to_sparse_csc(),
}


@pytest.mark.parametrize("form", list(FORMS))
def test_every_form_gives_the_same_operator(form: str) -> None:
    dense = sprinkled(5, 8)
    a = Sparse(FORMS[form](dense))
    assert (a.shape, a.symmetric, a.matrix.layout, a.dtype) == ((5, 8), False, torch.sparse_csr, torch.float64)
    v, u, block = normal(8), normal(5), normal(3, 8)
    torch.testing.assert_close(a @ v, dense @ v, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(a.T @ u, dense.T @ u, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(a @ block, block @ dense.T, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(a.T @ normal(2, 5), normal(2, 5) @ dense, rtol=1e-14, atol=1e-14)
    assert torch.equal(a.to_dense(), dense)
    assert torch.equal(torch.as_tensor(a.to_sparse().toarray()), dense)
    np.testing.assert_allclose(a.to_scipy().rmatvec(u.numpy()), (dense.T @ u).numpy(), rtol=1e-13)
    assert a.T.T is a
    nnz = int((dense != 0).sum())
    assert nnz == a.to_sparse().nnz
    assert 12 * nnz <= a.held_bytes <= 16 * nnz + 6 * 8


def test_the_matrix_is_a_copy_in_which_repeated_entries_add_up() -> None:
    entries = np.array([1.0, 2.0, 5.0])
    rows, columns = np.array([0, 0, 1]), np.array([1, 1, 0])
    own = sp.coo_array((entries, (rows, columns)), shape=(2, 2))
    expected = torch.tensor([[0.0, 3.0], [5.0, 0.0]])
    csr = sp.csr_array((entries, columns, np.array([0, 2, 3])), shape=(2, 2))
    for a in (
        Sparse(own),
        Sparse(csr),
        Sparse(torch.sparse_coo_tensor(torch.tensor([[0, 0, 1], [1, 1, 0]]), torch.as_tensor(entries), (2, 2))),
    ):
        assert torch.equal(a.to_dense(), expected)
        assert torch.equal(a @ torch.ones(2), torch.tensor([3.0, 5.0]))
    a = Sparse(csr)
    csr.data[:] = 0.0
    assert torch.equal(a.to_dense(), expected)
    assert torch.equal(torch.as_tensor(a.to_sparse().toarray()), expected)


def test_symmetry_is_looked_up_and_declarations_are_kept() -> None:
    matrix = kkt(8, 3)
    assert Sparse(matrix.to_sparse()).symmetric
    assert Sparse(matrix.to_sparse()).T.symmetric
    spoiled = matrix.clone()
    spoiled[0, 5] += 1e-9
    assert not Sparse(spoiled.to_sparse()).symmetric
    assert Sparse(spoiled.to_sparse(), symmetric=True).symmetric
    assert not Sparse(matrix.to_sparse(), symmetric=False).symmetric
    rounded = matrix * (1 + 1e-16 * torch.arange(len(matrix)))
    assert Sparse(rounded.to_sparse()).symmetric
    assert Sparse(torch.zeros(3, 3).to_sparse()).symmetric
    definite = Sparse(torch.eye(3).to_sparse(), positive_definite=True)
    assert (definite.symmetric, definite.positive_definite) == (True, True)
    assert not Sparse(torch.eye(3).to_sparse()).positive_definite


def test_trees_go_in_and_out() -> None:
    like, out = {"b": torch.zeros(2), "a": torch.zeros(())}, [torch.zeros(2, 2)]
    dense = sprinkled(4, 3, share=0.8)
    a = Sparse(dense.to_sparse(), like=like, out=out)
    v = {"a": torch.tensor(1.0), "b": torch.tensor([2.0, 3.0])}
    (image,) = a @ v
    order = [float(leaf) for leaf in torch.cat([leaf.reshape(-1) for leaf in tree.leaves(like)])]
    assert len(order) == 3
    flat = tree.ravel(tree.map(lambda _, leaf: leaf, like, v))
    torch.testing.assert_close(image, (dense @ flat).reshape(2, 2))
    square = Sparse(torch.diag(torch.tensor([1.0, 2.0, 3.0])).to_sparse(), like=like)
    assert tree.ravel(square.diagonal()).tolist() == [1.0, 2.0, 3.0]
    assert set(square.diagonal()) == {"a", "b"}


MISUSE = [
    (lambda: Sparse(torch.eye(2)), TypeError, "dense tensor; wrap it as implicit.Dense"),
    (lambda: Sparse(np.eye(2)), TypeError, "must be a scipy.sparse or a sparse torch matrix, got ndarray"),
    (lambda: Sparse(sp.eye_array(2, dtype=int)), TypeError, "dtype int64; convert it to float32 or float64"),
    (lambda: Sparse(torch.eye(2, dtype=torch.float16).to_sparse()), TypeError, "dtype torch.float16; convert"),
    (lambda: Sparse(torch.zeros(2, 2, 2).to_sparse()), ValueError, "two axes, got shape .2, 2, 2."),
    (lambda: Sparse(sprinkled(2, 3).to_sparse(), symmetric=True), ValueError, "declared symmetric; it must be square"),
    (lambda: Sparse(torch.eye(2).to_sparse(), like=torch.zeros(3)), ValueError, "like has 3 entries and out 3"),
    (lambda: Sparse(torch.eye(2).to_sparse(), like=torch.zeros(2).float()), ValueError, "dtype torch.float64, like"),
    (lambda: Sparse(sprinkled(2, 3).to_sparse()).diagonal(), ValueError, "only a square one has a diagonal"),
    (lambda: SparseLU(rtol=-1.0), ValueError, "rtol must be None or >= 0"),
    (lambda: SparseLU(max_size=0), ValueError, "max_size must be a positive integer"),
    (lambda: SparseLU().init(Sparse(sprinkled(2, 3).to_sparse())), ValueError, "needs a square operator, got 2 x 3"),
    (lambda: SparseLU(max_size=2).init(Dense(torch.eye(3))), ValueError, "Dense has no sparse matrix.*max_size=2"),
]


@pytest.mark.parametrize(("call", "kind", "text"), MISUSE, ids=range(len(MISUSE)))
def test_misuse_is_named(call, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        call()


# ---------------------------------------------------------------- matrices of composed operators


def compositions() -> dict[str, LinearOperator]:
    a, b = (Sparse((sprinkled(6, 6, seed) + 4 * torch.eye(6)).to_sparse()) for seed in (1, 2))
    j = Sparse(sprinkled(4, 6, 3).to_sparse())
    w = Diagonal(torch.linspace(1.0, 2.0, 4))
    return {
        "sum": a + b,
        "difference": a - b,
        "scaled": -2.5 * a,
        "shifted": Shifted(a, 0.7),
        "identity": Identity(torch.zeros(6)),
        "diagonal": Diagonal(torch.linspace(-1.0, 1.0, 6)),
        "product": Product(j.T, w, j, symmetric=True),
        "rectangular": w @ j @ a,
        "everything": Shifted(2 * (a @ b) - Identity(torch.zeros(6)), 1e-3) + Product(j.T, j, symmetric=True),
    }


@pytest.mark.parametrize("name", list(compositions()))
def test_composed_operators_have_a_sparse_matrix(name: str) -> None:
    operator = compositions()[name]
    found = operator.to_sparse()
    assert sp.issparse(found)
    torch.testing.assert_close(torch.as_tensor(found.toarray()), operator.to_dense(), rtol=1e-13, atol=1e-13)
    if operator.shape == (6, 6) and name not in ("difference", "diagonal", "product"):
        x = normal(6)
        solved = SparseLU().solve(operator, operator.to_dense() @ x)
        assert solved.success
        torch.testing.assert_close(solved.value, x, rtol=1e-9, atol=1e-9)


def test_operators_without_one_say_so() -> None:
    like = torch.ones(3)
    a, hessian = Sparse(torch.eye(3).to_sparse()), Hessian(lambda y: (y**4).sum(), like)
    for operator in (hessian, Dense(torch.eye(3)), a + hessian, 2 * hessian, Shifted(hessian, 1.0), a @ hessian):
        assert operator.to_sparse() is None
    assert Identity(torch.zeros(2, dtype=torch.bfloat16)).to_sparse() is None
    # The same space with its keys in two orders: ravelled matrices must not be added up.
    first = Identity({"a": torch.zeros(1), "b": torch.zeros(2)})
    second = Diagonal({"b": torch.tensor([2.0, 2.0]), "a": torch.tensor([1.0])})
    total = Sum(first, second)
    if total.to_sparse() is not None:
        torch.testing.assert_close(torch.as_tensor(total.to_sparse().toarray()), total.to_dense())


# ---------------------------------------------------------------- the factorisation


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_kkt_systems_of_any_inertia(dtype: torch.dtype) -> None:
    matrix = kkt(40, 15).to(dtype)
    operator = Sparse(matrix.to_sparse())
    assert operator.symmetric
    b = normal(4, 55).to(dtype)
    found = SparseLU().solve(operator, b, batched=True)
    expected = torch.linalg.solve(matrix.double(), b.double().T).T
    assert (found.status, found.singular, found.products, found.steps) == (Status.CONVERGED, False, 0, 1)
    eps = float(torch.finfo(dtype).eps)
    assert found.residual <= 4 * eps * float(
        torch.linalg.matrix_norm(matrix) * torch.linalg.vector_norm(expected, dim=1).max()
    )
    assert found.value.dtype == dtype
    torch.testing.assert_close(found.value.double(), expected, rtol=1e5 * eps, atol=1e5 * eps)


def test_one_factorisation_serves_the_transpose() -> None:
    matrix = sprinkled(30, 30) + 3 * torch.eye(30)
    operator = Sparse(matrix.to_sparse())
    assert not operator.symmetric
    solver = SparseLU()
    factors = solver.init(operator)
    b, c = normal(30, seed=3), normal(2, 30, seed=4)
    v = solver.solve(operator, b, prepared=factors).value
    u = solver.solve(operator.T, c, batched=True, prepared=solver.transpose(factors)).value
    back = solver.solve(operator, b, prepared=solver.transpose(solver.transpose(factors))).value
    torch.testing.assert_close(v, torch.linalg.solve(matrix, b), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(u, torch.linalg.solve(matrix.T, c.T).T, rtol=1e-11, atol=1e-11)
    assert torch.equal(v, back)


def test_badly_scaled_matrices_are_not_singular() -> None:
    matrix = kkt(30, 10)
    scales = torch.logspace(-9, 9, 40)
    scaled = scales[:, None] * matrix * scales
    x = normal(40) / scales
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = SparseLU().solve(Sparse(scaled.to_sparse()), scaled @ x)
        turned = SparseLU().solve(Sparse((scales[:, None] * matrix).to_sparse()), scales * (matrix @ normal(40)))
    assert (found.status, found.singular) == (Status.CONVERGED, False)
    torch.testing.assert_close(found.value * scales, x * scales, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(turned.value, normal(40), rtol=1e-9, atol=1e-9)


def test_badly_scaled_transposes() -> None:
    matrix = sprinkled(30, 30) + 3 * torch.eye(30)
    matrix = torch.logspace(-6, 6, 30)[:, None] * matrix * torch.logspace(4, 1, 30)
    solver, operator = SparseLU(), Sparse(matrix.to_sparse())
    factors = solver.transpose(solver.init(operator))
    b = matrix.T @ (x := normal(30) / torch.logspace(-6, 6, 30))
    found = solver.solve(operator.T, b, prepared=factors)
    assert found.success
    torch.testing.assert_close(found.value, x, rtol=1e-9, atol=1e-12)


def test_an_answer_that_overflows_is_not_returned() -> None:
    nearly = 1e-37 * torch.tensor([[1.0, 1.0], [1.0, 1.0 + 2.0**-23]])
    found = SparseLU().solve(Sparse(nearly.float().to_sparse()), torch.tensor([1.0, -1.0]).float())
    assert (found.status, found.singular, found.value.tolist()) == (Status.STALLED, True, [0.0, 0.0])
    assert found.relative_residual == pytest.approx(1.0)


def test_refinement_lowers_the_residual() -> None:
    n = 60
    matrix = torch.eye(n) - torch.tril(torch.ones(n, n), -1)  # the example in which pivots can grow
    matrix[:, -1] = 1.0
    factors, b = SparseLU().init(Sparse(matrix.to_sparse())), normal(1, n)
    plain = torch.as_tensor(factors._back(b.T.numpy()))
    assert float(factors.solve(b)[1]) < 0.5 * float((matrix @ plain - b.T).norm())


def test_the_condition_estimate_is_near_the_truth() -> None:
    for seed in range(6):
        for decades in (0, 6):
            matrix = kkt(24, 9, seed)
            matrix[5, 5] += 10.0**-decades
            factors = SparseLU().init(Sparse(matrix.to_sparse()))
            scaled = torch.as_tensor(factors.left)[:, None] * matrix * torch.as_tensor(factors.right)
            true = 1.0 / float(torch.linalg.matrix_norm(scaled, 1) * torch.linalg.matrix_norm(scaled.inverse(), 1))
            assert 0.999 * true <= factors.rcond <= 4.0 * true  # the norm of the inverse is bounded from below
            largest = scaled.abs().amax(0)
            assert 0.5 <= float(largest.min()) <= float(largest.max()) <= 2.0


def test_singular_matrices_are_reported() -> None:
    empty = torch.diag(torch.tensor([1.0, 0.0, 2.0]))
    found = SparseLU().solve(Sparse(empty.to_sparse()), torch.ones(3))
    assert (found.status, found.singular) == (Status.LINEAR_SOLVE_FAILED, True)
    assert "LSMR" in found.message
    assert (found.residual, found.value.tolist()) == (pytest.approx(3**0.5), [0.0, 0.0, 0.0])

    repeated = kkt(12, 4)
    repeated[13], repeated[:, 13] = repeated[12].clone(), repeated[:, 12].clone()  # the same constraint twice
    repeated[12:, 12:] = 0.0
    operator = Sparse(repeated.to_sparse())
    assert operator.symmetric
    inconsistent = SparseLU().solve(operator, normal(16))
    assert inconsistent.singular
    assert inconsistent.status in (Status.LINEAR_SOLVE_FAILED, Status.STALLED)

    nearly = torch.tensor([[1.0, 1.0], [1.0, 1.0 + 2.0**-52]])
    with pytest.warns(ConvergenceWarning, match="singular to working precision"):
        found = SparseLU().solve(Sparse(nearly.to_sparse()), torch.tensor([2.0, 2.0]))
    assert (found.status, found.singular) == (Status.CONVERGED, True)
    assert relative(nearly, found.value, torch.tensor([2.0, 2.0])) <= 1e-8
    with pytest.warns(ConvergenceWarning, match="singular"):
        found = SparseLU().solve(Sparse(empty.to_sparse()), torch.zeros(3))
    assert (found.status, found.value.tolist()) == (Status.CONVERGED, [0.0, 0.0, 0.0])


def test_what_is_not_finite_is_named() -> None:
    matrix = torch.eye(3)
    assert SparseLU().solve(Sparse(matrix.to_sparse()), torch.full((3,), torch.nan)).status is Status.NONFINITE
    matrix[0, 1] = torch.inf
    found = SparseLU().solve(Sparse(matrix.to_sparse(), symmetric=False), torch.ones(3))
    assert (found.status, found.value.tolist()) == (Status.NONFINITE, [0.0, 0.0, 0.0])


def test_a_tolerance_beyond_the_precision_is_not_claimed() -> None:
    hilbert = 1.0 / (torch.arange(9.0)[:, None] + torch.arange(9.0) + 1)
    found = SparseLU(rtol=1e-18).solve(Sparse(hilbert.to_sparse()), normal(9))
    assert found.status is Status.STALLED
    assert "too ill-conditioned" in found.message
    assert SparseLU(rtol=1e-18, atol=1.0).solve(Sparse(hilbert.to_sparse()), normal(9)).success


def test_operators_without_a_sparse_matrix_are_written_down() -> None:
    matrix = kkt(10, 3)
    operator = Dense(matrix, positive_definite=False)
    found = SparseLU().solve(operator, normal(13))
    assert (found.success, found.products) == (True, 13)
    torch.testing.assert_close(found.value, torch.linalg.solve(matrix, normal(13)), rtol=1e-11, atol=1e-11)


def test_auto_solver_takes_it_for_sparse_operators_of_middle_size() -> None:
    n = 300
    matrix = 2.0 * torch.eye(n) - torch.ones(n - 1).diag(1) - torch.ones(n - 1).diag(-1)
    operator = 2 * Sparse(matrix.to_sparse()) + Identity(torch.zeros(n))
    b = normal(n)
    found = implicit.AutoSolver().solve(operator, b)
    assert found.method == "SparseLU: made of sparse matrices, with 200 < n = 300 <= sparse_size = 100000"
    torch.testing.assert_close(found.value, torch.linalg.solve(operator.to_dense(), b), rtol=1e-12, atol=1e-12)
    choices = {
        "LDLT": implicit.AutoSolver(dense_size=n),
        "MINRES": implicit.AutoSolver(sparse_size=n - 1),
        "SparseLU": implicit.AutoSolver(sparse_size=n, rtol=1e-3, atol=1e-4),
    }
    for name, auto in choices.items():
        solver, _ = auto.choose(operator)
        assert type(solver).__name__ == name
        assert (getattr(solver, "rtol", 0), getattr(solver, "atol", 0)) == (auto.rtol, auto.atol)
    with pytest.raises(ValueError, match="sparse_size must be a positive integer"):
        implicit.AutoSolver(sparse_size=0)
