"""BOLIB problems whose lower level is linear in y, in its objective and its rows; see :mod:`problems.bolib`."""

import functools

from problems.bolib import INF, declare

define = functools.partial(declare, lower_class="convex")

# (0; 0, 1) is as good.
define(
    "Bard1991Ex2",
    upper=lambda x, y: 10 * y[0] - x[0] - y[1],
    x_box=(0, None),
    lower=lambda x, y: -y[0] - y[1],
    lower_rows=lambda x, y: [x[0] + y[0] - 1, x[0] + y[1] - 1, y[0] + y[1] - 1],
    y_box=(0, None),
    x_star=(1,),
    y_star=(0, 0),
    upper_star=-1.0,
)
define(
    "BardFalk1982Ex2",
    upper=lambda x, y: x[1] - 2 * x[0] + y[0] / 2,
    x_box=(0, None),
    lower=lambda x, y: x[0] + x[1] - 4 * y[0] + y[1],
    lower_rows=lambda x, y: [y[0] - 2 * x[0] - y[1] + 2.5, x[0] - 3 * x[1] + y[1] - 2, x[0] + x[1] - 2],
    y_box=(0, None),
    x_star=(2, 0),
    y_star=(1.5, 0),
    upper_star=-3.25,
)
define(
    "CandlerTownsley1982",
    upper=lambda x, y: 4 * y[0] - 8 * x[0] - 4 * x[1] - 40 * y[1] - 4 * y[2],
    x_box=(0, None),
    lower=lambda x, y: x[0] + 2 * x[1] + y[0] + y[1] + 2 * y[2],
    lower_rows=lambda x, y: [
        y[1] - y[0] + y[2] - 1,
        2 * x[0] - y[0] + 2 * y[1] - y[2] / 2 - 1,
        2 * x[1] + 2 * y[0] - y[1] - y[2] / 2 - 1,
    ],
    y_box=(0, None),
    x_star=(0, 0.9),
    y_star=(0, 0.6, 0.4),
    upper_star=-29.2,
)
define(
    "ClarkWesterberg1990b",
    upper=lambda x, y: 2 * y[1] - x[0] - 3 * y[0],
    x_box=(0, 8),
    lower=lambda x, y: -y[0],
    lower_rows=lambda x, y: [
        y[0] - 2 * x[0] + 4 * y[1] - 16,
        8 * x[0] + 3 * y[0] - 2 * y[1] - 48,
        y[0] - 2 * x[0] - 3 * y[1] + 12,
    ],
    y_box=((0, -INF), (4, INF)),
    x_star=(5,),
    y_star=(4, 2),
    upper_star=-13.0,
)
define(
    "DempeEtal2012",
    upper=lambda x, y: x[0],
    x_box=(-1, 1),
    lower=lambda x, y: x[0] * y[0],
    y_box=(0, 1),
    x_star=(-1,),
    y_star=(1,),
    upper_star=-1.0,
)
# The point (1, -1; 0, 1) that is quoted elsewhere has the value 3.
define(
    "DempeFranke2011Ex42",
    upper=lambda x, y: x[0] + (y[0] - 1) ** 2 + y[1] ** 2,
    x_box=(-1, (1, -1)),
    lower=lambda x, y: x[0] * y[0] + x[1] * y[1],
    lower_rows=lambda x, y: [y[1] - y[0] - 1, y[0] + y[1] - 3.5],
    y_box=(None, (INF, 2)),
    x_star=(-1, -1),
    y_star=(2.25, 1.25),
    upper_star=2.125,
)
# Published as -5.5, at (0, 0; 1, 1).
define(
    "DempeLohse2011Ex31a",
    upper=lambda x, y: (x[0] - 0.5) ** 2 - 3 * y[1] - 3 * y[0] + (x[1] - 0.5) ** 2,
    lower=lambda x, y: x[0] * y[0] + x[1] * y[1],
    lower_rows=lambda x, y: [y[0] + y[1] - 2, y[1] - y[0]],
    y_box=(0, None),
    x_star=(0, 0.5),
    y_star=(2, 0),
    upper_star=-5.75,
)
define(
    "FrankeEtal2018Ex511",
    upper=lambda x, y: (y[0] - 2) ** 2 / 2 + (y[2] - 2) ** 2 / 2 + y[1] ** 2 / 2,
    lower=lambda x, y: y[0] + y[1] + y[2],
    lower_rows=lambda x, y: [-y[0] - y[1], y[1] - y[0]],
    y_box=((0, -INF, 0), None),
    x_star=(1,),
    y_star=(1, -1, 0),
    upper_star=3.0,
)
define(
    "GlackinEtal2009",
    upper=lambda x, y: 4 * x[1] - 2 * x[0] + 3 * y[0],
    upper_rows=lambda x, y: [x[0] - x[1] + 1],
    x_box=(0, None),
    lower=lambda x, y: -y[0],
    lower_rows=lambda x, y: [x[0] + x[1] + y[0] - 4, 2 * x[0] + 2 * x[1] + y[0] - 6],
    y_box=(0, None),
    x_star=(1, 2),
    y_star=(0,),
    upper_star=6.0,
)
# Optimal wherever x = 0 or y[1] = 0.
define(
    "IshizukaAiyoshi1992a",
    upper=lambda x, y: x[0] * y[1] ** 2,
    x_box=(-1.5, None),
    lower=lambda x, y: y[0],
    lower_rows=lambda x, y: [-x[0], -x[0] - y[0], y[0] - x[0], -y[0] - y[1] - 1.5, y[0] + y[1] - 1.5],
    x_star=(1.5,),
    y_star=(-1.5, 0),
    upper_star=0.0,
)
define(
    "LamparielloSagratella2017Ex33",
    upper=lambda x, y: (y[0] + y[1]) ** 2 + x[0] ** 2,
    x_box=(0.5, None),
    lower=lambda x, y: y[0],
    lower_rows=lambda x, y: [1 - x[0] - y[0] - y[1]],
    y_box=(0, None),
    x_star=(0.5,),
    y_star=(0, 0.5),
    upper_star=0.5,
)
define(
    "LamparielloSagratella2017Ex35",
    upper=lambda x, y: x[0] ** 2 + y[0] ** 2,
    x_box=(-1, 1),
    lower=lambda x, y: -y[0],
    lower_rows=lambda x, y: [2 * x[0] + y[0] - 2],
    y_box=(0, 1),
    x_star=(0.8,),
    y_star=(0.4,),
    upper_star=0.8,
)
define(
    "LiuHart1994",
    upper=lambda x, y: -x[0] - 3 * y[0],
    x_box=(0, None),
    lower=lambda x, y: y[0],
    lower_rows=lambda x, y: [y[0] - x[0] - 3, x[0] + 2 * y[0] - 12, 4 * x[0] - y[0] - 12],
    y_box=(0, None),
    x_star=(4,),
    y_star=(4,),
    upper_star=-16.0,
)
define(
    "LucchettiEtal1987",
    upper=lambda x, y: x[0] * y[0] - x[0] / 2 + 0.5,
    x_box=(0, 1),
    lower=lambda x, y: y[0] * (x[0] - 1),
    y_box=(0, 1),
    x_star=(1,),
    y_star=(0,),
    upper_star=0.0,
)
define(
    "MitsosBarton2006Ex31",
    upper=lambda x, y: y[0],
    upper_rows=lambda x, y: [-y[0] - 1, y[0] - 1],
    lower=lambda x, y: -y[0],
    y_box=(-1, 1),
    x_star=(-1,),
    y_star=(1,),
    upper_star=1.0,
)
define(
    "TollSettingP4",
    upper=lambda x, y: -(x[0] * (y[1] + y[2])) - x[1] * y[2],
    lower=lambda x, y: 8 * y[0] + 6 * y[3] + y[1] * (2 * x[0] + 3) + y[2] * (2 * x[0] + 2 * x[1] + 3),
    lower_rows=lambda x, y: [y[0] + y[1] - 1, y[2] + y[3] - 1, 1 - y[0] - y[1], 1 - y[2] - y[3]],
    y_box=(0, None),
    x_star=(2.5, -1),
    y_star=(0, 1, 1, 0),
    upper_star=-4.0,
)
define(
    "TuyEtal1993",
    upper=lambda x, y: x[1] - 2 * x[0] + y[0] / 2,
    upper_rows=lambda x, y: [x[0] + x[1] - 2],
    x_box=(0, None),
    lower=lambda x, y: y[1] - 4 * y[0],
    lower_rows=lambda x, y: [y[0] - 2 * x[0] - y[1] + 2.5, x[0] - 3 * x[1] + y[1] - 2],
    y_box=(0, None),
    x_star=(2, 0),
    y_star=(1.5, 0),
    upper_star=-3.25,
)
# Published as 10.62, at (0, 0.75; 0, 0.5, 0).
define(
    "WanWangLv2011",
    upper=lambda x, y: (x[0] - x[1] + 2 * y[1] + 1) * (y[1] - x[0] - 2 * y[0] + 5 * y[2] + 8),
    lower=lambda x, y: 2 * y[0] - y[1] + y[2],
    lower_rows=lambda x, y: [
        y[1] - y[0] + y[2] - 1,
        2 * x[0] - y[0] + 2 * y[1] - y[2] / 2 - 1,
        2 * x[1] + 2 * y[0] - y[1] - y[2] / 2 - 1,
        -x[0],
        -x[1],
    ],
    y_box=(0, None),
    x_star=(0.5, 0.5),
    y_star=(0, 0, 0),
    upper_star=7.5,
)
define(
    "WangJiaoLi2005",
    upper=lambda x, y: -(100 * x[0]) - 1000 * y[0],
    x_box=(0, 1),
    lower=lambda x, y: -y[0] - y[1],
    lower_rows=lambda x, y: [x[0] + y[0] - y[1] - 1, y[0] + y[1] - 1],
    x_star=(0,),
    y_star=(1, 0),
    upper_star=-1000.0,
)
define(
    "Zlobec2001a",
    upper=lambda x, y: -y[0] / x[0],
    lower=lambda x, y: -y[0] - y[1],
    lower_rows=lambda x, y: [x[0] * y[1] + y[0] - 1],
    y_box=(0, None),
    x_star=(1,),
    y_star=(1, 0),
    upper_star=-1.0,
)
