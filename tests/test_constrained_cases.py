"""The constrained cases are what they claim to be: values, derivatives, optimality of the stated answers."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacrev

import problems
from constrained import ConstrainedProblem, Multipliers
from implicit import Status, tree
from problems.constrained_case import ConstrainedCase

SMALL = sorted(
    n for n, e in problems.entries("constrained").items() if e.tags & {"hock-schittkowski", "boggs-tolle", "cutest"}
)
PUBLISHED = """hs6 hs7 hs28 hs40 hs42 hs47 hs48 hs50 hs51 hs52 hs56 hs77 hs78 hs79 hs100lnp bt2 bt3 bt5 bt6 bt9 bt10
bt11 bt12 genhs28 himmelba himmelbc himmelbe booth sinvalne waysea1ne waysea2ne rsnbrne cubene mwright zangwil3
trigon1ne helixne orthregb gottfr morebvne denschncne denschnfne price4ne inteqne mancinone
bt1 bt4 bt7 bt8 byrdsphr hs26 hs27 hs39 hs46 hs49 hs9 maratos"""
BUILT = {name: problems.case(name) for name in SMALL}
KNOWN = [name for name, case in BUILT.items() if case.x_star is not None]
WITH_MULTIPLIERS = [name for name in KNOWN if BUILT[name].multipliers_star is not None]


def active(case: ConstrainedCase, x: Tensor, margin: float = 1e-7) -> tuple[Tensor, int]:
    """Gradients of the active constraints as rows, equalities first, and how many equalities there are."""
    problem, rows = case.problem, [x.new_zeros(0, len(x))]
    if problem.equality is not None:
        rows.append(jacrev(problem.equality)(x))
    equalities = sum(len(r) for r in rows)
    if problem.inequality is not None:
        rows.append(jacrev(problem.inequality)(x)[problem.inequality(x) > -margin])
    for bound, sign in ((problem.lower, -1.0), (problem.upper, 1.0)):
        if bound is not None:
            near = (sign * (x - torch.as_tensor(bound)) > -margin).expand(len(x))
            rows.append(sign * torch.eye(len(x))[near])
    return torch.cat(rows), equalities


def test_the_catalogue_holds_what_the_literature_compares_on() -> None:
    assert not set(PUBLISHED.split()) - set(SMALL)
    assert sum("inequality" in case.tags or "bounds" in case.tags for case in BUILT.values()) >= 35


@pytest.mark.parametrize("name", SMALL)
def test_the_start_fits_the_problem_and_the_tags_tell_the_truth(name: str) -> None:
    case = BUILT[name]
    case.problem.validate(case.start)
    problem, n = case.problem, len(case.start)
    assert ("equality" in case.tags) == (problem.equality is not None)
    assert ("inequality" in case.tags) == (problem.inequality is not None)
    assert ("bounds" in case.tags) == (problem.lower is not None or problem.upper is not None)
    if "square" in case.tags:
        assert problem.equality is not None
        assert problem.equality(case.start).shape == (n,)
        assert case.f_star == 0
    if "exact" in case.tags:
        assert case.x_star is not None


@pytest.mark.parametrize("name", KNOWN)
def test_the_stated_solution_is_feasible_and_has_the_stated_value(name: str) -> None:
    case = BUILT[name]
    assert case.violation(case.x_star) < 1e-13 * max(1.0, float(case.x_star.abs().max()) ** 2)
    assert abs(case.gap(case.x_star)) < 1e-14


@pytest.mark.parametrize("name", [name for name in KNOWN if name != "hs13"])
def test_the_stated_solution_satisfies_the_first_order_conditions(name: str) -> None:
    """Multipliers with the right signs exist: nonnegative least squares over the active gradients."""
    scipy_optimize = pytest.importorskip("scipy.optimize")
    case = BUILT[name]
    x, slope = case.x_star, grad(case.problem.objective)(case.x_star)
    rows, equalities = active(case, x)
    columns = torch.cat([rows[:equalities], -rows[:equalities], rows[equalities:]]).T.numpy()
    size = max(1.0, float(slope.abs().max()))
    if columns.shape[1] == 0:
        assert float(slope.abs().max()) < 1e-12
    else:
        assert scipy_optimize.nnls(columns, -slope.numpy())[1] < 1e-10 * size


def test_no_multipliers_exist_at_the_cusp_of_hs13() -> None:
    scipy_optimize = pytest.importorskip("scipy.optimize")
    case = BUILT["hs13"]
    rows, _ = active(case, case.x_star)
    assert scipy_optimize.nnls(rows.T.numpy(), -grad(case.problem.objective)(case.x_star).numpy())[1] > 1


@pytest.mark.parametrize("name", WITH_MULTIPLIERS)
def test_the_stated_multipliers_are_right(name: str) -> None:
    case = BUILT[name]
    problem, x, stated = case.problem, case.x_star, case.multipliers_star
    assert stated is not None
    residual = grad(problem.objective)(x)
    if problem.equality is not None:
        residual = residual + jacrev(problem.equality)(x).T @ stated.equality
    if problem.inequality is not None and isinstance(stated.inequality, Tensor):
        assert float(stated.inequality.min()) >= 0
        assert float((stated.inequality * problem.inequality(x)).abs().max()) < 1e-12
        residual = residual + jacrev(problem.inequality)(x).T @ stated.inequality
    free = torch.ones(len(x), dtype=torch.bool)
    for bound, sign in ((problem.lower, -1.0), (problem.upper, 1.0)):
        if bound is not None:
            free &= sign * (x - torch.as_tensor(bound)) < -1e-9
    assert float(residual[free].abs().max() if bool(free.any()) else 0) < 1e-12 * max(1.0, abs(case.f_star))


@pytest.mark.parametrize("name", [n for n in KNOWN if "exact" in BUILT[n].tags and "degenerate" not in BUILT[n].tags])
def test_the_stated_solution_is_a_strict_local_minimum(name: str) -> None:
    """Curvature of the Lagrangian along the active constraints, with least-squares multipliers."""
    case = BUILT[name]
    problem, x = case.problem, case.x_star
    rows, _ = active(case, x)
    multipliers = torch.linalg.lstsq(rows.T, -grad(problem.objective)(x)[:, None]).solution[:, 0]

    def lagrangian(y: Tensor) -> Tensor:
        parts = [] if problem.equality is None else [problem.equality(y)]
        if problem.inequality is not None:
            parts.append(problem.inequality(y)[problem.inequality(x) > -1e-7])
        flat = torch.cat(parts) if parts else y.new_zeros(0)
        return problem.objective(y) + flat @ multipliers[: len(flat)]

    assert int(torch.linalg.matrix_rank(rows)) == len(rows)
    basis = torch.linalg.svd(rows)[2][len(rows) :].T if len(rows) else torch.eye(len(x))
    if basis.shape[1]:
        assert float(torch.linalg.eigvalsh(basis.T @ hessian(lagrangian)(x) @ basis).min()) > 1e-6


@pytest.mark.parametrize("name", [n for n in SMALL if "square" in BUILT[n].tags and n != "hs8"])
def test_newton_solves_the_square_systems(name: str) -> None:
    """From the stated solution moved a little, or from the start where none is stated; helixne's start is a jump."""
    case = BUILT[name]
    equality, x = case.problem.equality, case.start if case.x_star is None else case.x_star + 0.01
    assert equality is not None
    for _ in range(60):
        step = torch.linalg.lstsq(jacrev(equality)(x), -equality(x)[:, None]).solution[:, 0]
        size = float(equality(x).norm())
        scale = next((2.0**-k for k in range(30) if float(equality(x + 2.0**-k * step).norm()) < size), 0.0)
        x = x + scale * step
    small = 1e-9 if name != "gottfr" else math.inf  # its start leads damped Newton to a least point that is no root
    assert case.violation(x) < small
    if case.x_star is not None:
        assert case.distance(x) < 1e-9


