"""Bilevel problems whose variables are the parameters of nn.Modules."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bilevel.problem import BilevelProblem
from implicit import ModuleObjective, tree
from implicit.tree import Tree

Level = nn.Module | Tree
Loss = Callable[..., Any]


@dataclass(frozen=True)
class ModuleProblem(BilevelProblem):
    """A :class:`BilevelProblem` that knows its starting point and the modules it came from.

    Attributes:
        start: ``(x0, y0)``; ``solve`` uses it where none is given.
        modules: the module of each level, or None.
    """

    start: tuple[Tree, Tree] = field(default=((), ()), kw_only=True)
    modules: tuple[nn.Module | None, nn.Module | None] = field(default=(None, None), kw_only=True)

    def load_into_modules(self, x: Tree, y: Tree) -> None:
        """Write a solution into the modules' parameters."""
        for module, values in zip(self.modules, (x, y), strict=True):
            if module is not None:
                own = dict(module.named_parameters())
                with torch.no_grad():
                    for name, value in values.items():
                        own[name].copy_(value)


class _Bound:
    """A module with given parameters, which the losses can also read."""

    def __init__(self, owner: ModuleObjective, parameters: Mapping[str, Tensor]) -> None:
        self.module, self.parameters = owner.module, parameters
        self._net = owner.bind(dict(parameters))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._net(*args, **kwargs)


def from_modules(
    *, upper: Level, lower: Level, upper_loss: Loss, lower_loss: Loss, **declaration: Any
) -> ModuleProblem:
    """A bilevel problem over the parameters of modules.

    The losses are called as ``upper_loss(upper, lower)`` or ``upper_loss(upper, lower, *, batch)``, where a level that
    is an nn.Module arrives as a callable with the current parameters, ``lower(inputs)``, and any other level as the
    pytree of tensors itself. Only parameters with ``requires_grad`` are variables; tied weights count once; buffers
    keep the values they have.

    Args:
        upper, lower: an nn.Module, or a pytree of tensors.
        upper_loss, lower_loss: scalar losses of both levels.
        declaration: further fields of :class:`BilevelProblem`, such as ``upper_data``; a ``regularizer`` is called
            like the losses.

    Raises:
        TypeError: if a level is neither.
        ValueError: if a module has no trainable parameters.

    Example:
        >>> import torch, bilevel
        >>> X, t = torch.randn(20, 3), torch.randn(20, 1)
        >>> model = torch.nn.Linear(3, 1)
        >>> problem = bilevel.from_modules(
        ...     upper=torch.zeros(()), lower=model,
        ...     upper_loss=lambda x, net: ((net(X[10:]) - t[10:]) ** 2).mean(),
        ...     lower_loss=lambda x, net: ((net(X[:10]) - t[:10]) ** 2).mean()
        ...     + x.exp() * sum((p**2).sum() for p in net.parameters.values()),
        ... )
        >>> solution = bilevel.solve(problem, bilevel.ImplicitGradient(), max_steps=5, raise_on_failure=False)
    """
    starts = (_variables(upper, "upper"), _variables(lower, "lower"))
    modules = tuple(level if isinstance(level, nn.Module) else None for level in (upper, lower))
    owners = [ModuleObjective(module, lower_loss) if module is not None else None for module in modules]

    def bind(loss: Loss) -> Loss:
        def objective(x: Tree, y: Tree, **batch: Any) -> Any:
            bound = [_Bound(o, p) if o is not None else p for o, p in zip(owners, (x, y), strict=True)]
            return loss(*bound, **batch)

        objective.__signature__ = _signature(loss)  # type: ignore[attr-defined]
        return objective

    if callable(declaration.get("regularizer")):
        declaration = {**declaration, "regularizer": bind(declaration["regularizer"])}
    return ModuleProblem(
        bind(upper_loss), bind(lower_loss), start=starts, modules=(modules[0], modules[1]), **declaration
    )


def _signature(loss: Loss) -> Any:
    import inspect

    return inspect.signature(loss)


def _variables(level: Level, name: str) -> Tree:
    if isinstance(level, nn.Module):
        found = {k: p.detach().clone() for k, p in level.named_parameters() if p.requires_grad}
        if not found:
            raise ValueError(f"{name}: {type(level).__name__} has no trainable parameters")
        return found
    if not all(isinstance(leaf, Tensor) for leaf in tree.leaves(level)):
        raise TypeError(f"{name} must be an nn.Module or a pytree of tensors, got {type(level).__name__}")
    return tree.clone(level)
