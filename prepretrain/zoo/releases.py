"""The table of released checkpoints: what each is, where it lies, and how its keys are read.

Every number is copied from the place that `source` names.
"""

import difflib
import functools
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prepretrain.files import cache_folder
from prepretrain.zoo import download
from prepretrain.zoo.download import Expected

_GITHUB = "https://github.com"
MAWS = f"{_GITHUB}/facebookresearch/maws/blob/cce939c47bd8f905bdb50732b445772690defcd4/README.md"
MAE = f"{_GITHUB}/facebookresearch/mae/blob/efb2a8062c206524e35e47d04501ed4f544c0ae8"
SWAG = f"{_GITHUB}/facebookresearch/SWAG/blob/77b98f5dd4cab6ad81ea67ce0fbbdbb150ed32f4/README.md"
SIMMIM = f"{_GITHUB}/microsoft/Swin-Transformer/blob/f82860bfb5225915aca09c3227159ee9e1df874d/MODELHUB.md"

# The mean and deviation with which every one of these releases is evaluated in its own code.
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}

TOP1 = "ImageNet-1k top-1"


@dataclass(frozen=True, kw_only=True)
class Release:
    """One released file. Patterns are regular expressions that must match a whole key."""

    name: str  # group/size[_what was done with it]
    url: str
    encoder: str  # a size's name
    options: dict[str, Any]  # the encoder's, beside its size
    preprocessing: dict[str, Any]  # see `_preprocessing`
    licence: str
    metric: dict[str, Any]  # {"name", "value"}, as published
    source: str  # where url and metric are published
    pool: str = "class"  # which tokens its authors pool: class or mean
    text: str | None = None  # the text tower, xlmr_b or xlmr_l
    joint: int | None = None  # channels of the space that images and texts share
    classes: int | None = None  # of its classifier, if it was fine-tuned
    rename: tuple[tuple[str, str], ...] = ()  # (pattern, replacement), applied in order
    unused: tuple[str, ...] = ()  # patterns of the keys that are no part of the model
    note: str = ""
    expected: Expected = Expected()

    @property
    def group(self) -> str:
        """The part of the name before the slash."""
        return self.name.partition("/")[0]

    @property
    def model(self) -> dict[str, Any]:
        """The options that make its Model."""
        options = {"encoder": self.encoder, **self.options, **IMAGENET}
        if self.classes is not None:
            norm = not self.options.get("final_norm", True)
            options["head"] = {"classes": self.classes, "pool": self.pool, "norm": norm}
        if self.text is None:
            return options
        text = {"name": "xlmr", "size": {"xlmr_b": "base", "xlmr_l": "large"}[self.text]}
        return {**options, "text": text, "joint": {"width": self.joint}}

    @property
    def place(self) -> Path:
        """Where its file lies once it is here."""
        return download.place(self.url)

    def describe(self) -> dict[str, Any]:
        """The row as plain values: what `tools/zoo.py list --json` prints. Size and sha256 are those
        published, else those recorded when the file came, else None."""
        known = download.recorded(self.place) or {}
        size = {"image_size": self.preprocessing["image_size"]}
        architecture = {"encoder": self.encoder, **size, **self.options, "pool": self.pool}
        return {
            "name": self.name,
            "url": self.url,
            "architecture": architecture | ({"text": self.text} if self.text else {}),
            "preprocessing": self.preprocessing,
            "licence": self.licence,
            "metric": self.metric,
            "source": self.source,
            "size": self.expected.size or known.get("size"),
            "sha256": self.expected.sha256 or known.get("sha256"),
            "note": self.note,
        }


def _preprocessing(image_size: int, resize: int | list[int] | None) -> dict[str, Any]:
    """resize: what the shorter side becomes before the centre crop; [height, width] for a resize
    without a crop; None where no evaluation is published."""
    crop = image_size if isinstance(resize, int) else None
    how = {"image_size": image_size, "resize": resize, "crop": crop, "interpolation": "bicubic"}
    return {**IMAGENET, **how}


def _metric(name: str, value: float) -> dict[str, Any]:
    return {"name": name, "value": value}


_FINE = f"{TOP1}, fine-tuned at"
_NC = "CC-BY-NC-4.0"
TOKENIZER = "xlmr.sentencepiece.bpe.model"
_MAWS_FILES = "https://dl.fbaipublicfiles.com/maws"


