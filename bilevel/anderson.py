"""Anderson acceleration of a fixed-point iteration, with everything on the device.

Reference:
    D. G. Anderson, "Iterative procedures for nonlinear integral equations", J. ACM 12(4), 1965; the safeguard is that
        of J. Zhang, B. O'Donoghue, S. Boyd, "Globally convergent type-I Anderson acceleration for nonsmooth
        fixed-point iterations", SIAM J. Optim. 30(4), 2020: fall back on the plain step where it does not help.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from implicit import State

RIDGE = 1e-10
"""On the normal equations, relative to their trace: consecutive differences are nearly dependent."""

LONGEST = 16.0
CREDIT = 20.0
"""In memories: fewer points end the acceleration too early where rounding hides the merit."""
CLOSER = 0.9
"""A residual is a new smallest one from this fraction of the last on."""


@dataclass(kw_only=True)
class AndersonState(State):
    """The last points of an iteration ``s -> T(s)``.

    Attributes:
        residuals, images: ``T(s) - s`` and ``T(s)`` at the last accepted points, newest last, ``(memory + 1, d)``.
        kept: how many rows of them are in use.
        norm: ``||T(s) - s||`` at the newest.
        lowest: the smallest so far that was visibly smaller than those before.
        credit: how many points may still be accepted for their residual before there is a smaller one than that.
        merit: what the iteration descends, there.
        extrapolated: whether the point handed out last was extrapolated.
        wait: plain steps to go before the next extrapolation.
        pause: how many there will be after the next refusal.
    """

    residuals: Tensor
    images: Tensor
    kept: Tensor
    norm: Tensor
    lowest: Tensor
    credit: Tensor
    merit: Tensor
    extrapolated: Tensor
    wait: Tensor
    pause: Tensor


@dataclass(frozen=True, kw_only=True)
class Anderson:
    """Picks the next point of a fixed-point iteration from the last ones.

    The next point is ``T(s) - sum_i g_i (T(s_{i+1}) - T(s_i))`` with the g that makes the same combination of residuals
    smallest. A point where the residual or the merit is larger than at the last accepted one is refused, and the plain
    step ``T(s)`` from there taken instead; the two newest rows are kept then, as what is older misled. The residual
    alone would lead to maxima and saddle points as well, and where the merit may be wrong by more than a plain step
    lowers it, extrapolations uphill and plain steps downhill would take turns for ever: after ``20 memory`` points that
    only the residual spoke for, and no new smallest residual, the merit must have visibly fallen. Each refusal in a row
    doubles the number of plain steps before the next attempt.

    Args:
        memory: differences to combine; 0 is the plain iteration.
    """

    memory: int = 20

    def init(self, point: Tensor) -> AndersonState:
        """An empty memory for points like this one."""
        rows = point.new_zeros(self.memory + 1, len(point))
        zero = point.new_zeros(())
        return AndersonState(
            residuals=rows,
            images=rows.clone(),
            kept=zero,
            norm=zero + torch.inf,
            lowest=zero + torch.inf,
            credit=zero + CREDIT * self.memory,
            merit=zero + torch.inf,
            extrapolated=zero > 0,
            wait=zero.clone(),
            pause=zero + 1.0,
        )

    def forget(self, state: AndersonState, where: Tensor) -> None:
        """Start over, where T has changed."""
        state.kept = torch.where(where, 0.0, state.kept)
        state.norm = torch.where(where, torch.inf, state.norm)
        state.lowest = torch.where(where, torch.inf, state.lowest)
        state.merit = torch.where(where, torch.inf, state.merit)
        state.extrapolated = state.extrapolated & ~where

    def advance(
        self, state: AndersonState, point: Tensor, image: Tensor, merit: Tensor, slack: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Record ``image = T(point)``.

        Args:
            state: updated.
            point, image: ``(d,)``.
            merit: what T descends, at the point.
            slack: by how much the merit may be wrong.

        Returns:
            The next point, and whether this one was refused.
        """
        residual = image - point
        norm = torch.linalg.vector_norm(residual)
        lower = merit < state.merit - slack
        closer = (norm <= state.norm) & (merit <= state.merit + slack) & (state.credit > 0)
        refused = state.extrapolated & ~(lower | closer)
        record = ~refused & (norm <= CLOSER * state.lowest)
        climbed = state.extrapolated & ~refused & ~lower
        state.credit = torch.where(record, CREDIT * self.memory, state.credit - climbed.to(norm))
        welcome = state.extrapolated & ~refused
        fallback = state.images[-1].clone()
        state.residuals = torch.where(refused, state.residuals, torch.cat([state.residuals[1:], residual[None]]))
        state.images = torch.where(refused, state.images, torch.cat([state.images[1:], image[None]]))
        state.kept = torch.where(
            refused, torch.clamp(state.kept, max=2), torch.clamp(state.kept + 1, max=self.memory + 1)
        )
        state.norm = torch.where(refused, state.norm, norm)
        state.lowest = torch.where(record, norm, state.lowest)
        state.merit = torch.where(refused, state.merit, merit)
        state.wait = torch.where(refused, state.pause, state.wait - 1)
        state.pause = torch.where(
            refused, torch.clamp(2 * state.pause, max=LONGEST), torch.where(welcome, 1.0, state.pause)
        )
        state.extrapolated = ~refused & (state.kept >= 2) & (state.wait <= 0) & (self.memory > 0)
        state.step += 1
        return torch.where(
            refused, fallback, torch.where(state.extrapolated, self._combined(state, image), image)
        ), refused

    def _combined(self, state: AndersonState, image: Tensor) -> Tensor:
        used = torch.arange(self.memory, device=image.device) >= self.memory + 1 - state.kept
        # Rows out of use may hold anything, also what is not finite.
        changes = torch.where(used[:, None], state.residuals.diff(dim=0), 0.0)
        moves = torch.where(used[:, None], state.images.diff(dim=0), 0.0)
        normal = changes @ changes.T
        ridge = RIDGE * normal.trace() + torch.finfo(image.dtype).tiny
        normal = normal + torch.diag_embed(ridge + (~used).to(image))
        weights, _ = torch.linalg.solve_ex(normal, changes @ state.residuals[-1])
        combined = image - moves.T @ weights
        return torch.where(torch.isfinite(combined).all(), combined, image)
