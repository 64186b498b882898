"""Further equality-constrained problems and square systems of nonlinear equations from CUTEst."""

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from constrained import EqualityProblem
from problems.constrained_case import ConstrainedCase, declare
from problems.registry import register

CUTEST = "N. I. M. Gould, D. Orban, Ph. L. Toint, CUTEst, Comput. Optim. Appl. 60, 2015"
SQRT2 = math.sqrt(2)
define = functools.partial(declare, source=CUTEST, f_star=0.0)

declare(
    "BYRDSPHR",
    lambda a, b, c: -a - b - c,
    lambda a, b, c: [a**2 + b**2 + c**2 - 9, (a - 1) ** 2 + b**2 + c**2 - 9],
    start=(5, 0.0001, -0.0001),
    f_star=-0.5 - math.sqrt(17.5),
    x_star=(0.5, math.sqrt(35 / 8), math.sqrt(35 / 8)),
    equality_star=(0.5 * (1 - 1 / math.sqrt(17.5)) + 1 / math.sqrt(17.5), -0.5 * (1 - 1 / math.sqrt(17.5))),
    source=CUTEST,
    tags="exact cutest",
)
declare(
    "MARATOS",
    lambda a, b: -a + 1e-6 * (a**2 + b**2 - 1),
    lambda a, b: [a**2 + b**2 - 1],
    start=(1.1, 0.1),
    f_star=-1.0,
    x_star=(1, 0),
    equality_star=(0.5 - 1e-6,),
    source=CUTEST,
    tags="exact cutest",
    note="full Newton steps raise both the objective and the infeasibility near the solution",
)
declare(
    "MWRIGHT",
    lambda a, b, c, d, e: a**2 + (a - b) ** 2 + (b - c) ** 3 + (c - d) ** 4 + (d - e) ** 4,
    lambda a, b, c, d, e: [a + b**2 + c**2 - 2 - 3 * SQRT2, b - c**2 + d + 2 - 2 * SQRT2, a * e - 2],
    start=(-1, 2, 1, -2, -2),
    f_star=24.978809531752983,
    other_minima=(1.2883829005217413, 41.44648838),
    source="S. J. Wright, as in CUTEst",
    tags="cutest",
)
define("HIMMELBA", None, lambda a, b: [4 * a - 20, b - 6], start=(8, 9), x_star=(5, 6), tags="exact cutest")
define(
    "HIMMELBC",
    None,
    lambda a, b: [a**2 + b - 11, a + b**2 - 7],
    start=(1, 1),
    tags="cutest",
    note="four solutions, one of which is (3, 2)",
)
define(
    "HIMMELBE",
    None,
    lambda a, b, c: [0.25 * (a + b) ** 2 - c, 1 - a, 1 - b],
    start=(-1.2, 2, 0),
    x_star=(1, 1, 1),
    tags="exact cutest",
)
define("BOOTH", None, lambda a, b: [a + 2 * b - 7, 2 * a + b - 5], start=(0, 0), x_star=(1, 3), tags="exact cutest")
define(
    "SINVALNE",
    None,
    lambda a, b: [10 * (b - torch.sin(a)), 0.5 * a],
    start=(1.5 * math.pi, -1),
    x_star=(0, 0),
    tags="exact cutest",
    note="published with the start (4.712389, -1)",
)
define(
    "WAYSEA1NE",
    None,
    lambda a, b: [a**6 + b**4 - 17, 2 * a + b - 4],
    start=(1, 5),
    tags="cutest",
    note="a second solution beside (1, 2)",
)
define(
    "WAYSEA2NE",
    None,
    lambda a, b: [-9.340125 + 2.5 * a + 13 * b - 4 * a**2 - 4 * b**2, b - 1],
    start=(1, 5),
    tags="cutest",
    note="two solutions, (0.2, 1) nearly one of them",
)
define("RSNBRNE", None, lambda a, b: [10 * (b - a**2), a - 1], start=(-1.2, 1), x_star=(1, 1), tags="exact cutest")
define("CUBENE", None, lambda a, b: [a - 1, 10 * (b - a**3)], start=(-1.2, 1), x_star=(1, 1), tags="exact cutest")
define(
    "ZANGWIL3",
    None,
    lambda a, b, c: [a - b + c, -a + b + c, a + b - c],
    start=(100, -1, 2.5),
    x_star=(0, 0, 0),
    tags="exact cutest",
)
define(
    "HELIXNE",
    None,
    lambda a, b, c: [10 * (c - 5 / math.pi * torch.atan2(b, a)), 10 * (torch.sqrt(a**2 + b**2) - 1), c],
    start=(-1, 0, 0),
    x_star=(1, 0, 0),
    tags="exact cutest",
    note="the angle jumps at the start; CUTEst has 0.15915494 for 1/(2 pi)",
)
define(
    "GOTTFR",
    None,
    lambda a, b: [a - 0.1136 * (a + 3 * b) * (1 - a), b + 7.5 * (2 * a - b) * (1 - b)],
    start=(0.5, 0.5),
    tags="cutest",
)
define(
    "DENSCHNCNE",
    None,
    lambda a, b: [a**2 + b**2 - 2, torch.exp(a - 1) + b**3 - 2],
    start=(2, 3),
    tags="cutest",
    note="a second solution beside (1, 1)",
)
define(
    "DENSCHNFNE",
    None,
    lambda a, b: [2 * (a + b) ** 2 + (a - b) ** 2 - 8, 5 * a**2 + (b - 3) ** 2 - 9],
    start=(2, 0),
    tags="cutest",
    note="a second solution beside (1, 1)",
)
define(
    "PRICE4NE",
    None,
    lambda a, b: [2 * a**3 * b - b**3, 6 * a - b**2 + b],
    start=(1, 5),
    tags="degenerate cutest",
    note="at the solution (0, 0) the Jacobian is singular; (1.464, -2.506) and (2, 4) are regular",
)


