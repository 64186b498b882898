"""Every order and mode of implicit derivatives against an unrolled Newton iteration."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import implicit
from implicit import CG, LU, LinearSolver, tree
from implicit.transforms import forward_levels, transforms_active
from tests.dense import normal

MATRIX = torch.tensor([[2.0, 1.5, 0.0], [-1.0, 1.0, 0.3], [0.4, -2.0, 3.0]], dtype=torch.float64)
WEIGHTS = torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)


def residual(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Its derivative in y is not symmetric."""
    return MATRIX @ y + torch.tanh(y) * b**2 + 0.3 * y**3 - a * torch.sin(b)


def root(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Newton's method, unrolled: every derivative of it is right once it has converged."""
    for _ in range(25):
        slope = MATRIX + torch.diag((1 - torch.tanh(y) ** 2) * b**2 + 0.9 * y**2)
        y = y - torch.linalg.solve(slope, residual(y, a, b))
    return y


def objective(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return 0.5 * ((y - a) ** 2).sum() * b**2 + 0.25 * (y**4).sum() + torch.cos(b) * y.sum() ** 2


def minimizer(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    for _ in range(30):
        curvature = torch.eye(3) * b**2 + torch.diag(3 * y**2) + 2 * torch.cos(b) * torch.ones(3, 3)
        y = y - torch.linalg.solve(curvature, (y - a) * b**2 + y**3 + 2 * torch.cos(b) * y.sum())
    return y


def plain(solver: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A solver without derivatives."""
    return lambda init, *theta: solver(init, *[t.detach() for t in theta]).detach()


IMPLICIT = {
    "root, LU": (implicit.custom_root(residual)(plain(root)), root),
    "argmin, CG": (implicit.custom_argmin(objective, linear_solver=CG(rtol=1e-14))(plain(minimizer)), minimizer),
    "argmin, LU": (implicit.custom_argmin(objective, linear_solver=LU())(plain(minimizer)), minimizer),
}
A, B = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)
MANY_A, MANY_B = torch.stack([A, A + 0.1, 0.5 * A]), torch.tensor([0.7, 0.8, 0.9], dtype=torch.float64)

Scalar = Callable[..., Tensor]
MODES: dict[str, Callable[[Scalar], Any]] = {
    "value": lambda f: f(A, B),
    "grad": lambda f: grad(f, (0, 1))(A, B),
    "vjp": lambda f: vjp(f, A, B)[1](torch.tensor(2.0)),
    "jvp": lambda f: jvp(f, (A, B), (WEIGHTS, torch.tensor(0.3)))[1],
    "jvp in one argument": lambda f: jvp(lambda b: f(A, b), (B,), (torch.tensor(0.3),))[1],
    "forward over reverse": lambda f: hessian(f, (0, 1))(A, B),
    "reverse over reverse": lambda f: jacrev(jacrev(f, (0, 1)), (0, 1))(A, B),
    "reverse over forward": lambda f: jacrev(jacfwd(f, (0, 1)), (0, 1))(A, B),
    "mixed, forward over reverse": lambda f: jacfwd(jacrev(f, 1), 0)(A, B),
    "mixed, reverse over reverse": lambda f: jacrev(grad(f), 1)(A, B),
    "mixed, reverse over forward": lambda f: jacrev(jacfwd(f, 1), 0)(A, B),
    "Hessian-vector product": lambda f: jvp(lambda a: grad(f)(a, B), (A,), (WEIGHTS,))[1],
    "third, reverse": lambda f: jacrev(jacrev(jacrev(f)))(A, B),
    "third, scalar": lambda f: grad(grad(grad(f, 1), 1), 1)(A, B),
    "third, forward outside": lambda f: jacfwd(jacrev(jacrev(f)))(A, B),
    "third, forward between": lambda f: jacrev(jacfwd(jacrev(f)))(A, B),
    "third, forward inside": lambda f: jacrev(jacrev(jacfwd(f)))(A, B),
    "third, mixed": lambda f: jacfwd(jacrev(grad(f, 1)), 1)(A, B),
}


ITERATIVE = {
    "GMRES": implicit.GMRES(rtol=1e-13),
    "BiCGSTAB": implicit.BiCGSTAB(rtol=1e-12),
    "NormalCG": implicit.NormalCG(rtol=1e-12),
    "LSMR": implicit.LSMR(rtol=1e-12),
}


@pytest.mark.parametrize("solver", ITERATIVE.values(), ids=ITERATIVE)
def test_iterative_solvers(solver: LinearSolver) -> None:
    """They need products with A and with its transpose, one at a time and in blocks, in every mode."""
    solve = implicit.custom_root(residual, linear_solver=solver)(plain(root))
    for mode in ("grad", "jvp", "forward over reverse", "reverse over forward", "third, reverse"):
        close(MODES[mode](scalar(solve)), MODES[mode](scalar(root)), 1e-9)


def test_symmetric_roots_may_be_indefinite() -> None:
    """A saddle point: MINRES and LDL^T use the symmetry, which halves the work of a product."""
    signs = torch.tensor([1.0, -1.0, 1.0])

    def saddle(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return signs * (y - a) * b**2 + 0.1 * (y**3) * signs + 0.1 * (y.sum() - y)

    def newton(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        for _ in range(25):
            y = y - torch.linalg.solve(jacrev(saddle)(y, a, b), saddle(y, a, b))
        return y

    for solver in (None, implicit.MINRES(rtol=1e-13)):
        solve = implicit.custom_root(saddle, symmetric=True, linear_solver=solver)(plain(newton))
        for mode in ("grad", "jvp", "forward over reverse", "reverse over reverse"):
            close(MODES[mode](scalar(solve)), MODES[mode](scalar(newton)), 1e-9)


def test_large_systems_are_solved_without_a_matrix() -> None:
    """A contraction with 300 unknowns, beyond the size at which the default solver writes the matrix down."""
    weight = 0.5 * normal(51, 300, 300) / 300**0.5

    @implicit.custom_fixed_point(lambda y, a: torch.tanh(weight @ y) + a)
    def solve(init: Tensor, a: Tensor) -> Tensor:
        y = init
        for _ in range(60):
            y = torch.tanh(weight @ y) + a
        return y

    a = normal(52, 300).requires_grad_()
    y = solve(torch.zeros(300), a)
    y.square().sum().backward()
    slope = torch.eye(300) - (1 - torch.tanh(weight @ y.detach()) ** 2)[:, None] * weight
    close(a.grad, torch.linalg.solve(slope.T, 2 * y.detach()), 1e-6)


class Packed(torch.nn.Module):
    """An LSTM on sequences of unequal lengths: packing fails under ``torch.func``."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = torch.nn.LSTM(1, 2, batch_first=True)

    def forward(self, rows: Tensor, lengths: Tensor) -> Tensor:
        packed = torch.nn.utils.rnn.pack_padded_sequence(rows, lengths, batch_first=True, enforce_sorted=False)
        return self.lstm(packed)[1][0].squeeze(0).sum(1)


def test_modules_that_refuse_torch_func() -> None:
    """First and second derivatives in eager mode, against dense matrices and differences of the first."""
    model = Packed()
    rows, lengths, target = normal(53, 5, 4, 1), torch.tensor([4, 1, 3, 2, 4]), normal(54, 5)
    start = {name: 0.3 * normal(55 + i, *p.shape) for i, (name, p) in enumerate(model.named_parameters())}

    def loss(y: dict[str, Tensor], x: Tensor) -> Tensor:
        output = torch.func.functional_call(model, y, (rows, lengths))
        return ((output - target) ** 2).mean() + torch.exp(x) * sum((p**2).sum() for p in y.values())

    @implicit.custom_argmin(loss, linear_solver=implicit.Cholesky())
    def fit(init: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        return implicit.minimize(lambda y: loss(y, x.detach()), init, implicit.NewtonCG(rtol=1e-12)).point

    x = torch.tensor(-1.0, requires_grad=True)
    y = fit(start, x)
    weights = {name: normal(70 + i, *p.shape) for i, (name, p) in enumerate(y.items())}

    def value(y: dict[str, Tensor]) -> Tensor:
        return tree.dot(weights, y)

    slope = torch.autograd.grad(value(y), x, create_graph=True)[0]
    point = tree.variables(y)
    hessian_matrix = implicit.Hessian(lambda q: loss(q, x.detach()), point).to_dense()
    mixed = torch.exp(x.detach()) * 2 * tree.ravel(tree.detach(y))
    close(slope.detach(), -tree.ravel(weights) @ torch.linalg.solve(hessian_matrix, mixed), 1e-9)

    def first(shift: float) -> float:
        at = torch.tensor(-1.0 + shift, requires_grad=True)
        return float(torch.autograd.grad(value(fit(start, at)), at)[0])

    second = float(torch.autograd.grad(slope, x)[0])
    assert second == pytest.approx((first(1e-4) - first(-1e-4)) / 2e-4, rel=1e-5)


def scalar(solve: Callable[..., Tensor]) -> Scalar:
    def value(a: Tensor, b: Tensor) -> Tensor:
        y = solve(torch.zeros(3), a, b)
        return torch.sin(WEIGHTS @ y) + (y**2).sum()

    return value


def close(found: Any, expected: Any, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("way", IMPLICIT.values(), ids=IMPLICIT)
def test_every_mode(way: tuple[Callable[..., Tensor], Callable[..., Tensor]], mode: Callable[[Scalar], Any]) -> None:
    solve, unrolled = way
    close(mode(scalar(solve)), mode(scalar(unrolled)))


VECTOR_MODES: dict[str, Callable[..., Callable[..., Tensor]]] = {
    "jacrev": jacrev,
    "jacfwd": jacfwd,
    "jacrev of jacrev": lambda f: jacrev(jacrev(f)),
    "jacfwd of jacrev": lambda f: jacfwd(jacrev(f)),
    "jacrev of jacfwd": lambda f: jacrev(jacfwd(f)),
}


@pytest.mark.parametrize("mode", VECTOR_MODES.values(), ids=VECTOR_MODES)
@pytest.mark.parametrize("way", IMPLICIT.values(), ids=IMPLICIT)
def test_jacobians_of_the_solution(way: tuple[Any, Any], mode: Callable[..., Any]) -> None:
    found, expected = (mode(lambda a, s=s: s(torch.zeros(3), a, B))(A) for s in way)
    close(found, expected)


def each(fn: Callable[..., Tensor], *args: Tensor) -> Tensor:
    """vmap as a loop: the reference, since batched ``linalg.solve`` goes wrong under transforms of vmap."""
    return torch.stack([fn(*[a[i] for a in args]) for i in range(len(args[0]))])


VMAPS: dict[str, tuple[Callable[[Scalar], Any], Callable[[Scalar], Any]]] = {
    "vmap": (lambda f: vmap(f)(MANY_A, MANY_B), lambda f: each(f, MANY_A, MANY_B)),
    "one argument": (lambda f: vmap(f, (0, None))(MANY_A, B), lambda f: each(lambda a: f(a, B), MANY_A)),
    "last axis": (lambda f: vmap(f, (1, 0))(MANY_A.T, MANY_B), lambda f: each(f, MANY_A, MANY_B)),
    "vmap of grad": (lambda f: vmap(grad(f))(MANY_A, MANY_B), lambda f: each(grad(f), MANY_A, MANY_B)),
    "vmap of hessian": (lambda f: vmap(hessian(f))(MANY_A, MANY_B), lambda f: each(hessian(f), MANY_A, MANY_B)),
    "grad of vmap": (
        lambda f: grad(lambda a: vmap(f)(a, MANY_B).sin().sum())(MANY_A),
        lambda f: grad(lambda a: each(f, a, MANY_B).sin().sum())(MANY_A),
    ),
    "shared argument": (
        lambda f: grad(lambda b: vmap(f, (0, None))(MANY_A, b).sin().sum())(B),
        lambda f: grad(lambda b: each(lambda a: f(a, b), MANY_A).sin().sum())(B),
    ),
    "jacrev of vmap": (
        lambda f: jacrev(lambda a: vmap(f)(a, MANY_B))(MANY_A),
        lambda f: jacrev(lambda a: each(f, a, MANY_B))(MANY_A),
    ),
    "jacfwd of vmap": (
        lambda f: jacfwd(lambda b: vmap(f)(MANY_A, b))(MANY_B),
        lambda f: jacfwd(lambda b: each(f, MANY_A, b))(MANY_B),
    ),
    "hessian of vmap": (
        lambda f: hessian(lambda b: vmap(f, (0, None))(MANY_A, b).sum())(B),
        lambda f: hessian(lambda b: each(lambda a: f(a, b), MANY_A).sum())(B),
    ),
    "vmap of vmap of grad": (
        lambda f: vmap(lambda a: vmap(lambda b: grad(f)(a, b))(MANY_B))(MANY_A),
        lambda f: each(lambda a: each(lambda b: grad(f)(a, b), MANY_B), MANY_A),
    ),
}


@pytest.mark.parametrize("modes", VMAPS.values(), ids=VMAPS)
@pytest.mark.parametrize("way", ["root, LU", "argmin, CG"])
def test_vmap(way: str, modes: tuple[Callable[[Scalar], Any], Callable[[Scalar], Any]]) -> None:
    solve, unrolled = IMPLICIT[way]
    close(modes[0](scalar(solve)), modes[1](scalar(unrolled)))


class BatchedNewton:
    """A solver for a whole batch, one leading axis on everything; counts its calls."""

    def __init__(self) -> None:
        self.calls: list[list[tuple[int, ...]]] = []

    def __call__(self, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        self.calls.append([tuple(t.shape) for t in (y, a, b)])
        return torch.stack([root(*row) for row in zip(y, a.detach(), b.detach(), strict=True)]).detach()


@pytest.mark.parametrize("modes", VMAPS.values(), ids=VMAPS)
def test_a_batched_solver(modes: tuple[Callable[[Scalar], Any], Callable[[Scalar], Any]]) -> None:
    def refuse(init: Tensor, a: Tensor, b: Tensor) -> Tensor:
        raise AssertionError("the plain solver was called")

    batched = BatchedNewton()
    solve = implicit.custom_root(residual, batched_solver=batched)(refuse)
    close(modes[0](scalar(solve)), modes[1](scalar(root)))
    assert batched.calls
    assert all(call == [(3, 3), (3, 3), (3,)] for call in batched.calls)


def test_a_batched_solver_is_called_once() -> None:
    batched = BatchedNewton()
    solve = implicit.custom_root(residual, batched_solver=batched)(plain(root))
    vmap(grad(scalar(solve)))(MANY_A, MANY_B)
    assert len(batched.calls) == 1


def test_batched_integers_and_starts() -> None:
    """Labels may be batched too, and so may the start alone."""
    table = normal(50, 4, 3)

    def entry(y: Tensor, a: Tensor, index: Tensor) -> Tensor:
        return y - a * table.index_select(0, index.reshape(1))[0]

    solve = implicit.custom_root(entry)(lambda init, a, index: a * table.index_select(0, index.reshape(1))[0])
    labels = torch.tensor([3, 0, 2])
    found = vmap(lambda a, k: jacfwd(lambda a: solve(torch.zeros(3), a, k))(a))(MANY_B, labels)
    close(found, table[labels])
    starts = vmap(lambda y: solve(y, B, labels[0]))(MANY_A)
    close(starts, (B * table[3]).expand(3, 3))


@pytest.mark.parametrize("way", IMPLICIT)
def test_eager_derivatives_by_finite_differences(way: str) -> None:
    solve = IMPLICIT[way][0]
    inputs = (A.clone().requires_grad_(), B.clone().requires_grad_())

    def fn(a: Tensor, b: Tensor) -> Tensor:
        return solve(torch.zeros(3), a, b)

    every = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
    assert gradcheck(fn, inputs, **every)
    assert gradgradcheck(fn, inputs, check_fwd_over_rev=True, check_rev_over_rev=True, check_batched_grad=True)


def test_eager_hessian_vector_products_with_a_dual_level() -> None:
    solve, unrolled = (scalar(s) for s in IMPLICIT["root, LU"])
    with forward_ad.dual_level():
        a = forward_ad.make_dual(A.clone().requires_grad_(), WEIGHTS)
        slope = torch.autograd.grad(solve(a, B), a)[0]  # without create_graph
        found = forward_ad.unpack_dual(slope).tangent
    close(found, hessian(unrolled)(A, B) @ WEIGHTS)


def test_vectorized_jacobians() -> None:
    """``is_grads_batched`` runs on the older vmap of PyTorch, which knows no rules of autograd functions."""
    solve, unrolled = IMPLICIT["root, LU"]
    jacobian, hess = torch.autograd.functional.jacobian, torch.autograd.functional.hessian
    close(
        jacobian(lambda a: solve(torch.zeros(3), a, B), A, vectorize=True),
        jacrev(lambda a: unrolled(torch.zeros(3), a, B))(A),
    )
    close(hess(lambda a: scalar(solve)(a, B), A, vectorize=True), hessian(scalar(unrolled))(A, B))
    pair = implicit.custom_root(lambda y, a: {"u": 2 * y["u"] - a, "v": y["v"] + y["u"]})(
        lambda init, a: {"u": a / 2, "v": -a / 2}
    )
    init = {"u": torch.zeros(3), "v": torch.zeros(3)}
    close(jacobian(lambda a: pair(init, a)["v"], A, vectorize=True), -0.5 * torch.eye(3))


def test_forward_over_forward_raises() -> None:
    """PyTorch would lose the outer tangent silently."""
    f = scalar(IMPLICIT["root, LU"][0])
    with pytest.raises(NotImplementedError, match=r"forward mode over forward mode .* use forward over reverse"):
        jacfwd(jacfwd(f))(A, B)
    with pytest.raises(NotImplementedError, match="forward mode over forward mode"):
        jvp(lambda b: jvp(lambda a: f(a, b), (A,), (WEIGHTS,))[1], (B,), (B,))
    with pytest.raises(NotImplementedError, match="forward mode over forward mode"):
        jacrev(jacfwd(jacfwd(f)))(A, B)
    # Outside torch.func PyTorch itself refuses to nest.
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="Nested forward mode AD is not supported"):
        a = forward_ad.make_dual(A, WEIGHTS)
        jvp(lambda b: f(a, b), (B,), (B,))


def test_the_private_interfaces_that_count_levels() -> None:
    seen: list[tuple[bool, int]] = []

    def look(x: Tensor) -> Tensor:
        seen.append((transforms_active(), forward_levels()))
        return x * x

    look(B)
    grad(look)(B)
    jacfwd(look)(A)
    hessian(lambda a: look(a).sum())(A)
    jacfwd(jacfwd(look))(A)
    assert seen == [(False, 0), (True, 0), (True, 1), (True, 1), (True, 2)]


def test_the_start_has_a_zero_gradient_under_transforms() -> None:
    solve = IMPLICIT["root, LU"][0]
    assert not bool(grad(lambda y0: solve(y0, A, B).sum())(torch.zeros(3)).any())
    made_inside = grad(lambda a: solve(0.1 * a, a, B).sum())(A)  # the start may depend on what is differentiated
    close(made_inside, grad(lambda a: root(torch.zeros(3), a, B).sum())(A))


class Recorder(LinearSolver):
    """LU that notes how many right-hand sides each system had."""

    def __init__(self) -> None:
        self.sides: list[int] = []

    def init(self, operator: implicit.LinearOperator) -> Any:
        return LU().init(operator)

    def solve_flat(self, operator: implicit.LinearOperator, prepared: Any, b: Tensor, x0: Tensor | None) -> Any:
        self.sides.append(len(b))
        return LU().solve_flat(operator, prepared, b, x0)


@pytest.mark.parametrize("jacobian", [jacrev, jacfwd])
def test_all_rows_of_a_jacobian_share_one_factorization(jacobian: Callable[..., Any]) -> None:
    recorder = Recorder()
    solve = implicit.custom_root(residual, linear_solver=recorder, residual_tolerance=None)(plain(root))
    jacobian(lambda a: solve(torch.zeros(3), a, B))(A)
    assert recorder.sides == [3]


def test_one_reverse_pass_is_one_linear_system() -> None:
    recorder = Recorder()
    solve = implicit.custom_root(residual, linear_solver=recorder)(plain(root))
    scalar(solve)(A.clone().requires_grad_(), B.clone().requires_grad_()).backward()
    assert recorder.sides == [1]


class Probe(torch.autograd.Function):
    """The identity, counting how often its cotangent is computed."""

    pulled = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        Probe.pulled += 1
        return cotangent


@pytest.mark.parametrize("again", [False, True])
def test_only_wanted_cotangents_are_computed(again: bool) -> None:
    def probed(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return residual(y, a, Probe.apply(b))

    solve = implicit.custom_root(probed)(plain(root))
    a, b = A.clone().requires_grad_(), B.clone()
    Probe.pulled = 0
    slope = torch.autograd.grad(solve(torch.zeros(3), a, b).sin().sum(), a, create_graph=again)[0]
    if again:
        slope.sum().backward()
    assert Probe.pulled == 0
    scalar(solve)(a, b.requires_grad_()).backward()
    assert Probe.pulled > 0


def test_scalar_unknowns_of_every_order() -> None:
    """y = cos(a y): first and second derivative in closed form for a 0-d unknown, a 0-d argument."""

    @implicit.custom_fixed_point(lambda y, a: torch.cos(a * y))
    def solve(init: Tensor, a: Tensor) -> Tensor:
        y = init
        for _ in range(200):
            y = torch.cos(a * y)
        return y

    def slope(a: Tensor) -> Tensor:  # differentiated by hand: y' = -s y / (1 + a s), s = sin(a y)
        y = unrolled(a)
        s = torch.sin(a * y)
        return -s * y / (1 + a * s)

    def unrolled(a: Tensor) -> Tensor:
        y = torch.tensor(0.7)
        for _ in range(60):
            y = y - (torch.cos(a * y) - y) / (-a * torch.sin(a * y) - 1)
        return y

    def f(a: Tensor) -> Tensor:
        return solve(torch.tensor(0.7), a)

    at = torch.tensor(0.9)
    close(grad(f)(at), slope(at))
    for second in (grad(grad(f)), jacfwd(grad(f)), grad(lambda a: jvp(f, (a,), (torch.ones(()),))[1])):
        close(second(at), grad(slope)(at))
    close(grad(grad(grad(f)))(at), grad(grad(slope))(at))
