"""Logistic regression with ten linear constraints on the unit sphere: ``constrained.solve`` beside SLSQP and IPOPT.

    python tests/benchmarks/constrained_logistic.py [--data-dir DIR] [--datasets a9a,w8a,mushroom]

Experiment of Hong, Na, Mahoney and Kolar (ICML 2023): mean log(1 + exp(-y <x, d>)) subject to A x = b and |x|^2 = 1.
Everybody gets the same functions, differentiated automatically, and starts from the problem's start. The residual is
measured as in ``equality_table.py``; "gap" is f minus the lowest f of all rows, over its size.
"""

import argparse
import os
import warnings
from pathlib import Path

import constrained_peers
import equality_table


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", default="a9a,w8a,mushroom", help="with commas between (%(default)s)")
    parser.add_argument("--solvers", default="ours,slsqp,ipopt", help="with commas between (%(default)s)")
    parser.add_argument("--seconds", type=float, default=300.0, help="budget of one run (%(default)s)")
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("BILEVEL_DATA"), help="default: BILEVEL_DATA")
    arguments = parser.parse_args()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        print(equality_table.markdown(table(arguments)))


def table(arguments: argparse.Namespace) -> list[dict[str, object]]:
    """One row per data set and solver."""
    import torch

    import problems

    torch.set_num_threads(1)
    rows = []
    for name in arguments.datasets.split(","):
        case = constrained_peers.torch_case(
            problems.case("constrained_logistic", dataset=name, data_dir=arguments.data_dir)
        )
        found = [
            constrained_peers.run(case, solver, seconds=arguments.seconds, rounds=1)
            for solver in arguments.solvers.split(",")
        ]
        best = min(outcome.measured.objective for outcome in found if outcome.measured.residual <= 1e-6)
        for outcome in found:
            measured = outcome.measured
            rows.append(
                {
                    "data": name,
                    "n": case.n,
                    "m": case.constraints,
                    "solver": outcome.solver,
                    "f": f"{measured.objective:.12g}",
                    "gap": f"{(measured.objective - best) / abs(best):.1e}",
                    "residual": f"{measured.residual:.1e}",
                    "status": outcome.status + (f" FALSE: {outcome.truth}" if outcome.truth else ""),
                    "iterations": outcome.iterations,
                    "values / derivatives / Hessians": " / ".join(str(count) for count in outcome.counts.values()),
                    "seconds": f"{outcome.seconds:.2f}",
                }
            )
    return rows


if __name__ == "__main__":
    main()