def _vector_case(
    name: str,
    equality: Callable[[Tensor], Tensor],
    start: Callable[[torch.dtype], Tensor],
    *tags: str,
    objective: Callable[[Tensor], Tensor] | None = None,
    f_star: float = 0.0,
    x_star: Sequence[float] | None = None,
    note: str = "",
) -> None:
    kind = "a square system" if objective is None else "equality"
    every = ("constrained", "equality", "cutest", *(("square",) if objective is None else ()), *tags)

    def factory(*, dtype: torch.dtype = torch.float64, device: str = "cpu") -> ConstrainedCase:
        x0 = start(dtype).to(device)
        value = objective if objective is not None else lambda x: x.new_zeros(())
        return ConstrainedCase(
            name=name.lower(),
            problem=EqualityProblem(value, equality, name=name),
            start=x0,
            source=CUTEST,
            f_star=f_star,
            x_star=None if x_star is None else torch.tensor(x_star, dtype=dtype, device=device),
            note=note,
        )

    n = len(start(torch.float64))
    register(name.lower(), f"{name}: {n} variables, {kind}", *every)(factory)


def _genhs28(x: Tensor) -> Tensor:
    return x[:-2] + 2 * x[1:-1] + 3 * x[2:] - 1


def _trigon1(x: Tensor) -> Tensor:
    i = torch.arange(1, len(x) + 1, dtype=x.dtype, device=x.device)
    return torch.cos(x).sum() + i * (torch.cos(x) + torch.sin(x)) - (len(x) + i)


