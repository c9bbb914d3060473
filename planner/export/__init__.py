"""Export: the layout of a plan in another framework's configuration. One module per target, each of pure functions."""

from __future__ import annotations

from typing import Protocol

from planner.export import (
    accelerate,
    deepspeed,
    megatron,
    megatron_bridge,
    rules,
    torchtitan,
    torchtitan_main,
    transformers,
)
from planner.plan import Plan
from simulator.errors import UserError, nearest


class Target(Protocol):
    """What a target's module has: the version that its files are written for, and the two functions."""

    WRITTEN_FOR: str

    def problems(self, plan: Plan) -> list[str]:
        """What the target cannot express, in the names of its own knobs; empty if it can say everything."""

    def files(self, plan: Plan) -> dict[str, str]:
        """File names and texts of a plan without problems."""


TARGETS: dict[str, Target] = {
    "torchtitan": torchtitan,
    "torchtitan-main": torchtitan_main,
    "megatron": megatron,
    "megatron-bridge": megatron_bridge,
    "transformers": transformers,
    "accelerate": accelerate,
    "deepspeed": deepspeed,
}


def find_target(name: str) -> Target:
    """The target of a name. Raises UserError with the nearest name if there is none."""
    if name not in TARGETS:
        raise UserError(f"--to '{name}' is not a target{nearest(name, TARGETS)}")
    return TARGETS[name]


def export(plan: Plan, name: str) -> dict[str, str]:
    """The files of a target, by name.

    Raises:
        UserError: the target is not known, or it cannot express the layout; the sentence has every reason.
    """
    target = find_target(name)
    problems = rules.synchronisation(plan.layout) + target.problems(plan)
    if problems:
        raise UserError(f"{target.WRITTEN_FOR} cannot express '{plan.layout.short()}': {'; '.join(problems)}")
    return target.files(plan)
