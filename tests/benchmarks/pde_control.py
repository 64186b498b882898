"""Control of Poisson's equation without matrices: time and peak memory of ``constrained.solve`` on growing grids.

    python tests/benchmarks/pde_control.py [--grids 32,64,128] [--max-steps STEPS]

Every grid runs in a process of its own. "grown" is the peak of resident memory less what was resident before the solve,
after one step on a smaller grid has loaded what is loaded once; divided by the number of unknowns and constraints it
has to settle if memory is linear in the grid. Grids up to 25 x 25 are solved with matrices.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

import equality_table

WARM_UP = 26  # the smallest grid that is solved without matrices


def main() -> None:
    """Print the table, or measure one grid in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grids", default="32,64,128", help="points per side, with commas between (%(default)s)")
    parser.add_argument("--max-steps", type=int, help="stop there: memory does not depend on the number of steps")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(arguments.one, arguments.max_steps)))
        return
    grids = [int(grid) for grid in arguments.grids.split(",")]
    print(equality_table.markdown([in_own_process(grid, arguments.max_steps) for grid in grids]))


def in_own_process(grid: int, max_steps: int | None) -> dict[str, object]:
    command = [sys.executable, str(Path(__file__)), "--one", str(grid)]
    command += [] if max_steps is None else ["--max-steps", str(max_steps)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def one(grid: int, max_steps: int | None = None) -> dict[str, object]:
    """Solve on one grid and measure."""
    import torch

    import constrained
    import problems
    from implicit import tree

    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    if grid > WARM_UP:
        small = problems.case("poisson_control", n=WARM_UP)
        constrained.solve(small.problem, x0=small.start, max_steps=1, raise_on_failure=False)
    case = problems.case("poisson_control", n=grid)
    with torch.no_grad():
        rows = tree.size(case.problem.equality(case.start))
    before = resident()
    found = constrained.solve(case.problem, x0=case.start, max_steps=max_steps, raise_on_failure=False)
    grown = peak() - before
    size = tree.size(case.start) + rows
    return {
        "grid": f"{grid} x {grid}",
        "unknowns and constraints": size,
        "status": found.status.name,
        "steps": found.steps,
        "residual": f"{found.residual.largest:.1e}",
        "gap of f": f"{case.gap(found.x):.1e}",
        "products with the Hessian": found.counts["products"],
        "seconds": f"{found.seconds:.2f}",
        "grown MiB": f"{grown / 2**20:.1f}",
        "bytes per unknown and constraint": round(grown / size),
    }


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak() -> int:
    """The most bytes that this process had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
