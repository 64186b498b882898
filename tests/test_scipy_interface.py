"""from_scipy and to_scipy: the same answers and multipliers on both sides, signs, derivatives of every kind."""

from typing import Any

import numpy as np
import pytest
import scipy.optimize
import scipy.sparse
import torch
from scipy.optimize import BFGS, SR1
from torch import Tensor

import constrained
from constrained import AugmentedLagrangian, ConstrainedProblem, InteriorPoint, Lagrangian, Solution
from implicit import Status
from tests.dense import normal

INF = np.inf
NonlinearConstraint: Any = (
    scipy.optimize.NonlinearConstraint
)  # their stubs know neither functions as jac nor arrays as bounds
Bounds: Any = scipy.optimize.Bounds
LinearConstraint: Any = scipy.optimize.LinearConstraint
METHOD = AugmentedLagrangian()

# min sum (x - t)^2 + x0 x1  s.t.  x0^2 + x1^2 = 2,  1 <= x1 + x2 <= 1.5,  x2 x3 <= 0.5,  x >= 0.1, x3 <= 0.9
FLIP = np.array([[0.0, 1.0], [1.0, 0.0]])
TARGET = np.array([2.0, -1.0, 3.0, 2.0])
START = np.array([1.0, 1.0, 0.5, 0.5])


def f(x: Any) -> Any:
    return ((x - TARGET) ** 2).sum() + x[0] * x[1]


def f_torch(x: Tensor) -> Tensor:
    return ((x - torch.as_tensor(TARGET)) ** 2).sum() + x[0] * x[1]


def f_jac(x: np.ndarray) -> np.ndarray:
    return 2 * (x - TARGET) + np.array([x[1], x[0], 0, 0])


def f_hess(x: np.ndarray) -> np.ndarray:
    matrix = 2 * np.eye(4)
    matrix[0, 1] = matrix[1, 0] = 1
    return matrix


def circle(x: Any) -> Any:
    return x[0] ** 2 + x[1] ** 2 - 2


def circle_jac(x: np.ndarray) -> np.ndarray:
    return np.array([[2 * x[0], 2 * x[1], 0, 0]])


def circle_hess(x: np.ndarray, v: np.ndarray) -> np.ndarray:
    return v[0] * np.diag([2.0, 2, 0, 0])


def product(x: Any) -> Any:
    return x[2] * x[3]


def product_jac(x: np.ndarray) -> np.ndarray:
    return np.array([[0, 0, x[3], x[2]]])


def product_hess(x: np.ndarray, v: np.ndarray) -> np.ndarray:
    matrix = np.zeros((4, 4))
    matrix[2, 3] = matrix[3, 2] = v[0]
    return matrix


SUM = np.array([[0.0, 1, 1, 0]])
BOUNDS = Bounds(np.full(4, 0.1), np.array([INF, INF, INF, 0.9]))
PAIRS = [(0.1, None), (0.1, INF), (0.1, None), (0.1, 0.9)]


def exact() -> Any:
    constraints = [
        NonlinearConstraint(circle, 0, 0, jac=circle_jac, hess=circle_hess),
        LinearConstraint(SUM, 1, 1.5),
        NonlinearConstraint(product, -INF, 0.5, jac=product_jac, hess=product_hess),
    ]
    found = scipy.optimize.minimize(
        f,
        START,
        jac=f_jac,
        hess=f_hess,
        bounds=BOUNDS,
        constraints=constraints,
        method="trust-constr",
        options={"gtol": 1e-10, "xtol": 1e-12, "barrier_tol": 1e-11, "maxiter": 2000},
    )
    assert found.success
    return found


EXACT = exact()


class Operator(scipy.sparse.linalg.LinearOperator):
    def __init__(self, matrix: np.ndarray) -> None:
        super().__init__(matrix.dtype, matrix.shape)
        self.matrix = matrix

    def _matvec(self, x: np.ndarray) -> np.ndarray:
        return self.matrix @ x


def torch_style() -> ConstrainedProblem:
    constraints = [
        NonlinearConstraint(circle, 0, 0),
        LinearConstraint(SUM, 1, 1.5),
        NonlinearConstraint(product, -INF, 0.5, hess=BFGS()),
    ]
    return constrained.from_scipy(f_torch, START, bounds=BOUNDS, constraints=constraints)


