"""How a check fails: one sentence with the property, the number that was measured and the likely cause."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from implicit import tree
from implicit.status import ConvergenceWarning
from implicit.tree import Tree


class ConformanceError(AssertionError):
    """A contract of the library is broken; the message is one sentence that says which, by how much, and why."""


class Verdict:
    """Speaks about one subject at one place, such as ``MyOperator (nested, float32)``."""

    def __init__(self, subject: str, where: str = "") -> None:
        self.subject, self.where = subject, where

    def at(self, where: str) -> "Verdict":
        """The same subject at a narrower place."""
        return Verdict(self.subject, f"{self.where}, {where}" if self.where else where)

    def fail(self, sentence: str) -> ConformanceError:
        """The error to raise."""
        place = f" ({self.where})" if self.where else ""
        return ConformanceError(f"{self.subject}{place}: {sentence}")

    def __call__(self, holds: bool, sentence: str) -> None:
        """Raise unless ``holds``."""
        if not holds:
            raise self.fail(sentence)

    def close(self, error: float, allowed: float, what: str, cause: str) -> None:
        """Raise unless ``error <= allowed``; NaN fails."""
        if not error <= allowed:
            raise self.fail(f"{what} by {error:.3g}, allowed is {allowed:.3g}; {cause}")

    @contextmanager
    def runs(self, what: str) -> Iterator[None]:
        """An exception of the subject becomes a sentence; one that is a verdict already passes through."""
        try:
            yield
        except ConformanceError:
            raise
        except Exception as error:
            raise self.fail(f"{what} raised {type(error).__name__}: {error}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings that singular systems and loose runs are right to give."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


def name_of(subject: Any) -> str:
    """The class, or the function's own name."""
    return getattr(subject, "__name__", None) or type(subject).__name__


def short(dtype: torch.dtype) -> str:
    """``float32`` rather than ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def distance(found: Tree, expected: Tree) -> float:
    """Euclidean distance in float64; infinite where entries are not finite."""
    gap = tree.norm(tree.map(lambda e, f: f.double() - e.double(), expected, found))
    return float(torch.nan_to_num(gap, nan=torch.inf))


def identical(a: Tree, b: Tree) -> bool:
    """Bitwise equal leaf by leaf, NaN being equal to itself."""
    pairs = zip(tree.leaves(a), tree.aligned_leaves(b, tree.structure(a)), strict=True)
    return all(torch.equal(torch.nan_to_num(p), torch.nan_to_num(q)) and _same_nans(p, q) for p, q in pairs)


def _same_nans(p: Tensor, q: Tensor) -> bool:
    return torch.equal(torch.isnan(p), torch.isnan(q))


def shares_memory(a: Tree, b: Tree) -> bool:
    """Whether a leaf of one lies in the memory of the other."""
    first = {leaf.untyped_storage().data_ptr() for leaf in tree.leaves(a) if leaf.numel()}
    return any(leaf.untyped_storage().data_ptr() in first for leaf in tree.leaves(b) if leaf.numel())


def reordered(value: Tree) -> Tree:
    """The same tree with the keys of every dict in the opposite order."""
    if type(value) is dict:
        return {key: reordered(value[key]) for key in reversed(value)}
    if type(value) in (list, tuple):
        return type(value)(reordered(v) for v in value)
    return value
