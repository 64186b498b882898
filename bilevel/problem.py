"""The declaration of a bilevel problem, and the checks that find a wrong one before the first step."""

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bilevel.data import Batches, require_resumable
from constrained.sets import ConvexSet, WholeSpace
from implicit import tree
from implicit.tree import Tree

Objective = Callable[..., Any]
Metric = Callable[[Tree, Tree], Any]
Constraint = Callable[[Tree, Tree], Any]
CONSTRAINTS = ("lower_inequality", "lower_equality", "upper_inequality", "upper_equality")


@dataclass(frozen=True)
class BilevelProblem:
    """``min F(x) = f(x, y*(x))`` over x in X with ``G(x, y*) <= 0``, where ``y*(x)`` minimizes ``g(x, .)`` over y in Y
    with ``c(x, y) <= 0`` and ``h(x, y) = 0``.

    Where the lower level has several solutions, the one that is best for f counts (the optimistic problem).

    Args:
        upper: f(x, y), a scalar tensor, differentiable; or ``(f, aux)``.
        lower: g(x, y), a scalar tensor, twice differentiable; or ``(g, aux)``. With a regularizer, its data term.
        regularizer: r(x, y), a scalar tensor: the lower objective is ``lower + regularizer``. It sees no batch.
            Declaring it apart lets :class:`ImplicitGradient` write a quadratic data term down as its Gram matrix once,
            and keep the data term's Hessian between steps.
        upper_data, lower_data: :class:`Batches`; a level that declares data receives it: ``f(x, y, *, batch)``.
        upper_set, lower_set: closed convex sets X and Y from ``constrained``; the whole space by default.
        lower_inequality: c(x, y), any tree of tensors, meant entry by entry: ``c <= 0`` (the opposite of scipy's dict
            constraints). Rows without y are moved to the upper level.
        lower_equality: h(x, y), likewise ``h = 0``.
        upper_inequality, upper_equality: ``G(x, y) <= 0`` and ``H(x, y) = 0`` at the upper level.
        joint_set: a set of pairs ``(x, y)`` that equals what all sets and constraints say together, where its
            projection is known in closed form. It only serves projections.
        formulation: ``"optimistic"``; the pessimistic problem is refused.
        metrics: named functions of (x, y) that need not be differentiable, evaluated for the record only.
        strong_convexity: the modulus mu of g in y, where it is known. It turns the accuracy report's estimates into
            bounds and sizes the penalty.
        name: for reports.

    x and y are any pytrees of floating-point tensors. Nothing is cast or moved: dtype and device are those of the
    starting point.

    Raises:
        TypeError, ValueError: if a field is misdeclared; the message names it and the cure. Everything that needs a
            point is checked by :meth:`validate`, which ``solve`` calls before the first step.
    """

    upper: Objective
    lower: Objective
    regularizer: Objective | None = field(default=None, kw_only=True)
    upper_data: Batches | None = field(default=None, kw_only=True)
    lower_data: Batches | None = field(default=None, kw_only=True)
    upper_set: ConvexSet = field(default_factory=WholeSpace, kw_only=True)
    lower_set: ConvexSet = field(default_factory=WholeSpace, kw_only=True)
    lower_inequality: Constraint | None = field(default=None, kw_only=True)
    lower_equality: Constraint | None = field(default=None, kw_only=True)
    upper_inequality: Constraint | None = field(default=None, kw_only=True)
    upper_equality: Constraint | None = field(default=None, kw_only=True)
    joint_set: ConvexSet | None = field(default=None, kw_only=True)
    formulation: str = field(default="optimistic", kw_only=True)
    metrics: Mapping[str, Metric] = field(default_factory=dict, kw_only=True)
    strong_convexity: float | None = field(default=None, kw_only=True)
    name: str = field(default="problem", kw_only=True)

    def __post_init__(self) -> None:
        for level in ("upper", "lower"):
            function, data = getattr(self, level), getattr(self, f"{level}_data")
            if not callable(function):
                raise TypeError(f"{level} must be a function of (x, y), got {type(function).__name__}")
            if data is not None and not isinstance(data, Batches):
                raise TypeError(
                    f"{level}_data must be bilevel.Batches, got {type(data).__name__}; wrap it: Batches(data)"
                )
            _check_signature(level, function, data is not None)
            chosen = getattr(self, f"{level}_set")
            if not isinstance(chosen, ConvexSet):
                raise TypeError(
                    f"{level}_set must be a set from constrained, got {chosen!r}; bounds are constrained.Box(0.0, 1.0)"
                )
        if self.regularizer is not None:
            if not callable(self.regularizer):
                found = type(self.regularizer).__name__
                raise TypeError(f"regularizer must be a function of (x, y), got {found}")
            _check_signature("regularizer", self.regularizer, False)
        for name in CONSTRAINTS:
            _check_constraint_function(name, getattr(self, name))
        if self.joint_set is not None and not isinstance(self.joint_set, ConvexSet):
            found = type(self.joint_set).__name__
            raise TypeError(f"joint_set must be a set from constrained for pairs (x, y), got {found}")
        if self.formulation not in ("optimistic", "pessimistic"):
            raise ValueError(f"formulation must be 'optimistic', got {self.formulation!r}")
        if self.formulation == "pessimistic":
            raise ValueError(
                f"formulation={self.formulation!r}: only 'optimistic' problems are solved, where of several lower "
                "solutions the one that is best for upper counts. For a pessimistic problem make the lower solution "
                "unique (add a small strongly convex term), or bound upper over the lower solutions yourself"
            )
        for name, metric in self.metrics.items():
            if not callable(metric):
                raise TypeError(f"metrics[{name!r}] must be a function of (x, y), got {type(metric).__name__}")
        if self.strong_convexity is not None and not self.strong_convexity > 0:
            raise ValueError(f"strong_convexity must be positive or None, got {self.strong_convexity}")

    @property
    def stochastic(self) -> bool:
        """Whether some level draws minibatches."""
        return any(d is not None and d.stochastic for d in (self.upper_data, self.lower_data))

    @property
    def constraints(self) -> tuple[str, ...]:
        """Names of the constraint functions that are declared."""
        return tuple(name for name in CONSTRAINTS if getattr(self, name) is not None)

    def constraint(self, name: str, x: Tree, y: Tree) -> Tree:
        """The values of a declared constraint, with errors that name it.

        Raises:
            TypeError, ValueError: if the call fails, or it returns anything but floating-point tensors.
        """
        return evaluate_constraint(getattr(self, name), name, x, y)

    @property
    def resumable(self) -> bool:
        """Whether all samplers can be saved."""
        return all(d is None or d.resumable for d in (self.upper_data, self.lower_data))

    def require_resumable(self) -> None:
        """Refuse to resume a problem whose sampler cannot be saved.

        Raises:
            TypeError: naming the level, the loader and the cure.
        """
        for level in ("upper", "lower"):
            data = getattr(self, f"{level}_data")
            if data is not None and not data.resumable:
                try:
                    require_resumable(data.loader)
                except TypeError as error:
                    raise TypeError(f"{level}_data: {error}") from None

    def validate(self, x0: Tree, y0: Tree) -> None:
        """Evaluate both levels at the starting point and refuse what cannot be solved.

        Raises:
            TypeError: for leaves that are no floating-point tensors, or objectives that return no scalar tensor.
            ValueError: for mixed devices, NaN, an objective that is random although its data are not, a lower objective
                without y, a part of x that enters nothing, sets that do not fit.

        Warns:
            UserWarning: if the upper level ignores y, or a leaf of y enters neither the lower objective nor a lower
                constraint.
        """
        _check_point(x0, "x0")
        _check_point(y0, "y0")
        _check_devices(x0, y0, {"upper_data": self.upper_data, "lower_data": self.lower_data})
        self.upper_set.check(x0, "x0")
        self.lower_set.check(y0, "y0")
        bound = self._enter_constraints(x0, y0)
        if self.joint_set is not None:
            self.joint_set.check((x0, y0), "(x0, y0)")
        used = {level: self._dependence(level, x0, y0) for level in ("upper", "lower")}
        if not self.stochastic:
            self._refuse_random(x0, y0)
        in_y = used["lower"][1]
        if not any(in_y):
            raise ValueError(
                "lower does not depend on y: the lower problem has nothing to solve; check the order of the arguments "
                "(x, y), and that the graph is not cut by .item(), .detach() or numpy"
            )
        for name, *enters in zip(tree.paths(y0), in_y, bound["lower"][1], strict=True):
            if not any(enters):
                warnings.warn(
                    f"y{name} enters neither the lower objective nor a lower constraint, which leaves it undetermined",
                    stacklevel=3,
                )
        of_x = used["upper"][0], used["lower"][0], bound["upper"][0], bound["lower"][0]
        entered = [any(enters) for enters in zip(*of_x, strict=True)]
        # Where constraints leave the upper level nothing but the choice among lower solutions, an idle x does no harm.
        idle = self.constraints and not any(entered)
        for name, enters in zip(tree.paths(x0), entered, strict=True):
            if not (enters or idle):
                raise ValueError(
                    f"x{name} enters neither an objective nor a constraint; remove it, or check that the graph is not "
                    "cut"
                )
        if not any(used["upper"][1] + bound["upper"][1]):
            warnings.warn("upper does not depend on y: the lower level has no influence on the solution", stacklevel=3)

    def value(self, level: str, x: Tree, y: Tree, batch: Any = None) -> Tensor:
        """The objective of a level ("upper" or "lower") on one batch, the regularizer included."""
        found = evaluate(getattr(self, level), level, x, y, batch)
        if level == "upper" or self.regularizer is None:
            return found
        return found + evaluate(self.regularizer, "regularizer", x, y, None)

    def _refuse_random(self, x0: Tree, y0: Tree) -> None:
        """Line searches and reports on full data compare values, which a random objective makes meaningless."""
        for level in ("upper", "lower"):
            data: Batches | None = getattr(self, f"{level}_data")
            with torch.no_grad():
                first, second = (
                    float(self.value(level, x0, y0, data.full() if data is not None else None)) for _ in range(2)
                )
            if abs(first - second) > 1e-4 * max(abs(first), abs(second)):
                raise ValueError(
                    f"{level} is random: two evaluations at (x0, y0) gave {first:.6g} and {second:.6g}. Call .eval() "
                    "on modules with Dropout or BatchNorm, or fix the draws"
                )

    def _dependence(self, level: str, x0: Tree, y0: Tree) -> tuple[list[bool], list[bool]]:
        x, y = tree.variables(x0), tree.variables(y0)
        data: Batches | None = getattr(self, f"{level}_data")
        value = self.value(level, x, y, _first_batch(data) if data is not None else None)
        if not bool(torch.isfinite(value)):
            raise ValueError(f"{level}(x0, y0) is {float(value.detach())}; start where both objectives are finite")
        own_x, own_y = tree.leaves(x), tree.leaves(y)
        grads = _gradients([value], own_x + own_y)
        for name, g in zip([f"x{p}" for p in tree.paths(x)] + [f"y{p}" for p in tree.paths(y)], grads, strict=True):
            if g is not None and not bool(torch.isfinite(g).all()):
                raise ValueError(f"the gradient of {level} in {name} is not finite at (x0, y0); move the start")
        entered = [g is not None for g in grads]
        return entered[: len(own_x)], entered[len(own_x) :]

    def _enter_constraints(self, x0: Tree, y0: Tree) -> dict[str, tuple[list[bool], list[bool]]]:
        """Which leaves of x and of y enter a constraint of each level."""
        x, y = tree.variables(x0), tree.variables(y0)
        own_x, own_y = tree.leaves(x), tree.leaves(y)
        entered = {level: [False] * (len(own_x) + len(own_y)) for level in ("upper", "lower")}
        for name in self.constraints:
            level = name.partition("_")[0]
            grads = _gradients([leaf.sum() for leaf in tree.leaves(self.constraint(name, x, y))], own_x + own_y)
            entered[level] = [old or g is not None for old, g in zip(entered[level], grads, strict=True)]
        return {level: (flags[: len(own_x)], flags[len(own_x) :]) for level, flags in entered.items()}


