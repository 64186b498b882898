"""Gauss-Newton and Fisher matrices against dense Jacobians with closed-form middle factors, on every architecture."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot

from implicit import CG, Fisher, GaussNewton, Hessian, Jacobi, Shifted, hutchinson_diagonal, tree
from tests.architectures import MAKERS, Architecture, architecture
from tests.dense import normal, relative

TOLERANCE = 1e-11


@pytest.fixture(params=MAKERS)
def zoo(request: pytest.FixtureRequest) -> Architecture:
    return architecture(request.param)


def blocks(probabilities: Tensor) -> Tensor:
    """The Hessian of the summed cross-entropy in the logits, shape ``(N C, N C)``."""
    return torch.block_diag(*[torch.diag(p) - p[:, None] * p[None, :] for p in probabilities])


def curvature_of_loss(net: Architecture) -> Tensor:
    """The Hessian of the network's mean loss in its outputs, by formula."""
    outputs = net.outputs(net.parameters)
    if net.targets.is_floating_point():
        return 2.0 / outputs.numel() * torch.eye(outputs.numel())
    return blocks(torch.softmax(outputs, dim=1)) / len(outputs)


def check_against(operator, expected: Tensor) -> None:
    """Single and batched products, the dense matrix, both of scipy's products, and positive semidefiniteness."""
    n = len(expected)
    assert operator.shape == (n, n)
    assert operator.symmetric and operator.T is operator
    rows = normal(0, 3, n)
    assert relative(operator.flat_mv(rows[0]), expected @ rows[0]) < TOLERANCE
    assert relative(operator.flat_mm(rows), rows @ expected) < TOLERANCE
    dense = operator.to_dense(chunk=13)
    assert relative(dense, expected) < TOLERANCE
    assert relative(dense, dense.T) < 1e-12
    assert float(torch.linalg.eigvalsh(0.5 * (dense + dense.T))[0]) > -1e-12 * float(dense.norm())
    view, v = operator.to_scipy(), rows[1].numpy()
    for product in (view.matvec, view.rmatvec):
        np.testing.assert_allclose(product(v), expected.numpy() @ v, rtol=1e-9, atol=1e-11)


# ---------------------------------------------------------------- Gauss-Newton


