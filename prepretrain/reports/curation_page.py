"""The page of a curation: what went in, what is kept and why not the rest, with pictures of both; one
HTML file that needs nothing else."""

import base64
import math
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from typing import Any

import jinja2
import pyarrow as pa
from markupsafe import Markup
from PIL import Image

from prepretrain.curation import recipe
from prepretrain.curation.engine import Tables, check_packages
from prepretrain.curation.folder import Folder
from prepretrain.curation.hashes import SCHEMA
from prepretrain.curation.shard import Shard
from prepretrain.curation.summary import summary
from prepretrain.curation.thumbnail import thumbnail_of
from prepretrain.data.card import load_card
from prepretrain.data.transforms import BadImage, header
from prepretrain.evaluation import leaks
from prepretrain.files import read_json

PICTURES = 20  # of each reason
_REASONS, _GROUPS, _MEMBERS, _LEAKS = 30, 12, 8, 12  # that pictures are drawn of, at most
_SIDE, _BARS, _TEXT = 112, 24, 90  # pixels of a picture; bars of a histogram; letters of a text
_LOG = 50  # how many times the smallest value the largest is, from where on the axis is logarithmic
_NO_MEASURE = (*SCHEMA.names, "group", "kept_shard", "kept_row", "row", "label")


@dataclass(frozen=True)
class Picture:
    """A sample as the page shows it."""

    key: str
    text: str
    image: str | None  # a JPEG in base64
    note: str = ""


@dataclass(frozen=True)
class Histogram:
    """How many samples have which value, of those that are kept and of the others."""

    title: str
    kept: list[int]
    dropped: list[int]
    marks: list[str]  # below the axis: one a bar, or those of its left end, middle and right end
    words: str


def report(out: Path, page: Path | None = None, pictures: int = PICTURES) -> Path:
    """Writes the page of a curation's folder, by default as report.html in it; returns its path.

    pictures: of each reason. Raises ValueError for a folder whose recipe has not been run to its end,
    or where samples are missing from the sum.
    """
    check_packages()
    folder = Folder(out)
    columns = {
        name: _shown(stage) for name, stage in recipe.load(out / "recipe.yaml").stages.items()
    }
    if "keep" not in columns:
        raise ValueError(
            f"{out}: its recipe has no stage decide, so there is nothing to report on."
        )
    shards = set(range(len(folder.manifest.shards)))
    for name in columns:
        if missing := shards - folder.there(name):
            raise ValueError(
                f"{out}: {len(missing)} of {len(shards)} tables '{name}' are missing. Run the recipe to its "
                f"end first."
            )
    with tempfile.TemporaryDirectory() as spill:
        tables = Tables(
            folder, {name: tuple(kinds) for name, kinds in columns.items()}, Path(spill)
        )
        text = _render(tables, columns, summary(out), pictures)
    page = page or out / "report.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text, encoding="utf-8", errors="replace")
    return page


def _shown(stage: Any) -> dict[str, pa.DataType]:
    """The columns of a table that the page reads: no hashes and no features."""
    plain = lambda kind: not (pa.types.is_list(kind) or pa.types.is_struct(kind))
    found = {n: kind for n, kind in stage.columns.items() if n not in SCHEMA.names}
    return {n: kind for n, kind in found.items() if plain(kind) or n == "matches"}


