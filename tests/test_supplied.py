"""Wrong supplied derivatives are named before the first step; right ones are not suspected."""

import warnings
from typing import Any

import pytest
import scipy.sparse
import torch
from torch.func import grad, hessian, jacrev

import constrained
from constrained.supplied import check_supplied

MATRIX = torch.tensor([[1.0, -2.0, 0.5], [0.3, 1.0, 4.0]], dtype=torch.float64)
X0 = torch.tensor([0.4, -1.2, 2.0], dtype=torch.float64)


def f(x: torch.Tensor) -> torch.Tensor:
    return (x**4).sum() + x[0] * x[2]


def h(x: torch.Tensor) -> torch.Tensor:
    return MATRIX.to(x) @ x.sin() - 1


def full(x: torch.Tensor, multiplier: torch.Tensor) -> torch.Tensor:
    return hessian(lambda y: f(y) + multiplier @ h(y))(x)


RIGHT: dict[str, Any] = {"gradient": grad(f), "jacobian": jacrev(h), "hessian": full}


def look(x0: torch.Tensor = X0, **changed: Any) -> list[str]:
    lagrangian = constrained.Lagrangian(constrained.EqualityProblem(f, h, **{**RIGHT, **changed}), x0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_supplied(lagrangian, x0)
    assert set(lagrangian.counts.values()) == {0}
    return [str(w.message) for w in caught if "supplied" in str(w.message)]


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e2])
def test_right_derivatives_are_not_suspected(scale: float) -> None:
    assert look(scale * X0) == []
    assert look(X0.float()) == []
    assert look(jacobian=lambda x: scipy.sparse.csr_array(jacrev(h)(x).numpy())) == []


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("gradient", lambda x: -grad(f)(x)),
        ("gradient", lambda x: 2 * grad(f)(x)),
        ("jacobian", lambda x: -jacrev(h)(x)),
        ("jacobian", lambda x: jacrev(h)(x).flip(0)),
        ("hessian", lambda x, v: full(x, v).tril()),
        ("hessian", lambda x, v: full(x, torch.zeros_like(v))),
        ("hessian", lambda x, v: full(x, -v)),
    ],
)
def test_wrong_ones_are_named(field: str, wrong: Any) -> None:
    (message,) = look(**{field: wrong})
    assert f"the supplied {field} disagrees" in message


def test_inequalities_have_their_own_name_and_nan_is_passed_over() -> None:
    def problem(jacobian: Any) -> constrained.ConstrainedProblem:
        return constrained.ConstrainedProblem(
            objective=lambda x: x.log().sum(), equality=lambda x: x[:1] - 1, inequality=h, inequality_jacobian=jacobian
        )

    wrong = problem(lambda x: -jacrev(h)(x))
    with pytest.warns(UserWarning, match=r"supplied inequality_jacobian .* row"):
        constrained.solve(wrong, x0=X0.abs(), max_steps=1, raise_on_failure=False)
    check_supplied(constrained.Lagrangian(wrong, X0), X0)
