"""How accurately the Newton system has to be solved, by theory."""

import torch

from implicit import LinearOperator

DELTA_FLOOR = 1e-6
PSI_FACTOR = 20.0
SMALLEST_XI = 1e-12


def inverse_bound(jacobian: LinearOperator, hessian: LinearOperator, xi_b: float) -> float:
    """Psi, the paper's bound on the norm of the inverse of the KKT matrix:
    ``20 max(|B|_F^2, 1) / (min(xi_G, 1) min(xi_B, 1))`` with ``xi_G = lambda_min(G G^T)``."""
    matrix = jacobian.to_dense()
    xi_g = float(torch.linalg.eigvalsh(matrix @ matrix.T)[0].clamp(min=SMALLEST_XI))
    size = float(hessian.to_dense().square().sum())
    return PSI_FACTOR * max(size, 1.0) / (min(xi_g, 1.0) * min(xi_b, 1.0))


def accuracy_trial(
    jacobian: LinearOperator, hessian: LinearOperator, mu: float, nu: float, beta: float, xi_b: float
) -> float:
    """``delta_trial = (1/2 - beta) nu / ((1 + mu + nu) Upsilon^2 Psi^2)``, ``Upsilon = max(|G|_F, |H|_F, 1)``."""
    sizes = [float(torch.linalg.matrix_norm(part.to_dense())) for part in (jacobian, hessian)]
    upsilon, psi = max(*sizes, 1.0), inverse_bound(jacobian, hessian, xi_b)
    return (0.5 - beta) * nu / ((1.0 + mu + nu) * upsilon**2 * psi**2)


def relative_tolerance(
    jacobian: LinearOperator, hessian: LinearOperator, theta: float, delta: float, xi_b: float
) -> float:
    """The relative residual at which ``|Gamma|_F Psi |r| <= theta delta |b|``, Gamma being the KKT matrix."""
    g, h = (float(part.to_dense().square().sum()) for part in (jacobian, hessian))
    size = (h + 2.0 * g) ** 0.5
    return theta * delta / (max(size, 1e-300) * inverse_bound(jacobian, hessian, xi_b))
