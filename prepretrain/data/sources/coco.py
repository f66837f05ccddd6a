"""Images with boxes and masks of objects, in COCO's format: a folder and a .json file."""

import io
import os

from prepretrain.data.annotations import Annotations
from prepretrain.data.sources.base import Files, fingerprint_of
from prepretrain.data.transforms import BadImage, open_image


class Coco(Files):
    """The images that a .json file lists, in its order, with their objects.

    Its masks are a field where every object has one. Paths of images start at the folder `path`; an
    image without a name has the last two parts of its `coco_url` (LVIS).

    listing  the .json file, as COCO's instances_train2017.json or LVIS's lvis_v1_train.json
    """

    def __init__(self, *, path: str, listing: str):
        if not os.path.isdir(path):
            raise ValueError(f"{path}: is no folder; looked at {os.path.abspath(path)}.")
        if not os.path.isfile(listing):
            raise ValueError(f"{listing}: is no file.")
        self.annotations = Annotations(listing)
        names = self.annotations.names
        if missing := [name for name in names if not os.path.isfile(os.path.join(path, name))]:
            raise ValueError(
                f"{listing}: {len(missing):,} of its {len(names):,} images are not below {path}: "
                f"{', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}."
            )
        super().__init__(path, names, None)
        self.fingerprint = fingerprint_of([self.fingerprint, self.annotations.fingerprint])
        self.classes, self.left_out = self.annotations.classes, self.annotations.left_out
        self.fields = ("image", "boxes", "classes", "crowds")
        self.fields += ("masks",) if self.annotations.has_masks else ()

    def __getitem__(self, index: int) -> dict:
        sample = super().__getitem__(index)
        if "boxes" in self.fields:
            self._check_size(sample, index)
            sample |= self.annotations.objects(index, "masks" in self.fields)
        return sample

    def classes_shown(self, index: int) -> list[int]:
        """See Source.classes_shown."""
        return self.annotations.classes_shown(index)

    def _check_size(self, sample: dict, index: int) -> None:
        """Raises BadImage for an image of another size than the annotated one, whose boxes would be
        elsewhere."""
        annotated = self.annotations.sizes[index]
        try:
            width, height = open_image(io.BytesIO(sample["image"])).size
        except Exception:  # what is wrong with it, decoding says
            return
        if (height, width) != tuple(annotated):
            turned = (width, height) == tuple(annotated)
            raise BadImage(
                "size is not as annotated",
                f"{width} x {height} pixels, and the annotations are of {annotated[1]} x {annotated[0]}"
                + (", as if turned by its EXIF orientation: store it turned" if turned else ""),
                sample["key"],
            )
