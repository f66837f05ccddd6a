"""Published numbers to lay beside one's own: those of the released checkpoints (releases.py), and those
of MAWS's tables.

The tables are of the ICCV 2023 camera-ready of "The effectiveness of MAE pre-pretraining for
billion-scale pretraining" (arXiv 2303.13496 is the preprint; its third version and the README
of the released models hold later numbers, which are the zoo's). They are copied from the paper's
text. Where that text had lost a table's alignment, its columns were put back by hand, and `checked`
is False: look at the paper before publishing such a number.
"""

from dataclasses import dataclass

from prepretrain import plugin
from prepretrain.zoo import releases as zoo

_PAPER = "MAWS at ICCV 2023 (preprint: https://arxiv.org/abs/2303.13496)"


@dataclass(frozen=True)
class Row:
    """What one source says of one model. A metric's name says the data and the protocol, so that two
    numbers under one name can be compared."""

    name: str  # group/model
    metrics: dict[str, float]
    source: str
    checked: bool = True  # False: the columns of the source's table were re-aligned by hand

    @property
    def group(self) -> str:
        """The part of the name before the slash."""
        return self.name.partition("/")[0]


def groups() -> list[str]:
    """Whose numbers there are."""
    return sorted({row.group for row in _all()})


def find(group: str) -> list[Row]:
    """The rows of a group. Raises ValueError for one that there is not."""
    found = [row for row in _all() if row.group == group]
    if not found:
        raise ValueError(plugin.unknown("--published: no group", group, groups(), quote=True))
    return found


def _all() -> list[Row]:
    released = [
        Row(row.name, {row.metric["name"]: row.metric["value"]}, row.source)
        for row in zoo.releases().values()
    ]
    return released + _finetuned() + _linear() + _lowshot() + _zeroshot()


def _finetuned() -> list[Row]:
    """Table 2: model, input size, and ImageNet-1k, ImageNetV2, ImageNet-ReaL and ObjectNet by the
    same fine-tuned model, then iNaturalist 2018. ViT-L: section 4's text."""
    table = (
        ("mae/vit_h", 448, (87.8, None, None, None, 86.8)),
        ("swag/vit_h", 518, (88.6, 81.1, 90.5, 69.5, 86.0)),
        ("dinov2/vit_g", 448, (88.9, None, None, None, None)),
        ("florence/coswin_h", 512, (90.1, None, None, None, None)),
        ("vit/vit_h_jft300m", 518, (88.6, None, 90.7, None, None)),
        ("scale_vit/vit_l", 384, (88.5, 80.4, 90.4, None, None)),
        ("scale_vit/vit_g", 518, (90.5, 83.3, 90.8, 70.5, None)),
        ("swinv2/swinv2_g", 640, (90.2, 84.0, None, None, None)),
        ("coca/2b", 576, (91.0, None, None, None, None)),
        ("maws/vit_h14", 518, (89.3, 82.3, 90.8, 72.6, 90.5)),
        ("maws/vit_2b14", 518, (89.7, 83.0, 90.9, 75.8, 91.3)),
    )
    rows = [
        Row(name, _known(_finetuning(size), values), f"{_PAPER}, Table 2", checked=False)
        for name, size, values in table
    ]
    large = Row("maws/vit_l16", _known(_finetuning(512)[:1], (88.8,)), f"{_PAPER}, text")
    return [*rows, large]


def _finetuning(size: int) -> list[str]:
    others = ("ImageNetV2", "ImageNet-ReaL", "ObjectNet")
    return [
        f"{zoo.TOP1}, fine-tuned at {size}",
        *(f"{data} top-1, fine-tuned on ImageNet-1k at {size}" for data in others),
        f"iNaturalist 2018 top-1, fine-tuned at {size}",
    ]


def _linear() -> list[Row]:
    """The table of linear probes, which has no number; of others' models it gives no input size."""
    table = (
        ("swag/vit_h", 85.8),
        ("openclip/vit_g", 86.2),
        ("dinov2/vit_g", 86.5),
        ("maws/vit_h14", 87.0),
        ("maws/vit_2b14", 88.1),
    )
    metric = f"{zoo.TOP1}, linear probe, size not given"
    return [Row(name, {metric: top1}, f"{_PAPER}, linear probes") for name, top1 in table]


def _lowshot() -> list[Row]:
    """Table 4: 1, 5 and 10 images a class, mean of five splits, of ImageNet-1k, then at most as many
    of iNaturalist 2018. MAWS's by VPT; the others' by the protocol that suits each best."""
    table = (
        ("clip/vit_l", (41.3, 66.2, 71.3), (21.9, 49.0, 58.5)),
        ("openclip/vit_h", (44.3, 70.0, 74.9), (26.0, 54.6, 63.7)),
        ("openclip/vit_g", (46.3, 72.9, 77.2), (26.3, 55.7, 65.1)),
        ("scale_vit/vit_g", (None, 83.0, 84.9), (None, None, None)),
        ("dino/vit_b8", (45.8, 64.6, 69.0), (19.8, 45.9, 55.9)),
        ("msn/vit_l7", (57.1, 72.1, 74.4), (17.0, 38.0, 48.1)),
        ("mae/vit_h", (None, 57.9, 70.8), (None, 48.5, 68.2)),
        ("swag/vit_h", (59.4, 78.7, 81.0), (30.1, 62.8, 72.3)),
        ("maws/vit_h14", (57.1, 79.8, 82.5), (31.7, 67.8, 76.1)),
        ("maws/vit_2b14", (62.1, 81.5, 83.7), (35.5, 72.8, 80.3)),
    )
    rows = []
    for name, *found in table:
        how = "VPT" if name.startswith("maws/") else "its own best protocol"
        metrics: dict[str, float] = {}
        for data, values in zip(("ImageNet-1k", "iNaturalist 2018"), found):
            metrics |= _known([f"{data} top-1, {k}-shot, {how}" for k in (1, 5, 10)], values)
        rows.append(Row(name, metrics, f"{_PAPER}, Table 4", checked=False))
    return rows


def _zeroshot() -> list[Row]:
    """Table 5: ImageNet-1k and Food-101, at the input size that a name gives or at one not given."""
    table = (
        ("clip/vit_l14", 336, 76.2, 93.8),
        ("openclip/vit_h", None, 78.0, 92.5),
        ("openclip/vit_g", None, 80.1, 92.9),
        ("florence/coswin_h", None, 83.7, 95.1),
        ("scale_vit/vit_l_lit", None, 80.8, None),
        ("scale_vit/vit_g_lit", 288, 85.2, None),
        ("coca/2b", None, 86.3, None),
        ("maws/vit_h14", None, 80.8, 95.8),
        ("maws/vit_2b14", None, 81.9, 96.2),
    )
    rows = []
    for name, size, *values in table:
        how = "zero-shot, size not given" if size is None else f"zero-shot at {size}"
        names = [f"{zoo.TOP1}, {how}", f"Food-101, {how}"]
        rows.append(Row(name, _known(names, values), f"{_PAPER}, Table 5"))
    return rows


def _known(names: list[str], values: tuple | list) -> dict[str, float]:
    return {name: value for name, value in zip(names, values, strict=True) if value is not None}
