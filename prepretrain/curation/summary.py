"""Counts what became of the samples of a curation."""

from pathlib import Path
from typing import Any

from prepretrain.curation.engine import Tables
from prepretrain.curation.folder import Folder


def summary(out: Path) -> dict[str, Any]:
    """{"samples", "kept", "weight": their sum, "reasons": {reason: samples}}, the
    most frequent first; samples are kept + reasons, in each shard, or ValueError is raised."""
    folder = Folder(out)
    tables = Tables(folder, {"keep": ("keep", "reason", "weight")}, out / "tasks" / "spill")
    wrong = tables.query(
        "SELECT shard, count(*), count(*) FILTER (keep) + count(reason) FROM keep GROUP BY shard "
        "HAVING count(*) <> count(*) FILTER (keep) + count(reason) ORDER BY shard"
    ).fetchall()
    if wrong:
        shard, rows, counted = wrong[0]
        raise ValueError(
            f"{folder.table('keep', shard)}: {rows} samples went in, and {counted} are kept or have a reason."
        )
    ((samples, kept, weight),) = tables.query(
        "SELECT count(*), count(*) FILTER (keep), sum(weight) FROM keep"
    ).fetchall()
    reasons = tables.query(
        "SELECT reason, count(*) AS n FROM keep WHERE reason IS NOT NULL GROUP BY reason ORDER BY n DESC, reason"
    ).fetchall()
    return {"samples": samples, "kept": kept, "weight": weight or 0.0, "reasons": dict(reasons)}


def as_text(counts: dict[str, Any]) -> str:
    """The summary as lines: went in, each stage's reasons, kept."""
    lines = [f"{counts['samples']:>13,} went in"]
    by_stage: dict[str, dict[str, int]] = {}
    for reason, number in counts["reasons"].items():
        stage, _, text = reason.partition(": ")
        by_stage.setdefault(stage, {})[text] = number
    for stage, reasons in by_stage.items():
        lines.append(f"{-sum(reasons.values()):>13,} {stage}")
        lines += [f"{'':>13}   {number:,} {text}" for text, number in reasons.items()]
    share = counts["kept"] / max(counts["samples"], 1)
    lines.append(f"{counts['kept']:>13,} kept ({share:.1%}), of weight {counts['weight']:,.1f}")
    return "\n".join(lines)
