"""BA-L1 and BA-L1SP of CUTEst: one point seen by six cameras, twelve equations for 57 unknowns."""

import torch
from torch import Tensor
from torch.func import jacrev

from constrained import EqualityProblem
from problems.constrained_case import ConstrainedCase
from problems.registry import register

POINT = (-0.6120001572, 0.57175904776, -1.847081276)
CAMERAS = (  # rotation vector (3), translation (3), two distortion coefficients, focal length
    (0.01574151594, -0.0127909362, -0.0044008498, -0.0340938396, -0.107513871, 1.1202240291)
    + (-3.177064e-7, 5.882049e-13, 399.75152639),
    (0.01597732412, -0.0252244646, -0.0094001416, -0.0085667661, -0.1218804907, 0.7190133075)
    + (-3.780477e-7, 9.307431e-13, 402.01753386),
    (0.01484625118, -0.0210628994, -0.001166948, -0.0249509707, -0.1139847055, 0.92166020737)
    + (-3.295265e-7, 6.732885e-13, 400.40175368),
    (0.01991666998, -1.22433082, 0.0119988756, -1.411897512, -0.1148065151, 0.44915582738)
    + (5.95875e-8, -2.48391e-13, 407.03024568),
    (0.02082242153, -1.238434791, 0.01389314763, -1.049686225, -0.1299513286, 0.33798380231)
    + (4.5673127e-8, -1.79243e-13, 405.91764962),
    (0.01658816461, -1.247226838, 0.01846788123, -0.8617315756, -0.1321089362, 0.28256800868)
    + (4.7465711e-8, -1.50881e-13, 404.73590637),
)
SEEN = (-332.65, 262.09, -199.76, 166.7, -253.06, 202.27, 58.13, 271.89, 238.22, 237.37, 317.55, 221.15)
SOURCE = "Bundle Adjustment in the Large, Ladybug data, as in CUTEst (N. I. M. Gould, 2016)"


def _start(dtype: torch.dtype, device: str) -> Tensor:
    return torch.tensor([*POINT, *(value for camera in CAMERAS for value in camera)], dtype=dtype, device=device)


def reprojection(x: Tensor) -> Tensor:
    """Where the six cameras x[3:] see the point x[:3], minus where they saw it, in pixels.

    A camera turns the point about its rotation vector, moves it, divides by minus its depth, and scales by the focal
    length and the radial distortion ``1 + k1 r^2 + k2 r^4``.
    """
    point, cameras = x[:3], x[3:].reshape(6, 9)
    axis, shift, (k1, k2, focal) = cameras[:, :3], cameras[:, 3:6], cameras[:, 6:].T
    angle = torch.linalg.vector_norm(axis, dim=1, keepdim=True)
    unit = axis / angle
    cross = torch.linalg.cross(unit, point.expand(6, 3))
    along = (unit @ point)[:, None] * unit
    moved = along + (point - along) * torch.cos(angle) + cross * torch.sin(angle) + shift
    plane = -moved[:, :2] / moved[:, 2:]
    square = (plane**2).sum(dim=1)
    scale = focal * (1 + k1 * square + k2 * square**2)
    return (scale[:, None] * plane).reshape(-1) - torch.tensor(SEEN, dtype=x.dtype, device=x.device)


@register("ba-l1", "BA-L1: 57 variables, equality", "constrained", "equality", "cutest")
def ba_l1(*, dtype: torch.dtype = torch.float64, device: str = "cpu") -> ConstrainedCase:
    """Twelve reprojection errors to be made zero by moving the point and the cameras; solutions fill a manifold."""
    return ConstrainedCase(
        name="ba-l1",
        problem=EqualityProblem(lambda x: x.new_zeros(()), reprojection, name="BA-L1"),
        start=_start(dtype, device),
        source=SOURCE,
        f_star=0.0,
        note="CUTEst evaluates the even rows from memory that was not set; these are the rows as they were meant",
    )


@register("ba-l1sp", "BA-L1SP: 57 variables, equality", "constrained", "equality", "cutest")
def ba_l1sp(*, dtype: torch.dtype = torch.float64, device: str = "cpu") -> ConstrainedCase:
    """A quadratic model of BA-L1 about its start, in the displacement x: r + Jx + J-weighted products.

    Row i is ``r_i + sum_a J_ia (x_a + x_a^2 / 2 + sum_{b > a} x_a x_b)``: the published model repeats the entries of J
    as its second-order coefficients.
    """
    origin = _start(dtype, device)
    value, jacobian = reprojection(origin), jacrev(reprojection)(origin)

    def model(x: Tensor) -> Tensor:
        later = x.sum() - x.cumsum(0)
        return value + jacobian @ (x + 0.5 * x**2 + x * later)

    return ConstrainedCase(
        name="ba-l1sp",
        problem=EqualityProblem(lambda x: x.new_zeros(()), model, name="BA-L1SP"),
        start=torch.zeros_like(origin),
        source=SOURCE,
        f_star=0.0,
        note="r and J come from the formulas of BA-L1; CUTEst has coefficients from unset memory, which "
        "from_s2mpj('BAmL1SP') gives",
    )
