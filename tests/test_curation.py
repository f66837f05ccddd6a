"""Curation: a table for each shard and stage, the same bytes whoever makes them."""

import importlib.util
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from prepretrain.curation import commands
from prepretrain.curation import recipe as recipes
from prepretrain.curation.engine import Machines
from prepretrain.curation.folder import Folder
from prepretrain.curation.stages import text
from prepretrain.curation.stages.look import Look
from prepretrain.curation.stages.meta import Meta
from prepretrain.data.sources.shards import Shards

pytest.importorskip("datatrove", reason="the extra `data` is not installed")
HERE = Machines()
KEEP = {"name": "decide", "reasons": ["filter"]}


def jpeg(seed: int, size: tuple[int, int] = (48, 40)) -> bytes:
    """A smooth picture of its own for each seed."""
    coarse = np.random.default_rng(seed).integers(0, 255, (5, 6, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(file, "JPEG")
    return file.getvalue()


def write_shard(path: Path, samples: list[dict[str, bytes]], keys: list[str] | None = None) -> None:
    """A tar of samples {ending: bytes}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, sample in enumerate(samples):
            key = keys[number] if keys else f"{number:04d}"
            for ending, data in sample.items():
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def write_yaml(path: Path, content: dict) -> str:
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return str(path)


def make_card(tmp_path: Path) -> str:
    """A card of three shards of four images; the last image of each shard is the same."""
    for shard in range(3):
        samples = [
            {"jpg": jpeg(99 if row == 3 else 10 * shard + row), "txt": f"picture {row}".encode()}
            for row in range(4)
        ]
        write_shard(tmp_path / "shards" / f"{shard:05d}.tar", samples)
    split = {"source": "shards", "path": str(tmp_path / "shards")}
    return write_yaml(tmp_path / "card.yaml", {"train": split})


@pytest.fixture
def card(tmp_path) -> str:
    return make_card(tmp_path)


def recipe(folder: Path, **stages: dict) -> str:
    return write_yaml(folder / "recipe.yaml", stages)


def tables(out: Path) -> dict[str, bytes]:
    """The bytes of all tables."""
    return {str(f.relative_to(out)): f.read_bytes() for f in sorted(out.rglob("[0-9]*.parquet"))}


def column(out: Path, table: str, name: str) -> list:
    """A column of all shards' tables, one after another."""
    files = sorted((out / table).glob("*.parquet"))
    return [value for file in files for value in pq.read_table(file)[name].to_pylist()]


EXACT = """
import pyarrow as pa
from prepretrain.curation.stages.base import Stage

class Exact(Stage):
    kind = "reduce"
    reads = {"meta": ("sha256",)}
    columns = {"reason": pa.string()}

    def reduce(self, tables):
        return tables.query(
            "SELECT shard, row, 'copy' AS reason FROM meta "
            "QUALIFY row_number() OVER (PARTITION BY sha256 ORDER BY shard, row) > 1"
        )
"""


LOSS = """
import numpy as np
import pyarrow as pa
from prepretrain.curation.stages.base import Stage

class Loss(Stage):
    columns = {"loss": pa.float32()}

    def shard(self, shard):
        return {"loss": np.linspace(0, 1.2, len(shard))}
"""
MORTAL = """
import os, signal
from pathlib import Path
import pyarrow as pa
from prepretrain.curation.stages.base import Stage

class Mortal(Stage):
    columns = {"key": pa.string()}

    def shard(self, shard):
        if shard.number == 1 and not Path("MARK").exists():
            Path("MARK").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return {"key": [shard.key(row) for row in range(len(shard))]}
"""
SLOW = """
import os, time
from pathlib import Path
import pyarrow as pa
from prepretrain.curation.stages.base import Stage

class Slow(Stage):
    columns = {"key": pa.string()}

    def shard(self, shard):
        Path(f"MARK{shard.number}").write_text(str(os.getpid()))
        time.sleep(100)
"""
FULL = """
import errno, os
import pyarrow as pa
from prepretrain.curation.stages.base import Stage

class Full(Stage):
    columns = {"key": pa.string()}

    def shard(self, shard):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
"""


def test_a_reduction_sees_all_shards_and_what_is_kept_says_why(card, tmp_path, monkeypatch):
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab/exact.py").write_text(EXACT)
    monkeypatch.syspath_prepend(tmp_path)
    copies = {"name": "lab.exact"}
    stages = {"meta": {}, "copies": copies, "keep": {"name": "decide", "reasons": ["copies"]}}
    commands.run(card, recipe(tmp_path, **stages), tmp_path / "out", None, HERE)
    reasons = column(tmp_path / "out", "keep", "reason")
    assert reasons == [None] * 7 + ["copies: copy"] + [None] * 3 + ["copies: copy"]
    assert column(tmp_path / "out", "keep", "weight") == [float(r is None) for r in reasons]
    assert column(tmp_path / "out", "keep", "row") == [0, 1, 2, 3] * 3


def test_two_and_four_workers_write_the_bytes_of_one(card, tmp_path):
    chosen = recipe(tmp_path, look={})
    made = []
    for workers in (1, 2, 4):
        out = tmp_path / f"out{workers}"
        commands.run(card, chosen, out, None, Machines(workers=workers))
        made.append(tables(out))
    assert len(made[0]) == 3
    assert made[0] == made[1] == made[2]


def junk(tmp_path) -> str:
    """A card of a shard with a blank, a grey, a broken and two good pictures, one without a text."""
    blank = io.BytesIO()
    Image.new("RGB", (64, 64), (90, 120, 30)).save(blank, "JPEG")
    grey = io.BytesIO()
    Image.open(io.BytesIO(jpeg(1))).convert("L").save(grey, "JPEG")
    samples = [
        {"jpg": blank.getvalue(), "txt": b"a plain wall in the morning"},
        {"jpg": grey.getvalue(), "txt": b"ein graues Bild von einem Haus und einem Garten"},
        {"jpg": jpeg(2)[:200], "txt": b"a broken picture"},
        {"jpg": jpeg(3), "txt": b"look &amp; see http://a.b/c @me  the dogs on the beach"},
        {"jpg": jpeg(4)},
    ]
    write_shard(tmp_path / "junk" / "0.tar", samples)
    split = {"source": "shards", "path": str(tmp_path / "junk")}
    return write_yaml(tmp_path / "junk.yaml", {"train": split})


RULES = {
    "look.error": {"null": True},
    "look.entropy": {"above": 4.5},
    "look.grey": {"among": [False]},
    "text.language": {"among": ["en"]},
    "text.matched": {"at_least": 1},
}


def test_each_sample_has_the_first_reason_that_applies_and_counts_add_up(tmp_path, capsys):
    (tmp_path / "entries.txt").write_text("dogs\nbeach\ncat\n")
    text = {"entries": str(tmp_path / "entries.txt"), "languages": ["en", "de"]}
    stages = {"meta": {}, "look": {}, "text": text, "filter": {"rules": RULES}, "keep": KEEP}
    out = tmp_path / "out"
    commands.run(junk(tmp_path), recipe(tmp_path, **stages), out, None, HERE)
    assert column(out, "keep", "reason") == [
        "filter: look.entropy <= 4.5",
        "filter: look.grey not False",
        "filter: look.error",
        None,
        "filter: text.language is missing",
    ]
    assert column(out, "text", "clean")[3] == "look & see the dogs on the beach"
    assert column(out, "text", "matches")[3] == [0, 1]
    assert column(out, "text", "language") == ["en", "de", "en", "en", None]
    assert column(out, "keep", "keep") == [False, False, False, True, False]
    counts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert counts["samples"] == 5 == counts["kept"] + sum(counts["reasons"].values())


def test_a_draw_keeps_as_many_as_the_probabilities_sum_to(card, tmp_path, monkeypatch):
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab/loss.py").write_text(LOSS)
    monkeypatch.syspath_prepend(tmp_path)
    chance = np.linspace(0, 1.2, 4000)
    samples = [{"jpg": b"x"} for _ in chance]
    write_shard(tmp_path / "many" / "0.tar", samples)
    split = {"source": "shards", "path": str(tmp_path / "many")}
    many = write_yaml(tmp_path / "many.yaml", {"train": split})
    stages = {"loss": {"name": "lab.loss"}, "keep": KEEP | {"reasons": [], "draw": "loss.loss"}}
    commands.run(many, recipe(tmp_path, **stages), tmp_path / "out", None, HERE)
    kept = np.array(column(tmp_path / "out", "keep", "keep"))
    chance = np.minimum(chance, 1)
    assert abs(kept.sum() - chance.sum()) < 4 * np.sqrt((chance * (1 - chance)).sum())
    assert kept[chance == 1].all() and not kept[0]


def test_a_relaunch_makes_only_what_is_missing(card, tmp_path):
    chosen, out = recipe(tmp_path, meta={}), tmp_path / "out"
    commands.run(card, chosen, out, None, HERE)
    whole, lost = tables(out), out / "meta/00001.parquet"
    before = {file: file.stat().st_mtime_ns for file in out.glob("meta/0*.parquet")}
    lost.unlink()
    commands.run(card, chosen, out, None, HERE)
    assert tables(out) == whole
    after = {file: file.stat().st_mtime_ns for file in out.glob("meta/0*.parquet")}
    assert [file for file in before if before[file] != after[file]] == [lost]


def test_a_task_that_is_killed_is_named_and_run_alone_by_the_relaunch(card, tmp_path, monkeypatch):
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab/mortal.py").write_text(MORTAL.replace("MARK", str(tmp_path / "killed")))
    monkeypatch.syspath_prepend(tmp_path)
    chosen, out = recipe(tmp_path, mortal={"name": "lab.mortal"}), tmp_path / "out"
    with pytest.raises(ValueError, match="killed.*1 of 3 tasks"):
        commands.run(card, chosen, out, None, Machines(workers=3))
    made = tables(out)
    assert sorted(made) == ["mortal/00000.parquet", "mortal/00002.parquet"]
    commands.run(card, chosen, out, None, HERE)
    assert len(tables(out)) == 3 and not set(made.items()) - set(tables(out).items())


@pytest.mark.faults
def test_workers_end_with_a_command_that_is_killed(card, tmp_path):
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab/slow.py").write_text(SLOW.replace("MARK", str(tmp_path / "worker")))
    tool = str(Path(__file__).parents[1] / "tools/curate.py")
    chosen = recipe(tmp_path, slow={"name": "lab.slow"})
    arguments = ["run", card, "--recipe", chosen, "--out", str(tmp_path / "out"), "--workers", "2"]
    paths = os.pathsep.join([str(tmp_path), *sys.path[1:]])
    environment = os.environ | {"PYTHONPATH": paths, "PREPRETRAIN_PLUGINS": "lab"}
    command = subprocess.Popen([sys.executable, tool, *arguments], env=environment)
    while len(numbers := list(tmp_path.glob("worker?"))) < 2:
        assert command.poll() is None
        time.sleep(0.1)
    command.kill()
    command.wait()
    while any(Path(f"/proc/{file.read_text()}").exists() for file in numbers):
        time.sleep(0.1)


def test_a_failing_task_says_why_and_the_others_end_well(card, tmp_path):
    chosen, out = recipe(tmp_path, meta={}), tmp_path / "out"
    commands.run(card, chosen, out, None, HERE)
    shard = tmp_path / "shards/00001.tar"
    good = shard.read_bytes()
    shard.write_bytes(good.replace(b"picture 2", b"picture 7"))
    more = recipe(tmp_path, meta={}, look={})
    folder = Folder(out)
    with pytest.raises(ValueError, match=r"00001.tar: is not the shard that .* was begun with"):
        commands.run(card, more, out, None, HERE)
    with pytest.raises(ValueError, match=r"00001.tar: has changed since .*1 of 3 tasks"):
        commands.run_stage(folder, "look", Look(), HERE)
    assert folder.there("look") == {0, 2}
    shard.write_bytes(good)
    commands.run(card, more, out, None, HERE)
    assert folder.there("look") == {0, 1, 2}


def test_another_number_of_tasks_is_refused_by_the_command_and_by_a_task(card, tmp_path):
    chosen, out = recipe(tmp_path, meta={}), tmp_path / "out"
    commands.run(card, chosen, out, 2, HERE)
    assert len(tables(out)) == 3
    with pytest.raises(ValueError, match="--tasks 3: .* was begun with 2 tasks"):
        commands.run(card, chosen, out, 3, HERE)
    with pytest.raises(ValueError, match="is run with 3 tasks, and .* with 2"):
        commands.MapTask(out, "meta", Meta())(None, 0, 3)
    commands.run(card, chosen, out, None, HERE)  # as in the folder


def test_other_options_are_refused_until_again_is_said(card, tmp_path):
    out = tmp_path / "out"
    first = {"look": {}, "filter": {"rules": {"look.entropy": {"above": 0}}}, "keep": KEEP}
    other = first | {"filter": {"rules": {"look.entropy": {"above": 9}}}}
    commands.run(card, recipe(tmp_path, **first), out, None, HERE)
    look = (out / "look/00000.parquet").stat().st_mtime_ns
    assert all(column(out, "keep", "keep"))
    with pytest.raises(ValueError, match="filter, keep: made with other options.*--again"):
        commands.run(card, recipe(tmp_path, **other), out, None, HERE)
    commands.run(card, recipe(tmp_path, **other), out, None, HERE, again=True)
    assert not any(column(out, "keep", "keep"))
    assert (out / "look/00000.parquet").stat().st_mtime_ns == look


def test_a_table_that_was_cut_off_is_named(card, tmp_path):
    out = tmp_path / "out"
    commands.run(card, recipe(tmp_path, look={}), out, None, HERE)
    cut = out / "look/00002.parquet"
    cut.write_bytes(cut.read_bytes()[:-20])
    stages = {"look": {}, "filter": {"rules": {"look.entropy": {"above": 0}}}}
    with pytest.raises(ValueError, match="look/00002.parquet: cannot be read"):
        commands.run(card, recipe(tmp_path, **stages), out, None, HERE)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_said_and_leaves_no_torn_table(card, tmp_path, monkeypatch, workers):
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab/full.py").write_text(FULL)
    monkeypatch.syspath_prepend(tmp_path)
    chosen = recipe(tmp_path, full={"name": "lab.full"})
    with pytest.raises(OSError, match="No space left on device"):
        commands.run(card, chosen, tmp_path / "out", None, Machines(workers=workers))
    assert not tables(tmp_path / "out")


def test_keys_that_lead_elsewhere_write_nothing_outside_of_the_folder(tmp_path):
    keys = ["../../../escape", "/tmp/absolute", "line\nend", "..", "plain"]
    write_shard(tmp_path / "odd" / "0.tar", [{"jpg": jpeg(n)} for n in range(5)], keys)
    split = {"source": "shards", "path": str(tmp_path / "odd")}
    odd = write_yaml(tmp_path / "odd.yaml", {"train": split})
    chosen = recipe(tmp_path, meta={}, keep=KEEP | {"reasons": []}, write={})
    before = set(tmp_path.rglob("*"))
    commands.run(odd, chosen, tmp_path / "out", None, HERE)
    made = set(tmp_path.rglob("*")) - before
    assert all(path.is_relative_to(tmp_path / "out") for path in made if path.name != "0.tar.index")
    assert column(tmp_path / "out", "meta", "key") == keys
    with tarfile.open(tmp_path / "out/write/00000.tar") as tar:
        assert tar.getnames() == [f"00000000000{n}.jpg" for n in range(5)]
        assert tar.extractfile("000000000003.jpg").read() == jpeg(3)


def test_written_shards_hold_what_is_kept_byte_by_byte(card, tmp_path):
    rules = {"rules": {"meta.key": {"among": ["0001", "0003"]}}}
    chosen = recipe(tmp_path, meta={}, filter=rules, keep=KEEP, write={})
    commands.run(card, chosen, tmp_path / "out", None, HERE)
    written = Shards(path=str(tmp_path / "out/write"))
    whole = Shards(path=str(tmp_path / "shards"))
    assert len(written) == 6
    for number, row in enumerate((1, 3, 5, 7, 9, 11)):
        assert written[number] | {"key": ""} == whole[row] | {"key": ""}


@pytest.mark.parametrize(
    "stages, message",
    [
        ({}, "a recipe is a mapping of stages"),
        ({"lok": {}}, "lok: no curation stage 'lok'. Did you mean 'look'"),
        ({"look": {"size": 3}}, "look: curation_stage.size: unknown option"),
        ({"look": [3]}, r"look: \[3\] is no mapping"),
        ({"../look": {}}, "is no name of a stage"),
        ({"filter": {"rules": {"look.entropy": {"above": 3}}}}, "reads the table 'look', which no"),
        (
            {"look": {}, "filter": {"rules": {"look.entrpy": {"above": 3}}}},
            "has no column 'entrpy'. Did you mean 'entropy'",
        ),
        (
            {"look": {}, "filter": {"rules": {"look.entropy": {"over": 3}}}},
            "entropy.over: 3: tests",
        ),
        ({"look": {}, "filter": {"rules": {"look.entropy": {"above": "x"}}}}, "'x': tests are"),
        ({"look": {}, "filter": {"rules": {}}}, "there are none"),
        ({"look": {}, "keep": {"name": "decide", "reasons": ["look"]}}, "has no column 'reason'"),
        ({"text": {"entries": "missing.txt"}}, "there is no file missing.txt"),
    ],
)
def test_a_slip_in_a_recipe_is_named_before_anything_runs(card, tmp_path, stages, message):
    with pytest.raises(ValueError, match=message):
        commands.run(card, recipe(tmp_path, **stages), tmp_path / "out", None, HERE)
    assert not (tmp_path / "out").exists()


def test_every_recipe_that_comes_with_the_project_is_read():
    for file in Path(__file__).parents[1].glob("configs/curate/*.yaml"):
        assert recipes.load(file).stages


def test_plan_says_what_is_left_and_writes_nothing(card, tmp_path, capsys):
    chosen, out = recipe(tmp_path, meta={}, look={}), tmp_path / "out"
    commands.plan(card, chosen, out, None, HERE)
    assert not out.exists()
    commands.run(card, recipe(tmp_path, meta={}), out, None, HERE)
    commands.plan(card, recipe(tmp_path, meta={}, look={}), out, None, HERE)
    said = capsys.readouterr().out
    commands.run(card, recipe(tmp_path, text={}), out, None, HERE)
    commands.plan(card, recipe(tmp_path, text={"languages": ["en"]}), out, None, HERE)
    assert "text: was made with other options" in capsys.readouterr().out
    assert "12 samples in 3 shards" in said and "meta: done" in said
    assert "look: 3 of 3 shards" in said


def test_a_source_that_is_no_shards_is_refused(tmp_path):
    split = {"source": "synthetic", "images": 4}
    synthetic = write_yaml(tmp_path / "made.yaml", {"train": split})
    with pytest.raises(ValueError, match="only shards are curated.*make_shards"):
        commands.plan(synthetic, recipe(tmp_path, meta={}), tmp_path / "out", None, HERE)


def test_what_img2dataset_says_is_taken_over(card, tmp_path):
    status = ["success", "failed_to_download", "success", "success", "success"]
    stated = {
        "key": ["0002", "0009", "0000", "0001", "0003"],
        "status": status,
        "sha256": list("cxabd"),
    }
    pq.write_table(pa.table(stated), tmp_path / "shards/00000.parquet")
    chosen = recipe(tmp_path, meta={})
    commands.run(card, chosen, tmp_path / "out", None, HERE)
    assert column(tmp_path / "out", "meta", "original_sha256")[:5] == [*"abcd", None]
    assert column(tmp_path / "out", "meta", "status")[3:5] == ["success", None]
    assert column(tmp_path / "out", "meta", "width") == [48] * 12
    pq.write_table(pa.table(stated).slice(1), tmp_path / "shards/00000.parquet")
    with pytest.raises(ValueError, match="has 3 successful rows, and the shard 4 samples.*move it"):
        commands.run(card, chosen, tmp_path / "again", None, HERE)


def test_the_nouns_of_a_text_are_synsets_by_catlips_rule(tmp_path):
    if not Path("/usr/share/wordnet").is_dir():
        pytest.skip("no wordnet-base")
    stages = {"text": {"synsets": "wordnet"}}
    commands.run(junk(tmp_path), recipe(tmp_path, **stages), tmp_path / "out", None, HERE)
    assert "n02084071" in column(tmp_path / "out", "text", "synsets")[3]  # dogs
    with pytest.raises(ValueError, match="text.synsets: timm does not say which sense"):
        chosen = recipe(tmp_path, text={"synsets": "timm"})
        commands.run(junk(tmp_path), chosen, tmp_path / "other", None, HERE)


def test_entries_are_matched_as_metaclip_does():
    golden = Path(os.environ.get("PREPRETRAIN_GOLDEN", Path(__file__).parent / "golden"))
    golden /= "metaclip_balance.json"
    if not golden.exists():
        pytest.skip(f"no {golden}")
    for language in json.loads(golden.read_text())["languages"].values():
        automaton = text.matcher(language["entries"])
        for row in language["texts"]:
            assert text.matches(automaton, row["text"]) == row["v2"], row["text"]


@pytest.mark.parametrize("package", ["datatrove", "duckdb", "py3langid"])
def test_a_missing_package_is_named_with_the_extra(card, tmp_path, monkeypatch, package):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else find(name)
    )
    with pytest.raises(ValueError, match=rf"needs the package {package}.*prepretrain\[data\]"):
        commands.run(card, recipe(tmp_path, text={}), tmp_path / "out", None, HERE)


def test_training_on_what_is_kept_reads_its_weights(card, tmp_path):
    rules = {"rules": {"meta.key": {"among": ["0001", "0003"]}}}
    out = tmp_path / "out"
    commands.run(card, recipe(tmp_path, meta={}, filter=rules, keep=KEEP), out, None, HERE)
    source = Shards(path=str(tmp_path / "shards"), keep=str(out / "keep"))
    assert source.weights[:].tolist() == [0, 1, 0, 1] * 3
