"""AdaSketch-Newton: Newton on the KKT conditions, globalised by the exact augmented Lagrangian."""

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from constrained.lagrangian import Lagrangian, Point
from constrained.merit import ExactAugmentedLagrangian, Slope, Terms
from constrained.method import ConstrainedMethod, ConstrainedState, smallest_curvature
from constrained.multipliers import FlatMultipliers
from constrained.newton_direction import NewtonSystem, corrected
from constrained.problem import Problem
from constrained.residual import largest, measure
from implicit import LDLT, MINRES, LinearSolver, SparseLU, Status


@dataclass(kw_only=True)
class AdaSketchNewtonState(ConstrainedState):
    mu: float
    nu: float
    objective_weight: float
    constraint_weights: Tensor
    shift: float = 0.0
    restoring: bool = False
    restore_shift: float = 0.0
    target: float = 0.0
    failures: int = 0
    escapes: int = 0
    memory: list[float] = field(default_factory=list)
    residual: float = math.nan


@dataclass(frozen=True, kw_only=True)
class AdaSketchNewton(ConstrainedMethod[AdaSketchNewtonState]):
    linear_solver: LinearSolver | None = None
    mu: float = 1.0
    nu: float = 0.1
    delta: float = 0.1
    xi_b: float = 0.1
    beta: float = 0.1
    rho: float = 1.5
    memory: int = 5
    scaling: bool = True
    correction: bool = True
    reset: bool = True

    default_max_steps: ClassVar[int] = 1000

    def resolve(self, problem: Lagrangian, *start: Tensor, max_steps: int | None = None) -> Self:
        own = super().resolve(problem, *start, max_steps=max_steps)
        if own.linear_solver is None:
            own = replace(own, linear_solver=LDLT())
        return own

    def init(self, problem: Lagrangian, *start: Any, generator: torch.Generator | None = None) -> AdaSketchNewtonState:
        x, given = start
        point = problem.at(x)
        w, s = 1.0, x.new_ones(problem.equalities)
        flat = problem.flat_multipliers()
        if point.finite:
            if self.scaling:
                w = min(1.0, 100.0 / max(float(largest(point.gradient)), 1e-300))
                w = max(w, 1e-8)
                rows = point.jacobian.to_dense().abs().amax(dim=1)
                s = torch.clamp(100.0 / rows.clamp(min=1e-300), max=1.0, min=1e-8)
            flat = given if given is not None else flat._replace(equality=self._estimate(point))
        return AdaSketchNewtonState(
            x=x.clone(), equality=flat.equality.clone(), inequality=flat.inequality, lower=flat.lower, upper=flat.upper,
            generator=generator, point=point, mu=self.mu, nu=self.nu, objective_weight=w, constraint_weights=s)

    def _enter(self, state, c):
        state.restoring = True
        state.target = 0.1 * float((c*state.constraint_weights).norm())
        state.restore_shift = 0.0

    def _estimate(self, point: Point, limit: float = 1e3) -> Tensor:
        n, m = point.lagrangian.n, point.lagrangian.equalities
        J = point.jacobian.to_dense()
        lam = torch.linalg.lstsq(J.T, -point.gradient, driver="gelsd").solution
        return torch.zeros_like(lam) if not bool(torch.isfinite(lam).all()) or lam.abs().max() > limit else lam

    def terminate(self, problem: Lagrangian, state: AdaSketchNewtonState) -> Status:
        if state.verdict:
            return Status[state.verdict]
        point = state.at(problem)
        if not point.finite:
            return Status.NONFINITE
        r = float(measure(problem, point, state.multipliers).max())
        state.residual = r
        if r <= self.atol:
            return Status.CONVERGED
        return Status.RUNNING

    def step(self, problem: Lagrangian, state: AdaSketchNewtonState):
        if state.restoring:
            return self._restore(problem, state)
        point = state.at(problem)
        lam = state.equality
        merit = ExactAugmentedLagrangian(state.objective_weight, state.constraint_weights)
        grad, c = point.lagrangian_gradient(lam), point.constraints
        H, J = point.hessian(lam), point.jacobian
        n = problem.n
        w = state.objective_weight
        dw = state.constraint_weights.new_ones(problem.equalities) #/ state.constraint_weights**2
        found = corrected(H, J, self.linear_solver, -torch.cat([grad, c]), last_shift=state.shift, dual_weights=dw)
        if found is None:
            state.verdict = "STALLED"
            return {"residual": state.residual}
        system, z, _ = found
        d, dl = z[:n], z[n:]
        left = float((state.constraint_weights * (c + J.flat_mv(d))).norm())
        if system.dual_shift and left > 0.1 * float((state.constraint_weights * c).norm()) and float(largest(c)) > self.atol:
            self._enter(state, c)
            return self._restore(problem, state)
        slope = merit.slope(point, lam, H, d, dl)
        terms = merit.terms(point, lam)
        rejected = 0
        while slope.at(state.mu, state.nu) > -0.5 * state.nu * terms.residual and state.mu < 1e8 and state.nu > 1e-8:
            state.mu *= self.rho**2
            state.nu /= self.rho
            rejected += 1
        state.shift = system.shift if system.shift > 0 else 0.0
        mu, nu = state.mu, state.nu
        state.memory = (state.memory + [terms.lagrangian, terms.infeasibility, terms.stationarity])[-3 * self.memory:]
        reference = max(Terms(*state.memory[i:i+3]).at(mu, nu) for i in range(0, len(state.memory), 3))
        reference = max(reference, terms.at(mu, nu))
        sl = slope.at(mu, nu)
        a, ok, soc = 1.0, False, 0
        while a > 1e-10 and sl < 0:
            trial = problem.at(state.x + a * d)
            lt = lam + a * dl
            if self._accept(trial, lt, merit, mu, nu, reference + a * self.beta * sl + 1e-14*abs(reference)):
                ok = True
                break
            if a == 1.0 and self.correction and trial.finite and (trial.constraints*state.constraint_weights).norm() >= (c*state.constraint_weights).norm():
                z2, _ = system.solve(-torch.cat([grad, c + trial.constraints]))
                trial = problem.at(state.x + z2[:n])
                lt = lam + z2[n:]
                if self._accept(trial, lt, merit, mu, nu, reference + self.beta * sl):
                    ok, soc = True, 1
                    break
            a *= 0.5
        if ok:
            state.x, state.equality, state.point = trial.x, lt, trial
            if system.shift > 0 and self.reset:
                other = self._estimate(trial, math.inf)
                if merit.terms(trial, other).at(mu, nu) <= merit.terms(trial, lt).at(mu, nu):
                    state.equality = other
        else:
            viol = float(largest(c))
            if viol > self.atol:
                self._enter(state, c)
            else:
                state.verdict = "STALLED"
        return {"residual": float(measure(problem, state.at(problem), state.multipliers).max()), "stationarity": float(largest(grad)), "feasibility": float(largest(c)), "objective": float(point.objective),
            "step": a if ok else 0.0, "mu": mu, "nu": nu, "shift": system.shift, "rejected": rejected, "soc": soc, "lam": float(largest(state.equality)), "restore": 0.0}

    def _accept(self, trial, lt, merit, mu, nu, bound):
        if not trial.finite or merit.floor(trial, lt, mu) > bound:
            return False
        v = merit.terms(trial, lt).at(mu, nu)
        return v <= bound

    def _restore(self, problem, state):
        point = state.at(problem)
        s2 = state.constraint_weights**2
        c, J = point.constraints, point.jacobian
        n = problem.n
        H = point.hessian(s2 * c, 0.0)
        g = J.T.flat_mv(s2 * c)
        dw = 1 / s2
        cn = float((s2 * c * c).sum())
        values = {"objective": float(point.objective), "feasibility": float(largest(c)), "restore": 1.0}
        jn = float((state.constraint_weights[:,None]*J.to_dense()).norm())
        gs = float(g.norm()) / max(1e-300, cn**0.5) / max(1.0, jn)
        found = corrected(H, J, self.linear_solver, -torch.cat([torch.zeros(n), c]), last_shift=state.restore_shift, dual_shift=1.0, dual_weights=dw)
        values["gs"] = gs
        viol = float(largest(c))
        if found is None:
            state.verdict = "INFEASIBLE" if gs < 1e-6 else "STALLED"
            return values
        system, z, _ = found
        d = z[:n]
        if gs < 1e-8 and viol > self.atol:
            if system.shift > 0:
                full = H.to_dense() + J.to_dense().T @ (s2[:,None] * J.to_dense())
                ev, V = torch.linalg.eigh(full)
                if ev[0] < -1e-6 * ev.abs().max():
                    d = V[:,0]
                    d = d * (-1.0 if g @ d > 0 else 1.0) * max(1.0, float(state.x.norm()))
                    system = None
            if system is not None:
                state.verdict = "INFEASIBLE"
                return values
        if system is not None:
            state.restore_shift = system.shift
            values["shift"] = system.shift
        a, ok = 1.0, False
        sl = float(g @ d)
        while a > 1e-10:
            trial = problem.at(state.x + a * d)
            if trial.finite:
                t = float((s2 * trial.constraints**2).sum())
                if t <= cn + 2 * 1e-4 * a * sl and t < cn:
                    ok = True
                    break
            a *= 0.5
        values["step"] = a
        if not ok:
            state.verdict = "INFEASIBLE" if gs < 1e-4 and viol > self.atol else "STALLED"
            return values
        state.x, state.point = trial.x, trial
        if t**0.5 <= state.target:
            state.restoring = False
            state.equality = self._estimate(trial)
            state.memory = []
            state.mu, state.nu = self.mu, self.nu
            state.shift = 0.0
        values["residual"] = float(measure(problem, state.at(problem), state.multipliers).max())
        return values
