"""Fisher information matrices of probabilistic models: exact, sampled and empirical.

Sources: Amari 1998 (natural gradient); Martens 2020 (equality with Gauss-Newton for exponential families, section 9);
Kunstner, Balles and Hennig 2019 (what the empirical one is not); Liu et al. 2023 (Sophia, the Gauss-Newton-Bartlett
estimator of the diagonal).
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from implicit import tree
from implicit.operators.base import LinearOperator
from implicit.operators.jacobian import Jacobian, Order
from implicit.tree import Tree

Likelihood = Literal["categorical", "bernoulli", "gaussian"]
Kind = Literal["exact", "sampled", "empirical"]


class Fisher(LinearOperator):
    """The Fisher information of :math:`p(t \\mid z)` at the outputs z = m(y), averaged over the observations.

    .. math:: F = \\sum_i w_i\\, J_i^T \\, \\mathbb E_t\\bigl[s_i s_i^T\\bigr]\\, J_i, \\qquad
              s_i = \\nabla_z \\log p(t \\mid z_i),

    with :math:`J_i` the Jacobian of the i-th observation's outputs. What replaces the expectation is the ``kind``:

    - ``"exact"``: the expectation over labels drawn from the model, in closed form. Equals :class:`GaussNewton` of the
      mean negative log-likelihood.
    - ``"sampled"``: the mean over ``samples`` labels per observation drawn from the model, once and for all: unbiased
      for the exact one, of rank at most samples times observations.
    - ``"empirical"``: the labels are the data's: the second moment of the per-observation gradients. At a misfit it
      is not an estimate of the curvature, and it vanishes where the data are fitted; use it as a preconditioner.

    The scores live in the space of the outputs, so that no kind stores per-observation gradients: a product is one
    with J, one cheap contraction, and one with :math:`J^T`.

    Args:
        model: maps y to outputs of shape ``(..., width)``: the last axis belongs to one observation, all others count
            observations.
        y: where.
        likelihood: of the labels given the outputs. ``"categorical"``: outputs are logits, labels integers of shape
            ``(...)``; ``"bernoulli"``: logits of independent labels 0 or 1, shape ``(..., width)``; ``"gaussian"``:
            means of independent labels of unit variance.
        kind: see above.
        targets: the data's labels, for the empirical kind only.
        samples: labels per observation, for the sampled kind only.
        generator: for these labels; a generator seeded with 0 by default.
        weights: w, shape ``(...)``, nonnegative; one over the number of observations by default. Zeros leave out
            padding.
        order, block_bytes: how products with J are computed, see :class:`Jacobian`.
        positive_definite: a declaration that solvers rely on.

    Attributes:
        outputs: ``model(y)``, detached.
        jacobian: J.

    Raises:
        ValueError: for an unknown name, outputs of less than two axes, or targets and weights that do not fit.

    Example:
        >>> import torch, implicit
        >>> x = torch.tensor([[1.0, 0.0], [1.0, 2.0]])
        >>> F = implicit.Fisher(lambda w: x @ w[:, None], torch.zeros(2), likelihood="bernoulli")
        >>> F @ torch.tensor([1.0, 1.0])  # logistic regression: X^T diag(p (1 - p)) X / 2
        tensor([0.5000, 0.7500])
    """

    symmetric = True

    def __init__(
        self,
        model: Callable[[Tree], Tensor],
        y: Tree,
        *,
        likelihood: Likelihood = "categorical",
        kind: Kind = "exact",
        targets: Tensor | None = None,
        samples: int = 1,
        generator: torch.Generator | None = None,
        weights: Tensor | None = None,
        order: Order = "auto",
        block_bytes: int | None = None,
        positive_definite: bool = True,
    ) -> None:
        _check_choice("likelihood", likelihood, get_args(Likelihood))
        _check_choice("kind", kind, get_args(Kind))
        if (targets is not None) != (kind == "empirical"):
            raise ValueError(f'targets are for kind="empirical", and needed there; got kind={kind!r}')
        self.likelihood, self.kind = likelihood, kind
        self.jacobian = Jacobian(model, y, order=order, block_bytes=block_bytes)
        self.outputs = _check_outputs(self.jacobian.value)
        self.positive_definite = positive_definite
        super().__init__(y)
        self._weights = _check_weights(weights, self.outputs)
        self._generator = generator or torch.Generator().manual_seed(0)
        self._scores: Tensor | None = None  # (samples, ..., width)
        if kind == "empirical":
            assert targets is not None
            self._scores = _score(likelihood, self.outputs, _check_targets(likelihood, targets, self.outputs))[None]
        elif kind == "sampled":
            self._scores = self._draw(samples)

    def _draw(self, samples: int) -> Tensor:
        if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
            raise ValueError(f"samples must be a positive integer, got {samples!r}")
        drawn = [_sample(self.likelihood, self.outputs, self._generator) for _ in range(samples)]
        return torch.stack([_score(self.likelihood, self.outputs, labels) for labels in drawn])

    def mv(self, v: Tree) -> Tree:
        return self.jacobian.pull(self._contract(self.jacobian.mv(v)))

    def _flat_block(self, rows: Tensor) -> Tensor:
        self.products += rows.shape[0]
        pushed = tree.unravel(self.jacobian.flat_mm(rows), self.outputs)
        return self.jacobian.T.flat_mm(self._contract(pushed).reshape(len(rows), -1))

    def _contract(self, u: Tensor) -> Tensor:
        """The block-diagonal middle factor, for u of shape ``(..., width)`` or ``(k, ..., width)``."""
        if self._scores is None:
            return self._weights * _expected(self.likelihood, self.outputs, u)
        total = torch.zeros_like(u)
        for score in self._scores:
            total = total + (score * u).sum(dim=-1, keepdim=True) * score
        return self._weights * total / len(self._scores)

    def bartlett_diagonal(self, samples: int = 1, generator: torch.Generator | None = None) -> Tree:
        """The Gauss-Newton-Bartlett estimate of the diagonal: squares of gradients under sampled labels.

        One backward pass per sample, unbiased for the diagonal of the exact Fisher matrix because scores of different
        observations are independent with mean zero; nonnegative. With equal weights 1/B it is B times the squared
        gradient of the mean loss, as in Sophia.

        Args:
            samples: backward passes to average over.
            generator: for the labels; by default the operator's own, which moves on.

        Returns:
            A tree shaped like the domain.
        """
        if generator is not None:
            self._generator = generator
        scores = self._weights.sqrt() * self._draw(samples)
        pulled = self.jacobian.T.flat_mm(scores.reshape(samples, -1))
        return tree.unravel(pulled.square().mean(dim=0), self.like)


def _expected(likelihood: str, outputs: Tensor, u: Tensor) -> Tensor:
    """``E[s s^T] u`` within every observation."""
    if likelihood == "categorical":
        p = torch.softmax(outputs, dim=-1)
        return p * (u - (p * u).sum(dim=-1, keepdim=True))
    if likelihood == "bernoulli":
        p = torch.sigmoid(outputs)
        return p * (1.0 - p) * u
    return u


def _score(likelihood: str, outputs: Tensor, labels: Tensor) -> Tensor:
    """The gradient of the log-likelihood in the outputs."""
    if likelihood == "categorical":
        return one_hot(labels, outputs.shape[-1]).to(outputs.dtype) - torch.softmax(outputs, dim=-1)
    if likelihood == "bernoulli":
        return labels.to(outputs.dtype) - torch.sigmoid(outputs)
    return labels.to(outputs.dtype) - outputs


def _sample(likelihood: str, outputs: Tensor, generator: torch.Generator) -> Tensor:
    """Labels from the model, drawn on the generator's device."""
    if likelihood == "categorical":
        p = torch.softmax(outputs, dim=-1).reshape(-1, outputs.shape[-1]).to(generator.device)
        drawn = torch.multinomial(p, 1, generator=generator).reshape(outputs.shape[:-1])
    elif likelihood == "bernoulli":
        uniform = torch.rand(outputs.shape, generator=generator, dtype=outputs.dtype, device=generator.device)
        drawn = uniform < torch.sigmoid(outputs).to(generator.device)
    else:
        return outputs + tree.randn_like(outputs, generator)
    return drawn.to(outputs.device)


