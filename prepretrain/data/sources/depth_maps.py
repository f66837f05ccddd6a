"""Images with depth maps, which say how far away each pixel is."""

import numpy as np

from prepretrain.data.dense.pairs import Pairs
from prepretrain.data.transforms import BadImage


class DepthMaps(Pairs):
    """Image files, and a picture of distances for each, of its size: PNG or TIFF of 8, 16 or 32 bits,
    or a numpy array (.npy).

    path, maps, endings, listing: as of the source `label_maps`
    scale    metres of one unit in the maps, as 0.001 for millimetres
    range    [least, largest] metres that a known depth has: one outside of it is an error, since
             the scale must be another

    A depth of 0 is one that is not known.
    """

    field = "depth"

    def __init__(
        self,
        *,
        path: str,
        maps: str,
        range: tuple[float, float],
        scale: float = 1.0,
        listing: str | None = None,
        endings: tuple[str, str] = ("", ""),
    ):
        self.scale, self.range = scale, range
        read = f"{scale} {range}"
        super().__init__(path=path, maps=maps, listing=listing, endings=endings, read=read)

    def _value(self, pixels: np.ndarray, colours: list[list[int]]) -> np.ndarray:
        found = pixels.astype(np.float32) * np.float32(self.scale)
        odd = int((~np.isfinite(found)).sum())
        if odd:
            said = f"{odd:,} of {found.size:,} depths are NaN or infinite; an unknown one is 0"
            raise BadImage("depth not finite", said)
        known = found[found != 0]
        if not len(known):
            raise BadImage("no depth", "no depth is known (all are 0)")
        low, high = self.range
        if known.min() < low or known.max() > high:
            raise BadImage(
                "depth out of range",
                f"depths are {known.min():g} to {known.max():g} m, and the card says {low:g} to {high:g}. "
                f"Its values.scale is {self.scale:g}: of maps in millimetres it is 0.001",
            )
        return found
