"""Public conformance check of bilevel algorithms: a third party's passes, or fails with one sentence."""

import io
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bilevel.algorithms import Algorithm
from bilevel.data import Batches
from bilevel.problem import BilevelProblem
from bilevel.solution import Solution
from bilevel.solve import solve
from constrained.sets import Box
from implicit import ConvergenceWarning, Run, SolveError, Status, StepInfo, iterate, tree
from implicit.testing import ConformanceError as ConformanceError
from implicit.testing import check_method
from implicit.testing.spaces import DTYPES, normal, tied
from implicit.testing.verdict import Verdict, identical, reordered, short
from implicit.tree import Tree

STEPS = 6


def check_algorithm(
    algorithm: Algorithm[Any],
    *,
    optional: Sequence[str] = (),
    dtypes: Sequence[torch.dtype] = DTYPES,
) -> None:
    """Whether an algorithm keeps every promise of :class:`bilevel.Algorithm`.

    It is run on small quadratic problems whose solution dense algebra gives, over nested containers with an empty leaf
    and a number, and from tied leaves. CONVERGED must be true: the hypergradient at the end, computed by dense algebra,
    is within the tolerance (for guarantee BIAS: within the bias that the accuracy report states), and the numbers of
    the report are the true ones. Budgets, callbacks, NaN and exceptions must end with the status that is theirs, at a
    finite point. ``refuses`` must name the field; wrong settings must raise ValueError naming theirs; the oracle counts
    must be those of the objectives' calls; a resumed run must end bitwise where the uninterrupted one ends, on full
    data and on minibatches; the order of dict keys must not matter; :func:`implicit.testing.check_method` must pass.

    What an algorithm refuses by name is left out: sets, minibatches, and dtypes other than float64.

    Args:
        algorithm: what to check, with settings that suit small well-conditioned problems.
        optional: settings in which None has a meaning, so that ``resolve`` may leave it.
        dtypes: where it is tried.

    Raises:
        ConformanceError: with one sentence, for the first promise that is broken.
        TypeError: if ``algorithm`` is no Algorithm.

    Example:
        >>> import bilevel, torch
        >>> from bilevel.testing import check_algorithm
        >>> algorithm = bilevel.ImplicitGradient(keep_hessian=0)
        >>> check_algorithm(algorithm, optional=["upper_optimizer", "lower_step_size"], dtypes=[torch.float64])
    """
    if not isinstance(algorithm, Algorithm):
        raise TypeError(f"algorithm must be an Algorithm such as ImplicitGradient(), got {algorithm!r}")
    verdict = Verdict(type(algorithm).__name__)
    _settings(algorithm, verdict)
    for dtype in dtypes:
        if dtype != torch.float64 and _refuses_dtype(algorithm, dtype, verdict):
            continue
        for case, steps in ((_nested(dtype), None), (_tied(dtype), STEPS), (_number(dtype), STEPS)):
            check = _Check(algorithm, case, verdict.at(f"{case.name}, {short(dtype)}"))
            check.converges(steps)
        check = _Check(algorithm, _nested(dtype), verdict.at(short(dtype)))
        for aspect in (
            check.keys,
            check.budgets,
            check.resumed,
            check.counted,
            check.nonfinite,
            check.raising,
            check.refusals,
        ):
            aspect()
        with _quiet():
            start = check.case.start()
            resolved = algorithm.resolve(check.case.problem(), *start, max_steps=STEPS)
            check_method(resolved, check.case.problem(), start, steps=STEPS, optional=optional)
            check.minibatches()


def _quiet() -> warnings.catch_warnings:
    return warnings.catch_warnings(action="ignore", category=ConvergenceWarning)


