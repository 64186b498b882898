"""Probability simplices."""

from dataclasses import dataclass

import torch
from torch import Tensor

from constrained.sets.base import ConvexSet, Gaps, check_positive, leaf_name
from implicit import tree
from implicit.tree import Tree


@dataclass(frozen=True)
class Simplex(ConvexSet):
    """Scaled probability simplices, ``C = {p : p >= 0, sum(p, dim) = total}``, one per slice of each leaf.

    Args:
        total: the sum of each slice, a positive finite number.
        dim: the dimension that is summed; the others are batch dimensions.

    Raises:
        TypeError: if ``total`` is not a number or ``dim`` not an int.
        ValueError: if ``total`` is not positive and finite.

    Example:
        >>> Simplex().project(torch.tensor([2.0, 1.5, -3.0]))
        tensor([0.7500, 0.2500, 0.0000])
    """

    total: float = 1.0
    dim: int = -1

    def __post_init__(self) -> None:
        check_positive("Simplex.total", self.total)
        if isinstance(self.dim, bool) or not isinstance(self.dim, int):
            raise TypeError(f"Simplex.dim = {self.dim!r}: give an int, such as -1 for the last dimension")

    def project(self, point: Tree) -> Tree:
        """``argmin_{p >= 0, sum p = total} ||p - z||_2 = max(z - theta, 0)`` for each slice ``z``, by sorting it.

        With ``s`` the 0/1 support of the projection, the derivative is ``diag(s) - s s' / sum(s)``. A ``-inf`` entry
        projects to 0; a NaN or ``+inf`` makes its slice NaN. bf16/fp16 leaves are computed in float32.
        See :meth:`ConvexSet.project`.
        """
        self.check(point, "point")
        return tree.map(lambda leaf: _project_simplex(leaf, float(self.total), self.dim), point)

    def check(self, point: Tree, name: str) -> None:
        """See :meth:`ConvexSet.check`; each leaf must have the dimension ``dim``, and not with size 0."""
        super().check(point, name)
        for i, leaf in enumerate(tree.leaves(point)):
            if not (-leaf.ndim <= self.dim < leaf.ndim and leaf.shape[self.dim]):
                found = f"{leaf_name(name, point, i)} has shape {tuple(leaf.shape)}"
                raise ValueError(
                    f"Simplex.dim = {self.dim} needs at least one entry to sum, but {found}: reshape it (a scalar to "
                    "(1,)) or change dim"
                )

    def _gaps(self, point: Tree, projected: Tree) -> Gaps:
        differences = tree.leaves(tree.sub(point, projected))
        return [(torch.linalg.vector_norm(d, dim=self.dim), float(self.total)) for d in differences]


def _project_simplex(leaf: Tensor, total: float, dim: int) -> Tensor:
    z = leaf.to(torch.promote_types(leaf.dtype, torch.float32))
    z = z - z.detach().amax(dim, keepdim=True)  # a shift does not move the projection, and saves digits
    ordered = z.detach().sort(dim=dim, descending=True).values
    excess = ordered.cumsum(dim) - total
    rank = torch.ones_like(z).cumsum(dim)
    count = (rank * ordered > excess).sum(dim, keepdim=True).clamp(min=1)  # at least 1 also for NaN
    dropped = z.detach() <= excess.gather(dim, count - 1) / count  # false for NaN
    # The threshold again, from the support alone: its gradient needs neither the sort nor the cumsum.
    theta = (torch.where(dropped, 0.0, z).sum(dim, keepdim=True) - total) / (~dropped).sum(dim, keepdim=True)
    return torch.where(dropped, 0.0, (z - theta).clamp(min=0)).to(leaf.dtype)  # the clamp is for rounding only
