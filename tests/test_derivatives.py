"""Second-order products on nested pytrees against dense matrices, and their own derivatives."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jacrev

import implicit
from implicit import GradientDifference, GradientGraph, Hessian, tree
from implicit.tree import Tree
from tests.architectures import architecture
from tests.dense import SETTINGS, Flat, Objective, Setting, normal, relative, setting_of, swapped


@pytest.fixture(params=SETTINGS)
def setting(request: pytest.FixtureRequest) -> Setting:
    return setting_of(request.param)


def quartic(x: Tree, y: Tree) -> Tensor:
    """Couples every leaf of x = {s, m} with every leaf of y = {v, rest: [u, t]}."""
    inner = (y["v"] * x["s"]).sum() + (y["rest"][0] @ x["m"]).sum() + y["rest"][1]
    apart = torch.sin(y["v"]).sum() * (x["m"] ** 2).sum() + (y["rest"][0] ** 4).sum()
    return inner**2 + apart + torch.exp(x["s"] * inner / 9)


def quartic_point() -> tuple[Tree, Tree]:
    x = {"s": torch.tensor(0.7), "m": normal(20, 3, 2)}
    return x, {"v": normal(21, 4), "rest": [normal(22, 2, 3), normal(23)]}


@pytest.fixture
def products() -> tuple[Tree, Tree, Tree, Tensor, Tensor]:
    """x, y, a direction v, and the dense products (g_xy v, g_yy v)."""
    x, y = quartic_point()
    v = tree.unravel(normal(24, tree.size(y)), y)
    flat, at = Flat(quartic, x, y), (tree.ravel(x), tree.ravel(y))
    return x, y, v, flat.mixed(*at).T @ tree.ravel(v), flat.hessian(*at) @ tree.ravel(v)


def close(found: Tree, expected: Tensor, like: Tree) -> None:
    assert tree.describe(found) == tree.describe(like)
    torch.testing.assert_close(tree.ravel(found), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("order", [lambda v: v, swapped], ids=["same keys", "swapped keys"])
def test_graph_products(products: tuple[Tree, Tree, Tree, Tensor, Tensor], order: Callable[[Tree], Tree]) -> None:
    x, y, v, mixed, curved = products
    graph = GradientGraph(quartic, x, y)
    close(graph.hvp(order(v)), curved, y)
    close(graph.mixed_vjp(order(v)), mixed, x)
    joint_x, joint_y = graph.joint(order(v))
    close(joint_x, mixed, x)
    close(joint_y, curved, y)
    assert graph.products == 3
    flat, at = Flat(quartic, x, y), (tree.ravel(x), tree.ravel(y))
    close(graph.gradient, flat.gradient(*at, 1), y)
    assert float(graph.value) == pytest.approx(float(flat(*at)))
    assert not any(leaf.requires_grad for leaf in tree.leaves((graph.value, graph.gradient, joint_x, joint_y)))


def test_graph_batches(products: tuple[Tree, Tree, Tree, Tensor, Tensor]) -> None:
    x, y, *_ = products
    rows = normal(25, 5, tree.size(y))
    graph = GradientGraph(quartic, x, y)
    found = graph.hvp_batch(swapped(tree.unravel(rows, y)))
    matrix = Flat(quartic, x, y).hessian(tree.ravel(x), tree.ravel(y))
    torch.testing.assert_close(tree.ravel_batch(found), rows @ matrix)
    assert list(found) == list(y)
    assert graph.products == 5


@pytest.mark.parametrize("order", [lambda v: v, swapped], ids=["same keys", "swapped keys"])
def test_functional_products(products: tuple[Tree, Tree, Tree, Tensor, Tensor], order: Callable[[Tree], Tree]) -> None:
    x, y, v, mixed, curved = products
    close(implicit.hvp(lambda q: quartic(x, q), y, order(v)), curved, y)
    close(implicit.mixed_vjp(quartic, x, y, order(v)), mixed, x)
    joint_x, joint_y = implicit.joint_product(quartic, x, y, order(v))
    close(joint_x, mixed, x)
    close(joint_y, curved, y)


def test_functional_products_can_be_differentiated() -> None:
    x, y = quartic_point()
    v = tree.unravel(normal(24, tree.size(y)), y)
    leaves, spec = tree.flatten((x, y, v))

    def joined(*values: Tensor) -> tuple[Tensor, ...]:
        p, q, w = tree.unflatten(values, spec)
        curved, mixed = implicit.hvp(lambda point: quartic(p, point), q, w), implicit.mixed_vjp(quartic, p, q, w)
        return tuple(tree.leaves((curved, mixed, implicit.joint_product(quartic, p, q, w))))

    inputs = tuple(leaf.clone().requires_grad_() for leaf in leaves)
    assert gradcheck(joined, inputs, fast_mode=True)
    assert gradgradcheck(joined, inputs, fast_mode=True, gen_non_contig_grad_outputs=True)


def test_functional_products_of_attention() -> None:
    """The CPU's flash attention has no second derivative; the products run on the MATH kernel, and so do theirs."""
    net = architecture("attention, default")
    expected, at, x = net.dense_hessian(), net.parameters, torch.tensor(1.5)
    v = net.unravel(normal(33, len(net.point)))
    close(implicit.hvp(net.objective, at, v), expected @ tree.ravel(v), at)
    mixed, curved = implicit.joint_product(lambda p, q: p * net.objective(q), x, at, v)
    close(curved, 1.5 * expected @ tree.ravel(v), at)
    slope = torch.func.grad(lambda q: net.loss(net.reference(net.unravel(q)), net.targets))(net.point)
    assert float(mixed) == pytest.approx(float(slope @ tree.ravel(v)), rel=1e-10)
    third = torch.func.grad(lambda q: tree.dot(implicit.hvp(net.objective, q, v), v))(at)
    steps = [net.unravel(net.point + s * 1e-5 * tree.ravel(v)) for s in (1, -1)]
    ahead, behind = (float(tree.dot(implicit.hvp(net.objective, q, v), v)) for q in steps)
    assert float(tree.dot(third, v)) == pytest.approx((ahead - behind) / 2e-5, rel=1e-6)


