"""The command line: ``bilevel list``, ``run``, ``compare``, ``solve`` and ``plot``."""

import argparse
import contextlib
import json
import os
import shlex
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import torch

from bilevel import cli_compare, picture, report
from bilevel.catalogue import catalogue, overview
from bilevel.compare import write
from bilevel.comparison import Trial
from bilevel.comparison_run import WorkerDied, run_plan
from bilevel.comparison_text import line
from bilevel.kinds import Job
from bilevel.request import Request, prepare, read_request
from bilevel.targets import Target, describe_error, load_case, load_target, locate
from bilevel.threads import chosen_threads
from implicit import Progress, SaveCheckpoint, SolveError, Status, StepInfo, runs

MISUSE, FAILURE, INTERRUPTED = 2, 1, 130

_ABOUT = """\
Bilevel optimization on PyTorch: minimize f(x, y*(x)) over x, where y*(x) minimizes g(x, .); and constrained
optimization: minimize f(x) subject to h(x) = 0, c(x) <= 0 and lower <= x <= upper.

  bilevel list                                        what there is to run, and what fits what
  bilevel run hyper_cleaning                          find wrong labels in real data (digits)
  bilevel run quadratic --algorithm penalty --set n=20 --max-steps 500
  bilevel run hs71 --algorithm InteriorPoint          a constrained problem
  bilevel run quadratic --algorithm auto              picked by the structure of the problem
  bilevel compare quadratic                           every algorithm that fits, side by side
  bilevel solve my_problem.py:problem                 a problem declared in a file of yours
  bilevel plot runs/*                                 several runs in one picture
"""
_AFTER = """\
Results go to runs/CASE-ALGORITHM, or to --out DIR: result.json, history.jsonl, convergence.png, solution.safetensors,
the checkpoint run.pt, and what the case adds. An earlier run there is moved aside to DIR.1, DIR.2, ...
Exit codes: 0 solved, or a budget or Ctrl-C ended the run; 1 numerical failure; 2 misuse.
"""
_SETTINGS = """\
settings: --set key=value sets a parameter of the problem or a field of the algorithm; dots reach inside.
  --set n=20 --set seed=3                             parameters of the problem
  --set lower_solver=LBFGS --set lower_solver.memory=50
  --set upper_optimizer=Adam --set upper_options.lr=0.01
  --set step_size.window=50 --set penalty=none
  --set linear_solver=SketchAndProject --set linear_solver.sketch=Kaczmarz
  case.key=... and algorithm.key=... where both have the same key
"""


_COMPARED = """\
  bilevel compare quadratic --algorithms ImplicitGradient,Penalty
  bilevel compare --suite exact --jobs 2              every case with a tag; the bilevel ones where both kinds have it
  bilevel compare --suite constrained,exact           constrained problems
  bilevel compare quadratic box --set penalty=50 --set Penalty.momentum=0.5

Every point is checked independently (bilevel.verify). solved: verified, and F <= F* + 1e-2 max(1, |F*|).
A refusal, a failure or an exception is a row. A key of --set goes to every case and algorithm that has it,
case.key to cases, algorithm.key to algorithms, NAME.key to one algorithm.

Results go to runs/compare-NAME, or to --out DIR: compare.csv, compare.json, compare.png (for one case the upper value
against time and against oracle calls; for several the share solved within a budget), and compare.jsonl, a line per
finished run. Exit codes: 0, whatever the runs did, also after Ctrl-C, which keeps what is done; 1 if a process of
--jobs died; 2 misuse.
"""

_DECLARED = (TypeError, ValueError, KeyError, OSError, ImportError, NotImplementedError)


class Misuse(Exception):
    """A wrong command, setting, file or declaration: exit code 2."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Misuse(f"{message}; see {self.prog} --help")


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 for a numerical failure, 2 for misuse."""
    argv = list(sys.argv[1:] if argv is None else argv)
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = _show_warning
        try:
            args = _parser().parse_args(argv)
            return args.action(args, argv)
        except Misuse as error:
            print(f"bilevel: error: {error}", file=sys.stderr)
            return MISUSE
        except KeyboardInterrupt:
            print("bilevel: interrupted; a run that was under way goes on with --resume", file=sys.stderr)
            return INTERRUPTED
        except BrokenPipeError:  # the reader, such as head, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0


def _show_warning(message: Warning | str, category: type[Warning], *_: Any) -> None:
    print(f"bilevel: warning: {message}", file=sys.stderr)


