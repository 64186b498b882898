"""Modules as functions of their parameters, curvature summed over minibatches, and blocks."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from implicit import Accumulated, BlockHessian, Dense, Hessian, module_objective, tree
from tests.architectures import MAKERS, Architecture, architecture


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def off(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(params=[name for name in MAKERS if "weight norm" not in name])
def zoo(request: pytest.FixtureRequest) -> Architecture:
    return architecture(request.param)


def test_a_module_becomes_a_function_of_its_parameters(zoo: Architecture) -> None:
    before = copy.deepcopy(zoo.module.state_dict())
    objective = module_objective(zoo.module, lambda net, X, t: zoo.loss(net(X), t))
    assert objective.parameters.keys() == zoo.parameters.keys()
    operator = Hessian(lambda p: objective(p, zoo.inputs, zoo.targets), objective.parameters)
    v = normal(1, operator.size)
    expected = zoo.dense_hessian() @ v
    assert off(operator.flat_mv(v), expected) < 1e-10
    # Other evaluations in between, elsewhere, do not disturb the kept graph or the module.
    objective(zoo.unravel(zoo.point + 1), zoo.inputs, zoo.targets)
    assert off(operator.flat_mv(v), expected) < 1e-10
    for key, value in zoo.module.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_shared_modules_are_not_written_to() -> None:
    """torch's functional_call with tied weights leaves its argument in a module reached under two names."""
    activation = nn.PReLU()
    model = nn.Sequential(nn.Linear(2, 3), activation, nn.Linear(3, 2), activation)
    objective = module_objective(model, lambda net, X: (net(X) ** 2).mean())
    assert list(objective.parameters) == ["0.weight", "0.bias", "1.weight", "2.weight", "2.bias"]
    moved = {name: p + 1 for name, p in objective.parameters.items()}
    X = normal(2, 5, 2)
    value = objective(moved, X)
    assert activation.weight.tolist() == [0.25]
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in reference.named_parameters():
            p.copy_(moved[name])
    assert float(value) == pytest.approx(float((reference(X) ** 2).mean().detach()), rel=1e-14)


def test_frozen_parameters_are_constants_and_buffers_are_shared_as_in_the_module() -> None:
    norm = nn.BatchNorm1d(2)
    model = nn.Sequential(nn.Linear(2, 2), norm, nn.Linear(2, 2), norm)
    model[0].requires_grad_(False)
    objective = module_objective(model, lambda net, X: (net(X) ** 3).mean() + (net(2 * X) ** 2).mean())
    assert list(objective.parameters) == ["1.weight", "1.bias", "2.weight", "2.bias"]
    X = normal(3, 6, 2)
    operator = Hessian(lambda p: objective(p, X), objective.parameters)
    like = objective.parameters
    flat = torch.func.grad(lambda v: objective(tree.unravel(v, like), X))
    columns = [torch.func.jvp(flat, (tree.ravel(like),), (e,))[1] for e in torch.eye(operator.size)]
    assert off(operator.to_dense(), torch.stack(columns, dim=1)) < 1e-10
    assert float(norm.running_mean.norm()) == 0.0
    assert int(norm.num_batches_tracked) == 0


class Counting(nn.Module):
    """Adds a buffer to its input and counts it up."""

    def __init__(self, count: Tensor) -> None:
        super().__init__()
        self.register_buffer("count", count)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        return x + self.scale * self.count.clone()


def test_a_buffer_of_two_modules_stays_one() -> None:
    count = torch.zeros(())
    objective = module_objective(nn.Sequential(Counting(count), Counting(count)), lambda net, x: net(x).sum())
    for _ in range(2):
        assert float(objective(objective.parameters, torch.zeros(1))) == 1 + 2
    assert float(count) == 0


def test_misuse_of_modules_is_named() -> None:
    model = nn.Linear(2, 1)
    objective = module_objective(model, lambda net, X: net(X).sum())
    with pytest.raises(
        ValueError, match=r"missing \['bias'\], unknown \['b'\]; start from the objective's .parameters"
    ):
        objective({"weight": torch.zeros(1, 2), "b": torch.zeros(1)}, torch.zeros(3, 2))
    with pytest.raises(TypeError, match=r"module must be an nn\.Module, got function"):
        module_objective(lambda x: x, lambda net: net)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Linear has no parameters that require gradients"):
        module_objective(nn.Linear(1, 1).requires_grad_(False), lambda net: net)


X, T = normal(4, 23, 3), torch.randint(4, (23,), generator=torch.Generator().manual_seed(5))
LIKE = {"w": normal(6, 3, 4), "b": normal(7, 4)}


