"""Logistic regression on the unit sphere with random linear constraints, on LIBSVM data."""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from constrained import EqualityProblem, Multipliers
from problems.constrained_case import ConstrainedCase
from problems.datasets import load
from problems.registry import register

LINEAR = 10
"""Number of random linear constraints."""

F_STAR = {"a9a": 0.42532650531974, "w8a": 0.37353393262771, "mushroom": 0.34656165546047}
"""Values for seed 0, by SLSQP and then Newton's method on the optimality conditions to a residual of 1e-13: accurate to
1e-12. There the multiplier of the sphere is positive, which makes the Lagrangian convex and these global minima."""


@register(
    "constrained_logistic",
    "logistic regression on the sphere with ten linear constraints",
    "constrained",
    "equality",
    "real-data",
    "external-data",
)
def constrained_logistic(
    *,
    dataset: str = "a9a",
    data_dir: str | None = None,
    seed: int = 0,
    supply_hessian: bool = True,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> ConstrainedCase:
    """``min mean log(1 + exp(-y_i d_i'x)) s.t. ||x||^2 = 1, Ax = b``, from x0 = 1 and multipliers 1.

    The rows d_i are those of the data set as they are, without an intercept; y_i is 1 for its larger label and -1 for
    the smaller. A has ten standard normal rows; b = Au for a u that is uniform on the sphere, so that u is feasible.
    The first constraint is the sphere.

    Args:
        dataset: a binary set of ``problems.datasets``, such as a9a, w8a, mushroom.
        data_dir: where its files are.
        seed: of A and u. The reference value is known for seed 0 and the three sets named.
        supply_hessian: whether the closed-form Hessian of the Lagrangian is supplied, the product of a dense (n, d)
            matrix with itself; otherwise it comes from automatic differentiation.
        dtype: of the data and the variables.
        device: of the data and the variables.

    Raises:
        ValueError: for a set without exactly two classes, or with ten features or fewer.
    """
    data = load(dataset, data_dir=data_dir)
    if data.n_classes != 2 or data.n_features <= LINEAR:
        raise ValueError(
            f"dataset={data.name!r} has {data.n_classes} classes and {data.n_features} features; a binary set with "
            f"more than {LINEAR} features is needed, such as a9a"
        )
    rng = np.random.default_rng(seed)
    normal = torch.from_numpy(rng.standard_normal((LINEAR, data.n_features)))
    inside = torch.from_numpy(rng.standard_normal(data.n_features))
    right = normal @ (inside / inside.norm())
    place = {"device": device, "dtype": dtype}
    rows, signs = data.features.to(**place), (2.0 * data.targets - 1).to(**place)
    a, b = normal.to(**place), right.to(**place)

    def objective(x: Tensor) -> Tensor:
        return softplus(-signs * (rows @ x)).mean()

    def equality(x: Tensor) -> Tensor:
        return torch.cat([(x @ x - 1)[None], a @ x - b])

    def hessian(x: Tensor, multiplier: Tensor) -> Tensor:
        p = torch.sigmoid(rows @ x)
        weighted = rows.T @ (rows * (p * (1 - p) / len(rows))[:, None])
        return weighted + 2 * multiplier[0] * torch.eye(len(x), **place)

    x0 = torch.ones(data.n_features, **place)
    return ConstrainedCase(
        name="constrained_logistic",
        problem=EqualityProblem(
            objective, equality, hessian=hessian if supply_hessian else None, name=f"constrained_logistic {data.name}"
        ),
        start=x0,
        source=f"I. Hong, S. Na, M. W. Mahoney, M. Kolar, ICML 2023; data: {data.source}",
        f_star=F_STAR.get(data.name) if seed == 0 else None,
        multipliers_start=Multipliers(torch.ones(LINEAR + 1, **place)),
        note="b is drawn so that the constraints have a common point; the published b is not recorded",
    )
