"""A constrained test problem as a public object, and how the families of small ones are declared."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from constrained import ConstrainedProblem, EqualityProblem, Multipliers
from implicit import tree
from implicit.tree import Tree
from problems.registry import register

Scalar = Callable[..., Tensor]
Rows = Callable[..., Sequence[Tensor]]
Bounds = float | Sequence[float] | None


@dataclass(frozen=True, kw_only=True)
class ConstrainedCase:
    """A constrained problem with its start and its best known answer.

    Attributes:
        name: as in the registry.
        problem: the declaration.
        start: x0.
        source: where the problem or its data come from.
        tags: what the problem has (``equality``, ``inequality``, ``bounds``, ``square``: as many equations as unknowns
            and no objective, ``pytree``, ``large``), how well it is known (``exact``: x_star is a closed form), what is
            hard about it (``degenerate``: at the solution the constraint gradients are dependent or the curvature is
            singular, so that x and the multipliers are less accurate than f), and the family.
        f_star: objective value at the published solution, to at least ten digits, or None.
        x_star: a solution, or None.
        multipliers_star: multipliers at x_star, or None.
        other_minima: objective values at other known local minima, some of them lower.
        multipliers_start: published starting multipliers, or None.
        note: what else is known, such as where the published statement differs.
        settings: the parameters the case was built with.
    """

    name: str
    problem: EqualityProblem | ConstrainedProblem
    start: Tree
    source: str
    tags: frozenset[str] = frozenset()
    f_star: float | None = None
    x_star: Tree = None
    multipliers_star: Multipliers | None = None
    other_minima: tuple[float, ...] = ()
    multipliers_start: Multipliers | None = None
    note: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    def violation(self, x: Tree) -> float:
        """The largest violation of a constraint or bound at x, zero where x is feasible; NaN where a value is NaN."""
        problem, found = self.problem, [torch.zeros(1, dtype=tree.common_dtype(x))]
        with torch.no_grad():
            if problem.equality is not None:
                found += [leaf.abs().reshape(-1).cpu() for leaf in tree.leaves(problem.equality(x))]
            if problem.inequality is not None:
                found += [leaf.reshape(-1).cpu() for leaf in tree.leaves(problem.inequality(x))]
            flat = tree.ravel(x)
            for bound, sign in ((problem.lower, -1), (problem.upper, 1)):
                if bound is not None:
                    found.append((sign * (flat - _flat_bound(bound, x))).cpu())
        return float(torch.cat(found).max())

    def gap(self, x: Tree) -> float:
        """``(f(x) - f_star) / max(1, |f_star|)``, negative where x is better (or infeasible).

        Raises:
            ValueError: if the case has no f_star.
        """
        if self.f_star is None:
            raise ValueError(f"case {self.name} has no f_star with the settings {self.settings}")
        with torch.no_grad():
            return (float(self.problem.objective(x)) - self.f_star) / max(1.0, abs(self.f_star))

    def distance(self, x: Tree) -> float:
        """``||x - x_star|| / max(1, ||x_star||)``.

        Raises:
            ValueError: if the case has no x_star.
        """
        if self.x_star is None:
            raise ValueError(f"case {self.name} has no x_star")
        return float(tree.norm(tree.sub(x, self.x_star))) / max(1.0, float(tree.norm(self.x_star)))

    def is_known_minimum(self, x: Tree, rtol: float = 1e-6) -> bool:
        """Whether f(x) is f_star or one of ``other_minima``, to ``rtol * max(1, |f|)``."""
        with torch.no_grad():
            value = float(self.problem.objective(x))
        known = self.other_minima if self.f_star is None else (self.f_star, *self.other_minima)
        return any(abs(value - f) <= rtol * max(1.0, abs(f)) for f in known)

    def check(self, solution: Any, rtol: float = 1e-6, feasibility: float = 1e-6, any_minimum: bool = False) -> None:
        """Evaluate the problem at ``solution.x`` and compare with the published answer.

        Where the case is ``exact`` and not ``degenerate``, x is compared too.

        Args:
            solution: what ``constrained.solve`` returned; anything with ``x`` and ``status``.
            rtol: for f, relative to max(1, |f_star|), and for x, relative to max(1, ||x_star||).
            feasibility: the largest violation allowed, absolute.
            any_minimum: whether an objective value in ``other_minima`` will do.

        Raises:
            AssertionError: if x is infeasible, or f is above or below what is known.
        """
        x = solution.x
        what = f"{self.name} ({getattr(solution.status, 'name', solution.status)})"
        violation, gap = self.violation(x), self.gap(x)
        if not violation <= feasibility:
            raise AssertionError(f"{what}: x violates the constraints by {violation:.3g}, above {feasibility:.3g}")
        if any_minimum and self.is_known_minimum(x, rtol):
            return
        if not abs(gap) <= rtol:
            word = "above" if gap > 0 else "below"
            other = "; it is another known local minimum" if self.is_known_minimum(x, rtol) else ""
            raise AssertionError(f"{what}: f is {word} f_star = {self.f_star:.10g} by {abs(gap):.3g} relative{other}")
        if "exact" in self.tags and "degenerate" not in self.tags and self.x_star is not None:
            distance = self.distance(x)
            if not distance <= rtol:
                raise AssertionError(f"{what}: x is {distance:.3g} from x_star, above {rtol:.3g}")


def _flat_bound(bound: Any, x: Tree) -> Tensor:
    leaf = tree.leaves(x)[0]
    if isinstance(bound, (int, float)):
        return torch.full((tree.size(x),), float(bound), dtype=leaf.dtype, device=leaf.device)
    if isinstance(bound, Tensor) and isinstance(x, Tensor):
        return bound.to(leaf).expand(x.shape).reshape(-1)
    return tree.ravel(tree.map(lambda like, low: torch.as_tensor(low).to(like).expand(like.shape), x, bound))


def declare(
    name: str,
    objective: Scalar | None,
    equality: Rows | None = None,
    inequality: Rows | None = None,
    *,
    start: Sequence[float],
    f_star: float,
    x_star: Sequence[float] | None = None,
    equality_star: Sequence[float] | None = None,
    inequality_star: Sequence[float] | None = None,
    lower: Bounds = None,
    upper: Bounds = None,
    other_minima: tuple[float, ...] = (),
    source: str,
    tags: str = "",
    note: str = "",
) -> None:
    """Register a small dense problem whose functions take the n entries of x as n arguments.

    Args:
        name: in capitals, as published.
        objective: f(x1, ..., xn); None for zero, in square systems.
        equality, inequality: the lists of h(x) = 0 and of c(x) <= 0.
        start, x_star, equality_star, inequality_star: numbers; the multipliers are those at x_star.
        lower, upper: a number for all variables, or one for each, infinite for none.
        f_star, other_minima, source, note: as in :class:`ConstrainedCase`.
        tags: further tags, separated by blanks; those for what the problem has are added.
    """
    n = len(start)
    has = {"equality": equality is not None, "inequality": inequality is not None}
    has |= {"bounds": lower is not None or upper is not None, "square": objective is None}
    every = frozenset({"constrained", *tags.split(), *(tag for tag, there in has.items() if there)})
    kinds = " and ".join(tag for tag in ("equality", "inequality", "bounds") if has[tag])
    summary = f"{name}: {n} variables, " + ("a square system" if objective is None else kinds)

    def factory(*, dtype: torch.dtype = torch.float64, device: str = "cpu") -> ConstrainedCase:
        def vector(values: Sequence[float] | None) -> Tensor | None:
            return None if values is None else torch.tensor(values, dtype=dtype, device=device)

        def bound(values: Bounds) -> Any:
            return values if values is None or isinstance(values, (int, float)) else vector(values)

        value = _zero if objective is None else functools.partial(_value, objective)
        h = None if equality is None else functools.partial(_stack, equality)
        c = None if inequality is None else functools.partial(_stack, inequality)
        if h is not None and c is None and not has["bounds"]:
            problem = EqualityProblem(value, h, name=name)
        else:
            low, high = bound(lower), bound(upper)
            problem = ConstrainedProblem(objective=value, equality=h, inequality=c, lower=low, upper=high, name=name)
        known = equality_star is not None or inequality_star is not None
        x0 = torch.tensor(start, dtype=dtype, device=device)
        zeros = torch.zeros_like(x0)
        parts = (_or_empty(vector(equality_star)), _or_empty(vector(inequality_star)), zeros, zeros)
        return ConstrainedCase(
            name=name.lower(),
            problem=problem,
            start=x0,
            source=source,
            f_star=f_star,
            x_star=vector(x_star),
            multipliers_star=Multipliers(*parts) if known else None,
            other_minima=other_minima,
            note=note,
        )

    register(name.lower(), summary, *every)(factory)


def _value(function: Scalar, x: Tensor) -> Tensor:
    return function(*x.unbind())


def _stack(function: Rows, x: Tensor) -> Tensor:
    return torch.stack(tuple(function(*x.unbind())))


def _zero(x: Tensor) -> Tensor:
    return x.new_zeros(())


def _or_empty(part: Tensor | None) -> Any:
    return () if part is None else part
