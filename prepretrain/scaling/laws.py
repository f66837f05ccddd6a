"""Saturating power laws of scaling, fitted to few runs, with what the runs leave open."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import stats
from scipy.optimize import least_squares

from prepretrain.scaling.analysis import overfit
from prepretrain.scaling.table import Table

AXES = ("params", "images", "iterations")
LEVELS = 3  # different values that one axis at least must take to show a curve
STARTS = 6
DRAWS = 1000
CANDIDATES, ROUNDS = 20 * DRAWS, 3  # of importance sampling
ROBUST = 2.0  # errors of more standard deviations than this count less than squared
# What a law is thought to be before any run is seen; wide, so that it only decides what the runs
# leave open: exponents near 0.3, within a factor of e² twice over.  # not from the paper
EXPONENT, SPREAD = np.log(0.3), 1.0


class TooFew(ValueError):
    """There are not enough runs for what is asked."""


@dataclass(frozen=True)
class Shape:
    """The terms of a law: E + A/N^α + B/D^β + C/T^γ, where no run overfits.

    Where some do, the data matter by what they do to overfitting. The term of D is then O·c/(O + c)
    with O = G N^u T^v / D^w: it rises with the model's size and the length, falls with the data, and
    ends at c, since a model that knows its images by heart gets no worse.  # not from the paper

    The parameters are, with x the logarithms of the axes about their means: the value at x = 0
    without overfitting; of each power, log(Aα) and log(α), its slope there and how fast that ends;
    log c, log G and the logarithms of u, v, w. In these the likelihood is close to a normal one,
    which E and A are far from.
    """

    axes: tuple[str, ...]
    overfits: bool

    @property
    def powers(self) -> tuple[int, ...]:
        """The numbers of the axes that have a power of their own."""
        return tuple(
            i for i, axis in enumerate(self.axes) if not (self.overfits and axis == "images")
        )

    @property
    def size(self) -> int:
        """How many numbers describe the law."""
        return 1 + 2 * len(self.powers) + self.overfits * (2 + len(self.axes))

    def values(self, p: np.ndarray, x: np.ndarray) -> np.ndarray:
        """[..., runs] of parameters [..., size] and logarithms [axes, runs]."""
        value = p[..., :1] + np.zeros(x.shape[1])
        for place, i in enumerate(self.powers):
            slope, power = p[..., 1 + 2 * place, None], p[..., 2 + 2 * place, None]
            ended = np.expm1(np.minimum(-_exp(power) * x[i], 30.0))
            value = value + _exp(slope - power) * ended
        if self.overfits:
            start = 1 + 2 * len(self.powers)
            ceiling, amount = p[..., start, None], p[..., start + 1, None]
            signs = np.array([-1 if axis == "images" else 1 for axis in self.axes])
            amount = amount + (_exp(p[..., start + 2 :]) * signs) @ x
            value = value + _exp(amount + ceiling - np.logaddexp(amount, ceiling))
        return value

    def floor(self, p: np.ndarray) -> np.ndarray:
        """[...] E, the value of endless model, data and length."""
        slopes, powers = (p[..., k : 1 + 2 * len(self.powers) : 2] for k in (1, 2))
        return p[..., 0] - _exp(slopes - powers).sum(-1)


def _exp(x: np.ndarray) -> np.ndarray:
    return np.exp(np.minimum(x, 30.0))  # a draw far out must not overflow


@dataclass(frozen=True)
class Law:
    """A fitted law: its most likely parameters, how sure they are, and the noise of a run."""

    shape: Shape
    sign: int  # 1: the value falls as runs grow, as a loss; -1: it rises
    centre: np.ndarray  # [axes] logarithms that x is relative to
    parameters: np.ndarray
    noise: float  # of one run, a standard deviation
    possible: np.ndarray  # [draws, size] parameters, as likely as the runs leave them
    heavy: np.ndarray  # [draws, 1] by how much the noise of each may be larger
    largest: dict[str, float]  # of each axis among the runs that it was fitted to

    def predict(self, table: Table) -> np.ndarray:
        """[runs] the most likely values."""
        return self.sign * self.shape.values(self.parameters, self._x(table))

    def draw(self, table: Table, seed: int = 0, *, noise: bool = True) -> np.ndarray:
        """[draws, runs] values that the fitted runs leave possible; noise: those of new runs, not of
        the curve."""
        values = self.shape.values(self.possible, self._x(table))
        if noise:
            normal = np.random.default_rng(seed).standard_normal(values.shape)
            values = values + self.noise * self.heavy * normal
        return self.sign * values

    def floor(self) -> np.ndarray:
        """[draws] what endless model, data and length would give (see Shape)."""
        return self.sign * self.shape.floor(self.possible)

    def beyond(self, table: Table, factor: float) -> str | None:
        """Says which of the runs asked for lies further out than `factor` times the largest run."""
        for axis in self.shape.axes:
            reach = getattr(table, axis).max() / self.largest[axis]
            if reach > factor * (1 + 1e-9):
                return (
                    f"{axis} is {reach:.3g} times the largest that was run; the limit is {factor:g}"
                )
        return None

    def _x(self, table: Table) -> np.ndarray:
        return logs(table, self.shape.axes) - self.centre[:, None]


def fit(
    table: Table,
    values: np.ndarray,
    *,
    falls: bool,
    axes: tuple[str, ...] | None = None,
    seed: int = 0,
) -> Law:
    """The law of some values of a table's runs: robust least squares (soft L1) from several starts.

    falls: smaller is better, as of a loss. axes: by default all that vary (see `varied`).
    Overfitting has a term where runs overfit and the data are an axis. Parameters have weak priors,
    and what is known of them are draws, as likely as the runs and the priors make them.
    Raises TooFew unless there are two runs more than parameters.
    """
    axes = varied(table) if axes is None else axes
    if not axes:
        raise TooFew(
            f"no axis takes {LEVELS} values: a law needs at least {LEVELS} model sizes, amounts of "
            "data or lengths."
        )
    overfits = {"images", "iterations"} <= set(axes) and bool(overfit(table).any())
    shape, sign = Shape(axes, overfits), 1 if falls else -1
    if len(table) < shape.size + 2:
        raise TooFew(
            f"{len(table)} runs for a law with {shape.size} parameters over {', '.join(axes)}; it "
            f"needs {shape.size + 2}."
        )
    x, y = logs(table, axes), sign * values
    centre = x.mean(1)
    x = x - centre[:, None]
    middle, width = _prior(shape, y)
    rng, noise = np.random.default_rng(seed), max(0.1 * np.std(y), 1e-12)
    start, found = middle, None
    for _ in range(3):  # the noise is known only after a fit
        starts = [start, *(middle + width * rng.standard_normal((STARTS, shape.size)) / 2)]
        found = min(
            (_solve(shape, x, y, middle, width, noise, s) for s in starts), key=lambda r: r.cost
        )
        start = found.x
        error = shape.values(found.x, x) - y
        # with what fitting took away
        taken = np.sqrt(len(y) / max(len(y) - shape.size, 1))
        noise = max(np.sqrt((error**2).mean()) * taken, 1e-4 * np.std(y), 1e-12)

    def cost(p: np.ndarray, heavy: np.ndarray) -> np.ndarray:
        """[draws] what `_solve` makes least, of parameters [draws, size]."""
        errors = [(shape.values(p, x) - y) / (noise * heavy), (p - middle) / width]
        return _soft_l1(np.concatenate(errors, 1))

    freedom = max(len(y) - shape.size, 1)
    covariance = np.linalg.pinv(found.jac.T @ found.jac)
    possible, heavy = _possible(cost, found.x, covariance, freedom, rng)
    largest = {axis: float(getattr(table, axis).max()) for axis in axes}
    return Law(shape, sign, centre, found.x, float(noise), possible, heavy, largest)


def _solve(shape, x, y, middle, width, noise, start):
    def errors(p: np.ndarray) -> np.ndarray:
        return np.concatenate([(shape.values(p, x) - y) / noise, (p - middle) / width])

    return least_squares(errors, start, loss="soft_l1", f_scale=ROBUST, max_nfev=300)


def _soft_l1(errors: np.ndarray) -> np.ndarray:
    """[draws] the cost of errors [draws, n], as least_squares counts it."""
    return ROBUST**2 * (np.sqrt(1 + (errors / ROBUST) ** 2) - 1).sum(1)


def _possible(
    cost: Callable[[np.ndarray, np.ndarray], np.ndarray],
    best: np.ndarray,
    covariance: np.ndarray,
    freedom: int,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """(parameters [draws, size], the factor of the noise of each [draws, 1]), as likely as their cost.

    By importance sampling: candidates from a multivariate t about the best parameters (Laplace), then
    from one with the mean and covariance of those, and again; the last are drawn by their weights.
    Without weights some candidates fit no run: a parameter is the logarithm of a slope, and far out
    in a t it is anything.
    """
    centre, size = best, len(best)
    for _ in range(ROUNDS):
        root = np.linalg.cholesky(covariance + 1e-12 * np.eye(size))
        heavy = np.sqrt(freedom / rng.chisquare(freedom, (CANDIDATES, 1)))
        normal = rng.standard_normal((CANDIDATES, size))
        found = centre + heavy * (normal @ root.T)
        # the powers of the factor in both densities are equal
        proposed = -((normal**2).sum(1) + freedom / heavy[:, 0] ** 2) / 2
        weights = -cost(found, heavy) - proposed
        weights = np.exp(weights - weights.max())
        weights /= weights.sum()
        centre = weights @ found
        covariance = ((found - centre) * weights[:, None]).T @ (found - centre)
    evenly = (rng.random() + np.arange(DRAWS)) / DRAWS
    chosen = np.searchsorted(weights.cumsum(), evenly).clip(max=CANDIDATES - 1)
    chosen = rng.permutation(chosen)
    return found[chosen], heavy[chosen]


def _prior(shape: Shape, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(middle, width) of every parameter. The terms are of the size of what varies."""
    vary = np.ptp(y) + 1e-12
    middle, width = [np.median(y)], [2 * vary]
    for _ in shape.powers:
        middle += [np.log(vary / 5), EXPONENT]
        width += [2.0, SPREAD]
    if shape.overfits:
        middle += [np.log(vary), np.log(vary / 20), *[0.0] * len(shape.axes)]
        width += [1.0, 4.0, *[SPREAD] * len(shape.axes)]
    return np.array(middle), np.array(width)


