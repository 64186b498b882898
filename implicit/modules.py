"""Losses of nn.Modules as functions of their parameters."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Parameters = dict[str, Tensor]


class ModuleObjective:
    """A module's loss as a function of its trainable parameters; made by :func:`module_objective`.

    Attributes:
        module: the module; its parameters and buffers are read, never written.
        parameters: its trainable parameters by name, detached, on the module's own memory; tied ones once.
    """

    def __init__(self, module: nn.Module, loss: Callable[..., Tensor]) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be an nn.Module, got {type(module).__name__}")
        self.module, self.loss = module, loss
        self.parameters = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ValueError(f"{type(module).__name__} has no parameters that require gradients")
        names = {id(p): name for name, p in module.named_parameters()}
        # One entry per place that holds a parameter. torch's own tying goes by name, and in a module that is reached
        # under two names it puts the argument back in place of the parameter after the call.
        self._places = [
            (f"{prefix}.{key}" if prefix else key, names[id(parameter)])
            for prefix, part in module.named_modules()
            for key, parameter in part.named_parameters(recurse=False)
            if parameter.requires_grad
        ]

    def __call__(self, parameters: Parameters, *batch: Any, **options: Any) -> Tensor:
        """``loss(net, *batch)`` with a net that has the given parameters.

        Raises:
            ValueError: if the names are not those of ``self.parameters``.
        """
        return self.loss(self.bind(parameters), *batch, **options)

    def bind(self, parameters: Parameters) -> Callable[..., Any]:
        """The module with the given parameters, as a function of its inputs.

        Every call works on clones of the buffers: batch norm in training mode would otherwise move its running
        statistics, and a kept graph could not be used after the next call.

        Raises:
            ValueError: if the names are not those of ``self.parameters``.
        """
        if parameters.keys() != self.parameters.keys():
            missing = sorted(self.parameters.keys() - parameters.keys())
            unknown = sorted(parameters.keys() - self.parameters.keys())
            raise ValueError(
                f"parameters do not belong to {type(self.module).__name__}: missing {missing}, unknown {unknown}; "
                "start from the objective's .parameters"
            )

        def net(*args: Any, **kwargs: Any) -> Any:
            values = {place: parameters[name] for place, name in self._places}
            clones: dict[int, Tensor] = {}
            for prefix, part in self.module.named_modules():
                for key, buffer in part.named_buffers(recurse=False):
                    place = f"{prefix}.{key}" if prefix else key
                    values[place] = clones.setdefault(id(buffer), buffer.clone())
            return torch.func.functional_call(self.module, values, args, kwargs, tie_weights=False)

        return net


def module_objective(module: nn.Module, loss: Callable[..., Tensor]) -> ModuleObjective:
    """The loss of a module as a function of its parameters, for operators and solvers over pytrees.

    Weights that are shared stay shared and count once; parameters with ``requires_grad=False`` are constants; the
    module itself, its buffers included, is left as it is. Random layers such as dropout in training mode draw anew in
    every evaluation: put the module in ``eval()``, or use :func:`implicit.paired`.

    Args:
        module: any nn.Module.
        loss: called as ``loss(net, *batch)``, where ``net(inputs)`` is the module with the current parameters; returns
            a scalar.

    Returns:
        ``objective(parameters, *batch)``, with ``objective.parameters`` to start from.

    Raises:
        TypeError: if ``module`` is no nn.Module.
        ValueError: if it has no trainable parameters.

    Example:
        >>> import torch, implicit
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> objective = implicit.module_objective(model, lambda net, X, t: ((net(X) - t) ** 2).mean() / 2)
        >>> X, t = torch.eye(2), torch.zeros(2, 1)
        >>> H = implicit.Hessian(lambda p: objective(p, X, t), objective.parameters)
        >>> H @ {"weight": torch.tensor([[1.0, 2.0]])}
        {'weight': tensor([[0.5000, 1.0000]])}
    """
    return ModuleObjective(module, loss)