def _maws() -> list[Release]:
    """The 21 of MAWS: its README's tables, its eval_*.py for the preprocessing."""
    shared = {"licence": _NC, "source": MAWS}
    # size: linear @224, fine-tuned size and top-1 (as its script prints it), zero-shot and its
    # text tower, MAE on IG-3B fine-tuned @224
    table = {
        "vit_b16": (83.3, 512, 86.832, 74.9, "xlmr_b", 83.5),
        "vit_l16": (86.1, 512, 88.796, 79.7, "xlmr_l", 86.1),
        "vit_h14": (87.5, 518, 89.502, 81.1, "xlmr_l", 87.4),
        "vit_2b14": (88.1, 518, 89.752, 82.1, "xlmr_l", 87.8),
        "vit_6.5b14": (88.6, 518, 90.064, None, None, 88.3),
    }
    rows = []
    for size, (linear, pixels, tuned, zeroshot, text, mae) in table.items():
        plain = {**shared, "encoder": size, "options": {}}
        rows += [
            Release(
                name=f"maws/{size}",
                url=f"{_MAWS_FILES}/pretrain/maws/{size}.pt",
                preprocessing=_preprocessing(224, 224),
                metric=_metric(f"{TOP1}, linear probe at 224", linear),
                **plain,
            ),
            Release(
                name=f"maws/{size}_ft_in1k",
                url=f"{_MAWS_FILES}/finetune/in1k/maws/{size}_{pixels}.pt",
                preprocessing=_preprocessing(pixels, [pixels, pixels]),
                metric=_metric(f"{_FINE} {pixels}", tuned),
                classes=1000,
                **{**plain, "options": {"image_size": pixels}},
            ),
            Release(
                name=f"mae_ig3b/{size}",
                url=f"{_MAWS_FILES}/pretrain/mae/{size}.pt",
                preprocessing=_preprocessing(224, None),
                metric=_metric(f"{_FINE} 224", mae),
                **plain,
            ),
        ]
        if text is not None:
            rows.append(
                Release(
                    name=f"maws_clip/{size}_{text}",
                    url=f"{_MAWS_FILES}/pretrain/clip/{size}_{text}.pt",
                    preprocessing=_preprocessing(224, 224),
                    metric=_metric(f"{TOP1}, zero-shot at 224", zeroshot),
                    text=text,
                    joint={"vit_b16": 768, "vit_2b14": 2048}.get(size, 1024),
                    **plain,
                )
            )
    for group, size, pixels, value in (
        ("mae_in1k", "vit_2b14", 224, 87.4),
        ("mae_in21k", "vit_l16", 512, 86.9),
    ):
        rows.append(
            Release(
                name=f"{group}/{size}",
                url=f"{_MAWS_FILES}/pretrain/{group}/{size}.pt",
                encoder=size,
                options={},
                preprocessing=_preprocessing(224, None),
                metric=_metric(f"{_FINE} {pixels}", value),
                **shared,
            )
        )
    return rows


def _mae() -> list[Release]:
    """facebookresearch/mae: README.md for the pre-trained, FINETUNE.md for the fine-tuned, with the
    six digits of md5 that they give; util/datasets.py for the preprocessing."""
    files = "https://dl.fbaipublicfiles.com/mae"
    table = (
        ("vit_b16", "base", 83.6, "8cad7c", 83.664, "1b25e9"),
        ("vit_l16", "large", 85.9, "b8b06e", 85.952, "51f550"),
        ("vit_h14", "huge", 86.9, "9bdbb0", 86.928, "2541f2"),
    )
    rows = []
    for size, long, value, md5, tuned, tuned_md5 in table:
        plain = {"encoder": size, "licence": _NC, "preprocessing": _preprocessing(224, 256)}
        rows += [
            Release(
                name=f"mae/{size}",
                url=f"{files}/pretrain/mae_pretrain_vit_{long}.pth",
                options={},
                metric=_metric(f"{_FINE} 224", value),
                source=f"{MAE}/README.md",
                expected=Expected(md5=md5),
                **plain,
            ),
            Release(
                name=f"mae/{size}_ft_in1k",
                url=f"{files}/finetune/mae_finetuned_vit_{long}.pth",
                options={"final_norm": False},
                pool="mean",
                metric=_metric(f"{_FINE} 224", tuned),
                source=f"{MAE}/FINETUNE.md",
                classes=1000,
                note="no norm after the last block: its one norm follows the mean over the patches, and "
                "belongs to the classifier",
                expected=Expected(md5=tuned_md5),
                **plain,
            ),
        ]
    return rows


# SWAG's names, and those of torchvision's conversion of the same files.
SWAG_NAMES = (
    (r"class_token", "cls_token"),
    (r"conv_proj\.(.+)", r"patch_embed.proj.\1"),
    (r"encoder\.pos_embedding", "pos_embed"),
    (r"encoder\.ln\.(.+)", r"norm.\1"),
    (r"head\.layers\.head\.(.+)", r"head.\1"),
    (r"encoder\.layers\.(?:encoder_)?layer_(\d+)\.(.+)", r"blocks.\1.\2"),
    (r"(blocks\.\d+)\.ln_([12])\.(.+)", r"\1.norm\2.\3"),
    (r"(blocks\.\d+)\.self_attention\.in_proj_(.+)", r"\1.attn.qkv.\2"),
    (r"(blocks\.\d+)\.self_attention\.out_proj\.(.+)", r"\1.attn.proj.\2"),
    (r"(blocks\.\d+)\.mlp\.(?:linear_1|0)\.(.+)", r"\1.mlp.fc1.\2"),
    (r"(blocks\.\d+)\.mlp\.(?:linear_2|3)\.(.+)", r"\1.mlp.fc2.\2"),
)


