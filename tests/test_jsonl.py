"""metrics.jsonl and its like: torn lines and any bytes leave the other rows readable, and a full disk
loses none."""

import json
import logging
import random
import resource
from pathlib import Path

import pytest

from prepretrain import jsonl
from prepretrain.cluster import slurm
from prepretrain.reports import curves
from prepretrain.runs import launch
from prepretrain.training.log import ROLLBACKS, Metrics

DAMAGE = [
    b'{"step": 3, "lo',
    b"\xff\xfe\n",
    b"{}\n",
    b"[1]\n",
    b"null\n",
    b'{"step": "3"}\n',
    b"\n",
]
DAMAGE += [b'{"step": true}\n', b"[" * 5000 + b"\n", b"\0" * 9000 + b"\n", b'{"step": 1e400}\n']


def written(path: Path, lines: list[bytes]) -> Path:
    path.write_bytes(b"".join(lines))
    return path


def steps(path: Path) -> list[int]:
    return [row["step"] for row in jsonl.rows(path)]


def line(step: int, **more) -> bytes:
    return json.dumps({"step": step, "images": step * 8, "loss": 1.0, **more}).encode() + b"\n"


def test_lines_are_the_same_from_both_ends_whatever_their_lengths(tmp_path):
    rng = random.Random(0)
    for _ in range(50):
        sizes = [rng.choice([0, 1, 50, 70_000]) for _ in range(rng.randrange(6))]
        lines = [bytes(rng.choice(b"ab\r\x0b") for _ in range(size)) + b"\n" for size in sizes]
        path = written(tmp_path / "x", [*lines, *rng.choice([[], [b"torn"]])])
        content, found = path.read_bytes(), list(jsonl.backwards(path))
        assert b"".join(text for _, text in found[::-1]) == content
        assert all(text.count(b"\n") == 1 or text == b"torn" for _, text in found)
        assert all(content[at : at + len(text)] == text for at, text in found)
    assert list(jsonl.backwards(tmp_path / "none")) == [] == list(jsonl.rows(tmp_path / "none"))


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("where", ["within", "last"])
def test_a_damaged_line_hides_no_other_row_from_any_reader(damage, where, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [line(1), line(2, seconds=2.5)]
    if where == "within":
        damage = damage if damage.endswith(b"\n") else damage + b"\n"
        lines.insert(1, damage)
    else:
        lines.append(damage)
    path = written(tmp_path / "metrics.jsonl", lines)
    written(tmp_path / "config.yaml", [b""])
    assert steps(path) == [1, 2] and jsonl.last(path)["step"] == 2
    assert "step 2 of" in launch.status(".")
    assert len(curves.metrics(".", ["loss"])) == 2
    assert slurm.attempts(tmp_path) == []
    log = Metrics(tmp_path, 2)
    assert log.seconds == 2.5 and "loss" in log.measured
    log.write({"step": 3})
    log.close()
    assert steps(path) == [1, 2, 3] and path.read_bytes().endswith(b'\n{"step": 3}\n')


def test_a_run_that_continues_keeps_what_it_had_logged_by_then(tmp_path):
    path = tmp_path / "metrics.jsonl"
    back = {"step": 4, ROLLBACKS: [{"failed": 7, "to": 4}]}
    lines = [line(s, seconds=float(s)) for s in (1, 2, 3, 4)]
    again = [json.dumps(back).encode() + b"\n", b'{"step": 4, "val_loss": 2}\n', line(5), b'{"st']
    written(path, [*lines, *again])
    log = Metrics(tmp_path, 4)
    log.close()
    assert path.read_bytes() == b"".join([*lines, b'{"step": 4, "val_loss": 2}\n'])
    assert log.seconds == 4.0 and "val_loss" in log.measured
    Metrics(tmp_path, 0).close()
    assert path.read_bytes() == b""


def test_damaged_lines_are_counted_in_the_log(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("prepretrain"), "propagate", True)
    list(jsonl.rows(written(tmp_path / "x", [line(1), b"{}\n", b"?\n"])))
    assert "x: 2 lines are damaged, and skipped" in caplog.text


def test_rows_that_a_full_disk_does_not_take_are_written_when_there_is_room(tmp_path):
    log = Metrics(tmp_path, 0)
    log.board = None
    log.write({"step": 1})
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, old[1]))  # in the middle of a row
        log.write({"step": 2})
        log.write({"step": 3})
        assert "metrics.jsonl: cannot be written" in log.unwritten()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    log.write({"step": 4})
    log.close()
    assert steps(tmp_path / "metrics.jsonl") == [1, 2, 3, 4]
