"""The job of the command line's tests."""

from __future__ import annotations

JOB = """
model = "gpt2"
cluster = "dgx-a100"
nodes = 1
[training]
global_batch_size = 64
seq_len = 1024
"""
