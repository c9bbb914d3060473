"""metrics.jsonl: one line per step, with torchtitan's keys, on disk as soon as the step is done.

Throughput is per device, model FLOPs are ModelSpec.flops_per_token, the peak is the data sheet's, as in a Prediction
(torchtitan@00fbaafa, components/metrics.py). Memory is rank 0's.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from planner.plan import Plan
from runtime.machine import resident_bytes
from runtime.record import peak_memory
from simulator.errors import UserError
from simulator.files import write_text

GIB = 2**30


class MetricsFile:
    """Writes the metrics of steps. A run that goes on after `done` steps keeps the lines of those and adds to them;
    lines of later steps, which a crash left without a checkpoint, go.

    Raises UserError if the file cannot be written.
    """

    def __init__(self, path: Path, plan: Plan, device: torch.device, done: int = 0) -> None:
        job, gpu = plan.job, plan.job.cluster.gpu
        self.device, self.tokens_per_step = device, job.tokens_per_step
        # Ranks that share processors are no more devices than there are.
        self.devices = min(plan.layout.world_size, job.world_size)
        self.flops_per_token = job.model.flops_per_token(job.training.seq_len)
        self.peak_flops = gpu.peak[gpu.arithmetic(job.training.precision)]
        self.learning_rate = job.training.learning_rate
        write_text(path, "".join(_lines_of(path, done)))
        try:
            self.file = path.open("a", encoding="utf-8", buffering=1)
        except OSError as error:
            raise UserError(f"cannot write '{path}': {error.strerror}") from None

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def write(
        self, step: int, loss: float, grad_norm: float, seconds: float, data_seconds: float, **more: list[int]
    ) -> None:
        """One line: `step` counts from 1, `seconds` are the step's from end to end, data_seconds of them loading;
        `more` comes last."""
        rate = self.tokens_per_step / seconds / self.devices
        active, reserved = memory_bytes(self.device)
        line = {
            "step": step,
            "loss_metrics/global_avg_loss": loss,
            "grad_norm": grad_norm,
            "lr": self.learning_rate,
            "ntokens_seen": step * self.tokens_per_step,
            "throughput(tps)": rate,
            "tflops": rate * self.flops_per_token / 1e12,
            "mfu(%)": 100 * rate * self.flops_per_token / self.peak_flops,
            "time_metrics/end_to_end(s)": seconds,
            "time_metrics/data_loading(s)": data_seconds,
            "time_metrics/data_loading(%)": 100 * data_seconds / seconds,
            "memory/max_active(GiB)": active / GIB,
            "memory/max_reserved(GiB)": reserved / GIB,
            **more,
        }
        self.file.write(json.dumps(line) + "\n")


def memory_bytes(device: torch.device) -> tuple[float, float]:
    """Most bytes active and reserved since the run began; on a CPU resident now and at most."""
    if device.type == "cuda":
        stats = torch.cuda.memory_stats(device)
        return float(stats["active_bytes.all.peak"]), float(stats["reserved_bytes.all.peak"])
    now = float(resident_bytes())
    # The kernel brings its two counts up to date at different times.
    return now, max(now, peak_memory(device))


def _lines_of(path: Path, done: int) -> list[str]:
    """The whole lines of steps 1 to `done` in an earlier file."""
    if not done or not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    return [line for line in lines if 1 <= _step_of(line) <= done]


def _step_of(line: str) -> int:
    """0 for what is no line of metrics: the last of a killed run may be cut off."""
    try:
        step = json.loads(line)["step"] if line.endswith("\n") else 0
    except (ValueError, TypeError, KeyError):
        return 0
    return step if isinstance(step, int) else 0
