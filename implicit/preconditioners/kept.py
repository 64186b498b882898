"""A preconditioner of an earlier point, kept until it no longer serves."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from implicit.linear_solvers.base import Apply, Preconditioner, check_positive_int
from implicit.operators import LinearOperator
from implicit.preconditioners.base import Keepable, Tensors
from implicit.preconditioners.factorization import Factorization


class KeptState:
    """What a kept preconditioner remembers; belongs to one run and saves with it (``state_dict``).

    Attributes:
        prepared: the preconditioner as tensors, or None before the first system.
        size: dimension of the operator it was built for.
        applications: how often it was applied to the latest system, once per iteration of CG.
        builds: how often it was built.
    """

    def __init__(self) -> None:
        self.prepared: Tensors | None = None
        self.size = 0
        self.applications = 0
        self.builds = 0

    def state_dict(self) -> dict[str, Any]:
        """Plain data that ``torch.load(weights_only=True)`` accepts."""
        kept = None if self.prepared is None else {k: v.detach().clone() for k, v in self.prepared.items()}
        return {"prepared": kept, "size": self.size, "applications": self.applications, "builds": self.builds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        kept = state_dict["prepared"]
        self.prepared = None if kept is None else {k: v.clone() for k, v in kept.items()}
        self.size, self.applications, self.builds = (state_dict[k] for k in ("size", "applications", "builds"))


@dataclass(frozen=True, kw_only=True)
class Kept(Preconditioner):
    """A preconditioner built at one point and used at the next ones, until a system needs too many iterations.

    The rule: where the latest system applied it more than ``max_applications`` times, the next system starts with a
    new one. An outdated preconditioner costs iterations and never accuracy: solvers measure the true residual.

    A frozen object cannot remember. :meth:`hold` binds it to a :class:`KeptState`; an algorithm keeps that state among
    its own, so that a resumed run repeats itself::

        state.kept = KeptState()                                             # in init
        solver = replace(cg, preconditioner=cg.preconditioner.hold(state.kept))  # in every step

    Used without ``hold``, every system builds its own.

    Args:
        preconditioner: what is kept; the Cholesky factorization by default.
        max_applications: iterations of one system after which it is built anew for the next.

    Example:
        >>> import torch, implicit
        >>> state = implicit.KeptState()
        >>> cg = implicit.CG(rtol=1e-5, preconditioner=implicit.Kept(max_applications=10).hold(state))
        >>> for drift in (0.0, 0.01, 0.02):
        ...     A = implicit.Dense(torch.diag(torch.tensor([1.0, 10.0, 100.0]) + drift))
        ...     assert cg.solve(A, torch.ones(3)).success
        >>> state.builds
        1
    """

    preconditioner: Keepable = field(default_factory=Factorization)
    max_applications: int = 20

    def __post_init__(self) -> None:
        if not isinstance(self.preconditioner, Keepable):
            found = type(self.preconditioner).__name__
            raise TypeError(f"preconditioner must be Factorization(), Nystrom() or another Keepable, got {found}")
        check_positive_int(self.max_applications, "max_applications")

    def init(self, operator: LinearOperator) -> Apply:
        """Built at this operator: without a state there is nothing to keep."""
        return self.preconditioner.init(operator)

    def hold(self, state: KeptState) -> "Held":
        """This preconditioner with a memory."""
        return Held(self, state)


class Held(Preconditioner):
    """A :class:`Kept` preconditioner bound to the state that remembers; one system at a time."""

    def __init__(self, kept: Kept, state: KeptState) -> None:
        self.kept = kept
        self.state = state

    def init(self, operator: LinearOperator) -> Apply:
        """The kept one, or a new one where the latest system needed too many iterations of it.

        Raises:
            ValueError: if the state belongs to an operator of another size.
        """
        state = self.state
        if state.prepared is not None and state.size != operator.size:
            raise ValueError(
                f"the kept preconditioner is for {state.size} unknowns, this operator has {operator.size}; "
                "give each problem its own KeptState"
            )
        if state.prepared is None or state.applications > self.kept.max_applications:
            state.prepared, state.size = self.kept.preconditioner.prepare(operator), operator.size
            state.builds += 1
        state.applications = 0
        state.prepared = {k: v.to(operator.device) for k, v in state.prepared.items()}
        apply = self.kept.preconditioner.action(state.prepared)

        def counted(rows: Tensor) -> Tensor:
            state.applications += 1
            return apply(rows)

        return counted
