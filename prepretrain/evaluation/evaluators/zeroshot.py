"""Zero-shot classification: the class whose name, put into prompts, lies nearest to the image."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prepretrain.data.card import check_names, check_templates
from prepretrain.distributed import group as distributed
from prepretrain.evaluation.evaluators.base import (
    ContrastiveEvaluator,
    class_count,
    class_names,
    per_class,
    require,
)
from prepretrain.evaluation.features import extract_texts
from prepretrain.training.log import logger


class Zeroshot(ContrastiveEvaluator):
    """CLIP's protocol (arXiv 2103.00020, section 3.1.4; MAWS, arXiv 2303.13496, section 4.3): every
    template with every name of a class, the mean of their unit features, at length 1 again.

    data           the card; accuracy is measured on all of `split`
    split          its split
    names          "card": its `names`, else its `classes`, else the source's own; "imagenet": the
                   1000 names of open_clip
    templates      "card": its `templates`, and open_clip's 80 where it has none; "imagenet": those
                   80; "simple": open_clip's seven; "none": the name alone
    language       which of the card's names and templates, where it has several
    share          of the image's short side that the centre crop shows; MAWS resizes to the crop
    feature_batch  images or texts at once a process;  workers: as data.workers

    Results are `top1`, `top5` where there are more than five classes, `mean_per_class` over the
    classes that there are images of, `images`, and `cut_prompts`, those longer than the tower reads.
    """

    headline = "top1"

    def __init__(
        self,
        *,
        data: str,
        split: str = "val",
        names: Literal["card", "imagenet"] = "card",
        templates: Literal["card", "imagenet", "simple", "none"] = "card",
        language: str = "en",
        share: float = 1.0,
        feature_batch: int = 256,
        workers: int | None = None,
    ):
        super().__init__(
            data=data, split=split, share=share, feature_batch=feature_batch, workers=workers
        )
        known = sorted({"en", *self.card.names, *self.card.templates})
        require(language in known, "zeroshot.language", language, f"is one of {', '.join(known)}")
        self.names, self.templates, self.language = names, templates, language

    def run(self, model: nn.Module, folder: Path) -> dict[str, float]:
        """Accuracies on the split, each image counted once."""
        self.check(model)
        source = self.open_data()[self.split]
        weight, cut = self.weight(model, source)
        features, labels = self.images(model, source)
        if int(labels.max()) >= len(weight) or class_count(self.card, labels) > len(weight):
            raise ValueError(
                f"zeroshot.names: '{self.names}' names {len(weight)} classes, and the labels of "
                f"{self.card.name}:{self.split} go to {int(labels.max())}."
            )
        scores = features @ weight.T
        measure = lambda kept: per_class(scores[kept], labels[kept])
        found = self.certify(measure, self.leaked(source))
        return distributed.from_main(found | {"images": len(labels), "cut_prompts": cut})

    def weight(self, model: nn.Module, source: Any) -> tuple[Tensor, int]:
        """The texts of a source's classes [classes, J], and how many were cut: see `classifier`."""
        names, templates = self.class_names(source), self.prompts()
        return classifier(model, names, templates, batch_size=self.feature_batch)

    def class_names(self, source: Any) -> list[list[str]]:
        """Each class's names. Raises ValueError if there are none, or two classes share one."""
        if self.names == "imagenet":
            from open_clip import IMAGENET_CLASSNAMES  # has two pairs of equal names, as published

            return [[name] for name in IMAGENET_CLASSNAMES]
        return class_names(self.card, source, self.language)

    def prompts(self) -> Sequence[str]:
        """The templates, each with {} for a name."""
        if self.templates == "none":
            return ["{}"]
        if self.templates == "card" and self.language in self.card.templates:
            return self.card.templates[self.language]
        if self.language != "en":
            raise ValueError(
                f"{self.card.path}: has no templates in '{self.language}'. Add "
                f"templates: {{{self.language}: […]}}, or take zeroshot.templates=none."
            )
        from open_clip import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

        simple = self.templates == "simple"
        chosen = SIMPLE_IMAGENET_TEMPLATES if simple else OPENAI_IMAGENET_TEMPLATES
        return [template("{}") for template in chosen]


def classifier(
    model: nn.Module, names: list[list[str]], templates: Sequence[str], *, batch_size: int = 256
) -> tuple[Tensor, int]:
    """[classes, J] of length 1: for each class the mean over templates and synonyms; and how many
    prompts were longer than the tower reads, which is also logged.

    Raises ValueError for names or templates that are empty.
    """
    texts = [t.replace("{}", name) for row in names for name in row for t in templates]
    features, cut = extract_texts(model, texts, batch_size=batch_size)
    if cut:
        logger.warning("%d of %d prompts are longer than the tower reads, and cut", cut, len(texts))
    sizes = [len(row) * len(templates) for row in names]
    means = torch.stack([part.mean(0) for part in features.split(sizes)])
    return nn.functional.normalize(means, dim=1), cut


def probabilities(
    model: nn.Module, images: Tensor, names: list[str], templates: Sequence[str]
) -> Tensor:
    """uint8 [B, 3, H, W] to [B, names]: how likely each name is; they sum to 1, but for a model with
    a bias (trained with the sigmoid loss), where each stands alone.

    Raises ValueError for names that are empty or not different, or a template without {}.
    """
    model.require_text("zero-shot classification")
    check_names([[name] for name in names], "--names")
    check_templates(list(templates), "--template")
    weight, _ = classifier(model, [[name] for name in names], templates)
    with torch.no_grad():
        image = model.features(images, pool="joint").cpu()
        scale, bias = (value.cpu() for value in model.joint(None, None)[2:])
    logits = scale * image @ weight.T + bias
    return logits.softmax(1) if model.joint.logit_bias is None else logits.sigmoid()
