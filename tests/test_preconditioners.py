"""Preconditioners against dense inverses, and the iterations they save."""

import math
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from implicit import (
    CG,
    Cholesky,
    Dense,
    Factorization,
    GradientGraph,
    Hessian,
    Jacobi,
    Kept,
    KeptState,
    NewtonCG,
    Nystrom,
    Preconditioner,
    Status,
    hypergradient,
    load_checkpoint,
    minimize,
    save_checkpoint,
    tree,
)
from implicit.checkpoint import decode_method, encode_method
from implicit.linear_solvers.base import Apply
from tests.dense import normal, relative


def with_spectrum(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    q, _ = torch.linalg.qr(normal(seed, len(eigenvalues), len(eigenvalues)))
    matrix = (q * eigenvalues) @ q.T
    return 0.5 * (matrix + matrix.T)


def matrix_of(apply: Apply, n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return apply(torch.eye(n, dtype=dtype)).T


def assert_spd(matrix: Tensor) -> None:
    rounding = 1e4 * torch.finfo(matrix.dtype).eps
    torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=rounding * float(matrix.abs().max()))
    assert float(torch.linalg.eigvalsh(matrix)[0]) > 0


def steps(matrix: Tensor, b: Tensor, preconditioner: Preconditioner | None, rtol: float = 1e-8) -> int:
    found = CG(rtol=rtol, preconditioner=preconditioner).solve(Dense(matrix), b)
    assert found.success
    assert float((b - matrix @ found.value).norm()) <= 1.0001 * rtol * float(b.norm())
    return found.steps


# ---------------------------------------------------------------- a classifier with one penalty per feature


FEATURES, CLASSES = 12, 4
INPUTS = normal(1, 150, FEATURES) * torch.logspace(0, -1.5, FEATURES)
LABELS = (INPUTS @ normal(2, FEATURES, CLASSES) + 0.3 * normal(3, 150, CLASSES)).argmax(dim=1)
PENALTIES = -5.0 + normal(4, FEATURES)


def ridge(x: Tensor, y: dict[str, Tensor]) -> Tensor:
    return 0.5 * (torch.exp(x) @ (y["weight"] ** 2).sum(dim=1))


def penalized(x: Tensor, y: dict[str, Tensor]) -> Tensor:
    # Equal shifts of all biases change no prediction: a little of their own keeps the Hessian regular.
    return cross_entropy(INPUTS @ y["weight"] + y["bias"], LABELS) + 0.005 * (y["bias"] ** 2).sum() + ridge(x, y)


def classifier() -> tuple[Hessian, Tensor, dict[str, Tensor]]:
    """Its Hessian at a random point, as an operator and dense, and the diagonal of the penalty."""
    y = {"weight": 0.3 * normal(5, FEATURES, CLASSES), "bias": normal(6, CLASSES)}
    operator = Hessian.of(GradientGraph(penalized, PENALTIES, y))
    like = {"weight": torch.exp(PENALTIES)[:, None].expand(FEATURES, CLASSES), "bias": torch.zeros(CLASSES)}
    dense = torch.func.hessian(lambda q: penalized(PENALTIES, tree.unravel(q, y)))(tree.ravel(y))
    return operator, dense, like


# ---------------------------------------------------------------- Jacobi


def test_a_declared_diagonal_divides() -> None:
    rows = normal(0, 3, 4)
    diagonal = torch.tensor([1.0, 2.0, 4.0, 8.0])
    torch.testing.assert_close(Jacobi(diagonal=diagonal).init(Dense(torch.eye(4)))(rows), rows / diagonal)


def test_a_declared_diagonal_is_paired_by_key() -> None:
    operator = Dense(torch.eye(3), {"w": torch.zeros(2), "b": torch.zeros(())})
    found = Jacobi(diagonal={"b": torch.tensor(5.0), "w": torch.tensor([2.0, 4.0])}).init(operator)(torch.ones(1, 3))
    torch.testing.assert_close(found, torch.tensor([[0.5, 0.25, 0.2]]))


def test_the_estimated_diagonal_of_a_diagonal_operator_solves_in_one_step() -> None:
    diagonal = torch.logspace(-3, 4, 40)
    found = CG(preconditioner=Jacobi(samples=2)).solve(Dense(torch.diag(diagonal)), torch.ones(40))
    assert (found.status, found.steps, found.products) == (Status.CONVERGED, 1, 4)  # two samples, one step, one check


def test_the_estimate_repairs_bad_scaling() -> None:
    scales = torch.logspace(0, 3, 60).sqrt()
    matrix = scales[:, None] * with_spectrum(torch.linspace(1.0, 3.0, 60)) * scales
    b = normal(1, 60)
    plain = steps(matrix, b, None)
    assert steps(matrix, b, Jacobi(samples=10)) < 0.35 * plain
    assert steps(matrix, b, Jacobi(diagonal=matrix.diag())) < 0.35 * plain


def test_the_estimate_is_the_mean_or_its_standard_error() -> None:
    matrix = torch.tensor([[2.0, 1.0, 4.0], [1.0, -3.0, 9.0], [4.0, 9.0, 0.5]])
    prepared = Jacobi(samples=4, seed=3).prepare(Dense(matrix))["diagonal"]
    bits = torch.randint(0, 2, (4, 3), generator=torch.Generator().manual_seed(3))
    signs = (2 * bits - 1).double()
    estimates = signs * (signs @ matrix)
    expected = torch.maximum(estimates.mean(0).abs(), estimates.std(0) / 2)
    torch.testing.assert_close(prepared, expected)
    # Off-diagonal noise alone: two entries of a zero diagonal get their standard error, not a tiny divisor.
    noise = Jacobi(samples=3).prepare(Dense(torch.tensor([[0.0, 1.0], [1.0, 0.0]])))["diagonal"]
    assert float(noise.min()) > 0.3


def test_a_regularizer_alone_costs_no_product() -> None:
    operator, _, like = classifier()
    like["bias"] += 0.5
    for given in (like, {"bias": like["bias"], "weight": like["weight"]}):
        prepared = Jacobi(regularizer=given, samples=0).prepare(operator)["diagonal"]
        assert operator.products == 0
        expected = torch.cat([like["weight"].reshape(-1), like["bias"]])
        torch.testing.assert_close(prepared, expected)
    torch.testing.assert_close(
        Jacobi(regularizer=0.25, samples=0).prepare(operator)["diagonal"], torch.full((52,), 0.25)
    )


def test_a_regularizer_and_an_estimate_of_the_rest() -> None:
    rest, known = torch.linspace(1.0, 2.0, 8), torch.logspace(-2, 3, 8)
    prepared = Jacobi(regularizer=known, samples=2).prepare(Dense(torch.diag(rest + known)))["diagonal"]
    torch.testing.assert_close(prepared, rest + known, rtol=1e-12, atol=0)
    # What is estimated is added: the regularizer stays a lower bound.
    operator, _, like = classifier()
    prepared = Jacobi(regularizer=like, samples=4).prepare(operator)["diagonal"]
    assert bool((prepared >= torch.cat([like["weight"].reshape(-1), like["bias"]])).all())


def test_averages_reach_the_estimate() -> None:
    matrix = torch.diag(torch.arange(1.0, 7.0))
    prepared = Jacobi(samples=2, average=3).prepare(Dense(matrix))["diagonal"]
    torch.testing.assert_close(prepared, torch.tensor([2.0, 2, 2, 5, 5, 5]))


def test_parameters_that_do_not_enter_get_a_positive_divisor() -> None:
    operator = Hessian(lambda y: (y[:2] ** 2).sum(), torch.ones(3))
    prepared = Jacobi(samples=2).prepare(operator)["diagonal"]
    torch.testing.assert_close(prepared, torch.tensor([2.0, 2.0, 2.0 * 2**-26]), rtol=1e-12, atol=0)
    found = CG(preconditioner=Jacobi(samples=2)).solve(operator, torch.tensor([1.0, 1.0, 0.0]))
    torch.testing.assert_close(found.value, torch.tensor([0.5, 0.5, 0.0]))
    assert Jacobi(samples=2).prepare(Dense(torch.zeros(2, 2)))["diagonal"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"diagonal": torch.tensor([1.0, 0.0])}, "diagonal must be positive everywhere"),
        ({"diagonal": torch.ones(2), "regularizer": 1.0}, "diagonal excludes regularizer"),
        ({"samples": 0}, "samples=0 leaves no diagonal"),
        ({"samples": 1}, "samples must be 0 or at least 2"),
        ({"samples": 2.0}, "samples must be 0 or at least 2"),
        ({"diagonal": torch.ones(2), "average": 2}, "average=2 needs an estimate"),
        ({"regularizer": 1.0, "samples": 0, "average": "leaf"}, "average='leaf' needs an estimate"),
    ],
)
def test_jacobi_refuses(fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        Jacobi(**fields)


# ---------------------------------------------------------------- the declared regularizer


@pytest.mark.parametrize("make", [lambda r: Jacobi(regularizer=r, samples=0), lambda r: Nystrom(rank=3, regularizer=r)])
def test_a_regularizer_function_equals_its_diagonal(make) -> None:
    operator, _, like = classifier()
    smooth = lambda x, y: ridge(x, y) + (0.1 * torch.cosh(y["bias"])).sum()  # noqa: E731
    like["bias"] = 0.1 * torch.cosh(tree.detach(operator.graph.y)["bias"])
    rows = normal(0, 2, operator.size)
    torch.testing.assert_close(make(smooth).init(operator)(rows), make(like).init(operator)(rows), rtol=1e-12, atol=0)


@pytest.mark.parametrize("preconditioner", [Jacobi, Nystrom])
def test_regularizers_that_do_not_fit(preconditioner) -> None:
    operator, _, like = classifier()
    with pytest.raises(ValueError, match="regularizer's Hessian in y is not diagonal"):
        preconditioner(regularizer=lambda x, y: (y["weight"].sum(dim=0) ** 2).sum()).init(operator)
    with pytest.raises(TypeError, match=r"regularizer is a function.*Dense does not tell"):
        preconditioner(regularizer=ridge).init(Dense(torch.eye(2)))
    with pytest.raises(ValueError, match="nonnegative, its least is -1"):
        preconditioner(regularizer=torch.tensor([1.0, -1.0])).init(Dense(torch.eye(2)))
    with pytest.raises(ValueError, match="must be finite"):
        preconditioner(regularizer=math.nan).init(Dense(torch.eye(2)))
    with pytest.raises(ValueError, match="regularizer has 3 entries, the operator acts on 2"):
        preconditioner(regularizer=torch.ones(3)).init(Dense(torch.eye(2)))
    with pytest.raises(ValueError, match="different structures"):
        preconditioner(regularizer={"weight": like["weight"]}).init(operator)


# ---------------------------------------------------------------- Nystrom


def textbook(matrix: Tensor, basis: Tensor, mu: float) -> Tensor:
    """Frangella, Tropp and Udell, equation (1.3), with a dense pseudoinverse."""
    image = matrix @ basis
    values, vectors = torch.linalg.eigh(image @ torch.linalg.pinv(basis.T @ image) @ image.T)
    u, top = vectors[:, -basis.shape[1] :], values[-basis.shape[1] :]
    eye = torch.eye(len(matrix))
    return (top[0] + mu) * (u / (top + mu)) @ u.T + eye - u @ u.T


def drawn(n: int, rank: int, seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(n, rank, generator=torch.Generator().manual_seed(seed)))[0]


@pytest.mark.parametrize("seed", [0, 7])
def test_nystrom_is_the_published_formula(seed: int) -> None:
    data, n, rank = with_spectrum(torch.logspace(1, -3, 30)), 30, 6
    basis = drawn(n, rank, seed)
    plain = matrix_of(Nystrom(rank=rank, seed=seed).init(Dense(data)), n)
    torch.testing.assert_close(plain, textbook(data, basis, 0.0), rtol=1e-9, atol=1e-10)
    mu = 0.05
    shifted = matrix_of(Nystrom(rank=rank, seed=seed, regularizer=mu).init(Dense(data + mu * torch.eye(n))), n)
    expected = textbook(data / mu, basis, 1.0) / mu
    torch.testing.assert_close(shifted, expected, rtol=1e-9, atol=1e-9)
    diagonal = torch.logspace(-2, 1, n)
    half = diagonal.rsqrt()
    scaled = matrix_of(Nystrom(rank=rank, seed=seed, regularizer=diagonal).init(Dense(data + torch.diag(diagonal))), n)
    expected = half[:, None] * textbook(half[:, None] * data * half, basis, 1.0) * half
    torch.testing.assert_close(scaled, expected, rtol=1e-9, atol=1e-9)
    assert_spd(scaled)


def test_full_rank_is_the_inverse_up_to_its_scale() -> None:
    matrix = with_spectrum(torch.logspace(0, 2, 12))
    found = matrix_of(Nystrom(rank=50).init(Dense(matrix)), 12)
    torch.testing.assert_close(found, torch.linalg.inv(matrix), rtol=1e-9, atol=1e-9)
    assert steps(matrix, torch.ones(12), Nystrom(rank=50)) == 1


def test_low_rank_plus_ridge_is_solved_in_a_few_steps() -> None:
    eigenvalues = torch.cat([torch.logspace(2, 4, 8), torch.zeros(72)])
    matrix = with_spectrum(eigenvalues) + 0.01 * torch.eye(80)
    b = normal(1, 80)
    assert steps(matrix, b, None, rtol=1e-10) > 10
    operator = Dense(matrix)
    found = CG(rtol=1e-10, preconditioner=Nystrom(rank=8, regularizer=0.01)).solve(operator, b)
    assert found.success and found.steps <= 3
    assert found.products == 8 + found.steps + 1


def test_scaling_by_the_regularizer_is_what_helps_under_unequal_penalties() -> None:
    operator, dense, like = classifier()
    b = {"weight": normal(7, FEATURES, CLASSES), "bias": normal(8, CLASSES)}
    counts = {}
    for name, preconditioner in {
        "none": None,
        "plain": Nystrom(rank=10),
        "scaled": Nystrom(rank=10, regularizer=like),
        "function": Nystrom(rank=10, regularizer=ridge),
    }.items():
        found = CG(rtol=1e-8, preconditioner=preconditioner).solve(operator, b)
        assert found.success
        assert relative(tree.ravel(found.value), torch.linalg.solve(dense, tree.ravel(b))) < 1e-5
        counts[name] = found.steps
    assert counts["scaled"] == counts["function"] < 0.6 * counts["none"]
    assert counts["scaled"] < 0.8 * counts["plain"]
    assert_spd(matrix_of(Nystrom(rank=10, regularizer=like).init(operator), operator.size))


def test_the_rank_grows_until_the_tail_is_below_ten_times_the_ridge() -> None:
    eigenvalues = 10.0 ** torch.linspace(3, -3, 64)
    mu = 0.5
    matrix = with_spectrum(eigenvalues) + mu * torch.eye(64)
    operator = Dense(matrix)
    prepared = Nystrom(rank=4, max_rank=64, regularizer=mu).prepare(operator)
    assert operator.products == prepared["basis"].shape[1] == 32  # 4, 8, 16, 32: 24 eigenvalues exceed 5
    again = Nystrom(rank=4, max_rank=11, regularizer=mu).prepare(Dense(matrix))
    assert again["basis"].shape[1] == 11
    torch.testing.assert_close(again["basis"].T @ again["basis"], torch.eye(11), rtol=0, atol=1e-12)
    enough = Dense(matrix)
    assert Nystrom(rank=40, max_rank=64, regularizer=mu).prepare(enough)["basis"].shape[1] == enough.products == 40


def test_a_grown_sketch_preconditions_like_one_of_that_rank() -> None:
    matrix = with_spectrum(10.0 ** torch.linspace(3, -3, 64)) + 0.1 * torch.eye(64)
    b = normal(3, 64)
    grown = steps(matrix, b, Nystrom(rank=4, max_rank=64, regularizer=0.1))
    at_once = steps(matrix, b, Nystrom(rank=32, regularizer=0.1))
    assert abs(grown - at_once) <= 3
    assert max(grown, at_once) < 0.5 * steps(matrix, b, None)


def test_products_come_in_one_batch_or_in_chunks() -> None:
    calls = []

    class Recording(Dense):
        def _flat_block(self, rows):
            calls.append(len(rows))
            return super()._flat_block(rows)

    matrix = with_spectrum(torch.linspace(1, 9, 12))
    whole = matrix_of(Nystrom(rank=7).init(Recording(matrix)), 12)
    pieces = matrix_of(Nystrom(rank=7, chunk=3).init(Recording(matrix)), 12)
    assert calls == [7, 3, 3, 1]
    torch.testing.assert_close(whole, pieces, rtol=1e-10, atol=1e-12)


def test_indefinite_rank_deficient_and_zero_operators_give_spd_preconditioners() -> None:
    indefinite = with_spectrum(torch.linspace(-4.0, 5.0, 20))
    assert_spd(matrix_of(Nystrom(rank=12).init(Dense(indefinite)), 20))
    deficient = with_spectrum(torch.cat([torch.logspace(0, 2, 3), torch.zeros(17)]))
    prepared = Nystrom(rank=9).prepare(Dense(deficient))
    assert prepared["basis"].shape == (20, 3)
    assert_spd(matrix_of(Nystrom(rank=9).init(Dense(deficient)), 20))
    zero = matrix_of(Nystrom(rank=4).init(Dense(torch.zeros(5, 5))), 5)
    torch.testing.assert_close(zero, torch.eye(5))


def test_unpenalized_parameters_are_scaled_like_the_others() -> None:
    regularizer = torch.tensor([1.0, 3.0, 0.0, 0.0])
    prepared = Nystrom(rank=2, regularizer=regularizer).prepare(Dense(torch.diag(regularizer + 1.0)))
    torch.testing.assert_close(prepared["scale"], torch.tensor([1.0, 3.0, 2.0, 2.0]).rsqrt())
    # Their curvature is the data's alone: nothing is subtracted from it.
    full = Nystrom(rank=4, regularizer=regularizer).init(Dense(torch.diag(regularizer + 1.0)))
    torch.testing.assert_close(matrix_of(full, 4).diag() * torch.tensor([2.0, 4.0, 3.0, 3.0]), torch.full((4,), 4 / 3))
    with pytest.raises(ValueError, match="the regularizer's Hessian is zero; leave regularizer=None"):
        Nystrom(regularizer=0.0).init(Dense(torch.eye(2)))


def test_float32_at_condition_1e5() -> None:
    matrix = with_spectrum(torch.cat([torch.logspace(3, 5, 10), torch.ones(90)])).float()
    b = normal(2, 100).float()
    plain = CG(rtol=1e-3, max_steps=100).solve(Dense(matrix), b)
    helped = CG(rtol=1e-3, preconditioner=Nystrom(rank=15, regularizer=1.0)).solve(Dense(matrix), b)
    assert helped.success and helped.value.dtype == torch.float32
    assert helped.steps < 0.5 * plain.steps
    assert_spd(matrix_of(Nystrom(rank=15, regularizer=1.0).init(Dense(matrix)), 100, torch.float32))


def test_half_precision_operators_are_decomposed_in_float32() -> None:
    matrix = with_spectrum(torch.logspace(0, 2, 16)).bfloat16()
    prepared = Nystrom(rank=4).prepare(Dense(matrix))
    assert {v.dtype for v in prepared.values()} == {torch.bfloat16}
    gram = prepared["basis"].float().T @ prepared["basis"].float()
    torch.testing.assert_close(gram, torch.eye(4, dtype=torch.float32), rtol=0, atol=0.02)


def test_an_empty_domain() -> None:
    for preconditioner in (Nystrom(), Jacobi(samples=2), Factorization()):
        assert preconditioner.init(Dense(torch.zeros(0, 0)))(torch.zeros(1, 0)).shape == (1, 0)


@pytest.mark.parametrize("preconditioner", [Jacobi(samples=3), Nystrom(rank=3), Factorization()])
def test_operators_that_are_not_finite_are_reported_by_the_solver(preconditioner) -> None:
    found = CG(preconditioner=preconditioner).solve(Dense(torch.full((4, 4), math.nan)), torch.ones(4))
    assert found.status is Status.NONFINITE


@pytest.mark.parametrize("preconditioner", [Jacobi(samples=3), Nystrom(rank=3), Factorization()])
def test_indefinite_operators_are_reported_by_the_solver(preconditioner) -> None:
    matrix = with_spectrum(torch.linspace(-1.0, 4.0, 12))
    found = CG(preconditioner=preconditioner).solve(Dense(matrix), normal(5, 12))
    assert found.status is Status.LINEAR_SOLVE_FAILED and found.indefinite


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "rank must be a positive integer, got 0"),
        ({"chunk": 0}, "chunk must be None or a positive integer, got 0"),
        ({"max_rank": 30}, "max_rank compares eigenvalues with the regularizer"),
        ({"max_rank": 10, "regularizer": 1.0}, "max_rank must be at least rank=20, got 10"),
    ],
)
def test_nystrom_refuses(fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        Nystrom(**fields)


# ---------------------------------------------------------------- factorization, and what is kept


def test_factorization_is_the_inverse() -> None:
    matrix = with_spectrum(torch.logspace(0, 3, 15))
    torch.testing.assert_close(
        matrix_of(Factorization().init(Dense(matrix)), 15), torch.linalg.inv(matrix), rtol=1e-9, atol=1e-12
    )
    assert steps(matrix, torch.ones(15), Factorization(), rtol=1e-12) == 1
    with pytest.raises(ValueError, match="15 x 15 matrix, above max_size=3; use Nystrom"):
        Factorization(max_size=3).init(Dense(matrix))


@pytest.mark.parametrize("lowest", [-2.0, 0.0])
def test_factorization_shifts_what_is_not_positive_definite(lowest: float) -> None:
    matrix = with_spectrum(torch.linspace(lowest, 5.0, 10))
    found = matrix_of(Factorization().init(Dense(matrix)), 10)
    assert_spd(found)
    shifted = torch.linalg.inv(found)
    tau = float((shifted - matrix).diag().mean())
    torch.testing.assert_close(shifted, matrix + tau * torch.eye(10), rtol=1e-6, atol=1e-8)
    assert -lowest < tau < -2.0 * lowest + 0.01
    torch.testing.assert_close(
        matrix_of(Factorization().init(Dense(torch.zeros(2, 2))), 2).diag() > 0, torch.ones(2) > 0
    )


def drifting(amount: float) -> Dense:
    return Dense(with_spectrum(torch.logspace(0, 3, 40)) + amount * with_spectrum(torch.linspace(0, 1, 40), seed=9))


def test_a_kept_factorization_is_built_once_and_stays_right() -> None:
    state = KeptState()
    solver = CG(rtol=1e-10, preconditioner=Kept(max_applications=10).hold(state))
    for t in range(6):
        operator, b = drifting(0.05 * t), normal(t, 40)
        found = solver.solve(operator, b)
        assert found.success
        assert relative(found.value, torch.linalg.solve(operator.matrix, b)) < 1e-7
        assert found.steps <= 10
        assert state.applications >= found.steps
        assert operator.products == found.products == (40 if t == 0 else 0) + found.steps + 1
    assert state.builds == 1


def test_it_is_built_anew_after_a_system_of_too_many_iterations() -> None:
    state = KeptState()
    solver = CG(rtol=1e-10, preconditioner=Kept(max_applications=5).hold(state))
    b = torch.ones(40)
    assert solver.solve(drifting(0.0), b).steps == 1
    hard = solver.solve(drifting(500.0), b)
    assert hard.success and hard.steps > 5
    assert state.builds == 1
    assert solver.solve(drifting(500.0), b).steps == 1  # rebuilt here
    assert state.builds == 2
    assert solver.solve(drifting(500.0), b).steps == 1
    assert state.builds == 2
    exactly = KeptState()
    tight = CG(rtol=1e-10, preconditioner=Kept(max_applications=1).hold(exactly))
    for _ in range(3):
        tight.solve(drifting(0.0), b)
        assert exactly.applications == 1
    assert exactly.builds == 1


def test_without_a_state_every_system_builds_its_own() -> None:
    solver = CG(rtol=1e-10, preconditioner=Kept())
    for t in range(2):
        operator = drifting(100.0 * t)
        assert solver.solve(operator, torch.ones(40)).steps == 1
        assert operator.products == 42


@pytest.mark.parametrize("kept", [Nystrom(rank=5, regularizer=0.5), Jacobi(samples=4), Factorization()])
def test_a_run_resumed_from_its_saved_state_repeats_itself_bitwise(tmp_path, kept) -> None:
    config = Kept(preconditioner=kept, max_applications=4)

    def run(state: KeptState, times: range) -> list[Tensor]:
        cg = CG(rtol=1e-9, preconditioner=config.hold(state))
        return [cg.solve(drifting(20.0 * t**2), normal(t, 40)).value for t in times]

    whole_state = KeptState()
    whole = run(whole_state, range(6))
    first = KeptState()
    head = run(first, range(3))
    save_checkpoint({"format": 1, "kept": first.state_dict()}, tmp_path / "run.pt")
    second = KeptState()
    second.load_state_dict(load_checkpoint(tmp_path / "run.pt")["kept"])
    tail = run(second, range(3, 6))
    for a, b in zip(whole, head + tail, strict=True):
        assert torch.equal(a, b)
    assert second.builds == whole_state.builds > 1
    fresh = KeptState()
    fresh.load_state_dict(KeptState().state_dict())
    assert fresh.prepared is None


def test_the_saved_state_is_a_copy() -> None:
    state = KeptState()
    CG(preconditioner=Kept().hold(state)).solve(drifting(0.0), torch.ones(40))
    saved = state.state_dict()
    assert state.prepared is not None
    state.prepared["factor"].zero_()
    assert float(saved["prepared"]["factor"].norm()) > 0


def test_a_state_belongs_to_one_size() -> None:
    state = KeptState()
    CG(preconditioner=Kept().hold(state)).solve(Dense(torch.eye(3)), torch.ones(3))
    with pytest.raises(ValueError, match="kept preconditioner is for 3 unknowns, this operator has 2"):
        CG(preconditioner=Kept().hold(state)).solve(Dense(torch.eye(2)), torch.ones(2))


def test_kept_refuses_and_is_frozen() -> None:
    with pytest.raises(TypeError, match=r"preconditioner must be Factorization.*got Cholesky"):
        Kept(preconditioner=Cholesky())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_applications must be a positive integer, got 0"):
        Kept(max_applications=0)
    with pytest.raises(FrozenInstanceError):
        Kept().max_applications = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    "method",
    [
        Kept(preconditioner=Nystrom(rank=3, regularizer={"a": torch.ones(2)}), max_applications=7),
        Kept(),
        Jacobi(regularizer=0.5, average={"a": 1}),
        CG(preconditioner=Nystrom(rank=4, regularizer=1e-3, max_rank=8)),
    ],
    ids=repr,
)
def test_configurations_come_back_from_a_checkpoint(method) -> None:
    assert repr(decode_method(encode_method(method))) == repr(method)


