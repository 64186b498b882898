"""The entry point of constrained problems: checks, budgets, resumption, statuses and failures that lose nothing."""

import math
import os
import re
import signal
from typing import Any

import pytest
import torch
from torch import Tensor

import constrained
import implicit
from constrained import AugmentedLagrangian, ConstrainedProblem, EqualityProblem, InteriorPoint, Solution
from implicit import SolveError, Status, tree
from implicit.tree import Tree

METHOD = AugmentedLagrangian()


def test_a_solution_prints_in_one_line() -> None:
    found = constrained.solve(PROBLEM, METHOD, start(), max_steps=3, raise_on_failure=False)
    text = repr(found)
    assert re.fullmatch(
        r"Solution\(STEP_LIMIT, objective=\S+, residual=\S+, steps=3, x: \['b'\] \(3,\) torch.float64, "
        r"\['a'\] \(2,\) torch.float64\)",
        text,
    )
    assert f"objective={found.objective:.8g}, residual={found.residual.largest:.2g}" in text
    many = constrained.solve(
        EqualityProblem(lambda x: tree.dot(x, x), lambda x: x[0] - 1), x0=[torch.zeros(()) for _ in range(50)]
    )
    assert len(repr(many)) < 250


def objective(x: Tree) -> Tensor:
    a, b = x["a"], x["b"]
    return (a[0] - 10) ** 2 + 5 * (a[1] - 12) ** 2 + b[0] ** 4 + 3 * (b[1] - 11) ** 2 + 10 * b[2] ** 6


def inequality(x: Tree) -> dict[str, Tensor]:
    a, b = x["a"], x["b"]
    return {"one": 2 * a[0] ** 2 + 3 * a[1] ** 4 + b[0] + 4 * b[1] ** 2 + 5 * b[2] - 127}


PROBLEM = ConstrainedProblem(
    objective=objective,
    equality=lambda x: (x["a"] * x["b"][:2]).sum() - 3,
    inequality=inequality,
    lower={"a": 0.0, "b": None},
)


def start() -> Tree:
    return {"b": torch.tensor([0.5, 4.0, 0.0]), "a": torch.tensor([1.0, 2.0])}


def solve(problem: Any = PROBLEM, method: Any = METHOD, x0: Any = None, **options: Any) -> Solution:
    return constrained.solve(problem, method, start() if x0 is None else x0, **options)


def plain(solution: Solution) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in solution.history]


def same(first: Solution, second: Solution) -> None:
    """Bitwise."""
    for one, other in ((first.x, second.x), (tuple(first.multipliers), tuple(second.multipliers))):
        assert all(tree.leaves(tree.map(torch.equal, one, other)))
    assert plain(first) == plain(second)
    assert (first.status, first.steps, first.residual) == (second.status, second.steps, second.residual)


def test_a_solution() -> None:
    x0 = start()
    found = solve(x0=x0)
    assert found.status is Status.CONVERGED
    assert found.success
    assert str(tree.structure(found.x)) == str(tree.structure(x0))
    residual = constrained.kkt_residual(PROBLEM, found.x, *found.multipliers)
    assert residual == found.residual
    assert residual.largest <= 1e-8
    assert found.fun == found.objective == float(objective(found.x))
    assert (found.nit, found.nfev) == (found.steps, found.counts["objective"])
    assert found.steps == len(found.history)
    assert found.curvature is not None
    assert found.curvature > 0
    assert found.multipliers.equality.shape == ()
    assert list(found.multipliers.inequality) == ["one"]
    assert float(found.multipliers.inequality["one"][()]) > 0
    assert "reached" in found.message
    assert torch.equal(x0["a"], torch.tensor([1.0, 2.0])), "the start is not modified"
    other = solve(method=InteriorPoint())
    assert float(tree.max_abs(tree.sub(other.x, found.x))) < 1e-6
    assert float(tree.max_abs(tree.sub(tuple(other.multipliers), tuple(found.multipliers)))) < 1e-5


