"""The BOLIB collection: every algorithm that fits, beside SLSQP and IPOPT on relaxed optimality systems from one start.

    python tests/benchmarks/bolib.py [--algorithms A,B] [--peers slsqp,ipopt] [--cases NAME,NAME] [--time-limit S]
                                     [--out DIR] [--resume]

Prints what ``bilevel compare --suite bolib`` prints. The peers solve

    min f(x, y)  s.t.  G(x, y) <= 0,  grad_y L(x, y, u) = 0,  c(x, y) <= 0 <= u,  -u_i c_i(x, y) <= t

(Scholtes, 2001) for t = 1, 0.1, ..., 1e-8, warm-started, with exact derivatives, from the case's own start and zero
multipliers. They claim nothing about the bilevel problem, and their status is always that one step is done; where they
end is verified like ours: a KKT point of a nonconvex lower level need not be a lower solution.
"""

import argparse
import contextlib
import io
import sys
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import constrained_peers
import numpy as np
import torch
from torch import Tensor

import bilevel
import problems
from bilevel.algorithms.base import BilevelState
from bilevel.comparison_text import line
from bilevel.flat import FlatProblem
from bilevel.problem import CONSTRAINTS
from constrained import ConstrainedProblem
from implicit import Status, tree

RELAXATIONS = tuple(10.0**-k for k in range(9))
SECONDS = 60.0


class Program:
    """The relaxed system in ``z = (x, y, u, v, lower, upper)``: multipliers of rows, equations and finite bounds."""

    def __init__(self, flat: FlatProblem) -> None:
        self.flat, level = flat, flat.lower_level
        self.below = torch.isfinite(level.lower).nonzero().reshape(-1)
        self.above = torch.isfinite(level.upper).nonzero().reshape(-1)
        self.sizes = [flat.n, flat.m, level.inequalities, level.equalities, len(self.below), len(self.above)]

    def start(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([x, y, y.new_zeros(sum(self.sizes[2:]))])

    def problem(self, relaxation: float) -> ConstrainedProblem:
        upper, lower = self.flat.upper_level, self.flat.lower_level
        free = torch.full((self.sizes[3],), -torch.inf)
        signs = [torch.zeros(self.sizes[2]), free, torch.zeros(self.sizes[4]), torch.zeros(self.sizes[5])]
        return ConstrainedProblem(
            objective=lambda z: self.flat.upper(*z.split(self.sizes)[:2]),
            equality=self._equations,
            inequality=lambda z: self._rows(z, relaxation),
            lower=torch.cat([upper.lower, lower.lower, *signs]),
            upper=torch.cat([upper.upper, lower.upper, torch.full((sum(self.sizes[2:]),), torch.inf)]),
        )

    def _equations(self, z: Tensor) -> Tensor:
        x, y, u, v, low, high = z.split(self.sizes)
        level = self.flat.lower_level

        def lagrangian(q: Tensor) -> Tensor:
            return self.flat.lower(x, q) + u @ level.inequality(x, q) + v @ level.equality(x, q)

        slope = torch.func.grad(lagrangian)(y)
        slope = slope.index_add(0, self.below, -low).index_add(0, self.above, high)
        return torch.cat([slope, level.equality(x, y), self.flat.upper_level.equality(x, y)])

    def _rows(self, z: Tensor, relaxation: float) -> Tensor:
        x, y, u, _, low, high = z.split(self.sizes)
        level = self.flat.lower_level
        sides = level.inequality(x, y)
        products = [-u * sides, low * (y - level.lower)[self.below], high * (level.upper - y)[self.above]]
        return torch.cat([sides, self.flat.upper_level.inequality(x, y), torch.cat(products) - relaxation])


@dataclass(frozen=True, kw_only=True)
class Peer(bilevel.Algorithm[BilevelState]):
    """A solver of nonlinear programs on the relaxed system, as one step of a run."""

    solver: str = "slsqp"
    check_every: int | None = 1

    guarantee: ClassVar[str] = "BIAS"
    default_max_steps: ClassVar[int] = 1
    handles: ClassVar[frozenset[str]] = frozenset({"upper_set", "lower_set", *CONSTRAINTS})

    @property
    def name(self) -> str:
        """The solver's."""
        return self.solver

    def init(self, problem: Any, *start: Any, generator: torch.Generator | None = None) -> BilevelState:
        """The start, untouched."""
        assert generator is not None
        return BilevelState(x=tree.clone(start[0]), y=tree.clone(start[1]), generator=generator)

    def step(self, problem: Any, state: BilevelState) -> dict[str, float]:
        """All relaxations."""
        flat = FlatProblem(problem, state.x, state.y, state.counts)
        program = Program(flat)
        z = program.start(flat.flat_x(state.x), flat.flat_y(state.y))
        for relaxation in RELAXATIONS:
            own = problems.ConstrainedCase(
                name=problem.name, problem=program.problem(relaxation), start=z, source="relaxed KKT system"
            )
            case = constrained_peers.torch_case(own)
            case.restart(SECONDS / len(RELAXATIONS))
            with warnings.catch_warnings(), np.errstate(all="ignore"), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                outcome = constrained_peers.SOLVERS[self.solver](case, SECONDS / len(RELAXATIONS))
            reached = torch.as_tensor(outcome.x, dtype=z.dtype)
            z = reached if bool(torch.isfinite(reached).all()) else z
        x, y = z.split(program.sizes)[:2]
        tree.copy_(state.x, flat.x_tree(x))
        tree.copy_(state.y, flat.y_tree(y))
        return {"upper_value": float(flat.upper(x, y))}

    def terminate(self, problem: Any, state: BilevelState) -> Status:
        """The step limit ends it."""
        return Status.RUNNING

    def assess(self, problem: Any, state: BilevelState, status: Status) -> tuple[bilevel.Accuracy, Status, str]:
        """Nothing is claimed."""
        return bilevel.Accuracy(), status, "a KKT point of the relaxed system at best"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--algorithms", default=",".join((*bilevel.algorithms(), "auto")))
    found.add_argument("--peers", default="slsqp,ipopt", help="slsqp, ipopt (needs cyipopt), or nothing")
    found.add_argument("--cases", help="default: all")
    found.add_argument("--time-limit", type=float, help="seconds of each of our runs")
    found.add_argument("--out", help="a directory for compare.csv and the rest")
    found.add_argument("--resume", action="store_true")
    return found


def main(argv: list[str] | None = None) -> bilevel.Comparison:
    """Run, print and return the comparison."""
    arguments = parser().parse_args(argv)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    wanted = arguments.cases.split(",") if arguments.cases else None
    cases = [case for case in problems.cases("bolib") if wanted is None or case.name in wanted]
    entrants: dict[str, Any] = {name: name for name in arguments.algorithms.split(",") if name}
    for name in filter(None, arguments.peers.split(",")):
        entrants[name] = Peer(solver=name)
    found = bilevel.compare(
        cases,
        entrants,
        time_limit=arguments.time_limit,
        out=arguments.out,
        resume=arguments.resume,
        progress=lambda trial, done, total: print(line(trial, done, total), file=sys.stderr, flush=True),
    )
    print(found.text(140))
    return found


if __name__ == "__main__":
    main()
