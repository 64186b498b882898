"""Checkpoints: atomic writes, damage of every kind found, methods rebuilt by name."""

import os
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import bilevel
import implicit
from implicit import CG, LBFGS, ConvergenceWarning, Jacobi, NewtonCG, load_checkpoint, save_checkpoint
from implicit.checkpoint import FORMAT, decode_method, encode_method


def content(step: int) -> dict:
    generator = torch.Generator().manual_seed(step)
    return {
        "format": FORMAT,
        "step": step,
        "x": torch.randn(50, generator=generator),
        "history": [{"step": 1, "v": 2.5}],
    }


@pytest.fixture
def path(tmp_path):
    """Step 2 in run.pt, step 1 in run.pt.previous."""
    path = tmp_path / "deeper" / "run.pt"
    save_checkpoint(content(1), path)
    save_checkpoint(content(2), path)
    return path


def test_round_trip_keeps_one_predecessor_and_no_temporary_file(path) -> None:
    found = load_checkpoint(path)
    assert found["step"] == 2
    assert torch.equal(found["x"], content(2)["x"])
    assert found["history"] == content(2)["history"]
    assert sorted(p.name for p in path.parent.iterdir()) == ["run.pt", "run.pt.previous"]
    assert load_checkpoint(str(path) + ".previous")["step"] == 1


def test_a_file_cut_anywhere_is_detected(path) -> None:
    whole = path.read_bytes()
    for cut in sorted({0, 1, 2, *range(30, len(whole), 97), len(whole) - 23, len(whole) - 1}):
        path.write_bytes(whole[:cut])
        with pytest.warns(ConvergenceWarning, match=r"run\.pt is damaged .*resuming from run\.pt\.previous"):
            assert load_checkpoint(path)["step"] == 1


def test_a_flipped_bit_is_detected_or_harmless(path) -> None:
    whole = path.read_bytes()
    start = whole.index(content(2)["x"].numpy().tobytes())
    for position in range(start, start + 400, 7):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        with pytest.warns(ConvergenceWarning, match="checksum of .* does not match"):
            assert load_checkpoint(path)["step"] == 1
    detected = 0
    for position in range(0, len(whole), 11):  # headers and padding too
        for bit in (1, 8, 128):
            path.write_bytes(whole[:position] + bytes([whole[position] ^ bit]) + whole[position + 1 :])
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                found = load_checkpoint(path)
            detected += bool(caught)
            assert torch.equal(found["x"], content(1 if caught else 2)["x"])
            assert found["step"] == (1 if caught else 2)
    assert detected > 20


def test_both_damaged_neither_there_and_other_formats(path) -> None:
    previous = path.with_name("run.pt.previous")
    previous.write_bytes(b"nonsense")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"run\.pt is damaged .*run\.pt\.previous is damaged .*start the run again"):
        load_checkpoint(path)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*absent\.pt; save one with SaveCheckpoint"):
        load_checkpoint(path.with_name("absent.pt"))
    for other in ({"format": FORMAT + 1}, [1, 2], {"weights": torch.zeros(2)}):
        torch.save(other, path)
        with pytest.raises(ValueError, match=f"no checkpoint of this version .*expected {FORMAT}"):
            load_checkpoint(path)


def test_objects_that_weights_only_refuses_are_reported_as_damage(path) -> None:
    torch.save({"format": FORMAT, "x": np.random.default_rng(0)}, path)
    with pytest.warns(ConvergenceWarning, match="UnpicklingError"):
        assert load_checkpoint(path)["step"] == 1


def test_a_damaged_file_does_not_replace_the_good_predecessor(path) -> None:
    path.write_bytes(path.read_bytes()[:100])
    save_checkpoint(content(3), path)
    assert load_checkpoint(path)["step"] == 3
    assert load_checkpoint(str(path) + ".previous")["step"] == 1


@pytest.mark.parametrize("killed_at", ["save", "fsync", "link", "replace 1", "replace 2"])
def test_a_kill_during_the_write_leaves_an_intact_file(path, monkeypatch, killed_at) -> None:
    calls = []

    def killed(name, real):
        def call(*args, **kwargs):
            calls.append(name)
            if killed_at in (name, f"{name} {calls.count(name)}"):
                if name == "save":
                    args[1].write(b"half a file")
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        return call

    monkeypatch.setattr(torch, "save", killed("save", torch.save))
    monkeypatch.setattr(os, "fsync", killed("fsync", os.fsync))
    monkeypatch.setattr(os, "link", killed("link", os.link))
    monkeypatch.setattr(os, "replace", killed("replace", os.replace))
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(content(3), path)
    monkeypatch.undo()
    assert load_checkpoint(path)["step"] == 2
    save_checkpoint(content(4), path)
    assert load_checkpoint(path)["step"] == 4
    assert load_checkpoint(str(path) + ".previous")["step"] == 2
    assert not path.with_name("run.pt.linking").exists()