def numpy_style(wrap: Any = np.asarray, operator: Any = np.asarray) -> ConstrainedProblem:
    constraints = [
        NonlinearConstraint(
            circle, 0, 0, jac=lambda x: wrap(circle_jac(x)), hess=lambda x, v: operator(circle_hess(x, v))
        ),
        LinearConstraint(wrap(SUM), 1, 1.5),
        NonlinearConstraint(
            product, -INF, 0.5, jac=lambda x: wrap(product_jac(x)), hess=lambda x, v: operator(product_hess(x, v))
        ),
    ]
    return constrained.from_scipy(
        f, START, jac=f_jac, hess=lambda x: operator(f_hess(x)), bounds=PAIRS, constraints=constraints
    )


def dict_style() -> ConstrainedProblem:
    """Inequalities as fun >= 0; values and gradients in one; extra arguments."""
    constraints = [
        {"type": "eq", "fun": lambda x, r: circle(x) + 2 - r, "args": (2.0,)},
        {"type": "ineq", "fun": lambda x: torch.stack([x[1] + x[2] - 1, 1.5 - x[1] - x[2]])},
        {"type": "ineq", "fun": lambda x: 0.5 - product(x)},
    ]
    return constrained.from_scipy(
        lambda x, s: (s * f(x), s * f_jac(x)),
        START,
        jac=True,
        hess=lambda x, s: s * f_hess(x),
        args=(1.0,),
        bounds=PAIRS,
        constraints=constraints,
    )


def differenced() -> ConstrainedProblem:
    constraints = [
        NonlinearConstraint(circle, 0, 0, jac=circle_jac),
        LinearConstraint(SUM, 1, 1.5),
        {"type": "ineq", "fun": lambda x: 0.5 - np.prod(x[2:])},
    ]
    return constrained.from_scipy(f, START, bounds=BOUNDS, constraints=constraints, finite_differences=True)


STYLES: dict[str, tuple[Any, float]] = {
    "torch": (torch_style, 1e-6),
    "numpy": (numpy_style, 1e-6),
    "sparse": (lambda: numpy_style(scipy.sparse.csr_array, scipy.sparse.coo_array), 1e-6),
    "sparse and operators": (lambda: numpy_style(scipy.sparse.csc_matrix, Operator), 1e-6),
    "dicts": (dict_style, 1e-6),
    "differences": (differenced, 1e-5),
}


def flat(values: Any) -> list[float]:
    return torch.cat([v.reshape(-1) for v in values]).tolist()


@pytest.mark.parametrize("method", [METHOD, InteriorPoint()], ids=lambda m: m.name)
@pytest.mark.parametrize("style", STYLES)
def test_the_same_answer_and_multipliers(style: str, method: Any) -> None:
    build, tolerance = STYLES[style]
    loose = 1e-6 if style == "differences" else None
    found = constrained.solve(build(), method, torch.as_tensor(START), atol=loose)
    assert found.success
    np.testing.assert_allclose(found.x.numpy(), EXACT.x, atol=10 * tolerance)
    assert found.fun == pytest.approx(EXACT.fun, rel=10 * tolerance)
    equality, (low_high,), (above,), bounds = EXACT.v[0], EXACT.v[1], EXACT.v[2], EXACT.v[3]
    assert flat(found.multipliers.equality) == pytest.approx(equality, abs=1e-4)
    # A positive multiplier of trust-constr presses against the upper side.
    sides = [max(low_high, 0.0), max(-low_high, 0.0)]
    given = flat(found.multipliers.inequality)
    assert given == pytest.approx([*(reversed(sides) if style == "dicts" else sides), above], abs=1e-4)
    assert max(given) > 0.1
    pressed = found.multipliers.upper - found.multipliers.lower
    np.testing.assert_allclose(pressed.numpy(), bounds, atol=1e-4)
    assert float(found.multipliers.lower.max()) > 0.1 or float(found.multipliers.upper.max()) > 0.1
    assert min(given) >= 0


def test_the_result_has_scipys_names() -> None:
    found = constrained.solve(torch_style(), METHOD, torch.as_tensor(START))
    assert found.success is True
    assert found.nit == found.steps > 0
    assert found.fun == f(found.x.numpy())
    assert isinstance(found.message, str)
    assert found.nfev > 0
    short = constrained.solve(torch_style(), METHOD, torch.as_tensor(START), max_steps=1)
    assert short.success is False
    assert short.status is Status.STEP_LIMIT


