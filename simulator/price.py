"""What tokens cost: the hours of all GPUs of a job, and their price.

    seconds   = tokens / (tokens per second · goodput)
    GPU-hours = GPUs · seconds / 3600
    cost      = GPU-hours · price

GPUs are paid for as long as they are held, so failures and restarts (goodput) cost as steps do. Storage, traffic and
what a cloud takes off for long leases are left out. The error is that of the predicted throughput.
"""

from __future__ import annotations

from simulator.job import Job
from simulator.results import Prediction


def training_seconds(prediction: Prediction, tokens: float, goodput: float = 1.0) -> float:
    """Seconds until so many tokens are trained; goodput is the share of them in which steps are made that count."""
    return tokens / (prediction.tokens_per_second * goodput)


def gpu_hours(prediction: Prediction, job: Job, tokens: float = 1e9, goodput: float = 1.0) -> float:
    """Hours of all GPUs of the job for so many tokens."""
    return job.world_size * training_seconds(prediction, tokens, goodput) / 3600


def dollars(prediction: Prediction, job: Job, tokens: float = 1e9, goodput: float = 1.0) -> float | None:
    """Price of so many tokens in US dollars; None where neither the cluster file nor the job names a price."""
    price = job.cluster.price_per_gpu_hour
    return None if price is None else price * gpu_hours(prediction, job, tokens, goodput)


def hours_name(job: Job) -> str:
    """What a cost without a price is counted in."""
    return "processor-hours" if job.cluster.gpu.kind == "cpu" else "GPU-hours"
