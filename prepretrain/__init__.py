"""Makes visual foundation models in two stages: masked autoencoding, then weak supervision."""

from typing import Any

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    """`prepretrain.load`, found when asked for: `import prepretrain` alone imports no torch."""
    if name == "load":
        from prepretrain.models.load import load

        return load
    raise AttributeError(f"module 'prepretrain' has no attribute '{name}'")
