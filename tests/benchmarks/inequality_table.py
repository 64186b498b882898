"""Hock-Schittkowski problems with inequalities or bounds: ``constrained.solve`` beside SLSQP, trust-constr and IPOPT.

    python tests/benchmarks/inequality_table.py [--problems hs|catalogue|NAME,NAME] [--solvers ours,ipopt] [--out CSV]

As ``equality_table.py``, whose measurement and columns it shares; ``hs`` is every HS problem of the S2MPJ collection
with an inequality or a bound, ``catalogue`` every such case of the package ``problems``. Here trust-constr
has barrier_tol = 1e-10; IPOPT has bound_relax_factor = 0, without which it gains f by violating constraints.
"""

import csv
import re
import warnings

import constrained_peers
import equality_table


def names(chosen: str) -> list[str]:
    """The problems of the set, or the ones that are listed."""
    if chosen == "catalogue":
        import problems

        found = problems.cases("constrained")
        return [case.name for case in found if case.tags & {"inequality", "bounds"} and "large" not in case.tags]
    if chosen != "hs":
        return chosen.split(",")
    with open(constrained_peers.s2mpj_folder() / "probinfo_python.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    sided = [row for row in rows if float(row["m_ub"]) or float(row["mb"])]
    return sorted((row["problem_name"] for row in sided if re.fullmatch(r"HS\d+", row["problem_name"])), key=_number)


def _number(name: str) -> int:
    return int(name[2:])


def main() -> None:
    """Print the tables."""
    arguments = equality_table.parser(__doc__ or "", "hs").parse_args()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        equality_table.report(names(arguments.problems), arguments)


if __name__ == "__main__":
    main()
