"""Job 1: one hypergradient at a given lower solution, at a relative linear residual of 1e-8.

    python tests/benchmarks/job1_hypergradient.py [--rounds 9] [--quick] [--no-peers] [--json FILE] [--data-dir DIR]

Multinomial logistic regression on scikit-learn's digits: 640 lower variables, 64 log-penalties x_j,

    g(x, y) = cross-entropy(A y) + 1/2 sum_j exp(x_j) |y_j|^2,    f(x, y) = cross-entropy on 797 other images.

Everybody gets the same y. Errors are measured against dense float64 algebra that shares no code with any row.
"""

import argparse
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import peers
import torch
from peers import Cell, Comparison, Row, conjugate_gradients
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import cross_entropy

import implicit

RTOL = 1e-8

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Answer:
    """A hypergradient, with the adjoint v and the number of Hessian products where the route shows them."""

    value: Tensor
    adjoint: Tensor | None = None
    products: int | None = None


@dataclass(frozen=True)
class Problem:
    """Data, the point, and the exact answer there."""

    train: Tensor
    train_labels: Tensor
    valid: Tensor
    valid_labels: Tensor
    x: Tensor  # (64,) log-penalties
    y: Tensor  # (64, 10) weights
    hessian: Tensor  # (640, 640)
    rhs: Tensor  # (640,) the gradient of f in y
    exact: Tensor  # (64,)
    largest: float  # eigenvalue of the Hessian
    origin: str

    def lower(self, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(self.train @ y, self.train_labels) + self.regularizer(x, y)

    def regularizer(self, x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (torch.exp(x)[:, None] * y**2).sum()

    def upper(self, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(self.valid @ y, self.valid_labels)

    def error(self, value: Tensor) -> float:
        return float(torch.linalg.vector_norm(value - self.exact) / torch.linalg.vector_norm(self.exact))

    def residual(self, adjoint: Tensor) -> float:
        missed = self.hessian @ adjoint.reshape(-1) - self.rhs
        return float(torch.linalg.vector_norm(missed) / torch.linalg.vector_norm(self.rhs))


def dense_terms(data: Tensor, labels: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient (640,) and Hessian (640, 640) of the mean cross-entropy at y, written out."""
    n, classes = len(data), y.shape[1]
    p = torch.softmax(data @ y, dim=1)
    gradient = data.T @ (p - torch.nn.functional.one_hot(labels, classes)) / n
    blocks = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]  # (n, c, c)
    hessian = torch.einsum("ni,nab,nj->iajb", data, blocks, data) / n
    return gradient.reshape(-1), hessian.reshape(y.numel(), y.numel())


def load(arguments: argparse.Namespace) -> Problem:
    """The stored inputs; where there are none, the same construction with penalties of its own."""
    images, digits = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(images))
    images, digits = images[order] / 16, digits[order]
    split, end = (100, 200) if arguments.toy else (1_000, len(images))
    stored = peers.inputs(arguments, "job1")
    x = torch.from_numpy(stored["lam"] if stored else rng.normal(-5.0, 1.0, 64))
    train, valid = torch.from_numpy(images[:split]), torch.from_numpy(images[split:end])
    train_labels, valid_labels = torch.from_numpy(digits[:split]), torch.from_numpy(digits[split:end])
    penalty = torch.exp(x)[:, None].expand(64, 10).reshape(-1)
    y = torch.from_numpy(stored["w"]) if stored else torch.zeros(64, 10, dtype=torch.float64)
    while True:  # Newton's method
        gradient, hessian = dense_terms(train, train_labels, y)
        gradient, hessian = gradient + penalty * y.reshape(-1), hessian + torch.diag(penalty)
        if float(torch.linalg.vector_norm(gradient)) < 1e-8:
            break
        y = y - torch.linalg.solve(hessian, gradient).reshape(y.shape)
    rhs, _ = dense_terms(valid, valid_labels, y)
    v = torch.linalg.solve(hessian, rhs).reshape(y.shape)
    exact = -torch.exp(x) * (y * v).sum(dim=1)
    largest = float(torch.linalg.eigvalsh(hessian)[-1])
    origin = "stored inputs" if stored else "drawn inputs"
    return Problem(train, train_labels, valid, valid_labels, x, y, hessian, rhs, exact, largest, origin)


# --- written by hand


def by_hand(problem: Problem, name: str, build: Callable[[Tensor], tuple[Product, Product]]) -> Row:
    """CG around a Hessian product; ``build(y)`` returns that product and the mixed one."""

    def run() -> Answer:
        y = problem.y.detach().requires_grad_()
        (b,) = torch.autograd.grad(problem.upper(problem.x, y), y)
        product, mixed = build(y)
        v, products = conjugate_gradients(product, b, RTOL * float(torch.linalg.vector_norm(b)))
        return Answer(-mixed(v), v, products)

    return Row(f"by hand: {name}", run)


def hand_rows(problem: Problem, quick: bool) -> list[Row]:
    lower, x = problem.lower, problem.x

    def gradient(y: Tensor) -> Tensor:
        return torch.func.grad(lower, argnums=1)(x, y)

    def mixed(y: Tensor) -> Product:
        _, pullback = torch.func.vjp(lambda p: torch.func.grad(lower, argnums=1)(p, y), x)
        return lambda v: pullback(v)[0]

    def kept_graph(y: Tensor) -> tuple[Product, Product]:
        p = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(lower(p, y), y, create_graph=True)
        return (
            lambda v: torch.autograd.grad(slope, y, v, retain_graph=True)[0],
            lambda v: torch.autograd.grad(slope, p, v)[0],
        )

    def vjp_of_grad(y: Tensor) -> tuple[Product, Product]:
        _, pullback = torch.func.vjp(gradient, y.detach())
        return (lambda v: pullback(v)[0]), mixed(y.detach())

    def jvp_of_grad(y: Tensor) -> tuple[Product, Product]:
        return (
            lambda v: torch.func.jvp(gradient, (y.detach(),), (v,))[1],
            mixed(y.detach()),
        )

    def linearize(y: Tensor) -> tuple[Product, Product]:
        with warnings.catch_warnings():  # about its own graph
            warnings.simplefilter("ignore")
            _, push = torch.func.linearize(gradient, y.detach())
        return push, mixed(y.detach())

    def functional_hvp(y: Tensor) -> tuple[Product, Product]:
        return (
            lambda v: torch.autograd.functional.hvp(lambda q: lower(x, q), y.detach(), v)[1],
            mixed(y.detach()),
        )

    def analytic(y: Tensor) -> tuple[Product, Product]:
        p = torch.softmax(problem.train @ y.detach(), dim=1)
        penalty, n = torch.exp(x)[:, None], len(problem.train)

        def product(v: Tensor) -> Tensor:
            z = p * (problem.train @ v)
            return problem.train.T @ (z - p * z.sum(dim=1, keepdim=True)) / n + penalty * v

        return product, lambda v: penalty[:, 0] * (y.detach() * v).sum(dim=1)

    def dense() -> Answer:
        y = problem.y
        b = torch.func.grad(problem.upper, argnums=1)(x, y)
        h = torch.func.hessian(lower, argnums=1)(x, y).reshape(y.numel(), y.numel())
        v = torch.cholesky_solve(b.reshape(-1, 1), torch.linalg.cholesky(h)).reshape(y.shape)
        return Answer(-mixed(y)(v), v, 0)

    rows = [
        by_hand(problem, "CG, double backward, graph kept", kept_graph),
        by_hand(problem, "CG, torch.func vjp of grad", vjp_of_grad),
        by_hand(problem, "CG, analytic product (needs the model's formulas)", analytic),
    ]
    if not quick:
        rows += [
            by_hand(problem, "CG, torch.autograd.functional.hvp", functional_hvp),
            by_hand(problem, "CG, torch.func.linearize once", linearize),
            by_hand(problem, "CG, torch.func jvp of grad", jvp_of_grad),
            Row("by hand: dense torch.func.hessian, Cholesky", dense),
        ]
    return rows


# --- ours


@dataclass(frozen=True)
class Recorded(implicit.LinearSolver):
    """Another solver that leaves its last solution in ``seen``: backward passes return gradients only."""

    inner: implicit.LinearSolver
    seen: list[implicit.LinearSolution]

    def init(self, operator: implicit.LinearOperator) -> Any:
        return self.inner.init(operator)

    def solve_flat(self, operator: Any, prepared: Any, b: Tensor, x0: Tensor | None) -> Any:
        return self.inner.solve_flat(operator, prepared, b, x0)

    def solve(self, *arguments: Any, **options: Any) -> implicit.LinearSolution:
        self.seen.append(self.inner.solve(*arguments, **options))
        return self.seen[-1]


def preconditioners(problem: Problem) -> dict[str, Callable[[], implicit.Preconditioner]]:
    """What CG may be given, each built inside the timing. Extend here."""

    def diagonal() -> Tensor:
        return torch.exp(problem.x)[:, None].expand_as(problem.y)

    def nystrom(rank: int) -> implicit.Preconditioner:
        return implicit.Nystrom(rank=rank, regularizer=problem.regularizer)

    return {
        "Jacobi, regularizer as a diagonal": lambda: implicit.Jacobi(regularizer=diagonal(), samples=0),
        "Jacobi, regularizer as a function": lambda: implicit.Jacobi(regularizer=problem.regularizer, samples=0),
        "Jacobi, regularizer and 10 samples": lambda: implicit.Jacobi(regularizer=problem.regularizer),
        "Nystrom, regularizer, rank 10": functools.partial(nystrom, 10),
        "Nystrom, regularizer, rank 20": functools.partial(nystrom, 20),
        "Nystrom, regularizer, rank 40": functools.partial(nystrom, 40),
    }


def kept(problem: Problem) -> implicit.Preconditioner:
    """A Cholesky factorization taken at other penalties (off by 0.1 each, signs alternating)."""
    signs = 1.0 - 2.0 * (torch.arange(len(problem.x)) % 2)
    elsewhere = problem.x + 0.1 * signs
    state = implicit.KeptState()
    held = implicit.Kept().hold(state)
    held.init(implicit.Hessian(lambda y: problem.lower(elsewhere, y), problem.y))
    return held


def our_rows(problem: Problem) -> list[Row]:
    def plain(build: Callable[[], implicit.Preconditioner] | None = None) -> Answer:
        solver = implicit.CG(rtol=RTOL, preconditioner=build() if build else None)
        found = implicit.hypergradient(
            problem.upper, problem.lower, problem.x, problem.y, linear_solver=solver, accuracy=False
        )
        return Answer(found.value, found.adjoint, found.linear.products)

    def argmin() -> Answer:
        seen: list[implicit.LinearSolution] = []
        solver = Recorded(implicit.CG(rtol=RTOL), seen)
        solve = implicit.custom_argmin(lambda y, x: problem.lower(x, y), linear_solver=solver)(lambda init, x: init)
        x = problem.x.detach().requires_grad_()
        problem.upper(x, solve(problem.y, x)).backward()
        assert x.grad is not None
        return Answer(x.grad, -seen[-1].value[0], seen[-1].products)

    rows = [Row("ours: hypergradient, CG", plain), Row("ours: custom_argmin, CG, backward()", argmin)]
    for name, build in preconditioners(problem).items():
        rows.append(Row(f"ours: hypergradient, CG, {name}", functools.partial(plain, build)))
    earlier = kept(problem)
    name = "ours: hypergradient, CG, Cholesky kept from another x (building not counted)"
    return [*rows, Row(name, lambda: plain(lambda: earlier))]


# --- other libraries


def torchopt_rows(problem: Problem, quick: bool) -> list[Row]:
    import torchopt.diff.implicit
    import torchopt.linear_solve as solvers

    optimality = torch.func.grad(lambda y, x: problem.lower(x, y))

    def run(solve: Any) -> Answer:
        count, seen = 0, []

        def recorded(matvec: Any, b: Any) -> Any:
            def counted(v: Any) -> Any:
                nonlocal count
                count += 1
                return matvec(v)

            seen.append(solve(counted, b))
            return seen[-1]

        wrap = torchopt.diff.implicit.custom_root(optimality, argnums=1, solve=recorded)
        x = problem.x.detach().requires_grad_()
        problem.upper(x, wrap(lambda init, x: init)(problem.y, x)).backward()
        assert x.grad is not None
        return Answer(x.grad, -seen[-1][0], count)

    rows = [
        Row("TorchOpt: custom_root, solve_cg(rtol=1e-8)", functools.partial(run, solvers.solve_cg(rtol=RTOL))),
        Row("TorchOpt: custom_root, solve_cg()", functools.partial(run, solvers.solve_cg())),
    ]
    if not quick:
        default = solvers.solve_normal_cg()
        rows.append(Row("TorchOpt: custom_root, its default solver", functools.partial(run, default)))
    return rows


def jaxopt_rows(problem: Problem) -> list[Row]:
    import jax
    import jaxopt
    import jaxopt.linear_solve as solvers

    jax.config.update("jax_enable_x64", True)
    jnp = jax.numpy
    train, valid = jnp.asarray(problem.train.numpy()), jnp.asarray(problem.valid.numpy())
    train_labels, valid_labels = jnp.asarray(problem.train_labels.numpy()), jnp.asarray(problem.valid_labels.numpy())
    x, y = jnp.asarray(problem.x.numpy()), jnp.asarray(problem.y.numpy())

    def entropy(logits: Any, labels: Any) -> Any:
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1).mean()

    def lower(w: Any, p: Any) -> Any:
        return entropy(train @ w, train_labels) + 0.5 * (jnp.exp(p)[:, None] * w**2).sum()

    def compiled(solve: Any) -> Any:
        root = jaxopt.implicit_diff.custom_root(jax.grad(lower), solve=solve)(lambda init, p: init)
        return jax.jit(jax.grad(lambda p, w: entropy(valid @ root(w, p), valid_labels)))

    def row(name: str, solve: Any) -> Row:
        fn = compiled(solve)
        seen: dict[str, Any] = {"products": 0}

        def instrumented(matvec: Any, b: Any) -> Any:
            def count() -> None:
                seen["products"] += 1

            def counted(v: Any) -> Any:
                jax.debug.callback(count)
                return matvec(v)

            found = solve(counted, b)
            jax.debug.callback(lambda u: seen.update(adjoint=np.array(u)), found)
            return found

        def prepare() -> None:
            fn(x, y).block_until_ready()

        def run() -> Answer:
            return Answer(torch.from_numpy(np.array(fn(x, y).block_until_ready())), *probe())

        @functools.cache
        def probe() -> tuple[Tensor, int]:
            """Adjoint and products, from one run that the timing does not include."""
            compiled(instrumented)(x, y).block_until_ready()
            jax.effects_barrier()
            return -torch.from_numpy(seen["adjoint"]), seen["products"]

        return Row(name, run, prepare=prepare)

    return [
        row("jaxopt: custom_root, solve_cg(tol=1e-8), jit", functools.partial(solvers.solve_cg, tol=RTOL)),
        row("jaxopt: custom_root, solve_cg(), jit", solvers.solve_cg),
        row("jaxopt: custom_root, its default solver, jit", solvers.solve_normal_cg),
    ]


def hypertorch_rows(problem: Problem) -> list[Row]:
    import hypergrad

    step = 1.0 / problem.largest
    tolerance = RTOL * float(torch.linalg.vector_norm(problem.rhs))

    def descent(params: list[Tensor], hparams: list[Tensor]) -> list[Tensor]:
        (slope,) = torch.autograd.grad(problem.lower(hparams[0], params[0]), params, create_graph=True)
        return [params[0] - step * slope]

    def run() -> Answer:
        x = problem.x.detach().requires_grad_()
        found = hypergrad.CG(
            [problem.y],
            [x],
            K=1_000,
            fp_map=descent,
            outer_loss=lambda params, hparams: problem.upper(hparams[0], params[0]) + 0.0 * hparams[0].sum(),
            tol=tolerance,
            set_grad=False,
        )
        return Answer(found[0])

    return [Row("hypertorch: CG, step 1/L given", run)]


def betty_rows(problem: Problem) -> list[Row]:
    from betty.configs import Config, EngineConfig
    from betty.engine import Engine

    Point, Lower, Upper = peers.betty_levels(problem)

    def run(config: Any) -> Answer:
        lower = Lower("lower", config, Point(problem.y), device="cpu")
        upper = Upper("upper", Config(retain_graph=True), Point(problem.x), device="cpu")
        Engine([upper, lower], EngineConfig(), {"u2l": {upper: [lower]}, "l2u": {lower: [upper]}})
        lower.cur_batch = ()
        loss, _ = upper.get_loss(())
        upper.backward(loss, upper.trainable_parameters(), upper.paths, retain_graph=True)
        return Answer(upper.module.value.grad)

    return [
        Row("Betty: cg, 96 iterations", functools.partial(run, Config(type="cg", cg_iterations=96))),
        Row("Betty: cg, its default (1 iteration)", functools.partial(run, Config(type="cg"))),
    ]


def table(arguments: argparse.Namespace) -> list[dict[str, Cell]]:
    """Run everything and print; returns the table."""
    problem = load(arguments)
    quick = arguments.quick or arguments.toy
    comparison = Comparison(our_rows(problem) + hand_rows(problem, quick))
    comparison.add_peer("TorchOpt", lambda: torchopt_rows(problem, quick), arguments.peers)
    comparison.add_peer("jaxopt", lambda: jaxopt_rows(problem), arguments.peers)
    comparison.add_peer("hypertorch", lambda: hypertorch_rows(problem), arguments.peers)
    comparison.add_peer("Betty", lambda: betty_rows(problem), arguments.peers)
    comparison.run(arguments)
    measured: list[dict[str, Cell]] = []
    for row in comparison.rows:
        answer: Answer = row.answer
        measured.append(
            {
                "row": row.name,
                "median ms": 1e3 * row.median,
                "min ms": 1e3 * min(row.seconds),
                "runs": len(row.seconds),
                "products": answer.products,
                "relative error": problem.error(answer.value),
                "relative linear residual": None if answer.adjoint is None else problem.residual(answer.adjoint),
                "compile s": row.compile_seconds,
            }
        )
    sizes = f"{problem.y.numel()} lower variables, {problem.x.numel()} penalties, {len(problem.train)} rows"
    peers.finish(arguments, f"Job 1: one hypergradient, {sizes}, {problem.origin}, float64", comparison, measured)
    return measured


def main() -> None:
    peers.settle()
    table(peers.parser(__doc__ or "", rounds=9).parse_args())


if __name__ == "__main__":
    main()
