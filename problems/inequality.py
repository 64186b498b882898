"""Problems of Hock and Schittkowski (1981) in two variables with inequalities ``c(x) <= 0`` and bounds."""

import functools
import math

import torch
from torch import Tensor

from problems.constrained_case import declare

INF = math.inf
SQRT3 = math.sqrt(3)
define = functools.partial(
    declare,
    source="W. Hock, K. Schittkowski, Test Examples for Nonlinear Programming Codes, Springer, 1981",
)


def _rosenbrock(a: Tensor, b: Tensor) -> Tensor:
    return 100 * (b - a**2) ** 2 + (1 - a) ** 2


define(
    "HS1",
    _rosenbrock,
    start=(-2, 1),
    lower=(-INF, -1.5),
    f_star=0.0,
    x_star=(1, 1),
    tags="exact hock-schittkowski",
)
define(
    "HS2",
    _rosenbrock,
    start=(-2, 1),
    lower=(-INF, 1.5),
    f_star=0.050426187893607075,
    other_minima=(4.941229318,),
    tags="hock-schittkowski",
)
define(
    "HS3",
    lambda a, b: b + 1e-5 * (b - a) ** 2,
    start=(10, 1),
    lower=(-INF, 0),
    f_star=0.0,
    x_star=(0, 0),
    tags="exact hock-schittkowski",
)
define(
    "HS4",
    lambda a, b: (a + 1) ** 3 / 3 + b,
    start=(1.125, 0.125),
    lower=(1, 0),
    f_star=8 / 3,
    x_star=(1, 0),
    tags="exact hock-schittkowski",
)
define(
    "HS5",
    lambda a, b: torch.sin(a + b) + (a - b) ** 2 - 1.5 * a + 2.5 * b + 1,
    start=(0, 0),
    lower=(-1.5, -3),
    upper=(4, 3),
    f_star=-SQRT3 / 2 - math.pi / 3,
    x_star=(0.5 - math.pi / 3, -0.5 - math.pi / 3),
    tags="exact hock-schittkowski",
)
define(
    "HS10",
    lambda a, b: a - b,
    None,
    lambda a, b: [3 * a**2 - 2 * a * b + b**2 - 1],
    start=(-10, 10),
    f_star=-1.0,
    x_star=(0, 1),
    inequality_star=(0.5,),
    tags="exact hock-schittkowski",
)
define(
    "HS11",
    lambda a, b: (a - 5) ** 2 + b**2 - 25,
    None,
    lambda a, b: [a**2 - b],
    start=(4.9, 0.1),
    f_star=-8.498464223154677,
    tags="hock-schittkowski",
)
define(
    "HS12",
    lambda a, b: 0.5 * a**2 + b**2 - a * b - 7 * a - 7 * b,
    None,
    lambda a, b: [4 * a**2 + b**2 - 25],
    start=(0, 0),
    f_star=-30.0,
    x_star=(2, 3),
    inequality_star=(0.5,),
    tags="exact hock-schittkowski",
)
define(
    "HS13",
    lambda a, b: (a - 2) ** 2 + b**2,
    None,
    lambda a, b: [b - (1 - a) ** 3],
    start=(-2, -2),
    lower=0.0,
    f_star=1.0,
    x_star=(1, 0),
    tags="exact degenerate hock-schittkowski",
    note="no multipliers exist at the solution, a cusp: the constraint qualification fails",
)
define(
    "HS14",
    lambda a, b: (a - 2) ** 2 + (b - 1) ** 2,
    lambda a, b: [a - 2 * b + 1],
    lambda a, b: [0.25 * a**2 + b**2 - 1],
    start=(2, 2),
    f_star=9 - 2.875 * math.sqrt(7),
    x_star=((math.sqrt(7) - 1) / 2, (math.sqrt(7) + 1) / 4),
    tags="exact hock-schittkowski",
)
define(
    "HS15",
    _rosenbrock,
    None,
    lambda a, b: [1 - a * b, -a - b**2],
    start=(-2, 1),
    upper=(0.5, INF),
    f_star=306.5,
    x_star=(0.5, 2),
    other_minima=(360.379767,),
    tags="exact hock-schittkowski",
)
define(
    "HS16",
    _rosenbrock,
    None,
    lambda a, b: [-a - b**2, -(a**2) - b],
    start=(-2, 1),
    lower=(-0.5, -INF),
    upper=(0.5, 1),
    f_star=0.25,
    x_star=(0.5, 0.25),
    other_minima=(23.144660941,),
    tags="exact hock-schittkowski",
)
define(
    "HS18",
    lambda a, b: 0.01 * a**2 + b**2,
    None,
    lambda a, b: [25 - a * b, 25 - a**2 - b**2],
    start=(2, 2),
    lower=(2, 0),
    upper=50.0,
    f_star=5.0,
    x_star=(math.sqrt(250), math.sqrt(2.5)),
    tags="exact hock-schittkowski",
)
define(
    "HS19",
    lambda a, b: (a - 10) ** 3 + (b - 20) ** 3,
    None,
    lambda a, b: [100 - (a - 5) ** 2 - (b - 5) ** 2, (a - 6) ** 2 + (b - 5) ** 2 - 82.81],
    start=(20.1, 5.84),
    lower=(13, 0),
    upper=100.0,
    f_star=-6961.813875580143,
    tags="hock-schittkowski",
)
define(
    "HS21",
    lambda a, b: 0.01 * a**2 + b**2 - 100,
    None,
    lambda a, b: [10 + b - 10 * a],
    start=(-1, -1),
    lower=(2, -50),
    upper=50.0,
    f_star=-99.96,
    x_star=(2, 0),
    inequality_star=(0,),
    tags="exact hock-schittkowski",
)
define(
    "HS22",
    lambda a, b: (a - 2) ** 2 + (b - 1) ** 2,
    None,
    lambda a, b: [a + b - 2, a**2 - b],
    start=(2, 2),
    f_star=1.0,
    x_star=(1, 1),
    inequality_star=(2 / 3, 2 / 3),
    tags="exact hock-schittkowski",
)
define(
    "HS24",
    lambda a, b: ((a - 3) ** 2 - 9) * b**3 / (27 * SQRT3),
    None,
    lambda a, b: [b - a / SQRT3, -a - SQRT3 * b, a + SQRT3 * b - 6],
    start=(1, 0.5),
    lower=0.0,
    f_star=-1.0,
    x_star=(3, SQRT3),
    tags="exact hock-schittkowski",
)
