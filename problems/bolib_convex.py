"""BOLIB problems whose lower level is convex in y, neither linear nor strongly convex; see :mod:`problems.bolib`."""

import functools
import math

from problems.bolib import INF, SQRT_HALF, declare

GOLDEN = (math.sqrt(5) - 1) / 2
define = functools.partial(declare, lower_class="convex")

define(
    "Bard1988Ex3",
    upper=lambda x, y: y[1] ** 2 - 4 * y[0] - x[0] ** 2 - 3 * x[1],
    upper_rows=lambda x, y: [x[0] ** 2 + 2 * x[1] - 4],
    x_box=(0, None),
    lower=lambda x, y: 2 * x[0] ** 2 - 5 * y[1] + y[0] ** 2,
    lower_rows=lambda x, y: [2 * y[0] - y[1] + 2 * x[0] - x[0] ** 2 - x[1] ** 2 - 3, 4 * y[1] - x[1] - 3 * y[0] + 4],
    y_box=(0, None),
    x_star=(0, 2),
    y_star=(1.875, 0.90625),
    upper_star=-12.6787109375,
)
define(
    "FrankeEtal2018Ex513",
    upper=lambda x, y: -y[1],
    lower=lambda x, y: y[2],
    lower_rows=lambda x, y: [y[0] ** 2 - y[2], y[1] ** 2 + y[0] ** 2 - 1],
    y_box=((-INF, -INF, 0), None),
    x_star=(1,),
    y_star=(0, 1, 0),
    upper_star=-1.0,
)
define(
    "FrankeEtal2018Ex53",
    upper=lambda x, y: y[0] ** 2 + y[1] ** 2,
    upper_rows=lambda x, y: [-y[0], -y[1], y[0] - 1, y[1] - 1],
    lower=lambda x, y: (y[0] - 2) ** 2,
    y_box=(0, 1),
    x_star=(1,),
    y_star=(1, 0),
    upper_star=1.0,
)
define(
    "NieWangYe2017Ex54",
    upper=lambda x, y: x[1] * y[1] + x[0] ** 2 * y[0] + x[2] * y[2] ** 2 + x[3] * y[3] ** 2,
    upper_rows=lambda x, y: [
        x[1] ** 2 + x[2] ** 2 + x[3] ** 2 + x[0] ** 2 - 1,
        y[0] * y[1] - x[0],
        y[2] * y[3] - x[2] ** 2,
    ],
    lower=lambda x, y: y[0] ** 2 - y[1] * (x[0] + x[1]) - (x[2] + x[3]) * (y[2] + y[3]),
    lower_rows=lambda x, y: [
        y[1] ** 2 + y[2] ** 2 + y[3] ** 2 + y[0] ** 2 - 1,
        y[1] ** 2 - y[0] + y[2] ** 2 + y[3] ** 2,
    ],
    x_star=(0, 0, -SQRT_HALF, -SQRT_HALF),
    y_star=(GOLDEN, 0, -math.sqrt(GOLDEN / 2), -math.sqrt(GOLDEN / 2)),
    upper_star=-SQRT_HALF * GOLDEN,
)
