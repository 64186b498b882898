"""Which order a Hessian product is differentiated in, what torch cannot differentiate, and recorded products."""

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from implicit import GradientGraph, Hessian, module_objective, tree
from implicit.operators import order as orders
from implicit.recorded import Recorded, Unrecordable
from tests.architectures import architecture


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def off(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def quartic(y: Tensor) -> Tensor:
    return torch.logsumexp(3 * y, 0) + (y**4).sum() / 12 + (y[:-1] ** 2 * y[1:]).sum()


POINT = normal(1, 7)


def dense(fn=quartic, at: Tensor = POINT) -> Tensor:
    return torch.func.hessian(fn)(at)


# --- the choice ---


def test_auto_keeps_the_graph_and_records_a_product_once_that_pays() -> None:
    operator, expected = Hessian(quartic, POINT), dense()
    assert (operator.order, operator.reason) == (
        "reverse-over-reverse",
        "the graph of the gradient is kept: 1.5 gradients per product",
    )
    for count in range(1, 40):
        v = normal(count, 7)
        assert off(operator.flat_mv(v), expected @ v) < 1e-13
        assert operator.order == ("linearize" if count > orders.RECORD_AFTER else "reverse-over-reverse")
    assert "recorded after 24 products" in operator.reason
    assert operator.products == operator.graph.products == 39
    assert operator.graph.passes == orders.RECORD_AFTER + 2  # the record and its check
    shared = Hessian.of(operator.graph)  # who shares the graph shares the record
    assert shared.order == "linearize"
    assert Hessian.of(operator.graph, order="reverse-over-reverse").order == "reverse-over-reverse"


def test_expected_products_decide_at_once() -> None:
    for expected, order in ((1, "reverse-over-reverse"), (47, "reverse-over-reverse"), (48, "linearize")):
        operator = Hessian(quartic, POINT, expected_products=expected)
        operator.flat_mv(POINT)
        assert operator.order == order
    assert "48 products are expected" in operator.reason
    forced = Hessian(quartic, POINT, order="reverse-over-reverse", expected_products=1000)
    forced.flat_mm(normal(2, 60, 7), chunk=1)
    assert (forced.order, forced.reason) == ("reverse-over-reverse", "asked for")


def test_large_problems_are_not_recorded_unasked() -> None:
    """Replaying saves overhead, which is nothing where every operation is long."""
    operator = Hessian(quartic, POINT, block_bytes=1, expected_products=100)
    operator.flat_mm(normal(3, 60, 7))
    assert operator.order == "reverse-over-reverse"
    assert operator.graph.passes == 60
    asked = Hessian(quartic, POINT, order="linearize", block_bytes=1)
    assert asked.order == "linearize"
    assert off(asked.to_dense(), dense()) < 1e-13


def test_small_problems_go_in_blocks_of_bounded_memory() -> None:
    rows, expected = normal(4, 41, 7), normal(4, 41, 7) @ dense()
    traffic = Hessian(quartic, POINT).graph.traffic
    for block_bytes, passes in ((None, 1), (10 * traffic, 5), (7 * traffic, 41)):
        operator = Hessian(quartic, POINT, order="reverse-over-reverse", block_bytes=block_bytes)
        assert off(operator.flat_mm(rows), expected) < 1e-13
        assert (operator.graph.passes, operator.graph.products, operator.products) == (passes, 41, 41)
    few = Hessian(quartic, POINT)
    few.flat_mm(rows[:3])
    assert few.graph.passes == 3
    few.mm(rows, chunk=5)
    assert few.graph.passes == 12


@pytest.mark.parametrize("order", orders.ORDERS)
def test_every_order_brings_value_and_gradient(order: str) -> None:
    operator = Hessian(quartic, POINT, order=order)
    assert operator.order == order
    assert operator.reason.startswith("asked for")
    assert float(operator.value) == pytest.approx(float(quartic(POINT)), rel=1e-15)
    torch.testing.assert_close(operator.gradient, torch.func.grad(quartic)(POINT))
    assert off(operator.to_dense(), dense()) < (1e-8 if order == "finite-difference" else 1e-13)
    assert not operator.flat_mv(POINT).requires_grad
    if order in ("forward-over-reverse", "finite-difference"):
        with pytest.raises(TypeError, match=f"order '{order}' keeps no graph"):
            _ = operator.graph
        with pytest.raises(
            ValueError, match=f"evaluates the objective anew; build it with Hessian.fn, y, order='{order}'"
        ):
            Hessian.of(GradientGraph(lambda _, y: quartic(y), (), POINT), order=order)


def test_misuse_is_named() -> None:
    with pytest.raises(ValueError, match=r"order must be 'auto' or one of 'reverse-over-reverse', .*, got 'fast'"):
        Hessian(quartic, POINT, order="fast")
    for name in ("expected_products", "block_bytes"):
        for value in (0, 1.5, True):
            with pytest.raises(ValueError, match=f"{name} must be None or a positive integer, got {value}"):
                Hessian(quartic, POINT, **{name: value})


@pytest.mark.parametrize("order", ["reverse-over-reverse", "linearize", "forward-over-reverse"])
def test_nested_dicts_empty_leaves_and_numbers(order: str) -> None:
    at = {
        "a": {"w": normal(5, 2, 2), "none": torch.zeros(0, 3)},
        "b": [torch.tensor(0.7), normal(6, 1)],
        "idle": normal(7, 2),
    }

    def fn(y):
        return y["b"][0] * (y["a"]["w"] ** 3).sum() + (y["a"]["w"][0] * y["b"][1]).sum() ** 2 + y["idle"].sum()

    operator = Hessian(fn, at, order=order)
    expected = torch.func.hessian(lambda v: fn(tree.unravel(v, at)))(tree.ravel(at))
    rows = normal(8, 6, operator.size)
    for _ in range(2):
        assert off(operator.to_dense(), expected) < 1e-13
        assert off(operator.flat_mm(rows[:2]), rows[:2] @ expected) < 1e-13
        assert off(tree.ravel(operator @ at), expected @ tree.ravel(at)) < 1e-13
        assert off(tree.ravel_batch(operator.mm(tree.unravel(rows, at))), rows @ expected) < 1e-13
        assert off(tree.ravel_batch(operator.mm(tree.unravel(rows[:2], at))), rows[:2] @ expected) < 1e-13
    assert (operator @ at)["idle"].tolist() == [0.0, 0.0]


class HalfSquare(torch.autograd.Function):
    """``|x|^2 / 2``; its gradient is x itself, and so a product the vector itself."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return (x * x).sum() / 2

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, slope):
        return ctx.saved_tensors[0].view(-1)

    @staticmethod
    def jvp(ctx, tangent):
        return (ctx.saved_tensors[0] * tangent).sum()


@pytest.mark.parametrize("order", ["reverse-over-reverse", "linearize", "forward-over-reverse"])
def test_products_own_their_memory(order: str) -> None:
    for fn, at in (
        (HalfSquare.apply, POINT),
        (lambda y: (y**2).sum() / 2, POINT),
        (lambda y: (y[0] * y[1]).sum(), (POINT, 2 * POINT)),
        (lambda y: (y["a"] @ y["a"]) / 2 + y["b"].sum(), {"a": POINT, "b": POINT}),
    ):
        operator = Hessian(fn, at, order=order)
        flat, rows = tree.ravel(at).clone(), tree.ravel(at).clone().expand(5, -1).clone()
        v = tree.unravel(flat, at)
        before, expected = flat.clone(), operator.flat_mv(flat).clone()
        for _ in range(2):
            operator.flat_mv(flat).mul_(3)
            operator.flat_mm(rows).mul_(3)
            tree.map(lambda leaf: leaf.mul_(3), operator @ v)
            torch.testing.assert_close(flat, before)
            torch.testing.assert_close(operator.flat_mv(flat), expected)


# --- what torch cannot differentiate twice ---


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx, slope):
        return 3 * ctx.saved_tensors[0] ** 2 * slope


@pytest.mark.parametrize("outer", [lambda c: c.sum(), lambda c: (c**2).sum()], ids=["its slope constant", "or not"])
def test_functions_that_are_differentiable_once(outer) -> None:
    """Where its slope needs no gradient torch takes such a function for linear: a Hessian of zeros, without a word."""

    def fn(y: Tensor) -> Tensor:
        return outer(Cube.apply(y))

    expected = dense(lambda y: outer(y**3))
    operator = Hessian(fn, POINT)
    assert operator.order == "finite-difference"
    assert operator.reason == (
        "differences of gradients because Cube is an autograd.Function marked once_differentiable; write its backward "
        "with differentiable operations and drop the mark; accurate to about 4e-11 relative"
    )
    assert off(operator.to_dense(), expected) < 1e-8
    for order in ("reverse-over-reverse", "linearize", "forward-over-reverse"):
        with pytest.raises(ValueError, match=f"order='{order}' does not work .*Cube is .*once_differentiable"):
            Hessian(fn, POINT, order=order)
    graph = GradientGraph(lambda x, y: x * fn(y), torch.tensor(2.0), POINT)
    for product in (graph.hvp, graph.mixed_vjp, graph.joint, Hessian.of(graph).mv):
        with pytest.raises(ValueError, match=r"Cube is an autograd\.Function marked once_differentiable"):
            product(POINT)


def test_what_y_does_not_enter_is_differentiated_once_only() -> None:
    graph = GradientGraph(lambda x, y: Cube.apply(x) * (y**3).sum(), torch.tensor(2.0), POINT)
    assert graph.obstacle is None
    mixed, curved = graph.joint(POINT)
    torch.testing.assert_close(mixed, 12 * (3 * POINT**3).sum())
    torch.testing.assert_close(curved, 8 * 6 * POINT**2)


def test_operations_without_a_second_derivative() -> None:
    targets, lengths = torch.tensor([[1, 2]]), (torch.tensor([4]), torch.tensor([2]))

    def fn(y: Tensor) -> Tensor:
        return F.ctc_loss(y.reshape(4, 1, 3).log_softmax(-1), targets, *lengths)

    at = normal(9, 12)
    operator = Hessian(fn, at)
    assert operator.order == "finite-difference"
    assert "an operation of the objective has no second derivative in torch" in operator.reason

    # The loss is a logsumexp over alignments of the sums of log-probabilities.
    def plain(y: Tensor) -> Tensor:
        rows = y.reshape(4, 3).log_softmax(-1)
        paths = [p for p in torch.cartesian_prod(*[torch.arange(3)] * 4).tolist() if collapse(p) == [1, 2]]
        return -torch.logsumexp(torch.stack([sum(rows[i, s] for i, s in enumerate(p)) for p in paths]), 0) / 2

    def collapse(path: list[int]) -> list[int]:
        return [s for i, s in enumerate(path) if s and (not i or path[i - 1] != s)]

    assert off(operator.to_dense(), dense(plain, at)) < 1e-7
    with pytest.raises(ValueError, match=r"has no second derivative in torch\. Use order='auto' or order='finite-diff"):
        Hessian(fn, at, order="reverse-over-reverse")
    with pytest.raises(
        ValueError, match=r"cannot differentiate an operation of the objective twice: .*_ctc_loss_backward is not"
    ):
        GradientGraph(lambda _, y: fn(y), (), at).hvp(at)


@pytest.mark.parametrize("order", ["auto", "reverse-over-reverse", "linearize", "forward-over-reverse"])
def test_attention_runs_on_the_math_kernel(order: str) -> None:
    """The CPU's flash attention refuses every order."""
    net = architecture("attention, default")
    evaluations = []

    def fn(p):
        evaluations.append(torch.backends.cuda.flash_sdp_enabled())
        return net.objective(p)

    operator = Hessian(fn, net.parameters, order=order)
    assert "attention runs on the MATH kernel" in operator.reason
    assert off(operator.to_dense(), net.dense_hessian()) < 1e-10
    assert evaluations[0] and not any(evaluations[1:])
    assert torch.backends.cuda.flash_sdp_enabled()  # the setting is put back


def test_graphs_run_attention_on_the_math_kernel_too() -> None:
    net = architecture("attention, default")
    graph = GradientGraph(lambda x, p: x * net.objective(p), torch.tensor(2.0), net.parameters)
    assert graph.notes == ("attention runs on the MATH kernel, the only one that can be differentiated twice",)
    v = net.unravel(normal(10, len(net.point)))
    mixed, curved = graph.joint(v)
    assert off(tree.ravel(curved), 2 * net.dense_hessian() @ tree.ravel(v)) < 1e-10
    slope = torch.func.grad(lambda q: net.loss(net.reference(net.unravel(q)), net.targets))(net.point)
    assert float(mixed) == pytest.approx(float(slope @ tree.ravel(v)), rel=1e-10)
    assert GradientGraph(lambda _, y: quartic(y), (), POINT).notes == ()


def test_attention_pinned_to_flash_is_explained() -> None:
    net = architecture("attention, default")

    def pinned(p):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return net.objective(p)

    operator = Hessian(pinned, net.parameters)
    assert operator.order == "finite-difference"
    assert "pins attention to a kernel without second derivatives; pin SDPBackend.MATH" in operator.reason
    assert off(operator.flat_mv(net.point), net.dense_hessian() @ net.point) < 1e-6
    with pytest.raises(ValueError, match=r"pin SDPBackend\.MATH"):
        Hessian(pinned, net.parameters, order="linearize")


def test_batch_norm_in_training_mode_needs_its_buffers_cloned() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).double()
    X = normal(11, 6, 3)

    def bare(p):
        return (torch.func.functional_call(model, p, (X,)) ** 2).mean()

    objective = module_objective(model, lambda net: (net(X) ** 2).mean())
    careless, careful = Hessian(bare, objective.parameters), Hessian(objective, objective.parameters)
    moved = model[1].running_mean.clone()
    assert float(moved.norm()) > 0  # by the careless one alone
    v = normal(12, careful.size)
    assert off(careless.flat_mv(v), careful.flat_mv(v)) < 1e-12
    forward = Hessian(objective, objective.parameters, order="forward-over-reverse")
    assert off(forward.flat_mv(v), careful.flat_mv(v)) < 1e-12
    assert torch.equal(model[1].running_mean, moved)
    with pytest.raises(
        ValueError, match=r"it changes a tensor in place, as batch norm .*use implicit\.module_objective"
    ):
        Hessian(bare, objective.parameters, order="forward-over-reverse").flat_mv(v)


