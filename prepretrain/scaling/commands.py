"""The commands on a study: plan, run, status, collect. Each prints for a person, and JSON as its last
line."""

import json
import time
from dataclasses import asdict

from prepretrain.cluster import slurm as clusters
from prepretrain.scaling import plan as plans
from prepretrain.scaling import progress, work
from prepretrain.scaling.collect import collect as collected
from prepretrain.scaling.plan import Planned
from prepretrain.scaling.study import Study, read
from prepretrain.training import log


def _planned(
    study: str, out: str | None, nodes: int, procs: int
) -> tuple[Study, list[Planned], int]:
    found, world = read(study, out), nodes * procs
    return found, plans.plan(found, world), world


def plan(study: str, out: str | None, nodes: int, procs: int) -> None:
    """Says what all runs are and cost; starts nothing."""
    found = plans.facts(*_planned(study, out, nodes, procs))
    print(plans.said(found))
    print(json.dumps(found))


def run(
    study: str,
    out: str | None,
    nodes: int,
    procs: int,
    *,
    jobs: int,
    slurm: str | None,
    hours: float,
) -> None:
    """Trains and measures what is not done yet. Raises ValueError, before anything starts, for what
    cannot run or was started with another config; RuntimeError at the end, if runs failed."""
    if jobs < 1 or nodes < 1 or procs < 1:
        raise ValueError("--jobs, --nodes and --procs must be at least 1.")
    if nodes > 1 and slurm is None:
        raise ValueError(f"--nodes {nodes}: more than one machine needs --slurm PARTITION.")
    found, planned, world = _planned(study, out, nodes, procs)
    facts = plans.facts(found, planned, world)
    if facts["stale"]:
        rows = [f"{name}: {'; '.join(keys)}" for name, keys in facts["stale"].items()]
        raise ValueError(
            f"{found.path}: was edited after these runs of {found.folder} had begun:\n  "
            + "\n  ".join(rows)
            + "\nUndo that, remove their folders to train them anew, or name another folder by --out."
        )
    found.folder.mkdir(parents=True, exist_ok=True)
    log.setup()
    print(plans.said(facts), flush=True)
    if slurm is not None:
        asked = asdict(planned[0].config.slurm)
        clusters.check(slurm, found.folder, hours=hours, **asked)
        size = {"partition": slurm, "nodes": nodes, "procs": procs, "hours": hours}
        print(f"submitted: {', '.join(work.on_slurm(found, planned, **size)) or 'nothing is left'}")
        return
    failed = work.Here(found, planned, jobs=jobs, procs=procs).run()
    if failed:
        rows = [f"{name}: {why}" for name, why in failed.items()]
        raise RuntimeError(
            f"{found.folder}: {len(failed)} of {len(planned)} runs failed; the same command tries them "
            "again:\n  " + "\n  ".join(rows)
        )


def status(study: str, out: str | None, nodes: int, procs: int, *, watch: float | None) -> None:
    """Shows how far each run is; `watch`: again after so many seconds, until all are done."""
    found, planned, _ = _planned(study, out, nodes, procs)
    while True:
        states = progress.states(found, planned)
        home = "" if watch is None else "\033[H\033[2J"
        print(f"{home}{progress.table(states)}", flush=True)
        if watch is None or all(one.what == "done" for one in states):
            break
        time.sleep(watch)
    print(json.dumps([asdict(one) for one in states]))


def collect(study: str, out: str | None, nodes: int, procs: int) -> None:
    """Writes the table of all runs that are done, and says what is left out of it."""
    paths, left = collected(*_planned(study, out, nodes, procs))
    for line in left:
        print(f"left out: {line}")
    print(json.dumps({"tables": [str(path) for path in paths], "left_out": left}))
