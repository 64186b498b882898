"""SVM with one penalty per example: LV-HBA against projected gradient descent on implicit gradients, from 20 starts.

    python tests/benchmarks/svm_hyperparameters.py [--starts 20] [--case svm_penalties] [--data-dir DIR]

The reference minimizes the validation loss of the exactly solved machine over the box of the log-penalties by L-BFGS-B
(scipy) with implicit gradients: one start is that of the case, the others are uniform in the box. LV-HBA runs from the
case's start with default arguments. Prints a Markdown table of validation losses of re-solved machines and of seconds.
"""

import argparse
import time
from dataclasses import dataclass

import numpy as np
import scipy.optimize
import torch
from torch import Tensor

import bilevel
import problems
from problems import svm


@dataclass(frozen=True)
class Run:
    """One row of the table; ``loss`` belongs to the machine re-solved at the final penalties."""

    method: str
    loss: float
    validation_accuracy: float
    test_accuracy: float
    steps: int
    seconds: float
    status: str = ""


def loss_and_gradient(parts: svm.Parts, x: Tensor) -> tuple[float, Tensor]:
    """The validation loss of the machine for x, and its derivative by the implicit function theorem.

    With v = (w, b), Z the signed rows and active rows S, (I_w + Z_S' C_S Z_S) dv/dx_i = C_i slack_i z_i.
    """
    machine = svm.fit(parts.train, x)
    leaves = {key: machine[key].detach().requires_grad_(True) for key in ("w", "b")}
    loss = parts.valid.loss(leaves)
    slope = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(leaves.values()))])
    signed = parts.train.labels[:, None] * torch.nn.functional.pad(parts.train.features, (0, 1), value=1.0)
    weights, ridge = torch.exp(x), torch.ones_like(slope)
    ridge[-1] = 0.0
    matrix = torch.diag(ridge) + signed.T @ ((weights * (machine["slack"] > 0))[:, None] * signed)
    return float(loss.detach()), weights * machine["slack"] * (signed @ torch.linalg.solve(matrix, slope))


def implicit_gradient(parts: svm.Parts, start: Tensor) -> Run:
    """L-BFGS-B from one start."""

    def value(x: np.ndarray) -> tuple[float, np.ndarray]:
        loss, gradient = loss_and_gradient(parts, torch.from_numpy(x))
        return loss, gradient.numpy()

    began = time.perf_counter()
    found = scipy.optimize.minimize(
        value,
        start.numpy(),
        jac=True,
        method="L-BFGS-B",
        bounds=[svm.BOUNDS] * len(start),
        options={"maxiter": 500, "maxfun": 2000, "maxcor": 20, "ftol": 1e-12, "gtol": 1e-7},
    )
    return row("implicit gradient", parts, torch.from_numpy(found.x), found.nit, time.perf_counter() - began)


def starts(parts: svm.Parts, count: int) -> list[Tensor]:
    """The case's start and ``count - 1`` uniform points of the box."""
    generator = torch.Generator().manual_seed(0)
    low, high = svm.BOUNDS
    n = len(parts.train.labels)
    draws = low + (high - low) * torch.rand(count - 1, n, generator=generator, dtype=torch.float64)
    return [torch.full((n,), svm.START, dtype=torch.float64), *draws]


def row(method: str, parts: svm.Parts, x: Tensor, steps: int, seconds: float, status: str = "") -> Run:
    machine = svm.fit(parts.train, x)
    accuracies = parts.valid.accuracy(machine), parts.test.accuracy(machine)
    return Run(method, float(parts.valid.loss(machine)), *accuracies, steps, seconds, status)


def best_of(parts: svm.Parts, count: int) -> tuple[Run, list[Run]]:
    """The start with the least validation loss, and all."""
    runs = [implicit_gradient(parts, start) for start in starts(parts, count)]
    return min(runs, key=lambda run: run.loss), runs


def lv_hba(case: problems.Case, parts: svm.Parts) -> Run:
    """LV-HBA with default arguments from the start of the case."""
    began = time.perf_counter()
    solution = bilevel.solve(
        case.problem, bilevel.LVHBA(), *case.start, max_steps=case.max_steps, raise_on_failure=False
    )
    seconds = time.perf_counter() - began
    return row("LV-HBA", parts, solution.x, solution.steps, seconds, solution.status.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--starts", type=int, default=20)
    parser.add_argument("--case", default="svm_penalties")
    parser.add_argument("--data-dir")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    case = problems.case(arguments.case, data_dir=arguments.data_dir)
    dataset = "german_numer_scaled" if case.name == "svm_penalties_german" else case.settings["dataset"]
    parts = svm.read(dataset, data_dir=arguments.data_dir)
    best, runs = best_of(parts, arguments.starts)
    losses = sorted(run.loss for run in runs)
    found = lv_hba(case, parts)
    print("| method | validation loss | accuracy | test accuracy | steps | seconds | |")
    print("|---|---|---|---|---|---|---|")
    label = f"implicit gradient, best of {len(runs)}"
    for name, run in (("start", row("start", parts, case.start[0], 0, 0.0)), (label, best), ("LV-HBA", found)):
        cells = f"{run.loss:.6f} | {run.validation_accuracy:.4f} | {run.test_accuracy:.4f} | {run.steps}"
        print(f"| {name} | {cells} | {run.seconds:.2f} | {run.status} |")
    print(f"\nlosses of the starts: {losses[0]:.6f} to {losses[-1]:.6f}, median {losses[len(losses) // 2]:.6f}")
    print(f"LV-HBA above the best: {100 * (found.loss / best.loss - 1):.3f} %")


if __name__ == "__main__":
    main()