# f, ||h|| and ||c|| at x0 + 0.1 (1, ..., n) / n by the S2MPJ collection, for the problems without a closed form.
VALUES = {
    "bt2": (81.602223457, 11424.586496, 0.0),
    "bt4": (-16.944300693, 0.23653954473, 0.0),
    "bt5": (974.44111111, 12.793384479, 0.0),
    "bt6": (5.29644996, 67.803345889, 0.0),
    "bt7": (838.550816, 4.8344715202, 0.0),
    "bt8": (3.2456, 1.5607712965, 0.0),
    "bt11": (1.04120032, 12.885449863, 0.0),
    "bt12": (5.13417082, 7.768277889, 0.0),
    "mwright": (89.88349632, 2.6700269291, 0.0),
    "himmelbc": (0.0, 9.9931779855, 0.0),
    "waysea1ne": (0.0, 660.86794307, 0.0),
    "waysea2ne": (0.0, 49.036827398, 0.0),
    "gottfr": (0.0, 2.1435453103, 0.0),
    "denschncne": (0.0, 32.846232228, 0.0),
    "denschnfne": (0.0, 21.037009353, 0.0),
    "price4ne": (0.0, 121.72319881, 0.0),
    "genhs28": (44.7929, 14.238370693, 0.0),
    "orthregb": (0.091152263374, 264.84723174, 0.0),
    "morebvne": (0.0, 0.12565709356, 0.0),
    "inteqne": (0.0, 0.18397046577, 0.0),
    "mancinone": (0.0, 333.17490532, 0.0),
    "hs8": (0.0, 20.716302306, 0.0),
    "hs9": (0.013087072427, 0.1, 0.0),
    "hs47": (20.693304796, 0.43970223914, 0.0),
    "hs61": (-2.4, 12.885442307, 0.0),
    "hs77": (5.29644996, 70.761237285, 0.0),
    "hs78": (-5.200959456, 3.9260679995, 0.0),
    "hs79": (1.04120032, 9.0160290416, 0.0),
    "hs100lnp": (707.78104349, 9.1456115002, 0.0),
    "hs2": (739.053125, 0.0, 0.0),
    "hs11": (-24.9575, 0.0, 24.3025),
    "hs19": (-1733.753041, 0.0, 176.06736834),
    "hs60": (1.0688901235, 21.923385239, 0.0),
    "hs62": (-25830.173874, 0.2, 0.0),
    "hs63": (974.44111111, 12.793384479, 0.0),
    "hs64": (246833.68768, 0.0, 141.96187683),
    "hs65": (135.56777778, 0.0, 2.3488888889),
    "hs66": (0.57333333333, 0.0, 0.099188216992),
    "hs71": (17.646625, 13.51875, 3.896415625),
    "hs73": (139.72625, 3.25, 99.222639695),
    "hs80": (0.0010183387499, 4.3409315039, 0.0),
    "hs93": (160.41004676, 0.0, 0.62209952937),
    "hs100": (707.78104349, 0.0, 314.96764254),
    "hs113": (747.7232, 0.0, 176.2227273),
    "trigon1ne": (0.0, 2.8622615955, 0.0),
}