@pytest.mark.parametrize("order", ["reverse-over-reverse", "linearize"])
def test_a_point_that_moved_is_noticed(order: str) -> None:
    at = normal(27, 4)
    operator = Hessian(lambda y: (y**4).sum(), at, order=order)
    operator.flat_mv(at)
    at.add_(1)
    for product in (operator.flat_mv, lambda v: operator.flat_mm(v.expand(6, -1)), operator.mv):
        with pytest.raises(ValueError, match=r"changed in place.*build the operator anew"):
            product(at)


def test_the_fused_lstm_refuses_forward_mode_in_single_precision() -> None:
    lstm = nn.LSTM(2, 3, batch_first=True)
    with torch.no_grad():
        for p in lstm.parameters():
            p.copy_(normal(13, *p.shape))
    single, double = lstm.float(), nn.LSTM(2, 3, batch_first=True).double()
    double.load_state_dict(single.state_dict())
    X = normal(14, 4, 5, 2)
    objective = module_objective(single, lambda net: (net(X.float())[0] ** 2).mean())
    exact = module_objective(double, lambda net: (net(X)[0] ** 2).mean())
    with pytest.raises(
        ValueError, match=r"order='forward-over-reverse' does not work .*mkldnn_rnn_layer.*order='reverse"
    ):
        _ = Hessian(objective, objective.parameters, order="forward-over-reverse") @ objective.parameters
    operator, reference = Hessian(objective, objective.parameters), Hessian(exact, exact.parameters)
    v = normal(15, operator.size)
    assert off(operator.flat_mv(v.float()), reference.flat_mv(v).float()) < 1e-5