def _grid(n: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """n interior points of [0, 1]."""
    return torch.arange(1, n + 1, dtype=dtype, device=device) / (n + 1)


def _boundary_value(x: Tensor) -> Tensor:
    """``u'' = (u + t + 1)^3 / 2``, u(0) = u(1) = 0, by second differences."""
    t, inner = _grid(len(x), x.dtype, x.device), torch.nn.functional.pad(x, (1, 1))
    return 2 * x - inner[:-2] - inner[2:] + 0.5 / (len(x) + 1) ** 2 * (x + t + 1) ** 3


def _integral_equation(x: Tensor) -> Tensor:
    """The same equation through its Green's function; the first and last entries are the boundary values."""
    h = 1 / (len(x) - 1)
    t = torch.arange(len(x), dtype=x.dtype, device=x.device) * h
    cube = (x + t + 1) ** 3
    kernel = torch.minimum(t[:, None], t) * (1 - torch.maximum(t[:, None], t))
    return x + 0.5 * h * (kernel[:, 1:-1] @ cube[1:-1])


def _parabola(dtype: torch.dtype, boundary: bool) -> Tensor:
    t = _grid(10, dtype)
    inner = t * (t - 1)
    return torch.nn.functional.pad(inner, (1, 1)) if boundary else inner


def _mancino_sum(size: Tensor) -> Tensor:
    """Row sums without the diagonal of ``v (sin(log v)^5 + cos(log v)^5)``, v = sqrt(size)."""
    v = torch.sqrt(size)
    terms = v * (torch.sin(torch.log(v)) ** 5 + torch.cos(torch.log(v)) ** 5)
    return terms.sum(dim=1) - terms.diagonal()


def _mancino_parts(n: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    i = torch.arange(1, n + 1, dtype=dtype, device=device)
    return i[:, None] / i, (i - n / 2) ** 3


def _mancino(x: Tensor) -> Tensor:
    ratio, cube = _mancino_parts(len(x), x.dtype, x.device)
    return 14 * len(x) * x + _mancino_sum(x**2 + ratio) - cube


def _mancino_start(dtype: torch.dtype, n: int = 10, alpha: int = 5, beta: int = 14) -> Tensor:
    ratio, cube = _mancino_parts(n, dtype)
    scale = beta * n / ((beta * n) ** 2 - (alpha + 1) ** 2 * (n - 1) ** 2)
    return -scale * (_mancino_sum(ratio) + cube)


def _ellipsoid(x: Tensor) -> Tensor:
    """Six points on a quadric in space: ``p' A p - 2 b' p = 1`` with A from x[:6], b from x[6:9]."""
    p = x[9:].reshape(6, 3)
    rows = x[torch.tensor([[0, 1, 2], [1, 3, 4], [2, 4, 5]], device=x.device)]
    return ((p @ rows) * p).sum(dim=1) - 2 * p @ x[6:9] - 1


_POINTS = (
    (9.5, 9.5, 0.5),
    (6.5, -5.5, 0.5),
    (-8.5, -8.5, 0.5),
    (-5.5, 6.5, 0.5),
    (0.5, 0.5, 7.5),
    (0.5, 0.5, -6.5),
)


def _fit(x: Tensor) -> Tensor:
    return ((x[9:] - torch.tensor(_POINTS, dtype=x.dtype, device=x.device).reshape(-1)) ** 2).sum()


def _fit_start(dtype: torch.dtype) -> Tensor:
    form = torch.tensor([1, 0, 0, 1, 0, 1, 0, 0, 0], dtype=dtype)
    return torch.cat([form, torch.tensor(_POINTS, dtype=dtype).reshape(-1)])


_vector_case(
    "GENHS28",
    _genhs28,
    lambda dtype: torch.tensor([-4.0, *9 * (1.0,)], dtype=dtype),
    objective=lambda x: ((x[:-1] + x[1:]) ** 2).sum(),
    f_star=0.9271736937663909,
)
_vector_case(
    "ORTHREGB",
    _ellipsoid,
    _fit_start,
    "degenerate",
    objective=_fit,
    note="a quadric passes through all six points, and not one alone, so that f is zero on a continuum",
)
_vector_case("TRIGON1NE", _trigon1, lambda dtype: torch.full((10,), 0.1, dtype=dtype), x_star=10 * (0.0,))
_vector_case("MOREBVNE", _boundary_value, lambda dtype: _parabola(dtype, boundary=False))
_vector_case("INTEQNE", _integral_equation, lambda dtype: _parabola(dtype, boundary=True))
_vector_case("MANCINONE", _mancino, _mancino_start)
