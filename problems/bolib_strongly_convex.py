"""BOLIB problems whose lower level is strongly convex in y; see :mod:`problems.bolib`."""

import functools

import torch
from torch import Tensor

from problems.bolib import declare

define = functools.partial(declare, lower_class="strongly convex")


# What several problems share.


def _bard_1988(x: Tensor, y: Tensor) -> Tensor:
    return (x[0] - 5) ** 2 + (2 * y[0] + 1) ** 2


def _bard_1988_rows(x: Tensor, y: Tensor) -> list[Tensor]:
    return [y[0] - 3 * x[0] + 3, x[0] - y[0] / 2 - 4, x[0] + y[0] - 7]


def _near_3_and_4(x: Tensor, y: Tensor) -> Tensor:
    return (y[0] - 3) ** 2 / 2 + (y[1] - 4) ** 2 / 2


def _outrata_1990(x: Tensor, y: Tensor) -> list[Tensor]:
    return [y[1] - 0.333 * y[0] - 2, y[0] - 0.333 * y[1] - 2]


def _outrata_1993(x: Tensor, y: Tensor) -> Tensor:
    return y[0] ** 2 * (x[0] / 10 + 0.5) - x[0] * y[1] - y[0] * (1.333 * x[0] + 3) + y[1] ** 2 * (0.05 * x[0] + 0.5)


