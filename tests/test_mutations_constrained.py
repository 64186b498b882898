"""Breaks one line of ``constrained`` at a time and asserts that the test named beside it notices.

The tests are those of the pieces; while one is held against a broken module, everything that its own module imported
from there is taken from the broken copy.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch

import tests.test_augmented_lagrangian as augmented
import tests.test_feasibility as feasibility
import tests.test_inertia as inertia
import tests.test_interior_point as interior
import tests.test_joint_projection as projection
import tests.test_kkt_residual as residual
import tests.test_merit as merit
from implicit import LDLT
from tests.mutation import mutated


class Mutation(NamedTuple):
    """One occurrence of ``old`` in a module replaced, and the test that must fail, with its arguments."""

    module: str
    old: str
    new: str
    test: Callable[..., None]
    arguments: tuple[Any, ...] = ()


MUTATIONS = {
    "multipliers of bounds with the wrong sign": Mutation(
        "constrained.residual",
        "- multipliers.lower + multipliers.upper",
        "+ multipliers.lower - multipliers.upper",
        residual.test_every_sign_and_multiplier_matters,
    ),
    "negative multipliers allowed": Mutation(
        "constrained.residual",
        "largest(products / own, duals.clamp(max=0) / scale)",
        "largest(products / own)",
        residual.test_every_sign_and_multiplier_matters,
    ),
    "lower bounds on the wrong side": Mutation(
        "constrained.residual",
        "return lagrangian.lower - x, x",
        "return x - lagrangian.lower, x",
        residual.test_every_violation_counts_as_declared,
    ),
    "one scale for all products": Mutation(
        "constrained.residual",
        "own = torch.maximum(duals.abs(), largest(point.gradient)).clamp(min=1.0)",
        "own = scale",
        residual.test_a_huge_multiplier_does_not_excuse_other_products,
    ),
    "NaN taken for small": Mutation(
        "constrained.residual",
        "torch.where(torch.isfinite(point.objective), largest(gradient) / scale, torch.nan)",
        "largest(gradient) / scale",
        residual.test_nan_is_never_small,
    ),
    "rounding without absolute values": Mutation(
        "constrained.rounding",
        "point.jacobian.matrix.abs() @ point.x.abs()",
        "(point.jacobian.matrix @ point.x).abs()",
        interior.test_rounding_of_constraints_has_the_size_of_their_terms,
        (True,),
    ),
    "merit gradient without the Hessian": Mutation(
        "constrained.merit",
        "w * gradient + nu * w**2 * hessian.flat_mv(gradient)",
        "w * gradient + nu * w**2 * gradient",
        merit.test_value_and_gradient_are_those_of_autodiff,
        (True,),
    ),
    "merit gradient with a weight once": Mutation(
        "constrained.merit",
        "mu * point.jacobian.T.flat_mv(self.constraint_weights**2 * c)",
        "mu * point.jacobian.T.flat_mv(self.constraint_weights * c)",
        merit.test_value_and_gradient_are_those_of_autodiff,
        (False,),
    ),
    "barrier gradient with the wrong sign": Mutation(
        "constrained.barrier",
        "return evaluation.gradient - mu * sides.gather(",
        "return evaluation.gradient + mu * sides.gather(",
        interior.test_gradient_of_the_barrier_function,
    ),
    "Jacobian not scaled": Mutation(
        "constrained.barrier",
        "Dense(scale[:, None] * found.matrix[:, model.free]",
        "Dense(found.matrix[:, model.free]",
        interior.test_newton_steps_solve_the_linearised_conditions,
        ("problem",),
    ),
    "bounds' multipliers step the wrong way": Mutation(
        "constrained.barrier_step",
        "mu / self.gaps - z - z / self.gaps",
        "mu / self.gaps - z + z / self.gaps",
        interior.test_newton_steps_solve_the_linearised_conditions,
        ("problem",),
    ),
    "constraints on the wrong side": Mutation(
        "constrained.barrier_step",
        "bottom = -constraints.index_add(",
        "bottom = constraints.index_add(",
        interior.test_newton_steps_solve_the_linearised_conditions,
        ("squares",),
    ),
    "steps to the boundary": Mutation(
        "constrained.barrier_step",
        "(-boundary * values[shrinking]",
        "(-values[shrinking]",
        interior.test_steps_keep_a_share_of_every_distance,
    ),
    "complementarity without mu": Mutation(
        "constrained.barrier_step",
        "_largest(gaps * state.z - mu)",
        "_largest(gaps * state.z)",
        interior.test_the_error_of_a_barrier_problem_is_that_of_its_conditions,
    ),
    "descent not asked for": Mutation(
        "constrained.barrier_step",
        "if switches and self.theta <= state.filter.smallest:",
        "if False:",
        interior.test_what_the_line_search_accepts,
    ),
    "every step enlarges the filter": Mutation(
        "constrained.barrier_step",
        "if not trial.armijo:",
        "if True:",
        interior.test_only_steps_that_do_not_descend_enlarge_the_filter,
        (True,),
    ),
    "the filter asks for both": Mutation(
        "constrained.filter",
        "all(theta <= t or phi <= p",
        "all(theta <= t and phi <= p",
        interior.test_the_filter_refuses_what_is_dominated,
    ),
    "the filter has no margin": Mutation(
        "constrained.filter",
        "phi - PHI_MARGIN * theta",
        "phi",
        interior.test_the_filter_refuses_what_is_dominated,
    ),
    "elastic variables cancel": Mutation(
        "constrained.restoration",
        "torch.where(a < 0, b / torch.where(a < 0, root - a, 1.0), a + root)",
        "(a + root)",
        interior.test_elastic_variables_minimise_their_barrier_function,
        (1e-6,),
    ),
    "elastic variables swapped": Mutation(
        "constrained.restoration",
        "self.constraints = inner.constraints + n - p",
        "self.constraints = inner.constraints - n + p",
        interior.test_newton_steps_solve_the_linearised_conditions,
        ("l1",),
    ),
    "bounds' multipliers swapped": Mutation(
        "constrained.interior_point",
        "for sign in (1.0, -1.0)]",
        "for sign in (-1.0, 1.0)]",
        interior.test_projection_onto_the_simplex,
        (0,),
    ),
    "multipliers in scaled units": Mutation(
        "constrained.interior_point",
        "y = model.constraint_scale * main.y / model.objective_scale",
        "y = main.y",
        interior.test_multipliers_of_steep_functions_are_in_their_own_units,
    ),
    "any inertia taken": Mutation(
        "constrained.inertia",
        "self.success = self.inertia == (system.n, system.m, 0)",
        "self.success = zero == 0",
        inertia.test_random_systems_get_the_inertia_of_a_minimum,
        (1, 0),
    ),
    "dependent constraints blamed on the Hessian": Mutation(
        "constrained.inertia",
        "if tried.blames_constraints:",
        "if False:",
        inertia.test_dependent_constraints_are_shifted_in_the_second_block_alone,
    ),
    "curvature without the second block": Mutation(
        "constrained.inertia",
        "return primal + dual + max(",
        "return primal + max(",
        inertia.test_the_curvature_test_counts_the_second_block_and_the_way_to_feasibility,
    ),
    "restoration uphill": Mutation(
        "constrained.feasibility",
        "rhs = torch.cat([torch.zeros_like(gradient), -c])",
        "rhs = torch.cat([torch.zeros_like(gradient), c])",
        feasibility.test_step_solves_the_damped_normal_equations_with_weights,
        (LDLT(), False),
    ),
    "restoration looks at the objective": Mutation(
        "constrained.feasibility",
        "down = _way_down(point.hessian(weights**2 * c, 0.0)",
        "down = _way_down(point.hessian(weights**2 * c, 1.0)",
        feasibility.test_way_down_from_a_stationary_point_is_that_of_the_constraints_alone,
    ),
    "pressure that pulls": Mutation(
        "constrained.augmented_function",
        "pressure.clamp(min=0)",
        "pressure",
        augmented.test_the_augmented_lagrangian_and_its_derivatives,
    ),
    "penalty on inactive inequalities": Mutation(
        "constrained.augmented_function",
        "torch.where(self._active, self._penalty * (jacobian @ v), 0.0)",
        "(self._penalty * (jacobian @ v))",
        augmented.test_the_augmented_lagrangian_and_its_derivatives,
    ),
    "multipliers of upper bounds with the wrong sign": Mutation(
        "constrained.augmented_lagrangian",
        "<= -slope / scale, (-slope).clamp(min=0), 0.0)",
        "<= -slope / scale, slope.clamp(min=0), 0.0)",
        augmented.test_closed_forms_with_multipliers,
    ),
    "slack counted as pressure": Mutation(
        "constrained.qp.row_projection",
        "working = multiplier + gap > 0",
        "working = multiplier - gap > 0",
        projection.test_a_warm_start_needs_one_system,
        (torch.Generator(),),
    ),
    "bounds without effect": Mutation(
        "constrained.qp.row_projection",
        "fixed = torch.where(sets.high, self.program.upper, fixed)",
        "pass",
        projection.test_random_sets_against_quadratic_programs,
        (torch.Generator(),),
    ),
    "own columns without themselves": Mutation(
        "constrained.qp.row_system",
        "block.diagonal().add_(1.0)",
        "block.diagonal().add_(0.0)",
        projection.test_structure_and_systems_against_dense_algebra,
        (torch.Generator(), "own"),
    ),
    "no corrector": Mutation(
        "constrained.qp.row_interior",
        "centre - pair.product - by.slack * by.force",
        "centre - pair.product + by.slack * by.force",
        projection.test_interior_points_find_the_active_sets,
        (torch.Generator(),),
    ),
}


@contextmanager
def replaced(mutation: Mutation, monkeypatch: pytest.MonkeyPatch, new: str) -> Iterator[None]:
    """The names of the test's module that come from the mutated one, as the broken copy has them."""
    holder = mutation.test.__globals__
    with mutated(mutation.module, mutation.old, new) as broken, monkeypatch.context() as patch:
        names = [name for name, value in holder.items() if getattr(value, "__module__", None) == mutation.module]
        assert names, f"{mutation.test.__name__} uses nothing of {mutation.module}"
        for name in names:
            patch.setitem(holder, name, getattr(broken, name))
        yield


def arguments(mutation: Mutation) -> list[Any]:
    return [a.manual_seed(0) if isinstance(a, torch.Generator) else a for a in mutation.arguments]


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_line_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutation = MUTATIONS[name]
    with replaced(mutation, monkeypatch, mutation.new), pytest.raises(AssertionError):
        mutation.test(*arguments(mutation))


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_copy_that_is_not_broken_passes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutation = MUTATIONS[name]
    with replaced(mutation, monkeypatch, mutation.old):
        mutation.test(*arguments(mutation))
