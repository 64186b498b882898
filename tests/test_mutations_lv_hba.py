"""Breaks one line of LV-HBA at a time and asserts that a check of its own tests notices.

The lines are those that toy implementations get wrong, each with the problem that shows it.
"""

import sys

import pytest

import bilevel
from tests import lv_hba_checks as checks
from tests.mutation import mutated

ITERATION = "bilevel.algorithms.lv_hba"
PROJECTED = "u, near = work.in_c(u, state.duals)"
NOT_PROJECTED = "_, near = work.in_c(u, state.duals)"

PROJECTIONS = "bilevel.algorithms.lv_hba_state"

MUTATIONS_OF_PROJECTIONS = {
    "lambda of inequalities not projected": ("[radius.new_zeros(p), ", "[-radius.expand(p), ", checks.inactive),
    "lambda of equations restricted in sign": (
        "-radius.expand(len(multipliers) - p)",
        "radius.new_zeros(len(multipliers) - p)",
        checks.equation,
    ),
    "theta not projected onto Y": (
        "return torch.minimum(torch.maximum(theta, level.lower / own), level.upper / own)",
        "return theta",
        checks.bounds,
    ),
    "theta projected in other units": (
        "return torch.minimum(torch.maximum(theta, level.lower / own), level.upper / own)",
        "return torch.minimum(torch.maximum(theta, level.lower), level.upper)",
        checks.lengths,
    ),
    "C in other units": (
        "return torch.cat([near.x, near.y]) / self.lengths, near",
        "return torch.cat([near.x, near.y]), near",
        checks.lengths,
    ),
    "distances to C in other units": (
        "projection = JointProjection(flat, *at, scale=(lengths[:n], lengths[n:]))",
        "projection = self.projection",
        checks.lengths,
    ),
    "f in other units": (
        "return self.flat.lower(self.lengths[:n] * u_x, self.lengths[n:] * u_y, oracle)",
        "return self.flat.lower(u_x, u_y, oracle)",
        checks.lengths,
    ),
    "rows in other units": (
        "x, y = self.lengths[:n] * u_x, self.lengths[n:] * u_y",
        "x, y = u_x, u_y",
        checks.lengths,
    ),
}

MUTATIONS = {
    "z frozen": ("here.z - beta * d_z]", "here.z]", checks.active),
    "lambda descends": ("lam - eta * d_lam", "lam + eta * d_lam", checks.inactive),
    "d_lambda without its proximal term": (
        "d_lam = -rows + (here.lam - here.z) / self.dual_proximal",
        "d_lam = -rows",
        checks.directions,
    ),
    "theta without its proximal term": (
        "d_theta = slope + (here.theta - here.y) / self.proximal",
        "d_theta = slope",
        checks.directions,
    ),
    "d_x without lambda grad g": (
        "/ scale_lower + lam @ work.rows(weights, p, theta)",
        "/ scale_lower + 0.0 * lam @ work.rows(weights, p, theta)",
        checks.active,
    ),
    "d_x with the wrong sign": ("d_x = joint_x - lagrangian_x", "d_x = joint_x + lagrangian_x", checks.active),
    "d_x without grad_x f(x, theta)": (
        "d_x = joint_x - lagrangian_x",
        "d_x = joint_x - lagrangian_x"
        " + value_and_gradient(lambda p: work.lower(p, theta, oracle) / scale_lower + 0.0 * p.sum(), x)[1]",
        checks.bounds,
    ),
    "d_y with the wrong sign": ("d_y = joint_y - (y - theta)", "d_y = joint_y + (y - theta)", checks.inactive),
    "d_y with lambda grad g": (
        "d_y = joint_y - (y - theta) / self.proximal",
        "d_y = joint_y - (y - theta) / self.proximal"
        " + value_and_gradient(lambda q: lam @ work.rows(weights, x, q), y)[1]",
        checks.active,
    ),
    "d_z with the wrong sign": ("d_z = -(lam - z)", "d_z = (lam - z)", checks.polyhedral),
    "F times c": (
        'parts["upper_value"] / scale_upper / c + ',
        'parts["upper_value"] / scale_upper * c + ',
        checks.inactive,
    ),
    "no projection onto C": (PROJECTED, NOT_PROJECTED, checks.active),
    "x not updated": ("here.x - alpha * d_x, ", "here.x, ", checks.active),
    "multipliers reported in scaled units": (
        "return verdict.multipliers if verdict is not None else {}",
        "return {k: v * self.lower_curvature for k, v in verdict.multipliers.items()}",
        checks.scaled,
    ),
    "variables not scaled": ("if work.scalable else", "if False else", checks.lengths),
    "rows not scaled": (
        "row_weights(work.flat, near.x, near.y, work.lengths)",
        "torch.ones_like(row_weights(work.flat, near.x, near.y, work.lengths))",
        checks.large_rows,
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_line_is_noticed(name: str) -> None:
    old, new, check = MUTATIONS[name]
    with mutated(ITERATION, old, new) as broken, pytest.raises((AssertionError, bilevel.SolveError)):
        check(broken.LVHBA)


@pytest.mark.parametrize("name", MUTATIONS_OF_PROJECTIONS)
def test_a_broken_projection_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, check = MUTATIONS_OF_PROJECTIONS[name]
    with mutated(PROJECTIONS, old, new) as broken:
        monkeypatch.setattr(sys.modules[ITERATION], "Work", broken.Work)
        with pytest.raises((AssertionError, bilevel.SolveError)):
            check(bilevel.LVHBA)


@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda check: check.__name__)
def test_the_real_one_passes(check: checks.Check) -> None:
    check(bilevel.LVHBA)


def test_equivalent_lines_are_not_called_broken() -> None:
    """Directions at the old theta and lambda have the same fixed point; no check may depend on which are used."""
    new = "replace(here, theta=theta, lam=lam)"
    with mutated(ITERATION, new, "here") as changed:
        checks.active(changed.LVHBA)
        checks.polyhedral(changed.LVHBA)
