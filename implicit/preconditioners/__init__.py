"""Preconditioners: cheap approximations of an inverse, one family per file."""

from implicit.preconditioners.base import Keepable as Keepable
from implicit.preconditioners.factorization import Factorization as Factorization
from implicit.preconditioners.jacobi import Jacobi as Jacobi
from implicit.preconditioners.kept import Held as Held
from implicit.preconditioners.kept import Kept as Kept
from implicit.preconditioners.kept import KeptState as KeptState
from implicit.preconditioners.nystrom import Nystrom as Nystrom

__all__ = ["Factorization", "Held", "Jacobi", "Keepable", "Kept", "KeptState", "Nystrom"]
