"""Data that reach the objectives batch by batch, with a sampler that can be saved and resumed."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from implicit import State, tree
from implicit.tree import Tree


@dataclass(kw_only=True)
class Position(State):
    """Where a sampler stands: the order of this epoch and how much of it is used up."""

    order: Tensor
    cursor: int = 0
    epoch: int = 0


class LoaderPosition:
    """Where an iteration over a DataLoader stands; saves itself if the loader does."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.iterator: Iterator[Any] | None = None
        self.epoch = 0

    def state_dict(self) -> dict[str, Any]:
        """The loader's own state.

        Raises:
            TypeError: if the loader has none.
        """
        require_resumable(self.loader)
        return {"loader": self.loader.state_dict(), "epoch": self.epoch, "started": self.iterator is not None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the loader's own state."""
        require_resumable(self.loader)
        self.loader.load_state_dict(state_dict["loader"])
        self.epoch = state_dict["epoch"]
        self.iterator = iter(self.loader) if state_dict["started"] else None


def require_resumable(loader: Any) -> None:
    """Refuse loaders that cannot say where they are.

    Raises:
        TypeError: naming the loader's class and the cure.
    """
    if not (hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")):
        raise TypeError(
            f"{type(loader).__name__} has no state_dict and cannot be resumed; give Batches the tensors or the "
            "Dataset itself, or use a StatefulDataLoader (package torchdata)"
        )


class Batches:
    """Data of one level, drawn in minibatches without replacement, reshuffled every epoch.

    Immutable: where the sampling stands lives in a position that belongs to the algorithm's state. All batches have
    the same size; the rows left over at the end of an epoch are skipped in favour of the next shuffle.

    Args:
        data: a tensor, or a pytree of tensors with a common first axis of n rows; or a map-style ``Dataset``; or a
            ``DataLoader``, whose own batches are then used.
        batch_size: rows per batch; None (or n and more) means the full data at every step, in order.
        collate: turns a list of ``Dataset`` items into a batch; ``torch.utils.data.default_collate`` by default.

    Raises:
        TypeError: if ``data`` is none of these.
        ValueError: if the rows disagree, ``batch_size`` is not positive, or a tensor contains NaN.
    """

    def __init__(
        self, data: Any, batch_size: int | None = None, *, collate: Callable[[list[Any]], Any] | None = None
    ) -> None:
        self.loader: Any = data if isinstance(data, DataLoader) or _is_loader(data) else None
        self._collate = collate or getattr(self.loader, "collate_fn", None) or default_collate
        self._full: Tree = None
        self.dataset: Any = None
        self.rows: int | None = None
        if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
            raise ValueError(f"batch_size must be None or a positive integer, got {batch_size!r}")
        if self.loader is not None:
            if batch_size is not None:
                raise ValueError("batch_size belongs to the DataLoader here; leave it out of Batches")
            self.dataset = getattr(data, "dataset", None)
            self.rows = len(self.dataset) if hasattr(self.dataset, "__len__") else None
            self.batch_size = getattr(data, "batch_size", None)
            return
        if _is_tensor_tree(data):
            self._full = data
            self.rows = _common_rows(data)
            _refuse_nan(data)
        elif _is_dataset(data):
            self.dataset, self.rows = data, len(data)
        else:
            raise TypeError(
                f"data must be a tensor, a pytree of tensors, a map-style Dataset or a DataLoader, got "
                f"{type(data).__name__}; convert arrays with torch.as_tensor"
            )
        if self.rows == 0:
            raise ValueError("data has no rows")
        self.batch_size = None if batch_size is None or batch_size >= self.rows else batch_size

    @property
    def stochastic(self) -> bool:
        """Whether draws differ from the full data."""
        return self.loader is not None or self.batch_size is not None

    @property
    def resumable(self) -> bool:
        """Whether the sampler's position can be saved."""
        return self.loader is None or hasattr(self.loader, "state_dict")

    def full(self) -> Tree:
        """All rows as one batch; built once and kept.

        Raises:
            TypeError: for a loader over data of unknown length.
        """
        if self._full is None:
            if self.rows is None or self.dataset is None:
                raise TypeError(
                    f"{type(self.loader).__name__} does not say how many rows it has; the accuracy report needs all "
                    "data at once: use a map-style Dataset"
                )
            self._full = self._collate([self.dataset[i] for i in range(self.rows)])
            _refuse_nan(self._full)
        return self._full

    def init(self, generator: torch.Generator) -> Position | LoaderPosition:
        """A position before the first batch; moves ``generator`` by one shuffle."""
        if self.loader is not None:
            return LoaderPosition(self.loader)
        if self.batch_size is None:
            return Position(order=torch.empty(0, dtype=torch.long))
        return Position(order=self._shuffle(generator))

    def _shuffle(self, generator: torch.Generator) -> Tensor:
        assert self.rows is not None
        order = torch.randperm(self.rows, generator=generator, device=generator.device)
        leaves = tree.leaves(self._full) if self._full is not None else []
        return order.to(leaves[0].device) if leaves else order

    def draw(self, position: Any, generator: torch.Generator) -> Tree:
        """The next batch; advances ``position`` in place."""
        if isinstance(position, LoaderPosition):
            return self._next(position)
        if self.batch_size is None:
            return self.full()
        assert self.rows is not None
        if position.cursor + self.batch_size > self.rows:
            position.order, position.cursor = self._shuffle(generator), 0
            position.epoch += 1
        rows = position.order[position.cursor : position.cursor + self.batch_size]
        position.cursor += self.batch_size
        if self._full is not None and self.dataset is None:
            return tree.map(lambda leaf: leaf[rows], self._full)
        assert self.dataset is not None
        return self._collate([self.dataset[i] for i in rows.tolist()])

    def _next(self, position: LoaderPosition) -> Tree:
        for _ in range(2):
            if position.iterator is None:
                position.iterator = iter(self.loader)
            batch = next(position.iterator, None)
            if batch is not None:
                return batch
            position.iterator, position.epoch = None, position.epoch + 1
        raise ValueError(f"{type(self.loader).__name__} yields no batches")


def _is_loader(data: Any) -> bool:
    return hasattr(data, "__iter__") and hasattr(data, "dataset") and hasattr(data, "batch_size")


def _is_tensor_tree(data: Any) -> bool:
    leaves = tree.leaves(data)
    return bool(leaves) and all(isinstance(leaf, Tensor) for leaf in leaves)


def _is_dataset(data: Any) -> bool:
    # Strings and numpy arrays can be indexed too, but are no data sets.
    indexable = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    return indexable and not isinstance(data, str | bytes | dict | list | tuple) and not hasattr(data, "__array__")


def _common_rows(data: Tree) -> int:
    names, values = tree.paths(data), tree.leaves(data)
    for name, leaf in zip(names, values, strict=True):
        if leaf.ndim == 0:
            raise ValueError(f"data{name} is a single number; every tensor needs a first axis of rows")
    rows = {leaf.shape[0] for leaf in values}
    if len(rows) > 1:
        raise ValueError(f"the tensors in data disagree on the number of rows: {tree.describe(data)}")
    return rows.pop()


def _refuse_nan(data: Tree) -> None:
    for name, leaf in zip(tree.paths(data), tree.leaves(data), strict=True):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            bad = torch.isnan(leaf).reshape(leaf.shape[0], -1).any(dim=1) if leaf.numel() else torch.zeros(0)
            if bool(bad.any()):
                rows = bad.nonzero()[:5, 0].tolist()
                raise ValueError(
                    f"data{name} has NaN in {int(bad.sum())} of {leaf.shape[0]} rows (first: {rows}); "
                    "drop or impute them"
                )
