"""Jacobians and mixed derivatives against dense matrices from forward mode, in every order, on every architecture."""

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from implicit import Jacobian, MixedDerivative, tree
from implicit.differentiability import traffic
from implicit.operators import jacobian
from tests.architectures import MAKERS, Architecture, architecture
from tests.dense import normal, relative

TOLERANCE = 1e-12


@pytest.fixture(params=MAKERS)
def zoo(request: pytest.FixtureRequest) -> Architecture:
    return architecture(request.param)


def check_against(operator, expected: Tensor, seed: int = 0) -> None:
    """Single and batched products, both ways, dense matrices and scipy's view of them."""
    m, n = expected.shape
    assert operator.shape == (m, n)
    assert operator.T.shape == (n, m)
    for op, matrix in ((operator, expected), (operator.T, expected.T), (operator.T.T, expected)):
        rows = normal(seed, 3, matrix.shape[1])
        assert relative(op.flat_mv(rows[0]), matrix @ rows[0]) < TOLERANCE
        assert relative(op.flat_mm(rows), rows @ matrix.T) < TOLERANCE
        assert relative(op.to_dense(chunk=7), matrix) < TOLERANCE
    outer, inner = operator.to_scipy(), normal(seed + 1, n).numpy()
    np.testing.assert_allclose(outer.matvec(inner), expected.numpy() @ inner, rtol=1e-9, atol=1e-11)
    back = normal(seed + 2, m).numpy()
    np.testing.assert_allclose(outer.rmatvec(back), expected.numpy().T @ back, rtol=1e-9, atol=1e-11)


# ---------------------------------------------------------------- Jacobians