def _gradients(values: Sequence[Tensor], variables: list[Tensor]) -> Sequence[Tensor | None]:
    """Of the sum of the values; None for what does not enter."""
    connected = [value for value in values if value.requires_grad]
    return torch.autograd.grad(connected, variables, allow_unused=True) if connected else [None] * len(variables)


def evaluate(function: Objective, level: str, x: Tree, y: Tree, batch: Any) -> Tensor:
    """The scalar value of one objective, without its aux.

    Raises:
        TypeError, ValueError: if it is no scalar tensor, or the call fails; the message names level and shapes.
    """
    try:
        found = function(x, y) if batch is None else function(x, y, batch=batch)
    except (RuntimeError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{level}(x, y) failed with {type(error).__name__}: {error}. "
            f"It was called with x: {tree.describe(x)}; y: {tree.describe(y)}"
        ) from error
    value = found[0] if isinstance(found, tuple) and len(found) == 2 else found
    if not isinstance(value, Tensor):
        raise TypeError(f"{level} must return a scalar tensor or (tensor, aux), got {type(value).__name__}")
    if value.numel() != 1:
        raise ValueError(
            f"{level} must return a scalar, got shape {tuple(value.shape)}; reduce it with .mean() or .sum()"
        )
    if not value.is_floating_point():
        raise TypeError(f"{level} must return a floating-point scalar, got {value.dtype}")
    return value.reshape(())


