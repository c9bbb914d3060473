"""What a run is given besides its plan: how long it is, what it reads, and what it leaves behind."""

from __future__ import annotations

import dataclasses
import re
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path

from simulator.errors import UserError

DEFAULT_EVERY = 100


@dataclass(frozen=True)
class Settings:
    """Settings of one run; `arguments` are they as `-m runtime` takes them.

    steps: optimizer steps in all; the first `warmup` of them are left out of the step times.
    output: measurement.json, with metrics.jsonl beside it; without it the measurement goes to stdout.
    checkpoint: a folder to go on from, and to save in every checkpoint_every (100) steps and at the end.
    weights: a folder of Hugging Face safetensors to begin with. export: one to write the trained model to.
    profile: a folder for the traces of the last step, which then is left out of the step times too.
    slow_rank: artificial stragglers for experiments, "1:2.0,3:1.5": rank 1 computes twice as long, rank 3 half again;
    they really wait, in proportion to what they computed.
    """

    steps: int = 20
    warmup: int = 5
    output: Path | None = None
    checkpoint: Path | None = None
    checkpoint_every: int | None = None
    weights: Path | None = None
    export: Path | None = None
    profile: Path | None = None
    slow_rank: str | None = None

    @property
    def slowdowns(self) -> dict[int, float]:
        """slow_rank by rank. Raises UserError if it is not of this form."""
        found: dict[int, float] = {}
        for part in (self.slow_rank or "").split(",") if self.slow_rank is not None else []:
            match = re.fullmatch(r"\s*(\d{1,9}):(\d{1,6}(?:\.\d*)?)\s*", part)
            if match is None or float(match[2]) < 1 or int(match[1]) in found:
                raise UserError(
                    f"slow-rank = '{self.slow_rank}' must name ranks once each with a factor of at least 1, like 1:2.0"
                )
            found[int(match[1])] = float(match[2])
        return found

    @property
    def every(self) -> int:
        """Steps between two saves."""
        return self.checkpoint_every or DEFAULT_EVERY

    @property
    def metrics(self) -> Path | None:
        return None if self.output is None else self.output.with_name("metrics.jsonl")

    def check(self) -> None:
        """Raises UserError where settings contradict each other."""
        if not 0 <= self.warmup < self.steps:
            raise UserError(f"warmup = {self.warmup} must be at least 0 and less than steps = {self.steps}")
        _ = self.slowdowns
        if self.checkpoint_every is not None and self.checkpoint_every < 1:
            raise UserError(f"checkpoint-every = {self.checkpoint_every} must be at least 1")
        if self.checkpoint_every is not None and self.checkpoint is None:
            raise UserError(f"checkpoint-every = {self.checkpoint_every} needs a folder to write to: --checkpoint DIR")
        if self.export is not None and self.weights is not None and self.export.resolve() == self.weights.resolve():
            raise UserError(f"--export {self.export} would overwrite the --weights; name another folder")
        if self.profile is not None and self.warmup + 1 >= self.steps:
            raise UserError(
                f"--profile takes the last step, which leaves none to measure: steps = {self.steps} must be at least "
                f"warmup({self.warmup}) + 2"
            )

    def arguments(self) -> list[str]:
        """Steps, warm-up, and whatever differs from the default."""
        found = [f"--steps={self.steps}", f"--warmup={self.warmup}"]
        for field in dataclasses.fields(self)[2:]:
            value = getattr(self, field.name)
            if value != field.default:
                found.append(f"--{field.name.replace('_', '-')}={value}")
        return found


DEFAULT = Settings()


def add_arguments(parser: ArgumentParser) -> None:
    """The same as options of a command; `settings_of` reads them back."""
    parser.add_argument("--steps", type=int, default=DEFAULT.steps, help="optimizer steps in all (%(default)s)")
    parser.add_argument(
        "--warmup", type=int, default=DEFAULT.warmup, help="steps left out of the step times (%(default)s)"
    )
    parser.add_argument("-o", "--output", type=Path, help="measurement.json; without it, it goes to stdout")
    parser.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="save here, and go on from what is saved here; for all nodes"
    )
    parser.add_argument("--checkpoint-every", type=int, metavar="N", help=f"steps between saves ({DEFAULT_EVERY})")
    parser.add_argument("--weights", type=Path, metavar="DIR", help="begin with these safetensors")
    parser.add_argument("--export", type=Path, metavar="DIR", help="write the trained model as safetensors")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="traces and timeline.json of the last step go here")
    parser.add_argument("--slow-rank", metavar="R:X", help="artificial stragglers: rank R computes X times as long")


def settings_of(options: Namespace) -> Settings:
    return Settings(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Settings)})
