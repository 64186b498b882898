"""The equality-constrained problems of Boggs and Tolle (1989), as CUTEst has them."""

import functools
import math

import torch

from problems.constrained_case import declare

SQRT2 = math.sqrt(2)
define = functools.partial(
    declare,
    source="P. T. Boggs, J. W. Tolle, SIAM J. Numer. Anal. 26(3), 1989; constants as in CUTEst",
)

define(
    "BT1",
    lambda a, b: 100 * (a**2 + b**2 - 1) - a,
    lambda a, b: [a**2 + b**2 - 1],
    start=(0.08, 0.06),
    f_star=-1.0,
    x_star=(1, 0),
    equality_star=(-99.5,),
    tags="exact boggs-tolle",
)
define(
    "BT2",
    lambda a, b, c: (a - 1) ** 2 + (a - b) ** 2 + (b - c) ** 4,
    lambda a, b, c: [a * (1 + b**2) + c**4 - 8.2426407],
    start=(10, 10, 10),
    f_star=0.03256820039323778,
    tags="boggs-tolle",
)
define(
    "BT3",
    lambda a, b, c, d, e: (a - b) ** 2 + (b + c - 2) ** 2 + (d - 1) ** 2 + (e - 1) ** 2,
    lambda a, b, c, d, e: [a + 3 * b, c + d - 2 * e, b - e],
    start=(20, 20, 20, 20, 20),
    f_star=176 / 43,
    x_star=(-33 / 43, 11 / 43, 27 / 43, -5 / 43, 11 / 43),
    equality_star=(88 / 43, 96 / 43, -256 / 43),
    tags="exact boggs-tolle",
)
define(
    "BT4",
    lambda a, b, c: a - b + b**3,
    lambda a, b, c: [a**2 + b**2 + c**2 - 25, a + b + c - 1],
    start=(4.0382, -2.947, -0.09115),
    f_star=-45.510550739890625,
    other_minima=(-3.704768184,),
    tags="boggs-tolle",
)
define(
    "BT5",
    lambda a, b, c: 1000 - a**2 - 2 * b**2 - c**2 - a * b - a * c,
    lambda a, b, c: [a**2 + b**2 + c**2 - 25, 8 * a + 14 * b + 7 * c - 56],
    start=(2, 2, 2),
    f_star=961.7151721300521,
    other_minima=(952.1424944555412,),
    tags="boggs-tolle",
)
define(
    "BT6",
    lambda a, b, c, d, e: (a - 1) ** 2 + (a - b) ** 2 + (c - 1) ** 2 + (d - 1) ** 4 + (e - 1) ** 6,
    lambda a, b, c, d, e: [a**2 * d + torch.sin(d - e) - 2 * SQRT2, b + b**2 * c**4 - 8 - SQRT2],
    start=(2, 2, 2, 2, 2),
    f_star=0.2770447887679023,
    tags="boggs-tolle",
)
define(
    "BT7",
    lambda a, b, c, d, e: 100 * (b - a**2) ** 2 + (a - 1) ** 2,
    lambda a, b, c, d, e: [a * b - c**2 - 1, b**2 - d**2 + a, e**2 + a - 0.5],
    start=(-2, 1, 1, 1, 1),
    f_star=306.5,
    other_minima=(360.379767174,),
    tags="boggs-tolle",
)
define(
    "BT8",
    lambda a, b, c, d, e: a**2 + b**2 + c**2,
    lambda a, b, c, d, e: [a + b**2 - d**2 - 1, a**2 + b**2 - e**2 - 1],
    start=(1, 1, 1, 0, 0),
    f_star=1.0,
    tags="degenerate boggs-tolle",
)
define(
    "BT9",
    lambda a, b, c, d: -a,
    lambda a, b, c, d: [b - a**3 - c**2, a**2 - b - d**2],
    start=(2, 2, 2, 2),
    f_star=-1.0,
    x_star=(1, 1, 0, 0),
    equality_star=(-1, -1),
    tags="exact boggs-tolle",
    note="the same problem as HS39",
)
define(
    "BT10",
    lambda a, b: -a,
    lambda a, b: [b - a**3, a**2 - b],
    start=(2, 2),
    f_star=-1.0,
    x_star=(1, 1),
    equality_star=(-1, -1),
    tags="exact boggs-tolle",
    note="as many constraints as variables; (0, 0) is feasible too, but the constraint gradients are dependent there",
)
define(
    "BT11",
    lambda a, b, c, d, e: (a - 1) ** 2 + (a - b) ** 2 + (b - c) ** 2 + (c - d) ** 4 + (d - e) ** 4,
    lambda a, b, c, d, e: [a + b**2 + c**3 + 2 - 3 * SQRT2, b - c**2 + d + 2 - 2 * SQRT2, a - e - 2],
    start=(2, 2, 2, 2, 2),
    f_star=0.8248917782876657,
    tags="boggs-tolle",
)
define(
    "BT12",
    lambda a, b, c, d, e: 0.01 * a**2 + b**2,
    lambda a, b, c, d, e: [a + b - c**2 - 25, a**2 + b**2 - d**2 - 25, a - e**2 - 2],
    start=(15.811, 1.5811, 0, 15.083, 3.7164),
    f_star=625 / 101,
    tags="boggs-tolle",
)
