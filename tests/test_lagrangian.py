"""Values, derivatives and counts of Lagrangians against torch.func, in every way that derivatives are supplied."""

from typing import Any

import pytest
import scipy.sparse
import torch
from torch import Tensor
from torch.func import grad, hessian, jacrev

from constrained import ConstrainedProblem, EqualityProblem, Lagrangian
from implicit import Dense, Jacobian, LinearOperator, Sparse, tree
from implicit.tree import Tree
from tests.dense import normal, swapped

X = {"w": normal(1, 3, 2), "b": [normal(2, 2), normal(3)]}
FLAT = tree.ravel(X)
N = len(FLAT)
MULTIPLIER = normal(4, 6)


def objective(x: Tree) -> Tensor:
    return torch.sin(x["w"] @ x["b"][0]).sum() + x["b"][1] ** 3 * (x["w"] ** 2).sum()


def equality(x: Tree) -> Tree:
    return {"p": torch.cos(x["w"]).prod(dim=0), "o": (x["b"][0] ** 2).sum() * x["b"][1]}


def inequality(x: Tree) -> Tree:
    return [x["w"].sum(dim=1) ** 2 * x["b"][1] - 1]


def flat_objective(x: Tensor) -> Tensor:
    return objective(tree.unravel(x, X))


def flat_constraints(x: Tensor) -> Tensor:
    at = tree.unravel(x, X)
    return torch.cat([equality(at)["p"], equality(at)["o"][None], inequality(at)[0]])


JACOBIAN = jacrev(flat_constraints)(FLAT)


def total_hessian(weight: float, multiplier: Tensor, x: Tensor = FLAT) -> Tensor:
    return hessian(lambda q: weight * flat_objective(q) + multiplier @ flat_constraints(q))(x)


def supplied_hessian(x: Tree, l: Tree, v: Tree) -> Tensor:  # noqa: E741
    return total_hessian(1.0, torch.cat([l["p"], l["o"][None], v[0]]), tree.ravel(tree.map(lambda _, q: q, X, x)))


def supplied_jacobian(rows: slice, kind: Any) -> Any:
    return lambda x: kind(jacrev(flat_constraints)(tree.ravel(x))[rows])


def as_scipy(matrix: Tensor) -> Any:
    return scipy.sparse.csr_array(matrix.numpy())


def as_operator(matrix: Tensor) -> LinearOperator:
    return Dense(matrix, symmetric=matrix.shape == (N, N), positive_definite=False)


FUNCTIONS = {"objective": objective, "equality": equality, "inequality": inequality}
PROBLEMS: dict[str, tuple[dict[str, Any], bool | None, Any]] = {
    "automatic": ({}, None, Dense),
    "matrix-free": ({}, False, Jacobian),
    "gradient": ({"gradient": lambda x: swapped(tree.unravel(grad(flat_objective)(tree.ravel(x)), X))}, None, Dense),
    **{
        name: (
            {
                "equality_jacobian": supplied_jacobian(slice(0, 3), kind),
                "inequality_jacobian": supplied_jacobian(slice(3, 6), kind),
                "hessian": lambda x, l, v, kind=kind: kind(supplied_hessian(x, l, v)),  # noqa: E741
            },
            None,
            expected,
        )
        for name, kind, expected in (
            ("dense", lambda m: m, Dense),
            ("sparse tensors", lambda m: m.to_sparse(), Sparse),
            ("scipy", as_scipy, Sparse),
            ("operators", as_operator, Dense),
        )
    },
    "one jacobian sparse": ({"inequality_jacobian": supplied_jacobian(slice(3, 6), as_scipy)}, None, Sparse),
    "one jacobian, matrix-free": (
        {"equality_jacobian": supplied_jacobian(slice(0, 3), as_scipy)},
        False,
        LinearOperator,
    ),
}


