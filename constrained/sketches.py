"""Random sketches: the few combinations of a system's rows that one step of sketch-and-project solves exactly."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sketch(ABC):
    """Draws the random matrices S of shape ``(m, s)`` that combine the m rows of a system into s (Gower and Richtarik
    2015); :class:`SketchAndProject` projects its iterate on the solutions of ``S^T A z = S^T b``.

    A subclass is a frozen dataclass with :meth:`width` and :meth:`draw`. All randomness comes from the generator that
    is passed in, so that a run repeats itself and resumes.
    """

    @property
    def needs_squares(self) -> bool:
        """Whether :meth:`draw` asks for the squared norms of the rows."""
        return False

    @abstractmethod
    def width(self, rows: int) -> int:
        """s, the number of columns for a system of m rows."""

    @abstractmethod
    def draw(self, steps: int, like: Tensor, generator: torch.Generator) -> Tensor:
        """The transposes of S for several steps, drawn on the device of ``generator``.

        Args:
            steps: how many.
            like: a vector of shape ``(m,)`` in the dtype of the system: the squared norms of its rows where
                ``needs_squares`` is set, otherwise of no meaning.
            generator: moves on.

        Returns:
            Numbers of shape ``(steps, s, m)``; or integers of shape ``(steps, s)``, the indices of rows, where the
            columns of S are those of the identity.
        """


@dataclass(frozen=True, kw_only=True)
class Kaczmarz(Sketch):
    """One row of the system per step, ``S = e_i`` (randomized Kaczmarz; Strohmer and Vershynin 2009).

    With ``weighted`` rows are drawn with probability ``||a_i||^2 / ||A||_F^2``, and

    .. math:: E\\|z_t - z^*\\|^2 \\le (1 - \\sigma_{min}(A)^2 / \\|A\\|_F^2)^t \\|z_0 - z^*\\|^2.

    Args:
        weighted: False draws all rows alike, as the code released with AdaSketch-Newton does; the rate is then that of
            the matrix with its rows divided by their norms.

    Example:
        >>> import torch, constrained
        >>> drawn = constrained.Kaczmarz().draw(5, torch.tensor([0.0, 1.0]), torch.Generator().manual_seed(0))
        >>> drawn.flatten()
        tensor([1, 1, 1, 1, 1])
    """

    weighted: bool = True

    @property
    def needs_squares(self) -> bool:
        """Whether the rows are weighted."""
        return self.weighted

    def width(self, rows: int) -> int:
        """One."""
        return 1

    def draw(self, steps: int, like: Tensor, generator: torch.Generator) -> Tensor:
        """Indices of rows, with replacement."""
        device = generator.device
        if not self.weighted:
            return torch.randint(len(like), (steps, 1), generator=generator, device=device)
        weights = like.to(device)
        weights = torch.where(weights.sum() > 0, weights, 1.0)  # a zero matrix has no row to prefer
        return torch.multinomial(weights, steps, replacement=True, generator=generator)[:, None]


@dataclass(frozen=True, kw_only=True)
class GaussianVector(Sketch):
    """One random combination of all rows per step, ``S ~ N(0, I)``; the rate is of the order of Kaczmarz's.

    The error along a right singular vector of A with singular value ``sigma_i`` shrinks in the mean square by the share
    ``E[sigma_i^2 x_i^2 / sum_j sigma_j^2 x_j^2]`` for normal x, which is near ``sigma_i^2 / ||A||_F^2``.
    """

    def width(self, rows: int) -> int:
        """One."""
        return 1

    def draw(self, steps: int, like: Tensor, generator: torch.Generator) -> Tensor:
        """Standard normal numbers."""
        return _normal(steps, 1, like, generator)


@dataclass(frozen=True, kw_only=True)
class BlockGaussian(Sketch):
    """s random combinations of all rows per step, ``S`` with independent normal entries.

    From s = m on, one step solves the system. A step costs s products and s^2 n flops. The rate is that of a single
    vector on a matrix whose large singular values, about s of them, have been taken away.

    Args:
        size: s; None means half of the rows, rounded up.

    Raises:
        ValueError: if ``size`` is no positive integer.
    """

    size: int | None = None

    def __post_init__(self) -> None:
        _check_size(self.size)

    def width(self, rows: int) -> int:
        """``size``."""
        return (rows + 1) // 2 if self.size is None else self.size

    def draw(self, steps: int, like: Tensor, generator: torch.Generator) -> Tensor:
        """Standard normal numbers."""
        return _normal(steps, self.width(len(like)), like, generator)


@dataclass(frozen=True, kw_only=True)
class BlockKaczmarz(Sketch):
    """s different rows of the system per step, all sets alike (Needell and Tropp 2014); from s = m on it is solved.

    Args:
        size: s, at most m of which are used; None means half of the rows, rounded up.

    Raises:
        ValueError: if ``size`` is no positive integer.
    """

    size: int | None = None

    def __post_init__(self) -> None:
        _check_size(self.size)

    def width(self, rows: int) -> int:
        """``size``, or m if that is smaller."""
        return (rows + 1) // 2 if self.size is None else min(self.size, rows)

    def draw(self, steps: int, like: Tensor, generator: torch.Generator) -> Tensor:
        """Indices of rows, without replacement within a step."""
        keys = torch.rand(steps, len(like), generator=generator, device=generator.device, dtype=torch.float64)
        return keys.topk(self.width(len(like)), dim=1).indices


def _normal(steps: int, width: int, like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(steps, width, len(like), generator=generator, device=generator.device, dtype=like.dtype)


def _check_size(size: object) -> None:
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
        raise ValueError(f"size must be None or a positive integer, got {size!r}")