MISUSE: dict[str, tuple[Any, type[Exception], str]] = {
    "problem": (lambda: solve(objective), TypeError, "problem must be a constrained.EqualityProblem or a Constrained"),
    "class": (lambda: solve(method=AugmentedLagrangian), TypeError, "method must be an object, not the class: Augment"),
    "method": (
        lambda: solve(method="auto"),
        TypeError,
        "method must be such as constrained.InteriorPoint(), got 'auto'",
    ),
    "other method": (lambda: solve(method=implicit.LBFGS()), TypeError, "method must be such as"),
    "name": (
        lambda: solve(method="interiorpoint"),
        TypeError,
        "method must be an object, not its name 'interiorpoint': constrained.InteriorPoint()",
    ),
    "start as method": (
        lambda: constrained.solve(PROBLEM, torch.ones(2)),  # type: ignore[arg-type]
        TypeError,
        "the second argument is the method; write constrained.solve(problem, x0=...)",
    ),
    "tree as method": (
        lambda: constrained.solve(PROBLEM, start()),
        TypeError,
        "the second argument is the method; write constrained.solve(problem, x0=...)",
    ),
    "no start": (lambda: constrained.solve(PROBLEM, METHOD), TypeError, "x0 is missing"),
    "maxiter": (lambda: solve(maxiter=3), TypeError, "no argument 'maxiter'; here it is called max_steps"),
    "unknown": (lambda: solve(speed=3), TypeError, "solve() has no argument 'speed'"),
    "max_steps": (lambda: solve(max_steps=-1), ValueError, "max_steps must be a non-negative integer or None, got -1"),
    "max_steps kind": (lambda: solve(max_steps=2.0), ValueError, "max_steps must be a non-negative integer"),
    "time_limit": (lambda: solve(time_limit=0.0), ValueError, "time_limit must be a positive number of seconds"),
    "atol kind": (lambda: solve(atol="small"), TypeError, "atol must be a number or None, got 'small'"),
    "atol": (lambda: solve(atol=0.0), ValueError, "atol must be positive"),
    "callbacks": (lambda: solve(callbacks=print), TypeError, "callbacks must be a list of functions"),
    "callback": (lambda: solve(callbacks=[3]), TypeError, "callbacks must be functions of a StepInfo, got 3"),
    "generator": (lambda: solve(generator=3), TypeError, "generator must be a torch.Generator, got 3"),
    "multipliers": (
        lambda: solve(multipliers=(torch.zeros(2),)),
        ValueError,
        "multipliers.equality is tensor (2,) torch.float64, but what it multiplies is tensor () torch.float64",
    ),
    "start": (lambda: solve(x0=torch.zeros(3)), Exception, ""),
    "bounds": (
        lambda: solve(ConstrainedProblem(objective=lambda x: x.sum(), lower=1.0, upper=0.0), x0=torch.zeros(2)),
        ValueError,
        "lower is above upper in 2 entries",
    ),
    "checkpoint": (
        lambda: constrained.solve(PROBLEM, METHOD, checkpoint={"a": 1}),
        ValueError,
        "checkpoint is not one of this version; get it from implicit.load_checkpoint(path)",
    ),
}


@pytest.mark.parametrize("case", MISUSE.values(), ids=MISUSE)
def test_misuse_raises_before_the_first_step(case: tuple[Any, type[Exception], str]) -> None:
    call, kind, message = case
    with pytest.raises(kind) as caught:
        call()
    assert not isinstance(caught.value, SolveError)
    assert message in str(caught.value)


def test_the_default_method_follows_the_constraints() -> None:
    free = EqualityProblem(lambda x: (x**2).sum(), lambda x: x.sum() - 1)
    assert solve(free, None, torch.zeros(2)).method.name == "AdaSketchNewton"
    bounded: list[dict[str, Any]] = [
        {"inequality": lambda x: x - 1},
        {"lower": 0.0},
        {"equality": lambda x: x.sum() - 1, "upper": 2.0},
    ]
    for fields in bounded:
        problem = ConstrainedProblem(objective=lambda x: (x**2).sum(), **fields)
        assert solve(problem, None, torch.full((2,), 0.5)).method.name == "InteriorPoint"