def test_every_architecture(zoo: Architecture) -> None:
    J = Jacobian(zoo.outputs, zoo.parameters)
    check_against(J, zoo.dense_jacobian())
    assert J.order == "reverse"
    assert len(J.notes) == (zoo is architecture("attention, default"))
    torch.testing.assert_close(J.value, zoo.outputs(zoo.parameters), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("order", ["forward", "linearize"])
def test_every_architecture_in_forward_mode(zoo: Architecture, order) -> None:
    J = Jacobian(zoo.outputs, zoo.parameters, order=order)
    v = normal(0, J.size)
    if not (zoo.functional and zoo.forward):
        with pytest.raises((RuntimeError, NotImplementedError)):
            J.flat_mv(v)
        return
    if order == "linearize" and isinstance(getattr(zoo.module, "core", None), torch.nn.RNNBase):
        with pytest.raises(RuntimeError, match="linearize order disagrees with the transpose"):
            J.flat_mv(v)
        return
    check_against(J, zoo.dense_jacobian())
    assert J.order == order


def curve(y: dict) -> dict:
    """Leaves of every shape; one output is constant, one input does not enter."""
    w, b = y["w"], y["parts"][0]
    return {
        "matrix": torch.tanh(w) @ torch.ones(3, 2) * b,
        "scalar": (w**2).sum() + b**3,
        "constant": torch.ones(2),
        "none": torch.zeros(0, 2),
    }


def curve_point() -> dict:
    return {"w": normal(0, 2, 3), "parts": [torch.tensor(0.7), torch.zeros(0, 4)], "idle": normal(1, 2)}


def dense_curve(y: dict) -> Tensor:
    def flat(v: Tensor) -> Tensor:
        return tree.ravel(curve(tree.unravel(v, y)))

    return torch.func.jacfwd(flat)(tree.ravel(y))


@pytest.mark.parametrize("order", ["auto", "reverse", "forward", "linearize"])
def test_trees_in_and_out(order) -> None:
    y = curve_point()
    J = Jacobian(curve, y, order=order)
    check_against(J, dense_curve(y))
    v = {"idle": torch.zeros(2), "parts": [torch.tensor(1.0), torch.zeros(0, 4)], "w": torch.zeros(2, 3)}
    found = J @ v
    assert list(found) == ["matrix", "scalar", "constant", "none"]
    torch.testing.assert_close(found["scalar"], 3 * torch.tensor(0.7) ** 2)
    torch.testing.assert_close(found["constant"], torch.zeros(2))
    assert found["none"].shape == (0, 2)
    u = {"scalar": torch.tensor(1.0), "constant": torch.ones(2), "none": torch.zeros(0, 2), "matrix": torch.zeros(2, 2)}
    pulled = J.T @ u
    torch.testing.assert_close(pulled["w"], 2 * y["w"])
    torch.testing.assert_close(pulled["idle"], torch.zeros(2))
    assert not any(leaf.requires_grad for leaf in tree.leaves((found, pulled)))


def test_the_function_is_evaluated_once() -> None:
    calls = []

    def fn(y: Tensor) -> Tensor:
        calls.append(1)
        return torch.sin(y)

    J = Jacobian(fn, torch.ones(3))
    for _ in range(3):
        J @ torch.ones(3)
        J.T @ torch.ones(3)
        J.flat_mm(torch.eye(3))
    assert len(calls) == 1
    assert J.products == 3 + 9
    forward = Jacobian(fn, torch.ones(3), order="forward")
    forward @ torch.ones(3)
    assert len(calls) == 4  # the value, the comparison with the transpose, and the product


def test_products_do_not_depend_on_what_was_asked_before() -> None:
    J = Jacobian(lambda y: y**3, normal(0, 4))
    v = normal(1, 4)
    first = (J @ v, J.T @ v)
    J.flat_mm(normal(2, 5, 4))
    torch.testing.assert_close((J @ v, J.T @ v), first, rtol=0, atol=0)


def test_products_never_share_the_memory_of_their_argument() -> None:
    J = Jacobian(
        lambda y: {"same": y["a"], "view": y["b"].reshape(2, 2), "part": y["a"][1:]},
        {"a": torch.ones(3), "b": torch.ones(4)},
    )
    for operator in (J, J.T):
        given = tree.map(torch.ones_like, operator.like)
        for leaf in tree.leaves(operator @ given):
            leaf.zero_()
        assert all(bool(leaf.all()) for leaf in tree.leaves(given))


def test_a_constant_function_has_the_zero_jacobian() -> None:
    J = Jacobian(lambda y: torch.ones(2), torch.ones(3))
    check_shapes = (J @ torch.ones(3), J.T @ torch.ones(2), J.flat_mm(torch.eye(3)), J.T.flat_mm(torch.eye(2)))
    assert [tuple(t.shape) for t in check_shapes] == [(2,), (3,), (3, 2), (2, 3)]
    assert all(not t.any() for t in check_shapes)


def test_blocks_of_vectors_are_taken_within_the_memory_budget(monkeypatch) -> None:
    passes: list[int] = []  # how many vectors each one took
    plain = jacobian._pullback

    def counted(outputs, variables, u, batched, **options):
        passes.append(len(tree.leaves(u)[0]) if batched else 1)
        return plain(outputs, variables, u, batched, **options)

    x = normal(1, 6, 5)
    dense = torch.func.jacfwd(lambda q: torch.tanh(x @ q))(normal(0, 5))
    one = traffic([Jacobian(lambda q: torch.tanh(x @ q), normal(0, 5))._outputs.grad_fn])
    assert 8 * (6 + 5) <= one <= 8 * 6 * 5  # bytes: at least the cotangents of the outputs and of y
    for budget, sizes in ((1, [1] * 6), (4 * one, [4, 2]), (5 * one, [5, 1]), (None, [6])):
        J = Jacobian(lambda q: torch.tanh(x @ q), normal(0, 5), block_bytes=budget)
        J @ torch.ones(5)  # decides the order
        monkeypatch.setattr(jacobian, "_pullback", counted)
        passes.clear()
        torch.testing.assert_close(J.T.to_dense(), dense.T)
        assert passes == sizes
        passes.clear()
        torch.testing.assert_close(J.flat_mm(torch.eye(5)), dense.T)
        assert sum(passes) == 5 and max(passes) <= max(sizes)
        assert J.products == 6
        monkeypatch.undo()
    with pytest.raises(ValueError, match="block_bytes must be None or a positive integer, got 0"):
        Jacobian(torch.sin, torch.ones(2), block_bytes=0)


def test_jacobians_compose_and_add() -> None:
    y = normal(0, 3)
    J = Jacobian(lambda q: torch.stack([q.prod(), q.sum()]), y)
    dense = torch.func.jacfwd(lambda q: torch.stack([q.prod(), q.sum()]))(y)
    torch.testing.assert_close((J.T @ J).to_dense(), dense.T @ dense)
    torch.testing.assert_close((J + 2 * J).T.to_dense(), 3 * dense.T)


class Once(torch.autograd.Function):
    """Exp whose backward pass cannot be differentiated; with forward mode."""

    @staticmethod
    def forward(y):
        return y.exp()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0]

    @staticmethod
    def jvp(ctx, tangent):
        return tangent * ctx.saved_tensors[0]


