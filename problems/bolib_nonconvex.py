"""BOLIB problems whose lower level is not convex in y; see :mod:`problems.bolib`."""

import functools

from torch import Tensor

from problems.bolib import INF, SQRT_HALF, declare

define = functools.partial(declare, lower_class="nonconvex")


def _quartic(x: Tensor, y: Tensor) -> Tensor:
    """The lower objective of MitsosBarton2006Ex321 and Ex322."""
    return (
        y[0] * (0.08 * x[0] - 0.036 * x[0] ** 2 + 0.004 * x[0] ** 3)
        - y[0] ** 2 * (0.02 * x[0] ** 2 - 0.16 * x[0] + 0.4)
        - y[0] ** 3 * (2 * x[0] / 15 - 2 / 15)
        + y[0] ** 4
    )


define(
    "FrankeEtal2018Ex521",
    upper=lambda x, y: -y[1],
    lower=lambda x, y: y[0],
    lower_rows=lambda x, y: [(y[0] - 1) ** 2 - (y[1] - 0.5) ** 2 - 1.25, y[0] + y[1] - 1],
    y_box=((0, -INF), None),
    x_star=(0,),
    y_star=(0, 1),
    upper_star=-1.0,
)
define(
    "MitsosBarton2006Ex313",
    upper=lambda x, y: x[0] - y[0],
    x_box=(-1, 1),
    lower=lambda x, y: x[0] * y[0] * (y[0] / 2 - x[0] ** 2),
    y_box=(-1, 1),
    x_star=(0,),
    y_star=(1,),
    upper_star=-1.0,
)
define(
    "MitsosBarton2006Ex314",
    upper=lambda x, y: (x[0] - 0.25) ** 2 + y[0] ** 2,
    x_box=(-1, 1),
    lower=lambda x, y: y[0] ** 3 / 3 - x[0] * y[0],
    y_box=(-1, 1),
    x_star=(0.25,),
    y_star=(0.5,),
    upper_star=0.25,
)
define(
    "MitsosBarton2006Ex315",
    upper=lambda x, y: x[0] + y[0],
    x_box=(-1, 1),
    lower=lambda x, y: x[0] * y[0] ** 2 / 2 - y[0] ** 3 / 3,
    y_box=(-1, 1),
    x_star=(-1,),
    y_star=(1,),
    upper_star=0.0,
)
define(
    "MitsosBarton2006Ex316",
    upper=lambda x, y: 2 * x[0] + y[0],
    x_box=(-1, 1),
    lower=lambda x, y: -(x[0] * y[0] ** 2 / 2) - y[0] ** 4 / 4,
    y_box=(-1, 1),
    x_star=(-1,),
    y_star=(0,),
    upper_star=-2.0,
)
define(
    "MitsosBarton2006Ex317",
    upper=lambda x, y: (x[0] + 0.5) ** 2 + y[0] ** 2 / 2,
    x_box=(-1, 1),
    lower=lambda x, y: x[0] * y[0] ** 2 / 2 + y[0] ** 4 / 4,
    y_box=(-1, 1),
    x_star=(-0.25,),
    y_star=(0.5,),
    upper_star=0.1875,
)
# Published as -0.25, at (0.5; 0).
define(
    "MitsosBarton2006Ex318",
    upper=lambda x, y: y[0] ** 2 - x[0] ** 2,
    x_box=(-1, 1),
    lower=lambda x, y: x[0] * y[0] ** 2 - y[0] ** 4 / 2,
    y_box=(-1, 1),
    x_star=(1,),
    y_star=(0,),
    upper_star=-1.0,
)
define(
    "MitsosBarton2006Ex320",
    upper=lambda x, y: (x[0] - 0.25) ** 2 + y[0] ** 2,
    x_box=(-1, 1),
    lower=lambda x, y: y[0] ** 3 / 3 - x[0] ** 2 * y[0],
    y_box=(-1, 1),
    x_star=(0.5,),
    y_star=(0.5,),
    upper_star=0.3125,
)
define(
    "MitsosBarton2006Ex321",
    upper=lambda x, y: (x[0] + 0.6) ** 2 + y[0] ** 2,
    x_box=(-1, 1),
    lower=_quartic,
    y_box=(-1, 1),
    x_star=(-56 / 101,),
    y_star=(46 / 101,),
    upper_star=2137.16 / 10201,
)
define(
    "MitsosBarton2006Ex322",
    upper=lambda x, y: (x[0] + 0.6) ** 2 + y[0] ** 2,
    x_box=(-1, 1),
    lower=_quartic,
    lower_rows=lambda x, y: [0.01 * x[0] ** 2 - y[0] ** 2 + 0.01],
    y_box=(-1, 1),
    x_star=(-56 / 101,),
    y_star=(46 / 101,),
    upper_star=2137.16 / 10201,
)
define(
    "MitsosBarton2006Ex325",
    upper=lambda x, y: x[0] * y[0] + x[1] * y[0] ** 2 - x[0] * x[1] * y[2],
    upper_rows=lambda x, y: [y[0] * y[1] / 10 - x[0] ** 2, x[1] * y[0] ** 2],
    x_box=(-1, 1),
    lower=lambda x, y: x[0] * y[0] ** 2 + x[1] * y[1] * y[2],
    lower_rows=lambda x, y: [y[0] ** 2 - y[1] * y[2], y[1] ** 2 * y[2] - x[0] * y[0], 0.1 - y[2] ** 2],
    y_box=(-1, 1),
    x_star=(-1, -1),
    y_star=(-1, 1, 1),
    upper_star=-1.0,
)
define(
    "MitsosBarton2006Ex326",
    upper=lambda x, y: x[0] * y[0] + x[1] * y[1] ** 2 + x[0] * x[1] * y[2] ** 3,
    upper_rows=lambda x, y: [
        0.1 - x[0] ** 2,
        1.5 - y[0] ** 2 - y[1] ** 2 - y[2] ** 2,
        y[1] ** 2 + y[2] ** 2 + y[0] ** 2 - 2.5,
    ],
    x_box=(-1, 1),
    lower=lambda x, y: x[0] * y[0] ** 2 + x[1] * y[1] ** 2 + y[2] ** 2 * (x[0] - x[1]),
    y_box=(-1, 1),
    x_star=(-1, -1),
    y_star=(1, 1, -SQRT_HALF),
    upper_star=-2 - SQRT_HALF / 2,
)
define(
    "MitsosBarton2006Ex33",
    upper=lambda x, y: y[0],
    upper_rows=lambda x, y: [-y[0] - 10, y[0] - 10],
    lower=lambda x, y: y[0] ** 2,
    lower_rows=lambda x, y: [1 - y[0] ** 2],
    y_box=(-10, 10),
    x_star=(-10,),
    y_star=(-1,),
    upper_star=-1.0,
)
define(
    "MitsosBarton2006Ex36",
    upper=lambda x, y: y[0],
    upper_rows=lambda x, y: [-y[0] - 1, y[0] - 1],
    lower=lambda x, y: y[0] ** 3,
    y_box=(-1, 1),
    x_star=(1,),
    y_star=(-1,),
    upper_star=-1.0,
)
define(
    "NieWangYe2017Ex34",
    upper=lambda x, y: x[0] + y[0] + y[1],
    x_box=(2, 3),
    lower=lambda x, y: x[0] * (y[0] + y[1]),
    lower_rows=lambda x, y: [(y[0] ** 2 + y[1] ** 2) ** 2 - y[0] ** 2 + y[1] ** 2],
    y_box=((0, -INF), None),
    x_star=(2,),
    y_star=(0, 0),
    upper_star=2.0,
)
define(
    "NieWangYe2017Ex52",
    upper=lambda x, y: x[0] * y[0] + x[1] * y[1] + x[0] * x[1] * y[0] * y[1] * y[2],
    upper_rows=lambda x, y: [y[0] * y[1] - x[0] ** 2],
    x_box=(-1, 1),
    lower=lambda x, y: x[0] * y[0] ** 2 - y[0] * y[2] ** 2 + x[1] ** 2 * y[1] * y[2],
    lower_rows=lambda x, y: [1 - y[0] ** 2 - y[1] ** 2 - y[2] ** 2, y[1] ** 2 + y[2] ** 2 + y[0] ** 2 - 2],
    x_star=(-1, -1),
    y_star=(1.109712253758, 0.314333079129, -0.818372426969),
    upper_star=-1.709509405182,
)
define(
    "NieWangYe2017Ex57",
    upper=lambda x, y: x[0] ** 2 * y[0] / 2 - y[2] * (x[0] + x[1] ** 2) + x[1] * y[1] ** 2,
    upper_rows=lambda x, y: [x[0] ** 2 - x[0] - x[1] + y[0] ** 2 + y[1] ** 2],
    x_box=(-1, 1),
    lower=lambda x, y: x[1] * (y[1] ** 2 - y[2] ** 3 + y[0] * y[1] * y[2]),
    lower_rows=lambda x, y: [y[0] ** 2 - x[0] + y[1] ** 2 + y[2] ** 2, 2 * y[1] * y[2] - 1],
    x_star=(1, 1),
    y_star=(0, 0, 1),
    upper_star=-2.0,
)
define(
    "NieWangYe2017Ex61",
    upper=lambda x, y: x[1] ** 3 * y[1] - y[0] ** 3 * (3 * x[0] * x[1] - x[0] ** 2) - y[0] ** 2 * y[1],
    upper_rows=lambda x, y: [y[0] * (x[0] ** 2 - 1) - y[1]],
    x_box=(-1, 1),
    lower=lambda x, y: y[0] * y[1] ** 2 - y[0] ** 2 * (x[1] - x[0] ** 2) - y[1] ** 3,
    lower_rows=lambda x, y: [y[1] ** 2 + y[0] ** 2 - 1],
    x_star=(0.571218687802, -1),
    y_star=(-0.163838824537, 0.986487120835),
    upper_star=-1.021939140915,
)
define(
    "PaulaviciusAdjiman2017b",
    upper=lambda x, y: x[0] + y[0],
    upper_rows=lambda x, y: [-y[0] - 1, y[0] - 1],
    x_box=(-1, 1),
    lower=lambda x, y: x[0] * y[0] ** 2 / 2 - x[0] ** 3 * y[0],
    y_box=(-1, 1),
    x_star=(-1,),
    y_star=(-1,),
    upper_star=-2.0,
)