def test_without_hard_links_a_kill_leaves_the_predecessor(path, monkeypatch) -> None:
    replace = os.replace

    def no_links(*_):
        raise OSError("not supported")

    def killed(source, target):
        if str(source).endswith(".writing"):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "link", no_links)
    save_checkpoint(content(3), path)
    assert load_checkpoint(str(path) + ".previous")["step"] == 2
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(content(4), path)
    with pytest.warns(ConvergenceWarning, match=r"run\.pt is missing; resuming from run\.pt\.previous"):
        assert load_checkpoint(path)["step"] == 3


@pytest.mark.parametrize(
    "method",
    [
        None,
        LBFGS(rtol=1e-9, memory=7),
        NewtonCG(max_products=5, preconditioner=Jacobi(diagonal={"a": torch.ones(3), "b": [torch.ones(2)]})),
        CG(rtol=1e-3, atol=float("inf"), preconditioner=None),
        bilevel.Penalty(penalty=np.float64(10.0)),
        bilevel.ImplicitGradient(
            lower_solver=NewtonCG(rtol=1e-7),
            linear_solver=CG(max_steps=3),
            upper_optimizer=torch.optim.Adam,
            upper_options={"lr": 0.1, "betas": (0.5, 0.9)},
        ),
        {"class": "a key of that name", "items": [1, (2.5, "x")]},
    ],
    ids=lambda m: type(m).__name__,
)
def test_methods_come_back_from_a_weights_only_file(tmp_path, method) -> None:
    torch.save(encode_method(method), tmp_path / "method.pt")
    found = decode_method(torch.load(tmp_path / "method.pt", weights_only=True))
    assert type(found) is type(method)
    assert repr(found) == repr(method).replace("np.float64(10.0)", "10.0")


def test_nested_fields_are_rebuilt_as_what_they_were() -> None:
    method = bilevel.ImplicitGradient(
        upper_optimizer=torch.optim.SGD, upper_options={"lr": 0.5}, step_size=bilevel.PathEfficiency(window=7)
    )
    found = decode_method(encode_method(method))
    assert found == method
    assert found.upper_optimizer is torch.optim.SGD
    assert found.step_size.window == 7


def test_what_has_no_public_name_is_refused_with_the_cure() -> None:
    cure = "pass the algorithm to solve\\(\\) when resuming"
    with pytest.raises(TypeError, match=f"lambda.* cannot be rebuilt from a checkpoint; {cure}"):
        encode_method(bilevel.ImplicitGradient(upper_optimizer=torch.optim.Adam, upper_options={"lr": lambda: 1.0}))

    @dataclass(frozen=True)
    class Own:
        rtol: float = 1.0

    with pytest.raises(TypeError, match=f"Own is no public class .*{cure}"):
        encode_method(Own())
    with pytest.raises(TypeError, match=cure):
        encode_method({1: 2})


@pytest.mark.parametrize(
    "name", ["os:system", "torch:load", "implicit:nothing", "implicit:iterate", "builtins:eval", "x"]
)
def test_only_public_classes_are_built(name) -> None:
    with pytest.raises(ValueError, match=r"the checkpoint names .* which this version does not have"):
        decode_method({"class": name, "fields": {}})
    with pytest.raises(ValueError, match="which this version does not have"):
        decode_method({"class": "type", "name": name})


def test_states_of_the_minimizers_pass_through_a_file(tmp_path) -> None:
    """A run of each minimizer, cut in two by a file, ends where the uninterrupted run ends."""
    from implicit.minimizers import ProjectedObjective, gradient_objective, graph_objective

    start = torch.tensor([-1.2, 1.0, 0.5])

    def fn(y):
        return (100 * (y[1:] - y[:-1] ** 2) ** 2 + (1 - y[:-1]) ** 2).sum()

    plain, kept = gradient_objective(fn, start), graph_objective(lambda _, y: fn(y), (), start)
    for method, objective in (
        (LBFGS(memory=3), plain),
        (NewtonCG(), kept),
        (implicit.SpectralProjectedGradient(window=4), ProjectedObjective(plain, lambda v: v.clamp(-2, 2))),
    ):
        straight, cut = method.init(objective, start), method.init(objective, start)
        for state, steps in ((straight, 9), (cut, 5)):
            for _ in range(steps):
                method.step(objective, state)
                state.step += 1
        torch.save(cut.state_dict(), tmp_path / "state.pt")
        again = method.init(objective, start)
        again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        for _ in range(4):
            method.step(objective, again)
        assert torch.equal(again.point, straight.point), type(method).__name__
        assert again.evaluations == straight.evaluations