class OnceReverse(Once):
    @staticmethod
    def jvp(ctx, tangent):
        raise RuntimeError("forward mode is not implemented here")


class Silent(Once):
    """The same without the mark: its backward pass leaves no graph."""

    @staticmethod
    def backward(ctx, grad):
        with torch.no_grad():
            return grad * ctx.saved_tensors[0]


def test_auto_turns_to_forward_mode_where_reverse_mode_is_refused() -> None:
    y = normal(0, 3)
    J = Jacobian(Once.apply, y)
    assert J.order == "auto"
    torch.testing.assert_close(J @ torch.ones(3), y.exp())
    assert J.order == "forward"
    torch.testing.assert_close(J.T @ torch.ones(3), y.exp())
    with pytest.raises(RuntimeError, match=r"reverse order disagrees with the transpose: Once is an autograd"):
        Jacobian(Once.apply, y, order="reverse") @ torch.ones(3)
    twice = Jacobian(lambda q: Once.apply(q) + q**2, y)  # one of two terms is passed over
    torch.testing.assert_close(twice @ torch.ones(3), y.exp() + 2 * y)
    assert twice.order == "forward"
    silent = Jacobian(lambda q: Silent.apply(q) + q**2, y)
    torch.testing.assert_close(silent @ torch.ones(3), y.exp() + 2 * y)
    assert silent.order == "forward"
    with pytest.raises(RuntimeError, match=r"J @ v failed: .*neither twice .* nor in forward mode"):
        Jacobian(OnceReverse.apply, y) @ torch.ones(3)


def test_other_errors_are_not_mistaken_for_a_refusal() -> None:
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("a bug of the user's")

    with pytest.raises(RuntimeError, match=r"^a bug of the user's$"):
        Jacobian(Broken.apply, torch.ones(2)) @ torch.ones(2)


def test_random_functions_are_noticed_where_they_are_evaluated_again() -> None:
    generator = torch.Generator().manual_seed(0)

    def fn(y: Tensor) -> Tensor:
        return y * torch.rand(5, generator=generator)

    J = Jacobian(fn, torch.ones(5))  # one draw, kept
    torch.testing.assert_close(J.to_dense(), torch.diag(J.value))
    with pytest.raises(RuntimeError, match=r"forward order disagrees with the transpose: .*something else every time"):
        Jacobian(fn, torch.ones(5), order="forward") @ torch.ones(5)