def test_every_architecture(zoo: Architecture) -> None:
    J = zoo.dense_jacobian()
    G = GaussNewton(zoo.outputs, lambda z: zoo.loss(z, zoo.targets), zoo.parameters)
    check_against(G, J.T @ curvature_of_loss(zoo) @ J)
    plain = zoo.unravel(zoo.point.requires_grad_())
    value = zoo.objective(plain)
    torch.testing.assert_close(G.value, value.detach(), rtol=1e-12, atol=0)
    slopes = torch.autograd.grad(value, list(plain.values()), materialize_grads=True)
    torch.testing.assert_close(list(G.gradient.values()), list(slopes), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", ["tanh", "layer norm", "attention, MATH", "lstm"])
def test_forward_mode_gives_the_same(name: str) -> None:
    net = architecture(name)
    J = net.dense_jacobian()
    G = GaussNewton(net.outputs, lambda z: net.loss(z, net.targets), net.parameters, order="forward")
    check_against(G, J.T @ curvature_of_loss(net) @ J)
    assert G.jacobian.order == "forward"


def test_minibatches_add_up_to_the_full_operator() -> None:
    for name in ("tanh", "convolution", "gru", "embedding"):
        net = architecture(name)
        n = len(net.inputs)

        def part(rows: Tensor, net=net) -> GaussNewton:
            return GaussNewton(
                lambda p: net.outputs(p, net.inputs[rows]), lambda z: net.loss(z, net.targets[rows]), net.parameters
            )

        batches = torch.split(torch.arange(n), 2)
        total = sum(((len(rows) / n) * part(rows) for rows in batches[1:]), (len(batches[0]) / n) * part(batches[0]))
        J = net.dense_jacobian()
        check_against(total, J.T @ curvature_of_loss(net) @ J)


def test_the_gap_to_the_hessian_is_the_models_own_curvature() -> None:
    """At exp(y x) with residual r: H - G = sum_i r_i x_i^2 exp(y x_i)."""
    x, t, y = normal(0, 6), normal(1, 6), torch.tensor(0.3)

    def model(q: Tensor) -> Tensor:
        return (q * x).exp()

    def loss(z: Tensor) -> Tensor:
        return 0.5 * ((z - t) ** 2).sum()

    G = GaussNewton(model, loss, y)
    H = Hessian(lambda q: loss(model(q)), y)
    gap = ((model(y) - t) * x**2 * model(y)).sum()
    one = torch.tensor(1.0)
    torch.testing.assert_close(H @ one - G @ one, gap)
    torch.testing.assert_close(G @ one, (x**2 * model(y) ** 2).sum())
    fitted = GaussNewton(model, lambda z: 0.5 * ((z - model(y)) ** 2).sum(), y)
    perfect = Hessian(lambda q: 0.5 * ((model(q) - model(y)) ** 2).sum(), y)
    torch.testing.assert_close(fitted @ one, perfect @ one)


def test_outputs_may_be_a_tree_and_the_loss_may_couple_them() -> None:
    y = {"w": normal(0, 3, 2), "b": normal(1, 2)}
    x = normal(2, 5, 3)

    def model(p: dict) -> dict:
        z = torch.tanh(x @ p["w"] + p["b"])
        return {"mean": z.mean(dim=0), "parts": [z, (p["b"] ** 2).sum()]}

    def loss(z: dict) -> Tensor:
        return torch.exp(z["mean"].sum()) + (z["parts"][0] ** 2).sum() * z["parts"][1] ** 2

    G = GaussNewton(model, loss, y)
    outputs = model(y)

    def flat_model(v: Tensor) -> Tensor:
        return tree.ravel(model(tree.unravel(v, y)))

    J = torch.func.jacfwd(flat_model)(tree.ravel(y))
    inner = torch.func.hessian(lambda v: loss(tree.unravel(v, outputs)))(tree.ravel(outputs))
    assert relative(G.to_dense(), J.T @ inner @ J) < TOLERANCE
    found = G @ {"b": torch.ones(2), "w": torch.zeros(3, 2)}
    assert list(found) == ["w", "b"]
    expected = J.T @ inner @ J @ torch.cat([torch.zeros(6), torch.ones(2)])
    torch.testing.assert_close(tree.ravel(found), expected, rtol=1e-11, atol=1e-12)


def test_a_linear_loss_has_no_curvature() -> None:
    G = GaussNewton(torch.sin, lambda z: z.sum(), normal(0, 4))
    assert not G.to_dense().any()
    torch.testing.assert_close(G.gradient, torch.cos(normal(0, 4)))


def test_model_and_loss_are_evaluated_once_and_products_counted() -> None:
    calls = {"model": 0, "loss": 0}

    def model(y: Tensor) -> Tensor:
        calls["model"] += 1
        return torch.sin(y)

    def loss(z: Tensor) -> Tensor:
        calls["loss"] += 1
        return (z**4).sum()

    G = GaussNewton(model, loss, torch.ones(3))
    G @ torch.ones(3)
    G.flat_mm(torch.eye(3))
    _ = G.gradient, G.value
    assert calls == {"model": 1, "loss": 1}
    assert G.products == 4


def test_cg_solves_with_a_damped_gauss_newton_matrix() -> None:
    net = architecture("tanh")
    G = GaussNewton(net.outputs, lambda z: net.loss(z, net.targets), net.parameters)
    b = tree.unravel(normal(0, G.size), G.like)
    found = CG(rtol=1e-10, preconditioner=Jacobi(samples=8)).solve(Shifted(G, 0.01), b)
    assert found.success
    matrix = net.dense_jacobian().T @ curvature_of_loss(net) @ net.dense_jacobian() + 0.01 * torch.eye(G.size)
    assert relative(tree.ravel(found.value), torch.linalg.solve(matrix, tree.ravel(b))) < 1e-8


def test_gauss_newton_misuse() -> None:
    with pytest.raises(ValueError, match="the loss must return a scalar, got shape"):
        GaussNewton(torch.sin, lambda z: z, torch.ones(3))
    with pytest.raises(TypeError, match="the loss must return a scalar tensor, got float"):
        GaussNewton(torch.sin, lambda z: 1.0, torch.ones(3))
    with pytest.raises(TypeError, match="must return floating point tensors, got float"):
        GaussNewton(lambda y: 1.0, lambda z: z.sum(), torch.ones(3))
    assert not GaussNewton(torch.sin, torch.sum, torch.ones(3), positive_definite=False).positive_definite


# ---------------------------------------------------------------- Fisher


def test_exact_fisher_is_gauss_newton_on_every_architecture(zoo: Architecture) -> None:
    J, outputs = zoo.dense_jacobian(), zoo.outputs(zoo.parameters)
    if zoo.targets.is_floating_point():
        F = Fisher(zoo.outputs, zoo.parameters, likelihood="gaussian")
        check_against(F, J.T @ J / len(outputs))
        G = GaussNewton(zoo.outputs, lambda z: zoo.loss(z, zoo.targets), zoo.parameters)
        assert relative(2.0 / outputs.shape[1] * F.to_dense(), G.to_dense()) < TOLERANCE  # mean over all entries
    else:
        F = Fisher(zoo.outputs, zoo.parameters)
        check_against(F, J.T @ curvature_of_loss(zoo) @ J)


def rows_model(width: int, count: int = 7, seed: int = 0):
    """A small network from 2 inputs to ``width`` outputs, with its point and dense Jacobian (count, width, n)."""
    x = normal(seed, count, 2)
    point = {"a": normal(seed + 1, 2, 3), "b": normal(seed + 2, 3, width)}

    def model(p: dict) -> Tensor:
        return torch.tanh(x @ p["a"]) @ p["b"]

    dense = torch.func.jacfwd(lambda v: model(tree.unravel(v, point)))(tree.ravel(point))
    return model, point, dense


def assemble(dense: Tensor, middle: Tensor, weights: Tensor | None = None) -> Tensor:
    """``sum_i w_i J_i^T M_i J_i``."""
    w = torch.full((len(dense),), 1.0 / len(dense)) if weights is None else weights
    return torch.einsum("i,iam,iab,ibn->mn", w, dense, middle, dense)


LOSSES = {
    "categorical": lambda z, t: cross_entropy(z, t, reduction="none"),
    "bernoulli": lambda z, t: binary_cross_entropy_with_logits(z, t, reduction="none").sum(dim=1),
    "gaussian": lambda z, t: 0.5 * ((z - t) ** 2).sum(dim=1),
}


def labels_for(likelihood: str, count: int, width: int) -> Tensor:
    if likelihood == "categorical":
        return torch.randint(width, (count,), generator=torch.Generator().manual_seed(4))
    drawn = normal(5, count, width)
    return (drawn > 0).double() if likelihood == "bernoulli" else drawn


@pytest.mark.parametrize("likelihood", LOSSES)
def test_exact_fisher_is_the_hessian_of_the_mean_loss_in_the_outputs(likelihood: str) -> None:
    model, point, dense = rows_model(3)
    targets = labels_for(likelihood, 7, 3)
    loss = LOSSES[likelihood]
    outputs = model(point)
    middle = torch.stack(
        [torch.func.hessian(lambda z, i=i: loss(z[None], targets[i : i + 1])[0])(outputs[i]) for i in range(7)]
    )
    check_against(Fisher(model, point, likelihood=likelihood), assemble(dense, middle))
    weights = torch.tensor([0.0, 1.0, 2.0, 0.5, 0.0, 1.0, 3.0])
    check_against(Fisher(model, point, likelihood=likelihood, weights=weights), assemble(dense, middle, weights))
    G = GaussNewton(model, lambda z: loss(z, targets).mean(), point)
    assert relative(Fisher(model, point, likelihood=likelihood).to_dense(), G.to_dense()) < TOLERANCE


@pytest.mark.parametrize("likelihood", LOSSES)
def test_empirical_fisher_is_the_second_moment_of_per_observation_gradients(likelihood: str) -> None:
    model, point, _ = rows_model(3)
    targets = labels_for(likelihood, 7, 3)

    def single(v: Tensor, i: int) -> Tensor:
        return LOSSES[likelihood](model(tree.unravel(v, point))[i : i + 1], targets[i : i + 1])[0]

    gradients = torch.stack([torch.func.grad(single)(tree.ravel(point), i) for i in range(7)])
    F = Fisher(model, point, likelihood=likelihood, kind="empirical", targets=targets)
    check_against(F, gradients.T @ gradients / 7)
    weights = torch.arange(7.0)
    F = Fisher(model, point, likelihood=likelihood, kind="empirical", targets=targets, weights=weights)
    check_against(F, gradients.T @ torch.diag(weights) @ gradients)


@pytest.mark.parametrize("name", ["tanh", "convolution", "lstm", "packed gru", "tied embedding"])
def test_empirical_fisher_of_networks(name: str) -> None:
    net = architecture(name)
    J, outputs = net.dense_jacobian(), net.outputs(net.parameters)
    scores = one_hot(net.targets, outputs.shape[1]) - torch.softmax(outputs, dim=1)
    gradients = torch.einsum("ia,ian->in", scores, J.reshape(*outputs.shape, -1))
    F = Fisher(net.outputs, net.parameters, kind="empirical", targets=net.targets)
    check_against(F, gradients.T @ gradients / len(gradients))


@pytest.mark.parametrize("likelihood", LOSSES)
def test_sampled_fisher_has_the_exact_mean_and_a_fixed_draw(likelihood: str) -> None:
    model, point, _ = rows_model(3, count=4)
    exact = Fisher(model, point, likelihood=likelihood).to_dense()
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack(
        [
            Fisher(model, point, likelihood=likelihood, kind="sampled", samples=3, generator=generator).to_dense()
            for _ in range(300)
        ]
    )
    error, spread = draws.mean(dim=0) - exact, draws.std(dim=0) / math.sqrt(300)
    assert bool((error.abs() <= 5.0 * spread + 1e-12).all())
    assert float(draws.std(dim=0).max()) > 0.01
    one = Fisher(model, point, likelihood=likelihood, kind="sampled", samples=3)
    same = Fisher(model, point, likelihood=likelihood, kind="sampled", samples=3)
    check_against(one, same.to_dense())
    assert not torch.equal(one.to_dense(), draws[1])


def test_sampled_fisher_is_the_mean_over_its_labels() -> None:
    """Two draws are the mean of the first and the second of the same generator."""
    model, point, _ = rows_model(2)
    both = Fisher(model, point, kind="sampled", samples=2, generator=torch.Generator().manual_seed(3)).to_dense()
    generator = torch.Generator().manual_seed(3)
    first, second = (Fisher(model, point, kind="sampled", generator=generator).to_dense() for _ in range(2))
    assert relative(both, 0.5 * (first + second)) < TOLERANCE
    assert int(torch.linalg.matrix_rank(first)) <= 7


def test_sequences_count_every_position_as_an_observation() -> None:
    x, point = normal(0, 3, 4, 2), normal(1, 2, 5)
    F = Fisher(lambda w: x @ w, point)
    flat = Fisher(lambda w: x.reshape(12, 2) @ w, point)
    assert relative(F.to_dense(), flat.to_dense()) < TOLERANCE
    mask = torch.tensor([[1.0, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]) / 8
    masked = Fisher(lambda w: x @ w, point, weights=mask)
    kept = Fisher(lambda w: x.reshape(12, 2)[mask.reshape(12) > 0] @ w, point)
    assert relative(masked.to_dense(), kept.to_dense()) < TOLERANCE


@pytest.mark.parametrize("likelihood", LOSSES)
def test_the_bartlett_diagonal_is_unbiased(likelihood: str) -> None:
    model, point, _ = rows_model(3, count=4)
    weights = torch.tensor([0.1, 0.4, 0.3, 0.6])
    F = Fisher(model, point, likelihood=likelihood, weights=weights)
    exact = F.to_dense().diag()
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([tree.ravel(F.bartlett_diagonal(generator=generator)) for _ in range(1500)])
    assert bool((draws >= 0).all())
    assert bool(((draws.mean(dim=0) - exact).abs() <= 5.0 * draws.std(dim=0) / math.sqrt(1500) + 1e-12).all())
    pooled = tree.ravel(F.bartlett_diagonal(samples=1500, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(pooled, draws.mean(dim=0))


def test_the_bartlett_diagonal_is_sophias() -> None:
    """B times the squared gradient of the mean loss on sampled labels."""
    model, point, _ = rows_model(3)
    outputs = model(point)
    labels = torch.multinomial(torch.softmax(outputs, dim=1), 1, generator=torch.Generator().manual_seed(2))[:, 0]
    gradient = torch.func.grad(lambda p: cross_entropy(model(p), labels))(point)
    found = Fisher(model, point).bartlett_diagonal(generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(found, {k: 7 * g**2 for k, g in gradient.items()}, rtol=1e-11, atol=1e-14)
    F = Fisher(model, point)
    first, second = F.bartlett_diagonal(), F.bartlett_diagonal()
    assert not torch.equal(first["a"], second["a"])  # the operator's own generator moves on
    assert not F.to_dense().isnan().any()


def test_hutchinson_and_fisher_agree_on_the_diagonal() -> None:
    model, point, _ = rows_model(3)
    F = Fisher(model, point)
    estimate = tree.ravel(hutchinson_diagonal(F, 4000))
    exact = F.to_dense()
    spread = ((exact.square().sum(dim=1) - exact.diag().square()) / 4000).sqrt()
    assert bool(((estimate - exact.diag()).abs() <= 5.0 * spread).all())


def test_large_logits_stay_finite() -> None:
    F = Fisher(lambda w: 1e4 * w[None, :], torch.tensor([1.0, 0.0, -1.0]))
    assert bool(torch.isfinite(F.to_dense()).all())
    B = Fisher(lambda w: 1e4 * w[:, None], torch.tensor([1.0, -1.0]), likelihood="bernoulli", kind="sampled")
    assert bool(torch.isfinite(B.to_dense()).all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"likelihood": "poisson"}, "likelihood must be one of categorical, bernoulli, gaussian, got 'poisson'"),
        ({"kind": "true"}, "kind must be one of exact, sampled, empirical, got 'true'"),
        ({"kind": "empirical"}, 'targets are for kind="empirical", and needed there'),
        ({"targets": torch.zeros(7)}, 'targets are for kind="empirical"'),
        ({"kind": "empirical", "targets": torch.zeros(7)}, r"targets must be integers of shape \(7,\), got \(7,\)"),
        ({"kind": "empirical", "targets": torch.zeros(6).long()}, r"targets must be integers of shape \(7,\)"),
        ({"kind": "empirical", "likelihood": "gaussian", "targets": torch.zeros(7)}, r"of shape \(7, 3\), got \(7,\)"),
        ({"kind": "sampled", "samples": 0}, "samples must be a positive integer, got 0"),
        ({"weights": torch.ones(6)}, r"weights must be nonnegative and of shape \(7,\), got \(6,\)"),
        ({"weights": -torch.ones(7)}, "weights must be nonnegative"),
        ({"order": "sideways"}, "order must be one of"),
    ],
)
def test_fisher_misuse(options, message) -> None:
    model, point, _ = rows_model(3)
    with pytest.raises(ValueError, match=message):
        Fisher(model, point, **options)


def test_fisher_wants_an_axis_for_one_observation() -> None:
    with pytest.raises(ValueError, match=r"one tensor of shape \(\.\.\., width\).*unsqueeze\(-1\)"):
        Fisher(lambda w: w, torch.ones(3))
    with pytest.raises(ValueError, match="one tensor of shape"):
        Fisher(lambda w: {"a": w[None]}, torch.ones(3))
