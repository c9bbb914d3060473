"""Objective: what a plan is chosen by, where there are several numbers of nodes to choose from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from simulator.files import STRICT
from simulator.units import DURATION, TOKENS


@dataclass(frozen=True)
class Objective:
    """The table [objective] of a job.toml. tokens are those of the whole training, deadline is in seconds.

    goal: "fastest" is the most tokens per second, "cheapest" the most tokens per GPU-hour, "deadline" the least of what
    `minimize` names (GPUs, or the cost of the tokens) that trains the tokens in time.
    goodput is the share of the time in which steps are made that count; the rest goes to failures, restarts and
    checkpoints. None counts nothing for them.
    nodes are the numbers of nodes to choose from; none names them all where the command line does.
    """

    goal: Literal["fastest", "cheapest", "deadline"] = "fastest"
    tokens: Annotated[float | None, TOKENS] = None
    deadline: Annotated[float | None, DURATION] = None
    minimize: Literal["gpus", "cost"] = "gpus"
    goodput: float | None = None
    nodes: tuple[int, ...] = ()

    __pydantic_config__ = STRICT

    @property
    def share(self) -> float:
        """goodput, or 1 where nothing is allowed for."""
        return 1.0 if self.goodput is None else self.goodput
