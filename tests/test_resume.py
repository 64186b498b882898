"""A run that was killed and resumed ends bitwise where the uninterrupted run ends."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import bilevel
import problems
from implicit import tree

ALGORITHMS = {
    "implicit": bilevel.ImplicitGradient(),
    "implicit-adam": bilevel.ImplicitGradient(upper_optimizer=torch.optim.Adam, upper_options={"lr": 1e-2}),
    "penalty": bilevel.Penalty(),
}
STEPS = {"full": {"implicit": 9, "implicit-adam": 9, "penalty": 60}, "batches": dict.fromkeys(ALGORITHMS, 200)}


def build(data: str) -> tuple[bilevel.BilevelProblem, torch.Tensor, torch.Tensor]:
    """Ridge with one log-penalty per feature, on full data or minibatches."""
    g = torch.Generator().manual_seed(3)
    features = torch.randn(60, 6, generator=g, dtype=torch.float64)
    targets = features @ torch.randn(6, generator=g, dtype=torch.float64) + torch.randn(
        60, generator=g, dtype=torch.float64
    )
    size = None if data == "full" else 8
    problem = bilevel.BilevelProblem(
        lambda x, y, *, batch: ((batch["a"] @ y - batch["t"]) ** 2).mean() / 2 + 5e-3 * ((x + 2) ** 2).sum(),
        lambda x, y, *, batch: ((batch["a"] @ y - batch["t"]) ** 2).mean() / 2 + (x.exp() * y**2).sum() / 2,
        upper_data=bilevel.Batches({"a": features[:30], "t": targets[:30]}, size),
        lower_data=bilevel.Batches({"a": features[30:], "t": targets[30:]}, size),
    )
    return problem, torch.full((6,), -2.0, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)


def same(a: bilevel.Solution, b: bilevel.Solution) -> bool:
    pairs = zip(tree.leaves((a.x, a.y)), tree.leaves((b.x, b.y)), strict=True)
    return all(torch.equal(p, q) for p, q in pairs)


@pytest.mark.parametrize("data", ["full", "batches"])
@pytest.mark.parametrize("name", list(ALGORITHMS))
@pytest.mark.parametrize("split", [1, 3, 7])
def test_split_run_equals_whole_run(name: str, data: str, split: int, tmp_path: Path) -> None:
    problem, x0, y0 = build(data)
    steps = STEPS[data][name]
    at = max(1, steps * split // 9)
    whole = bilevel.solve(problem, ALGORITHMS[name], x0, y0, max_steps=steps)
    path = tmp_path / "run.pt"
    bilevel.solve(problem, ALGORITHMS[name], x0, y0, max_steps=at, callbacks=[bilevel.SaveCheckpoint(path, every=1)])
    resumed = bilevel.solve(problem, checkpoint=bilevel.load_checkpoint(path), max_steps=steps)
    assert same(whole, resumed)
    assert resumed.steps == whole.steps
    assert resumed.counts == whole.counts
    assert resumed.algorithm == whole.algorithm
    assert not torch.equal(whole.x, x0)


@pytest.mark.parametrize("data", ["full", "batches"])
@pytest.mark.parametrize("name", ["implicit", "penalty"])
def test_killed_process_resumes_bitwise(name: str, data: str, tmp_path: Path) -> None:
    """SIGKILL at a random moment, from outside, while checkpoints are being written."""
    steps = {"full": {"implicit": 9, "penalty": 400}, "batches": {"implicit": 3000, "penalty": 1500}}[data][name]
    code = (
        "import sys, torch; torch.set_num_threads(1); sys.path.insert(0, sys.argv[1])\n"
        "from tests import test_resume as t\nimport bilevel, time\n"
        "p, x, y = t.build(sys.argv[2])\n"
        "slow = lambda info: time.sleep(0.2 if sys.argv[2] == 'full' and sys.argv[3] == 'implicit' else 0.01)\n"
        "bilevel.solve(p, t.ALGORITHMS[sys.argv[3]], x, y, max_steps=int(sys.argv[5]),\n"
        "    callbacks=[bilevel.SaveCheckpoint(sys.argv[4], every=1), slow])\n"
    )
    path = tmp_path / "run.pt"
    root = str(Path(__file__).resolve().parent.parent)
    environment = {**os.environ, "PYTHONPATH": root}
    process = subprocess.Popen([sys.executable, "-c", code, root, data, name, str(path), str(steps)], env=environment)
    try:
        deadline = time.monotonic() + 120
        while not path.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(random.Random(f"{name}{data}").uniform(0.0, 0.3))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL, "the run ended before it was killed"
    checkpoint = bilevel.load_checkpoint(path)
    assert 0 < checkpoint["state"]["step"] < steps
    problem, x0, y0 = build(data)
    resumed = bilevel.solve(problem, checkpoint=checkpoint, max_steps=steps)
    whole = bilevel.solve(problem, ALGORITHMS[name], x0, y0, max_steps=steps)
    assert same(whole, resumed)


def test_truncated_checkpoint_falls_back_and_still_resumes_bitwise(tmp_path: Path) -> None:
    problem, x0, y0 = build("batches")
    path = tmp_path / "run.pt"
    algorithm = ALGORITHMS["penalty"]
    bilevel.solve(problem, algorithm, x0, y0, max_steps=150, callbacks=[bilevel.SaveCheckpoint(path, every=50)])
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.warns(bilevel.ConvergenceWarning, match="damaged"):
        checkpoint = bilevel.load_checkpoint(path)
    assert checkpoint["state"]["step"] == 100
    resumed = bilevel.solve(problem, checkpoint=checkpoint, max_steps=200)
    whole = bilevel.solve(problem, algorithm, x0, y0, max_steps=200)
    assert same(whole, resumed)


def test_checkpoint_in_the_solution_extends_the_run() -> None:
    problem, x0, y0 = build("batches")
    short = bilevel.solve(problem, bilevel.Penalty(), x0, y0, max_steps=50)
    longer = bilevel.solve(problem, checkpoint=short.checkpoint, max_steps=100)
    whole = bilevel.solve(problem, bilevel.Penalty(), x0, y0, max_steps=100)
    assert same(longer, whole)


def test_resume_refuses_a_second_start_and_another_problem() -> None:
    problem, x0, y0 = build("batches")
    short = bilevel.solve(problem, bilevel.Penalty(), x0, y0, max_steps=50)
    with pytest.raises(ValueError, match="leave out x0, y0 and generator"):
        bilevel.solve(problem, None, x0, y0, checkpoint=short.checkpoint)
    with pytest.raises(ValueError, match="a run of Penalty, not of ImplicitGradient"):
        bilevel.solve(problem, bilevel.ImplicitGradient(), checkpoint=short.checkpoint)
    other = problems.case("quadratic_pytree").problem
    with pytest.raises(
        ValueError, match=r"made with upper_data of \[rows, batch_size\] = \[30, 8\], this problem has None"
    ):
        bilevel.solve(other, checkpoint=short.checkpoint)
    with pytest.raises(ValueError, match=r"this problem has \[30, None\]"):
        bilevel.solve(build("full")[0], checkpoint=short.checkpoint)
    with pytest.raises(ValueError, match="load_checkpoint"):
        bilevel.solve(problem, checkpoint={"format": 99})


def test_optimizer_from_a_lambda_needs_the_algorithm_again() -> None:
    problem, x0, y0 = build("full")

    class MySGD(torch.optim.SGD):
        pass

    algorithm = bilevel.ImplicitGradient(upper_optimizer=MySGD, upper_options={"lr": 0.1})
    short = bilevel.solve(problem, algorithm, x0, y0, max_steps=3)
    with pytest.raises(ValueError, match="pass the algorithm"):
        bilevel.solve(problem, checkpoint=short.checkpoint, max_steps=6)
    longer = bilevel.solve(problem, algorithm, checkpoint=short.checkpoint, max_steps=6)
    assert same(longer, bilevel.solve(problem, algorithm, x0, y0, max_steps=6))