@dataclass(frozen=True)
class _Case:
    """``min_x 1/2 ||C y*(x) - t||^2 + 1/2 r ||x||^2`` with ``g = 1/2 y.A y - y.(B x + b)``, so ``A y* = B x + b``."""

    name: str
    x: Tree
    y: Tree
    lower_matrix: Tensor  # A, (n, n)
    mixed: Tensor  # B, (n, m)
    lower_vector: Tensor  # b, (n,)
    upper_matrix: Tensor  # C, (n, n)
    target: Tensor  # t, (n,)
    ridge: float = 0.5

    def start(self) -> tuple[Tree, Tree]:
        """The start as declared, tied leaves included."""
        return self.x, self.y

    def upper(self, x: Tree, y: Tree) -> Tensor:
        gap = self.upper_matrix @ self.flat(self.y, y) - self.target
        return 0.5 * (gap @ gap) + 0.5 * self.ridge * tree.dot(x, x)

    def lower(self, x: Tree, y: Tree) -> Tensor:
        flat = self.flat(self.y, y)
        pulled = self.mixed @ self.flat(self.x, x) + self.lower_vector
        return 0.5 * (flat @ self.lower_matrix @ flat) - flat @ pulled

    @staticmethod
    def flat(like: Tree, value: Tree) -> Tensor:
        return tree.ravel(tree.map(lambda _, leaf: leaf, like, value))

    def problem(self, **changes: Any) -> BilevelProblem:
        return replace(BilevelProblem(self.upper, self.lower, name=self.name), **changes)

    def lower_solution(self, x: Tensor) -> Tensor:
        """y*(x) in float64."""
        return torch.linalg.solve(self.lower_matrix.double(), self.mixed.double() @ x + self.lower_vector.double())

    def hypergradient(self, x: Tensor) -> Tensor:
        """The gradient of F at x in float64."""
        c = self.upper_matrix.double()
        outer = c.T @ (c @ self.lower_solution(x) - self.target.double())
        return self.mixed.double().T @ torch.linalg.solve(self.lower_matrix.double().T, outer) + self.ridge * x

    def solution(self) -> Tensor:
        """x* in float64."""
        size = tree.size(self.x)
        zero = torch.zeros(size, dtype=torch.float64)
        columns = [self.hypergradient(e) - self.hypergradient(zero) for e in torch.eye(size, dtype=torch.float64)]
        return torch.linalg.solve(torch.stack(columns, dim=1), -self.hypergradient(zero))


def _case(name: str, x: Tree, y: Tree, dtype: torch.dtype) -> _Case:
    m, n = tree.size(x), tree.size(y)
    q, _ = torch.linalg.qr(normal(201, n, n))
    matrix = (q * torch.linspace(1.0, 4.0, n, dtype=torch.float64)) @ q.T
    outer = torch.eye(n, dtype=torch.float64) + 0.2 * normal(202, n, n)
    return _Case(
        name=name,
        x=x,
        y=y,
        lower_matrix=(0.5 * (matrix + matrix.T)).to(dtype),
        mixed=normal(203, n, m, dtype=dtype),
        lower_vector=normal(204, n, dtype=dtype),
        upper_matrix=outer.to(dtype),
        target=normal(205, n, dtype=dtype),
    )


def _nested(dtype: torch.dtype) -> _Case:
    x = {"rate": torch.tensor(0.3, dtype=dtype), "decay": [normal(206, 2, dtype=dtype)]}
    y = {
        "weight": normal(207, 2, 2, dtype=dtype),
        "none": torch.zeros(0, dtype=dtype),
        "bias": normal(208, dtype=dtype),
    }
    return _case("nested containers", x, y, dtype)


def _tied(dtype: torch.dtype) -> _Case:
    return _case("tied leaves", tied(dtype), tied(dtype), dtype)


def _number(dtype: torch.dtype) -> _Case:
    return _case("one number", torch.tensor(0.7, dtype=dtype), torch.tensor(-0.2, dtype=dtype), dtype)


def _settings(algorithm: Any, verdict: Verdict) -> None:
    """What the shared settings refuse, and the class-level declarations."""
    known = getattr(algorithm, "guarantee", None) in ("EXACT", "BIAS", "STATISTICAL")
    verdict(known, f"guarantee is {getattr(algorithm, 'guarantee', None)!r}; state EXACT, BIAS or STATISTICAL")
    for name, wrong in (("rtol", -1.0), ("rtol", math.nan), ("atol", -1.0), ("check_every", 0)):
        try:
            replace(algorithm, **{name: wrong})
        except ValueError as error:
            verdict(name in str(error), f"{name}={wrong} is refused by '{error}', which does not name {name}")
        else:
            raise verdict.fail(f"{name}={wrong} is accepted; call super().__post_init__() in yours")