def _swag() -> list[Release]:
    """SWAG's ViTs: its README, its imagenet_1k_eval.py for the preprocessing; the linear probes are
    torchvision's, on the same weights."""
    files = "https://dl.fbaipublicfiles.com/SWAG"
    table = (
        ("vit_b16", "ViT_B_16", 81.886, 384, 85.29),
        ("vit_l16", "ViT_L_16", 85.146, 512, 88.07),
        ("vit_h14", "ViT_H_14", 85.708, 518, 88.55),
    )
    rows = []
    for size, weights, linear, pixels, tuned in table:
        plain = {"encoder": size, "licence": _NC, "rename": SWAG_NAMES}
        rows += [
            Release(
                name=f"swag/{size}",
                url=f"{files}/{size}.torch",
                options={},
                preprocessing=_preprocessing(224, 224),
                metric=_metric(f"{TOP1}, linear probe at 224", linear),
                source=f"{SWAG}; the metric: torchvision.models, {weights}_Weights."
                "IMAGENET1K_SWAG_LINEAR_V1",
                **plain,
            ),
            Release(
                name=f"swag/{size}_ft_in1k",
                url=f"{files}/{size}_in1k.torch",
                options={"image_size": pixels},
                preprocessing=_preprocessing(pixels, pixels),
                metric=_metric(f"{_FINE} {pixels}", tuned),
                source=SWAG,
                classes=1000,
                **plain,
            ),
        ]
    return rows


# Size and data: (validation loss, fine-tuned top-1) after 125, 250 and 500 thousand steps.
SIMMIM_RUNS = {
    ("small", "1kper10"): ((0.4820, 82.69), (0.4961, 83.11), (0.5115, 83.17)),
    ("small", "1kper20"): ((0.4751, 83.05), (0.4722, 83.56), (0.4734, 83.75)),
    ("small", "1kper50"): ((0.4732, 83.04), (0.4681, 83.67), (0.4646, 83.96)),
    ("small", "1k"): ((0.4728, 82.92), (0.4674, 83.66), (0.4641, 84.08)),
    ("base", "1kper10"): ((0.4822, 83.33), (0.4997, 83.60), (0.5112, 83.41)),
    ("base", "1kper20"): ((0.4703, 83.86), (0.4679, 84.37), (0.4711, 84.61)),
    ("base", "1kper50"): ((0.4683, 84.04), (0.4633, 84.57), (0.4598, 84.95)),
    ("base", "1k"): ((0.4680, 84.13), (0.4626, 84.65), (0.4588, 85.04)),
    ("base", "22k"): ((0.4695, 84.11), (0.4649, 84.57), (0.4614, 85.11)),
    ("large", "1kper10"): ((0.4995, 83.69), (0.5140, 83.66), (0.5150, 83.50)),
    ("large", "1kper20"): ((0.4675, 84.38), (0.4746, 84.71), (0.4960, 84.59)),
    ("large", "1kper50"): ((0.4622, 84.78), (0.4566, 85.38), (0.4530, 85.80)),
    ("large", "1k"): ((0.4611, 84.98), (0.4552, 85.45), (0.4507, 85.91)),
    ("large", "22k"): ((0.4649, 84.61), (0.4586, 85.39), (0.4536, 85.81)),
    ("huge", "1kper20"): ((0.4789, 84.35), (0.5038, 84.16), (0.5071, 83.44)),
    ("huge", "1kper50"): ((0.4549, 85.09), (0.4511, 85.64), (0.4559, 85.69)),
    ("huge", "1k"): ((0.4531, 85.23), (0.4464, 85.90), (0.4416, 86.34)),
    ("huge", "22k"): ((0.4564, 85.14), (0.4499, 85.86), (0.4444, 86.27)),
    ("giant", "1kper50"): ((0.4534, 85.44), (0.4515, 85.76), (0.4719, 85.51)),
    ("giant", "1k"): ((0.4513, 85.57), (0.4442, 86.12), (0.4395, 86.46)),
    ("giant", "22k"): ((0.4544, 85.39), (0.4475, 85.96), (0.4416, 86.53)),
}


