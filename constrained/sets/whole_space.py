"""No constraint."""

from dataclasses import dataclass

from constrained.sets.base import ConvexSet
from implicit.tree import Tree


@dataclass(frozen=True)
class WholeSpace(ConvexSet):
    """No constraint, ``C = R^n``."""

    def project(self, point: Tree) -> Tree:
        """``argmin_p ||p - point||_2 = point``: the point itself, not a copy; see :meth:`ConvexSet.project`."""
        self.check(point, "point")
        return point

    @property
    def is_whole_space(self) -> bool:
        """Always true."""
        return True
