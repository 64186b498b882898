"""Stackelberg pricing: a firm sets prices, the market answers with the purchases that solve a quadratic program.

The lower level is declared in cvxpy and becomes a bilevel problem through ``bilevel.from_cvxpy``.
"""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from bilevel import from_cvxpy
from constrained import solve_qp
from implicit import Status
from implicit.tree import Tree
from problems.case import Case, OracleCounter
from problems.registry import register

WORTH = (10.0, 9.0, 8.0, 8.0, 5.0)
"""What the first unit of each product is worth to the market; the first three are the firm's, the others a rival's."""
RIVAL_PRICES = (4.0, 4.5)
COSTS = (2.0, 1.5, 1.0)
"""Of the firm, for a unit of its products."""
SUBSTITUTION = 0.6
"""By how much a unit of one product lowers the worth of the next unit of another; of the same one, by 2."""
CAPACITY = 3.0
"""How many units the market can take in all."""
HIGHEST_PRICE = 10.0


def _curvature() -> np.ndarray:
    size = len(WORTH)
    return SUBSTITUTION * np.ones((size, size)) + (2 - SUBSTITUTION) * np.eye(size)


@register(
    "stackelberg_pricing",
    "prices for a market that solves a quadratic program, declared in cvxpy",
    "exact",
    "constraints",
    "upper-set",
    "lower-set",
    "cvxpy",
)
def stackelberg_pricing(*, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Case:
    """f = -sum_j (p_j - cost_j) q_j over the firm's three prices p in [0, 10]; the market buys q = argmin of

        q'Hq/2 - (worth - prices)'q    subject to    q >= 0,   sum q <= 3,

    where prices are p and the rival's two. x = {price (3,)}, y = {quantity (5,)}. At the answer the market is full, and
    the rival's second product is not bought.

    The exact answer is the best over all sets of active rows of the market's program: on each, q is affine in p, and
    the profit is a concave quadratic, maximized over the prices for which the set is the right one.
    """
    import cvxpy as cp

    quantity = cp.Variable(len(WORTH), name="quantity")
    price = cp.Parameter(len(COSTS), name="price", bounds=[0.0, HIGHEST_PRICE], value=np.full(len(COSTS), 5.0))
    paid = price @ quantity[: len(COSTS)] + np.array(RIVAL_PRICES) @ quantity[len(COSTS) :]
    benefit = np.array(WORTH) @ quantity - cp.quad_form(quantity, cp.psd_wrap(_curvature())) / 2
    rows: list[Any] = [quantity >= 0, cp.sum(quantity) <= CAPACITY]
    market = cp.Problem(cp.Minimize(paid - benefit), rows)
    costs = torch.tensor(COSTS, dtype=dtype, device=device)
    counter = OracleCounter()

    def upper(x: Tree, y: Tree) -> torch.Tensor:
        return -(x["price"] - costs) @ y["quantity"][: len(COSTS)]

    problem = from_cvxpy(
        market,
        parameters={"price": price},
        upper=counter.watch("upper", upper),
        name="stackelberg_pricing",
        dtype=dtype,
        device=device,
    )
    prices, bought = _best_prices()
    x_star = {"price": torch.tensor(prices, dtype=dtype, device=device)}
    y_star = {"quantity": torch.tensor(bought, dtype=dtype, device=device)}
    upper_star = float(upper(x_star, y_star))
    counter.upper = 0
    return Case(
        name="stackelberg_pricing",
        problem=replace(problem, lower=counter.watch("lower", problem.lower)),
        start=problem.start,
        source="closed form on each piece of the market's answer; the best of all pieces",
        x_star=x_star,
        y_star=y_star,
        upper_star=upper_star,
        lower_class="strongly convex",
        counter=counter,
    )


def _best_prices() -> tuple[np.ndarray, np.ndarray]:
    """The firm's best prices and what the market buys at them."""
    own, size = len(COSTS), len(WORTH)
    H, costs = _curvature(), np.array(COSTS)
    rows = np.vstack([-np.eye(size), np.ones((1, size))])  # rows q <= limits
    limits = np.concatenate([np.zeros(size), [CAPACITY]])
    # H q + rows' m = slope p + shift, and m or the slack of the rows vanishes.
    slope = np.vstack([-np.eye(own), np.zeros((size - own, own))])
    shift = np.array(WORTH) - np.concatenate([np.zeros(own), RIVAL_PRICES])
    programs, answers = [], []
    for active in itertools.product((False, True), repeat=len(rows)):
        on = np.array(active)
        if on.all():  # nothing bought and no room left
            continue
        A = rows[on]
        system = np.block([[H, A.T], [A, np.zeros((len(A), len(A)))]])
        solved = np.linalg.solve(
            system,
            np.hstack([np.vstack([slope, np.zeros((len(A), own))]), np.concatenate([shift, limits[on]])[:, None]]),
        )
        Q, q = solved[:size, :-1], solved[:size, -1]  # quantities Q p + q
        M, m = np.zeros((len(rows), own)), np.zeros(len(rows))
        M[on], m[on] = solved[size:, :-1], solved[size:, -1]
        # -profit = -(p - costs)'(Q p + q) over the firm's products, on the prices with m >= 0 and rows q <= limits.
        curvature = -(Q[:own] + Q[:own].T)
        curvature[np.abs(curvature) < 1e-12] = 0.0  # rounding where nothing of the firm's is bought
        gradient = Q[:own].T @ costs - q[:own]
        programs.append((curvature, gradient, np.vstack([rows @ Q, -M]), np.concatenate([limits - rows @ q, m])))
        answers.append((Q, q))
    data = [torch.from_numpy(np.stack(part)) for part in zip(*programs, strict=True)]
    found = solve_qp(
        data[0], data[1], G=data[2], h=data[3] + 1e-12, lower=0.0, upper=HIGHEST_PRICE, raise_on_failure=False
    )
    statuses: Any = found.status
    feasible = torch.tensor([status is Status.CONVERGED for status in statuses])
    constants = torch.tensor([float(costs @ q[:own]) for _, q in answers])
    best = int((found.objective + constants).where(feasible, torch.inf).argmin())
    prices = found.x[best].numpy()
    Q, q = answers[best]
    return prices, (Q @ prices + q).clip(min=0.0)