# ---------------------------------------------------------------- where they are used


@pytest.mark.parametrize(
    "preconditioner",
    [Jacobi(regularizer=ridge), Nystrom(rank=12, regularizer=ridge), Nystrom(rank=12), Factorization()],
)
def test_hypergradients_and_newton_steps_do_not_depend_on_the_preconditioner(preconditioner) -> None:
    def upper(x: Tensor, y: dict[str, Tensor]) -> Tensor:
        return (y["weight"] ** 3).sum() + y["bias"] @ torch.arange(4.0)

    start = {"weight": torch.zeros(FEATURES, CLASSES), "bias": torch.zeros(CLASSES)}
    solver = NewtonCG(rtol=1e-11)
    if not callable(getattr(preconditioner, "regularizer", None)):  # Newton's Hessian is that of a function of y alone
        solver = replace(solver, preconditioner=preconditioner)
    y = minimize(lambda q: penalized(PENALTIES, q), start, solver).point
    found = hypergradient(upper, penalized, PENALTIES, y, linear_solver=CG(rtol=1e-11, preconditioner=preconditioner))

    def flat(q: Tensor) -> Tensor:
        return penalized(PENALTIES, tree.unravel(q, y))

    weight, v = (
        y["weight"],
        torch.linalg.solve(
            torch.func.hessian(flat)(tree.ravel(y)),
            torch.func.grad(lambda q: upper(PENALTIES, tree.unravel(q, y)))(tree.ravel(y)),
        ),
    )
    expected = -torch.exp(PENALTIES) * (weight * tree.unravel(v, y)["weight"]).sum(dim=1)
    torch.testing.assert_close(found.value, expected, rtol=1e-7, atol=1e-9)