@pytest.mark.gpu
def test_recurrent_layers_on_a_gpu_run_without_cudnn() -> None:
    net = nn.LSTM(2, 3, batch_first=True).double().cuda()
    X = normal(16, 4, 5, 2).cuda()
    objective = module_objective(net, lambda net: (net(X)[0] ** 2).mean())
    operator = Hessian(objective, objective.parameters)
    assert "cuDNN is off" in operator.reason
    differences = Hessian(objective, objective.parameters, order="finite-difference")
    v = normal(17, operator.size).cuda()
    assert off(operator.flat_mv(v), differences.flat_mv(v)) < 1e-6


def test_the_padding_row_of_an_embedding_is_frozen() -> None:
    """torch gives that row no gradient, so only the Hessian in the other rows means anything."""
    tokens = torch.tensor([[0, 1, 2], [2, 2, 0]])

    def fn(table: Tensor) -> Tensor:
        return (torch.tanh(F.embedding(tokens, table, padding_idx=0).mean(1)) ** 2).sum()

    table = normal(18, 3, 2)
    free = dense(lambda rows: fn(torch.cat([table[:1], rows.reshape(2, 2)])), table[1:].reshape(-1))
    found = Hessian(fn, table).to_dense()
    assert off(found[2:, 2:], free) < 1e-13
    assert float(found[:2].norm()) == float(found[:, :2].norm()) == 0.0


