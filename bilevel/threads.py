"""How many threads a command uses."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from implicit import tree
from implicit.tree import Tree

SMALL = 4096
"""Lower variables below which a second thread costs more than it brings: on a shared machine threads that wait for each
other at every tiny operation have slowed the main job more than tenfold."""


@contextmanager
def chosen_threads(y: Tree, asked: int | None) -> Iterator[int]:
    """Run with ``asked`` threads; None takes one for small lower levels, else what torch or OMP_NUM_THREADS says.

    The rule depends on the problem alone, so that a resumed run sums in the same order. Restores the number afterwards.
    """
    before = torch.get_num_threads()
    if asked is not None:
        torch.set_num_threads(asked)
    elif "OMP_NUM_THREADS" not in os.environ and tree.size(y) < SMALL:
        torch.set_num_threads(1)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
