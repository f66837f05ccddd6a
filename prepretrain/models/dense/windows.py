"""Transformer blocks on a grid of cells that attend within windows, with relative positions: the
backbone of ViTDet (arXiv 2203.16527). And windows on a grid of any size for Swin's blocks.

B images, H heads, D channels; a grid has rows and columns of cells.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp
from torch import Tensor, nn

DISTANCES = ("rel_pos_t", "rel_pos_h", "rel_pos_w")  # tables of relative positions, MViT's names


class WindowBlock(nn.Module):
    """A pre-norm block on [B, rows, columns, D], with the parameter names of timm's Block."""

    def __init__(self, width: int, attention: nn.Module, *, window: int | None, drop_path: float):
        """attention: of its input's shape. window: cells along a window's side; None attends to the
        whole grid."""
        super().__init__()
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.window = window
        self.norm1 = norm(width)
        self.attn = attention
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = norm(width)
        self.mlp = Mlp(width, 4 * width)

    def forward(self, cells: Tensor) -> Tensor:
        """[B, rows, columns, D] to the same shape."""
        # Zeros are added after the norm and attended to without a mask, as in ViTDet's code: their
        # keys and values are the biases.
        normed, grid = self.norm1(cells), cells.shape[1:3]
        if self.window is None:
            attended = self.attn(normed)
        else:
            windows = split_windows(normed, (self.window, self.window))
            attended = join_windows(self.attn(windows), grid)
        cells = cells + self.drop_path(attended)
        return cells + self.drop_path(self.mlp(self.norm2(cells)))