def test_functional_products_of_packed_sequences_are_refused_with_the_cure() -> None:
    net = architecture("packed lstm")
    with pytest.raises(ValueError, match=r"packed sequences; use implicit\.Hessian with order='reverse-over-reverse'"):
        implicit.hvp(net.objective, net.parameters, net.parameters)
    with pytest.raises(ValueError, match="packed sequences"):
        _ = Hessian(net.objective, net.parameters, order="forward-over-reverse") @ net.parameters
    with pytest.raises(RuntimeError, match="shape"):  # other errors are left alone
        implicit.hvp(lambda y: (y @ y.reshape(3, 1)).sum(), torch.ones(2), torch.ones(2))


Y = {"in": normal(28, 2), "linear": normal(29, 1), "out": normal(30, 2, 2)}
X = {"in": normal(31), "out": normal(32, 3)}

DEGENERATE = {
    "leaves that do not enter": lambda x, y: x["in"] * (y["in"] ** 3).sum() + y["linear"].sum(),
    "linear in y": lambda x, y: x["in"] * y["in"].sum() + 2 * y["linear"].sum(),
    "linear, without x": lambda x, y: y["in"].sum() + 2 * y["linear"].sum(),
    "without y": lambda x, y: x["in"] ** 2,
    "constant": lambda x, y: torch.tensor(3.0),
    "shape (1,)": lambda x, y: (x["in"] * (y["in"] ** 2).sum()).reshape(1),
}


@pytest.mark.parametrize("fn", DEGENERATE.values(), ids=DEGENERATE)
def test_products_of_degenerate_objectives(fn: Objective) -> None:
    def scalar(x: Tensor, y: Tensor) -> Tensor:
        return fn(tree.unravel(x, X), tree.unravel(y, Y)).reshape(())

    x, y = tree.ravel(X), tree.ravel(Y)
    gradient, matrix = grad(scalar, argnums=1), jacrev(grad(scalar, argnums=1), argnums=(0, 1))
    mixed, curved = matrix(x, y)
    rows = normal(26, 3, 7)
    v = tree.unravel(rows[0], Y)
    graph = GradientGraph(fn, X, Y)
    close(graph.gradient, gradient(x, y), Y)
    close(graph.hvp(v), curved @ rows[0], Y)
    close(graph.mixed_vjp(v), mixed.T @ rows[0], X)
    for part, expected, like in zip(graph.joint(v), (mixed.T @ rows[0], curved @ rows[0]), (X, Y), strict=True):
        close(part, expected, like)
    torch.testing.assert_close(tree.ravel_batch(graph.hvp_batch(tree.unravel(rows, Y))), rows @ curved)
    torch.testing.assert_close(implicit.Hessian(lambda q: fn(X, q), Y).to_dense(), curved)


def test_objectives_that_are_no_scalars() -> None:
    with pytest.raises(ValueError, match=r"the lower objective must return a scalar, got shape \(2,\); reduce it"):
        GradientGraph(lambda x, y: y, (), torch.ones(2))
    with pytest.raises(TypeError, match="the lower objective must return a scalar tensor, got float"):
        GradientGraph(lambda x, y: 1.0, (), torch.ones(2))  # type: ignore[arg-type, return-value]


def test_directions_of_another_structure_are_refused() -> None:
    graph = GradientGraph(lambda x, y: (y["a"] ** 2).sum(), (), {"a": torch.ones(2)})
    with pytest.raises(ValueError, match="different structures"):
        graph.hvp({"b": torch.ones(2)})


def test_gradient_differences(setting: Setting) -> None:
    operator = GradientDifference(lambda q: setting.lower(setting.x, q), setting.y)
    _, g, x, y = setting.flat
    matrix = g.hessian(x, y)
    assert relative(operator.to_dense(), matrix) < 1e-7
    v = normal(27, len(y))
    for size in (1e-6, 1.0, 1e6):  # the width follows the length of the direction
        assert relative(operator.flat_mv(size * v), size * matrix @ v) < 1e-7
    assert float(operator.flat_mv(torch.zeros_like(y)).norm()) == 0
    assert relative(tree.ravel(operator @ swapped(tree.unravel(v, setting.y))), matrix @ v) < 1e-7