def test_values_are_pinned_where_no_closed_form_does_it() -> None:
    """The two of the cameras are compared with scipy elsewhere: CUTEst has wrong numbers for them."""
    assert set(SMALL) - set(KNOWN) - set(VALUES) == {"ba-l1", "ba-l1sp"}


@pytest.mark.parametrize("name", VALUES)
def test_values_beside_the_start(name: str) -> None:
    case = BUILT[name]
    n = len(case.start)
    x = case.start + 0.1 * torch.arange(1, n + 1) / n
    norms = [
        0.0 if rows is None else float(torch.linalg.vector_norm(rows(x)))
        for rows in (case.problem.equality, case.problem.inequality)
    ]
    assert [float(case.problem.objective(x)), *norms] == pytest.approx(VALUES[name], rel=1e-7, abs=1e-12)


def test_check_accepts_the_answer_and_names_what_is_wrong() -> None:
    case = BUILT["hs14"]

    def found(x: Tensor) -> SimpleNamespace:
        return SimpleNamespace(x=x, status=Status.CONVERGED)

    case.check(found(case.x_star))
    with pytest.raises(AssertionError, match=r"hs14 \(CONVERGED\): x violates the constraints by 4"):
        case.check(found(case.start))
    with pytest.raises(AssertionError, match="f is above f_star"):
        case.check(found(torch.tensor([0.0, 0.5])))
    center = torch.tensor([2.0, 1.0])  # f is the squared distance from here
    turn = torch.tensor([[math.cos(0.01), -math.sin(0.01)], [math.sin(0.01), math.cos(0.01)]])
    with pytest.raises(AssertionError, match="from x_star"):
        case.check(found(center + turn @ (case.x_star - center)), feasibility=1.0)
    assert math.isnan(case.violation(torch.full((2,), math.nan)))
    with pytest.raises(AssertionError, match="violates the constraints by nan"):
        case.check(found(torch.full((2,), math.nan)))


