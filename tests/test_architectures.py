"""The zoo itself, and every order of Hessian products on it."""

import pytest
import torch

from tests.architectures import MAKERS, Architecture, architecture


@pytest.fixture(params=MAKERS)
def zoo(request: pytest.FixtureRequest) -> Architecture:
    return architecture(request.param)


def gradient(net: Architecture, point: torch.Tensor) -> torch.Tensor:
    variable = point.detach().requires_grad_()
    return torch.autograd.grad(net.objective(net.unravel(variable)), variable)[0]


def test_the_references_are_the_modules(zoo: Architecture) -> None:
    parameters = zoo.parameters
    torch.testing.assert_close(zoo.reference(parameters), zoo.outputs(parameters), rtol=1e-13, atol=1e-13)
    width = 1e-5
    steps = width * torch.eye(len(zoo.point))
    differences = torch.stack([gradient(zoo, zoo.point + s) - gradient(zoo, zoo.point - s) for s in steps])
    expected = zoo.dense_hessian()
    assert float((differences / (2 * width) - expected).norm() / expected.norm()) < 2e-9
    changes = [zoo.outputs(zoo.unravel(zoo.point + s)) - zoo.outputs(zoo.unravel(zoo.point - s)) for s in steps]
    columns = torch.stack([c.reshape(-1) for c in changes], dim=1) / (2 * width)
    torch.testing.assert_close(columns, zoo.dense_jacobian(), rtol=1e-7, atol=1e-7)


def test_evaluations_leave_the_modules_alone(zoo: Architecture) -> None:
    before = {key: value.clone() for key, value in zoo.module.state_dict().items()}
    gradient(zoo, zoo.point + 1.0)
    for key, value in zoo.module.state_dict().items():
        assert torch.equal(value, before[key]), key