def test_the_sign_of_dict_constraints() -> None:
    """x >= 2 as a dict is fun = x - 2 >= 0; here it is c = 2 - x <= 0 with a multiplier of at least zero."""
    problem = constrained.from_scipy(lambda x: (x**2).sum(), constraints={"type": "ineq", "fun": lambda x: x - 2})
    found = constrained.solve(problem, METHOD, torch.tensor([5.0]))
    assert float(found.x) == pytest.approx(2.0, abs=1e-7)
    assert problem.inequality is not None
    assert float(problem.inequality(torch.tensor([5.0]))[0]) == -3.0
    assert float(found.multipliers.inequality[0]) == pytest.approx(4.0, abs=1e-6)
    back = constrained.to_scipy(problem, torch.tensor([5.0]), dict_constraints=True)["constraints"][0]
    assert (back["type"], back["fun"](np.array([5.0])).tolist()) == ("ineq", [3.0])
    assert back["jac"](np.array([5.0])).tolist() == [[1.0]]


def test_two_sided_equal_and_absent_rows() -> None:
    """One constraint with an equality row, a two-sided, a one-sided and a free row."""
    function = lambda x: torch.stack([x[0], x[1], x[0] * x[1], x.sum()])  # noqa: E731
    low, high = [1.0, -1.0, -INF, -INF], [1.0, 2.0, 3.0, INF]
    simple = lambda x: (x**2).sum()  # noqa: E731
    torch_rows = constrained.from_scipy(simple, constraints=NonlinearConstraint(function, low, high))
    numpy_rows = constrained.from_scipy(
        simple,
        constraints=[
            NonlinearConstraint(
                lambda x: function(torch.as_tensor(x)).numpy(),
                low,
                high,
                jac=lambda x: np.array([[1.0, 0], [0, 1], [x[1], x[0]], [1, 1]]),
                hess=lambda x, v: v[2] * np.array([[0.0, 1], [1, 0]]),
            )
        ],
    )
    x, l, v = torch.tensor([0.5, 4.0]), torch.tensor([0.3]), torch.tensor([1.0, 2.0, 3.0])  # noqa: E741
    for rows in (torch_rows, numpy_rows):
        problem = ConstrainedProblem(
            objective=simple,
            equality=rows.equality,
            inequality=rows.inequality,
            equality_jacobian=rows.equality_jacobian,
            inequality_jacobian=rows.inequality_jacobian,
            hessian=None,
        )
        point = Lagrangian(problem, x).at(x)
        assert point.constraints.tolist() == [-0.5, 2.0, -1.0, -5.0]
        expected = [[1.0, 0.0], [0.0, 1.0], [4.0, 0.5], [0.0, -1.0]]
        assert point.jacobian.to_dense().tolist() == expected
    assert numpy_rows.hessian is not None
    matrix = numpy_rows.hessian(x, [l], [v])  # of x0 x1 the upper side alone, with multiplier 2
    assert matrix.tolist() == [[2.0, 2.0], [2.0, 2.0]]
    torch.testing.assert_close(Lagrangian(torch_rows, x).at(x).hessian(torch.cat([l, v])).to_dense(), matrix)
    two_sided = NonlinearConstraint(lambda x: x.prod(), 1, 2, jac=lambda x: x[::-1], hess=lambda x, v: v[0] * FLIP)
    both = constrained.from_scipy(simple, constraints=two_sided)
    assert both.hessian is not None
    assert both.hessian(x, [], [torch.tensor([1.0, 4.0])]).tolist() == [[2.0, -3.0], [-3.0, 2.0]]


