"""States as plain data: what is saved comes back, in place, or is refused."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from implicit import State, tree


@dataclass(kw_only=True)
class Inner(State):
    scale: torch.Tensor = field(default_factory=lambda: torch.tensor(0.0))


@dataclass(kw_only=True)
class Everything(State):
    x: Any = field(default_factory=lambda: {"a": torch.zeros(2), "b": [torch.zeros(()), torch.zeros(0)]})
    number: float = 0.0
    name: str = ""
    counts: dict = field(default_factory=dict)
    recent: list = field(default_factory=list)
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))
    inner: Inner = field(default_factory=Inner)
    optional: Any = None
    optimizer: Any = None


def filled() -> Everything:
    state = Everything()
    state.step = 7
    state.x = {"a": torch.tensor([1.0, 2.0]), "b": [torch.tensor(3.0), torch.zeros(0)]}
    state.number, state.name = 1e-300, "text"
    state.counts, state.recent = {"upper": 3, "lower": 4}, [0.1, -float("inf"), 2]
    torch.rand(5, generator=state.generator)
    state.inner.scale = torch.tensor(0.25)
    state.inner.finite = torch.tensor(False)
    return state


def round_trip(state: State, tmp_path) -> dict:
    torch.save(state.state_dict(), tmp_path / "state.pt")
    return torch.load(tmp_path / "state.pt", weights_only=True)


def test_every_kind_of_field_survives_a_weights_only_file(tmp_path) -> None:
    source, target = filled(), Everything()
    target.load_state_dict(round_trip(source, tmp_path))
    torch.testing.assert_close(target.x, source.x)
    assert (target.step, target.number, target.name) == (7, 1e-300, "text")
    assert (target.counts, target.recent) == (source.counts, source.recent)
    assert float(target.inner.scale) == 0.25
    assert not bool(target.inner.finite)
    assert bool(target.finite)
    assert target.optional is None
    assert torch.equal(torch.rand(3, generator=target.generator), torch.rand(3, generator=source.generator))


def test_saved_data_are_independent_of_the_live_state() -> None:
    source = filled()
    saved = source.state_dict()
    source.x["a"].add_(100.0)
    source.inner.scale.add_(100.0)
    source.counts["upper"] = 99
    target = Everything()
    target.load_state_dict(saved)
    assert target.x["a"].tolist() == [1.0, 2.0]
    assert float(target.inner.scale) == 0.25
    assert target.counts["upper"] == 3
    target.x["a"].add_(1.0)
    target.counts["upper"] = 5
    target.recent.append(1.0)
    again = Everything()
    again.load_state_dict(saved)
    assert (again.x["a"].tolist(), again.counts["upper"], len(again.recent)) == ([1.0, 2.0], 3, 3)


def test_an_optimizer_still_moves_the_restored_point(tmp_path) -> None:
    def begin() -> Everything:
        state = Everything()
        state.optimizer = torch.optim.Adam(tree.leaves(state.x), lr=0.1)
        return state

    def advance(state: Everything, steps: int) -> None:
        for _ in range(steps):
            for leaf in tree.leaves(state.x):
                leaf.grad = torch.cos(leaf)
            state.optimizer.step()

    straight, first, second = begin(), begin(), begin()
    advance(straight, 6)
    advance(first, 3)
    second.load_state_dict(round_trip(first, tmp_path))
    advance(second, 3)
    assert torch.equal(second.x["a"], straight.x["a"])
    assert not torch.equal(second.x["a"], first.x["a"])


def test_fields_that_share_memory_get_their_own_values() -> None:
    target = Everything()
    shared = torch.zeros(())
    target.inner.scale = shared
    target.x = {"a": torch.zeros(2), "b": [shared, torch.zeros(0)]}
    target.load_state_dict(filled().state_dict())
    assert float(target.x["b"][0]) == 3.0
    assert float(target.inner.scale) == 0.25


def test_missing_fields_and_other_shapes_are_named() -> None:
    saved = filled().state_dict()
    del saved["number"]
    with pytest.raises(ValueError, match="no field 'number' of Everything"):
        Everything().load_state_dict(saved)
    saved = filled().state_dict()
    saved["x"][0] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"field 'x' .*holds \[\(3,\).*this problem has \['a'\] \(2,\)"):
        Everything().load_state_dict(saved)
    saved = filled().state_dict()
    saved["inner"]["scale"] = torch.zeros(4)
    with pytest.raises(ValueError, match=r"field 'scale' .*holds \[\(4,\)\], this problem has tensor \(\)"):
        Everything().load_state_dict(saved)
    saved = filled().state_dict()
    saved["x"] = None
    with pytest.raises(ValueError, match="field 'x' of the checkpoint holds None"):
        Everything().load_state_dict(saved)


def test_numpy_numbers_are_stored_as_python_numbers(tmp_path) -> None:
    state = filled()
    state.number = np.float64(2.5)
    state.recent = [np.float64(1.5)]
    state.counts = {"upper": np.float64(3.0)}
    target = Everything()
    target.load_state_dict(round_trip(state, tmp_path))
    assert (target.number, target.recent, target.counts) == (2.5, [1.5], {"upper": 3.0})


def test_each_state_has_its_own_flag() -> None:
    first, second = State(), State()
    first.finite.fill_(False)
    assert bool(second.finite)