@contextlib.contextmanager
def _misuse(file: Path | None = None, still: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Turn errors of declarations into :class:`Misuse`, as long as ``still()``; any error of the user's own file."""
    try:
        yield
    except (Misuse, SolveError):
        raise
    except Exception as error:
        # What passed through the user's file is named with its line; other kinds are bugs of ours.
        foreign = bool(locate(error, file))
        if not still() or not (foreign or isinstance(error, _DECLARED)):
            raise
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        raise Misuse(describe_error(error, file) if foreign else str(message)) from error


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser("bilevel", description=_ABOUT, epilog=_AFTER, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"bilevel {report.version()}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, title="commands")

    def command(name: str, action: Callable[[argparse.Namespace, list[str]], int], text: str) -> Any:
        sub = commands.add_parser(
            name, help=text, description=text, epilog=_SETTINGS + "\n" + _AFTER, formatter_class=raw, allow_abbrev=False
        )
        sub.set_defaults(action=action)
        return sub

    listing = command("list", _list, "every case and algorithm, and which fit together")
    listing.add_argument("--json", action="store_true", help="as JSON")
    run = command("run", _run, "run an algorithm on a case, such as: bilevel run hyper_cleaning")
    run.add_argument("target", metavar="CASE", help="a name from bilevel list")
    run.add_argument("--data-dir", metavar="DIR", help="where data files are; the variable BILEVEL_DATA does the same")
    solve = command("solve", _solve, "solve a problem declared in a file: bilevel solve my_problem.py:problem")
    solve.add_argument("target", metavar="FILE.py:NAME", help="a problem, or a function that returns one")
    for sub in (run, solve):
        _add_options(sub)
    _add_compare(command("compare", _compare, "several algorithms on a case, on several, or on a suite"))
    plot = command("plot", _plot, "draw the convergence of result directories into one picture")
    plot.add_argument("folders", metavar="DIR", nargs="+", type=Path)
    plot.add_argument(
        "--out", metavar="FILE", type=Path, help="the PNG; DIR/convergence.png, or comparison.png for several"
    )
    return parser


def _add_compare(sub: argparse.ArgumentParser) -> None:
    sub.epilog = _COMPARED
    sub.add_argument("cases", metavar="CASE", nargs="*", help="names from bilevel list")
    sub.add_argument("--suite", metavar="NAME", help="all cases with a tag, such as exact; A,B for those with both")
    sub.add_argument("--algorithms", metavar="A,B,C", help="default: all that fit, and auto")
    sub.add_argument(
        "--seeds", metavar="N", type=_positive, help="runs with seeds 0 to N-1; of the case where it has one"
    )
    sub.add_argument("--max-steps", metavar="N", type=int, help="steps of each run")
    sub.add_argument("--time-limit", metavar="SECONDS", type=float, help="of each run")
    sub.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="a setting; may be repeated")
    sub.add_argument("--jobs", metavar="N", type=_positive, default=1, help="processes; default 1")
    sub.add_argument("--data-dir", metavar="DIR", help="where data files are; the variable BILEVEL_DATA does the same")
    sub.add_argument("--out", metavar="DIR", type=Path, help="where results go; default runs/compare-NAME")
    sub.add_argument("--resume", action="store_true", help="keep the finished runs in DIR and do what is missing")
    sub.add_argument("--quiet", action="store_true", help="no line per run, only the tables")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _add_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--algorithm", metavar="NAME", help="auto, or a name; default: the first of bilevel list that fits"
    )
    sub.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="a setting; may be repeated")
    sub.add_argument("--max-steps", metavar="N", type=int, help="steps of the whole run, resumptions included")
    sub.add_argument("--time-limit", metavar="SECONDS", type=float, help="of this command, without the final report")
    sub.add_argument("--rtol", metavar="R", type=float, help="bilevel: relative tolerance on the stationarity")
    sub.add_argument("--atol", metavar="A", type=float, help="absolute tolerance: on it, or on the KKT residual")
    sub.add_argument("--seed", metavar="S", type=int, help="of the run, and of the problem where it has one; default 0")
    sub.add_argument(
        "--threads", metavar="N", type=_positive, help="default: 1 for small problems, else what torch takes"
    )
    sub.add_argument("--device", metavar="DEVICE", help="cpu or cuda, for problems with that setting")
    sub.add_argument("--dtype", choices=("float32", "float64"), help="for problems with that setting")
    sub.add_argument("--out", metavar="DIR", type=Path, help="where results go; default runs/CASE-ALGORITHM")
    sub.add_argument("--resume", action="store_true", help="go on with the run in DIR; settings not given are its own")
    sub.add_argument("--checkpoint-every", metavar="N", type=int, help="steps between saves; default: every 10 seconds")
    sub.add_argument("--quiet", action="store_true", help="no progress bar, and one line at the end")


