"""A parametrized cvxpy problem as a differentiable torch function."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from implicit.cvx.compiled import from_cvxpy
from implicit.cvx.declaration import check_problem, compile_problem
from implicit.cvx.solution import Solution


class Layer:
    """The solution map of a convex problem: tensors for its parameters in, tensors for its variables out.

        x*(p) = argmin_x  f(x; p)   subject to   g(x; p) <= 0,  h(x; p) = 0

    The problem is compiled once. Every call solves it to rounding (Clarabel, then Newton steps on the optimality
    conditions), in float64 on the CPU whatever the inputs are, so that there is no tolerance to choose; results have
    the dtype and device of the inputs. Derivatives of any order come from the implicit function
    theorem at the solution, in reverse and forward mode and under the transforms of ``torch.func``; forward over
    forward is refused.

    Args:
        problem: a ``cvxpy.Problem`` that follows the rules of disciplined parametrized programming (DPP) and whose
            cones are linear, second-order, exponential and semidefinite.
        parameters: all of its parameters, in the order of the arguments of a call.
        variables: the variables to return, in the order of the results.

    Raises:
        TypeError: if an argument is not what it should be.
        ValueError: if the problem is not convex or not DPP, has integer or complex variables, power cones, or
            parameters with a structure (symmetric, diagonal, ...), or if parameters or variables do not fit it.

    Example:
        >>> import cvxpy as cp, torch, implicit
        >>> x, p = cp.Variable(2), cp.Parameter(2)
        >>> problem = cp.Problem(cp.Minimize(cp.sum_squares(x - p)), [x >= 0, cp.sum(x) == 1])
        >>> layer = implicit.cvx.Layer(problem, parameters=[p], variables=[x])
        >>> point = torch.tensor([0.9, 0.5], requires_grad=True)
        >>> (projected,) = layer(point)
        >>> projected[0].backward()
        >>> projected.detach(), point.grad
        (tensor([0.7000, 0.3000]), tensor([ 0.5000, -0.5000]))
    """

    def __init__(self, problem: Any, *, parameters: Sequence[Any], variables: Sequence[Any]) -> None:
        check_problem(problem, parameters, variables)
        compiled, places = compile_problem(problem, parameters, variables)
        self._inputs = [(p.name(), tuple(p.shape)) for p in parameters]
        spans = [slice(start, start + v.size) for v, start in zip(variables, places, strict=True)]
        self._outputs = [(v.name(), tuple(v.shape), span) for v, span in zip(variables, spans, strict=True)]
        self._program = from_cvxpy(compiled, parameters, [i for span in spans for i in range(span.start, span.stop)])

    def __call__(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Solve, for one set of parameters or for a batch.

        Args:
            *values: one tensor per parameter, of its shape, or with a leading batch axis of a size that all batched
                ones share; the others serve the whole batch.

        Returns:
            One tensor per variable; with a leading batch axis if a value had one.

        Raises:
            TypeError: if a value is not a floating-point tensor.
            ValueError: if their number, shapes, dtypes or devices do not fit, or a value misses its parameter's sign.
            SolveError: if a problem is infeasible, unbounded, or could not be solved; the message names the element.

        Warns:
            ConvergenceWarning: if the optimality conditions hold to less than 1e-9; in the backward pass, if the
                solution has no derivative: it is not unique, or has a kink, or dependent active constraints.
        """
        batch = self._check_values(values)
        rows = [_to_rows(v, shape, batch) for v, (_, shape) in zip(values, self._inputs, strict=True)]
        theta = torch.cat([r.to(device="cpu", dtype=torch.float64) for r in rows], 1)
        point, _ = Solution.apply(theta, self._program)
        like = values[0]
        found = []
        for _, shape, place in self._outputs:
            part = _from_rows(point[:, place], shape)
            found.append((part if batch is not None else part[0]).to(device=like.device, dtype=like.dtype))
        return tuple(found)

    def __repr__(self) -> str:
        """Names and shapes."""
        inputs, outputs = (", ".join(f"{e[0]}{e[1]}" for e in group) for group in (self._inputs, self._outputs))
        return f"Layer({inputs} -> {outputs})"

    def _check_values(self, values: tuple[Any, ...]) -> int | None:
        """The batch size, or None."""
        if len(values) != len(self._inputs):
            names = ", ".join(name for name, _ in self._inputs)
            raise ValueError(f"got {len(values)} tensors for {len(self._inputs)} parameters ({names})")
        batch, first = None, None
        for value, (name, shape) in zip(values, self._inputs, strict=True):
            if not isinstance(value, Tensor) or not value.is_floating_point():
                found = f"dtype {value.dtype}" if isinstance(value, Tensor) else repr(value)
                raise TypeError(f"parameter {name}: got {found}, give a floating-point tensor")
            if tuple(value.shape) != shape and (value.ndim != len(shape) + 1 or tuple(value.shape[1:]) != shape):
                raise ValueError(
                    f"parameter {name} has shape {shape}, got a tensor of shape {tuple(value.shape)}: give that shape, "
                    "or one more axis in front for a batch"
                )
            if (value.dtype, value.device) != (values[0].dtype, values[0].device):
                raise ValueError(
                    f"parameter {name} is {value.dtype} on {value.device}, but {self._inputs[0][0]} is "
                    f"{values[0].dtype} on {values[0].device}: convert one of them"
                )
            if value.ndim > len(shape):
                if batch is not None and len(value) != batch:
                    raise ValueError(
                        f"parameter {name} has a batch of {len(value)}, but {first} one of {batch}: give equal sizes"
                    )
                batch, first = len(value), name
        if batch == 0:
            raise ValueError(f"parameter {first} has an empty batch: give at least one element")
        return batch


def _to_rows(value: Tensor, shape: tuple[int, ...], batch: int | None) -> Tensor:
    """(batch, size), entries by columns as cvxpy orders them."""
    stacked = value if value.ndim > len(shape) else value[None]
    flat = stacked.permute(0, *range(len(shape), 0, -1)).flatten(1) if shape else stacked[:, None]
    return flat.expand(batch or 1, -1)


def _from_rows(rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    if not shape:
        return rows[:, 0]
    return rows.unflatten(1, tuple(reversed(shape))).permute(0, *range(len(shape), 0, -1))
