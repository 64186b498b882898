"""Declarations: what is refused before the first step, with the field, the value and the cure in the message."""

import math
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from torch import Tensor

import constrained
import implicit
from constrained import ConstrainedProblem, EqualityProblem, Lagrangian
from implicit import Sparse, tree


def square(x: Tensor) -> Tensor:
    return (x**2).sum()


def total(x: Tensor) -> Tensor:
    return x.sum() - 1


ONES = torch.ones(3, dtype=torch.float64)


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


MISDECLARED: dict[str, tuple[Any, type[Exception], str]] = {
    "objective": (lambda: EqualityProblem(3.0, total), TypeError, "objective must be a function of x, got float"),  # type: ignore[arg-type]
    "no objective": (
        lambda: ConstrainedProblem(objective=None),  # type: ignore[arg-type]
        TypeError,
        "objective must be a function of x, got NoneType",
    ),
    "no equality": (
        lambda: EqualityProblem(square, None),  # type: ignore[arg-type]
        TypeError,
        "equality must be a function of x, got None; minimize an unconstrained f by implicit.minimize",
    ),
    "equality": (lambda: EqualityProblem(square, ONES), TypeError, "equality must be a function of x, got Tensor"),  # type: ignore[arg-type]
    "inequality": (
        lambda: ConstrainedProblem(objective=square, inequality=[total]),  # type: ignore[arg-type]
        TypeError,
        "inequality must be a function of x, got list",
    ),
    "gradient": (lambda: EqualityProblem(square, total, gradient=ONES), TypeError, "gradient must be a function of x"),  # type: ignore[arg-type]
    "jacobian": (lambda: EqualityProblem(square, total, jacobian=ONES), TypeError, "jacobian must be a function of x"),  # type: ignore[arg-type]
    "hessian": (lambda: EqualityProblem(square, total, hessian=ONES), TypeError, "hessian must be a function of x"),  # type: ignore[arg-type]
    "equality_jacobian alone": (
        lambda: ConstrainedProblem(objective=square, equality_jacobian=lambda x: x),
        TypeError,
        "equality_jacobian is given, but there is no equality: give both or neither",
    ),
    "inequality_jacobian alone": (
        lambda: ConstrainedProblem(objective=square, inequality_jacobian=lambda x: x),
        TypeError,
        "inequality_jacobian is given, but there is no inequality: give both or neither",
    ),
    "lower NaN": (lambda: ConstrainedProblem(objective=square, lower=math.nan), ValueError, "lower"),
    "lower infinite": (lambda: ConstrainedProblem(objective=square, lower=math.inf), ValueError, "lower"),
    "upper infinite": (lambda: ConstrainedProblem(objective=square, upper=-math.inf), ValueError, "upper"),
    "bound text": (lambda: ConstrainedProblem(objective=square, upper="1"), TypeError, "upper"),
    "bound in numpy": (
        lambda: ConstrainedProblem(objective=square, lower=np.zeros(3)),
        TypeError,
        "lower is a numpy array: give a number, a floating-point tensor or None; torch.from_numpy(lower) is one",
    ),
}


@pytest.mark.parametrize("case", MISDECLARED.values(), ids=MISDECLARED)
def test_a_wrong_field_is_named(case: tuple[Any, type[Exception], str]) -> None:
    build, kind, message = case
    with pytest.raises(kind) as caught:
        build()
    assert message in str(caught.value)


