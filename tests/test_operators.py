"""Operators against their dense matrices: products of every kind, counts, transposes, errors."""

import numpy as np
import pytest
import scipy.sparse.linalg
import torch

from implicit import (
    Dense,
    Diagonal,
    GradientDifference,
    GradientGraph,
    Hessian,
    Identity,
    LinearOperator,
    Product,
    Scaled,
    Shifted,
    Sum,
    tree,
)


def vector(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def nested():
    return {"w": vector(2, 3), "none": torch.zeros(0, 2), "parts": [vector(seed=2), (vector(4, seed=3),)]}


def objective(y):
    """Couples all leaves, with third derivatives."""
    flat = torch.cat([y["w"].reshape(-1), y["parts"][0].reshape(1), y["parts"][1][0]])
    return torch.logsumexp(2 * flat, 0) + 0.5 * (flat**2).sum() + (flat[:5] ** 3 * flat[5:10]).sum() / 9


SIZE = 11
MATRIX_SEED = 7


def dense_hessian() -> torch.Tensor:
    like = nested()
    return torch.func.hessian(lambda v: objective(tree.unravel(v, like)))(tree.ravel(like))


def general() -> torch.Tensor:
    return vector(SIZE, SIZE, seed=MATRIX_SEED)


def swapped():
    """The same space as :func:`nested`, its keys in another order."""
    point = nested()
    return {"parts": point["parts"], "none": point["none"], "w": point["w"]}


def permutation() -> torch.Tensor:
    """P with ``P @ ravel(v) == ravel(v in the order of swapped())``."""
    columns = tree.unravel(torch.eye(SIZE), nested())
    return tree.ravel_batch({key: columns[key] for key in swapped()}).T


def wide() -> torch.Tensor:
    return vector(4, SIZE, seed=8)


def rectangular() -> Dense:
    return Dense(wide(), nested(), {"a": torch.zeros(3), "b": torch.zeros(())})


def turned() -> Dense:
    """``general()`` over the same space in another order."""
    p = permutation()
    return Dense(p @ general() @ p.T, swapped(), symmetric=False)


class Stack(LinearOperator):
    """The least a subclass can write: :meth:`mv` alone."""

    def mv(self, v):
        return tree.scale(3.0, v)


MAKERS = {
    "Hessian": (lambda: Hessian(objective, nested()), dense_hessian, 1e-10),
    "Hessian.of": (lambda: Hessian.of(GradientGraph(lambda _, y: objective(y), (), nested())), dense_hessian, 1e-10),
    "Dense": (lambda: Dense(general() + general().T, nested()), lambda: general() + general().T, 1e-12),
    "Dense general": (lambda: Dense(general(), nested(), symmetric=False), general, 1e-12),
    "Shifted": (
        lambda: Shifted(Hessian(objective, nested()), 0.7),
        lambda: dense_hessian() + 0.7 * torch.eye(SIZE),
        1e-10,
    ),
    "Shifted general": (
        lambda: Shifted(Dense(general(), nested(), symmetric=False), -0.3),
        lambda: general() - 0.3 * torch.eye(SIZE),
        1e-12,
    ),
    "GradientDifference": (lambda: GradientDifference(objective, nested()), dense_hessian, 2e-8),
    "rectangular": (rectangular, wide, 1e-12),
    "rectangular, transposed": (lambda: rectangular().T, lambda: wide().T, 1e-12),
    "Identity": (lambda: Identity(nested()), lambda: torch.eye(SIZE), 1e-12),
    "Diagonal": (lambda: Diagonal(nested()), lambda: torch.diag(tree.ravel(nested())), 1e-12),
    "Sum": (
        lambda: Hessian(objective, nested()) + 2 * Diagonal(nested()) - Identity(nested()) / 4,
        lambda: dense_hessian() + 2 * torch.diag(tree.ravel(nested())) - 0.25 * torch.eye(SIZE),
        1e-10,
    ),
    "Sum of rectangular ones": (lambda: rectangular() + 0.5 * rectangular(), lambda: 1.5 * wide(), 1e-12),
    "Sum over another order": (
        lambda: Dense(general(), nested(), symmetric=False) + turned(),
        lambda: 2 * general(),
        1e-12,
    ),
    "Scaled": (lambda: -3 * Dense(general(), nested(), symmetric=False), lambda: -3 * general(), 1e-12),
    "Product": (
        lambda: rectangular() @ Dense(general(), nested(), symmetric=False),
        lambda: wide() @ general(),
        1e-12,
    ),
    "Product over another order": (
        lambda: rectangular() @ turned() @ Hessian(objective, swapped()),
        lambda: wide() @ general() @ dense_hessian() @ permutation().T,
        1e-10,
    ),
    "Product, declared symmetric": (
        lambda: Product(rectangular().T, rectangular(), symmetric=True),
        lambda: wide().T @ wide(),
        1e-12,
    ),
    "mv alone": (lambda: Stack(nested()), lambda: 3.0 * torch.eye(SIZE), 1e-12),
}
EACH = pytest.mark.parametrize("name", MAKERS)


def make(name):
    build, expected, tolerance = MAKERS[name]
    return build(), expected(), {"rtol": tolerance, "atol": 10 * tolerance}


@EACH
def test_every_product_is_that_of_the_matrix(name) -> None:
    operator, matrix, close = make(name)
    n = matrix.shape[1]
    v, rows = vector(n, seed=5), vector(5, n, seed=6)
    as_tree = tree.unravel(v, operator.like)
    assert operator.shape == tuple(matrix.shape)
    assert operator.size == n
    torch.testing.assert_close(tree.ravel(operator @ as_tree), matrix @ v, **close)
    torch.testing.assert_close(tree.ravel(operator.mv(as_tree)), matrix @ v, **close)
    torch.testing.assert_close(operator.flat_mv(v), matrix @ v, **close)
    torch.testing.assert_close(operator.flat_mm(rows), rows @ matrix.T, **close)
    for chunk in (None, 1, 2, 5, 100):
        found = operator.mm(tree.unravel(rows, operator.like), chunk=chunk)
        torch.testing.assert_close(tree.ravel_batch(found), rows @ matrix.T, **close)
    for chunk in (None, 4, 64):
        torch.testing.assert_close(operator.to_dense(chunk), matrix, **close)
    torch.testing.assert_close(operator.flat_mm(rows[:1]), rows[:1] @ matrix.T, **close)
    assert operator.flat_mm(rows[:0]).shape == (0, len(matrix))
    batch = operator @ tree.unravel(rows, operator.like)
    torch.testing.assert_close(tree.ravel_batch(batch), rows @ matrix.T, **close)
    assert tree.describe(operator @ as_tree) == tree.describe(operator.out)
    assert not operator.flat_mv(v).requires_grad


@EACH
def test_products_are_counted(name) -> None:
    operator, matrix, _ = make(name)
    n = matrix.shape[1]
    v = vector(n)
    assert operator.products == 0
    operator.flat_mv(v)
    assert operator.products == 1
    _ = operator @ tree.unravel(v, operator.like)
    assert operator.products == 2
    operator.flat_mm(vector(5, n), chunk=2)
    assert operator.products == 7
    operator.mm(tree.unravel(vector(1, n), operator.like))
    assert operator.products == 8
    operator.to_dense()
    assert operator.products == 8 + n
    operator.to_scipy() @ v.numpy()
    assert operator.products == 9 + n
    operator.to_scipy() @ vector(n, 3).numpy()
    assert operator.products == 12 + n


@EACH
def test_dicts_in_another_order_are_the_same_vector(name) -> None:
    operator, matrix, close = make(name)
    v = tree.unravel(vector(matrix.shape[1]), operator.like)
    turned = {key: v[key] for key in reversed(v)}
    torch.testing.assert_close(tree.ravel(operator @ turned), matrix @ tree.ravel(v), **close)
    rows = tree.unravel(vector(3, matrix.shape[1]), operator.like)
    found = operator.mm({key: rows[key] for key in reversed(rows)})
    torch.testing.assert_close(tree.ravel_batch(found), tree.ravel_batch(rows) @ matrix.T, **close)


@EACH
def test_transposes(name) -> None:
    operator, matrix, close = make(name)
    if name == "mv alone":
        with pytest.raises(TypeError, match="Stack has no transpose; declare it symmetric or use Dense"):
            _ = operator.T
        return
    u, v = vector(len(matrix)), vector(matrix.shape[1])
    torch.testing.assert_close(operator.T.flat_mv(u), matrix.T @ u, **close)
    torch.testing.assert_close(operator.T.T.flat_mv(v), matrix @ v, **close)
    torch.testing.assert_close(operator.T.to_dense(), matrix.T, **close)
    assert tree.describe(operator.T.like) == tree.describe(operator.out)
    symmetric = matrix.shape[0] == matrix.shape[1] and bool(torch.allclose(matrix, matrix.T))
    assert (operator.T is operator) == operator.symmetric == symmetric


@EACH
def test_scipy_sees_the_same_operator(name) -> None:
    operator, matrix, close = make(name)
    seen = operator.to_scipy()
    assert isinstance(seen, scipy.sparse.linalg.LinearOperator)
    assert (seen.shape, seen.dtype) == (tuple(matrix.shape), np.dtype("float64"))
    v = vector(matrix.shape[1]).numpy()
    np.testing.assert_allclose(seen @ v, matrix.numpy() @ v, rtol=close["rtol"], atol=close["atol"])
    block = vector(matrix.shape[1], 3).numpy()
    np.testing.assert_allclose(seen @ block, matrix.numpy() @ block, rtol=close["rtol"], atol=close["atol"])
    if name == "mv alone":
        with pytest.raises(NotImplementedError, match="rmatvec is not defined"):
            seen.rmatvec(v)
        return
    u, block = vector(len(matrix)).numpy(), vector(len(matrix), 3).numpy()
    np.testing.assert_allclose(seen.rmatvec(u), matrix.numpy().T @ u, rtol=close["rtol"], atol=close["atol"])
    np.testing.assert_allclose(seen.rmatmat(block), matrix.numpy().T @ block, rtol=close["rtol"], atol=close["atol"])


def test_eigenvalues_through_scipy() -> None:
    found = scipy.sparse.linalg.eigsh(Hessian(objective, nested()).to_scipy(), k=2, v0=np.ones(SIZE))[0]
    expected = torch.linalg.eigvalsh(dense_hessian()).abs().sort().values[-2:]
    np.testing.assert_allclose(np.sort(np.abs(found)), expected.numpy(), rtol=1e-9)


def test_a_hessian_brings_value_and_gradient_and_evaluates_once() -> None:
    calls = []

    def counted(y):
        calls.append(1)
        return objective(y)

    at = nested()
    operator = Hessian(counted, at)
    operator.to_dense()
    operator.flat_mv(vector(SIZE))
    assert len(calls) == 1
    assert float(operator.value) == float(objective(at))
    expected = torch.func.grad(objective)(at)
    torch.testing.assert_close(tree.ravel(operator.gradient), tree.ravel(expected))
    assert not operator.value.requires_grad
    graph = operator.graph
    assert Hessian.of(graph).graph is graph
    assert len(calls) == 1


def test_objectives_that_are_linear_constant_or_miss_leaves() -> None:
    at = {"a": torch.ones(2), "b": torch.ones(3)}
    for fn, expected in (
        (lambda y: y["a"].sum() - 2 * y["b"].sum(), torch.zeros(5)),
        (lambda y: torch.tensor(3.0), torch.zeros(5)),
        (lambda y: (y["a"] ** 2).sum(), torch.tensor([2.0, 2.0, 0.0, 0.0, 0.0])),
        (lambda y: (y["a"] ** 2).sum() + y["b"].sum(), torch.tensor([2.0, 2.0, 0.0, 0.0, 0.0])),
    ):
        operator = Hessian(fn, at)
        torch.testing.assert_close(operator.to_dense(), torch.diag(expected))
        torch.testing.assert_close(operator.flat_mv(torch.ones(5)), expected)


def test_declarations_follow_the_parts() -> None:
    definite = Dense(torch.eye(2))
    assert definite.symmetric
    assert definite.positive_definite
    assert not Dense(torch.eye(2), symmetric=False).positive_definite
    assert not Hessian(objective, nested(), positive_definite=False).positive_definite
    assert Hessian(objective, nested()).symmetric
    assert Shifted(definite, 0.0).positive_definite
    assert not Shifted(definite, -1.0).positive_definite
    assert not Shifted(Dense(torch.eye(2), symmetric=False), 1.0).symmetric
    assert GradientDifference(objective, nested()).symmetric
    assert Diagonal(torch.tensor([1.0, 2.0])).positive_definite
    assert not Diagonal(torch.tensor([1.0, 0.0])).positive_definite
    indefinite, general = Dense(torch.eye(2), positive_definite=False), Dense(torch.eye(2), symmetric=False)
    assert (definite + definite).positive_definite
    assert not (definite + indefinite).positive_definite
    assert (definite + indefinite).symmetric
    assert not (definite + general).symmetric
    assert (0.5 * definite).positive_definite
    assert not (0 * definite).positive_definite
    assert not (-definite).positive_definite
    assert (-definite).symmetric
    assert not (2 * general).symmetric
    assert (definite @ definite).positive_definite
    assert Product(definite, indefinite, definite).symmetric
    assert not Product(definite, indefinite, definite).positive_definite
    assert not (definite @ Dense(torch.eye(2))).symmetric  # equal, but not known to be
    assert not (general @ general).symmetric
    assert Product(general.T, general, positive_definite=True).symmetric
    assert not Product(general.T, general, symmetric=True).positive_definite


def test_a_product_shares_no_memory_with_its_argument() -> None:
    v = torch.ones(2)
    for operator in (Identity(v), Diagonal(torch.ones(2)), 1.0 * Identity(v), Sum(Identity(v)), Product(Identity(v))):
        (operator @ v).mul_(5)
        operator.flat_mv(v).mul_(5)
        operator.flat_mm(v[None]).mul_(5)
        operator.mv(v).mul_(5)
        assert v.tolist() == [1.0, 1.0]


def test_one_vector_or_several_is_read_off_the_shapes() -> None:
    operator = 2 * Identity({"a": torch.zeros(2), "b": torch.zeros(())})
    one = operator @ {"a": torch.ones(2), "b": torch.tensor(3.0)}
    assert (one["a"].tolist(), float(one["b"])) == ([2.0, 2.0], 6.0)
    two = operator @ {"a": torch.ones(2, 2), "b": torch.tensor([3.0, 4.0])}
    assert (two["a"].tolist(), two["b"].tolist()) == ([[2.0, 2.0]] * 2, [6.0, 8.0])
    for wrong in (
        {"a": torch.ones(2), "b": torch.ones(2)},  # one leaf stacked, the other not
        {"a": torch.ones(3, 2), "b": torch.ones(2)},  # stacks of different lengths
        {"a": torch.ones(1, 3, 2), "b": torch.ones(1, 3)},  # two leading axes
        {"a": torch.ones(3), "b": torch.ones(())},
        {"a": torch.ones(2), "b": 3.0},
        {"a": torch.ones(2, dtype=torch.float32), "b": torch.ones(())},
    ):
        with pytest.raises(ValueError, match=r"v is \['a'\].*; the operator acts on \['a'\] \(2,\) torch.float64"):
            _ = operator @ wrong
        with pytest.raises(ValueError, match="mm takes k trees like"):
            operator.mm(wrong)
    with pytest.raises(ValueError, match="mm takes k trees like"):
        operator.mm(one)
    with pytest.raises(ValueError, match="chunk must be None or at least 1, got 0"):
        operator.mm(two, chunk=0)


def test_dtype_and_domain_are_those_of_the_point() -> None:
    at = torch.tensor([1.0, 2.0], dtype=torch.float32)
    for operator in (
        Hessian(lambda y: (y**4).sum() / 12, at),
        Dense(torch.diag(at**2)),
        GradientDifference(lambda y: (y**4).sum() / 12, at),
    ):
        assert operator.dtype == torch.float32
        found = operator @ torch.ones(2, dtype=torch.float32)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, at**2, rtol=1e-3, atol=1e-3)
        assert operator.to_scipy().dtype == np.dtype("float32")
        assert operator.device == torch.device("cpu")