def evaluate_constraint(function: Constraint, name: str, x: Tree, y: Tree) -> Tree:
    """The values of one constraint function.

    Raises:
        TypeError, ValueError: if the call fails, or it returns anything but floating-point tensors.
    """
    try:
        found = function(x, y)
    except (RuntimeError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{name}(x, y) failed with {type(error).__name__}: {error}. "
            f"It was called with x: {tree.describe(x)}; y: {tree.describe(y)}"
        ) from error
    for path, leaf in zip(tree.paths(found), tree.leaves(found), strict=True):
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"{name}(x, y){path} must be a tensor, got {type(leaf).__name__}; torch.stack([...]) makes one of "
                "several numbers, and each entry is one constraint"
            )
        if not leaf.is_floating_point():
            raise TypeError(
                f"{name}(x, y){path} has dtype {leaf.dtype}: return the value that has to be "
                f"{'zero' if name.endswith('_equality') else 'at most zero'}, not a comparison"
            )
    return found


def _check_constraint_function(name: str, function: Any) -> None:
    if function is None:
        return
    if isinstance(function, Mapping | list | tuple):
        found = "dict" if isinstance(function, Mapping) else type(function).__name__
        raise TypeError(
            f"{name} must be one function of (x, y) that returns all rows, got a {found}; scipy's dict constraints say "
            "fun >= 0, here it is function(x, y) <= 0: give lambda x, y: -fun(x, y)"
        )
    if not callable(function):
        raise TypeError(f"{name} must be a function of (x, y), got {type(function).__name__}")
    _check_signature(name, function, False)