INVALID: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "integers": (
        total,
        torch.ones(3, dtype=torch.int64),
        TypeError,
        "x0 has dtype torch.int64: convert it to a real floating dtype, such as x0.double()",
    ),
    "a number": (total, 3, TypeError, "x0 = 3: give a floating-point tensor, such as torch.tensor(3.0)"),
    "a list": (total, [1.0, 2.0], TypeError, "x0[0] = 1.0: give a floating-point tensor, such as torch.tensor(1.0)"),
    "numpy": (total, np.ones(3), TypeError, "x0 is a numpy array: give a floating-point tensor; torch.from_numpy(x0)"),
    "numpy leaf": (
        total,
        {"a": ONES, "b": np.ones(3)},
        TypeError,
        "x0['b'] is a numpy array: give a floating-point tensor; torch.from_numpy(x0['b'])",
    ),
    "nothing": (total, {}, ValueError, "x0 holds no tensor"),
    "NaN": (total, ONES * math.nan, ValueError, "x0 is not finite: start from numbers"),
    "infinite leaf": (
        lambda x: x["a"].sum(),
        {"a": ONES, "b": ONES / 0},
        ValueError,
        "x0['b'] is not finite: start from numbers",
    ),
    "mixed dtypes": (lambda x: x["a"].sum(), {"a": ONES, "b": ONES.float()}, ValueError, "x0"),
    "equality returns a float": (lambda x: 3.0, ONES, TypeError, "equality must return a tensor or a tree of tensors"),
    "equality returns nothing": (lambda x: (), ONES, TypeError, "equality must return a tensor or a tree of tensors"),
    "equality in float32": (
        lambda x: x.float().sum(),
        ONES,
        ValueError,
        "equality returns torch.float32 on cpu, but x0 is torch.float64 on cpu: convert one",
    ),
    "equality has lost its graph": (
        lambda x: torch.as_tensor(x.detach().numpy() ** 2),
        ONES,
        ValueError,
        "equality depends on x, but its value has no graph (numpy, .item(), .detach() or torch.tensor() inside it?): "
        "compute it with torch operations, or supply jacobian",
    ),
}


@pytest.mark.parametrize("case", INVALID.values(), ids=INVALID)
def test_a_start_or_function_that_does_not_fit_is_refused(case: tuple[Any, Any, type[Exception], str]) -> None:
    equality, x0, kind, message = case
    problem = EqualityProblem(lambda x: tree.dot(x, x), equality)
    with pytest.raises(kind) as caught:
        problem.validate(x0)
    assert message in str(caught.value)


OBJECTIVES: dict[str, tuple[Any, type[Exception], str]] = {
    "a vector": (lambda x: x, ValueError, "objective must return a scalar, got shape (3,)"),
    "a float": (lambda x: 1.0, TypeError, "objective must return a scalar tensor, got float"),
    "float32": (lambda x: x.float().sum(), ValueError, "objective returns torch.float32 on cpu"),
    "no graph": (lambda x: x.detach().sum(), ValueError, "objective depends on x, but its value has no graph"),
}


@pytest.mark.parametrize("case", OBJECTIVES.values(), ids=OBJECTIVES)
def test_an_objective_that_does_not_fit_is_refused(case: tuple[Any, type[Exception], str]) -> None:
    objective, kind, message = case
    with pytest.raises(kind) as caught:
        EqualityProblem(objective, total).validate(ONES)
    assert message in str(caught.value)


def test_constants_need_no_graph_and_supplied_derivatives_excuse_one() -> None:
    """A constant objective states a feasibility problem; numpy code is fine where its derivative is given."""
    EqualityProblem(lambda x: torch.zeros(()), total).validate(ONES)
    ConstrainedProblem(objective=square, inequality=lambda x: torch.zeros(2) - 1).validate(ONES)
    outside = lambda x: torch.as_tensor(float(x.detach().numpy().sum()))  # noqa: E731
    EqualityProblem(outside, outside, gradient=torch.ones_like, jacobian=lambda x: torch.ones(1, 3)).validate(ONES)
    with pytest.raises(ValueError, match="supply gradient"):
        EqualityProblem(outside, total).validate(ONES)
    with pytest.raises(ValueError, match="supply inequality_jacobian"):
        ConstrainedProblem(objective=square, inequality=outside).validate(ONES)


def test_values_may_be_nan_at_the_start() -> None:
    """A method may leave such a point; the declaration is not wrong."""
    problem = EqualityProblem(lambda x: torch.log(x).sum(), lambda x: torch.sqrt(x))
    problem.validate(-ONES)


