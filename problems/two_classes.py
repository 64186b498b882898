"""Data sets with two classes in three parts: rows with labels in {-1, 1} for training, validation and testing."""

from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from problems.datasets import Dataset, split, standardize


@dataclass(frozen=True, eq=False)
class LabelledRows:
    """Features ``(n, d)`` and labels ``(n,)`` in {-1, 1}."""

    features: Tensor
    labels: Tensor


Rows = TypeVar("Rows", bound=LabelledRows)


@dataclass(frozen=True, eq=False)
class Parts(Generic[Rows]):
    """The rows of the three parts, and the set they are from."""

    data: Dataset
    train: Rows
    valid: Rows
    test: Rows


def divide(
    data: Dataset,
    kind: type[Rows],
    sizes: tuple[int, int],
    *,
    scale: bool = True,
    seed: int,
    dtype: torch.dtype,
    device: str,
) -> Parts[Rows]:
    """Training and validation rows as many as ``sizes`` say, the others for testing; permuted by ``seed``.

    Args:
        data: the set.
        kind: the class of the rows.
        sizes: of the first two parts.
        scale: whether features are standardized by the training rows.
        seed: of the permutation.
        dtype, device: of the rows; standardization is in float64.

    Raises:
        ValueError: for a set without two classes, more rows than there are, or a part with a single class.
    """
    if data.n_classes != 2:
        raise ValueError(f"dataset={data.name!r} must have two classes; diabetes_scaled and breast_cancer do")
    index = split(data.n_samples, (*sizes, -1), torch.Generator().manual_seed(seed))
    tables = [data.features[part].to(torch.float64) for part in index]
    rows = [
        kind(table.to(device=device, dtype=dtype), (2.0 * data.targets[part] - 1.0).to(device=device, dtype=dtype))
        for table, part in zip(standardize(*tables) if scale else tables, index, strict=True)
    ]
    if any(bool((part.labels == part.labels[0]).all()) for part in rows):
        counts = ", ".join(str(len(part)) for part in index)
        raise ValueError(f"a part of {data.name} has one class only; the parts have {counts} rows")
    return Parts(data, *rows)