def test_settings_are_resolved_and_kept() -> None:
    found = solve(atol=1e-3)
    assert found.method.atol == 1e-3
    assert found.method.penalty > 0
    assert found.residual.largest <= 1e-3
    assert METHOD.atol is None
    single = tree.map(lambda leaf: leaf.float(), start())
    loose = solve(x0=single)
    assert loose.success
    assert loose.method.atol == 1e-4
    assert {leaf.dtype for leaf in tree.leaves((loose.x, tuple(loose.multipliers)))} == {torch.float32}


def test_budgets_do_not_raise_and_the_best_point_is_returned() -> None:
    found = solve(max_steps=0)
    assert (found.status, found.steps) == (Status.STEP_LIMIT, 0)
    assert float(tree.max_abs(tree.sub(found.x, start()))) == 0.0
    assert "raise max_steps" in found.message
    late = solve(time_limit=1e-9)
    assert (late.status, late.steps) == (Status.TIME_LIMIT, 1)
    full = solve()
    short = solve(max_steps=full.steps - 1)
    assert short.status is Status.STEP_LIMIT
    assert solve(max_steps=full.steps).status is Status.CONVERGED, "convergence in the last allowed step"
    residuals = [row["residual"] for row in short.history]
    assert short.residual.largest == pytest.approx(min(residuals), rel=1e-12)


@pytest.mark.parametrize("steps", [3, 4])
def test_the_best_point_not_the_last(steps: int) -> None:
    """A method that jumps away in its third step."""

    class Restless(AugmentedLagrangian):
        def step(self, problem: Any, state: Any) -> Any:
            values = super().step(problem, state)
            if state.step < 2:
                return values
            state.x, state.point = state.x + 1.0, None
            return {**values, "residual": 1e6 * state.step}

    found = solve(method=Restless(), max_steps=steps)
    residuals = [row["residual"] for row in found.history]
    assert found.steps == steps
    assert found.residual.largest == min(residuals) < 1e3


def test_a_warm_start_needs_no_step() -> None:
    first = solve()
    again = solve(x0=first.x, multipliers=first.multipliers)
    assert (again.status, again.steps) == (Status.CONVERGED, 0)
    assert torch.equal(again.x["a"], first.x["a"])
    wrong = solve(x0=first.x, multipliers=first.multipliers._replace(equality=-first.multipliers.equality), max_steps=0)
    assert wrong.status is Status.STEP_LIMIT