BOUNDS: dict[str, tuple[dict[str, Any], str]] = {
    "crossed numbers": ({"lower": 2.0, "upper": 1.0}, "lower['a'] is above upper['a'] in 2 entries"),
    "crossed entry": (
        {"lower": {"b": 0.0, "a": vector(0.0, 3.0)}, "upper": 1.0},
        "lower['a'] is above upper['a'] in 1 entries: no point satisfies both; exchange them or loosen one",
    ),
    "shape": (
        {"upper": {"a": vector(1, 1, 1), "b": None}},
        "upper of shape (3,) does not broadcast to x0['a'] of shape (2,)",
    ),
    "structure": ({"lower": {"a": 0.0}}, "lower has the entries ['a'], which do not match those of x0"),
    "list": ({"upper": [1.0, 2.0]}, "for the entries of one tensor give torch.tensor([...])"),
    "dtype": (
        {"lower": torch.zeros((), dtype=torch.float32)},
        "lower is torch.float32 on cpu, but x0['a'] is torch.float64 on cpu",
    ),
}


@pytest.mark.parametrize("case", BOUNDS.values(), ids=BOUNDS)
def test_bounds_that_do_not_fit_or_cross_are_refused(case: tuple[dict[str, Any], str]) -> None:
    bounds, message = case
    problem = ConstrainedProblem(objective=lambda x: tree.dot(x, x), **bounds)
    with pytest.raises((ValueError, TypeError)) as caught:
        problem.validate({"a": torch.zeros(2), "b": torch.zeros(2, 1)})
    assert message in str(caught.value)


def test_bounds_are_spread_over_the_ravelled_point_by_key() -> None:
    x0 = {"a": torch.zeros(2), "b": [torch.zeros(2, 2), torch.zeros(())]}
    lower = {"b": [torch.tensor([1.0, 2.0]), None], "a": torch.tensor([-1.0, -math.inf])}
    problem = ConstrainedProblem(objective=lambda x: tree.dot(x, x), lower=lower, upper=5)
    lagrangian = Lagrangian(problem, x0)
    assert lagrangian.lower.tolist() == [-1.0, -math.inf, 1.0, 2.0, 1.0, 2.0, -math.inf]
    assert lagrangian.upper.tolist() == [5.0] * 7
    assert lagrangian.bounded
    free = ConstrainedProblem(objective=lambda x: tree.dot(x, x), lower=-math.inf, upper={"a": None, "b": [None, None]})
    assert not Lagrangian(free, x0).bounded
    fixed = ConstrainedProblem(objective=lambda x: tree.dot(x, x), lower=1.0, upper=1.0)
    fixed.validate(x0)


WRONG_DERIVATIVES: dict[str, tuple[dict[str, Any], Any, str]] = {
    "jacobian transposed": (
        {"jacobian": lambda x: torch.ones(3, 1)},
        lambda point: point.jacobian,
        "returns shape (3, 1), expected (1, 3): rows over constraints, columns over x",
    ),
    "jacobian is a list": ({"jacobian": lambda x: [1.0, 1.0, 1.0]}, lambda point: point.jacobian, "returns shape None"),
    "jacobian is numpy": (
        {"jacobian": lambda x: torch.ones(1, 3).numpy()},
        lambda point: point.jacobian,
        "give a tensor, a scipy sparse matrix or an operator",
    ),
    "jacobian in float32": (
        {"jacobian": lambda x: torch.ones(1, 3, dtype=torch.float32)},
        lambda point: point.jacobian,
        "is torch.float32 on cpu, x is torch.float64 on cpu",
    ),
    "hessian": (
        {"hessian": lambda x, v: torch.ones(1, 3)},
        lambda point: point.hessian(torch.ones(1)),
        "hessian returns shape (1, 3), expected (3, 3)",
    ),
    "gradient too long": (
        {"gradient": lambda x: torch.ones(4)},
        lambda point: point.gradient,
        "gradient returns tensor (4,) torch.float64, but x is tensor (3,) torch.float64",
    ),
    "gradient a column": ({"gradient": lambda x: x[:, None]}, lambda point: point.gradient, "gradient returns"),
    "gradient in float32": ({"gradient": lambda x: x.float()}, lambda point: point.gradient, "gradient returns"),
    "gradient of other keys": ({"gradient": lambda x: {"a": x}}, lambda point: point.gradient, "gradient returns"),
    "gradient a number": ({"gradient": lambda x: 1.0}, lambda point: point.gradient, "gradient returns value 1.0"),
    "hessian operator": (
        {"hessian": lambda x, v: implicit.Dense(torch.eye(3), symmetric=False)},
        lambda point: point.hessian(torch.ones(1)),
        "hessian returns Dense that is not declared symmetric: declare it so",
    ),
}