# --- recorded products ---


def test_a_record_replays_the_map() -> None:
    a = normal(20, 3, 3)

    def linear(v: Tensor, w: Tensor):
        first, second = torch.split(a @ v, [1, 2])
        return [torch.cat([second, first]) + w.T @ v, None, w.t().t(), a[0]]

    v, w = normal(21, 3), normal(22, 3, 3)
    recorded = Recorded(linear, [v, w])
    for seed in (23, 24):
        v, w = normal(seed, 3), normal(seed + 10, 3, 3)
        found = recorded(v, w)
        expected = linear(v, w)
        assert found[1] is None
        for i in (0, 2, 3):
            assert torch.equal(found[i], expected[i])
        for part in (found[0], found[2], found[3]):  # no memory is shared with arguments or constants
            part.mul_(2)
        assert torch.equal(recorded(v, w)[3], a[0])
        assert torch.equal(recorded(v, w)[2], w)
    batch = recorded.batch(normal(25, 4, 3), normal(26, 4, 3, 3))
    for i in range(4):
        one = linear(normal(25, 4, 3)[i], normal(26, 4, 3, 3)[i])
        torch.testing.assert_close(batch[0][i], one[0])
    assert batch[1] is None


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda v: [v * v.sum().item()], "turns tensors into numbers"),
        (lambda v: [v * torch.rand_like(v)], "draws random numbers"),
        (lambda v: [v.mul_(2)], "writes into memory that it shares"),
        (lambda v: [torch.ones(3).copy_(v)], "writes into memory that it shares"),
        (lambda v: [v.reshape(1, 3).to_sparse().to_dense()], "layout torch.sparse_coo"),
    ],
)
def test_what_is_more_than_a_list_of_operations_is_not_recorded(function, reason: str) -> None:
    with pytest.raises(Unrecordable, match=reason):
        Recorded(function, [normal(28, 3)])