def _render(
    tables: Tables,
    columns: dict[str, dict[str, pa.DataType]],
    counts: dict[str, Any],
    pictures: int,
) -> str:
    room = files("prepretrain.reports")
    loader = jinja2.DictLoader({"page": room.joinpath("curation_page.html").read_text()})
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["count"] = lambda number: f"{number:,.0f}"
    environment.filters["share"] = lambda number: f"{number / max(counts['samples'], 1):.2%}"
    style = "".join(
        room.joinpath(name).read_text() for name in ("study_page.css", "curation_page.css")
    )
    drawer = _Drawer(tables.folder)
    reasons = dict(list(counts["reasons"].items())[:_REASONS])
    return environment.get_template("page").render(
        data=tables.folder.manifest.data,
        shards=len(tables.folder.manifest.shards),
        counts=counts,
        stages=_by_stage(tables, columns, counts),
        unreadable=_unreadable(tables, columns),
        histograms=[_drawn(histogram) for histogram in _histograms(tables, columns)],
        samples=_samples(tables, drawer, [None, *reasons], pictures),
        not_shown=list(counts["reasons"])[_REASONS:],
        copies={
            name: _groups(tables, drawer, name) for name in columns if "group" in columns[name]
        },
        leaks=_leaks(tables, drawer) if "leaks" in columns else None,
        style=Markup(style),
    )


def _by_stage(
    tables: Tables, columns: dict[str, dict[str, pa.DataType]], counts: dict[str, Any]
) -> list[dict[str, Any]]:
    """For each table that has reasons, in the recipe's order: how many samples it is against, and of
    how many it is the reason that counts, by reason."""
    found = []
    for name, kinds in columns.items():
        # decide's own draw is named by its column, as in "embed.loss: not drawn"
        first = {
            reason: number
            for reason, number in counts["reasons"].items()
            if reason.partition(": ")[0].partition(".")[0] == name
        }
        against = 0
        if "reason" in kinds and name != "keep":
            ((against,),) = tables.query(f"SELECT count(reason) FROM {name}").fetchall()
        if against or first:
            found.append({"name": name, "against": against, "first": first})
    return found


def _unreadable(tables: Tables, columns: dict[str, dict[str, pa.DataType]]) -> dict[str, int]:
    """How many samples have an error, by table."""
    found = {}
    for name, kinds in columns.items():
        if "error" in kinds:
            ((number,),) = tables.query(f"SELECT count(error) FROM {name}").fetchall()
            found |= {name: number} if number else {}
    return found


def _histograms(tables: Tables, columns: dict[str, dict[str, pa.DataType]]) -> Iterable[Histogram]:
    """One for each column of numbers, and of a few words."""
    for table, kinds in columns.items():
        for column, kind in kinds.items():
            title = f"{table}.{column}"
            number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
            if number and column not in _NO_MEASURE:
                whole = pa.types.is_integer(kind)
                histogram = _of_numbers(tables, table, column, title, whole)
            elif column in ("language", "status") or pa.types.is_boolean(kind) and table != "keep":
                histogram = _of_words(tables, table, column, title)
            else:
                continue
            if histogram is not None:
                yield histogram


def _of_numbers(
    tables: Tables, table: str, column: str, title: str, whole: bool
) -> Histogram | None:
    """whole: of whole numbers, each of which has a bar if they are few."""
    value = f't."{column}"::DOUBLE'
    ((low, median, high, known, of),) = tables.query(
        f"""SELECT quantile_disc({value}, 0.005), quantile_disc({value}, 0.5),
        quantile_disc({value}, 0.995), count({value}), count(*) FROM {table} t
        WHERE {value} IS NULL OR isfinite({value})"""
    ).fetchall()
    if not known or low == high:
        return None
    words, bars = f"Median {_short(median)}; {known:,} of {of:,} samples have it.", _BARS
    first, last, middle, x = low, high, (low + high) / 2, value
    if low > 0 and high / low > _LOG:
        first, last, middle = math.log10(low), math.log10(high), (low * high) ** 0.5
        words, x = f"{words} The axis is logarithmic.", f"log10(greatest({value}, {low}))"
    elif whole and high - low < _BARS:
        bars, last = int(high - low) + 1, high + 1
    rows = tables.query(
        f"""SELECT least(greatest(floor(({x} - {first}) / {last - first} * {bars}), 0), {bars - 1})::INT AS bar,
        count(*) FILTER (k.keep), count(*) FILTER (NOT k.keep)
        FROM {table} t JOIN keep k USING (shard, "row") WHERE isfinite({value}) GROUP BY bar"""
    ).fetchall()
    kept, dropped = [0] * bars, [0] * bars
    for bar, keep, drop in rows:
        kept[bar], dropped[bar] = keep, drop
    return Histogram(title, kept, dropped, [_short(v) for v in (low, middle, high)], words)


