"""What a rank holds of a tensor that is cut over a mesh."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_ranges(like: Tensor) -> tuple[tuple[int, int], ...]:
    """For each dim the first index and the one behind the last of what this rank holds of a tensor: mesh axes are
    undone from the innermost outwards. Tensor parallelism cuts first, then FSDP cuts each piece, also where both cut
    the same dim; a dim shorter than the axis leaves the last ranks with nothing."""
    ranges = [(0, size) for size in like.shape]
    if isinstance(like, DTensor):
        coordinates = like.device_mesh.get_coordinate()
        assert coordinates is not None
        for axis in reversed(range(like.device_mesh.ndim)):
            placement = like.placements[axis]
            if not placement.is_replicate():
                first, last = ranges[placement.dim]
                # As torch.chunk cuts: all pieces but the last ones have the same size.
                size = -(-(last - first) // like.device_mesh.size(axis))
                start = min(first + coordinates[axis] * size, last)
                ranges[placement.dim] = (start, min(start + size, last))
    return tuple(ranges)