def test_hessians_of_lagrangians_from_numpy() -> None:
    numpy, torched = numpy_style(), torch_style()
    x, l, v = torch.as_tensor(START) + 0.1, [torch.tensor([0.7])], [torch.tensor([0.2, 0.5]), torch.tensor([1.3])]  # noqa: E741
    multiplier = torch.cat([*l, *v])
    matrices = [Lagrangian(p, x).at(x).hessian(multiplier).to_dense() for p in (numpy, torched)]
    torch.testing.assert_close(*matrices)
    assert numpy.hessian is not None
    torch.testing.assert_close(numpy.hessian(x, l, v), matrices[0])
    rough = Lagrangian(differenced(), x).at(x)
    torch.testing.assert_close(rough.hessian(multiplier).to_dense(), matrices[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(rough.gradient, torch.as_tensor(f_jac(x.numpy())), atol=1e-9, rtol=0)


def test_sparse_stays_sparse() -> None:
    problem = numpy_style(scipy.sparse.csr_array, scipy.sparse.coo_array)
    point = Lagrangian(problem, torch.as_tensor(START)).at(torch.as_tensor(START))
    assert point.jacobian.to_sparse() is not None
    expected = Lagrangian(torch_style(), torch.as_tensor(START)).at(torch.as_tensor(START)).jacobian.to_dense()
    torch.testing.assert_close(point.jacobian.to_dense(), expected)
    assert point.hessian(torch.ones(4)).to_sparse() is not None


def test_values_and_gradients_of_one_call_are_computed_once() -> None:
    calls = [0]

    def both(x: np.ndarray) -> Any:
        calls[0] += 1
        return f(x), f_jac(x)

    problem = constrained.from_scipy(both, jac=True, hess=f_hess)
    point = Lagrangian(problem, torch.as_tensor(START)).at(torch.as_tensor(START))
    _ = point.objective, point.gradient
    assert calls[0] == 1


MISUSE: dict[str, tuple[Any, type[Exception], str]] = {
    "fun": (lambda: constrained.from_scipy(3.0), TypeError, "fun must be a function, got float"),  # type: ignore[arg-type]
    "numpy without jac": (
        lambda: constrained.from_scipy(lambda x: float(np.sum(np.asarray(x) ** 2)), START),
        TypeError,
        "as jac is not given, fun must be written with torch operations: do that, give jac and hess",
    ),
    "a float from a tensor": (
        lambda: constrained.from_scipy(lambda x: float(x.detach().sum()), START),
        TypeError,
        "fun returned float for a tensor; as jac is not given, fun must be written with torch operations",
    ),
    "jac without hess": (lambda: constrained.from_scipy(f, jac=f_jac), TypeError, "fun has jac but no hess"),
    "hess without jac": (lambda: constrained.from_scipy(f, hess=f_hess), TypeError, "hess of fun is given without jac"),
    "quasi-Newton": (
        lambda: constrained.from_scipy(f, jac=f_jac, hess=BFGS()),
        TypeError,
        "hess of fun is a quasi-Newton strategy (BFGS)",
    ),
    "quasi-Newton constraint": (
        lambda: constrained.from_scipy(f_torch, constraints=[NonlinearConstraint(circle, 0, 0, jac=circle_jac)]),
        TypeError,
        "hess of constraints[0] is missing (scipy then takes BFGS()",
    ),
    "SR1 constraint": (
        lambda: constrained.from_scipy(
            f_torch, constraints=[NonlinearConstraint(circle, 0, 0, jac=circle_jac, hess=SR1())]
        ),
        TypeError,
        "hess of constraints[0].fun is a quasi-Newton strategy (SR1)",
    ),
    "jac": (lambda: constrained.from_scipy(f, jac=3.0), TypeError, "jac of fun must be a function, True or None"),
    "constraint": (
        lambda: constrained.from_scipy(f_torch, constraints=[circle]),
        TypeError,
        "constraints[0] is a function: give a LinearConstraint, a NonlinearConstraint or a dict",
    ),
    "type": (
        lambda: constrained.from_scipy(f_torch, constraints={"type": "le", "fun": circle}),
        ValueError,
        "a dict needs 'fun' and 'type', which is 'eq' or 'ineq'",
    ),
    "pairs": (lambda: constrained.from_scipy(f_torch, bounds=[1.0, 2.0]), ValueError, "one pair (low, high)"),
    "crossed constraint": (
        lambda: constrained.from_scipy(f_torch, constraints=NonlinearConstraint(circle, 2, 1)),
        ValueError,
        "constraints[0] has lb = 2 and ub = 1, which no value satisfies in 1 rows",
    ),
    "crossed linear constraint": (
        lambda: constrained.from_scipy(f_torch, constraints=LinearConstraint(SUM, [2.0], [1.0])),
        ValueError,
        "which no value satisfies",
    ),
    "infinite sides": (
        lambda: constrained.from_scipy(f_torch, constraints=NonlinearConstraint(circle, INF, INF)),
        ValueError,
        "lb = inf and ub = inf, which no value satisfies",
    ),
    "infinite low side": (
        lambda: constrained.from_scipy(f_torch, constraints=NonlinearConstraint(circle, -INF, -INF)),
        ValueError,
        "lb = -inf and ub = -inf, which no value satisfies",
    ),
    "a side that is no number": (
        lambda: constrained.from_scipy(f_torch, constraints=NonlinearConstraint(circle, np.nan, 1)),
        ValueError,
        "lb = nan and ub = 1, which no value satisfies",
    ),
    "jac of a dict without hess": (
        lambda: constrained.from_scipy(f_torch, constraints={"type": "eq", "fun": circle, "jac": circle_jac}),
        TypeError,
        "constraints[0]['fun'] has jac but no hess",
    ),
    "length of bounds": (
        lambda: constrained.from_scipy(f_torch, START, bounds=[(0, 1)] * 3),
        ValueError,
        "lower of shape (3,) does not broadcast to x0 of shape (4,)",
    ),
}


@pytest.mark.parametrize("case", MISUSE.values(), ids=MISUSE)
def test_misuse_is_named(case: tuple[Any, type[Exception], str]) -> None:
    call, kind, message = case
    with pytest.raises(kind) as caught:
        call()
    assert message in str(caught.value)


def test_dicts_with_derivatives_lists_and_single_arguments() -> None:
    """Hessians of dicts, nested lists for matrices, args without a tuple, and types in capitals, as in scipy."""
    constraints = [
        {
            "type": "EQ",
            "fun": lambda x, r: circle(x) + 2 - r,
            "jac": lambda x, r: circle_jac(x).tolist(),
            "hess": lambda x, v, r: (0.5 * r * circle_hess(x, v)).tolist(),
            "args": 2.0,
        },
        {"type": "Ineq", "fun": lambda x: SUM @ x - 1, "jac": lambda x: SUM, "hess": lambda x, v: np.zeros((4, 4))},
        {"type": "ineq", "fun": lambda x: 1.5 - SUM @ x, "jac": lambda x: -SUM, "hess": lambda x, v: np.zeros((4, 4))},
        {
            "type": "INEQ",
            "fun": lambda x: 0.5 - product(x),
            "jac": lambda x: -product_jac(x),
            "hess": lambda x, v: -product_hess(x, v),
        },
    ]
    problem = constrained.from_scipy(
        lambda x, s: s * f(x),
        START,
        jac=lambda x, s: (s * f_jac(x)).tolist(),
        hess=lambda x, s: (s * f_hess(x)).tolist(),
        args=1.0,
        bounds=PAIRS,
        constraints=constraints,
    )
    found = constrained.solve(problem, METHOD, torch.as_tensor(START))
    np.testing.assert_allclose(found.x.numpy(), EXACT.x, atol=1e-5)
    x, weights = torch.as_tensor(START) + 0.1, torch.tensor([0.7, 0.2, 0.5, 1.3])
    # The rows of dicts lie in another order: circle, lower and upper side of the sum, product.
    matrix = Lagrangian(torch_style(), x).at(x).hessian(weights).to_dense()
    torch.testing.assert_close(Lagrangian(problem, x).at(x).hessian(weights).to_dense(), matrix)


def test_one_pair_bounds_every_entry() -> None:
    """As in scipy; a length that does not broadcast is refused."""
    problem = constrained.from_scipy(f_torch, START, bounds=[(None, 1)])
    lagrangian = Lagrangian(problem, torch.as_tensor(START))
    assert lagrangian.upper.tolist() == [1.0] * 4
    assert lagrangian.lower.tolist() == [-INF] * 4


TREE = {"a": torch.tensor([1.0, 1.0], dtype=torch.float64), "b": torch.tensor([[0.5, 0.5]], dtype=torch.float64)}
TREE_PROBLEM = ConstrainedProblem(
    objective=lambda x: f_torch(torch.cat([x["a"], x["b"][0]])),
    equality=lambda x: {"circle": (x["a"] ** 2).sum() - 2},
    inequality=lambda x: [
        x["b"].prod() - 0.5,
        torch.stack([x["a"][1] + x["b"][0, 0] - 1.5, 1 - x["a"][1] - x["b"][0, 0]]),
    ],
    lower=0.1,
    upper={"b": torch.tensor([INF, 0.9], dtype=torch.float64), "a": None},
)


def ours() -> Solution:
    found = constrained.solve(TREE_PROBLEM, METHOD, TREE)
    assert found.success
    return found


@pytest.mark.parametrize("method", ["SLSQP", "trust-constr"])
@pytest.mark.filterwarnings("ignore:delta_grad == 0.0")
def test_to_scipy(method: str) -> None:
    arguments = constrained.to_scipy(TREE_PROBLEM, TREE, dict_constraints=method == "SLSQP")
    options = {"ftol": 1e-13} if method == "SLSQP" else {"gtol": 1e-10, "xtol": 1e-12, "barrier_tol": 1e-11}
    found = scipy.optimize.minimize(method=method, options=options, **arguments)
    assert found.success
    mine = ours()
    flat_x = Lagrangian(TREE_PROBLEM, TREE).flat(mine.x)
    np.testing.assert_allclose(found.x, flat_x.numpy(), atol=1e-5)
    np.testing.assert_allclose(found.x, EXACT.x, atol=1e-5)
    if method == "trust-constr":
        given = [v.reshape(-1) for v in mine.multipliers.inequality]
        np.testing.assert_allclose(found.v[0], [float(mine.multipliers.equality["circle"])], atol=1e-4)
        np.testing.assert_allclose(found.v[1], torch.cat(given).numpy(), atol=1e-4)


@pytest.mark.parametrize("dense", [True, False])
def test_derivatives_handed_to_scipy_are_exact(dense: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not dense:
        monkeypatch.setattr("constrained.lagrangian.DENSE_LIMIT", 0)
    arguments = constrained.to_scipy(TREE_PROBLEM, TREE)
    lagrangian = Lagrangian(TREE_PROBLEM, TREE, dense=True)
    x, v = normal(4, 4).numpy() + 1, normal(5, 4).numpy()
    point = lagrangian.at(torch.as_tensor(x))
    zero = torch.zeros(4)
    assert arguments["fun"](x) == float(point.objective)
    np.testing.assert_array_equal(arguments["x0"], [1.0, 1.0, 0.5, 0.5])
    np.testing.assert_allclose(arguments["jac"](x), point.gradient.numpy())
    np.testing.assert_allclose(arguments["hess"](x) @ v, point.hessian(zero).to_dense().numpy() @ v)
    equal, unequal = arguments["constraints"]
    np.testing.assert_allclose(equal.fun(x), point.equality.numpy())
    np.testing.assert_allclose(unequal.fun(x), point.inequality.numpy())
    np.testing.assert_allclose(np.vstack([equal.jac(x), unequal.jac(x)]), point.jacobian.to_dense().numpy())
    weights = torch.tensor([0.4, -1.0, 2.0, 0.7])
    total = equal.hess(x, weights[:1].numpy()) @ v + unequal.hess(x, weights[1:].numpy()) @ v
    np.testing.assert_allclose(total, point.hessian(weights, 0.0).to_dense().numpy() @ v, atol=1e-12)
    assert (equal.lb, equal.ub, unequal.lb, unequal.ub) == (0.0, 0.0, -INF, 0.0)
    assert arguments["bounds"].ub.tolist() == [INF, INF, INF, 0.9]
    free = constrained.to_scipy(ConstrainedProblem(objective=lambda x: (x**2).sum()), torch.ones(2))
    assert free["bounds"] is None
    assert free["constraints"] == []


def test_there_and_back() -> None:
    arguments = constrained.to_scipy(TREE_PROBLEM, TREE)
    again = constrained.from_scipy(**arguments)
    found = constrained.solve(again, METHOD, torch.as_tensor(arguments["x0"]))
    np.testing.assert_allclose(found.x.numpy(), Lagrangian(TREE_PROBLEM, TREE).flat(ours().x).numpy(), atol=1e-6)


def test_a_single_argument_needs_no_tuple() -> None:
    """As in scipy: whatever is no tuple is one argument of ``fun``; those of dict constraints may be lists."""
    problem = constrained.from_scipy(
        lambda x, a: ((x - a) ** 2).sum(),
        torch.tensor([2.0, 2.0]),
        args=3.0,
        constraints=[
            {"type": "eq", "fun": lambda x, b: x[0] - b, "args": 1.5},
            {"type": "eq", "fun": lambda x, b, c: x[1] - b * c, "args": [1.5, 2.0]},
        ],
    )
    x = torch.tensor([2.0, 2.0])
    assert float(problem.objective(x)) == 2.0
    assert problem.equality is not None
    assert [float(v) for v in problem.equality(x)] == [0.5, -1.0]
    listed = constrained.from_scipy(lambda x, a: x.sum() * len(a), args=[1.0, 2.0, 3.0])
    assert float(listed.objective(x)) == 12.0