def test_operations_in_place_on_memory_of_their_own_are_recorded() -> None:
    recorded = Recorded(lambda v: [(2 * v).add_(v).mul_(v.sum())], [normal(29, 3)])
    v = normal(30, 3)
    for _ in range(2):
        torch.testing.assert_close(recorded(v)[0], 3 * v * v.sum())


class Branching(torch.autograd.Function):
    """The square; its backward pass looks at values."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, slope):
        return 2 * ctx.saved_tensors[0] * (slope if float(slope.detach().norm()) > 0 else torch.zeros_like(slope))


class Hidden(torch.autograd.Function):
    """The square; its backward pass leaves torch, where no recorder sees it."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, slope):
        return HiddenProduct.apply(2 * ctx.saved_tensors[0], slope)


class HiddenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return torch.from_numpy(a.detach().numpy() * b.detach().numpy())

    @staticmethod
    def backward(ctx, slope):
        a, b = ctx.saved_tensors
        return HiddenProduct.apply(slope, b), HiddenProduct.apply(slope, a)


def test_operations_that_cannot_be_batched_are_looped_over() -> None:
    operator = Hessian(lambda y: (Branching.apply(y) ** 2).sum(), POINT, order="reverse-over-reverse")
    rows = normal(19, 6, 7)
    for _ in range(2):
        assert off(operator.flat_mm(rows), 12 * POINT**2 * rows) < 1e-13
        assert off(operator.mm(rows), 12 * POINT**2 * rows) < 1e-13
    assert "one vector at a time: " in operator.reason
    assert operator.graph.products == operator.products == 24
    assert operator.graph.passes == 1 + 24  # tried once


