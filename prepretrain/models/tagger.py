"""What a run on labels predicts beside features: its head with its vocabulary, as files."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from prepretrain import plugin
from prepretrain.data.tags.vocabulary import Vocabulary
from prepretrain.distributed import checkpoint, shard
from prepretrain.files import draft, read_json, write_json
from prepretrain.models import weights
from prepretrain.models.encoders.base import Encoder
from prepretrain.models.heads import base as heads

FOLDER, _HEAD, _OPTIONS, _VOCABULARY = "labels", "head.safetensors", "head.json", "vocabulary.json"
_HEADS = ("linear", "mlp")
LOSSES = ("softmax", "binary")


class Tagger:
    """A head that scores the labels of a vocabulary. loss: what it was trained with, "softmax" or
    "binary"."""

    def __init__(self, head: heads.Scores, vocabulary: Vocabulary, loss: str):
        self.head, self.vocabulary, self.loss = head, vocabulary, loss

    @classmethod
    def open(cls, source: str, encoder: Encoder) -> "Tagger":
        """What `write` wrote, of a run's folder, its export or the folder itself, for an encoder.

        Raises ValueError naming the folder for anything else.
        """
        folder = located(source)
        try:
            found = read_json(folder / _OPTIONS)
        except OSError as error:
            raise ValueError(f"{folder}: cannot be read: {error}") from error
        options, loss = found.get("head"), found.get("loss")
        if not isinstance(options, dict) or options.get("name") not in _HEADS or loss not in LOSSES:
            raise ValueError(
                f"{folder / _OPTIONS}: describes no head {' or '.join(_HEADS)} with a loss."
            )
        vocabulary = Vocabulary.load(folder / _VOCABULARY)
        plugin.check_trusted(options, str(folder))
        with torch.device("meta"):
            head = heads.build(encoder, options, str(folder / _OPTIONS))
        if head.classes != len(vocabulary):
            raise ValueError(
                f"{folder}: a head of {head.classes} labels, and {len(vocabulary)} tags."
            )
        head.to_empty(device="cpu")
        shard.fill_buffers(head)
        weights.fill(head, weights.open_file(folder / _HEAD))
        return cls(head.eval(), vocabulary, loss)

    @torch.no_grad()
    def log_probabilities(self, features: Tensor) -> Tensor:
        """[B, D] to float32 [B, C]: of a softmax over all labels, or of each label by itself."""
        logits = self.head.scores(features).float()
        if self.loss == "softmax":
            return logits.log_softmax(1)
        return torch.nn.functional.logsigmoid(logits)

    def log_frequencies(self) -> Tensor:
        """float32 [C]: how often each label was one in the training data: its share of all labels, or,
        where each is by itself, of all images."""
        counts = torch.tensor(self.vocabulary.counts).double()
        whole = counts.sum() if self.loss == "softmax" else self.vocabulary.images
        return (counts / whole).log().float()


def write(
    folder: Path,
    options: dict[str, Any],
    loss: str,
    state: dict[str, Tensor],
    vocabulary: Vocabulary,
) -> None:
    """Writes a head's options and whole state dict, and its vocabulary, below an export's folder."""
    place = folder / FOLDER
    place.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with draft(place / _HEAD) as file:
        file.write_bytes(save(tensors))
    vocabulary.save(place / _VOCABULARY)
    write_json(place / _OPTIONS, {"head": options, "loss": loss})


def located(source: str) -> Path:
    """The folder that `write` wrote, of a run or an export. Raises ValueError where there is none."""
    for place in (Path(source, "export", FOLDER), Path(source, FOLDER), Path(source)):
        if (place / _OPTIONS).is_file():
            return place
    raise ValueError(
        f"{source}: holds no labels. Give a finished run of --stage wsp or wsp_catlip, or its export, as in "
        f"evaluator.tags=runs/wsp; of a run that was finished before it wrote them: prepretrain-export "
        f"{source} --labels."
    )


def fingerprint(source: str) -> list[str]:
    """The checksums of what `Tagger.open` reads."""
    folder = located(source)
    names = (_HEAD, _OPTIONS, _VOCABULARY)
    return [checkpoint.describe(folder / name)["sha256"] for name in names]