def loss(y: tree.Tree, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(torch.tanh(batch[0] @ y["w"]) + y["b"], batch[1])


def hessian_of(batch: tuple[Tensor, Tensor], **options: object) -> Hessian:
    return Hessian(lambda y: loss(y, batch), LIKE, **options)  # type: ignore[arg-type]


def batches(size: int = 5) -> list[tuple[Tensor, Tensor]]:
    return list(zip(X.split(size), T.split(size), strict=True))


class Shuffled:
    """Batches that differ from one pass to the next."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        order = torch.randperm(len(X), generator=self.generator)
        return iter([(X[part], T[part]) for part in order.split(5)])


SOURCES: dict[str, Callable[[], object]] = {
    "list": batches,
    "tuple": lambda: tuple(batches(7)),
    "loader": lambda: DataLoader(
        TensorDataset(X, T), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(1)
    ),
    "shuffled": Shuffled,
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("order", ["auto", "forward-over-reverse"])
@pytest.mark.parametrize("memory", [2**30, 3_000, 0])
def test_minibatches_add_up_to_the_full_data(source: str, order: str, memory: int) -> None:
    full = hessian_of((X, T))
    found = Accumulated(lambda batch: hessian_of(batch, order=order), SOURCES[source](), memory=memory)
    rows = normal(8, 6, full.size)
    for _ in range(2):
        assert off(found.flat_mv(rows[0]), full.flat_mv(rows[0])) < 1e-12
        assert off(found.flat_mm(rows), full.flat_mm(rows)) < 1e-12
        assert off(tree.ravel(found @ LIKE), tree.ravel(full @ LIKE)) < 1e-12
    assert off(tree.ravel(found.gradient), tree.ravel(full.gradient)) < 1e-12
    assert float(found.value) == pytest.approx(float(full.value), rel=1e-13)
    assert found.products == 2 * (1 + 6 + 1)
    assert found.symmetric and found.positive_definite


def test_what_is_kept_follows_the_memory() -> None:
    one = hessian_of(batches()[0]).held_bytes
    assert one > 0
    calls: list[int] = []

    def make(batch: tuple[Tensor, Tensor]) -> Hessian:
        calls.append(len(batch[0]))
        return hessian_of(batch)

    everything = Accumulated(make, batches())
    everything.flat_mv(normal(9, everything.size))
    assert (everything.kept, calls) == (5, [5, 5, 5, 5, 3])
    assert everything.held_bytes > 4 * one
    calls.clear()
    part = Accumulated(make, batches(), memory=2 * one)
    assert part.kept == 2
    assert part.held_bytes == 2 * one
    part.flat_mv(normal(9, part.size))
    part.flat_mm(normal(9, 4, part.size))  # rebuilt once for the whole block
    assert calls == [5, 5, 5, 5, 3] + 2 * [5, 5, 3]
    source = Shuffled()
    none = Accumulated(make, source, memory=2 * one)
    assert none.kept == 0
    none.flat_mv(normal(9, none.size))
    assert source.passes == 2
    assert hessian_of((X, T), order="finite-difference").held_bytes == 0


def test_sums_weights_and_rectangular_parts() -> None:
    parts = [normal(seed, 2, 3) for seed in (10, 11, 12)]
    v, u = normal(13, 3), normal(14, 2)
    for options, expected in (
        ({"reduction": "sum"}, parts[0] + parts[1] + parts[2]),
        (
            {"weights": lambda m: float(m[0, 0].abs())},
            sum(m * m[0, 0].abs() for m in parts) / sum(m[0, 0].abs() for m in parts),
        ),
    ):
        for memory in (0, 100):
            found = Accumulated(Dense, parts, memory=memory, **options)
            assert found.shape == (2, 3)
            assert not found.symmetric
            torch.testing.assert_close(found.flat_mv(v), expected @ v)
            torch.testing.assert_close(found.T.flat_mv(u), expected.T @ u)
            torch.testing.assert_close(found.T.T.to_dense(), expected)
    with pytest.raises(TypeError, match="carry no value"):
        _ = found.value
    with pytest.raises(TypeError, match="carry no gradient"):
        _ = found.gradient
    symmetric = Accumulated(lambda m: Dense(m @ m.T), parts)
    assert symmetric.T is symmetric
    assert not Accumulated(lambda m: Dense(m @ m.T, positive_definite=False), parts).positive_definite


def test_misuse_of_minibatches_is_named() -> None:
    with pytest.raises(TypeError, match="batches is a generator, empty after one pass"):
        Accumulated(hessian_of, (batch for batch in batches()))
    with pytest.raises(ValueError, match="batches is empty"):
        Accumulated(hessian_of, [])
    with pytest.raises(ValueError, match="reduction must be 'mean' or 'sum', got 'max'"):
        Accumulated(hessian_of, batches(), reduction="max")
    with pytest.raises(ValueError, match="weights are for reduction='mean'"):
        Accumulated(hessian_of, batches(), reduction="sum", weights=lambda batch: 1.0)
    with pytest.raises(ValueError, match=r"the weight of batch 0 is -1.0; weights must be positive"):
        Accumulated(hessian_of, batches(), weights=lambda batch: -1.0)
    with pytest.raises(ValueError, match=r"not plain from its tensors \(first axes \[2, 3\]\); give weights"):
        Accumulated(lambda batch: Dense(torch.eye(2)), [(torch.zeros(2), torch.zeros(3))])


def of_block(y: tree.Tree, data: tree.Tree) -> Tensor:
    inner = torch.tanh(data["rows"] @ y["w"]) + y["b"]
    return (data["mask"] * (inner - data["t"]) ** 2).sum() + (y["b"] ** 4).sum() * data["scale"]


def block_data(b: int) -> tree.Tree:
    mask = (torch.arange(5) < torch.arange(b)[:, None] % 4 + 2).double()  # blocks of two to five rows
    return {"rows": normal(15, b, 5, 3), "t": normal(16, b, 5), "mask": mask, "scale": normal(17, b)}


def test_blocks_are_the_hessians_of_the_parts() -> None:
    b = 6
    y, data = {"w": normal(18, b, 3), "b": normal(19, b, 1), "none": torch.zeros(b, 0)}, block_data(b)
    operator = BlockHessian(of_block, y, data)
    expected = []
    for i in range(b):
        y_i, data_i = tree.map(lambda leaf, i=i: leaf[i], y), tree.map(lambda leaf, i=i: leaf[i], data)
        rows = int(data_i["mask"].sum())
        short = {**data_i, "rows": data_i["rows"][:rows], "t": data_i["t"][:rows], "mask": torch.ones(rows)}
        expected.append(
            torch.func.hessian(lambda v, y_i=y_i, short=short: of_block(tree.unravel(v, y_i), short))(tree.ravel(y_i))
        )
    assert off(operator.blocks(), torch.stack(expected)) < 1e-12
    assert operator.blocks().shape == (b, 4, 4)
    assert operator.count == b
    v = tree.unravel(normal(20, operator.size), y)
    found = operator @ v
    for i in range(b):
        own = tree.ravel(tree.map(lambda leaf, i=i: leaf[i], v))
        torch.testing.assert_close(tree.ravel(tree.map(lambda leaf, i=i: leaf[i], found)), expected[i] @ own)
    assert operator.graph.passes < operator.products  # columns of all blocks share passes
    for order in ("linearize", "forward-over-reverse", "finite-difference"):
        again = BlockHessian(of_block, y, data, order=order)
        assert off(again.blocks(), torch.stack(expected)) < (1e-6 if order == "finite-difference" else 1e-12)


def test_blocks_cost_one_pass_for_all() -> None:
    """d passes for b blocks of size d, however many blocks there are."""
    for b in (2, 200):
        operator = BlockHessian(of_block, {"w": normal(18, b, 3), "b": normal(19, b, 1)}, block_data(b), block_bytes=1)
        operator.blocks()
        assert operator.graph.passes == operator.products == 4


def test_blocks_with_layer_norm() -> None:
    """Layer norm is what torch batches wrongly when whole Jacobians are nested."""
    y, weight = {"x": normal(21, 3, 4), "w": normal(22, 3, 4)}, normal(23, 4)

    def fused(y: tree.Tree) -> Tensor:
        return (F.layer_norm(y["x"], (4,), y["w"]) ** 3 * weight).sum()

    def plain(y: tree.Tree) -> Tensor:
        centred = y["x"] - y["x"].mean()
        return ((centred / torch.sqrt((centred**2).mean() + 1e-5) * y["w"]) ** 3 * weight).sum()

    for order in ("auto", "linearize", "forward-over-reverse"):
        assert off(BlockHessian(fused, y, order=order).blocks(), BlockHessian(plain, y).blocks()) < 1e-10
    i_th = tree.map(lambda leaf: leaf[1], y)
    one = torch.func.hessian(lambda v: plain(tree.unravel(v, i_th)))(tree.ravel(i_th))
    assert off(BlockHessian(plain, y).blocks()[1], one) < 1e-10


def test_blocks_of_numbers_and_misuse() -> None:
    operator = BlockHessian(lambda y: y**3, torch.tensor([1.0, 2.0]))
    assert operator.blocks().tolist() == [[[6.0]], [[12.0]]]
    with pytest.raises(ValueError, match="y and data must be stacked along one first axis"):
        BlockHessian(of_block, {"w": torch.zeros(2, 3), "b": torch.zeros(3, 1)}, block_data(2))
    with pytest.raises(ValueError, match="y and data must be stacked along one first axis"):
        BlockHessian(lambda y: y, torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"fn must return a scalar, got shape \(3,\)"):
        BlockHessian(lambda y: y, torch.zeros(2, 3))