def _first_batch(data: Batches) -> Any:
    generator = torch.Generator().manual_seed(0)
    if data.loader is not None:
        return data.full() if data.rows is not None else next(iter(data.loader))
    return data.draw(data.init(generator), generator)


def _check_signature(level: str, function: Objective, has_data: bool) -> None:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # builtins and some callables hide theirs
        return
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    batch = parameters.get("batch")
    if has_data and batch is None and not takes_any:
        raise TypeError(f"{level}_data is declared, so {level} must accept it: def {level}(x, y, *, batch)")
    if level in CONSTRAINTS and batch is not None and batch.default is inspect.Parameter.empty:
        raise TypeError(f"{level} takes a batch, but constraints are functions of (x, y) alone; let it use all data")
    if level == "regularizer" and batch is not None and batch.default is inspect.Parameter.empty:
        raise TypeError("regularizer takes a batch, but it is r(x, y); what needs data belongs to lower")
    if not has_data and batch is not None and batch.default is inspect.Parameter.empty:
        raise TypeError(f"{level} takes a batch, but {level}_data is not declared: {level}_data=bilevel.Batches(...)")


def _check_point(point: Tree, name: str) -> None:
    values = tree.leaves(point)
    if not values:
        raise ValueError(f"{name} has no tensors")
    for path, leaf in zip(tree.paths(point), values, strict=True):
        if not isinstance(leaf, Tensor):
            raise TypeError(f"{name}{path} must be a tensor, got {type(leaf).__name__}; use torch.tensor(...)")
        if not leaf.is_floating_point():
            raise TypeError(
                f"{name}{path} has dtype {leaf.dtype}; variables must be floating point: .double() or .float()"
            )
        if not bool(torch.isfinite(leaf).all()):
            raise ValueError(f"{name}{path} contains NaN or infinity")


def _check_devices(x0: Tree, y0: Tree, data: Mapping[str, Batches | None]) -> None:
    seen: dict[torch.device, str] = {}
    for name, point in (("x0", x0), ("y0", y0)):
        for path, leaf in zip(tree.paths(point), tree.leaves(point), strict=True):
            seen.setdefault(leaf.device, f"{name}{path}")
    for name, batches in data.items():
        if batches is not None and batches.loader is None and batches.dataset is None:
            for path, leaf in zip(tree.paths(batches.full()), tree.leaves(batches.full()), strict=True):
                seen.setdefault(leaf.device, f"{name}{path}")
    if len(seen) > 1:
        places = ", ".join(f"{name} on {device}" for device, name in seen.items())
        raise ValueError(f"tensors live on several devices ({places}); move all of them to one with .to(device)")
