"""Problems of the Bilevel Optimization LIBrary (BOLIB), small and dense, with optimistic solutions.

    min F(x, y)  subject to  G(x, y) <= 0  and  y in argmin_z { f(x, z) : g(x, z) <= 0 }

Formulas are those of BOLIB version 2, with two rewritings. Every row reads ``c <= 0``, where the library prints
``-(...) <= 0``; and rows of G that bound an entry of x by a constant, and rows of g that bound an entry of y, become
the boxes ``upper_set`` and ``lower_set``, which more algorithms handle than general rows. Nothing else is rewritten: a
lower row without y stays in the lower level, and an upper row that bounds y stays in the upper level.

BOLIB publishes best known values, from several sources and rounded. Here ``upper_star`` is the value at
``(x_star, y_star)``, with the point brought to full accuracy where the library rounds it. Where a bilevel feasible
point with a smaller value was found, by solving the lower level globally on a grid of x, that point and its value
replace the published ones, and a comment beside the problem says so. All of these values are best known ones: nothing
below a grid's width is proved.

The library fixes no starting points: every problem starts from ``x = y = 1``, projected onto its boxes.

References:
    S. Zhou, A. B. Zemkoho, A. Tin, "BOLIB: Bilevel Optimization LIBrary of test problems", in Bilevel Optimization:
        Advances and Next Challenges, Springer, 2020. The names tell the original sources of the problems.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bilevel import BilevelProblem
from constrained import Box, ConvexSet, WholeSpace
from problems.case import Case, OracleCounter
from problems.registry import register

INF = math.inf
SQRT_HALF = math.sqrt(0.5)

Scalar = Callable[[Tensor, Tensor], Tensor]
Rows = Callable[[Tensor, Tensor], Sequence[Tensor]]
Bound = float | Sequence[float] | None
Interval = tuple[Bound, Bound]

_FREE: Interval = (None, None)


def declare(
    name: str,
    lower_class: str,
    *,
    upper: Scalar,
    lower: Scalar,
    upper_rows: Rows | None = None,
    lower_rows: Rows | None = None,
    x_box: Interval = _FREE,
    y_box: Interval = _FREE,
    x_star: Sequence[float],
    y_star: Sequence[float],
    upper_star: float,
) -> None:
    """Register one problem as ``bolib-<name>``; its functions take the vectors x, ``(n,)``, and y, ``(m,)``.

    Args:
        name: as in the library.
        lower_class: ``"strongly convex"``, ``"convex"`` or ``"nonconvex"``: the lower level in y, by sampling.
        upper, lower: F and f.
        upper_rows, lower_rows: lists of G(x, y) <= 0 and of g(x, y) <= 0.
        x_box, y_box: (lower, upper) bounds, each a number for all entries or one for each; None for none.
        x_star, y_star: the best known point.
        upper_star: its value F.
    """
    n, m = len(x_star), len(y_star)
    has = {
        "upper-set": x_box != _FREE,
        "lower-set": y_box != _FREE,
        "upper-inequality": upper_rows is not None,
        "lower-inequality": lower_rows is not None,
    }
    tags = ["bolib", f"{lower_class.replace(' ', '-')}-lower", *(tag for tag, there in has.items() if there)]

    def factory(*, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Case:
        """A problem of BOLIB; its name and :func:`declare` say which."""

        def vector(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        def box(bounds: Interval) -> ConvexSet:
            if bounds == _FREE:
                return WholeSpace()
            low, high = (b if b is None or isinstance(b, (int, float)) else vector(b) for b in bounds)
            return Box(low, high)

        counter = OracleCounter()
        problem = BilevelProblem(
            counter.watch("upper", upper),
            counter.watch("lower", lower),
            upper_set=box(x_box),
            lower_set=box(y_box),
            upper_inequality=_stacked(upper_rows),
            lower_inequality=_stacked(lower_rows),
            name=f"bolib-{name}",
        )
        return Case(
            name=f"bolib-{name}",
            problem=problem,
            start=(problem.upper_set.project(vector([1.0] * n)), problem.lower_set.project(vector([1.0] * m))),
            source=f"BOLIB version 2, {name}",
            lower_class=lower_class,
            x_star=vector(x_star),
            y_star=vector(y_star),
            upper_star=upper_star,
            counter=counter,
        )

    register(f"bolib-{name}", f"{n} + {m} variables, {lower_class} lower level", *tags)(factory)


def _stacked(rows: Rows | None) -> Any:
    if rows is None:
        return None

    def values(x: Tensor, y: Tensor) -> Tensor:
        return torch.stack(tuple(rows(x, y)))

    return values