def _simmim() -> list[Release]:
    """The 63 pre-trained and 63 fine-tuned SwinV2 of arXiv 2206.04664: MODELHUB.md; windows and
    sizes from configs/simmim, preprocessing from data/data_simmim_ft.py."""
    files = "https://huggingface.co/zdaxie/SimMIM/resolve/main"
    rows = []
    for (long, data), results in SIMMIM_RUNS.items():
        for steps, (loss, tuned) in zip(("125k", "250k", "500k"), results):
            run = f"{data}_{steps}"
            plain = {
                "encoder": f"swinv2_{long[0]}",
                "licence": "MIT (microsoft/Swin-Transformer, which lists the file)",
                "source": SIMMIM,
                "pool": "mean",
            }
            rows += [
                Release(
                    name=f"simmim/swinv2_{long[0]}_{run}",
                    url=f"{files}/simmim_swinv2_pretrain_models/swinv2_{long}_{run}.pth"
                    "?download=true",
                    options={"image_size": 192, "window": 12},
                    preprocessing=_preprocessing(192, None),
                    metric=_metric("SimMIM validation loss", loss),
                    unused=(r"encoder\.mask_token", r"decoder\.0\.(weight|bias)"),
                    **plain,
                ),
                Release(
                    name=f"simmim/swinv2_{long[0]}_{run}_ft_in1k",
                    url=f"{files}/simmim_swinv2_finetune_models/finetune_swinv2_{long}_{run}.pth"
                    "?download=true",
                    options={
                        "image_size": 224,
                        "window": 14,
                        "pretrained_windows": [12, 12, 12, 6],
                    },
                    preprocessing=_preprocessing(224, 256),
                    metric=_metric(f"{_FINE} 224", tuned),
                    classes=1000,
                    **plain,
                ),
            ]
    return rows


@functools.cache
def releases() -> dict[str, Release]:
    """Every row by its name."""
    rows = [*_maws(), *_mae(), *_swag(), *_simmim()]
    table = {row.name: row for row in sorted(rows, key=lambda r: ORDER.index(r.group))}
    assert len(table) == len(rows)
    return table


ORDER = ("maws", "maws_clip", "mae_ig3b", "mae_in1k", "mae_in21k", "mae", "swag", "simmim")


def find(name: str) -> Release:
    """The row of a name. Raises ValueError with the nearest name for an unknown one."""
    if name in releases():
        return releases()[name]
    raise ValueError(f"no released model '{name}'. {nearest(name)}")


def nearest(name: str) -> str:
    """A sentence that offers the name that comes nearest to an unknown one."""
    near = difflib.get_close_matches(name, releases(), n=1)
    text = f"Did you mean '{near[0]}'? " if near else ""
    return f"{text}`python tools/zoo.py list` shows all {len(releases())} released models."


def fetch(name: str) -> Path:
    """A release's file on this machine, downloaded if it is not here; see download.fetch."""
    row = find(name)
    return download.fetch(row.url, row.expected, accept=check_container)


def tokenizer(name: str) -> Path:
    """The SentencePiece model that a release's text tower reads with, downloaded if it is not
    here. Raises ValueError for a release without one."""
    if find(name).text is None:
        raise ValueError(f"{name}: has no text tower, and so no tokenizer.")
    return download.fetch(f"{_MAWS_FILES}/pretrain/clip/xlmr_tokenizer/{TOKENIZER}")


def verify(source: str) -> dict[str, Any]:
    """{"path", "url", "size", "sha256", "date"} of a release's cached file or of a file with a
    record beside it, after checking it against both. Raises ValueError for what does not agree."""
    path = Path(source)
    if not path.is_file():
        row = find(source)
        if not row.place.is_file():
            raise ValueError(
                f"{source}: is not here yet, but would be {row.place}. Get it with "
                f"`python tools/zoo.py fetch {source}`."
            )
        path = row.place
    rows = [r for r in releases().values() if r.place == path.resolve() or r.place == path]
    known = download.recorded(path)
    if not rows and known is None:
        raise ValueError(
            f"{path}: is no release in {cache_folder()} and has no record beside it: there is "
            f"nothing to verify it against."
        )
    check_container(path)
    url, expected = (rows[0].url, rows[0].expected) if rows else (known["url"], Expected())
    return {"path": str(path), **download.verify(path, url, expected)}


def check_container(path: Path) -> None:
    """Raises ValueError for a file that cannot hold weights: a web page, or a zip that was cut."""
    with path.open("rb") as file:
        start = file.read(9)
    zipped, pickled = start.startswith(b"PK"), start.startswith(b"\x80\x02")
    if not zipped and not pickled and start[8:9] != b"{":  # safetensors: a length, then JSON
        raise ValueError(f"{path}: is no file of weights: it begins with {start!r}")
    if zipped and not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: is cut: its end is missing")