@pytest.mark.parametrize("method", [METHOD, InteriorPoint()], ids=lambda m: m.name)
def test_resumption_is_bitwise(method: Any, tmp_path: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    whole = solve(method=method, generator=generator)
    path = tmp_path / "run.pt"
    for steps in (1, 3):
        part = solve(method=method, generator=generator, max_steps=steps)
        implicit.save_checkpoint(part.checkpoint, path)
        stored = implicit.load_checkpoint(path)
        same(constrained.solve(PROBLEM, method, checkpoint=stored), whole)
        resumed = constrained.solve(PROBLEM, checkpoint=stored)  # the method comes with it
        same(resumed, whole)
        assert resumed.method == whole.method
        assert resumed.seconds >= part.seconds
    saved = solve(method=method, generator=generator, callbacks=[implicit.SaveCheckpoint(path, every=2)])
    same(saved, whole)
    same(constrained.solve(PROBLEM, checkpoint=implicit.load_checkpoint(path)), whole)


def test_a_checkpoint_refuses_what_it_brings_itself_and_another_problem() -> None:
    stored = solve(max_steps=2).checkpoint
    given: list[dict[str, Any]] = [{"x0": start()}, {"multipliers": ()}, {"generator": torch.Generator()}]
    for extra in given:
        with pytest.raises(ValueError, match="leave out x0, multipliers and generator"):
            constrained.solve(PROBLEM, METHOD, checkpoint=stored, **extra)
    with pytest.raises(ValueError, match="the checkpoint is a run of AugmentedLagrangian, not of InteriorPoint"):
        constrained.solve(PROBLEM, InteriorPoint(), checkpoint=stored)
    other = ConstrainedProblem(objective=objective, inequality=inequality)
    message = "[n, equalities, inequalities] = [5, 1, 1], this problem has [5, 0, 1]; resume with the same problem"
    with pytest.raises(ValueError, match=re.escape(message)):
        constrained.solve(other, METHOD, checkpoint=stored)
    tighter = constrained.solve(PROBLEM, METHOD, checkpoint=solve(atol=1e-3).checkpoint, atol=1e-9)
    assert tighter.success
    assert tighter.method.atol == 1e-9
    assert tighter.residual.largest <= 1e-9


def test_callbacks_see_every_step_and_stop_the_run() -> None:
    seen: list[tuple[int, float]] = []

    def watch(info: Any) -> bool:
        seen.append((info.step, info.values["residual"]))
        return info.step == 3

    found = solve(callbacks=[watch])
    assert found.status is Status.STOPPED
    assert [step for step, _ in seen] == [1, 2, 3]
    assert [value for _, value in seen] == [row["residual"] for row in found.history]
    assert "the best point known" in found.message
    assert found.residual.largest == pytest.approx(min(value for _, value in seen), rel=1e-6)


def test_ctrl_c_finishes_the_step_and_returns() -> None:
    before = signal.getsignal(signal.SIGINT)

    def press(info: Any) -> None:
        if info.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    found = solve(callbacks=[press])
    assert (found.status, found.steps) == (Status.STOPPED, 3)
    assert signal.getsignal(signal.SIGINT) is before
    assert constrained.solve(PROBLEM, METHOD, checkpoint=found.checkpoint).success


def test_nan_at_the_start_is_nonfinite() -> None:
    problem = EqualityProblem(lambda x: torch.log(x).sum(), lambda x: x.sum() - 1)
    x0 = torch.tensor([-1.0, 1.0])
    with pytest.raises(SolveError, match="NONFINITE after 0 steps") as caught:
        solve(problem, x0=x0)
    solution = caught.value.solution
    assert solution.status is Status.NONFINITE
    assert torch.equal(solution.x, x0)
    assert solve(problem, x0=x0, raise_on_failure=False).status is Status.NONFINITE


@pytest.mark.parametrize("poison", ["objective", "equality"])
def test_nan_during_a_run_keeps_the_last_finite_point(poison: str) -> None:
    armed = [False]

    def watch(info: Any) -> None:
        armed[0] = info.step >= 2

    def bad(name: str) -> float:
        return math.nan if armed[0] and poison == name else 1.0

    problem = EqualityProblem(lambda x: (x**4).sum() * bad("objective"), lambda x: ((x**3).sum() - 1) * bad("equality"))
    found = solve(problem, x0=torch.tensor([0.3, 2.0]), callbacks=[watch], raise_on_failure=False)
    assert found.status is Status.NONFINITE
    assert bool(torch.isfinite(found.x).all())
    assert 2 <= found.steps <= 3
    armed[0] = False
    with pytest.raises(SolveError, match="NONFINITE"):
        solve(problem, x0=torch.tensor([0.3, 2.0]), callbacks=[watch])


def test_an_exception_in_a_user_function_keeps_the_run() -> None:
    armed = [False]

    def watch(info: Any) -> None:
        armed[0] = info.step == 2

    def fragile(x: Tree) -> Tensor:
        if armed[0]:
            raise ZeroDivisionError("the simulator is down")
        return objective(x)

    problem = ConstrainedProblem(objective=fragile, inequality=inequality)
    with pytest.raises(SolveError, match="step 3 raised ZeroDivisionError: the simulator is down") as caught:
        solve(problem, callbacks=[watch])
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    solution = caught.value.solution
    assert solution.status is Status.STOPPED
    assert solution.steps == 2
    assert "final measurement failed" not in solution.message
    armed[0] = False
    resumed = constrained.solve(problem, METHOD, checkpoint=solution.checkpoint)
    same(resumed, solve(problem))
    with pytest.raises(SolveError, match="a callback after step 1 raised KeyError"):
        solve(callbacks=[lambda info: {}["missing"]])


def test_an_exception_before_the_first_step_is_the_users() -> None:
    def broken(x: Tensor) -> Tensor:
        raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        solve(EqualityProblem(broken, lambda x: x.sum()), x0=torch.zeros(2))


def test_converged_is_never_claimed_on_another_measure_or_at_a_maximum() -> None:
    """The end point is measured again by the base class, with its curvature."""
    circle = EqualityProblem(lambda x: x.sum(), lambda x: (x**2).sum() - 2)
    top = torch.ones(2)
    found = solve(circle, x0=top, multipliers=(torch.tensor(-0.5),))
    assert found.residual.largest == 0.0
    assert found.status is Status.STALLED
    assert found.curvature is not None
    assert found.curvature < 0
    assert "no minimum" in found.message

    class Boastful(AugmentedLagrangian):
        def terminate(self, problem: Any, state: Any) -> Status:
            return Status.CONVERGED

    claimed = solve(circle, Boastful(), torch.tensor([-1.0, -0.9]))
    assert claimed.status is Status.STALLED
    assert "when measured again" in claimed.message


def test_curvature_is_that_of_the_tangent_space() -> None:
    """A saddle of the Lagrangian that is a minimum on the constraints, with bounds and inequalities active."""
    problem = ConstrainedProblem(
        objective=lambda x: -4 * x[0] ** 2 + x[1] ** 2 + 2 * x[1] * x[2] + 3 * x[2] ** 2 - x[3],
        inequality=lambda x: torch.stack([x[3] - 1, x[1] - 20]),
        lower=torch.tensor([-1.0, -9.0, -9.0, -9.0]),
        upper=torch.tensor([1.0, 9.0, 9.0, 9.0]),
    )
    found = solve(problem, x0=torch.tensor([0.5, 1.0, 1.0, 0.0]))
    assert found.success
    smallest = float(torch.linalg.eigvalsh(torch.tensor([[2.0, 2.0], [2.0, 6.0]]))[0])
    assert found.curvature == pytest.approx(smallest / 6, rel=1e-6)
    corner = solve(ConstrainedProblem(objective=lambda x: x.sum(), lower=0.0, upper=1.0), x0=torch.full((3,), 0.5))
    assert corner.success
    assert corner.curvature == math.inf
    assert float(corner.x.abs().max()) == 0.0


def test_a_method_that_refuses_says_so() -> None:
    class Picky(AugmentedLagrangian):
        def refuses(self, problem: Any) -> str | None:
            return "lower: bounds are not handled; use InteriorPoint()"

    with pytest.raises(ValueError, match="lower: bounds are not handled"):
        solve(method=Picky())


def test_the_callers_generator_is_left_alone() -> None:
    generator = torch.Generator().manual_seed(5)
    before = generator.get_state()
    solve(generator=generator, max_steps=2)
    assert torch.equal(generator.get_state(), before)


def test_multipliers_may_be_given_in_part() -> None:
    box = constrained.ConstrainedProblem(
        objective=lambda x: (x - 2).square().sum(), equality=lambda x: x[:1], upper=1.0
    )
    given = constrained.Multipliers(equality=torch.ones(1))
    found = constrained.solve(box, constrained.InteriorPoint(), torch.zeros(2), multipliers=given)
    assert found.success
    assert torch.allclose(found.multipliers.upper, torch.tensor([0.0, 2.0]), atol=1e-6)