def _of_words(tables: Tables, table: str, column: str, title: str) -> Histogram | None:
    rows = tables.query(
        f"""SELECT coalesce(t."{column}"::VARCHAR, 'none') AS word, count(*) FILTER (k.keep),
        count(*) FILTER (NOT k.keep) FROM {table} t JOIN keep k USING (shard, "row")
        GROUP BY word ORDER BY count(*) DESC, word"""
    ).fetchall()
    if len(rows) < 2:
        return None
    shown = rows[:8]
    left = len(rows) - len(shown)
    words = f"{left} rarer ones are not shown." if left else ""
    names, kept, dropped = (list(values) for values in zip(*shown, strict=True))
    return Histogram(title, kept, dropped, [_cut(name, 9) for name in names], words)


def _drawn(histogram: Histogram) -> dict[str, Any]:
    """A histogram with its bars' places, in a drawing of 300 x 100."""
    most = max(k + d for k, d in zip(histogram.kept, histogram.dropped)) or 1
    wide, bars = 300 / len(histogram.kept), []
    for place, (kept, dropped) in enumerate(zip(histogram.kept, histogram.dropped)):
        low = 100 * kept / most
        bars.append((place * wide, wide - 1, low, 100 * dropped / most))
    count = len(histogram.marks)
    if count == len(histogram.kept):
        marks = [
            ((place + 0.5) * wide, "middle", mark) for place, mark in enumerate(histogram.marks)
        ]
    else:
        marks = list(zip((0, 150, 300), ("start", "middle", "end"), histogram.marks))
    return {"title": histogram.title, "words": histogram.words, "bars": bars, "marks": marks}


def _samples(
    tables: Tables, drawer: "_Drawer", reasons: list[str | None], pictures: int
) -> dict[str | None, list[Picture]]:
    """Some samples of each reason, and of those that are kept under None, drawn by the hash of their
    place."""
    rows = tables.query(
        f"""SELECT reason, shard, "row" FROM keep
        QUALIFY row_number() OVER (PARTITION BY reason ORDER BY md5(shard || ' ' || "row")) <= {pictures}
        ORDER BY shard, "row" """
    ).fetchall()
    found: dict[str | None, list[Picture]] = {reason: [] for reason in reasons}
    for reason, shard, row in rows:
        if reason in found:
            found[reason].append(drawer.picture(shard, row))
    return found


def _groups(tables: Tables, drawer: "_Drawer", name: str) -> dict[str, Any]:
    """Groups of copies, half of them the largest, and how many there are of which size."""
    sizes = tables.query(
        f"""SELECT size, count(*) FROM (SELECT count(*) AS size FROM {name}
        WHERE "group" IS NOT NULL GROUP BY "group") GROUP BY size ORDER BY size"""
    ).fetchall()
    chosen = f"""WITH sized AS (
        SELECT "group", count(*) AS size FROM {name} WHERE "group" IS NOT NULL GROUP BY "group"
    ), largest AS (FROM sized ORDER BY size DESC, "group" LIMIT {_GROUPS // 2})
    FROM largest UNION ALL (
        FROM sized ANTI JOIN largest USING ("group") ORDER BY md5("group"::VARCHAR) LIMIT {_GROUPS // 2}
    )"""
    rows = tables.query(
        f"""SELECT c."group", c.size, d.shard, d."row", d.reason, d.distance
        FROM ({chosen}) c JOIN {name} d USING ("group")
        QUALIFY row_number() OVER (
            PARTITION BY c."group", d.reason IS NULL ORDER BY d.distance, d.shard, d."row"
        ) <= {_MEMBERS // 2}
        ORDER BY c.size DESC, c."group", d.reason NULLS FIRST, d.distance, d.shard, d."row" """
    ).fetchall()
    groups: dict[tuple[int, int], list[Picture]] = {}
    for group, size, shard, row, reason, distance in rows:
        note = "kept" if reason is None else f"{reason}, {_short(distance)}"
        groups.setdefault((group, size), []).append(drawer.picture(shard, row, note))
    shown = [(size, members) for (_, size), members in groups.items()]
    return {"sizes": sizes, "groups": shown}


