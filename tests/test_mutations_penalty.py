"""Lines of the penalty method broken one at a time: the check that is named must notice.

The first block is the list of what toy implementations get wrong; the second does the same to the other schemes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest

from bilevel.algorithms import penalty_double_loop, penalty_schedules
from implicit import SolveError
from tests import penalty_checks as checks
from tests.mutation import mutated

LOOP = "bilevel.algorithms.penalty_double_loop"
SHARED = "bilevel.algorithms.penalty_scheme"
METHOD = "bilevel.algorithms.penalty"
SCHEDULES = "bilevel.algorithms.penalty_schedules"
SINGLE = "bilevel.algorithms.penalty_single_loop"
STORM = "bilevel.algorithms.penalty_storm"
BIAS = "bilevel.algorithms.penalty_bias"


def paper(module: Any) -> None:
    checks.reaches_penalised_minimizer(module.F2BA)


def on(check: Callable[..., None], *names: str) -> Callable[[Any], None]:
    """``check`` with the scheme of the broken module, on some settings."""
    scheme = {
        checks.follows_f2ba: "F2BA",
        checks.follows_central: "F2BA",
        checks.follows_proximal: "Proximal",
        checks.follows_f2sa: "F2SA",
        checks.follows_f3sa: "F3SA",
        checks.follows_single_loop: "SingleLoop",
    }[check]

    def run(module: Any) -> None:
        for name in names:
            check(name, getattr(module, scheme))

    return run


def with_method(module: Any) -> None:
    checks.reaches_penalised_minimizer(kind=module.Penalty)


@contextmanager
def shared(module: Any, *names: str) -> Iterator[None]:
    """The schemes with functions of a broken module in the place of those that they import."""
    users = [u for u in (penalty_double_loop, penalty_schedules) for n in names if hasattr(u, n)]
    patches = [mock.patch.object(u, n, getattr(module, n)) for u in set(users) for n in names if hasattr(u, n)]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def with_shared(*names: str) -> Callable[[Any], None]:
    def run(module: Any) -> None:
        with shared(module, *names):
            checks.reaches_penalised_minimizer()
            checks.follows_f2ba("independent")

    return run


def with_central(module: Any) -> None:
    with shared(module, "central_hypergradient"):
        checks.follows_central("full")


def with_descend(module: Any) -> None:
    with shared(module, "descend"):
        checks.follows_f2sa("full-sets")


def with_kink(module: Any) -> None:
    checks.tells_kinks_from_slopes(module.kink)


def with_storm(module: Any) -> None:
    with (
        mock.patch("bilevel.algorithms.penalty_single_loop.penalty_storm", module),
        mock.patch("bilevel.algorithms.penalty_schedules.penalty_storm", module),
    ):
        checks.follows_single_loop("independent")
        checks.follows_f3sa("independent")


WALK = 'walk = _Walk(state.y, state.z, state.extra["y_before"], state.extra["z_before"])'
JOINT = 'parts["penalty_gap"] = p * (pair.y.lower(q, y) - pair.z.lower(q, z))'
STEP_Y = "y, _ = self.descend(up, ahead_y, self.state.y, self.p, length_y)"
PLAIN_Y = "y, _ = self.descend(up, y, state.y, self.p, length_y)"

MUTATIONS: dict[str, tuple[str, str, str, Callable[[Any], None]]] = {
    "z is never updated": (
        LOOP,
        "walk = _Walk(y, z, walk.y, walk.z)\n        return",
        "walk = _Walk(y, walk.z, walk.y, walk.z)\n        return",
        paper,
    ),
    "y-step not divided by p": (
        LOOP,
        "length = shrink / (self.p * total + self.upper_curvature)",
        "length = shrink / (total + self.upper_curvature)",
        paper,
    ),
    "y and z swapped": (
        LOOP,
        "return hypergradient(pair, self.x, y, z, self.p)",
        "return hypergradient(pair, self.x, z, y, self.p)",
        paper,
    ),
    "no grad_x g(x, z)": (SHARED, JOINT, 'parts["penalty_gap"] = p * pair.y.lower(q, y)', with_shared("hypergradient")),
    "no factor p in G": (SHARED, JOINT, JOINT.replace("p * ", ""), with_shared("hypergradient")),
    "no factor p in the y-step": (
        SHARED,
        "oracle.upper(x, q) + p * oracle.lower(x, q)",
        "oracle.upper(x, q) + oracle.lower(x, q)",
        with_shared("penalised"),
    ),
    "grad g at z in the y-step": (
        LOOP,
        STEP_Y,
        STEP_Y.replace("up,", "lambda q: pair.y.upper(self.x, q) + self.p * tree.dot(slope, q),"),
        paper,
    ),
    "z reset to y in each step": (LOOP, WALK, WALK.replace("state.z,", "state.y,"), paper),
    "y and z reset to zero": (LOOP, WALK, "walk = _Walk(*[tree.zeros_like(state.y)] * 4)", paper),
    "eta scaled by 1/p": (METHOD, "-length, move.gradient", "-length / state.penalty, move.gradient", with_method),
    "f_x at z": (
        SHARED,
        'parts["upper_value"] = pair.y.upper(q, y)\n        parts["penalty_gap"] = p *',
        'parts["upper_value"] = pair.y.upper(q, z)\n        parts["penalty_gap"] = p *',
        with_shared("hypergradient"),
    ),
    "no projection onto Y": (
        LOOP,
        "self.problem.lower_set.project(tree.axpy(-step, pull, point)), slope",
        "tree.axpy(-step, pull, point), slope",
        on(checks.follows_f2ba, "full-sets"),
    ),
    "no projection onto X": (
        METHOD,
        "plain = problem.upper_set.project(tree.axpy(-length, move.gradient, state.x))",
        "plain = tree.axpy(-length, move.gradient, state.x)",
        lambda module: checks.follows_f2ba("full-sets", kind=module.Penalty),
    ),
    "on batches z is never updated": (
        LOOP,
        "z, _ = self.descend(low, z, state.z, 1.0, length_z)",
        "z = z",
        on(checks.follows_f2ba, "batches"),
    ),
    "on batches y never moves": (LOOP, PLAIN_Y, "y = y", on(checks.follows_f2ba, "batches")),
    "batches shared although independent": (
        LOOP,
        "if not settings.common_batches:  # the last inner batches have shaped y and z",
        "if False:",
        on(checks.follows_f2ba, "independent"),
    ),
    "central: sign of f in the objective of w": (
        LOOP,
        "p * pair.z.lower(x, q) - pair.z.upper(x, q)",
        "p * pair.z.lower(x, q) + pair.z.upper(x, q)",
        on(checks.follows_central, "full"),
    ),
    "prox pushes away": (
        LOOP,
        "tree.axpy(weight / self.rho, tree.sub(point, centre), slope)",
        "tree.axpy(-weight / self.rho, tree.sub(point, centre), slope)",
        on(checks.follows_proximal, "full"),
    ),
    "prox of y not scaled by p": (LOOP, STEP_Y, STEP_Y.replace("self.p,", "1.0,"), on(checks.follows_proximal, "full")),
    "prox forgotten in the step": (
        LOOP,
        "total = curvature + (1.0 / self.rho if self.rho is not None else 0.0)",
        "total = curvature",
        on(checks.follows_proximal, "full"),
    ),
    "centre jumps": (
        LOOP,
        "centre_y = tree.axpy(self.beta, tree.sub(move.y, state.y), state.y)",
        "centre_y = move.y",
        on(checks.follows_proximal, "full"),
    ),
    "gradient at the centres": (
        LOOP,
        "move = self.move(y, z, self.gradient(pair, y, z), curvature)",
        "move = self.move(y, z, self.gradient(pair, state.y, state.z), curvature)",
        on(checks.follows_proximal, "batches"),
    ),
    "F2SA: lambda = gamma / alpha": (
        SCHEDULES,
        "gamma / (2.0 * alpha)",
        "gamma / alpha",
        on(checks.follows_f2sa, "full"),
    ),
    "F2SA: alpha does not fall": (
        SCHEDULES,
        "settings.penalty) * late**-a",
        "settings.penalty)",
        on(checks.follows_f2sa, "full"),
    ),
    "F2SA: y steps by gamma": (
        SCHEDULES,
        "descend(problem, penalised(pair.y, x, p), y, alpha)",
        "descend(problem, penalised(pair.y, x, p), y, gamma)",
        on(checks.follows_f2sa, "full"),
    ),
    "F2SA: exponents of F3SA": (
        SCHEDULES,
        '{"both": (5 / 7, 4 / 7), "upper": (3 / 5, 2 / 5), "none": (1 / 3, 0.0)}',
        '{"both": (3 / 5, 2 / 5), "upper": (1 / 2, 1 / 4), "none": (1 / 3, 0.0)}',
        on(checks.follows_f2sa, "full"),
    ),
    "F3SA: weights fall like gamma": (
        SCHEDULES,
        "Storm(exponent=2.0 * known.exponents()[1])",
        "Storm(exponent=known.exponents()[1])",
        on(checks.follows_f3sa, "batches"),
    ),
    "F3SA: G at the old y and z": (
        SCHEDULES,
        "oracle, point, (y, z), state.step)",
        "oracle, point, (state.y, state.z), state.step)",
        on(checks.follows_f3sa, "full"),
    ),
    "single loop: sigma forgotten": (
        SINGLE,
        'slope_w = tree.axpy(1.0 / p, inner["f"], inner["g_y"])',
        'slope_w = tree.axpy(1.0, inner["f"], inner["g_y"])',
        on(checks.follows_single_loop, "full"),
    ),
    "single loop: w restarts at y": (
        SINGLE,
        'w, u = state.extra["w"], state.extra["u"]',
        "w, u = state.y, state.z",
        on(checks.follows_single_loop, "full"),
    ),
    "single loop: prox of u centred at y": (
        SINGLE,
        "tree.sub(u, state.z), inner",
        "tree.sub(u, state.y), inner",
        on(checks.follows_single_loop, "full"),
    ),
    "central: no factor p in G": (
        SHARED,
        "0.5 * p * (oracle.lower(q, y) - oracle.lower(q, w))",
        "0.5 * (oracle.lower(q, y) - oracle.lower(q, w))",
        with_central,
    ),
    "centre of z stays": (LOOP, "y=centre_y, z=centre_z", "y=centre_y, z=state.z", on(checks.follows_proximal, "full")),
    "F2SA: z is never updated": (
        SCHEDULES,
        "z, _ = descend(problem, lambda q, o=pair.z: o.lower(x, q), z, gamma)",
        "z = z",
        on(checks.follows_f2sa, "full"),
    ),
    "F2SA: y and z swapped": (
        SCHEDULES,
        "hypergradient(pair, x, y, z, p)",
        "hypergradient(pair, x, z, y, p)",
        on(checks.follows_f2sa, "full"),
    ),
    "F2SA: no projection onto Y": (
        SHARED,
        "return problem.lower_set.project(tree.axpy(-step, slope, point)), slope",
        "return tree.axpy(-step, slope, point), slope",
        with_descend,
    ),
    "F3SA: no factor lambda in the y-step": (
        SCHEDULES,
        'tree.axpy(p, inner["g_y"], inner["f"])',
        'tree.axpy(1.0, inner["g_y"], inner["f"])',
        on(checks.follows_f3sa, "full"),
    ),
    "F3SA: grad g at z in the y-step": (
        SCHEDULES,
        'tree.axpy(p, inner["g_y"], inner["f"])',
        'tree.axpy(p, inner["g_z"], inner["f"])',
        on(checks.follows_f3sa, "full"),
    ),
    "F3SA: z is never updated": (
        SCHEDULES,
        'z = project(tree.axpy(-gamma, inner["g_z"], state.z))',
        "z = state.z",
        on(checks.follows_f3sa, "full"),
    ),
    "F3SA: no projection onto Y": (
        SCHEDULES,
        "storm, project = self.estimator, problem.lower_set.project",
        "storm, project = self.estimator, lambda q: q",
        on(checks.follows_f3sa, "full-sets"),
    ),
    "single loop: no projection onto Y": (
        SINGLE,
        "self.estimator, problem.lower_set.project, state.penalty",
        "self.estimator, lambda q: q, state.penalty",
        on(checks.follows_single_loop, "full-sets"),
    ),
    "single loop: u never moves": (
        SINGLE,
        "project(tree.axpy(-gamma, pull_u, u))",
        "u",
        on(checks.follows_single_loop, "full"),
    ),
    "single loop: centre of z follows w": (
        SINGLE,
        "z=tree.axpy(self.beta, tree.sub(u, state.z), state.z)",
        "z=tree.axpy(self.beta, tree.sub(w, state.z), state.z)",
        on(checks.follows_single_loop, "full"),
    ),
    "STORM: no grad_x g(x, z)": (
        STORM,
        'tree.sub(outer["g_y"], outer["g_z"])',
        'outer["g_y"]',
        with_storm,
    ),
    "kink: slopes pass for jumps": (BIAS, "if jump <= JUMP * turn:", "if False:", with_kink),
    "kink: the wrong half is kept": (BIAS, "        if turned:\n", "        if not turned:\n", with_kink),
    "kink: the hull is not looked at": (BIAS, "if shortest <= tolerance else None", "if True else None", with_kink),
    "STORM: the iterate before is not copied": (
        STORM,
        'tree.clone(dict(zip("xyz", point, strict=True)))',
        'dict(zip("xyz", point, strict=True))',
        with_storm,
    ),
    "STORM: G before at the new y and z": (
        STORM,
        'last = (extra["before"]["x"], point[1], point[2])',
        'last = (extra["before"]["x"], *moved)',
        with_storm,
    ),
    "STORM: no factor p in G": (STORM, "tree.axpy(p, tree.sub(", "tree.axpy(1.0, tree.sub(", with_storm),
    "STORM: g at z taken at y": (STORM, 'pair.z.lower(x, q["g_z"])', 'pair.y.lower(x, q["g_z"])', with_storm),
}


@pytest.mark.parametrize("name", list(MUTATIONS))
def test_a_broken_line_is_noticed(name: str) -> None:
    module, old, new, check = MUTATIONS[name]
    with mutated(module, old, new) as broken, pytest.raises((AssertionError, SolveError)):
        check(broken)


@pytest.mark.parametrize("name", list(MUTATIONS))
def test_the_same_check_passes_the_real_line(name: str) -> None:
    """With the line as it is, in a module built the same way."""
    module, old, _, check = MUTATIONS[name]
    key = (module, check)
    if key not in PASSED:
        with mutated(module, old, old) as real:
            check(real)
        PASSED.add(key)


PASSED: set[Any] = set()
