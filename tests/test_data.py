"""Batches: every row once per epoch, resumable, honest about what it cannot do."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

import bilevel
from bilevel import Batches


class Rows(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor([float(i), 2.0 * i]), torch.tensor(i)


@pytest.mark.parametrize("source", ["tensor", "dict", "dataset", "tensordataset"])
def test_each_epoch_visits_every_row_once(source: str, generator: torch.Generator) -> None:
    rows: Any = torch.arange(10.0)
    data = {
        "tensor": rows,
        "dict": {"a": rows, "b": [rows * 2]},
        "dataset": Rows(),
        "tensordataset": TensorDataset(rows),
    }[source]
    batches = Batches(data, 5)
    position = batches.init(generator)

    def first(batch: Any) -> torch.Tensor:
        if source == "tensor":
            return batch
        return batch["a"] if source == "dict" else batch[0][:, 0] if source == "dataset" else batch[0]

    for epoch in range(3):
        seen = torch.cat([first(batches.draw(position, generator)) for _ in range(2)])
        assert sorted(seen.tolist()) == list(range(10))
        assert position.epoch == epoch
    assert first(batches.full()).tolist() == list(range(10))


def test_leftover_rows_move_to_the_next_shuffle(generator: torch.Generator) -> None:
    batches = Batches(torch.arange(7.0), 3)
    position = batches.init(generator)
    sizes = [len(batches.draw(position, generator)) for _ in range(20)]
    assert set(sizes) == {3}
    assert position.epoch == 9


def test_full_data_needs_no_randomness(generator: torch.Generator) -> None:
    before = generator.get_state()
    for size in (None, 4, 5):
        batches = Batches(torch.arange(4.0), size)
        assert not batches.stochastic
        position = batches.init(generator)
        assert batches.draw(position, generator).tolist() == [0, 1, 2, 3]
    assert torch.equal(before, generator.get_state())


def test_a_saved_position_continues_with_the_same_batches(generator: torch.Generator) -> None:
    batches = Batches(torch.arange(23.0), 4)
    position = batches.init(generator)
    for _ in range(7):
        batches.draw(position, generator)
    saved, state = position.state_dict(), generator.get_state()
    expected = [batches.draw(position, generator) for _ in range(12)]
    other = torch.Generator().manual_seed(99)
    fresh = batches.init(other)
    fresh.load_state_dict(saved)
    other.set_state(state)
    assert all(torch.equal(batches.draw(fresh, other), batch) for batch in expected)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: Batches({"a": torch.ones(3), "b": torch.ones(4)}), ValueError, r"disagree on the number of rows"),
        (lambda: Batches(torch.tensor(1.0)), ValueError, r"single number"),
        (lambda: Batches(torch.ones(3), 0), ValueError, r"batch_size must be None or a positive integer, got 0"),
        (lambda: Batches("text"), TypeError, r"must be a tensor, a pytree of tensors"),
        (lambda: Batches(3), TypeError, r"got int"),
        (lambda: Batches(np.ones(3)), TypeError, r"got ndarray; convert arrays with torch.as_tensor"),
        (lambda: Batches(torch.ones(0, 2)), ValueError, r"no rows"),
        (
            lambda: Batches({"a": torch.tensor([[1.0], [float("nan")], [3.0]])}),
            ValueError,
            r"data\['a'\] has NaN in 1 of 3 rows \(first: \[1\]\)",
        ),
        (lambda: Batches(DataLoader(Rows(), batch_size=2), 3), ValueError, r"belongs to the DataLoader"),
    ],
)
def test_errors(build: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


def loader_problem(loader: Any) -> bilevel.BilevelProblem:
    return bilevel.BilevelProblem(
        lambda x, y: (y - 1.0) ** 2 + 0.1 * x**2,
        lambda x, y, *, batch: 0.5 * ((y - x - 0.01 * batch[0].mean()) ** 2),
        lower_data=Batches(loader),
    )


ZERO = torch.zeros((), dtype=torch.float64)


def test_a_plain_loader_works_but_does_not_resume(tmp_path: Any) -> None:
    problem = loader_problem(DataLoader(Rows(), batch_size=2))
    solution = bilevel.solve(problem, bilevel.Penalty(), ZERO, ZERO, max_steps=20)
    assert solution.steps == 20
    assert solution.checkpoint == {}
    with pytest.raises(
        TypeError, match=r"lower_data: DataLoader has no state_dict and cannot be resumed.*StatefulDataLoader"
    ):
        bilevel.solve(problem, bilevel.Penalty(), ZERO, ZERO, callbacks=[bilevel.SaveCheckpoint(tmp_path / "a.pt")])


class StatefulLoader:
    """The protocol of a stateful loader: iterates in order, and can be put back to where it was."""

    def __init__(self) -> None:
        self.dataset, self.batch_size, self.at = Rows(), 3, 0

    def __iter__(self) -> Any:
        while self.at < 9:
            start, self.at = self.at, self.at + 3
            yield [
                torch.stack(column) for column in zip(*(self.dataset[i] for i in range(start, start + 3)), strict=True)
            ]
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def test_a_stateful_loader_resumes_bitwise() -> None:
    whole = bilevel.solve(loader_problem(StatefulLoader()), bilevel.Penalty(), ZERO, ZERO, max_steps=35)
    part = bilevel.solve(loader_problem(StatefulLoader()), bilevel.Penalty(), ZERO, ZERO, max_steps=16)
    rest = bilevel.solve(loader_problem(StatefulLoader()), checkpoint=part.checkpoint, max_steps=35)
    assert torch.equal(whole.x, rest.x)
    assert torch.equal(whole.y, rest.y)


def test_nan_in_a_dataset_is_found_before_the_first_step() -> None:
    class Bad(Rows):
        def __getitem__(self, i: int) -> Any:
            return torch.tensor([float("nan") if i == 7 else 1.0]), torch.tensor(i)

    batches = Batches(Bad(), 2)
    with pytest.raises(ValueError, match=r"NaN in 1 of 10 rows \(first: \[7\]\)"):
        batches.full()
