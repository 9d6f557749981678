"""What must hold for every part, as plain functions of a case that raise `Broken`."""

from __future__ import annotations

from switchkit.testing.properties.decisions import (
    accounts_balance,
    capacity_is_filled,
    counts_are_exact,
    first_come_first_served,
    probabilities_add_up,
)
from switchkit.testing.properties.invariance import (
    groups_are_layers_of_their_own,
    leaks_as_declared,
    order_goes_with_the_tokens,
    padding_changes_nothing,
    sequences_do_not_meet,
    the_future_changes_nothing,
)
from switchkit.testing.properties.outputs import (
    dispatchers_agree,
    dropped_tokens_get,
    equal_experts_are_dense,
    equals_the_loop,
    equals_the_paper,
    experts_see_kept_rows_only,
    finite_differences_agree,
    idle_experts_get_zero_gradients,
    nothing_at_all_is_fine,
    one_expert_is_dense,
    rows_of_no_expert_are_zero,
    task_gradient_reaches_the_router,
)
from switchkit.testing.properties.state import (
    checkpointing_changes_nothing,
    compiles,
    evaluation_is_certain,
    experts_start_different,
    exploration_stays_in_the_router,
    forward_changes_nothing,
    layers_start_different,
    routing_is_float32,
)
from switchkit.testing.properties.terms import (
    LossCase,
    balance_is_one_when_uniform,
    balance_sees_collapse,
    layers_do_not_cancel,
    loss_changes_nothing,
    loss_gradient_agrees,
    loss_ignores_padding,
    loss_of_nothing_is_zero,
    loss_reaches_the_router,
    z_loss_has_its_closed_form,
)

__all__ = [
    "PROPERTIES",
    "LossCase",
    "accounts_balance",
    "balance_is_one_when_uniform",
    "balance_sees_collapse",
    "capacity_is_filled",
    "checkpointing_changes_nothing",
    "compiles",
    "counts_are_exact",
    "dispatchers_agree",
    "dropped_tokens_get",
    "equal_experts_are_dense",
    "equals_the_loop",
    "equals_the_paper",
    "evaluation_is_certain",
    "experts_see_kept_rows_only",
    "experts_start_different",
    "exploration_stays_in_the_router",
    "finite_differences_agree",
    "first_come_first_served",
    "forward_changes_nothing",
    "groups_are_layers_of_their_own",
    "idle_experts_get_zero_gradients",
    "layers_do_not_cancel",
    "layers_start_different",
    "leaks_as_declared",
    "loss_changes_nothing",
    "loss_gradient_agrees",
    "loss_ignores_padding",
    "loss_of_nothing_is_zero",
    "loss_reaches_the_router",
    "nothing_at_all_is_fine",
    "one_expert_is_dense",
    "order_goes_with_the_tokens",
    "padding_changes_nothing",
    "probabilities_add_up",
    "routing_is_float32",
    "rows_of_no_expert_are_zero",
    "sequences_do_not_meet",
    "task_gradient_reaches_the_router",
    "the_future_changes_nothing",
    "z_loss_has_its_closed_form",
]

PROPERTIES = tuple(name for name in __all__ if name not in ("PROPERTIES", "LossCase", "layers_start_different"))
"""The names of those that the kit asks of parts: not of the one that is about a model."""
