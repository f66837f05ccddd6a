"""What every text tower and its tokenizer offer. B texts, L tokens, W channels of a tower."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

Keys = tuple[dict[str, tuple[int, ...]], Callable[[str], Tensor]]  # shapes by name, a reader of one


class Tokenizer:
    """Texts to ids of one length. `room` is how many tokens of a text itself fit into it."""

    room: int

    def count(self, text: str) -> int:
        """The tokens of a text itself, before any are cut off; 0 for a text without content."""
        raise NotImplementedError

    def __call__(self, texts: list[str]) -> Tensor:
        """int64 [B, L]: what does not fit is cut off at the end; ask `count` first to know."""
        raise NotImplementedError


class Tower(nn.Module):
    """Encodes texts. A family is one file of this folder; its constructor's keywords are its options."""

    width: int  # W
    context: int  # the longest L, tokens that mark the start and the end included
    # What fills a text up to L where a feature is the same without it, so that a batch may end with
    # its longest text; None where it is not.
    padding: int | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [B, L] to one feature [B, W] a text, after the final norm and before any
        projection."""
        raise NotImplementedError

    def tokenizer(self) -> Tokenizer:
        """What makes this tower's tokens; raises ValueError where its file is missing."""
        raise NotImplementedError

    def save_tokenizer(self, folder: Path) -> None:
        """Writes what open_clip's loader of a folder needs beside the weights, if anything."""

    def init_non_persistent_buffers(self) -> None:
        """Recomputes what no checkpoint holds, after the tower was moved from the meta device."""

    def no_weight_decay(self) -> set[str]:
        """timm's name for the parameters without weight decay, beside all 1-d ones."""
        return set()

    def adopt(
        self,
        shapes: dict[str, tuple[int, ...]],
        read: Callable[[str], Tensor],
        options: dict[str, Any],
    ) -> Keys:
        """The tensors of a public checkpoint of this family under this tower's names; a key that is
        not known keeps its name, so that it shows as left over.

        options: what is known of the model that they are of. Raises ValueError if this tower would
        compute other features with them.
        """
        raise NotImplementedError

    def open_clip(self) -> dict[str, Any]:
        """The `text_cfg` with which open_clip builds this tower, with a bias-free projection.

        Raises ValueError where open_clip has no such tower.
        """
        raise ValueError(
            "model.text: open_clip cannot load this tower under its own keys. Only "
            "model.text.name=open_clip is exported to it."
        )
