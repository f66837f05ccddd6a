"""The zoo as a person reads it: a table in the terminal, MODEL_ZOO.md."""

import json
from collections.abc import Callable, Sequence

from prepretrain.zoo import releases as zoo
from prepretrain.zoo.releases import Release

# Title and description of each group, in the page's order.
GROUPS = {
    "maws": (
        "MAWS: masked autoencoding, then hashtags",
        "[Singh et al.](https://arxiv.org/abs/2303.13496), pre-trained on 3 billion Instagram images "
        "at 224 pixels. `_ft_in1k` was then fine-tuned on ImageNet-1k; its head is not taken.",
    ),
    "maws_clip": (
        "MAWS with text",
        "The same image encoders with an XLM-R text tower trained on captions.",
    ),
    "mae_ig3b": (
        "MAE on 3 billion Instagram images",
        "MAWS's stage one alone. MAWS's own code calls these `mae`.",
    ),
    "mae_in1k": ("MAE on ImageNet-1k, 2B", "Trained by MAWS's authors with MAE's recipe."),
    "mae_in21k": ("MAE on ImageNet-21k", "Trained by MAWS's authors."),
    "mae": (
        "MAE on ImageNet-1k",
        "[He et al.](https://arxiv.org/abs/2111.06377), facebookresearch/mae. `_ft_in1k` was then "
        "fine-tuned on the mean of the patch tokens without a norm after the last block: its one norm "
        "follows the mean, belongs to the head and is not taken, so use `pool=mean`.",
    ),
    "swag": (
        "SWAG: hashtags alone",
        "[Singh et al.](https://arxiv.org/abs/2201.08371), 3.6 billion Instagram images. The "
        "linear probes are torchvision's, on its conversion of the same weights.",
    ),
    "simmim": (
        "SimMIM on SwinV2: the data-scaling study",
        "[Xie et al.](https://arxiv.org/abs/2206.04664): 63 pre-trainings and the fine-tuning of each. "
        "Without `_ft_in1k` the encoder is as pre-trained (192 pixels, windows of 12), with it as "
        "fine-tuned (224, windows of 14); neither has a class token, so use `pool=mean`.",
    ),
}

OURS = """## Ours

No weights are distributed with this repository yet. These are the models that its own commands make:

| model | made by | encoder | data | figures |
|---|---|---|---|---|
| demo MAE, hashtags from scratch, MAE then hashtags | `make demo` | vit_mini8 | scenes that it makes | \
the table that it prints; [README](README.md) |
| CIFAR-10, two stages at two budgets, two seeds | `benchmarks/cifar10_two_stage.py` | vit_mini4 | \
50,000 photos | [benchmarks/results/cifar10_two_stage.json](benchmarks/results/cifar10_two_stage.json) |

A run's folder loads by its path, `load("runs/demo/wsp")`. An export (`python tools/export.py runs/demo/wsp`)
loads in timm with strict keys:

    timm.create_model("local-dir:runs/demo/wsp/export", pretrained=True)
"""

HEAD = """# Model zoo

<!-- Written by `python tools/zoo.py write` from prepretrain/zoo/releases.py. -->

{count} released checkpoints of others load by name, and every key of a file is accounted for:

    import prepretrain
    model = prepretrain.load("maws/vit_l16")                 # uint8 [B, 3, 224, 224] in, normalised inside
    features = model.features(images)                        # [B, 1024]

`prepretrain.load("mae/vit_h14", image_size=448)` resamples the positions. `--init maws/vit_l16` starts a stage from
one. `torch.hub.load(".", "maws_vit_l16", source="local")` does the same as `load`. No file is ever unpickled.

    python tools/zoo.py list [--json]          # all, with addresses, preprocessing, sources
    python tools/zoo.py fetch maws/vit_l16     # downloads, prints where it lies
    python tools/zoo.py verify maws/vit_l16    # a name or a file: against what was published and recorded

Files lie in `PREPRETRAIN_CACHE` (default `~/.cache/prepretrain`), one place for each address. A cut download is
continued. None of these releases publishes a checksum (MAE's give six digits of an md5, which are checked): size and
sha256 are recorded beside a file when it first comes, and checked each time it is opened. `PREPRETRAIN_OFFLINE=1`
forbids the network; an error then says what to put where by hand.

Mean and deviation of the images are ImageNet's for all. The figures are their authors', not measured here.
"""


