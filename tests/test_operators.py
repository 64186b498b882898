"""Operators against their dense matrices: products of every kind, counts, transposes, errors."""

import numpy as np
import pytest
import scipy.sparse.linalg
import torch

from implicit import Dense, GradientDifference, GradientGraph, Hessian, LinearOperator, Shifted, tree


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
    "mv alone": (lambda: Stack(nested()), lambda: 3.0 * torch.eye(SIZE), 1e-12),
}
EACH = pytest.mark.parametrize("name", MAKERS)


def make(name):
    build, expected, tolerance = MAKERS[name]
    return build(), expected(), {"rtol": tolerance, "atol": 10 * tolerance}


@EACH
def test_every_product_is_that_of_the_matrix(name) -> None:
    operator, matrix, close = make(name)
    v, rows = vector(SIZE, seed=5), vector(5, SIZE, seed=6)
    as_tree = tree.unravel(v, operator.like)
    assert operator.shape == (SIZE, SIZE)
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
    assert not operator.flat_mv(v).requires_grad


@EACH
def test_products_are_counted(name) -> None:
    operator, _, _ = make(name)
    v = vector(SIZE)
    assert operator.products == 0
    operator.flat_mv(v)
    assert operator.products == 1
    _ = operator @ tree.unravel(v, operator.like)
    assert operator.products == 2
    operator.flat_mm(vector(5, SIZE), chunk=2)
    assert operator.products == 7
    operator.mm(tree.unravel(vector(1, SIZE), operator.like))
    assert operator.products == 8
    operator.to_dense()
    assert operator.products == 8 + SIZE
    operator.to_scipy() @ v.numpy()
    assert operator.products == 9 + SIZE


@EACH
def test_dicts_in_another_order_are_the_same_vector(name) -> None:
    operator, matrix, close = make(name)
    v = tree.unravel(vector(SIZE), operator.like)
    turned = {"parts": v["parts"], "w": v["w"], "none": v["none"]}
    torch.testing.assert_close(tree.ravel(operator @ turned), matrix @ tree.ravel(v), **close)


@EACH
def test_transposes(name) -> None:
    operator, matrix, close = make(name)
    if name == "mv alone":
        with pytest.raises(TypeError, match="Stack has no transpose; declare it symmetric or use Dense"):
            _ = operator.T
        return
    v = vector(SIZE)
    torch.testing.assert_close(operator.T.flat_mv(v), matrix.T @ v, **close)
    torch.testing.assert_close(operator.T.T.flat_mv(v), matrix @ v, **close)
    assert (operator.T is operator) == operator.symmetric == (not name.endswith("general"))


@EACH
def test_scipy_sees_the_same_operator(name) -> None:
    operator, matrix, close = make(name)
    seen = operator.to_scipy()
    assert isinstance(seen, scipy.sparse.linalg.LinearOperator)
    assert (seen.shape, seen.dtype) == ((SIZE, SIZE), np.dtype("float64"))
    v = vector(SIZE).numpy()
    np.testing.assert_allclose(seen @ v, matrix.numpy() @ v, rtol=close["rtol"], atol=close["atol"])
    block = vector(SIZE, 3).numpy()
    np.testing.assert_allclose(seen @ block, matrix.numpy() @ block, rtol=close["rtol"], atol=close["atol"])
    if operator.symmetric:
        np.testing.assert_allclose(seen.rmatvec(v), matrix.numpy().T @ v, rtol=close["rtol"], atol=close["atol"])


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
    with pytest.raises(ValueError, match=r"matrix must be square, got shape \(2, 3\)"):
        Dense(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="like has 3 entries, the matrix 2 rows; they must agree"):
        Dense(torch.eye(2), torch.zeros(3))
    with pytest.raises(ValueError, match="the operator's domain mixes dtypes"):
        Hessian(lambda y: y["a"].sum(), {"a": torch.zeros(1), "b": torch.zeros(1, dtype=torch.float32)})
    with pytest.raises(TypeError, match="the objective must return a scalar tensor, got float"):
        Hessian(lambda y: 1.0, torch.zeros(2))
    with pytest.raises(ValueError, match=r"the objective must return a scalar, got shape \(2,\)"):
        Hessian(lambda y: y, torch.zeros(2))
    with pytest.raises(ValueError, match="different structures"):
        _ = Hessian(objective, nested()) @ torch.zeros(SIZE)