def _problems() -> ModuleType:
    import problems

    if not hasattr(problems, "entries"):
        raise Misuse(
            f"the package 'problems' found at {problems.__file__} is not part of bilevel and hides ours; run from "
            "another folder, or rename it"
        )
    return problems


def _list(args: argparse.Namespace, argv: list[str]) -> int:
    found = catalogue(_problems())
    if args.json:
        bilevel_part = found["bilevel"]
        print(json.dumps({**bilevel_part, "constrained": found["constrained"]}, indent=2, allow_nan=False))
    else:
        print(overview(found))
    return 0


def _check_data_dir(args: argparse.Namespace) -> None:
    if args.data_dir is not None:
        args.data_dir = str(Path(args.data_dir).resolve())
        if not Path(args.data_dir).is_dir():
            raise Misuse(f"--data-dir {args.data_dir}: there is no such folder")


def build_case(name: str, settings: dict[str, Any]) -> Job:
    """The job of a registered case; processes of ``bilevel compare`` call it by its name."""
    return load_case(_problems(), name).build(**settings)


def _compare(args: argparse.Namespace, argv: list[str]) -> int:
    _check_data_dir(args)
    with _misuse():
        runs.check_budgets(args.max_steps, time_limit=args.time_limit)
        contest = cli_compare.prepare(args, _problems(), build_case)
        try:
            journal = contest.journal(args.resume)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and args.resume:
                raise
            raise Misuse(f"--out {contest.out} cannot be used: {error}") from error
    if not args.quiet:
        print(f"Comparing {contest.title}: {len(contest.plan.order())} runs, {len(journal.done)} of them done")
    if contest.left_out:
        print(f"bilevel: note: left out for want of --data-dir: {', '.join(contest.left_out)}", file=sys.stderr)

    def watch(trial: Trial, done: int, total: int) -> None:
        print(line(trial, done, total), file=sys.stderr, flush=True)

    watcher = None if args.quiet else watch
    try:
        found = run_plan(contest.plan, kind=contest.kind.name, journal=journal, progress=watcher, jobs=args.jobs)
    except WorkerDied as error:
        print(f"bilevel: error: {error}. What was done is in {contest.out}; go on with --resume", file=sys.stderr)
        return FAILURE
    files = write(found, contest.out, contest.asked)
    print(f"\n{found.text(shutil.get_terminal_size((100, 24)).columns)}\n")
    print(f"Written to {contest.out}: {', '.join(str(os.path.relpath(file, contest.out)) for file in files)}")
    if found.missing:
        print("bilevel: note: interrupted; go on with --resume", file=sys.stderr)
    return 0


def _run(args: argparse.Namespace, argv: list[str]) -> int:
    _check_data_dir(args)
    problems = _problems()
    with _misuse():
        target = load_case(problems, args.target)
    return _execute(args, argv, target)


def _solve(args: argparse.Namespace, argv: list[str]) -> int:
    with _misuse():
        target = load_target(args.target)
    args.data_dir = None
    return _execute(args, argv, target)


def _execute(args: argparse.Namespace, argv: list[str], target: Target) -> int:
    with _misuse(target.file):
        stored, checkpoint = read_request(args, target) if args.resume else (None, None)
        request = prepare(args, target, stored)
    with chosen_threads(request.job.start[-1], args.threads):
        return _solve_request(request, args, argv, target, checkpoint)


def _solve_request(
    request: Request, args: argparse.Namespace, argv: list[str], target: Target, checkpoint: dict[str, Any] | None
) -> int:
    opening, kind = _Opening(request, args), request.job.kind
    solution, error = None, None
    try:
        with _misuse(target.file, still=lambda: not opening.done):
            solution = kind.solve(
                request.job.problem,
                request.method,
                *(request.job.start if checkpoint is None else ()),
                max_steps=request.max_steps,
                time_limit=request.time_limit,
                **{name: getattr(request, name) for name in kind.tolerances},
                generator=torch.Generator().manual_seed(request.seed) if checkpoint is None else None,
                callbacks=[opening, *_callbacks(request, args)],
                checkpoint=checkpoint,
                raise_on_failure=False,
            )
    except SolveError as failure:
        solution, error = failure.solution, failure
        if solution is None:
            raise
    if checkpoint is not None and solution.status is Status.STEP_LIMIT and solution.steps == opening.first:
        done = f"nothing left to do: the run has used its {solution.steps:,} steps; raise --max-steps"
        print(f"bilevel: note: {done}", file=sys.stderr)
    return _finish(request, args, argv, solution, error)