@pytest.mark.parametrize(
    ("function", "reason"),
    [(Branching, "turns tensors into numbers"), (Hidden, "does more than a fixed list of operations")],
)
def test_a_record_that_would_be_wrong_is_not_used(function, reason: str) -> None:
    def fn(y: Tensor) -> Tensor:
        return (function.apply(y) ** 2 * torch.arange(1.0, 8.0)).sum()

    operator, expected = Hessian(fn, POINT, expected_products=1000), torch.diag(12 * torch.arange(1.0, 8.0) * POINT**2)
    for seed in range(3):
        v = normal(seed, 7)
        assert off(operator.flat_mv(v), expected @ v) < 1e-13
    assert operator.order == "reverse-over-reverse"
    assert "not recorded: " in operator.reason
    assert reason in operator.reason
    with pytest.raises(ValueError, match=f"order='linearize' does not work for this objective: .*{reason}"):
        Hessian(fn, POINT, order="linearize")


def test_other_errors_are_left_alone() -> None:
    class Odd(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**2

        @staticmethod
        def backward(ctx, slope):
            if torch.is_grad_enabled():
                return 2 * slope * ctx.saved_tensors[0]
            raise RuntimeError("odd")

    graph = GradientGraph(lambda _, y: (Odd.apply(y) ** 2).sum(), (), POINT)
    with pytest.raises(RuntimeError, match="odd"):
        graph.hvp(POINT)


class _Through(torch.autograd.Function):
    """``M x`` by numpy, which no record can see."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Tensor) -> Tensor:
        ctx.save_for_backward(matrix)
        return torch.from_numpy(matrix.numpy() @ x.detach().numpy())

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        (matrix,) = ctx.saved_tensors
        return _Through.apply(cotangents[0], matrix.T.contiguous()), None


def test_a_record_that_misses_a_small_part_is_not_used() -> None:
    matrix = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))

    def fn(y: Tensor) -> Tensor:
        return 1e12 * y[0] ** 2 + (_Through.apply(y[1:], matrix) ** 2).sum()

    operator, v = Hessian(fn, torch.ones(6)), torch.cat([torch.zeros(1), torch.ones(5)])
    expected = 2 * matrix.T @ (matrix @ v[1:])
    for _ in range(60):
        found = operator @ v
    assert operator.order == "reverse-over-reverse"
    torch.testing.assert_close(found[1:], expected)


def test_a_recorded_affine_objective_takes_blocks() -> None:
    operator = Hessian(lambda y: y.sum(), torch.ones(5), order="linearize")
    assert torch.equal(operator @ torch.ones(6, 5), torch.zeros(6, 5))


def test_a_record_is_released_with_its_operator() -> None:
    operator = Hessian(lambda y: (y**4).sum(), torch.ones(50), order="linearize")
    assert operator.graph.recorded is not None
    record = weakref.ref(operator.graph.recorded._run)  # its globals hold the constants
    gc.collect()
    gc.disable()
    try:
        del operator
        assert record() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "fn",
    [
        lambda y: (F.embedding_bag(torch.tensor([[0, 1], [2, 3]]), y, mode="mean") ** 3).sum(),
        lambda y: torch.cdist(y, torch.ones(4, 3)).sum(),
    ],
    ids=["embedding_bag", "cdist"],
)
def test_operations_without_a_second_backward_pass_go_to_differences(fn: Any) -> None:
    y = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    operator = Hessian(fn, y)
    assert operator.order == "finite-difference"
    with pytest.raises(ValueError, match="no second derivative in torch"):
        Hessian(fn, y, order="reverse-over-reverse")
