"""Data hyper-cleaning from end to end: accuracies, ROC AUC and seconds, over seeds.

    python tests/benchmarks/hyper_cleaning.py [--seeds 5] [--dataset digits] [--data-dir DIR]

Prints a Markdown table; docs/benchmarks.md states what it printed.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

import bilevel
import problems

COLUMNS = (
    "auc",
    "accuracy_learned",
    "accuracy_all_labels",
    "accuracy_clean_only",
    "accuracy_right_labels",
    "accuracy_right_labels_tuned",
)


def one(dataset: str, seed: int, data_dir: str | None) -> dict[str, float]:
    case = problems.case("hyper_cleaning", dataset=dataset, seed=seed, data_dir=data_dir)
    began = time.perf_counter()
    solution = bilevel.solve(
        case.problem, bilevel.ImplicitGradient(), *case.start, max_steps=case.max_steps, raise_on_failure=False
    )
    seconds = time.perf_counter() - began
    assert case.report is not None
    with tempfile.TemporaryDirectory() as folder:
        report = case.report(solution, Path(folder))
    return {**{c: report.metrics[c] for c in COLUMNS}, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--data-dir")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = [one(arguments.dataset, seed, arguments.data_dir) for seed in range(arguments.seeds)]
    names = [*COLUMNS, "seconds"]
    print(f"| seed | {' | '.join(names)} |")
    print("|---" * (len(names) + 1) + "|")
    for seed, row in enumerate(rows):
        print(f"| {seed} | {' | '.join(f'{row[n]:.4g}' for n in names)} |")
    print(f"| mean | {' | '.join(f'{statistics.mean(r[n] for r in rows):.4g}' for n in names)} |")


if __name__ == "__main__":
    main()