def _leaks(tables: Tables, drawer: "_Drawer") -> dict[str, Any]:
    """What was found of each evaluation set, and some pairs of an image of it and its near-copy."""
    sets = leaks.content_of(tables.folder.path)["sets"]
    against = read_json(tables.folder.stage_file("leaks"))["against"]
    addresses = dict(zip(sets, against, strict=True))  # a card may be named by its file
    rows = tables.query(
        f"""SELECT shard, "row", m.set, m.number, m.key, m.distance, m.mirrored, m.similarity FROM (
            SELECT shard, "row", matches[1] AS m FROM leaks WHERE matches IS NOT NULL
        ) ORDER BY md5(shard || ' ' || "row") LIMIT {_LEAKS}"""
    ).fetchall()
    pairs = []
    for shard, row, name, number, key, distance, mirrored, similarity in rows:
        words = [name, *([] if distance is None else [f"{distance} of 256 bits"])]
        words += ["mirrored"] if mirrored else []
        words += [] if similarity is None else [f"features alike by {similarity:.3f}"]
        pairs.append(
            (
                drawer.picture(shard, row, "in the data"),
                _of_set(addresses[name], number, key),
                ", ".join(words),
            )
        )
    return {"sets": sets, "pairs": pairs}


def _of_set(address: str, number: int, key: str) -> Picture:
    """An image of an evaluation set, if the set is there to be looked at."""
    name, _, split = address.rpartition(":")
    try:
        image = _small(load_card(name).open(split)[number])
    except (ValueError, OSError, IndexError):
        image = None
    return Picture(_clean(key), "", image, "in the evaluation")


class _Drawer:
    """Draws samples from the shards, each of which it opens once."""

    def __init__(self, folder: Folder):
        self.folder, self.opened = folder, dict[int, Shard]()

    def picture(self, number: int, row: int, note: str = "") -> Picture:
        """A sample's picture and the beginning of its text."""
        if number not in self.opened:
            self.opened[number] = Shard(self.folder, number, {})
        shard = self.opened[number]
        try:
            sample = shard.sample(row)
            text = sample.get("text") or next(iter(sample.get("captions", ())), "")
            text = text or " ".join(f"#{tag}" for tag in sample.get("hashtags", ()))
            image = _small(sample)
        except BadImage as error:
            return Picture(
                _clean(shard.key(row)), _cut(f"{error.cause}: {error.detail}"), None, note
            )
        return Picture(_clean(shard.key(row)), _cut(text), image, note)


def _small(sample: dict[str, Any]) -> str:
    """A sample's picture as a small JPEG in base64. Raises BadImage."""
    if "image" in sample:
        image = header(sample["image"])
    else:
        image = Image.fromarray(thumbnail_of(sample)[0].permute(1, 2, 0).numpy())
    try:
        image.draft("RGB", (_SIDE, _SIDE))
        image = image.convert("RGB")
        image.thumbnail((_SIDE, _SIDE))
    except Exception as error:  # Pillow's decoders raise anything on garbage
        raise BadImage("unreadable", str(error)) from error
    written = BytesIO()
    image.save(written, "JPEG", quality=80)
    return base64.b64encode(written.getvalue()).decode()


def _cut(text: str, most: int = _TEXT) -> str:
    text = " ".join(_clean(text).split())
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _clean(text: str) -> str:
    """A text whose control characters, which HTML may not hold, are shown as such."""
    return "".join(sign if sign.isprintable() or sign == " " else "\ufffd" for sign in text)


def _short(number: float) -> str:
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.3g}"
