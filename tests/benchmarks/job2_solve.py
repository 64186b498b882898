"""Job 2: a whole bilevel solve, to a true hypergradient norm of 1e-5.

    python tests/benchmarks/job2_solve.py [--rounds 3] [--quick] [--no-peers] [--json FILE] [--data-dir DIR]

Ridge regression with one log-penalty x_j per feature (500), 1,000 rows for training and as many for validation:

    g(x, y) = |A y - a|^2 / 2n + 1/2 sum_j exp(x_j) y_j^2,    f(x, y) = |B y - b|^2 / 2m + 1e-3/2 |x - x0|^2.

Every recipe stops at the first point where the hypergradient that it sees has a norm of at most 1e-5. The true norm
there is measured afterwards by a dense solve: a recipe that misses it has stopped at a wrong point. Compilation is
reported apart.
"""

import argparse
import functools
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import peers
import scipy.linalg
import scipy.optimize
import torch
from peers import Cell, Comparison, Row, conjugate_gradients
from torch import Tensor

import bilevel

TARGET = 1e-5
PRIOR = 1e-3
INNER = 1e-9
"""Lower gradient norm of the recipes that solve the lower level by iteration."""
PATIENCE = 30.0
"""Seconds after which a recipe gives up."""


@dataclass(frozen=True)
class Answer:
    """Where a recipe stopped.

    Attributes:
        x: there, shape (n,).
        seen: the hypergradient norm that it saw.
        steps: outer iterations, where they can be told from evaluations.
        evaluations: hypergradients evaluated.
    """

    x: Tensor
    seen: float
    steps: int | None
    evaluations: int


