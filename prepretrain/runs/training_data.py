"""Opens what a run trains on: its parts as one source, and the order in which images come."""

from dataclasses import dataclass, replace
from pathlib import Path

from prepretrain.config import Data
from prepretrain.data.card import data_folder
from prepretrain.data.order import Interleaved, Order
from prepretrain.data.sampling import mix, weights
from prepretrain.data.sampling.resample import resample
from prepretrain.data.sources.base import Source
from prepretrain.objectives.base import Objective


@dataclass(frozen=True)
class TrainingData:
    """A source with the fields that an objective needs, an order of its images, and how many images an
    epoch of each part holds."""

    source: Source
    order: Order | Interleaved
    part_images: tuple[int, ...]


def open_parts(
    data: Data,
    parts: list[mix.Part],
    objective: Objective,
    *,
    seed: int,
    vocabulary: str | None,
    opened: dict[str, Source],
) -> TrainingData:
    """The training data that an objective has found fit. All processes call it together.

    vocabulary: the objective's, if it has one. opened: the sources by address, to which those that
    are opened here are added.
    """
    sources = [_opened(part, opened, len(parts) > 1) for part in parts]
    mix.check_classes(parts, sources, objective.fields)
    names = [part.name for part in parts]
    source = sources[0] if len(parts) == 1 else mix.Mix(names, sources)
    for part in parts:
        objective.check(replace(part.card, name=mix.name(parts)), source)
    repeats = _repeats(data, parts, objective, source, vocabulary)
    chosen, orders, first = [], [], 0
    for part, own in zip(parts, sources):
        own_repeats = repeats and repeats.taken(slice(first, first + len(own)))
        first += len(own)
        some = part.choice.of(own, f"{part.where}.subset")
        if some is not own and own_repeats is not None:
            own_repeats = own_repeats.taken(some.indexes)
        try:
            order = Order(some.groups, seed=seed, window=data.window, repeats=own_repeats)
        except ValueError as error:
            raise ValueError(f"data.train={part.address}: {error}") from error
        chosen.append(some)
        orders.append(order)
    lengths = tuple(order.length for order in orders)
    if len(parts) == 1:
        return TrainingData(chosen[0].only(objective.fields), orders[0], lengths)
    order = Interleaved(orders, [len(some) for some in chosen], [part.share for part in parts])
    for part, count in zip(parts, order.counts):
        if part.share and not count:
            raise ValueError(
                f"{part.where}.share: {part.share} is less than an image of {order.counts.sum():,}, so none "
                f"would come. Raise it, or set it to 0."
            )
    return TrainingData(mix.Mix(names, chosen).only(objective.fields), order, lengths)


def _opened(part: mix.Part, opened: dict[str, Source], mixed: bool) -> Source:
    """A part's source, which holds images."""
    if part.address not in opened:
        opened[part.address] = part.card.open(part.split)
    source = opened[part.address]
    if mixed and not len(source):
        raise ValueError(f"{part.where}.card: {part.address} holds no image. Check its path.")
    return source


def _repeats(
    data: Data,
    parts: list[mix.Part],
    objective: Objective,
    source: Source,
    vocabulary: str | None,
) -> weights.Weights | None:
    """How often each image comes by all that says so: files of a curation, the objective, and
    data.resample."""
    wanted = objective.repeats(source)
    repeats = weights.product(source.weights, None if wanted is None else weights.of(wanted))
    if data.resample is None:
        return repeats
    law = resample(data.resample, "data.resample")
    path = _vocabulary(law.vocabulary or vocabulary, parts)
    return weights.product(repeats, law.weights(path, source, repeats, "data.resample"))


def _vocabulary(named: str | None, parts: list[mix.Part]) -> Path:
    if named is not None:
        return data_folder() / named
    if len(parts) == 1 and parts[0].card.vocabulary is not None:
        return parts[0].card.vocabulary
    raise ValueError(
        "data.resample.vocabulary: is missing, and neither the objective nor a card names one. Make it: "
        f"python datasets/hashtags.py {mix.name(parts)} --min-count 100 --out FILE."
    )