def text(rows: Sequence[Release]) -> str:
    """A table of releases for a terminal."""
    cells = [("name", "encoder", "px", "metric", "", "licence", "here")]
    for row in rows:
        here = "yes" if row.place.is_file() else ""
        size, value = str(row.preprocessing["image_size"]), f"{row.metric['value']:g}"
        licence = row.licence.partition(" (")[0]
        encoder = f"{row.encoder}+{row.text}" if row.text else row.encoder
        cells.append((row.name, encoder, size, row.metric["name"], value, licence, here))
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths)).rstrip() for line in cells]
    return "\n".join(lines)


def as_json(rows: Sequence[Release]) -> str:
    """Releases as a JSON list of objects."""
    return json.dumps([row.describe() for row in rows], indent=1)


def markdown() -> str:
    """The content of MODEL_ZOO.md."""
    rows = list(zoo.releases().values())
    parts = [HEAD.format(count=len(rows))]
    for group, (title, about) in GROUPS.items():
        members = [row for row in rows if row.group == group]
        parts.append(_group(title, about, members, _grid if group == "simmim" else _table))
    return "\n".join([*parts, OURS])


def _group(title: str, about: str, rows: list[Release], body: Callable) -> str:
    first = rows[0]
    pixels, pool = (
        first.preprocessing["image_size"],
        ", pool='mean'" if first.pool != "class" else "",
    )
    if first.text:
        example = (
            f'    model = prepretrain.load("{first.name}")    # its tokenizer is fetched with it\n'
            f'    features = model.features(images, pool="joint")    # of length 1, as text_features'
        )
    else:
        example = (
            f'    model = prepretrain.load("{first.name}")\n'
            f"    features = model.features(images{pool})    # uint8 [B, 3, {pixels}, {pixels}]"
        )
    source = f"Licence: {first.licence}. Source: {first.source.partition(';')[0]}"
    return f"## {title}\n\n{about}\n\n{example}\n\n{source}\n\n{body(rows)}\n"


def _table(rows: list[Release]) -> str:
    lines = ["| name | encoder | metric | | file |", "|---|---|---|--:|---|"]
    for row in rows:
        encoder = f"{row.encoder} + {row.text}" if row.text else row.encoder
        file = f"[{row.url.rpartition('/')[2]}]({row.url})"
        value = f"{row.metric['value']:g}"
        lines.append(f"| `{row.name}` | {encoder} | {row.metric['name']} | {value} | {file} |")
    return "\n".join(lines)


def _grid(rows: list[Release]) -> str:
    """The study's own table: 63 runs, each with what it reached before and after fine-tuning."""
    lines = [
        "Validation loss of `simmim/<row>_<column>`, then ImageNet-1k top-1 of "
        "`simmim/<row>_<column>_ft_in1k`, as in `simmim/swinv2_b_1k_500k_ft_in1k`. `1kper10` is a "
        "tenth of ImageNet-1k, `22k` all of ImageNet-22k; columns are thousands of steps.",
        "",
        "| | 125k | 250k | 500k |",
        "|---|--:|--:|--:|",
    ]
    values = {row.name: row.metric["value"] for row in rows}
    stems = dict.fromkeys(n.rpartition("_")[0] for n in values if not n.endswith("_ft_in1k"))
    for stem in stems:
        runs = [f"{stem}_{steps}" for steps in ("125k", "250k", "500k")]
        cells = [f"{values[run]:.4f} / {values[f'{run}_ft_in1k']:.2f}" for run in runs]
        lines.append(f"| `{stem.partition('/')[2]}` | {' | '.join(cells)} |")
    return "\n".join(lines)
