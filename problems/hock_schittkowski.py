"""Equality-constrained problems of Hock and Schittkowski (1981), and problem 100 without its inactive constraints."""

import functools
import math

import torch

from problems.constrained_case import declare

SQRT2 = math.sqrt(2)
define = functools.partial(
    declare,
    source="W. Hock, K. Schittkowski, Test Examples for Nonlinear Programming Codes, Springer, 1981",
)

define(
    "HS6",
    lambda a, b: (1 - a) ** 2,
    lambda a, b: [10 * (b - a**2)],
    start=(-1.2, 1),
    f_star=0.0,
    x_star=(1, 1),
    equality_star=(0,),
    tags="exact hock-schittkowski",
)
define(
    "HS7",
    lambda a, b: torch.log(1 + a**2) - b,
    lambda a, b: [(1 + a**2) ** 2 + b**2 - 4],
    start=(2, 2),
    f_star=-math.sqrt(3),
    x_star=(0, math.sqrt(3)),
    equality_star=(1 / (2 * math.sqrt(3)),),
    tags="exact hock-schittkowski",
)
define(
    "HS8",
    None,
    lambda a, b: [a**2 + b**2 - 25, a * b - 9],
    start=(2, 1),
    f_star=0.0,
    tags="hock-schittkowski",
    note="published with the objective -1; four solutions, all combinations of signs and order",
)
define(
    "HS9",
    lambda a, b: torch.sin(math.pi * a / 12) * torch.cos(math.pi * b / 16),
    lambda a, b: [4 * a - 3 * b],
    start=(0, 0),
    f_star=-0.5,
    tags="hock-schittkowski",
    note="solutions (12 k - 3, 16 k - 4) for every integer k",
)
define(
    "HS26",
    lambda a, b, c: (a - b) ** 2 + (b - c) ** 4,
    lambda a, b, c: [(1 + b**2) * a + c**4 - 3],
    start=(-2.6, 2, 2),
    f_star=0.0,
    x_star=(1, 1, 1),
    equality_star=(0,),
    tags="exact degenerate hock-schittkowski",
)
define(
    "HS27",
    lambda a, b, c: 0.01 * (a - 1) ** 2 + (b - a**2) ** 2,
    lambda a, b, c: [a + c**2 + 1],
    start=(2, 2, 2),
    f_star=0.04,
    x_star=(-1, 1, 0),
    equality_star=(0.04,),
    tags="exact hock-schittkowski",
)
define(
    "HS28",
    lambda a, b, c: (a + b) ** 2 + (b + c) ** 2,
    lambda a, b, c: [a + 2 * b + 3 * c - 1],
    start=(-4, 1, 1),
    f_star=0.0,
    x_star=(0.5, -0.5, 0.5),
    equality_star=(0,),
    tags="exact hock-schittkowski",
)
define(
    "HS39",
    lambda a, b, c, d: -a,
    lambda a, b, c, d: [b - a**3 - c**2, a**2 - b - d**2],
    start=(2, 2, 2, 2),
    f_star=-1.0,
    x_star=(1, 1, 0, 0),
    equality_star=(-1, -1),
    tags="exact hock-schittkowski",
)
define(
    "HS40",
    lambda a, b, c, d: -a * b * c * d,
    lambda a, b, c, d: [a**3 + b**2 - 1, a**2 * d - c, d**2 - b],
    start=(0.8, 0.8, 0.8, 0.8),
    f_star=-0.25,
    x_star=(2 ** (-1 / 3), 2 ** (-1 / 2), 2 ** (-11 / 12), 2 ** (-1 / 4)),
    equality_star=(0.5, -(2 ** (-13 / 12)), 2 ** (-3 / 2)),
    tags="exact hock-schittkowski",
)
define(
    "HS42",
    lambda a, b, c, d: (a - 1) ** 2 + (b - 2) ** 2 + (c - 3) ** 2 + (d - 4) ** 2,
    lambda a, b, c, d: [a - 2, c**2 + d**2 - 2],
    start=(1, 1, 1, 1),
    f_star=28 - 10 * SQRT2,
    x_star=(2, 2, 0.6 * SQRT2, 0.8 * SQRT2),
    equality_star=(-2, 5 / SQRT2 - 1),
    tags="exact hock-schittkowski",
)
define(
    "HS46",
    lambda a, b, c, d, e: (a - b) ** 2 + (c - 1) ** 2 + (d - 1) ** 4 + (e - 1) ** 6,
    lambda a, b, c, d, e: [a**2 * d + torch.sin(d - e) - 1, b + c**4 * d**2 - 2],
    start=(0.5 * SQRT2, 1.75, 0.5, 2, 2),
    f_star=0.0,
    x_star=(1, 1, 1, 1, 1),
    equality_star=(0, 0),
    tags="exact degenerate hock-schittkowski",
)
define(
    "HS47",
    lambda a, b, c, d, e: (a - b) ** 2 + (b - c) ** 3 + (c - d) ** 4 + (d - e) ** 4,
    lambda a, b, c, d, e: [a + b**2 + c**3 - 3, b - c**2 + d - 1, a * e - 1],
    start=(2, SQRT2, -1, 2 - SQRT2, 0.5),
    f_star=0.0,
    other_minima=(-0.026714182693940863,),
    tags="degenerate hock-schittkowski",
    note="published f is 0 at the stationary point (1, 1, 1, 1, 1); the other minimum is lower",
)
define(
    "HS48",
    lambda a, b, c, d, e: (a - 1) ** 2 + (b - c) ** 2 + (d - e) ** 2,
    lambda a, b, c, d, e: [a + b + c + d + e - 5, c - 2 * (d + e) + 3],
    start=(3, 5, -3, 2, -2),
    f_star=0.0,
    x_star=(1, 1, 1, 1, 1),
    equality_star=(0, 0),
    tags="exact hock-schittkowski",
)
define(
    "HS49",
    lambda a, b, c, d, e: (a - b) ** 2 + (c - 1) ** 2 + (d - 1) ** 4 + (e - 1) ** 6,
    lambda a, b, c, d, e: [a + b + c + 4 * d - 7, c + 5 * e - 6],
    start=(10, 7, 2, -3, 0.8),
    f_star=0.0,
    x_star=(1, 1, 1, 1, 1),
    equality_star=(0, 0),
    tags="exact degenerate hock-schittkowski",
)
define(
    "HS50",
    lambda a, b, c, d, e: (a - b) ** 2 + (b - c) ** 2 + (c - d) ** 4 + (d - e) ** 2,
    lambda a, b, c, d, e: [a + 2 * b + 3 * c - 6, b + 2 * c + 3 * d - 6, c + 2 * d + 3 * e - 6],
    start=(35, -31, 11, 5, -5),
    f_star=0.0,
    x_star=(1, 1, 1, 1, 1),
    equality_star=(0, 0, 0),
    tags="exact hock-schittkowski",
)
define(
    "HS51",
    lambda a, b, c, d, e: (a - b) ** 2 + (b + c - 2) ** 2 + (d - 1) ** 2 + (e - 1) ** 2,
    lambda a, b, c, d, e: [a + 3 * b - 4, c + d - 2 * e, b - e],
    start=(2.5, 0.5, 2, -1, 0.5),
    f_star=0.0,
    x_star=(1, 1, 1, 1, 1),
    equality_star=(0, 0, 0),
    tags="exact hock-schittkowski",
)
define(
    "HS52",
    lambda a, b, c, d, e: (4 * a - b) ** 2 + (b + c - 2) ** 2 + (d - 1) ** 2 + (e - 1) ** 2,
    lambda a, b, c, d, e: [a + 3 * b, c + d - 2 * e, b - e],
    start=(2, 2, 2, 2, 2),
    f_star=1859 / 349,
    x_star=(-33 / 349, 11 / 349, 180 / 349, -158 / 349, 11 / 349),
    equality_star=(1144 / 349, 1014 / 349, -2704 / 349),
    tags="exact hock-schittkowski",
)
define(
    "HS56",
    lambda a, b, c, d, e, f, g: -a * b * c,
    lambda a, b, c, d, e, f, g: [
        a - 4.2 * torch.sin(d) ** 2,
        b - 4.2 * torch.sin(e) ** 2,
        c - 4.2 * torch.sin(f) ** 2,
        a + 2 * b + 2 * c - 7.2 * torch.sin(g) ** 2,
    ],
    start=(1, 1, 1, 0.50973968, 0.50973968, 0.50973968, 0.98511078),
    f_star=-3.456,
    x_star=(2.4, 1.2, 1.2, math.asin(math.sqrt(4 / 7)), *2 * (math.asin(math.sqrt(2 / 7)),), math.pi / 2),
    equality_star=(0, 0, 0, 1.44),
    tags="hock-schittkowski",
    note="the angles at a solution may be replaced by others with the same squared sine",
)
define(
    "HS61",
    lambda a, b, c: 4 * a**2 + 2 * b**2 + 2 * c**2 - 33 * a + 16 * b - 24 * c,
    lambda a, b, c: [3 * a - 2 * b**2 - 7, 4 * a - c**2 - 11],
    start=(0, 0, 0),
    f_star=-143.64614219778025,
    other_minima=(-81.9190960946274,),
    tags="hock-schittkowski",
    note="at the start the gradients of both constraints are multiples of the first unit vector",
)
define(
    "HS77",
    lambda a, b, c, d, e: (a - 1) ** 2 + (a - b) ** 2 + (c - 1) ** 2 + (d - 1) ** 4 + (e - 1) ** 6,
    lambda a, b, c, d, e: [a**2 * d + torch.sin(d - e) - 2 * SQRT2, b + c**4 * d**2 - 8 - SQRT2],
    start=(2, 2, 2, 2, 2),
    f_star=0.24150512879017869,
    tags="hock-schittkowski",
)
define(
    "HS78",
    lambda a, b, c, d, e: a * b * c * d * e,
    lambda a, b, c, d, e: [
        a**2 + b**2 + c**2 + d**2 + e**2 - 10,
        b * c - 5 * d * e,
        a**3 + b**3 + 1,
    ],
    start=(-2, 1.5, 2, -1, -1),
    f_star=-2.9197004089636795,
    tags="hock-schittkowski",
)
define(
    "HS79",
    lambda a, b, c, d, e: (a - 1) ** 2 + (a - b) ** 2 + (b - c) ** 2 + (c - d) ** 4 + (d - e) ** 4,
    lambda a, b, c, d, e: [a + b**2 + c**3 - 2 - 3 * SQRT2, b - c**2 + d + 2 - 2 * SQRT2, a * e - 2],
    start=(2, 2, 2, 2, 2),
    f_star=0.07877682087105692,
    tags="hock-schittkowski",
)
define(
    "HS100LNP",
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
    lambda a, b, c, d, e, f, g: [
        127 - 2 * a**2 - 3 * b**4 - c - 4 * d**2 - 5 * e,
        -4 * a**2 - b**2 + 3 * a * b - 2 * c**2 - 5 * f + 11 * g,
    ],
    start=(1, 2, 0, 4, 0, 1, 1),
    f_star=680.630057374402,
    tags="hock-schittkowski",
)
