"""Weights by how frequent entries are: MetaCLIP's probabilities, and the laws of tags."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from test_curation import column, jpeg, recipe, write_shard, write_yaml

from prepretrain.curation import commands
from prepretrain.curation.engine import Machines

pytest.importorskip("datatrove", reason="the extra `data` is not installed")
GOLDEN = Path(os.environ.get("PREPRETRAIN_GOLDEN", Path(__file__).parent / "golden"))
GOLDEN /= "metaclip_balance.json"
HERE = Machines()

LAB = """
import json
from pathlib import Path
import pyarrow as pa
from prepretrain.curation.stages.base import Stage

class Matched(Stage):
    columns = {"matches": pa.list_(pa.int32()), "language": pa.string(), "reason": pa.string()}

    def __init__(self, *, file: str):
        self.file = file

    def shard(self, shard):
        rows = json.loads(Path(self.file).read_text())[shard.number]
        matches, language = [row[0] for row in rows], [row[1] for row in rows]
        reason = [row[2] if len(row) > 2 else None for row in rows]
        return {"matches": matches, "language": language, "reason": reason}
"""


def balanced(folder, monkeypatch, rows, **options) -> list[float]:
    """The weights of rows (matches, language), in two shards."""
    (folder / "lab").mkdir(exist_ok=True)
    (folder / "lab/matched.py").write_text(LAB)
    monkeypatch.syspath_prepend(folder)
    half = len(rows) // 2
    (folder / "rows.json").write_text(json.dumps([rows[:half], rows[half:]]))
    for number, some in enumerate((rows[:half], rows[half:])):
        names = [f"{row:05d}" for row in range(len(some))]
        write_shard(folder / f"shards/{number:05d}.tar", [{"jpg": b"none"}] * len(some), names)
    split = {"source": "shards", "path": str(folder / "shards")}
    card = write_yaml(folder / "web.yaml", {"train": split})
    stages = {
        "matched": {"name": "lab.matched", "file": str(folder / "rows.json")},
        "balance": {"by": "matched.matches", **options},
    }
    commands.run(card, recipe(folder, **stages), folder / "out", None, HERE, again=True)
    return column(folder / "out", "balance", "weight")


def golden() -> dict:
    if not GOLDEN.exists():
        pytest.skip(f"no {GOLDEN}")
    return json.loads(GOLDEN.read_text())


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_captions_are_kept_with_metaclips_probabilities(version, tmp_path, monkeypatch):
    texts = golden()["languages"]["en"]["texts"]
    rows = [(text[version], "en") for text in texts]
    weights = balanced(tmp_path, monkeypatch, rows, t=golden()["t_en"])
    expected = [text[f"keep_probability_{version}"] or 0 for text in texts]
    np.testing.assert_allclose(weights, expected, atol=1e-6)
    reasons = column(tmp_path / "out", "balance", "reason")
    assert [reason is None for reason in reasons] == [bool(matches) for matches, _ in rows]


def test_the_threshold_of_english_is_carried_over_to_another_language(tmp_path, monkeypatch):
    languages = golden()["languages"]
    texts = [(name, text) for name in ("zh", "en") for text in languages[name]["texts"]]
    rows = [(text["v2"], name) for name, text in texts]
    options = {"t": golden()["t_en"], "language": "matched.language"}
    weights = balanced(tmp_path, monkeypatch, rows, **options)
    expected = [text["keep_probability_v2"] or 0 for _, text in texts]
    np.testing.assert_allclose(weights, expected, atol=1e-6)


def test_tags_weigh_by_the_rarest_and_one_law_is_everywhere(tmp_path):
    tags = [["Dog"], ["dog", "rare"], [], ["dog"], ["#dog", "DOG"], ["dog"], ["dog"], ["dog"]]
    samples = [{"jpg": jpeg(9), "json": json.dumps({"tags": t}).encode()} for t in tags]
    write_shard(tmp_path / "shards/00000.tar", samples)
    split = {"source": "shards", "path": str(tmp_path / "shards"), "hashtags": "json.tags"}
    card = write_yaml(tmp_path / "web.yaml", {"train": split})
    for law, dog, rare in (("cap", 2 / 7, 1), ("inverse_sqrt", (2 / 7) ** 0.5, 2**0.5)):
        stages = {"tags": {}, "balance": {"by": "tags.tags", "t": 2, "law": law}}
        commands.run(card, recipe(tmp_path, **stages), tmp_path / law, None, HERE)
        found = column(tmp_path / law, "balance", "weight")
        np.testing.assert_allclose(found, [dog, rare, 1, dog, dog, dog, dog, dog], rtol=1e-6)
    assert column(tmp_path / "cap", "tags", "tags")[4] == ["dog"]


def test_what_earlier_stages_drop_is_not_counted(tmp_path, monkeypatch):
    rows = [([1], "en")] * 4 + [([1], "en", "a copy")] * 4
    assert balanced(tmp_path, monkeypatch, rows, t=2, after=["matched"])[:4] == [0.5] * 4
    assert balanced(tmp_path, monkeypatch, rows, t=2)[:4] == [0.25] * 4


@pytest.mark.parametrize(
    "options, message",
    [
        ({"by": "matches", "t": 2}, "is no table.column"),
        ({"by": "text.matches", "t": 0}, "curation_stage.t: 0.0 must be finite and above 0"),
        ({"by": "text.matches", "t": 2, "law": "sqrt"}, "law"),
    ],
)
def test_options_that_do_not_fit_are_said_before_anything_runs(options, message, tmp_path):
    write_shard(tmp_path / "shards/00000.tar", [{"jpg": jpeg(1)}])
    split = {"source": "shards", "path": str(tmp_path / "shards")}
    card = write_yaml(tmp_path / "web.yaml", {"train": split})
    with pytest.raises(ValueError, match=message):
        commands.run(card, recipe(tmp_path, balance=options), tmp_path / "out", None, HERE)
