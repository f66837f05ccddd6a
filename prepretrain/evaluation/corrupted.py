"""What an evaluator of pictures measures under corruptions."""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from prepretrain.evaluation.corruptions import Corrupt


def measured(
    measure: Callable[[Corrupt, str], dict[str, float]],
    clean: dict[str, float],
    names: Sequence[str],
    severities: Sequence[int],
    textures: Any,
    quoted: Mapping[str, str],
) -> dict[str, float]:
    """Metrics under each corruption and severity, and their means (arXiv 1907.07484).

    measure: of a corruption, and what its results are called. clean: without one. quoted: the
    metrics, and what stands before `mPC`, their mean over all corruptions, and `rPC`, its share of
    the clean metric in percent.
    """
    found: dict[str, float] = {}
    for name in names:
        for severity in severities:
            where = f"corruption/{name}/{severity}"
            metrics = measure(Corrupt(name, severity, "imagenet", textures), where)
            found |= {f"{where}/{key}": metrics[key] for key in quoted}
        for key in quoted:
            each = [found[f"corruption/{name}/{severity}/{key}"] for severity in severities]
            found[f"corruption/{name}/{key}"] = fmean(each)
    for key, before in quoted.items():
        mean = fmean(found[f"corruption/{name}/{key}"] for name in names)
        found[f"{before}mPC"] = mean
        if clean[key] > 0:
            found[f"{before}rPC"] = 100 * mean / clean[key]
    return found
