"""One pass of an iterative method over a block of rows, each left as soon as it is finished."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from implicit.operators import LinearOperator


class End(IntEnum):
    """Why a sweep left a row."""

    LIMIT = 0  # it did not: the steps were used up
    TARGET = 1  # the estimate of the residual reached the goal
    RESTART = 2  # the method wants to start again from the true residual
    BREAKDOWN = 3  # a division by zero in the recurrence
    INDEFINITE = 4  # a direction of non-positive curvature, which the method cannot use
    LEAST_SQUARES = 5  # what is left of the residual is orthogonal to the range of A
    DIVERGED = 6
    PRECONDITIONER = 7  # a direction in which the preconditioner is not positive
    NONFINITE = 8


class System:
    """Products for one call; ``prepared`` is the preconditioner's action or whatever else ``init`` returned.

    ``ls_rtol`` is the size of ``||A^T r|| / (||A|| ||r||)`` at which r counts as orthogonal to the range.
    """

    def __init__(self, operator: LinearOperator, prepared: Any, ls_rtol: float) -> None:
        self.operator, self.prepared, self.ls_rtol = operator, prepared, ls_rtol
        self._transposed: LinearOperator | None = None
        self._before = 0

    def apply(self, rows: Tensor) -> Tensor:
        """``A`` times each row."""
        return _product(self.operator, rows)

    def apply_transpose(self, rows: Tensor) -> Tensor:
        """``A^T`` times each row."""
        if self._transposed is None:
            self._transposed = self.operator.T
            self._before = self._transposed.products
        return _product(self._transposed, rows)

    def precondition(self, rows: Tensor) -> Tensor:
        """The preconditioner's action on each row; the rows themselves where there is none."""
        return rows if self.prepared is None else self.prepared(rows)

    @property
    def transposed_products(self) -> int:
        """Products with ``A^T`` that ``operator.products`` does not count."""
        other = self._transposed
        return 0 if other is None or other is self.operator else other.products - self._before


def _product(operator: LinearOperator, rows: Tensor) -> Tensor:
    return operator.flat_mv(rows[0])[None] if rows.shape[0] == 1 else operator.flat_mm(rows)


@dataclass
class Sweep:
    """What one sweep did for k rows.

    ``norm`` is an estimate of ``||A||`` where the method has one, else zero; ``curvature`` the smallest non-positive
    curvature met, else infinity. All have shape (k,) but the correction, (k, n).
    """

    correction: Tensor
    ends: list[End]
    steps: int
    norm: Tensor
    curvature: Tensor


class Recurrence(ABC):
    """One method's moving parts for a block of rows; every tensor attribute has a leading axis of rows."""

    def __init__(self, system: System, r: Tensor, goals: Tensor) -> None:
        self.system, self.goals = system, goals
        self.eps = float(torch.finfo(r.dtype).eps)
        self.x = r.new_zeros(r.shape[0], system.operator.shape[1])
        self.norm = torch.zeros_like(goals)
        self.curvature = torch.full_like(goals, torch.inf)

    @abstractmethod
    def advance(self) -> Tensor:
        """One step. Returns an :class:`End` for each row; zero lets a row go on."""

    def solution(self) -> Tensor:
        """The correction of each row so far, shape (k, n)."""
        return self.x

    def reached(self, estimate: Tensor) -> Tensor:
        """Codes for an estimate of the residuals, shape (k,); one that is not a number has ended as well."""
        return torch.where(estimate > self.goals, int(End.LIMIT), int(End.TARGET))

    def run(self, limit: int) -> Sweep:
        """Steps until every row has ended; the host looks once per step."""
        index = torch.arange(len(self.goals), device=self.goals.device)
        ends = [End.LIMIT] * len(index)
        found: tuple[Tensor, Tensor, Tensor] | None = None
        steps = 0
        while steps < limit and len(index):
            codes = self.advance()
            steps += 1
            if not bool(codes.any()):
                continue
            for row, code in zip(index.tolist(), codes.tolist(), strict=True):
                ends[row] = End(code)
            found = self._store(found, index)
            going = codes == 0
            index = index[going]
            for name, value in list(vars(self).items()):
                if isinstance(value, Tensor):
                    setattr(self, name, value[going])
        correction, norm, curvature = self._store(found, index)
        return Sweep(correction, ends, steps, norm, curvature)

    def _store(self, found: tuple[Tensor, ...] | None, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        now = (self.solution(), self.norm, self.curvature)
        if found is None:
            return now
        x, norm, curvature = (old.index_copy(0, index, new) for old, new in zip(found, now, strict=True))
        return x, norm, curvature


def safe_divide(a: Tensor, b: Tensor) -> Tensor:
    """``a / b``, and zero where b is zero."""
    return torch.where(b == 0, 0.0, a / b)