def test_attention_pinned_to_a_fused_kernel_is_refused_with_the_reason() -> None:
    x = normal(0, 1, 2, 3, 4)

    def attend(y: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(x * y, x, x)

    with pytest.raises(RuntimeError, match=r"neither twice .*flash.* nor in forward mode .*flash"):
        Jacobian(attend, torch.ones(4)) @ torch.ones(4)
    free = Jacobian(lambda y: scaled_dot_product_attention(x * y, x, x), torch.ones(4))
    difference = (free._fn(torch.tensor([1.0, 1, 1, 1 + 1e-6])) - free._fn(torch.tensor([1.0, 1, 1, 1 - 1e-6]))) / 2e-6
    torch.testing.assert_close(free @ torch.tensor([0.0, 0, 0, 1]), difference, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("fn", "options", "error", "message"),
    [
        (torch.sin, {"order": "backward"}, ValueError, "order must be one of auto, reverse, forward, linearize"),
        (lambda y: 3.0, {}, TypeError, "floating point tensors, got float at its output"),
        (lambda y: {"a": y.argmax()}, {}, TypeError, r"floating point tensors, got torch.int64 at \['a'\]"),
        (lambda y: y.float(), {}, ValueError, "domain has dtype torch.float64, its range torch.float32"),
    ],
)
def test_misuse(fn, options, error, message) -> None:
    with pytest.raises(error, match=message):
        Jacobian(fn, torch.ones(3), **options)


def test_shapes_of_operands_are_checked() -> None:
    J = Jacobian(lambda y: y.sum()[None], torch.ones(3))
    with pytest.raises(ValueError, match="the operator acts on"):
        J @ torch.ones(2)
    with pytest.raises(ValueError, match="the operator acts on"):
        J.T @ torch.ones(3)


# ---------------------------------------------------------------- mixed derivatives


def mixed_objective(x: dict, y: dict) -> Tensor:
    quadratic = (torch.sin(x["a"])[:, None] * y["w"] ** 2).sum() + x["b"] * (y["w"].sum() * y["c"])
    return quadratic + torch.exp(x["b"] * y["c"]) + y["linear"].sum()


def mixed_point() -> tuple[dict, dict]:
    x = {"b": torch.tensor(0.3), "a": normal(0, 3), "idle": normal(1, 2)}
    return x, {"linear": normal(3, 2), "w": normal(2, 3, 2), "c": torch.tensor(-0.4), "none": torch.zeros(0, 2)}


def dense_mixed(g, x, y) -> Tensor:
    """Row i is the gradient in y of dg/dx_i."""

    def flat(p: Tensor, q: Tensor) -> Tensor:
        return g(tree.unravel(p, x), tree.unravel(q, y))

    return torch.func.jacfwd(torch.func.grad(flat), argnums=1)(tree.ravel(x), tree.ravel(y))


def test_mixed_derivatives_of_trees() -> None:
    x, y = mixed_point()
    M = MixedDerivative(mixed_objective, x, y)
    expected = dense_mixed(mixed_objective, x, y)
    check_against(M, expected)
    assert float(expected.norm()) > 1
    found = M @ {"linear": torch.ones(2), "none": torch.zeros(0, 2), "c": torch.tensor(1.0), "w": torch.zeros(3, 2)}
    assert list(found) == ["b", "a", "idle"]
    torch.testing.assert_close(found["idle"], torch.zeros(2))
    bc = x["b"] * y["c"]
    torch.testing.assert_close(found["b"], y["w"].sum() + (1 + bc) * torch.exp(bc))


def test_mixed_derivatives_of_every_architecture(zoo: Architecture) -> None:
    """x scales the outputs' classes, so that second derivatives of the network enter."""
    x, y = {"scale": 1 + 0.1 * normal(3, zoo.outputs(zoo.parameters).shape[1])}, zoo.parameters

    def of(outputs):
        def objective(p: dict, q: dict) -> Tensor:
            scaled = p["scale"] * outputs(q)
            if zoo.targets.is_floating_point():
                return ((scaled - zoo.targets) ** 2).mean()
            return (scaled.logsumexp(dim=1) - scaled[torch.arange(len(scaled)), zoo.targets]).mean()

        return objective

    M = MixedDerivative(of(zoo.outputs), x, y)
    if not zoo.twice:
        with pytest.raises(ValueError, match="wrong second derivatives"):
            M.flat_mv(normal(0, M.size))
        return
    check_against(M, dense_mixed(of(zoo.reference), x, y))


def test_mixed_derivatives_in_the_inputs_of_a_network() -> None:
    for name in ("tanh", "layer norm", "attention, MATH", "lstm"):
        net = architecture(name)

        def of(outputs, net=net):
            def objective(x: Tensor, y: dict) -> Tensor:
                z = outputs(y, x)
                return (z.logsumexp(dim=1) - z[torch.arange(len(z)), net.targets]).mean()

            return objective

        plain = net.plain if net.plain is not None else net.outputs
        expected = dense_mixed(of(plain), net.inputs, net.parameters)
        M = MixedDerivative(of(net.outputs), net.inputs, net.parameters)
        check_against(M, expected)


def test_terms_without_an_interaction_have_no_mixed_derivative() -> None:
    x, y = normal(0, 2), normal(1, 3)
    for g in (
        lambda p, q: (p**2).sum() + (q**2).sum(),
        lambda p, q: (p**2).sum(),
        lambda p, q: (q**2).sum(),
        lambda p, q: torch.zeros(()),
        lambda p, q: p.sum() + q.sum(),
    ):
        M = MixedDerivative(g, x, y)
        assert not M.to_dense().any() and not M.T.to_dense().any()
        assert M.to_dense().shape == (2, 3)


def test_each_direction_evaluates_once_and_only_when_asked() -> None:
    calls = []

    def g(p: Tensor, q: Tensor) -> Tensor:
        calls.append(1)
        return (torch.sin(p) * q).sum()

    M = MixedDerivative(g, torch.ones(2), torch.ones(2))
    assert not calls
    M @ torch.ones(2)
    M.flat_mm(torch.eye(2))
    assert (len(calls), M.products) == (1, 3)
    M.T @ torch.ones(2)
    M.T @ torch.ones(2)
    M.T.T @ torch.ones(2)
    assert len(calls) == 2


def test_the_graph_is_freed_with_the_operator() -> None:
    held = torch.ones(3)
    gc.disable()
    try:
        M = MixedDerivative(lambda p, q: (p * q * held).sum(), torch.ones(3), torch.ones(3))
        M @ torch.ones(3)
        M.T @ torch.ones(3)
        gone = weakref.ref(M._graphs[False])
        del M
        assert gone() is None
    finally:
        gc.enable()


def test_mixed_derivatives_refuse_operations_without_second_derivative() -> None:
    M = MixedDerivative(lambda p, q: (Once.apply(p * q) + q**2).sum(), torch.ones(2), torch.ones(2))
    for operator in (M, M.T):
        with pytest.raises(ValueError, match=r"Once is an autograd.Function marked once_differentiable"):
            operator @ torch.ones(2)


def test_mixed_derivatives_refuse_what_is_no_objective() -> None:
    with pytest.raises(ValueError, match="the objective must return a scalar"):
        MixedDerivative(lambda p, q: p * q, torch.ones(2), torch.ones(2)) @ torch.ones(2)
    with pytest.raises(TypeError, match="the objective must return a scalar tensor"):
        MixedDerivative(lambda p, q: 1.0, torch.ones(2), torch.ones(2)) @ torch.ones(2)
    with pytest.raises(ValueError, match=r"domain has dtype torch.float64, its range torch.float32"):
        MixedDerivative(lambda p, q: q.sum(), torch.ones(2, dtype=torch.float32), torch.ones(2))


class _Frozen(torch.autograd.Function):
    """A square whose backward pass hides its own derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        with torch.no_grad():
            return 2 * x * cotangents[0]


@pytest.mark.parametrize("seed", range(8))
def test_a_jacobian_is_not_zero_because_there_are_many_inputs(seed: int) -> None:
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    with pytest.raises(RuntimeError, match="disagrees with the transpose"):
        Jacobian(_Frozen.apply, x, order="reverse") @ torch.ones_like(x)
