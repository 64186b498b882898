"""Pytree algebra: pairing by structure, shapes, dtypes, empty trees."""

from collections import namedtuple

import pytest
import torch

from implicit import tree

Pair = namedtuple("Pair", ["left", "right"])


def nested(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    return {"w": randn(2, 3), "parts": [randn(()), (randn(4), randn(0))], "pair": Pair(randn(1), randn(2, 1))}


def flat(t):
    return torch.cat([leaf.reshape(-1) for leaf in tree.leaves(t)])


def test_algebra_agrees_with_flat_vectors() -> None:
    a, b = nested(1), nested(2)
    u, v = flat(a), flat(b)
    torch.testing.assert_close(tree.dot(a, b), u @ v)
    torch.testing.assert_close(tree.norm(a), u.norm())
    torch.testing.assert_close(tree.max_abs(a), u.abs().max())
    torch.testing.assert_close(flat(tree.add(a, b)), u + v)
    torch.testing.assert_close(flat(tree.sub(a, b)), u - v)
    torch.testing.assert_close(flat(tree.scale(-2.5, a)), -2.5 * u)
    torch.testing.assert_close(flat(tree.axpy(torch.tensor(0.5), a, b)), 0.5 * u + v)
    assert tree.size(a) == u.numel() == 14
    assert isinstance(tree.add(a, b)["pair"], Pair)


def test_dicts_pair_by_key_and_not_by_position() -> None:
    a = {"p": torch.tensor([1.0, 2.0]), "q": torch.tensor([10.0, 20.0])}
    b = {"q": torch.tensor([3.0, 4.0]), "p": torch.tensor([5.0, 6.0])}
    assert float(tree.dot(a, b)) == 1 * 5 + 2 * 6 + 10 * 3 + 20 * 4
    for result in (tree.add(a, b), tree.axpy(1.0, a, b), tree.sub(a, tree.scale(-1.0, b))):
        torch.testing.assert_close(result, {"p": torch.tensor([6.0, 8.0]), "q": torch.tensor([13.0, 24.0])})
    target = tree.clone(a)
    tree.copy_(target, b)
    torch.testing.assert_close(target["p"], b["p"])
    torch.testing.assert_close(tree.where(torch.tensor(True), b, a)["q"], b["q"])
    torch.testing.assert_close(tree.where(torch.tensor(False), b, a)["q"], a["q"])


@pytest.mark.parametrize(
    "other",
    [
        {"p": torch.ones(2)},
        {"p": torch.ones(2), "r": torch.ones(2)},
        {"p": torch.ones(2), "q": [torch.ones(2)]},
        [torch.ones(2), torch.ones(2)],
        torch.ones(2),
    ],
)
def test_different_structures_are_refused(other) -> None:
    with pytest.raises(ValueError, match="different structures"):
        tree.dot({"p": torch.ones(2), "q": torch.ones(2)}, other)


def test_ravel_round_trip_with_leading_axes() -> None:
    a = nested(3)
    vector = tree.ravel(a)
    assert vector.shape == (14,)
    torch.testing.assert_close(tree.unravel(vector, a), a)
    rows = torch.arange(42.0).reshape(3, 14)
    batch = tree.unravel(rows, a)
    assert batch["w"].shape == (3, 2, 3)
    assert batch["parts"][0].shape == (3,)
    assert batch["parts"][1][1].shape == (3, 0)
    torch.testing.assert_close(tree.ravel_batch(batch), rows)


@pytest.mark.parametrize("shape", [(3, 0), (3,), (3, 2, 2), (0, 4)])
def test_ravel_batch_of_one_tensor(shape) -> None:
    leaf = torch.ones(shape)
    expected = (shape[0], leaf[0].numel() if shape[0] else 4)
    assert tree.ravel_batch(leaf).shape == expected
    assert tree.ravel_batch([leaf, leaf]).shape == (expected[0], 2 * expected[1])


def test_ravel_of_one_tensor_is_a_view_and_mixed_dtypes_are_refused() -> None:
    leaf = torch.zeros(2, 2)
    tree.ravel(leaf)[3] = 7.0
    assert float(leaf[1, 1]) == 7.0
    mixed = {"a": torch.zeros(2), "b": torch.zeros(2, dtype=torch.float32)}
    with pytest.raises(ValueError, match=r"mixes dtypes .*\['a'\]: torch.float64.*\['b'\]: torch.float32.*convert"):
        tree.ravel(mixed)
    with pytest.raises(ValueError, match="mixes dtypes"):
        tree.ravel_batch(mixed)


def test_empty_trees() -> None:
    for empty in ({}, [], ()):
        assert tree.size(empty) == 0
        assert float(tree.norm(empty)) == float(tree.dot(empty, empty)) == float(tree.max_abs(empty)) == 0.0
        assert tree.add(empty, empty) == tree.sub(empty, empty) == tree.scale(2.0, empty) == empty
        assert tree.ravel(empty).shape == (0,)
        assert bool(tree.all_finite(empty))
        tree.copy_(empty, empty)
        assert tree.unravel(torch.zeros(0), empty) == empty
    assert float(tree.norm([torch.zeros(0)])) == 0.0
    assert float(tree.max_abs([torch.zeros(0)])) == 0.0


def test_scalars_of_another_dtype_do_not_promote() -> None:
    alpha = torch.tensor(0.5, dtype=torch.float64)
    for shape in ((), (3,)):
        leaf = torch.ones(shape, dtype=torch.float32)
        assert tree.scale(alpha, leaf).dtype == torch.float32
        assert tree.axpy(alpha, leaf, leaf).dtype == torch.float32


def test_half_precision_accumulates_in_float32() -> None:
    ones = torch.ones(10_000, dtype=torch.bfloat16)
    assert float(tree.dot(ones, ones)) == 10_000.0
    assert float(tree.norm({"a": ones, "b": ones})) == pytest.approx(20_000.0**0.5, rel=1e-6)


def test_finite_flags_see_overflowing_sums_and_ignore_the_branch_not_taken() -> None:
    assert bool(tree.all_finite([torch.full((3,), 1e308)]))
    for bad in (float("nan"), float("inf"), -float("inf")):
        assert not bool(tree.all_finite({"a": torch.ones(2)}, [torch.ones(1), torch.tensor([0.0, bad])]))
        kept = tree.where(torch.tensor(False), torch.tensor([bad]), torch.tensor([1.0]))
        assert float(kept) == 1.0
    assert torch.isnan(tree.max_abs(torch.tensor([1.0, float("nan")])))


def test_copies_own_their_memory_and_variables_share_it() -> None:
    a = {"a": torch.ones(2, requires_grad=True)}
    copy = tree.clone(a)
    assert not copy["a"].requires_grad
    assert copy["a"].data_ptr() != a["a"].data_ptr()
    leaf = tree.variables(a)["a"]
    assert leaf.is_leaf
    assert leaf.requires_grad
    assert leaf.data_ptr() == a["a"].data_ptr()
    tree.copy_(a, {"a": torch.full((2,), 3.0)})
    assert leaf.tolist() == [3.0, 3.0]


def test_random_trees_follow_the_generator(generator) -> None:
    like = {"a": torch.zeros(3), "b": torch.zeros(2, 2, dtype=torch.float32)}
    before = torch.random.get_rng_state()
    first = tree.randn_like(like, generator)
    second = tree.randn_like(like, generator)
    again = tree.randn_like(like, torch.Generator().manual_seed(0))
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(first["a"], again["a"])
    assert torch.equal(first["b"], again["b"])
    assert first["b"].dtype == torch.float32
    assert not torch.equal(first["a"], second["a"])


def test_paths_and_descriptions_name_every_leaf() -> None:
    a = {"w": torch.zeros(2, 3), "b": [torch.zeros((), dtype=torch.float32)]}
    assert dict(zip(tree.paths(a), [leaf.ndim for leaf in tree.leaves(a)], strict=True)) == {"['w']": 2, "['b'][0]": 0}
    text = tree.describe(a)
    assert "['w'] (2, 3) torch.float64" in text
    assert "['b'][0] () torch.float32" in text
    assert tree.describe(torch.zeros(2)) == "tensor (2,) torch.float64"
    assert "3" in tree.describe({"k": 3})
    assert tree.common_dtype({}) == torch.get_default_dtype()
