"""Says how far each run of a study is."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prepretrain import jsonl
from prepretrain.cluster import lease, slurm
from prepretrain.files import read_json, write_json
from prepretrain.runs import results, suite
from prepretrain.scaling.plan import Planned
from prepretrain.scaling.study import Study

# done: trained and measured; trained: not measured yet; stopped: cut off between its first and last step
STATES = ("done", "trained", "training", "queued", "stopped", "failed", "waiting")


@dataclass(frozen=True)
class State:
    """Where a run is."""

    name: str
    what: str  # one of STATES
    step: int
    of: int
    missing: list[str]  # evaluations that are not made
    results: dict[str, Any]
    why: str = ""  # it failed


class Notes:
    """A small file in a study's folder: {run: what is noted of it}."""

    def __init__(self, folder: Path, name: str):
        self.path = folder / name

    def read(self) -> dict[str, Any]:
        """All entries."""
        return read_json(self.path) if self.path.exists() else {}

    def write(self, **changed: Any) -> None:
        """Changes some entries; None removes one."""
        entries = self.read() | changed
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {k: v for k, v in entries.items() if v is not None})


def failures(study: Study) -> Notes:
    """Why runs failed, in words."""
    return Notes(study.folder, "failures.json")


def jobs(study: Study) -> Notes:
    """The newest SLURM jobs of runs: {"train": job, "evaluate": job}."""
    return Notes(study.folder, "jobs.json")


def states(study: Study, planned: list[Planned]) -> list[State]:
    """The state of each run."""
    failed, queued = failures(study).read(), jobs(study).read()
    attempts = slurm.attempts(study.folder) if queued else []
    return [_state(study, one, failed, queued.get(one.name, {}), attempts) for one in planned]


def _state(
    study: Study,
    one: Planned,
    failed: dict[str, str],
    queued: dict[str, str],
    attempts: list[dict[str, Any]],
) -> State:
    folder, trained = one.run.folder, one.trained
    missing = suite.missing(one.run.suite(study.evaluations), folder) if study.evaluations else []
    row = jsonl.last(folder / "metrics.jsonl") or {"step": 0}
    why = failed.get(one.name) or _error(queued, attempts)
    if trained and not missing:
        what, why = "done", ""
    elif not trained and folder.exists() and lease.refusal(folder) is not None:
        what, why = "training", ""
    elif active(queued):
        what, why = "queued", ""
    elif why:
        what = "failed"
    elif trained:
        what = "trained"
    else:
        what = "stopped" if row["step"] else "waiting"
    return State(one.name, what, row["step"], one.steps, missing, results.measured(folder), why)


def active(queued: dict[str, str]) -> bool:
    """Whether one of a run's SLURM jobs waits or runs."""
    return any((slurm.state(job) or "COMPLETED") not in slurm.FINAL for job in queued.values())


def _error(queued: dict[str, str], attempts: list[dict[str, Any]]) -> str:
    """Why the newest job of a run ended for good, if it failed."""
    ends = [a for a in attempts if a["job"] in queued.values() and a["ended"] == "over"]
    return ends[-1]["error"].partition("\n")[0] if ends else ""


def table(found: list[State]) -> str:
    """The states for a person."""
    counts = {what: sum(one.what == what for one in found) for what in STATES}
    lines = [", ".join(f"{count} {what}" for what, count in counts.items() if count)]
    for one in found:
        loss = one.results.get("val_loss")
        facts = "" if loss is None else f"val_loss {loss:.4g}"
        if one.what == "trained":
            facts = f"to measure: {', '.join(one.missing)}"
        lines.append(
            f"{one.name:40} {one.what:9} {one.step:>8,} of {one.of:>8,}  {one.why or facts}"
        )
    return "\n".join(lines)