class _Opening:
    """Claims the output directory once everything has been checked and the run begins."""

    def __init__(self, request: Request, args: argparse.Namespace) -> None:
        self.request, self.args = request, args
        self.done, self.first = False, 0

    def start(self, info: StepInfo) -> None:
        """Move an earlier run aside, keep the request, and say what is about to be solved."""
        if self.done:  # the fallback of an automatic choice belongs to the same run
            return
        request, self.first = self.request, info.step
        try:
            moved = None if self.args.resume else report.move_aside(request.out)
            report.write_json(request.out / report.REQUEST, request.record())
        except OSError as error:
            raise Misuse(f"--out {request.out} cannot be used: {error}") from error
        if moved is not None:
            print(f"bilevel: note: {request.out} held an earlier run, which is now {moved}", file=sys.stderr)
        if not self.args.quiet:
            parts, like = request.job.kind.opening(request.job, info.state)
            print(report.header(request.job.problem.name, parts, request.algorithm.name, like))
            if self.args.resume:
                print(f"resuming at step {info.step:,}")
        sys.stdout.flush()
        self.done = True

    def __call__(self, info: StepInfo) -> None:
        """Nothing: only the start matters."""


def _callbacks(request: Request, args: argparse.Namespace) -> list[Any]:
    path = request.out / report.CHECKPOINT
    chosen: list[Any] = []
    if request.checkpoint_every is not None:
        chosen.append(SaveCheckpoint(path, every=request.checkpoint_every))
    elif request.job.kind.resumable(request.job.problem):
        chosen.append(report.TimedCheckpoint(path))
    return chosen if args.quiet else [*chosen, Progress()]


def _finish(
    request: Request, args: argparse.Namespace, argv: Sequence[str], solution: Any, error: SolveError | None
) -> int:
    """Write everything and say how it ended."""
    out, job, kind = request.out, request.job, request.job.kind
    outcome = kind.outcome(job, solution)
    failed = error is not None or solution.status.is_failure
    facts = {**request.facts(), "command": shlex.join(["bilevel", *argv])}
    if error is not None:
        facts["error"] = str(error)
    if job.exact is not None:
        facts["exact"] = job.exact(solution)
    files = [
        report.write_solution(out / report.SOLUTION, solution, outcome, request.target.name),
        report.write_history(out / report.HISTORY, solution.history),
    ]
    added = None
    try:
        label = f"{request.target.name}, {outcome.method.name}"
        curve = picture.Curve(label, kind, solution.history, facts.get("exact", {}).get(kind.chart.optimum))
        title = f"{label}: {solution.status.name} after {solution.steps:,} steps"
        files.append(picture.draw(out / report.PICTURE, [curve], title))
        if job.report is not None and not failed:
            added = job.report(solution, out)
            facts["report"] = added.metrics
            files += added.files
    finally:  # a picture or a report that fails must not lose the run
        files.insert(0, report.write_json(out / report.RESULT, report.result(solution, outcome, facts)))
    files += [path for path in (out / report.CHECKPOINT,) if path.exists()]
    if args.quiet:
        name, value, _ = outcome.headline
        print(f"{solution.status.name} after {solution.steps:,} steps, {name} {value:.6g}: {out}")
    else:
        print(f"\n{report.summary(solution, outcome, kind, facts)}\n")
        if added is not None:
            print(f"{added.text}\n")
        print(f"Written to {out}: {', '.join(str(os.path.relpath(f, out)) for f in files)}")
    if failed:
        where = locate(error, request.target.file)
        message = f"{where}: {solution.message}" if where else solution.message
        print(f"bilevel: error: {message}. What was found until then is in {out}", file=sys.stderr)
    return FAILURE if failed else 0


def _plot(args: argparse.Namespace, argv: list[str]) -> int:
    with _misuse():
        curves = picture.read_curves(args.folders)
        single = len(curves) == 1
        path = args.out or (args.folders[0] / report.PICTURE if single else Path("comparison.png"))
        print(f"Written: {picture.draw(path, curves, curves[0].label if single else 'Convergence')}")
    return 0
