"""Entry points of torch.hub: `load(name)`, and one for each released model.

    torch.hub.load("path/to/this/checkout", "maws_vit_l16", source="local", image_size=448)

A model's entry is its name with underscores for "/" and ".".
"""

from functools import partial

from prepretrain import load
from prepretrain.zoo import releases as zoo

dependencies = [
    *("torch", "torchvision", "timm", "open_clip", "numpy", "PIL"),
    *("safetensors", "filelock", "tqdm"),
]


def _entry(row: zoo.Release) -> partial:
    entry = partial(load, row.name)
    entry.__doc__ = f"{row.name}: {row.metric['name']} {row.metric['value']:g}. {row.licence}."
    return entry


globals().update(
    {row.name.replace("/", "_").replace(".", "_"): _entry(row) for row in zoo.releases().values()}
)
