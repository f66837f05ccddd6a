"""Rows of equal fields to one batch; what differs in size from image to image is padded."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Ragged:
    """A tensor whose size differs from image to image (ids, boxes, masks), in a transform's row.

    `collate` fills it up with `fill`, at the end of every dimension, to the largest of the batch.
    """

    tensor: Tensor
    fill: float


def collate(rows: list[dict]) -> dict:
    """One batch of equal fields.

    Tensors are stacked, those in a Ragged are padded (to at least 1 in every dimension, so that no
    batch is without a column), int becomes int64 [B], str a list. Colour images [B, 3, H, W] are
    channels-last in memory, as decoders and resizing leave them.
    """
    for row in rows:
        if row.keys() != rows[0].keys():
            raise ValueError(
                f"a transform gave the fields {sorted(rows[0])} for one image and "
                f"{sorted(row)} for another."
            )
    return {name: _field(name, [row[name] for row in rows]) for name in rows[0]}


def _field(name: str, values: list) -> Tensor | list[str]:
    kinds = {type(value) for value in values}
    if kinds == {Ragged}:
        return _padded(name, values)
    if all(issubclass(kind, Tensor) for kind in kinds):
        return _stacked(name, values)
    if all(issubclass(kind, str) for kind in kinds):
        return values
    if all(issubclass(kind, (int, np.integer)) for kind in kinds):
        return torch.tensor([int(value) for value in values])
    raise ValueError(
        f"a transform gave {name}: {', '.join(sorted(kind.__name__ for kind in kinds))}. A field "
        "is a tensor, a Ragged, an int or a str, the same for every image."
    )


def _stacked(name: str, values: list[Tensor]) -> Tensor:
    first = values[0]
    for value in values:
        if value.shape != first.shape or value.dtype != first.dtype:
            raise ValueError(
                f"a transform gave {name}: {tuple(first.shape)} {first.dtype} for one "
                f"image and {tuple(value.shape)} {value.dtype} for another. What differs in size "
                f"is given as Ragged(tensor, fill=…), and padded."
            )
    batch = _empty(len(values), tuple(first.shape), first.dtype)
    for row, value in zip(batch, values):
        row.copy_(value)
    return batch


def _padded(name: str, values: list[Ragged]) -> Tensor:
    dtype, fill = values[0].tensor.dtype, values[0].fill
    kinds = {f"({v.tensor.ndim}, {v.tensor.dtype}, {float(v.fill)})" for v in values}
    if len(kinds) > 1:
        raise ValueError(
            f"a transform gave {name}: Ragged with the (dimensions, dtype, fill) "
            f"{' and '.join(sorted(kinds))}. They must be the same for every image."
        )
    if not dtype.is_floating_point and fill != torch.tensor(fill).to(dtype).item():
        raise ValueError(f"a transform gave {name}: Ragged with fill={fill}, which is no {dtype}.")
    sizes = zip(*(value.tensor.shape for value in values))
    batch = _empty(len(values), tuple(max(1, *size) for size in sizes), dtype).fill_(fill)
    for row, value in zip(batch, values):
        row[tuple(slice(size) for size in value.tensor.shape)] = value.tensor
    return batch


def _empty(count: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """[count, *shape], uninitialised; colour images are channels-last in memory."""
    if len(shape) != 3 or shape[0] != 3:
        return _buffer((count, *shape), dtype)
    return _buffer((count, *shape[1:], 3), dtype).permute(0, 3, 1, 2)


def _buffer(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised memory, shared where a worker hands it over, which saves one copy."""
    if torch.utils.data.get_worker_info() is None:
        return torch.empty(shape, dtype=dtype)
    size = math.prod(shape) * dtype.itemsize
    storage = torch.UntypedStorage._new_shared(size)
    return torch.empty(0, dtype=dtype).set_(storage, 0, shape)