def test_a_hessian_of_a_number_and_of_nothing() -> None:
    operator = Hessian(lambda y: y**3, torch.tensor(2.0))
    assert operator.to_dense().tolist() == [[12.0]]
    assert (operator @ torch.tensor(0.5)).shape == ()
    empty = Dense(torch.zeros(0, 0))
    assert empty.to_dense().shape == (0, 0)


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_differences_are_accurate_for_directions_of_any_size(scale) -> None:
    operator = GradientDifference(objective, nested())
    v = vector(SIZE)
    torch.testing.assert_close(operator.flat_mv(scale * v) / scale, dense_hessian() @ v, rtol=2e-8, atol=2e-7)
    assert float(operator.flat_mv(torch.zeros(SIZE)).norm()) == 0.0


def test_differences_work_where_the_backward_pass_cannot_be_differentiated() -> None:
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, slope):
            (x,) = ctx.saved_tensors
            return 3 * x**2 * slope

    at = torch.tensor([1.0, -2.0])
    found = GradientDifference(lambda y: Cube.apply(y).sum(), at)
    torch.testing.assert_close(found.to_dense(), torch.diag(6 * at), rtol=1e-8, atol=1e-8)


def test_misuse_is_named() -> None:
    with pytest.raises(ValueError, match=r"matrix must have two axes, got shape \(2,\)"):
        Dense(torch.zeros(2))
    with pytest.raises(ValueError, match=r"matrix of shape \(2, 3\) is declared symmetric; it must be square"):
        Dense(torch.zeros(2, 3), symmetric=True)
    with pytest.raises(ValueError, match="like has 3 entries, the matrix 2 columns; they must agree"):
        Dense(torch.eye(2), torch.zeros(3))
    with pytest.raises(ValueError, match="out has 3 entries, the matrix 2 rows; they must agree"):
        Dense(torch.eye(2), torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match=r"domain has dtype torch.float64, its range torch.float32"):
        Dense(torch.eye(2), torch.zeros(2), torch.zeros(2, dtype=torch.float32))
    with pytest.raises(ValueError, match="the domains of the terms differ"):
        _ = Identity(torch.zeros(2)) + Identity(torch.zeros(3))
    with pytest.raises(ValueError, match="the ranges of the terms differ"):
        _ = Dense(torch.eye(2)) + Dense(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="different structures"):
        _ = Identity(torch.zeros(2)) + Identity({"a": torch.zeros(2)})
    with pytest.raises(ValueError, match="the spaces between two factors differ"):
        _ = Dense(torch.zeros(3, 2)) @ Dense(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="the domain and the range of a symmetric product differ"):
        Product(Dense(torch.zeros(3, 2)), symmetric=True)
    with pytest.raises(ValueError, match="the domain and the range of a shifted operator differ"):
        Shifted(Dense(torch.zeros(3, 2)), 1.0)
    with pytest.raises(ValueError, match="must order their keys alike"):
        Shifted(Dense(torch.eye(SIZE), nested(), swapped()), 1.0)
    for make_one, name in ((Sum, "Sum"), (Product, "Product")):
        with pytest.raises(ValueError, match=f"{name} needs at least one operator"):
            make_one()
        with pytest.raises(TypeError, match=f"{name} is made of linear operators, got Tensor"):
            make_one(Dense(torch.eye(2)), torch.eye(2))
    with pytest.raises(TypeError, match="alpha must be a number, got Dense; operators compose with @"):
        _ = Dense(torch.eye(2)) * Dense(torch.eye(2))
    with pytest.raises(TypeError, match="Scaled is made of linear operators, got Tensor"):
        Scaled(2.0, torch.eye(2))
    with pytest.raises(TypeError, match="unsupported operand"):
        _ = Dense(torch.eye(2)) + 1.0
    with pytest.raises(ValueError, match="the operator's domain mixes dtypes"):
        Hessian(lambda y: y["a"].sum(), {"a": torch.zeros(1), "b": torch.zeros(1, dtype=torch.float32)})
    with pytest.raises(TypeError, match="the objective must return a scalar tensor, got float"):
        Hessian(lambda y: 1.0, torch.zeros(2))
    with pytest.raises(ValueError, match=r"the objective must return a scalar, got shape \(2,\)"):
        Hessian(lambda y: y, torch.zeros(2))
    with pytest.raises(ValueError, match="different structures"):
        _ = Hessian(objective, nested()) @ torch.zeros(SIZE)
