"""A world whose other ranks are not there: torch's fake process group, whose collectives return at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.distributed as dist
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore


@contextlib.contextmanager
def fake_group(rank: int, world_size: int) -> Iterator[None]:
    """The default group of this process meanwhile; there must be none yet. What DTensor remembers of an op holds the
    mesh that it saw first, and with it groups of a world that is gone."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    _clear_sharding_prop_cache()
    try:
        yield
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()
