"""Operators summed over minibatches."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor

from implicit import tree
from implicit.operators.base import LinearOperator
from implicit.tree import Tree


class Accumulated(LinearOperator):
    """The weighted mean (or sum) of one operator per minibatch: curvature over data that does not fit in one pass.

    .. math:: A = \\sum_b w_b A_b \\Big/ \\sum_b w_b

    With ``A_b`` the Hessian of the mean loss over batch b and ``w_b`` its number of samples this is the Hessian of the
    mean loss over all of them, also where the last batch is smaller.

    The operators of all batches are kept between products as long as they fit ``memory``. What does not fit is built
    again for every product (2.5 gradients instead of 1.5), or once for a block of products. Of a list or tuple as many
    batches are kept as fit; any other iterable, such as a shuffling DataLoader, is kept whole or not at all, since its
    batches may differ from one pass to the next.

    Args:
        make: maps a batch to its operator, such as ``lambda batch: implicit.Hessian(lambda y: loss(y, batch), y)``.
        batches: an iterable that can be gone through again and again.
        weights: ``w_b`` from a batch; the length of its tensors' first axis by default.
        reduction: ``"mean"``, or ``"sum"`` for ``sum_b A_b`` (weights are then not allowed).
        memory: bytes that the operators kept may take, as they report in ``held_bytes``.

    Attributes:
        kept: how many batches are kept.

    Raises:
        TypeError: if ``batches`` is an iterator, which is empty after one pass.
        ValueError: if there is no batch, a weight is not positive or cannot be read off, or ``reduction`` is unknown.

    Example:
        >>> import torch, implicit
        >>> X, y = torch.tensor([[1.0], [2.0], [3.0]]), torch.zeros(1)
        >>> loss = lambda y, rows: ((rows @ y) ** 2).mean() / 2
        >>> batches = X.split(2)
        >>> A = implicit.Accumulated(lambda rows: implicit.Hessian(lambda q: loss(q, rows), y), batches)
        >>> A @ torch.ones(1), implicit.Hessian(lambda q: loss(q, X), y) @ torch.ones(1)
        (tensor([4.6667]), tensor([4.6667]))
    """

    def __init__(
        self,
        make: Callable[[Any], LinearOperator],
        batches: Iterable[Any],
        *,
        weights: Callable[[Any], float] | None = None,
        reduction: str = "mean",
        memory: int = 2**30,
    ) -> None:
        if isinstance(batches, Iterator):
            raise TypeError(f"batches is a {type(batches).__name__}, empty after one pass; use a list or a DataLoader")
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
        if reduction == "sum" and weights is not None:
            raise ValueError("weights are for reduction='mean'; scale the losses instead")
        self._make, self._batches = make, batches
        self._options: Any = {"weights": weights, "reduction": reduction, "memory": memory}
        self._weight = _one if reduction == "sum" else weights or _samples
        self._kept: list[tuple[float, LinearOperator]] = []
        self.symmetric = self.positive_definite = True
        self._value: Tensor | None = None
        self._gradient: Tree = None
        total, held, whole = 0.0, 0, True
        for weight, operator in self._build():
            if not total:
                super().__init__(operator.like, None if operator.out is operator.like else operator.out)
            total += weight
            self._add(weight, operator)
            held += operator.held_bytes
            whole = whole and held <= memory
            if whole:
                self._kept.append((weight, operator))
        if not total:
            raise ValueError("batches is empty")
        if not whole and not isinstance(batches, Sequence):
            self._kept = []
        self._complete = whole
        self._total = 1.0 if reduction == "sum" else total

    @property
    def kept(self) -> int:
        """How many batches are kept."""
        return len(self._kept)

    @property
    def held_bytes(self) -> int:
        return sum(operator.held_bytes for _, operator in self._kept)

    @property
    def value(self) -> Tensor:
        """The mean (or sum) of the objectives, where the operators carry them.

        Raises:
            TypeError: if they do not.
        """
        if self._value is None:
            raise TypeError("the operators of the batches carry no value; Hessians do")
        return self._value / self._total

    @property
    def gradient(self) -> Tree:
        """The mean (or sum) of their gradients.

        Raises:
            TypeError: if the operators carry none.
        """
        if self._gradient is None:
            raise TypeError("the operators of the batches carry no gradient; Hessians do")
        return tree.scale(1 / self._total, self._gradient)

    def _add(self, weight: float, operator: Any) -> None:
        self.symmetric = self.symmetric and operator.symmetric
        self.positive_definite = self.positive_definite and operator.positive_definite
        if hasattr(operator, "value") and hasattr(operator, "gradient"):
            value, gradient = weight * operator.value, tree.scale(weight, operator.gradient)
            self._value = value if self._value is None else self._value + value
            self._gradient = gradient if self._gradient is None else tree.add(self._gradient, gradient)

    def _build(self, skip: int = 0) -> Iterator[tuple[float, LinearOperator]]:
        for position, batch in enumerate(self._batches):
            if position >= skip:
                weight = float(self._weight(batch))
                if not weight > 0:
                    raise ValueError(f"the weight of batch {position} is {weight}; weights must be positive")
                yield weight, self._make(batch)

    def _parts(self) -> Iterator[tuple[float, LinearOperator]]:
        yield from self._kept
        if not self._complete:
            yield from self._build(skip=len(self._kept))

    def _sum(self, product: Callable[[LinearOperator], Tensor]) -> Tensor:
        total: Tensor | None = None
        for weight, operator in self._parts():
            part = product(operator)
            total = weight * part if total is None else total.add_(part, alpha=weight)
        assert total is not None
        return total.div_(self._total)

    def mv(self, v: Tree) -> Tree:
        return tree.unravel(self._sum(lambda operator: operator.flat_mv(tree.ravel(v))), self.out)

    def flat_mv(self, vector: Tensor) -> Tensor:
        self.products += 1
        return self._sum(lambda operator: operator.flat_mv(vector))

    def _flat_block(self, rows: Tensor) -> Tensor:
        self.products += rows.shape[0]
        return self._sum(lambda operator: operator.flat_mm(rows))

    @property
    def T(self) -> LinearOperator:
        if self.symmetric:
            return self
        return Accumulated(lambda batch: self._make(batch).T, self._batches, **self._options)


def _one(batch: Any) -> float:
    return 1.0


def _samples(batch: Any) -> float:
    lengths = {leaf.shape[0] for leaf in tree.leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim}
    if len(lengths) != 1:
        raise ValueError(
            f"the number of samples of a batch is not plain from its tensors (first axes {sorted(lengths)}); "
            "give weights=lambda batch: ..."
        )
    return float(lengths.pop())