@pytest.mark.parametrize("order", ["as declared", "other key order"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_every_derivative(name: str, order: str) -> None:
    fields, dense, kind = PROBLEMS[name]
    start = X if order == "as declared" else swapped(X)
    lagrangian = Lagrangian(ConstrainedProblem(**FUNCTIONS, **fields), X, dense=dense)
    assert (lagrangian.n, lagrangian.equalities, lagrangian.inequalities, lagrangian.constraints) == (N, 3, 3, 6)
    x = lagrangian.flat(start)
    assert torch.equal(x, FLAT)
    assert str(tree.structure(lagrangian.tree(x))) == str(tree.structure(X))
    point = lagrangian.at(x)
    assert float(point.objective) == pytest.approx(float(flat_objective(FLAT)), rel=1e-14)
    torch.testing.assert_close(torch.cat([point.equality, point.inequality]), flat_constraints(FLAT))
    assert [len(part) for part in lagrangian.split(point.constraints)] == [3, 3]
    torch.testing.assert_close(point.gradient, grad(flat_objective)(FLAT))
    assert isinstance(point.jacobian, kind)
    assert point.jacobian.shape == (6, N)
    torch.testing.assert_close(point.jacobian.to_dense(), JACOBIAN)
    vectors = normal(5, 4, N), normal(6, 4, 6)
    torch.testing.assert_close(point.jacobian @ vectors[0], vectors[0] @ JACOBIAN.T)
    torch.testing.assert_close(point.jacobian.T @ vectors[1], vectors[1] @ JACOBIAN)
    torch.testing.assert_close(point.jacobian.T @ MULTIPLIER, JACOBIAN.T @ MULTIPLIER)
    torch.testing.assert_close(lagrangian.at(x).lagrangian_gradient(MULTIPLIER), point.lagrangian_gradient(MULTIPLIER))
    torch.testing.assert_close(
        point.lagrangian_gradient(MULTIPLIER), grad(flat_objective)(FLAT) + JACOBIAN.T @ MULTIPLIER
    )
    for weight in (1.0, 0.0, -2.5):
        found = point.hessian(MULTIPLIER, weight)
        assert found.symmetric and not found.positive_definite
        torch.testing.assert_close(found.to_dense(), total_hessian(weight, MULTIPLIER), rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(found @ vectors[0][0], total_hessian(weight, MULTIPLIER) @ vectors[0][0])
    assert point.finite
    for tensor in (point.objective, point.constraints, point.gradient, point.jacobian.to_dense()):
        assert not tensor.requires_grad


def test_values_whose_keys_come_in_another_order_at_other_points() -> None:
    """A constraint may build its dict in any order; multipliers pair by key."""

    def restless(x: Tensor) -> dict[str, Tensor]:
        both = {"p": x[:1] - 1, "q": 10 * x[1:]}
        return both if float(x[0].detach()) > 0 else swapped(both)

    lagrangian = Lagrangian(EqualityProblem(lambda x: x.sum(), restless), torch.ones(3))
    there = lagrangian.at(-torch.ones(3))
    assert there.constraints.tolist() == [-2.0, -10.0, -10.0]
    flat = lagrangian.flat_multipliers({"q": torch.tensor([2.0, 3.0]), "p": torch.tensor([1.0])})
    assert flat.equality.tolist() == [1.0, 2.0, 3.0]
    assert there.lagrangian_gradient(flat.equality).tolist() == [2.0, 21.0, 31.0]


def test_multipliers_go_back_and_forth() -> None:
    lagrangian = Lagrangian(ConstrainedProblem(**FUNCTIONS), X)
    given = ({"o": normal(7), "p": normal(8, 2)}, [normal(9, 3)], swapped(X), None)
    flat = lagrangian.flat_multipliers(*given)
    assert [tuple(v.shape) for v in flat] == [(3,), (3,), (N,), (N,)]
    trees = lagrangian.multiplier_trees(flat)
    assert float(tree.norm(tree.sub(trees.equality, given[0]))) == 0.0
    assert torch.equal(trees.inequality[0], given[1][0])
    assert torch.equal(flat.lower, FLAT)
    assert float(tree.norm(trees.upper)) == 0.0
    for name, wrong in (
        ("equality", {"p": normal(8, 2)}),
        ("inequality", [normal(9, 2)]),
        ("lower", torch.zeros(N)),
        ("upper", 1.0),
    ):
        with pytest.raises((ValueError, TypeError), match=f"multipliers.{name} is"):
            lagrangian.flat_multipliers(**{name: wrong})
    alone = Lagrangian(ConstrainedProblem(objective=lambda x: x.sum()), torch.ones(2))
    assert alone.multiplier_trees(alone.flat_multipliers()).equality == ()
    with pytest.raises(ValueError, match=r"multipliers\.equality"):
        alone.flat_multipliers(torch.ones(1))


def test_counts() -> None:
    for dense in (True, False):
        lagrangian = Lagrangian(ConstrainedProblem(**FUNCTIONS), X, dense=dense)
        assert set(lagrangian.counts.values()) == {0}
        point = lagrangian.at(FLAT)
        assert lagrangian.counts == {"objective": 1, "gradient": 0, "jacobian": 0, "hessian": 0, "products": 0}
        for _ in range(2):
            _ = point.gradient, point.jacobian
        assert lagrangian.counts == {"objective": 1, "gradient": 1, "jacobian": 1, "hessian": 0, "products": 0}
        matrix = point.hessian(MULTIPLIER)
        _ = matrix @ FLAT, matrix @ normal(5, 4, N), matrix.flat_mv(FLAT)
        assert lagrangian.counts["objective"] == 1
        assert (lagrangian.counts["hessian"], lagrangian.counts["products"]) == ((1, 0) if dense else (0, 6))


def test_one_evaluation_of_the_user_functions_serves_all_first_derivatives_and_the_dense_hessian() -> None:
    calls = dict.fromkeys(FUNCTIONS, 0)

    def counted(name: str) -> Any:
        def call(x: Tree) -> Tree:
            calls[name] += 1
            return FUNCTIONS[name](x)

        return call

    lagrangian = Lagrangian(ConstrainedProblem(**{name: counted(name) for name in FUNCTIONS}), X)
    calls.update(dict.fromkeys(calls, 0))
    point = lagrangian.at(FLAT)
    _ = point.gradient, point.jacobian, point.lagrangian_gradient(MULTIPLIER), point.hessian(MULTIPLIER).to_dense()
    _ = point.hessian(2 * MULTIPLIER).to_dense()
    assert set(calls.values()) == {1}


def test_dense_is_decided_by_size() -> None:
    def built(n: int, m: int) -> Lagrangian:
        return Lagrangian(EqualityProblem(lambda x: x.sum(), lambda x: x[:m]), torch.ones(n))

    assert built(1_000, 1_000).dense
    assert not built(1_001, 1_000).dense


@pytest.mark.parametrize("dense", [True, False])
def test_constants_and_linear_functions_have_zero_derivatives(dense: bool) -> None:
    problem = ConstrainedProblem(
        objective=lambda x: torch.ones(()), equality=lambda x: torch.ones(2), inequality=lambda x: 3 * x[:1]
    )
    point = Lagrangian(problem, torch.ones(3), dense=dense).at(torch.ones(3))
    assert torch.equal(point.gradient, torch.zeros(3))
    assert torch.equal(point.jacobian.to_dense(), torch.tensor([[0.0] * 3, [0.0] * 3, [3.0, 0.0, 0.0]]))
    assert point.lagrangian_gradient(torch.ones(3)).tolist() == [3.0, 0.0, 0.0]
    assert torch.equal(point.hessian(torch.ones(3)).to_dense(), torch.zeros(3, 3))
    nothing = Lagrangian(ConstrainedProblem(objective=lambda x: torch.ones(())), torch.ones(3), dense=dense)
    bare = nothing.at(torch.ones(3))
    assert bare.jacobian.shape == (0, 3)
    assert torch.equal(bare.lagrangian_gradient(torch.zeros(0)), torch.zeros(3))
    assert torch.equal(bare.hessian(torch.zeros(0)).to_dense(), torch.zeros(3, 3))


def test_a_constant_constraint_alone_matrix_free() -> None:
    problem = EqualityProblem(lambda x: (x**2).sum(), lambda x: torch.zeros(2))
    point = Lagrangian(problem, torch.ones(3), dense=False).at(torch.ones(3))
    assert point.lagrangian_gradient(torch.ones(2)).tolist() == [2.0] * 3


def test_finite_looks_at_the_objective_and_at_every_constraint() -> None:
    def at(x: list[float]) -> bool:
        problem = ConstrainedProblem(
            objective=lambda x: torch.log(x[0]), equality=lambda x: torch.log(x[1]), inequality=lambda x: 1 / x[2]
        )
        return Lagrangian(problem, torch.ones(3)).at(torch.tensor(x)).finite

    assert at([1.0, 1.0, 1.0])
    assert not at([-1.0, 1.0, 1.0])
    assert not at([1.0, -1.0, 1.0])
    assert not at([1.0, 1.0, 0.0])


def test_inference_mode_and_no_grad_around_do_not_matter() -> None:
    with torch.no_grad():
        point = Lagrangian(ConstrainedProblem(**FUNCTIONS), X).at(FLAT)
        torch.testing.assert_close(point.jacobian.to_dense(), JACOBIAN)
        torch.testing.assert_close(point.hessian(MULTIPLIER).to_dense(), total_hessian(1.0, MULTIPLIER))