@pytest.mark.parametrize("case", WRONG_DERIVATIVES.values(), ids=WRONG_DERIVATIVES)
def test_supplied_derivatives_of_the_wrong_kind_are_named(case: tuple[dict[str, Any], Any, str]) -> None:
    supplied, use, message = case
    problem = EqualityProblem(square, total, **supplied)
    with pytest.raises((ValueError, TypeError)) as caught:
        use(Lagrangian(problem, ONES).at(ONES))
    assert message in str(caught.value)


def test_supplied_first_derivatives_of_functions_without_a_graph_need_a_hessian() -> None:
    outside = lambda x: torch.as_tensor(float(x.detach().numpy().sum()))  # noqa: E731
    for fields in (
        {"objective": outside, "equality": total, "gradient": torch.ones_like},
        {"objective": square, "equality": outside, "jacobian": lambda x: torch.ones(1, 3)},
    ):
        point = Lagrangian(EqualityProblem(**fields), ONES).at(ONES)
        with pytest.raises(ValueError, match="supplied for values without a graph: supply hessian too"):
            point.hessian(torch.ones(1))
    full = EqualityProblem(square, outside, jacobian=lambda x: torch.ones(1, 3), hessian=lambda x, v: 2 * torch.eye(3))
    assert torch.equal(Lagrangian(full, ONES).at(ONES).hessian(torch.ones(1)).to_dense(), 2 * torch.eye(3))


def test_a_sparse_derivative_is_accepted_of_every_kind() -> None:
    dense = torch.tensor([[1.0, 0.0, 2.0]])
    kinds = (
        dense,
        dense.to_sparse(),
        Sparse(dense.to_sparse()).matrix,  # CSR, without torch's warning
        scipy.sparse.csr_array(dense.numpy()),
        scipy.sparse.coo_matrix(dense.numpy().astype("float32")),
        scipy.sparse.csc_array(dense.numpy().astype(int)),
    )
    for kind in kinds:
        problem = EqualityProblem(square, lambda x: x[:1] + 2 * x[2:], jacobian=lambda x, kind=kind: kind)
        operator = Lagrangian(problem, ONES).at(ONES).jacobian
        assert operator.dtype == torch.float64
        assert torch.equal(operator.to_dense(), dense)
        assert torch.equal(operator.T @ torch.ones(1), dense[0])
        assert (operator.to_sparse() is None) == (kind is dense)


def test_a_problem_without_its_parts_cannot_be_made() -> None:
    with pytest.raises(TypeError, match="abstract"):
        constrained.Problem()  # type: ignore[abstract]


def test_problems_are_frozen_and_say_what_they_have() -> None:
    problem = EqualityProblem(square, total, name="circle")
    assert (problem.inequality, problem.lower, problem.upper, problem.inequality_jacobian) == (None,) * 4
    assert problem.name == "circle"
    assert not problem.has_hessian
    assert constrained.ConstrainedProblem(objective=square, hessian=lambda x, h, c: None).has_hessian
    with pytest.raises(AttributeError):
        problem.name = "other"  # type: ignore[misc]