def _check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def _check_outputs(outputs: Tree) -> Tensor:
    if not isinstance(outputs, Tensor) or outputs.ndim < 2:
        raise ValueError(
            f"the model must return one tensor of shape (..., width), got {tree.describe(outputs)}; give scalar "
            "outputs a last axis with unsqueeze(-1)"
        )
    return outputs


def _check_weights(weights: Tensor | None, outputs: Tensor) -> Tensor:
    shape = outputs.shape[:-1]
    if weights is None:
        return outputs.new_full((*shape, 1), 1.0 / max(shape.numel(), 1))
    if weights.shape != shape or not bool((weights >= 0).all()):
        raise ValueError(f"weights must be nonnegative and of shape {tuple(shape)}, got {tuple(weights.shape)}")
    return weights.detach().to(dtype=outputs.dtype, device=outputs.device)[..., None]


def _check_targets(likelihood: str, targets: Tensor, outputs: Tensor) -> Tensor:
    shape = outputs.shape[:-1] if likelihood == "categorical" else outputs.shape
    if targets.shape != shape or (likelihood == "categorical" and targets.is_floating_point()):
        wanted = "integers " if likelihood == "categorical" else ""
        raise ValueError(f"targets must be {wanted}of shape {tuple(shape)}, got {tuple(targets.shape)} {targets.dtype}")
    return targets.detach()