def _refuses_dtype(algorithm: Algorithm[Any], dtype: torch.dtype, verdict: Verdict) -> bool:
    """Whether ``resolve`` refuses starts of this dtype, by its name."""
    case = _number(dtype)
    try:
        with _quiet():
            algorithm.resolve(case.problem(), *case.start(), max_steps=STEPS)
    except ValueError as error:
        verdict(str(dtype) in str(error), f"it refuses {dtype} starts by '{error}', which does not name {dtype}")
        return True
    return False


@dataclass
class _Check:
    algorithm: Algorithm[Any]
    case: _Case
    verdict: Verdict

    def solve(self, problem: BilevelProblem | None = None, start: Any = None, **options: Any) -> Solution:
        """A run that may end anyhow; an exception is a verdict."""
        problem = problem or self.case.problem()
        if "checkpoint" not in options:
            options = dict(zip(("x0", "y0"), start or self.case.start(), strict=True)) | options
        with self.verdict.runs("solve"), _quiet():
            return solve(problem, self.algorithm, raise_on_failure=False, **options)

    def finite(self, solution: Solution, where: str) -> None:
        good = bool(tree.all_finite(solution.x, solution.y))
        self.verdict(good, f"{where} the point that is returned is not finite; keep the last finite one")

    # -------------------------------------------------------------- truth

    def converges(self, steps: int | None) -> None:
        """Solved (or stopped after ``steps``), from a start that is left alone, and truthfully so."""
        problem, verdict = self.case.problem(), self.verdict
        reason = self.algorithm.refuses(problem)
        verdict(
            reason is None,
            f"it refuses an unconstrained quadratic problem with a strongly convex lower level: {reason}",
        )
        kept, random = tree.clone(self.case.start()), torch.get_rng_state()
        solution = self.solve(problem, max_steps=steps)
        verdict(identical(kept, self.case.start()), "the run modifies x0 or y0; init must copy them")
        verdict(torch.equal(random, torch.get_rng_state()), "it draws from the global random generator")
        for name, value, like in (("x", solution.x, self.case.x), ("y", solution.y, self.case.y)):
            same = tree.structure(value) == tree.structure(like) and tree.common_dtype(value) == tree.common_dtype(like)
            verdict(same, f"{name} is {tree.describe(value)}, the start {tree.describe(like)}")
        if steps is None and self.algorithm.guarantee != "STATISTICAL":
            verdict(
                solution.status is Status.CONVERGED,
                f"this problem is easy, but the run ended as {solution.status.name} after {solution.steps} steps: "
                f"{solution.message}",
            )
        self.true(solution)

    def true(self, solution: Solution) -> None:
        """The solution's claims against dense algebra."""
        case, verdict, accuracy = self.case, self.verdict, solution.accuracy
        x, y = case.flat(case.x, solution.x).double(), case.flat(case.y, solution.y).double()
        eps = float(torch.finfo(case.mixed.dtype).eps)
        first = float(case.hypergradient(case.flat(case.x, case.x).double()).norm())
        size = float(case.target.double().norm()) + first
        noise = 100.0 * eps * size
        true = float(case.hypergradient(x).norm())
        if solution.status is Status.CONVERGED and self.algorithm.guarantee != "STATISTICAL":
            asked = max(solution.algorithm.atol, (solution.algorithm.rtol or 0.0) * first)
            bias = (accuracy.bias or 0.0) if self.algorithm.guarantee == "BIAS" else 0.0
            allowed = 10.0 * asked + 1.5 * bias + noise
            verdict(
                true <= allowed,
                f"the status is CONVERGED, but the true hypergradient has norm {true:.3g}, tolerance and bias allow "
                f"{allowed:.3g}; measure it independently of the method's own surrogate before claiming it",
            )
        if accuracy.stationarity is not None:
            slack = 2.0 * (accuracy.hypergradient_error or 0.0) + 0.05 * true + noise
            gap = abs(accuracy.stationarity - true)
            what = f"accuracy.stationarity is {accuracy.stationarity:.3g}, the true one {true:.3g}"
            verdict(gap <= slack, f"{what}, further apart than accuracy.hypergradient_error says")
        off = float((case.lower_matrix.double() @ y - case.mixed.double() @ x - case.lower_vector.double()).norm())
        if accuracy.lower_residual is not None and self.algorithm.guarantee == "EXACT":
            gap = abs(accuracy.lower_residual - off)
            what = f"accuracy.lower_residual is {accuracy.lower_residual:.3g}, the true one {off:.3g}"
            verdict(gap <= 0.05 * off + noise, f"{what}; measure it at the point that is returned")
        if accuracy.distance is not None and solution.status is Status.CONVERGED:
            away = float((x - case.solution()).norm())
            bound = 1.1 * accuracy.distance + noise
            verdict(
                away <= bound, f"accuracy.distance is {accuracy.distance:.3g}, but x is {away:.3g} from the solution"
            )

    # -------------------------------------------------------------- aspects

    def keys(self) -> None:
        """Dicts with their keys in another order."""
        start = tuple(reordered(part) for part in self.case.start())
        straight, turned = self.solve(max_steps=STEPS), self.solve(start=start, max_steps=STEPS)
        kept = tree.structure(turned.x) == tree.structure(reordered(self.case.x))
        self.verdict(kept, "x does not come back with the key order of x0")
        x, other = (self.case.flat(self.case.x, s.x).double() for s in (straight, turned))
        gap, size = float((x - other).norm()), float(x.norm())
        eps = float(torch.finfo(self.case.mixed.dtype).eps)
        self.verdict(
            gap <= 10.0 * eps**0.5 * (1.0 + size),
            f"reordering the keys of x0 and y0 moves x by {gap:.3g}; leaves are paired by position instead of by key",
        )

    def budgets(self) -> None:
        """No step, one step, a callback."""
        verdict = self.verdict
        none = self.solve(max_steps=0)
        verdict(identical(none.x, self.case.x), "max_steps=0 moves x; init may project the start, and nothing more")
        one = self.solve(max_steps=1)
        self.true(one)
        expected = (Status.STEP_LIMIT, Status.CONVERGED)
        verdict(one.status in expected, f"max_steps=1 ends as {one.status.name}: {one.message}")
        stopped = self.solve(callbacks=[lambda info: True])
        expected = (Status.STOPPED, Status.CONVERGED)
        ended = stopped.status in expected
        verdict(ended, f"a callback that returns True ends the run as {stopped.status.name} instead of STOPPED")
        for solution in (none, one, stopped):
            self.finite(solution, f"after {solution.steps} steps")

    def resumed(self, problem: BilevelProblem | None = None) -> None:
        """Half a run, its checkpoint through a file, the other half."""
        verdict = self.verdict
        whole = self.solve(problem, max_steps=STEPS, generator=torch.Generator().manual_seed(5))
        half = self.solve(problem, max_steps=STEPS // 2, generator=torch.Generator().manual_seed(5))
        buffer = io.BytesIO()
        with verdict.runs("saving the checkpoint and loading it with weights_only=True"):
            torch.save(half.checkpoint, buffer)
            buffer.seek(0)
            checkpoint = torch.load(buffer, weights_only=True)
        again = self.solve(problem, checkpoint=checkpoint, max_steps=STEPS)
        for name in ("x", "y"):
            a, b = getattr(whole, name), getattr(again, name)
            gap = float(tree.norm(tree.sub(a, b)))
            verdict(
                identical(a, b),
                f"the resumed run ends with {name} off by {gap:.3g} from the uninterrupted one; keep everything that a "
                "step depends on in the state, each thing once",
            )
        verdict(
            again.counts == whole.counts, f"the resumed run counts {again.counts}, the uninterrupted {whole.counts}"
        )

    def counted(self) -> None:
        """state.counts against the objectives' own."""
        calls = {"upper": 0, "lower": 0}

        def counting(level: str) -> Callable[[Tree, Tree], Tensor]:
            function = getattr(self.case, level)

            def call(x: Tree, y: Tree) -> Tensor:
                calls[level] += 1
                return function(x, y)

            return call

        problem = BilevelProblem(counting("upper"), counting("lower"))
        start = self.case.start()
        method = self.algorithm.resolve(problem, *start, max_steps=STEPS)
        calls.update(upper=0, lower=0)
        state = method.init(problem, *start, generator=torch.Generator().manual_seed(0))
        run = iterate(method, problem, Run(state), max_steps=STEPS)
        self.verdict(run.error is None, f"{run.culprit} raised {run.error!r}")
        for level in ("upper", "lower"):
            found = state.counts[level]
            self.verdict(
                found == calls[level],
                f"counts[{level!r}] is {found} after {state.step} steps, {level} was called {calls[level]} times; call "
                "the objectives through bilevel.oracle.Oracle",
            )

    def nonfinite(self) -> None:
        """Objectives that turn NaN outside a ball, or after some calls."""
        case = self.case
        for level in ("upper", "lower"):
            for clean in (6, 25):
                calls: list[int] = []

                def failing(
                    x: Tree, y: Tree, level: str = level, clean: int = clean, seen: list[int] = calls
                ) -> Tensor:
                    seen.append(1)
                    return getattr(case, level)(x, y) * (1.0 if len(seen) <= clean else math.nan)

                where = f"{level} NaN from call {clean + 1} on"
                check = _Check(self.algorithm, case, self.verdict.at(where))
                try:
                    with _quiet():
                        solution = solve(case.problem(**{level: failing}), self.algorithm, *case.start(), max_steps=200)
                except SolveError as error:
                    solution = error.solution
                except (ValueError, TypeError):  # found before the first step
                    continue
                except Exception as error:
                    raise check.verdict.fail(
                        f"{type(error).__name__} was raised: {error}; NaN is a status and no exception"
                    ) from error
                check.finite(solution, "after NaN")
                wrong = solution.status is Status.CONVERGED and len(calls) > clean
                check.verdict(not wrong, "the status is CONVERGED although the objective had turned NaN")

    def raising(self) -> None:
        """An exception in an objective during the run."""
        case = self.case
        begun: list[StepInfo] = []

        def raising(x: Tree, y: Tree) -> Tensor:
            if begun:
                raise RuntimeError("the objective's own")
            return case.lower(x, y)

        def mark(info: StepInfo) -> None:
            begun.append(info)

        mark.start = mark  # type: ignore[attr-defined]
        try:
            with _quiet():
                solve(case.problem(lower=raising), self.algorithm, *case.start(), callbacks=[mark])
        except SolveError as error:
            self.finite(error.solution, "after an exception in the objective")
            return
        raise self.verdict.fail("it swallows an exception of the objective; let it through")

    def refusals(self) -> None:
        """What it cannot handle is refused by name, before the first step."""
        for field, problem in (
            ("lower_set", self.case.problem(lower_set=Box(-1.0, 1.0))),
            ("upper_set", self.case.problem(upper_set=Box(-1.0, 1.0))),
        ):
            with self.verdict.runs("refuses"):
                reason = self.algorithm.refuses(problem)
            if reason is None:
                solution = self.solve(problem, max_steps=STEPS)
                chosen = problem.lower_set if field == "lower_set" else problem.upper_set
                point = solution.y if field == "lower_set" else solution.x
                moved = float(tree.norm(tree.sub(point, chosen.project(point))))
                self.verdict(moved <= 1e-5, f"it accepts {field}, but ends {moved:.3g} outside of it")
                continue
            named = isinstance(reason, str) and field in reason
            self.verdict(named, f"it refuses a problem with a {field} by {reason!r}, which does not name {field}")

    def minibatches(self) -> None:
        """Where minibatches are accepted: bitwise resumption with a sampler and a generator."""
        dtype = self.case.mixed.dtype
        features, targets = normal(211, 24, 3, dtype=dtype), normal(212, 24, dtype=dtype)

        def upper(x: Tree, y: Tree, *, batch: Any) -> Tensor:
            return ((batch["a"] @ y - batch["t"]) ** 2).mean() + 0.1 * (x**2).sum()

        def lower(x: Tree, y: Tree, *, batch: Any) -> Tensor:
            return ((batch["a"] @ y - batch["t"]) ** 2).mean() + (x.exp() * y**2).sum()

        data = Batches({"a": features, "t": targets}, batch_size=4)
        problem = BilevelProblem(upper, lower, upper_data=data, lower_data=data)
        if self.algorithm.refuses(problem) is not None:
            return
        point = torch.zeros(3, dtype=dtype)
        case = replace(self.case, x=point, y=point)
        check = _Check(self.algorithm, case, self.verdict.at("minibatches"))
        check.resumed(problem)
        first, second = (
            check.solve(problem, max_steps=STEPS, generator=torch.Generator().manual_seed(9)) for _ in range(2)
        )
        same = identical(first.x, second.x) and identical(first.y, second.y)
        check.verdict(same, "two runs with one seed differ; draw from the state's generator only")
        check.finite(first, "on minibatches")
