"""Problems of Hock and Schittkowski (1981) in three and more variables with inequalities and bounds."""

import functools
import math

import torch

from problems.constrained_case import declare

INF = math.inf
SQRT2, SQRT3 = math.sqrt(2), math.sqrt(3)
define = functools.partial(
    declare,
    source="W. Hock, K. Schittkowski, Test Examples for Nonlinear Programming Codes, Springer, 1981",
)

define(
    "HS29",
    lambda a, b, c: -a * b * c,
    None,
    lambda a, b, c: [a**2 + 2 * b**2 + 4 * c**2 - 48],
    start=(1, 1, 1),
    f_star=-16 * SQRT2,
    x_star=(4, 2 * SQRT2, 2),
    inequality_star=(1 / SQRT2,),
    tags="hock-schittkowski",
    note="an even number of signs of x may be changed",
)
define(
    "HS30",
    lambda a, b, c: a**2 + b**2 + c**2,
    None,
    lambda a, b, c: [1 - a**2 - b**2],
    start=(1, 1, 1),
    lower=(1, -10, -10),
    upper=10.0,
    f_star=1.0,
    x_star=(1, 0, 0),
    tags="exact degenerate hock-schittkowski",
    note="the gradients of the constraint and of the active bound are dependent at the solution",
)
define(
    "HS31",
    lambda a, b, c: 9 * a**2 + b**2 + 9 * c**2,
    None,
    lambda a, b, c: [1 - a * b],
    start=(1, 1, 1),
    lower=(-10, 1, -10),
    upper=(10, 10, 1),
    f_star=6.0,
    x_star=(1 / SQRT3, SQRT3, 0),
    inequality_star=(6,),
    tags="exact hock-schittkowski",
)
define(
    "HS32",
    lambda a, b, c: (a + 3 * b + c) ** 2 + 4 * (a - b) ** 2,
    lambda a, b, c: [1 - a - b - c],
    lambda a, b, c: [a**3 - 6 * b - 4 * c + 3],
    start=(0.1, 0.7, 0.2),
    lower=0.0,
    f_star=1.0,
    x_star=(0, 0, 1),
    tags="exact hock-schittkowski",
)
define(
    "HS33",
    lambda a, b, c: (a - 1) * (a - 2) * (a - 3) + c,
    None,
    lambda a, b, c: [a**2 + b**2 - c**2, 4 - a**2 - b**2 - c**2],
    start=(0, 0, 3),
    lower=0.0,
    upper=(INF, INF, 5),
    f_star=SQRT2 - 6,
    x_star=(0, SQRT2, SQRT2),
    other_minima=(-4.0,),
    tags="exact hock-schittkowski",
)
define(
    "HS34",
    lambda a, b, c: -a,
    None,
    lambda a, b, c: [torch.exp(a) - b, torch.exp(b) - c],
    start=(0, 1.05, 2.9),
    lower=0.0,
    upper=(100, 100, 10),
    f_star=-math.log(math.log(10)),
    x_star=(math.log(math.log(10)), math.log(10), 10),
    inequality_star=(1 / math.log(10), 1 / (10 * math.log(10))),
    tags="exact hock-schittkowski",
)
define(
    "HS35",
    lambda a, b, c: 9 - 8 * a - 6 * b - 4 * c + 2 * a**2 + 2 * b**2 + c**2 + 2 * a * b + 2 * a * c,
    None,
    lambda a, b, c: [a + b + 2 * c - 3],
    start=(0.5, 0.5, 0.5),
    lower=0.0,
    f_star=1 / 9,
    x_star=(4 / 3, 7 / 9, 4 / 9),
    inequality_star=(2 / 9,),
    tags="exact hock-schittkowski",
)
define(
    "HS36",
    lambda a, b, c: -a * b * c,
    None,
    lambda a, b, c: [a + 2 * b + 2 * c - 72],
    start=(10, 10, 10),
    lower=0.0,
    upper=(20, 11, 42),
    f_star=-3300.0,
    x_star=(20, 11, 15),
    tags="exact hock-schittkowski",
)
define(
    "HS37",
    lambda a, b, c: -a * b * c,
    None,
    lambda a, b, c: [a + 2 * b + 2 * c - 72, -a - 2 * b - 2 * c],
    start=(10, 10, 10),
    lower=0.0,
    upper=42.0,
    f_star=-3456.0,
    x_star=(24, 12, 12),
    inequality_star=(144, 0),
    tags="exact hock-schittkowski",
)
define(
    "HS41",
    lambda a, b, c, d: 2 - a * b * c,
    lambda a, b, c, d: [a + 2 * b + 2 * c - d],
    start=(2, 2, 2, 2),
    lower=0.0,
    upper=(1, 1, 1, 2),
    f_star=52 / 27,
    x_star=(2 / 3, 1 / 3, 1 / 3, 2),
    tags="exact hock-schittkowski",
)
define(
    "HS43",
    lambda a, b, c, d: a**2 + b**2 + 2 * c**2 + d**2 - 5 * a - 5 * b - 21 * c + 7 * d,
    None,
    lambda a, b, c, d: [
        a**2 + b**2 + c**2 + d**2 + a - b + c - d - 8,
        a**2 + 2 * b**2 + c**2 + 2 * d**2 - a - d - 10,
        2 * a**2 + b**2 + c**2 + 2 * a - b - d - 5,
    ],
    start=(0, 0, 0, 0),
    f_star=-44.0,
    x_star=(0, 1, 2, -1),
    inequality_star=(1, 0, 2),
    tags="exact hock-schittkowski",
)
define(
    "HS53",
    lambda a, b, c, d, e: (a - b) ** 2 + (b + c - 2) ** 2 + (d - 1) ** 2 + (e - 1) ** 2,
    lambda a, b, c, d, e: [a + 3 * b, c + d - 2 * e, b - e],
    start=(2, 2, 2, 2, 2),
    lower=-10.0,
    upper=10.0,
    f_star=176 / 43,
    x_star=(-33 / 43, 11 / 43, 27 / 43, -5 / 43, 11 / 43),
    tags="exact hock-schittkowski",
)
define(
    "HS60",
    lambda a, b, c: (a - 1) ** 2 + (a - b) ** 2 + (b - c) ** 4,
    lambda a, b, c: [a * (1 + b**2) + c**4 - 4 - 3 * SQRT2],
    start=(2, 2, 2),
    lower=-10.0,
    upper=10.0,
    f_star=0.03256820025506984,
    tags="hock-schittkowski",
)
define(
    "HS62",
    lambda a, b, c: (
        -32.174
        * (
            255 * torch.log((a + b + c + 0.03) / (0.09 * a + b + c + 0.03))
            + 280 * torch.log((b + c + 0.03) / (0.07 * b + c + 0.03))
            + 290 * torch.log((c + 0.03) / (0.13 * c + 0.03))
        )
    ),
    lambda a, b, c: [a + b + c - 1],
    start=(0.7, 0.2, 0.1),
    lower=0.0,
    upper=1.0,
    f_star=-26272.514487318258,
    tags="hock-schittkowski",
)
define(
    "HS63",
    lambda a, b, c: 1000 - a**2 - 2 * b**2 - c**2 - a * b - a * c,
    lambda a, b, c: [8 * a + 14 * b + 7 * c - 56, a**2 + b**2 + c**2 - 25],
    start=(2, 2, 2),
    lower=0.0,
    f_star=961.7151721300521,
    tags="hock-schittkowski",
)
define(
    "HS64",
    lambda a, b, c: 5 * a + 50000 / a + 20 * b + 72000 / b + 10 * c + 144000 / c,
    None,
    lambda a, b, c: [4 / a + 32 / b + 120 / c - 1],
    start=(1, 1, 1),
    lower=1e-5,
    f_star=6299.84242792152,
    tags="hock-schittkowski",
)
define(
    "HS65",
    lambda a, b, c: (a - b) ** 2 + (a + b - 10) ** 2 / 9 + (c - 5) ** 2,
    None,
    lambda a, b, c: [a**2 + b**2 + c**2 - 48],
    start=(-5, 5, 0),
    lower=(-4.5, -4.5, -5),
    upper=(4.5, 4.5, 5),
    f_star=0.953528856804783,
    tags="hock-schittkowski",
)
define(
    "HS66",
    lambda a, b, c: 0.2 * c - 0.8 * a,
    None,
    lambda a, b, c: [torch.exp(a) - b, torch.exp(b) - c],
    start=(0, 1.05, 2.9),
    lower=0.0,
    upper=(100, 100, 10),
    f_star=0.518163274181541,
    tags="hock-schittkowski",
)
define(
    "HS71",
    lambda a, b, c, d: a * d * (a + b + c) + c,
    lambda a, b, c, d: [a**2 + b**2 + c**2 + d**2 - 40],
    lambda a, b, c, d: [25 - a * b * c * d],
    start=(1, 5, 5, 1),
    lower=1.0,
    upper=5.0,
    f_star=17.0140172891563,
    tags="hock-schittkowski",
)
define(
    "HS73",
    lambda a, b, c, d: 24.55 * a + 26.75 * b + 39 * c + 40.5 * d,
    lambda a, b, c, d: [a + b + c + d - 1],
    lambda a, b, c, d: [
        5 - 2.3 * a - 5.6 * b - 11.1 * c - 1.3 * d,
        21
        + 1.645 * torch.sqrt(0.28 * a**2 + 0.19 * b**2 + 20.5 * c**2 + 0.62 * d**2)
        - 12 * a
        - 11.9 * b
        - 41.8 * c
        - 52.1 * d,
    ],
    start=(1, 1, 1, 1),
    lower=0.0,
    f_star=29.894378159143358,
    tags="hock-schittkowski",
)
define(
    "HS76",
    lambda a, b, c, d: a**2 + 0.5 * b**2 + c**2 + 0.5 * d**2 - a * c + c * d - a - 3 * b + c - d,
    None,
    lambda a, b, c, d: [a + 2 * b + c + d - 5, 3 * a + b + 2 * c - d - 4, 1.5 - b - 4 * c],
    start=(0.5, 0.5, 0.5, 0.5),
    lower=0.0,
    f_star=-103 / 22,
    x_star=(3 / 11, 23 / 11, 0, 6 / 11),
    inequality_star=(5 / 11, 0, 0),
    tags="exact hock-schittkowski",
)
define(
    "HS80",
    lambda a, b, c, d, e: torch.exp(a * b * c * d * e),
    lambda a, b, c, d, e: [
        a**2 + b**2 + c**2 + d**2 + e**2 - 10,
        b * c - 5 * d * e,
        a**3 + b**3 + 1,
    ],
    start=(-2, 2, 2, -1, -1),
    lower=(-2.3, -2.3, -3.2, -3.2, -3.2),
    upper=(2.3, 2.3, 3.2, 3.2, 3.2),
    f_star=0.05394984777027205,
    other_minima=(0.43885121994281245,),
    tags="hock-schittkowski",
)
define(
    "HS93",
    lambda a, b, c, d, e, f: (
        (0.0204 + 0.0607 * e**2) * a * d * (a + b + c) + (0.0187 + 0.0437 * f**2) * b * c * (a + 1.57 * b + d)
    ),
    None,
    lambda a, b, c, d, e, f: [
        0.00062 * a * d * e**2 * (a + b + c) + 0.00058 * b * c * f**2 * (a + 1.57 * b + d) - 1,
        2.07 - 0.001 * a * b * c * d * e * f,
    ],
    start=(5.54, 4.4, 12.02, 11.82, 0.702, 0.852),
    lower=0.0,
    f_star=135.07596282915182,
    tags="hock-schittkowski",
)
define(
    "HS100",
    lambda a, b, c, d, e, f, g: (
        (a - 10) ** 2
        + 5 * (b - 12) ** 2
        + c**4
        + 3 * (d - 11) ** 2
        + 10 * e**6
        + 7 * f**2
        + g**4
        - 4 * f * g
        - 10 * f
        - 8 * g
    ),
    None,
    lambda a, b, c, d, e, f, g: [
        2 * a**2 + 3 * b**4 + c + 4 * d**2 + 5 * e - 127,
        7 * a + 3 * b + 10 * c**2 + d - e - 282,
        23 * a + b**2 + 6 * f**2 - 8 * g - 196,
        4 * a**2 + b**2 - 3 * a * b + 2 * c**2 + 5 * f - 11 * g,
    ],
    start=(1, 2, 0, 4, 0, 1, 1),
    f_star=680.630057374402,
    tags="hock-schittkowski",
)
define(
    "HS113",
    lambda a, b, c, d, e, f, g, h, i, j: (
        a**2
        + b**2
        + a * b
        - 14 * a
        - 16 * b
        + (c - 10) ** 2
        + 4 * (d - 5) ** 2
        + (e - 3) ** 2
        + 2 * (f - 1) ** 2
        + 5 * g**2
        + 7 * (h - 11) ** 2
        + 2 * (i - 10) ** 2
        + (j - 7) ** 2
        + 45
    ),
    None,
    lambda a, b, c, d, e, f, g, h, i, j: [
        4 * a + 5 * b - 3 * g + 9 * h - 105,
        10 * a - 8 * b - 17 * g + 2 * h,
        -8 * a + 2 * b + 5 * i - 2 * j - 12,
        3 * (a - 2) ** 2 + 4 * (b - 3) ** 2 + 2 * c**2 - 7 * d - 120,
        5 * a**2 + 8 * b + (c - 6) ** 2 - 2 * d - 40,
        0.5 * (a - 8) ** 2 + 2 * (b - 4) ** 2 + 3 * e**2 - f - 30,
        a**2 + 2 * (b - 2) ** 2 - 2 * a * b + 14 * e - 6 * f,
        -3 * a + 6 * b + 12 * (i - 8) ** 2 - 7 * j,
    ],
    start=(2, 3, 5, 5, 1, 2, 7, 3, 6, 10),
    f_star=24.306209068179793,
    tags="hock-schittkowski",
)
