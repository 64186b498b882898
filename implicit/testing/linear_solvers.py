"""Conformance of linear solvers: the status tells the truth."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from implicit import tree
from implicit.linear_solvers.base import LinearSolution, LinearSolver, default_rtol
from implicit.status import Status
from implicit.testing.spaces import DTYPES, normal
from implicit.testing.systems import KINDS, CountedMatrix, System, systems
from implicit.testing.verdict import Verdict, distance, identical, quiet, reordered, shares_memory, short

ENDS = (Status.CONVERGED, Status.STEP_LIMIT, Status.STALLED, Status.NONFINITE, Status.LINEAR_SOLVE_FAILED)


def check_linear_solver(
    solver: LinearSolver,
    table: Sequence[System] | None = None,
    *,
    for_: Sequence[str] = ("spd",),
    rtol: float | None = None,
    dtypes: Sequence[torch.dtype] = DTYPES,
) -> None:
    """Whether a solver keeps every promise of :class:`implicit.LinearSolver`.

    The check computes the residual of every answer from the matrix itself, in float64. CONVERGED must mean that it is
    at most ``max(atol, rtol ||b||)`` (for least squares that :math:`A^T r` vanishes), STEP_LIMIT and STALLED that it
    is not, and ``residual`` and ``relative_residual`` must be the true ones, on *every* system of the table:
    indefinite, nonsymmetric, singular with and without a solution, ill-conditioned, declared falsely. It may refuse
    what it is not for with a ValueError or TypeError. On the easy systems it is for it must converge, whatever the
    size of the right-hand side (1e-30 to 1e30, zero, with exact zeros), for k right-hand sides at once, from the
    solution as starting point, for the transposed operator, and with dict keys in any order. NaN must end as NONFINITE;
    ``max_steps`` and the count of products must be true; nothing that was passed in may be modified; and the answer
    must repeat itself bitwise.

    Args:
        solver: the solver. Its fields ``rtol``, ``atol`` and ``max_steps`` are honoured where it has them.
        table: systems to try; by default those of ``implicit.testing.systems`` in each dtype.
        for_: what it is for, any of ``"spd"``, ``"symmetric"`` (indefinite), ``"general"`` (nonsymmetric),
            ``"singular"`` (symmetric positive semidefinite, consistent) and ``"rectangular"`` (least squares).
        rtol: the relative residual it promises, for a solver without a field ``rtol``; None means ``sqrt(eps)``.
        dtypes: of the default table.

    Raises:
        ConformanceError: with one sentence, for the first promise that is broken.
        TypeError: if ``solver`` is no LinearSolver.
        ValueError: for an unknown kind.

    Example:
        >>> import implicit
        >>> from implicit.testing import check_linear_solver
        >>> check_linear_solver(implicit.CG())
        >>> check_linear_solver(implicit.CG(), for_=["general"])
        Traceback (most recent call last):
        ...
        implicit.testing.verdict.ConformanceError: CG (nested, nonsymmetric, float64): ...
    """
    if not isinstance(solver, LinearSolver):
        raise TypeError(f"solver must be a LinearSolver such as CG(), got {solver!r}")
    for kind in for_:
        if kind not in KINDS:
            raise ValueError(f"for_ must name kinds among {', '.join(KINDS)}, got {kind!r}")
    tables = [list(table)] if table is not None else [systems(dtype) for dtype in dtypes]
    for entries in tables:
        tried: set[str] = set()
        for system in entries:
            where = f"{system.name}, {short(system.matrix.dtype)}"
            check = _Check(solver, system, Verdict(type(solver).__name__, where), rtol, system.kind in for_)
            check.truth()
            if check.bound:
                check.starts()
            if check.bound and system.kind not in tried:
                tried.add(system.kind)
                check.promises()


@dataclass
class _Check:
    """One solver on one system."""

    solver: LinearSolver
    system: System
    verdict: Verdict
    promised: float | None
    claimed: bool

    def __post_init__(self) -> None:
        dtype = self.system.matrix.dtype
        self.eps = float(torch.finfo(dtype).eps)
        own = getattr(self.solver, "rtol", None)
        self.rtol = own if own is not None else self.promised if self.promised is not None else default_rtol(dtype)
        self.atol = float(getattr(self.solver, "atol", 0.0))
        self.matrix = self.system.matrix.double()
        self.norm = float(torch.linalg.matrix_norm(self.matrix)) if self.matrix.numel() else 0.0
        self.square = self.matrix.shape[0] == self.matrix.shape[1]
        # Rounding alone can keep a solver from a tolerance below this.
        reachable = self.rtol >= 0.9 * default_rtol(dtype)
        self.bound = self.claimed and self.system.easy and reachable

    # -------------------------------------------------------------- running and judging

    def run(self, operator: CountedMatrix, rows: Tensor, verdict: Verdict, **options: Any) -> LinearSolution | None:
        """The solution for a row, or for k rows; None where the solver refuses a system that it is not for."""
        solver: LinearSolver = options.pop("solver", self.solver)
        b = tree.unravel(rows, operator.out)
        kept = tree.clone(b)
        matrix = operator.matrix.clone()
        before = operator.total
        try:
            with quiet():
                found = solver.solve(operator, b, batched=rows.ndim == 2, **options)
        except (ValueError, TypeError) as error:
            if not self.claimed and str(error):
                return None
            raise verdict.fail(f"it is for these systems, but raised {type(error).__name__}: {error}") from error
        except Exception as error:
            cure = (
                "report numerical trouble by the status"
                if self.claimed
                else "refuse by a ValueError what it is not for"
            )
            raise verdict.fail(f"solve raised {type(error).__name__}: {error}; {cure}") from error
        applied = operator.total - before
        verdict(identical(kept, b), "solve modifies b in place; work on a copy")
        verdict(identical(matrix, operator.matrix), "solve modifies the operator")
        verdict(
            found.products == applied,
            f"it reports {found.products} products, the operator was applied to {applied} vectors; call flat_mv, "
            "flat_mm or @, which count, and not mv",
        )
        return found

    def judge(self, found: LinearSolution, operator: CountedMatrix, rows: Tensor, verdict: Verdict) -> None:
        """Hold the status and the reported residuals against the true ones."""
        verdict(found.status in ENDS, f"the status is {found.status.name}, which is no end of a linear solve")
        structured = tree.structure(found.value) == tree.structure(operator.like)
        verdict(structured, f"value is {tree.describe(found.value)}, the domain {tree.describe(operator.like)}")
        ours = tree.common_dtype(found.value) == operator.dtype
        verdict(ours, f"value has dtype {tree.common_dtype(found.value)}, the operator {operator.dtype}")
        verdict(not any(leaf.requires_grad for leaf in tree.leaves(found.value)), "value requires grad; detach it")
        b = rows.double() if rows.ndim == 2 else rows.double()[None]
        matrix = operator.matrix.double()
        x = tree.ravel_batch(found.value) if rows.ndim == 2 else tree.ravel(found.value)[None]
        x = x.double()
        if found.status is not Status.CONVERGED and not bool(torch.isfinite(x).all()):
            return
        residuals, norms = (b - x @ matrix.T).norm(dim=1), b.norm(dim=1)
        targets = torch.clamp(self.rtol * norms, min=self.atol)
        # What arithmetic in the operator's dtype cannot tell from the residual.
        noise = 2.0 * b.shape[1] ** 0.5 * self.eps * (self.norm * x.norm(dim=1) + norms)
        tightest = 0.9 * float(torch.finfo(operator.dtype).tiny)
        if found.status is Status.CONVERGED and self.square:
            worst = residuals - 1.01 * targets - noise - tightest
            row = int(torch.nan_to_num(worst, nan=torch.inf).argmax())
            verdict(
                bool(worst[row] <= 0),
                f"the status is CONVERGED, but the true residual is {_share(residuals[row], norms[row])}, asked was "
                f"{self.rtol:.3g}; compute b - A v anew before claiming it",
            )
        elif found.status is Status.CONVERGED:
            self.least_squares(residuals, norms, b, x, noise, verdict)
        elif found.status in (Status.STEP_LIMIT, Status.STALLED) and self.square:
            reached = bool((residuals + noise <= 0.99 * targets).all()) and bool((norms > 0).any())
            verdict(
                not reached,
                f"the status is {found.status.name}, but the true residual is {float(residuals.max()):.3g}, within the "
                "tolerance; read the status off the residual and not off the step count",
            )
        self.reported(found, residuals, norms, noise, verdict)

    def least_squares(
        self, residuals: Tensor, norms: Tensor, b: Tensor, x: Tensor, noise: Tensor, verdict: Verdict
    ) -> None:
        slopes = ((b - x @ self.matrix.T) @ self.matrix).norm(dim=1)
        small = residuals <= 1.01 * torch.clamp(self.rtol * norms, min=self.atol) + noise
        flat = slopes <= 1.01 * self.rtol * self.norm * residuals + self.norm * noise
        share = float((slopes / (self.norm * residuals).clamp(min=1e-300)).max())
        verdict(
            bool((small | flat).all()),
            f"the status is CONVERGED, but neither the residual r nor A^T r vanishes: ||A^T r|| / (||A|| ||r||) is "
            f"{share:.3g}",
        )

    def reported(
        self, found: LinearSolution, residuals: Tensor, norms: Tensor, noise: Tensor, verdict: Verdict
    ) -> None:
        """residual and relative_residual are measurements."""
        if found.status is Status.NONFINITE:
            return
        largest = float(torch.finfo(self.system.matrix.dtype).max)
        if float(norms.max() if len(norms) else 0.0) > largest**0.5:  # a float32 number may not hold its square
            return
        true = float(residuals.max()) if len(residuals) else 0.0
        allowed = 0.02 * true + float(noise.max()) if len(noise) else 0.0
        gap = abs(found.residual - true)
        verdict(
            gap <= allowed,
            f"residual is reported as {found.residual:.3g}, it is {true:.3g}; measure ||b - A v|| and do not update it",
        )
        positive = norms > 0
        shares = torch.where(positive, residuals / torch.where(positive, norms, 1.0), residuals)
        relative = float(shares.max()) if len(shares) else 0.0
        slack = float((noise / torch.where(positive, norms, 1.0)).max()) if len(noise) else 0.0
        gap = abs(found.relative_residual - relative)
        verdict(
            gap <= 0.02 * relative + slack,
            f"relative_residual is reported as {found.relative_residual:.3g}, it is {relative:.3g}",
        )

    def solved(self, rows: Tensor, where: str, **options: Any) -> tuple[CountedMatrix, LinearSolution]:
        """A solve that has to converge."""
        verdict = self.verdict.at(where) if where else self.verdict
        operator = options.pop("operator", None) or self.system.operator()
        found = self.run(operator, rows, verdict, **options)
        assert found is not None
        self.judge(found, operator, rows, verdict)
        verdict(
            found.status is Status.CONVERGED,
            f"it is for these systems and this one is easy, but ended as {found.status.name} with relative residual "
            f"{found.relative_residual:.3g}: {found.message}",
        )
        return operator, found

    # -------------------------------------------------------------- aspects

    def truth(self) -> None:
        """Whatever the system, the status is true; an easy one that the solver is for is solved."""
        if self.bound:
            self.solved(self.system.b, "")
            return
        operator = self.system.operator()
        found = self.run(operator, self.system.b, self.verdict)
        if found is not None:
            self.judge(found, operator, self.system.b, self.verdict)

    def promises(self) -> None:
        """What holds for every system that the solver is for, on one of each kind."""
        for aspect in (
            self.repeated,
            self.sizes,
            self.batched,
            self.limits,
            self.nonfinite,
            self.transposed,
            self.keys,
        ):
            aspect()

    def sizes(self) -> None:
        """Zero, tiny, huge, sparse."""
        b = self.system.b
        _, found = self.solved(torch.zeros_like(b), "b = 0")
        size = float(tree.max_abs(found.value))
        self.verdict(size == 0.0, f"the answer for b = 0 has entries of size {size:.3g} instead of zero")
        reference = self.solved(b, "")[1].value
        length = float(tree.norm(reference))
        for scale in (1e-30, 1e30):
            scaled = (b.double() * scale).to(b.dtype)
            where = f"b times {scale:.0e}"
            value = self.solved(scaled, where)[1].value
            error = distance(tree.map(lambda leaf, s=scale: leaf.double() / s, value), reference) / length
            allowed = 100.0 * self.condition() * max(self.rtol, self.eps)
            cause = "scale b to order one first: squares of such numbers leave the range of the dtype"
            self.verdict.at(where).close(error, allowed, "the scaled answer is off", cause)
        if self.system.kind in ("spd", "symmetric", "general"):
            sparse = torch.where(torch.arange(len(b)) % 3 == 0, b, torch.zeros_like(b))
            self.solved(sparse, "b with exact zeros")
            self.solved(torch.ones_like(b), "b with equal entries")

    def condition(self) -> float:
        values = torch.linalg.svdvals(self.matrix)
        values = values[values > 1e-6 * values.max()]
        return float(values.max() / values.min())

    def starts(self) -> None:
        """x0 exact, x0 far off, x0 untouched."""
        b = self.system.b
        exact = torch.linalg.lstsq(self.matrix, b.double()[:, None], driver="gelsd").solution[:, 0].to(b.dtype)
        for where, rows in (("x0 = the solution", exact), ("x0 far off", 1e3 * normal(71, len(exact), dtype=b.dtype))):
            x0 = tree.unravel(rows, self.system.operator().like)
            kept = tree.clone(x0)
            value = self.solved(b, where, x0=x0)[1].value
            self.verdict.at(where)(identical(kept, x0), "solve modifies x0 in place; work on a copy")
            shared = shares_memory(value, x0) or shares_memory(value, b)
            self.verdict.at(where)(not shared, "value shares the memory of x0 or b; clone it")

    def batched(self) -> None:
        """k right-hand sides: each is as good as alone; those that converge early stay put."""
        b = self.system.b
        if self.system.kind == "rectangular":
            rows = torch.stack([b, torch.zeros_like(b), 1e-3 * b])
        else:
            image = (self.matrix @ normal(72, len(b))).to(b.dtype)
            vectors = (
                torch.linalg.eigh(self.matrix)[1] if self.system.operator().symmetric else torch.eye(len(b)).double()
            )
            rows = torch.stack([b, torch.zeros_like(b), 1e-6 * image, (self.matrix @ vectors[:, -1]).to(b.dtype)])
        where = f"{len(rows)} right-hand sides"
        value = tree.ravel_batch(self.solved(rows, where)[1].value)
        zero = float(value[1].abs().max())
        self.verdict.at(where)(zero == 0.0, f"the answer for the row b = 0 has entries of size {zero:.3g}, not zero")
        _, one = self.solved(rows[:1], "one right-hand side with a leading axis")
        shape = tuple(tree.ravel_batch(one.value).shape)
        self.verdict(
            shape == (1, self.matrix.shape[1]), f"with one batched right-hand side the value has shape {shape}"
        )

    def limits(self) -> None:
        """max_steps is obeyed, and says nothing about success."""
        if not is_dataclass(self.solver) or "max_steps" not in {f.name for f in fields(self.solver)}:
            return
        b = self.system.b
        needed = self.solved(b, "")[1].steps
        for limit in sorted({1, max(1, needed // 2), needed}):
            limited: Any = replace(self.solver, max_steps=limit)  # pyright: ignore[reportArgumentType]
            verdict = self.verdict.at(f"max_steps={limit}")
            operator = self.system.operator()
            found = self.run(operator, b, verdict, solver=limited)
            assert found is not None
            verdict(found.steps <= limit, f"it took {found.steps} steps")
            self.judge(found, operator, b, verdict)
            if limit >= needed:
                verdict(
                    found.status is Status.CONVERGED,
                    f"it converges in {needed} steps, but with that limit ended as {found.status.name}; read the "
                    "status off the residual and not off the step count",
                )

    def nonfinite(self) -> None:
        """NaN and infinity end as NONFINITE."""
        b = self.system.b
        for where, matrix, rows in (
            ("NaN in the operator", _spoiled(self.system.matrix, torch.nan), b),
            ("NaN in b", self.system.matrix, _spoiled(b, torch.nan)),
            ("infinity in b", self.system.matrix, _spoiled(b, torch.inf)),
        ):
            operator = self.system.operator()
            operator.matrix = matrix
            found = self.run(operator, rows, self.verdict.at(where))
            assert found is not None
            ended = found.status is Status.NONFINITE
            self.verdict.at(where)(ended, f"the status is {found.status.name} instead of NONFINITE")

    def transposed(self) -> None:
        """A^T u = c, with what was prepared for A where the solver can turn it."""
        if not self.square:
            return
        operator = self.system.operator()
        c = self.system.b
        turned = operator.T
        own, self.matrix = self.matrix, operator.T.matrix.double()
        try:
            self.solved(c, "transposed", operator=turned)
            with self.verdict.runs("preparing the transposed solve"), quiet():
                prepared = self.solver.transpose(self.solver.init(operator))
            self.solved(c, "transposed, prepared for A", operator=turned, prepared=prepared)
        finally:
            self.matrix = own

    def keys(self) -> None:
        """b with its keys in another order."""
        operator = self.system.operator()
        b = tree.unravel(self.system.b, operator.out)
        with quiet():
            straight = self.solver.solve(operator, b)
            found = self.solver.solve(operator, reordered(b))
        same = tree.structure(found.value) == tree.structure(operator.like) and identical(straight.value, found.value)
        self.verdict(same, "reordering the keys of b changes the answer; leaves are paired by position")

    def repeated(self) -> None:
        """Twice the same, and no global random numbers."""
        state = torch.get_rng_state()
        first, second = (self.solved(self.system.b, "")[1].value for _ in range(2))
        gap = distance(first, second)
        self.verdict(identical(first, second), f"two solves of one system differ by {gap:.3g}; seed what is random")
        self.verdict(
            torch.equal(state, torch.get_rng_state()), "it draws from the global random generator; seed its own"
        )


def _spoiled(values: Tensor, number: float) -> Tensor:
    spoiled = values.clone()
    spoiled.view(-1)[-1] = number
    return spoiled


def _share(residual: Tensor, norm: Tensor) -> str:
    return f"{float(residual / norm):.3g} ||b||" if float(norm) > 0 else f"{float(residual):.3g} for b = 0"