# Published as 5, at (25, 30; 5, 10).
define(
    "AiyoshiShimizu1984Ex2",
    upper=lambda x, y: 2 * x[0] + 2 * x[1] - 3 * y[0] - 3 * y[1] - 60,
    upper_rows=lambda x, y: [x[0] + x[1] + y[0] - 2 * y[1] - 40],
    x_box=(0, 50),
    lower=lambda x, y: (y[0] - x[0] + 20) ** 2 + (y[1] - x[1] + 20) ** 2,
    lower_rows=lambda x, y: [2 * y[0] - x[0] + 10, 2 * y[1] - x[1] + 10],
    y_box=(-10, 20),
    x_star=(0, 0),
    y_star=(-10, -10),
    upper_star=0.0,
)
define(
    "Bard1988Ex1",
    upper=_bard_1988,
    x_box=(0, None),
    lower=lambda x, y: (y[0] - 1) ** 2 - 1.5 * x[0] * y[0],
    lower_rows=_bard_1988_rows,
    y_box=(0, None),
    x_star=(1,),
    y_star=(0,),
    upper_star=17.0,
)
define(
    "Bard1988Ex2",
    upper=lambda x, y: (y[1] + y[3]) * (y[1] + y[3] - 160) + (y[0] + y[2]) * (y[0] + y[2] - 200),
    upper_rows=lambda x, y: [x[0] + x[1] + x[2] + x[3] - 40],
    x_box=(0, (10, 5, 15, 20)),
    lower=lambda x, y: (y[0] - 4) ** 2 + (y[3] - 2) ** 2 + (y[1] - 13) ** 2 + (y[2] - 35) ** 2,
    lower_rows=lambda x, y: [
        0.4 * y[0] - x[0] + 0.7 * y[1],
        0.6 * y[0] - x[1] + 0.3 * y[1],
        0.4 * y[2] - x[2] + 0.7 * y[3],
        0.6 * y[2] - x[3] + 0.3 * y[3],
    ],
    y_box=(0, (20, 20, 40, 40)),
    x_star=(7, 3, 12, 18),
    y_star=(0, 10, 30, 0),
    upper_star=-6600.0,
)
define(
    "Colson2002BIPA2",
    upper=_bard_1988,
    x_box=(0, None),
    lower=lambda x, y: (y[0] - 1) ** 2 - 1.5 * x[0] * y[0] + x[0] ** 3,
    lower_rows=_bard_1988_rows,
    y_box=(0, None),
    x_star=(1,),
    y_star=(0,),
    upper_star=17.0,
)
define(
    "Colson2002BIPA3",
    upper=lambda x, y: (x[0] - 5) ** 4 + (2 * y[0] + 1) ** 4,
    upper_rows=lambda x, y: [x[0] + y[0] - 4],
    x_box=(0, None),
    lower=lambda x, y: 2 * x[0] + 6 * y[0] + torch.exp(y[0] - x[0]) + 2 * x[0] * y[0] + x[0] ** 2 + y[0] ** 2,
    lower_rows=lambda x, y: [y[0] - x[0] - 2],
    y_box=(0, None),
    x_star=(4,),
    y_star=(0,),
    upper_star=2.0,
)
# Published as 31.25, at (1; 1). At x = 0 the lower level has the one feasible point 0, and no multiplier.
define(
    "Dempe1992b",
    upper=lambda x, y: (x[0] - 3.5) ** 2 + (y[0] + 4) ** 2,
    lower=lambda x, y: (y[0] - 3) ** 2,
    lower_rows=lambda x, y: [y[0] ** 2 - x[0]],
    x_star=(0,),
    y_star=(0,),
    upper_star=28.25,
)
# Published as -1, at (sqrt(1/2), sqrt(1/2); 0, 1). Here the lower level has one feasible point, and no multiplier.
define(
    "DempeDutta2012Ex31",
    upper=lambda x, y: -y[1],
    upper_rows=lambda x, y: [y[0] * y[1], -(y[0] * y[1])],
    x_box=(0, None),
    lower=lambda x, y: (y[1] + 1) ** 2 + y[0] ** 2,
    lower_rows=lambda x, y: [
        (x[0] - y[1] + 1) ** 2 + (x[0] - y[0]) ** 2 - 1,
        (x[1] + y[0]) ** 2 + (x[1] - y[1] + 1) ** 2 - 1,
    ],
    x_star=(1, 1),
    y_star=(0, 2),
    upper_star=-2.0,
)
define(
    "HatzEtal2013",
    upper=lambda x, y: 2 * y[0] - x[0] + y[1],
    lower=lambda x, y: (x[0] - y[0]) ** 2 + y[1] ** 2,
    y_box=(0, None),
    x_star=(0,),
    y_star=(0, 0),
    upper_star=0.0,
)
define(
    "HenrionSurowiec2011",
    upper=lambda x, y: x[0] ** 2,
    lower=lambda x, y: -(y[0] * (x[0] - y[0] / 2)),
    x_star=(0,),
    y_star=(0,),
    upper_star=0.0,
)
define(
    "MacalHurter1997",
    upper=lambda x, y: (x[0] - 1) ** 2 + (y[0] - 1) ** 2,
    lower=lambda x, y: 500 * y[0] - 50 * x[0] * y[0] + y[0] ** 2 / 2,
    x_star=(611 / 61,),
    y_star=(50 / 61,),
    upper_star=302621 / 3721,
)
define(
    "MuuQuy2003Ex1",
    upper=lambda x, y: x[0] ** 2 - 4 * x[0] + y[0] ** 2 + y[1] ** 2,
    x_box=(0, 2),
    lower=lambda x, y: y[0] * y[1] - y[0] * (3 * x[0] - 1) + y[1] * (x[0] + 1) + y[0] ** 2 + y[1] ** 2 / 2,
    lower_rows=lambda x, y: [2 * y[0] - 2 * x[0] + y[1] - 1],
    y_box=(0, None),
    x_star=(11 / 13,),
    y_star=(10 / 13, 0),
    upper_star=-27 / 13,
)
# Published as 0.6426, from a rounded point.
define(
    "MuuQuy2003Ex2",
    upper=lambda x, y: 4 * x[1] - 7 * x[0] - 4 * y[1] - y[0] * y[2] + y[0] ** 2 + y[2] ** 2,
    upper_rows=lambda x, y: [x[0] + x[1] - 1],
    x_box=(0, None),
    lower=lambda x, y: (
        y[0] * y[1] - y[0] * (3 * x[0] - 1) + y[1] * (x[1] + 1) + y[0] ** 2 + y[1] ** 2 / 2 + y[2] ** 2 / 2
    ),
    lower_rows=lambda x, y: [x[0] - 2 * x[1] + 2 * y[0] + y[1] - y[2] + 2],
    y_box=(0, None),
    x_star=(11 / 18, 7 / 18),
    y_star=(0, 0, 11 / 6),
    upper_star=23 / 36,
)
define(
    "Outrata1990Ex1b",
    upper=lambda x, y: _near_3_and_4(x, y) + x[0] ** 2 + x[1] ** 2 - 12.5,
    lower=lambda x, y: y[0] * (y[0] - 2 * y[1]) / 2 - x[1] * y[1] - x[0] * y[0] - y[1] * (2 * y[0] - 5 * y[1]) / 2,
    lower_rows=_outrata_1990,
    y_box=(0, None),
    x_star=(0.278839149639, 0.474811712935),
    y_star=(2.343819174067, 1.032490012214),
    upper_star=-7.578458163922,
)
define(
    "Outrata1990Ex1d",
    upper=lambda x, y: _near_3_and_4(x, y) + x[0] ** 2 / 10 + x[1] ** 2 / 10 - 12.5,
    lower=lambda x, y: y[0] * (y[0] + 3 * y[1]) / 2 - x[1] * y[1] - x[0] * y[0] + y[1] * (3 * y[0] + 10 * y[1]) / 2,
    lower_rows=_outrata_1990,
    y_box=(0, None),
    x_star=(2, 0),
    y_star=(2, 0),
    upper_star=-3.6,
)
# Published as -3.15, at (2.42, -3.65; 0, 1.58).
define(
    "Outrata1990Ex1e",
    upper=lambda x, y: _near_3_and_4(x, y) + x[0] ** 2 / 10 + x[1] ** 2 / 10 - 12.5,
    lower=lambda x, y: (
        x[0] * (y[0] - 3 * y[1])
        + y[0] * (y[0] + 3 * y[1]) / 2
        - x[1] * (2 * y[0] - 3 * y[1])
        + y[1] * (3 * y[0] + 10 * y[1]) / 2
    ),
    lower_rows=_outrata_1990,
    y_box=(0, None),
    x_star=(-0.4, 0.8),
    y_star=(2, 0),
    upper_star=-3.92,
)
define(
    "Outrata1990Ex2c",
    upper=_near_3_and_4,
    x_box=(0, None),
    lower=lambda x, y: (
        y[0] ** 2 * (x[0] + 1) / 2 - y[0] * (1.333 * x[0] + 3) - x[0] * y[1] + y[1] ** 2 * (x[0] / 10 + 1) / 2
    ),
    lower_rows=_outrata_1990,
    y_box=(0, None),
    x_star=(3.45616215742,),
    y_star=(1.707088720543, 2.568460543941),
    upper_star=1.860462395401,
)
define(
    "Outrata1993Ex31",
    upper=_near_3_and_4,
    x_box=(0, None),
    lower=_outrata_1993,
    lower_rows=lambda x, y: [
        y[1] + y[0] * (x[0] / 10 - 0.333) + x[0] / 10 - 2,
        y[0] - y[1] * (x[0] / 10 + 0.333) + x[0] / 10 - 2,
    ],
    y_box=(0, None),
    x_star=(1.909517968894,),
    y_star=(2.978587865236, 2.232151257174),
    upper_star=1.562873828513,
)
define(
    "Outrata1994Ex31",
    upper=_near_3_and_4,
    x_box=(0, 10),
    lower=_outrata_1993,
    lower_rows=lambda x, y: [x[0] / 10 - 0.333 * y[0] + y[1] - 1, y[0] ** 2 - x[0] / 10 + y[1] ** 2 - 9],
    y_box=(0, None),
    x_star=(4.060406427902,),
    y_star=(2.682244429583, 1.487146752261),
    upper_star=3.207700023602,
)
define(
    "SinhaMaloDeb2014TP6",
    upper=lambda x, y: 2 * y[0] - 2 * x[0] + (x[0] - 1) ** 2,
    x_box=(0, None),
    lower=lambda x, y: x[0] * y[0] + (2 * y[1] - 1) ** 2 + (2 * y[0] - 4) ** 2,
    lower_rows=lambda x, y: [
        4 * x[0] + 5 * y[0] + 4 * y[1] - 12,
        4 * y[1] - 4 * x[0] - 5 * y[0] + 4,
        4 * x[0] - 4 * y[0] + 5 * y[1] - 4,
        4 * y[0] - 4 * x[0] + 5 * y[1] - 4,
    ],
    y_box=(0, None),
    x_star=(17 / 9,),
    y_star=(8 / 9, 0),
    upper_star=-98 / 81,
)
define(
    "Yezza1996Ex41",
    upper=lambda x, y: (y[0] - x[0] + 2) ** 2 / 2 + (y[0] - 2) ** 2 / 2,
    lower=lambda x, y: x[0] - y[0] + y[0] ** 2 / 2,
    lower_rows=lambda x, y: [y[0] - x[0]],
    y_box=(0, None),
    x_star=(3,),
    y_star=(1,),
    upper_star=0.5,
)
