"""A comparison as text for a terminal."""

import re
import textwrap
from collections.abc import Sequence

from bilevel.comparison import ERROR, REFUSED, UNKNOWN, Comparison, Tally, Trial, _class_order

_SHORT = {"LINEAR_SOLVE_FAILED": "linear solve"}
_MARKS = {"solved": "*", "verified": "+", "worse point": "+", "FALSE CLAIM": "!"}
_LEGEND = "* solved: verified and F <= F* + 1e-2 max(1, |F*|)   + verified   ! claims CONVERGED, not verified"
_NOTES = 12


def tables(found: Comparison, width: int) -> str:
    """One case: a line per run. Several: a line per case and a column per algorithm. Then the tally and remarks."""
    if not found.trials:
        return "nothing was run"
    single = len(found.cases) == 1
    parts = [_runs(found) if single else _matrix(found)]
    if not single:
        parts.append(_summary(found.summary()))
    parts.append(_remarks(found, width, single))
    if found.missing:
        parts.append("1 more run is missing" if found.missing == 1 else f"{found.missing} more runs are missing")
    return "\n\n".join(part for part in parts if part)


def status_text(trial: Trial) -> str:
    """``converged``, ``step limit``, ..."""
    return _SHORT.get(trial.status, trial.status.replace("_", " ").lower())


def line(trial: Trial, done: int, total: int) -> str:
    """One run, for those who watch."""
    name = trial.algorithm + (f" ({trial.chosen})" if trial.chosen not in ("", trial.algorithm) else "")
    seed = f" seed {trial.seed}" if trial.seed else ""
    value = f"{trial.value:.6g}" if trial.fits else ""
    outcome = (
        f"{status_text(trial):<12} {trial.verdict:<12} {value:>12} {trial.seconds:8.2f} s" if trial.fits else REFUSED
    )
    return f"[{done}/{total}] {trial.case}{seed}  {name}: {outcome.rstrip().replace(REFUSED, 'refused')}"


def _runs(found: Comparison) -> str:
    several = len({trial.seed for trial in found.trials}) > 1
    values = {trial.best_known for trial in found.trials}
    known = found.trials[0].best_known if len(values) == 1 else None  # seeds may make different problems
    shown = [trial for trial in found.trials if trial.fits]
    header = ["algorithm", *(["seed"] if several else []), "status", "verdict", "upper value"]
    header += [*(["gap"] if values != {None} else []), "steps", "seconds", "calls", "starts"]
    rows = []
    for trial in shown:
        gap = "" if trial.gap is None else f"{trial.gap:.1e}"
        row = [trial.algorithm, *([str(trial.seed)] if several else []), status_text(trial), trial.verdict]
        row += [f"{trial.value:.6g}", *([gap] if values != {None} else [])]
        rows.append([*row, f"{trial.steps:,}", f"{trial.seconds:.3g}", _count(trial.calls), str(trial.starts)])
    best = f"; best known upper value {known:.8g}" if known is not None else ""
    lower = found.trials[0].lower_class
    kind = f"; lower level {lower}" if lower != UNKNOWN else ""
    return f"{found.trials[0].case}{kind}{best}\n\n" + aligned(header, rows, left=3 if not several else 4)


def _matrix(found: Comparison) -> str:
    labels = found.algorithms
    broken = [
        re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "\n", label, count=1).rpartition("\n")
        for label in labels
    ]
    heads = [["", *(first for first, _, _ in broken)], ["case", *(last for _, _, last in broken)]]
    classes = sorted({trial.lower_class for trial in found.trials}, key=_class_order)
    rows: list[list[str]] = []
    for name in classes:
        if len(classes) > 1 or name != UNKNOWN:
            rows.append([f"{name}:"])
        for case in dict.fromkeys(t.case for t in found.trials if t.lower_class == name):
            rows.append([case, *(_cell(found.of(case=case, algorithm=label)) for label in labels)])
    widths = [max(len(row[k]) for row in [*heads, *rows] if len(row) > 1) for k in range(len(labels) + 1)]
    lines = [
        "  ".join(f"{text:<{w}}" for text, w in zip(row, widths, strict=False)).rstrip() for row in [*heads, *rows]
    ]
    return "\n".join([*lines, "", _LEGEND])


def _cell(trials: Sequence[Trial]) -> str:
    if len(trials) == 1:
        (trial,) = trials
        return f"{status_text(trial)}{_MARKS.get(trial.verdict, '')}" if trial.fits else "-"
    fitting = [trial for trial in trials if trial.fits]
    if not fitting:
        return "-" if trials else ""
    good = sum(t.verified if t.solved is None else t.solved for t in fitting)
    false = "!" if any(t.false_claim for t in fitting) else ""
    return f"{good}/{len(fitting)}{'*' if fitting[0].best_known is not None else '+'}{false}"


def _summary(tallies: Sequence[Tally]) -> str:
    header = ["algorithm", "lower level", "fits", "claimed", "verified", "solved", "false claims"]
    header += ["median s", "median calls"]
    rows, last = [], ""
    for tally in tallies:
        if not tally.fitting:
            continue
        row = [tally.algorithm if tally.algorithm != last else "", tally.lower_class]
        row += [str(tally.fitting), str(tally.claimed), str(tally.verified), f"{tally.solved}/{tally.known}"]
        rows.append([*row, str(tally.false_claims), f"{tally.seconds:.3g}", _count(tally.calls)])
        last = tally.algorithm
    return aligned(header, rows, left=2)


def _remarks(found: Comparison, width: int, single: bool) -> str:
    """What a reader should know: false claims and errors always, refusals and other endings for a single case."""
    texts = []
    for trial in found.trials:
        where = "" if single else f"{trial.case}, "
        name = f"{where}{trial.algorithm}" + (f", seed {trial.seed}" if trial.seed else "")
        if trial.false_claim:
            texts.append(f"{name}: CONVERGED, but not verified: {trial.reasons}")
        elif trial.status == ERROR or (single and not trial.claimed and trial.message):
            texts.append(f"{name}: {'refused: ' if trial.status == REFUSED else ''}{trial.message}")
        if single and trial.choice:
            texts.append(f"{name}: {trial.choice}")
    more = len(texts) - _NOTES
    texts = [textwrap.shorten(text, 4 * width, placeholder=" ...") for text in texts[:_NOTES]]
    lines = [line for text in texts for line in textwrap.wrap(text, width, subsequent_indent="  ")]
    return "\n".join(
        lines + ([f"... and {more} more remarks: see the columns message and reasons"] if more > 0 else [])
    )


def _count(number: float) -> str:
    return f"{number:,.0f}" if number < 1e6 else f"{number:.2g}"


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    """Columns of equal width, the first ``left`` of them flush left."""
    widths = [max(len(row[k]) for row in [header, *rows]) for k in range(len(header))]

    def shown(row: Sequence[str]) -> str:
        cells = [
            f"{text:<{w}}" if k < left else f"{text:>{w}}" for k, (text, w) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join(shown(row) for row in [header, *rows])
