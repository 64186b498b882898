"""Algebra on pytrees of tensors; the only importer of ``torch.utils._pytree``.

A pytree is a tensor or any nesting of dicts, lists, tuples, namedtuples and registered classes with tensors at the
leaves. Two trees are always paired by structure (dicts by key), never by position: ``{"a": .., "b": ..}`` and
``{"b": .., "a": ..}`` are the same tree.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils._pytree as _pytree
from torch import Tensor

# The stubs do not export these, optimizers in torch itself are built on them.
_foreach_add, _foreach_sub = torch._foreach_add, torch._foreach_sub  # pyright: ignore[reportPrivateImportUsage]
_foreach_norm, _foreach_copy_ = torch._foreach_norm, torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]

Tree = Any
"""A tensor or a nesting of containers with tensors at the leaves."""
Structure = _pytree.TreeSpec


def leaves(tree: Tree) -> list[Tensor]:
    """The leaves of ``tree``, in the order of its own structure."""
    return _pytree.tree_leaves(tree)


def structure(tree: Tree) -> Structure:
    """The structure of ``tree`` without its leaves."""
    return _pytree.tree_structure(tree)


def flatten(tree: Tree) -> tuple[list[Tensor], Structure]:
    """Leaves and structure; ``unflatten(*flatten(tree))`` gives ``tree`` back."""
    return _pytree.tree_flatten(tree)


def unflatten(values: Sequence[Any], spec: Structure) -> Tree:
    """The tree with structure ``spec`` and the given leaves."""
    return _pytree.tree_unflatten(list(values), spec)


def paths(tree: Tree) -> list[str]:
    """A readable name of every leaf, such as ``['encoder'][0]``; the empty string where the tree is one tensor."""
    pairs, _ = _pytree.tree_flatten_with_path(tree)
    return [_pytree.keystr(path) for path, _ in pairs]


def aligned_leaves(tree: Tree, spec: Structure) -> list[Tensor]:
    """Leaves of ``tree`` in the order of ``spec``, dicts matched by key.

    Raises:
        ValueError: if the two structures differ.
    """
    try:
        found = spec.flatten_up_to(tree)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"the trees have different structures: expected {spec}, got {structure(tree)}") from error
    for leaf in found:
        if not isinstance(leaf, Tensor) and not structure(leaf).is_leaf():
            raise ValueError(f"the trees have different structures: expected {spec}, got {structure(tree)}")
    return found


def map(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """``fn`` applied leaf by leaf; ``rest`` is aligned with the structure of ``tree``."""
    own, spec = flatten(tree)
    others = [aligned_leaves(other, spec) for other in rest]
    return unflatten([fn(*group) for group in zip(own, *others, strict=True)], spec)


def _accumulating(values: Sequence[Tensor]) -> list[Tensor]:
    """Half-precision leaves in float32: reductions in bf16 lose everything after 8 bits."""
    return [v.float() if v.dtype in (torch.bfloat16, torch.float16) else v for v in values]


def _total(parts: Sequence[Tensor]) -> Tensor:
    if not parts:
        return torch.zeros(())
    first = parts[0]
    return torch.stack([p.to(device=first.device) for p in parts]).sum() if len(parts) > 1 else first


def dot(a: Tree, b: Tree) -> Tensor:
    """Euclidean inner product over all leaves, a 0-d tensor; bf16/fp16 leaves accumulate in float32."""
    own, spec = flatten(a)
    left, right = _accumulating(own), _accumulating(aligned_leaves(b, spec))
    return _total([torch.dot(u.reshape(-1), v.reshape(-1)) for u, v in zip(left, right, strict=True)])


def norm(tree: Tree) -> Tensor:
    """Euclidean norm over all leaves, a 0-d tensor."""
    values = _accumulating(leaves(tree))
    if not values:
        return torch.zeros(())
    if len(values) == 1:
        return torch.linalg.vector_norm(values[0])
    return torch.linalg.vector_norm(torch.stack([n.to(values[0].device) for n in _foreach_norm(values)]))


def max_abs(tree: Tree) -> Tensor:
    """Largest absolute entry over all leaves, a 0-d tensor; zero for an empty tree."""
    parts = [leaf.abs().amax() for leaf in leaves(tree) if leaf.numel()]
    if not parts:
        return torch.zeros(())
    return torch.stack([p.to(parts[0].device) for p in parts]).amax()


def size(tree: Tree) -> int:
    """Number of scalars in all leaves together."""
    return sum(leaf.numel() for leaf in leaves(tree))


def add(a: Tree, b: Tree) -> Tree:
    """``a + b``."""
    own, spec = flatten(a)
    return unflatten(_foreach_add(own, aligned_leaves(b, spec)), spec) if own else a


def sub(a: Tree, b: Tree) -> Tree:
    """``a - b``."""
    own, spec = flatten(a)
    return unflatten(_foreach_sub(own, aligned_leaves(b, spec)), spec) if own else a


def scale(alpha: float | Tensor, tree: Tree) -> Tree:
    """``alpha * tree``; ``alpha`` may be a 0-d tensor."""
    return map(lambda leaf: (leaf * _as(alpha, leaf)).to(leaf.dtype), tree)


def axpy(alpha: float | Tensor, x: Tree, y: Tree) -> Tree:
    """``alpha * x + y``; ``alpha`` may be a 0-d tensor."""
    return map(lambda u, v: (u * _as(alpha, u)).to(u.dtype) + v, x, y)


def _as(alpha: float | Tensor, leaf: Tensor) -> float | Tensor:
    # A 0-d float64 step times a bf16 leaf keeps bf16 unless the leaf is 0-d too; across devices it must move.
    return alpha.to(leaf.device) if isinstance(alpha, Tensor) and alpha.device != leaf.device else alpha


def zeros_like(tree: Tree) -> Tree:
    """Zeros with the shapes, dtypes and devices of ``tree``."""
    return map(torch.zeros_like, tree)


def randn_like(tree: Tree, generator: torch.Generator | None = None) -> Tree:
    """Standard normal entries with the shapes, dtypes and devices of ``tree``.

    Drawn on the generator's device and moved, so one CPU generator serves leaves anywhere.
    """
    device = generator.device if generator is not None else None

    def draw(leaf: Tensor) -> Tensor:
        return torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype, device=device or leaf.device).to(
            leaf.device
        )

    return map(draw, tree)


def clone(tree: Tree) -> Tree:
    """Detached copies that own their memory."""
    return map(lambda leaf: leaf.detach().clone(), tree)


def detach(tree: Tree) -> Tree:
    """The same memory without a graph."""
    return map(lambda leaf: leaf.detach(), tree)


def variables(tree: Tree) -> Tree:
    """Detached views that require gradients: differentiation leaves on the memory of ``tree``."""
    return map(lambda leaf: leaf.detach().requires_grad_(), tree)


def copy_(target: Tree, source: Tree) -> None:
    """Write ``source`` into the memory of ``target``."""
    own, spec = flatten(target)
    if own:
        with torch.no_grad():
            _foreach_copy_(own, aligned_leaves(source, spec))


def where(flag: Tensor, new: Tree, old: Tree) -> Tree:
    """``new`` where the 0-d ``flag`` is true, else ``old``; NaN in the branch not taken does not leak."""
    return map(lambda n, o: torch.where(flag.to(n.device), n, o), new, old)


def all_finite(*trees: Tree) -> Tensor:
    """A 0-d bool tensor: no NaN and no infinity in any leaf. No host synchronisation."""
    values = [leaf for t in trees for leaf in leaves(t) if leaf.numel()]
    if not values:
        return torch.ones((), dtype=torch.bool)
    # The sum of a finite leaf can overflow, so look at extremes of the entries: one reduction per leaf.
    flags = [torch.isfinite(v).all() for v in values]
    return torch.stack([f.to(flags[0].device) for f in flags]).all() if len(flags) > 1 else flags[0]


def common_dtype(tree: Tree, name: str = "tree") -> torch.dtype:
    """The one dtype of all leaves.

    Raises:
        ValueError: if the leaves have several dtypes; joining them would promote silently.
    """
    found = {leaf.dtype for leaf in leaves(tree)}
    if len(found) > 1:
        listing = ", ".join(f"{p or name}: {leaf.dtype}" for p, leaf in zip(paths(tree), leaves(tree), strict=True))
        raise ValueError(f"{name} mixes dtypes ({listing}); convert all of its leaves to one dtype")
    return found.pop() if found else torch.get_default_dtype()


def ravel(tree: Tree) -> Tensor:
    """All leaves as one vector, shape ``(n,)``; a view where the tree is one contiguous tensor.

    Raises:
        ValueError: if the leaves mix dtypes.
    """
    common_dtype(tree)
    values = leaves(tree)
    if len(values) == 1:
        return values[0].reshape(-1)
    return torch.cat([v.reshape(-1) for v in values]) if values else torch.zeros(0)


def unravel(vector: Tensor, like: Tree) -> Tree:
    """The inverse of :func:`ravel` with the structure and shapes of ``like``; leading axes of ``vector`` are kept.

    Args:
        vector: shape ``(..., n)``.
        like: a tree with ``n`` scalars.

    Returns:
        A tree with leaves of shape ``(..., *leaf.shape)``.
    """
    own, spec = flatten(like)
    lead = vector.shape[:-1]
    parts = torch.split(vector, [leaf.numel() for leaf in own], dim=-1) if own else ()
    return unflatten([p.reshape((*lead, *leaf.shape)) for p, leaf in zip(parts, own, strict=True)], spec)


def ravel_batch(tree: Tree) -> Tensor:
    """Leaves of shape ``(k, ...)`` as one matrix ``(k, n)``, row i being the ravelled i-th tree."""
    common_dtype(tree)
    rows = [v.reshape(v.shape[0], math.prod(v.shape[1:])) for v in leaves(tree)]
    return torch.cat(rows, dim=1) if len(rows) > 1 else rows[0]


def describe(tree: Tree) -> str:
    """A short text of shapes and dtypes for error messages."""
    names, values = paths(tree), leaves(tree)
    return ", ".join(
        f"{name or 'tensor'} {tuple(v.shape)} {v.dtype}" if isinstance(v, Tensor) else f"{name or 'value'} {v!r}"
        for name, v in zip(names, values, strict=True)
    )