def test_check_knows_other_minima() -> None:
    case = BUILT["hs33"]
    other = SimpleNamespace(x=torch.tensor([0.0, 0.0, 2.0]), status=Status.CONVERGED)
    with pytest.raises(AssertionError, match="another known local minimum"):
        case.check(other)
    case.check(other, any_minimum=True)
    assert not case.is_known_minimum(torch.tensor([0.0, 0.0, 2.5]))


def test_violation_measures_equalities_inequalities_and_both_bounds() -> None:
    problem = ConstrainedProblem(
        objective=lambda x: x["a"].sum(),
        equality=lambda x: x["a"].sum() - 1,
        inequality=lambda x: x["b"] - 5,
        lower={"a": 0.0, "b": -1.0},
        upper=3.0,
    )
    start = {"b": torch.tensor([[1.0]]), "a": torch.tensor([0.5, 0.5])}
    case = ConstrainedCase(name="t", problem=problem, start=start, source="", f_star=1.0)

    def moved(**leaves: Tensor) -> float:
        return case.violation({**start, **leaves})

    assert moved() == 0
    assert moved(a=torch.tensor([0.5, 0.25])) == 0.25
    assert moved(a=torch.tensor([-2.0, 3.0])) == 2
    assert moved(b=torch.tensor([[-1.5]])) == 0.5
    assert moved(b=torch.tensor([[3.5]])) == 0.5
    assert moved(b=torch.tensor([[9.0]])) == 6
    assert case.gap(start) == 0
    with pytest.raises(ValueError, match="no x_star"):
        case.distance(start)


def test_dtype_and_device_reach_every_part() -> None:
    case = problems.case("hs71", dtype=torch.float32)
    assert case.start.dtype == torch.float32
    assert tree.leaves(case.problem.equality(case.start))[0].dtype == torch.float32
    bound = problems.case("hs36", dtype=torch.float32).problem.upper
    assert isinstance(bound, Tensor)
    assert bound.dtype == torch.float32


def test_the_registry_keeps_the_two_kinds_apart() -> None:
    assert all(isinstance(case, problems.Case) for case in problems.cases())
    assert {case.name for case in problems.cases("constrained", "boggs-tolle")} == {f"bt{i}" for i in range(1, 13)}
    assert not set(problems.entries()) & set(problems.entries("constrained"))
    with pytest.raises(ValueError, match="kind must be"):
        problems.entries("convex")
    assert isinstance(problems.case("HS7").multipliers_star, Multipliers)
