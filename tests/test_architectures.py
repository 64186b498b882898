"""The zoo itself, and every order of Hessian products on it."""

import pytest
import torch
from torch import Tensor

from implicit import Hessian, tree
from tests.architectures import MAKERS, Architecture, architecture


@pytest.fixture(params=MAKERS)
def zoo(request: pytest.FixtureRequest) -> Architecture:
    return architecture(request.param)


def gradient(net: Architecture, point: Tensor) -> Tensor:
    variable = point.detach().requires_grad_()
    return torch.autograd.grad(net.objective(net.unravel(variable)), variable)[0]


def off(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_the_references_are_the_modules(zoo: Architecture) -> None:
    parameters = zoo.parameters
    torch.testing.assert_close(zoo.reference(parameters), zoo.outputs(parameters), rtol=1e-13, atol=1e-13)
    width = 1e-5
    steps = width * torch.eye(len(zoo.point))
    differences = torch.stack([gradient(zoo, zoo.point + s) - gradient(zoo, zoo.point - s) for s in steps])
    assert off(differences / (2 * width), zoo.dense_hessian()) < 2e-9
    changes = [zoo.outputs(zoo.unravel(zoo.point + s)) - zoo.outputs(zoo.unravel(zoo.point - s)) for s in steps]
    columns = torch.stack([c.reshape(-1) for c in changes], dim=1) / (2 * width)
    torch.testing.assert_close(columns, zoo.dense_jacobian(), rtol=1e-7, atol=1e-7)


def test_evaluations_leave_the_modules_alone(zoo: Architecture) -> None:
    before = {key: value.clone() for key, value in zoo.module.state_dict().items()}
    gradient(zoo, zoo.point + 1.0)
    for key, value in zoo.module.state_dict().items():
        assert torch.equal(value, before[key]), key


def every_product(operator: Hessian, matrix: Tensor, tolerance: float) -> None:
    """One vector, loops and batched passes, flat and as trees, against the dense matrix."""
    rows = torch.randn(30, operator.size, generator=torch.Generator().manual_seed(9))
    expected = rows @ matrix
    assert off(operator.flat_mv(rows[0]), expected[0]) < tolerance
    assert off(tree.ravel(operator @ tree.unravel(rows[1], operator.like)), expected[1]) < tolerance
    assert off(operator.flat_mm(rows, chunk=3), expected) < tolerance  # too few for a batched pass
    assert off(operator.flat_mm(rows), expected) < tolerance
    assert off(tree.ravel_batch(operator @ tree.unravel(rows, operator.like)), expected) < tolerance
    assert off(tree.ravel_batch(operator.mm(tree.unravel(rows[:3], operator.like))), expected[:3]) < tolerance
    assert off(operator.to_dense(), matrix) < tolerance


def refusal(net: Architecture, order: str) -> str | None:
    """What is said where torch cannot differentiate the net in that order."""
    if order == "forward-over-reverse":
        if net.targets.is_floating_point():
            return r"no forward mode for the backward pass of F.mse_loss; write \(\(a - b\) \*\* 2\).mean\(\)"
        return None if net.forward else "Use order='auto' or order='reverse-over-reverse'"
    if order == "auto":
        return None
    if not net.twice:
        return "torch's fused weight norm has wrong second derivatives; write"
    return "copy_.* writes into memory that it shares" if order == "linearize" and not net.functional else None


@pytest.mark.parametrize("order", ["auto", "reverse-over-reverse", "linearize", "forward-over-reverse"])
def test_every_order_gives_the_dense_hessian(zoo: Architecture, order: str) -> None:
    if (said := refusal(zoo, order)) is not None:
        with pytest.raises(ValueError, match=f"order='{order}' does not work for this objective: .*{said}"):
            _ = Hessian(zoo.objective, zoo.parameters, order=order) @ zoo.parameters
        return
    operator = Hessian(zoo.objective, zoo.parameters, order=order)
    expected, tolerance = zoo.dense_hessian(), 1e-10 if zoo.twice else 1e-7
    every_product(operator, expected, tolerance)
    # Thirty products one after the other: "auto" has recorded one by now.
    rows = torch.randn(30, operator.size, generator=torch.Generator().manual_seed(10))
    assert off(torch.stack([operator.flat_mv(row) for row in rows]), rows @ expected) < tolerance
    every_product(operator, expected, tolerance)
    assert off(tree.ravel(operator.gradient), gradient(zoo, zoo.point)) < 1e-12
    assert float(operator.value) == pytest.approx(float(zoo.objective(zoo.parameters)), rel=1e-13)
    if order != "auto":
        assert operator.order == order
    elif not zoo.twice:
        assert operator.order == "finite-difference"
        assert "torch's fused weight norm has wrong second derivatives" in operator.reason
    elif not zoo.functional:
        assert operator.order == "reverse-over-reverse"
        assert "not recorded: aten.copy_" in operator.reason
    else:
        assert operator.order == "linearize"
        assert "recorded after 24 products" in operator.reason


def test_differences_come_close(zoo: Architecture) -> None:
    operator = Hessian(zoo.objective, zoo.parameters, order="finite-difference")
    v = torch.randn(operator.size, generator=torch.Generator().manual_seed(9))
    assert off(operator.flat_mv(v), zoo.dense_hessian() @ v) < 1e-6
