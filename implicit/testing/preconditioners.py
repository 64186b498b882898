"""Conformance of preconditioners: a symmetric positive definite map of rows."""

from collections.abc import Mapping, Sequence

import torch

from implicit import tree
from implicit.linear_solvers.base import Preconditioner
from implicit.operators import LinearOperator
from implicit.testing.spaces import DTYPES, normal, spaces
from implicit.testing.systems import CountedMatrix, with_eigenvalues
from implicit.testing.verdict import Verdict, distance, name_of, shares_memory, short

ROWS = 4


def check_preconditioner(
    preconditioner: Preconditioner,
    operators: Mapping[str, LinearOperator] | None = None,
    *,
    rtol: float | None = None,
    dtypes: Sequence[torch.dtype] = DTYPES,
) -> None:
    """Whether a preconditioner is what CG assumes: a symmetric positive definite linear map of rows.

    Also where the operator itself is indefinite, singular or zero: such operators occur, and the solver reports them.
    The map must treat rows one by one, keep their dtype and shape, be the same each time it is built, and leave its
    argument and the global random generator alone.

    Args:
        preconditioner: built by ``init`` for each operator.
        operators: what to build it for, by name; by default operators of every definiteness on nested containers, tied
            leaves and one number, in each dtype. A preconditioner that belongs to one kind of operator brings its own.
        rtol: accuracy of the map, relative to its norm; None means ``eps^(3/4)`` of the dtype.
        dtypes: of the default operators.

    Raises:
        ConformanceError: with one sentence, for the first promise that is broken.
        TypeError: if ``preconditioner`` is no Preconditioner.

    Example:
        >>> import implicit
        >>> from implicit.testing import check_preconditioner
        >>> check_preconditioner(implicit.Nystrom(rank=3))
    """
    if not isinstance(preconditioner, Preconditioner):
        raise TypeError(f"preconditioner must be a Preconditioner such as Jacobi(), got {preconditioner!r}")
    tables = [_operators(dtype) for dtype in dtypes] if operators is None else [dict(operators)]
    for table in tables:
        for name, operator in table.items():
            where = f"{name}, {short(operator.dtype)}"
            _check(preconditioner, operator, rtol, Verdict(name_of(preconditioner), where))


def _operators(dtype: torch.dtype) -> dict[str, LinearOperator]:
    """Counted matrices of every definiteness."""
    own = spaces(dtype)
    found: dict[str, LinearOperator] = {}
    for name, space, values in (
        ("nested, positive definite", "nested", torch.logspace(-1, 2, 11)),
        ("tied, repeated eigenvalues", "tied", torch.tensor([2.0, 2.0, 2.0, 5.0, 5.0, 5.0])),
        ("one number", "scalar", torch.tensor([3.0])),
        ("nested, indefinite", "nested", torch.linspace(-5, 5, 11)),
        ("vector, singular", "vector", torch.tensor([0.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0])),
        ("vector, zero", "vector", torch.zeros(7)),
        ("empty", "empty", torch.zeros(0)),
    ):
        matrix = with_eigenvalues(values, 3).to(dtype)
        definite = bool((values > 0).all())
        found[name] = CountedMatrix(matrix, own[space], None, symmetric=True, positive_definite=definite)
    return found


def _check(preconditioner: Preconditioner, operator: LinearOperator, rtol: float | None, verdict: Verdict) -> None:
    eps = float(torch.finfo(operator.dtype).eps)
    tolerance = eps**0.75 if rtol is None else rtol
    point = tree.clone(operator.like)
    state = torch.get_rng_state()
    with verdict.runs("init"):
        apply, again = preconditioner.init(operator), preconditioner.init(operator)
    verdict(torch.equal(state, torch.get_rng_state()), "it draws from the global random generator; seed its own")
    verdict(distance(operator.like, point) == 0.0, "init modifies the point where the operator was taken")
    n = operator.size
    rows = normal(81, ROWS, n, dtype=operator.dtype)
    kept = rows.clone()
    with verdict.runs("applying it to rows (k, n)"):
        image = apply(rows)
        none, repeated = apply(rows[:0]), again(rows)
        single = torch.cat([apply(row[None]) for row in rows])
        mixed = apply((2.0 * rows[0] - 3.0 * rows[1])[None])
        dense = apply(torch.eye(n, dtype=operator.dtype, device=operator.device)).T
    verdict(torch.equal(rows, kept), "it modifies the rows in place; work on a copy")
    verdict(
        image.shape == rows.shape and tuple(none.shape) == (0, n),
        f"rows {tuple(rows.shape)} become {tuple(image.shape)}, no rows {tuple(none.shape)}; shapes must be kept",
    )
    verdict(image.dtype == rows.dtype, f"rows of {rows.dtype} become {image.dtype}; nothing may be cast")
    verdict(not image.requires_grad, "its rows require grad; detach what it is made of")
    verdict(not shares_memory(image, rows), "it returns the memory of its argument; clone it")
    finite = bool(torch.isfinite(dense).all())
    verdict(finite, "it is not finite; where the operator has nothing to divide by, fall back to the identity")
    gap = distance(repeated, image)
    verdict(gap == 0.0, f"built twice for one operator it differs by {gap:.3g}; seed what is random")
    size, scale = float(torch.linalg.matrix_norm(dense.double())) if n else 0.0, float(rows.norm())
    allowed = tolerance * size * scale
    verdict.close(distance(single, image), allowed, "rows alone and rows together differ", "it must map row by row")
    straight = 2.0 * image[0] - 3.0 * image[1]
    verdict.close(distance(mixed[0], straight), 5.0 * allowed, "P(2v - 3w) and 2 Pv - 3 Pw differ", "it is not linear")
    if not n:
        return
    gap = float((dense - dense.T).double().norm())
    cause = "CG needs a symmetric preconditioner; scale from both sides, D^(-1/2) M D^(-1/2)"
    verdict.close(gap, tolerance * size, "P and its transpose differ", cause)
    values = torch.linalg.eigvalsh(0.5 * (dense + dense.T).double())
    verdict(
        float(values[0]) > n * eps * float(values[-1]),
        f"its eigenvalues lie in [{float(values[0]):.3g}, {float(values[-1]):.3g}]; CG needs all of them positive, "
        "also where the operator is indefinite or singular: clamp or shift it",
    )