def varied(table: Table) -> tuple[str, ...]:
    """The axes that take several values among the runs; none if no axis takes three. What two values
    of an axis leave open of its curve is decided by the priors, and widens the intervals."""
    levels = {
        axis: len(np.unique(getattr(table, axis)))
        for axis in AXES
        if getattr(table, axis) is not None
    }
    several = tuple(axis for axis, count in levels.items() if count > 1)
    return several if max(levels.values()) >= LEVELS else ()


def logs(table: Table, axes: tuple[str, ...]) -> np.ndarray:
    """[axes, runs] the logarithms of some axes."""
    return np.log(np.stack([getattr(table, axis) for axis in axes]))


@dataclass(frozen=True)
class Change:
    """Where a value stops growing with the logarithm of the data."""

    at: float  # images
    low: float  # of the interval at 95 %
    high: float
    p: float  # of growth as large by chance if nothing ever stopped it
    slope: float  # of the unbroken lines, their mean: for each e-fold of the data
    slope_p: float  # of lines as steep by chance if data changed nothing
    runs: int


def change_point(
    images: np.ndarray, values: np.ndarray, models: np.ndarray, draws: int = 500, seed: int = 0
) -> Change:
    """The amount of data up to which each model's value is a line in log data, and flat after it; one
    amount for all models, beside a line that never ends.

    p is that of the F statistic by a parametric bootstrap of the unbroken lines. The interval holds
    the amounts whose squared error is not significantly above the best one's (F, 95 %).
    Raises TooFew below four amounts of data or two runs more than parameters.
    """
    x = np.log(images)
    amounts = np.unique(x)
    own = (models[:, None] == np.unique(models)).astype(float)
    size = 2 * own.shape[1] + 1
    if len(amounts) < 4 or len(x) < size + 2:
        raise TooFew(
            f"{len(x)} runs with {len(amounts)} amounts of data; a change point needs 4 amounts and "
            f"{size + 2} runs."
        )
    # from the second amount to the last: a model that stops at the first one has no slope
    grid = np.linspace(amounts[1], amounts[-1], 100)
    projections = [_projection(np.hstack([own, own * np.minimum(x, c)[:, None]])) for c in grid]
    line = _projection(np.hstack([own, own * x[:, None]]))
    freedom = len(x) - size

    def statistic(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """F and the squared errors [grid, draws] of values [runs, draws]."""
        squared = np.stack([((y - P @ y) ** 2).sum(0) for P in projections])
        least = squared.min(0)
        straight = ((y - line @ y) ** 2).sum(0)
        return (straight - least) / np.maximum(least / freedom, 1e-300), squared

    found, squared = statistic(values[:, None])
    straight = line @ values
    noise = np.sqrt(((values - straight) ** 2).sum() / (len(x) - size + 1))
    rng = np.random.default_rng(seed)
    chance, _ = statistic(straight[:, None] + noise * rng.standard_normal((len(x), draws)))
    limit = squared.min() * (1 + stats.f.ppf(0.95, 1, freedom) / freedom)
    inside = grid[squared[:, 0] <= limit]
    p = (1 + (chance >= found).sum()) / (1 + draws)
    at = grid[squared[:, 0].argmin()]
    flat = ((values - _projection(own) @ values) ** 2).sum()
    left, rest = ((values - straight) ** 2).sum(), len(x) - size + 1
    steep = (flat - left) / own.shape[1] / max(left / rest, 1e-300)
    slopes = np.linalg.lstsq(np.hstack([own, own * x[:, None]]), values, rcond=None)[0]
    return Change(
        float(np.exp(at)),
        float(np.exp(inside.min())),
        float(np.exp(inside.max())),
        float(p),
        float(slopes[own.shape[1] :].mean()),
        float(stats.f.sf(steep, own.shape[1], rest)),
        len(x),
    )


def _projection(design: np.ndarray) -> np.ndarray:
    """[runs, runs] values to their fit by least squares."""
    return design @ np.linalg.pinv(design)