class RelativeAttention(nn.Module):
    """Self-attention over the cells of a grid, to whose logits the products of each query with a
    vector for the distance along each axis of the grid are added."""

    fused_attn = True  # timm's name: see contracts.FusedAttention

    def __init__(self, width: int, heads: int, reach: tuple[int, ...] | None):
        """reach: the cells along each axis whose relative positions the tables hold, as (rows, columns)
        or (times, rows, columns); None has no such tables."""
        super().__init__()
        self.heads, self.reach = heads, reach
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        for name, cells in zip(self._names(), reach or ()):
            self.register_parameter(name, nn.Parameter(torch.empty(2 * cells - 1, width // heads)))

    def _names(self) -> tuple[str, ...]:
        """The names of the tables."""
        return DISTANCES[-len(self.reach) :] if self.reach else ()

    def attend(self, tokens: Tensor, grid: tuple[int, ...], prefix: int = 0) -> Tensor:
        """[B, prefix + N, D] tokens, of which those after the prefix lie on the grid, to the same
        shape."""
        B, N, _ = tokens.shape
        apart = self.qkv(tokens).view(B, N, 3, self.heads, -1).unbind(2)
        q, k, v = (one.transpose(1, 2) for one in apart)  # so that gradients are copied once
        channels = q.shape[-1]
        scale = channels**-0.5
        if self.reach is not None:
            q, k = self._placed(q, k, scale, grid, prefix)
            v = F.pad(v, (0, q.shape[-1] - channels))  # kernels take one number of channels
        if self.fused_attn:
            mixed = F.scaled_dot_product_attention(q, k, v, scale=scale)
        else:
            mixed = (q * scale @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(mixed[..., :channels].transpose(1, 2).reshape(tokens.shape))

    def _placed(
        self, q: Tensor, k: Tensor, scale: float, grid: tuple[int, ...], prefix: int
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys with a channel for each place along each axis: a query's are its products
        with the vectors of the distances to there, unscaled (ViTDet's and MViT's code), a key's are 1
        where it lies. Their products are what is added to the logits, which as a tensor [B, H, N, N]
        would take more memory and time than all else in a block. 0 from and to the prefix."""
        tables = [relative(getattr(self, name), n) for name, n in zip(self._names(), grid)]
        products = by_distance(q[:, :, prefix:], *tables) / scale
        place = places(grid, k).expand(*k.shape[:2], -1, -1)
        if prefix:
            products, place = (F.pad(one, (0, 0, prefix, 0)) for one in (products, place))
        return torch.cat([q, products], -1), torch.cat([k, place], -1)


class GridAttention(RelativeAttention):
    """Attention over all cells of a grid of rows and columns."""

    def forward(self, cells: Tensor) -> Tensor:
        """[B, rows, columns, D] to the same shape."""
        return self.attend(cells.flatten(1, 2), cells.shape[1:3]).view(cells.shape)


def by_distance(q: Tensor, *tables: Tensor) -> Tensor:
    """[B, H, N, C] queries of a grid, and for each of its axes the vectors of each distance [n, n, C],
    to their products [B, H, N, n + …]: what is added to the logits of keys at each place along each
    axis."""
    axes = "xyz"[: len(tables)]
    placed = q.unflatten(2, [len(table) for table in tables])
    parts = [
        torch.einsum(f"bh{axes}d,{axis}kd->bh{axes}k", placed, table)
        for axis, table in zip(axes, tables)
    ]
    return torch.cat(parts, -1).flatten(2, 1 + len(axes))


def places(grid: tuple[int, ...], like: Tensor) -> Tensor:
    """[N, n + …]: 1 at the place of each cell of a grid along each of its axes, else 0."""
    parts = []
    for axis, n in enumerate(grid):
        own = torch.eye(n, dtype=like.dtype, device=like.device)
        shape = [n if other == axis else 1 for other in range(len(grid))]
        parts.append(own.view(*shape, n).expand(*grid, n))
    return torch.cat(parts, -1).flatten(0, -2)


def relative(table: Tensor, cells: int) -> Tensor:
    """[2 cells' - 1, C], the vectors of every distance, to [cells, cells, C], that from each query to
    each key; resized if it is of another number of cells."""
    place = torch.arange(cells, device=table.device)
    return resize_distances(table, 2 * cells - 1)[place[:, None] - place + cells - 1]


def resize_distances(table: Tensor, length: int) -> Tensor:
    """A table of vectors by distance [L, C] as one of another length, linearly."""
    if len(table) == length:
        return table
    resized = F.interpolate(table.float().T[None], length, mode="linear")
    return resized[0].T.to(table.dtype)


def resize_positions(table: Tensor, old: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """A table of positions [1, N, D] on the grid `old` to [1, rows, columns, D] on another, bicubic
    without antialiasing, as in ViTDet's code."""
    placed = table.unflatten(1, old)
    if old == grid:
        return placed
    maps = placed.float().permute(0, 3, 1, 2)
    resized = F.interpolate(maps, grid, mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1).to(table.dtype)


def split_windows(cells: Tensor, window: tuple[int, int]) -> Tensor:
    """[B, rows, columns, D] to [B windows, *window, D], zeros added below and to the right."""
    (rows, columns), (height, width) = cells.shape[1:3], window
    padded = F.pad(cells, (0, 0, 0, -columns % width, 0, -rows % height))
    tiled = padded.unflatten(2, (-1, width)).unflatten(1, (-1, height))
    return tiled.transpose(2, 3).flatten(0, 2)


def join_windows(windows: Tensor, grid: tuple[int, int]) -> Tensor:
    """What `split_windows` made of a grid, back to [B, rows, columns, D]."""
    (rows, columns), (height, width) = grid, windows.shape[1:3]
    tiles = -(-rows // height), -(-columns // width)
    tiled = windows.unflatten(0, (-1, *tiles)).transpose(2, 3)
    return tiled.flatten(3, 4).flatten(1, 2)[:, :rows, :columns]


def shifted_windows(
    cells: Tensor, window: tuple[int, int], shift: tuple[int, int], attend: Callable[..., Tensor]
) -> Tensor:
    """Attention within windows that begin `shift` cells down and to the right, on [B, rows, columns,
    D] of any size, to the same shape.

    attend: [B windows, N, D] and a mask to the former's shape, as timm's WindowAttention; the mask
    [windows, N, N] is added to the logits. The grid is rolled, so that windows which the shift cuts
    are joined two by two, as Swin's are; no cell attends from one part to the other, nor to padding.
    An axis of one window is not shifted.
    """
    grid = rows, columns = cells.shape[1:3]
    shift = tuple(by if side > size else 0 for by, side, size in zip(shift, grid, window))
    whole = tuple(side + -side % size for side, size in zip(grid, window))
    padded = F.pad(cells, (0, 0, 0, whole[1] - columns, 0, whole[0] - rows))
    rolled = padded.roll((-shift[0], -shift[1]), (1, 2)) if any(shift) else padded
    mask = _window_mask(grid, whole, window, shift, cells) if any(shift) or whole != grid else None
    attended = attend(split_windows(rolled, window).flatten(1, 2), mask).unflatten(1, window)
    joined = join_windows(attended, whole)
    joined = joined.roll(shift, (1, 2)) if any(shift) else joined
    return joined[:, :rows, :columns]


def _window_mask(
    grid: tuple[int, int],
    whole: tuple[int, int],
    window: tuple[int, int],
    shift: tuple[int, int],
    like: Tensor,
) -> Tensor:
    """[windows, N, N], what keeps each cell of rolled windows from another: minus infinity for
    padding, and -100, as in Swin's code, for the part beyond the border that was joined."""
    parts, real = [], []
    for side, length, by in zip(grid, whole, shift):
        place = torch.arange(length, device=like.device)
        parts.append(place >= length - by)
        real.append(place.roll(-by) < side)
    part = parts[0][:, None] * 2 + parts[1][None]
    seen = (real[0][:, None] & real[1][None])[None, ..., None]
    part, seen = (split_windows(one, window).flatten(1) for one in (part[None, ..., None], seen))
    mask = like.new_zeros(len(part), window[0] * window[1], window[0] * window[1])
    mask = mask.masked_fill(part[:, :, None] != part[:, None], -100.0)
    return mask.masked_fill(~seen[:, None], -torch.inf)