@dataclass(frozen=True)
class Problem:
    train: Tensor
    train_t: Tensor
    valid: Tensor
    valid_t: Tensor
    x0: Tensor
    origin: str

    def data_term(self, x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * ((self.train @ y - self.train_t) ** 2).mean()

    def regularizer(self, x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (torch.exp(x) * y**2).sum()

    def lower(self, x: Tensor, y: Tensor) -> Tensor:
        return self.data_term(x, y) + self.regularizer(x, y)

    def upper(self, x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * ((self.valid @ y - self.valid_t) ** 2).mean() + 0.5 * PRIOR * ((x - self.x0) ** 2).sum()

    def inner_step(self) -> float:
        """1/L at the start, for the recipes with a fixed inner step."""
        hessian = self.train.T @ self.train / len(self.train) + torch.diag(torch.exp(self.x0))
        return 1.0 / float(torch.linalg.eigvalsh(hessian)[-1])

    def truth(self, x: Tensor) -> tuple[float, float]:
        """F(x) and the norm of its gradient, by dense algebra."""
        n = len(self.train)
        hessian = self.train.T @ self.train / n + torch.diag(torch.exp(x))
        y = torch.linalg.solve(hessian, self.train.T @ self.train_t / n)
        v = torch.linalg.solve(hessian, self.valid.T @ (self.valid @ y - self.valid_t) / len(self.valid))
        slope = PRIOR * (x - self.x0) - torch.exp(x) * y * v
        return float(self.upper(x, y)), float(torch.linalg.vector_norm(slope))


def load(arguments: argparse.Namespace) -> Problem:
    """The stored inputs; where there are none, features of unequal scale and a sparse truth."""
    stored, origin = peers.inputs(arguments, "job2"), "stored inputs"
    if stored is None:
        rows, features = (60, 10) if arguments.toy else (1_000, 500)
        rng = np.random.default_rng(0)
        design = rng.normal(size=(2 * rows, features)) * np.exp(0.4 * rng.normal(size=features))
        weights = rng.normal(size=features) * (rng.random(features) < 0.2)
        response = design @ weights + 2.0 * rng.normal(size=2 * rows)
        stored = {"Xtr": design[:rows], "ytr": response[:rows], "Xva": design[rows:], "yva": response[rows:]}
        origin, stored["lam0"] = "drawn inputs", np.full(features, -2.0)
    names = ("Xtr", "ytr", "Xva", "yva", "lam0")
    return Problem(*(torch.from_numpy(np.ascontiguousarray(stored[name])) for name in names), origin)


# --- outer loops, for those who bring a hypergradient only

Oracle = Callable[[Tensor], tuple[float, Tensor]]


class _Stop(Exception):
    """Raised inside an outer loop that knows no such stopping rule."""


class Watched:
    """A hypergradient that ends the outer loop around it as soon as its norm is at most the target."""

    def __init__(self, oracle: Oracle) -> None:
        self.oracle, self.evaluations, self.seen = oracle, 0, float("inf")
        self.x = torch.empty(0)
        self.began = time.perf_counter()

    def __call__(self, x: Tensor) -> tuple[float, Tensor]:
        value, slope = self.oracle(x)
        self.evaluations += 1
        self.x, self.seen = x.detach().clone(), float(torch.linalg.vector_norm(slope))
        if self.seen <= TARGET:
            raise _Stop
        if time.perf_counter() - self.began > PATIENCE:
            raise TimeoutError(f"norm {self.seen:.2g} after {PATIENCE:g} s and {self.evaluations} evaluations")
        return value, slope


def torch_lbfgs(oracle: Oracle, x0: Tensor) -> Answer:
    watched, x = Watched(oracle), x0.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [x], max_iter=1_000, max_eval=10_000, tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        value, x.grad = watched(x.detach())
        return value

    with suppress(_Stop):
        optimizer.step(closure)
    return Answer(watched.x, watched.seen, optimizer.state[x].get("n_iter"), watched.evaluations)


def scipy_lbfgs(oracle: Oracle, x0: Tensor) -> Answer:
    watched, steps = Watched(oracle), 0

    def fn(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, slope = watched(torch.from_numpy(x.copy()))
        return value, slope.numpy()

    def count(_: np.ndarray) -> None:
        nonlocal steps
        steps += 1

    options = {"maxiter": 1_000, "maxfun": 10_000, "ftol": 0.0, "gtol": 0.0}
    try:
        scipy.optimize.minimize(fn, x0.numpy(), jac=True, method="L-BFGS-B", callback=count, options=options)
    except _Stop:
        steps += 1  # the step that arrived
    return Answer(watched.x, watched.seen, steps, watched.evaluations)


# --- ours


def our_rows(problem: Problem) -> list[Row]:
    y0 = torch.zeros_like(problem.x0)

    def run(declared: bilevel.BilevelProblem) -> Answer:
        found = bilevel.solve(declared, bilevel.ImplicitGradient(), problem.x0, y0, rtol=0.0, atol=TARGET)
        assert found.accuracy.stationarity is not None
        return Answer(found.x, found.accuracy.stationarity, found.steps, found.counts["upper"])

    plain = bilevel.BilevelProblem(problem.upper, problem.lower)
    split = bilevel.BilevelProblem(problem.upper, problem.data_term, regularizer=problem.regularizer)
    return [
        Row("ours: ImplicitGradient, declared plainly", functools.partial(run, plain)),
        Row("ours: ImplicitGradient, regularizer declared", functools.partial(run, split)),
    ]


# --- written by hand


def hand_rows(problem: Problem) -> list[Row]:
    n, m = len(problem.train), len(problem.valid)
    moment = problem.train.T @ problem.train_t / n
    gram = problem.train.T @ problem.train / n

    def closed_form(x: Tensor) -> tuple[float, Tensor]:
        p = x.detach().requires_grad_()
        y = torch.linalg.solve(gram + torch.diag(torch.exp(p)), moment)
        value = problem.upper(p, y)
        (slope,) = torch.autograd.grad(value, p)
        return float(value.detach()), slope

    def cholesky() -> Oracle:
        gram_, moment_, valid, valid_t = gram.numpy(), moment.numpy(), problem.valid.numpy(), problem.valid_t.numpy()
        x0 = problem.x0.numpy()

        def oracle(x: Tensor) -> tuple[float, Tensor]:
            p = x.numpy()
            factor = scipy.linalg.cho_factor(gram_ + np.diag(np.exp(p)), check_finite=False)
            y = scipy.linalg.cho_solve(factor, moment_, check_finite=False)
            rest = valid @ y - valid_t
            v = scipy.linalg.cho_solve(factor, valid.T @ rest / m, check_finite=False)
            value = 0.5 * rest @ rest / m + 0.5 * PRIOR * ((p - x0) ** 2).sum()
            return float(value), torch.from_numpy(PRIOR * (p - x0) - np.exp(p) * y * v)

        return oracle

    def warm_cg() -> Oracle:
        y, v = torch.zeros_like(problem.x0), torch.zeros_like(problem.x0)

        def oracle(x: Tensor) -> tuple[float, Tensor]:
            nonlocal y, v
            p = x.detach().requires_grad_()
            q = y.requires_grad_()
            (slope,) = torch.autograd.grad(problem.lower(p, q), q, create_graph=True)

            def product(u: Tensor) -> Tensor:
                return torch.autograd.grad(slope, q, u, retain_graph=True)[0]

            # g is quadratic: one Newton step solves it
            newton, _ = conjugate_gradients(product, slope.detach(), INNER)
            y = (y - newton).detach()
            p, q = x.detach().requires_grad_(), y.clone().requires_grad_()
            value = problem.upper(p, q)
            direct, b = torch.autograd.grad(value, (p, q))
            (slope,) = torch.autograd.grad(problem.lower(p, q), q, create_graph=True)
            v, _ = conjugate_gradients(product, b, INNER, start=v)
            return float(value.detach()), direct - torch.autograd.grad(slope, p, v)[0]

        return oracle

    return [
        Row("by hand: Cholesky gradient + scipy L-BFGS-B", lambda: scipy_lbfgs(cholesky(), problem.x0)),
        Row("by hand: linalg.solve, autograd + torch LBFGS", lambda: torch_lbfgs(closed_form, problem.x0)),
        Row("by hand: warm-started CG, double backward + torch LBFGS", lambda: torch_lbfgs(warm_cg(), problem.x0)),
    ]


# --- other libraries


def torchopt_rows(problem: Problem) -> list[Row]:
    import torchopt.diff.implicit
    from torchopt.linear_solve import solve_cg

    optimality = torch.func.grad(lambda y, x: problem.lower(x, y))

    def inner(init: Tensor, x: Tensor) -> Tensor:
        q, p = init.clone().requires_grad_(), x.detach()
        optimizer = torch.optim.LBFGS(
            [q], max_iter=1_000, tolerance_grad=INNER, tolerance_change=0, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = problem.lower(p, q)
            loss.backward()
            return loss

        with torch.enable_grad():
            optimizer.step(closure)
        return q.detach()

    wrapped = torchopt.diff.implicit.custom_root(optimality, argnums=1, solve=solve_cg(rtol=1e-8))(inner)

    def oracle() -> Oracle:
        y = torch.zeros_like(problem.x0)

        def evaluate(x: Tensor) -> tuple[float, Tensor]:
            nonlocal y
            p = x.detach().requires_grad_()
            q = wrapped(y, p)
            y = q.detach()
            value = problem.upper(p, q)
            value.backward()
            assert p.grad is not None
            return float(value.detach()), p.grad

        return evaluate

    name = "TorchOpt: custom_root, solve_cg(rtol=1e-8), torch LBFGS inside, warm + torch LBFGS"
    return [Row(name, lambda: torch_lbfgs(oracle(), problem.x0))]


def jaxopt_rows(problem: Problem) -> list[Row]:
    import jax
    import jaxopt
    from jaxopt.linear_solve import solve_cg

    jax.config.update("jax_enable_x64", True)
    jnp = jax.numpy
    train, train_t = jnp.asarray(problem.train.numpy()), jnp.asarray(problem.train_t.numpy())
    valid, valid_t = jnp.asarray(problem.valid.numpy()), jnp.asarray(problem.valid_t.numpy())
    x0 = jnp.asarray(problem.x0.numpy())

    def lower(y: Any, x: Any) -> Any:
        return 0.5 * ((train @ y - train_t) ** 2).mean() + 0.5 * (jnp.exp(x) * y**2).sum()

    solve = functools.partial(solve_cg, tol=1e-8)
    inner = jaxopt.LBFGS(lower, tol=INNER, maxiter=1_000, implicit_diff=True, implicit_diff_solve=solve)

    def upper(x: Any, y0: Any) -> Any:
        y = inner.run(y0, x).params
        return 0.5 * ((valid @ y - valid_t) ** 2).mean() + 0.5 * PRIOR * ((x - x0) ** 2).sum(), y

    step = jax.jit(jax.value_and_grad(upper, has_aux=True))

    def oracle() -> Oracle:
        y = jnp.zeros_like(x0)

        def evaluate(x: Tensor) -> tuple[float, Tensor]:
            nonlocal y
            (value, y), slope = step(jnp.asarray(x.numpy()), y)
            return float(value), torch.from_numpy(np.array(slope))

        return evaluate

    name = "jaxopt: LBFGS inside, warm, solve_cg(tol=1e-8), jit + scipy L-BFGS-B"
    return [Row(name, lambda: scipy_lbfgs(oracle(), problem.x0), prepare=lambda: oracle()(problem.x0))]


def hypertorch_rows(problem: Problem) -> list[Row]:
    import hypergrad

    def oracle() -> Oracle:
        state = [torch.zeros_like(problem.x0), torch.zeros_like(problem.x0)]

        def evaluate(x: Tensor) -> tuple[float, Tensor]:
            nonlocal state
            p = x.detach().requires_grad_()
            heavy = hypergrad.HeavyBall(lambda q, h: problem.lower(h[0], q[0]), step, 0.9)
            state = [s.detach().requires_grad_() for s in state]
            for _ in range(100):
                state = [s.detach().requires_grad_() for s in heavy(state, [p], create_graph=False)]
            (slope,) = hypergrad.CG(
                state[:1],
                [p],
                K=500,
                fp_map=lambda q, h: [q[0] - torch.autograd.grad(problem.lower(h[0], q[0]), q, create_graph=True)[0]],
                outer_loss=lambda q, h: problem.upper(h[0], q[0]),
                tol=INNER,
                set_grad=False,
            )
            return float(problem.upper(x, state[0].detach())), slope.detach()

        return evaluate

    step = problem.inner_step()
    return [Row("hypertorch: HeavyBall 100, warm, CG + torch LBFGS", lambda: torch_lbfgs(oracle(), problem.x0))]


def betty_rows(problem: Problem) -> list[Row]:
    from betty.configs import Config, EngineConfig
    from betty.engine import Engine

    Point, Lower, Plain = peers.betty_levels(problem)

    class Upper(Plain):
        def optimizer_step(self, *arguments: Any, **options: Any) -> None:
            self.watched(self.module.value)
            super().optimizer_step(*arguments, **options)

    def run(steps: int) -> Answer:
        lower, upper = Point(torch.zeros_like(problem.x0)), Point(problem.x0)
        config = Config(type="neumann", neumann_iterations=steps, neumann_alpha=length, unroll_steps=steps)
        below = Lower("lower", config, lower, torch.optim.SGD(lower.parameters(), lr=length), device="cpu")
        above = Upper(
            "upper", Config(retain_graph=True), upper, torch.optim.Adam(upper.parameters(), lr=0.1), device="cpu"
        )
        above.watched = Watched(lambda x: (0.0, x.grad))
        dependencies = {"u2l": {above: [below]}, "l2u": {below: [above]}}
        engine = Engine([above, below], EngineConfig(train_iters=10**9, valid_step=10**9), dependencies)
        with suppress(_Stop):
            engine.run()
        found = above.watched
        return Answer(found.x, found.seen, found.evaluations, found.evaluations)

    length = problem.inner_step()
    return [Row("Betty: 50 SGD steps, neumann 50 + torch Adam(0.1)", functools.partial(run, 50))]


def table(arguments: argparse.Namespace) -> list[dict[str, Cell]]:
    """Run everything and print; returns the table."""
    problem = load(arguments)
    slow = arguments.peers and not arguments.quick
    comparison = Comparison(our_rows(problem) + hand_rows(problem))
    comparison.add_peer("TorchOpt", lambda: torchopt_rows(problem), arguments.peers)
    comparison.add_peer("jaxopt", lambda: jaxopt_rows(problem), arguments.peers)
    comparison.add_peer("hypertorch", lambda: hypertorch_rows(problem), slow)
    comparison.add_peer("Betty", lambda: betty_rows(problem), slow)
    comparison.run(arguments, warm_up=False, budget=12.0)
    measured: list[dict[str, Cell]] = []
    for row in comparison.rows:
        answer: Answer = row.answer
        value, norm = problem.truth(answer.x)
        measured.append(
            {
                "row": row.name,
                "median s": row.median,
                "min s": min(row.seconds),
                "runs": len(row.seconds),
                "outer steps": answer.steps,
                "evaluations": answer.evaluations,
                "upper value": f"{value:.6f}",
                "norm it saw": f"{answer.seen:.1e}",
                "true norm": f"{norm:.1e}",
                "compile s": row.compile_seconds,
            }
        )
    sizes = f"{problem.train.shape[1]} features, {len(problem.train)} + {len(problem.valid)} rows, {problem.origin}"
    peers.finish(arguments, f"Job 2: a whole solve, {sizes}, float64", comparison, measured)
    return measured


def main() -> None:
    peers.settle()
    table(peers.parser(__doc__ or "", rounds=3).parse_args())


if __name__ == "__main__":
    main()
