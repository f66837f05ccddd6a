"""Starts a stage: in this process, in local processes or on SLURM through submitit, or under
torchrun's."""

import json
import logging
import os
import signal
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import submitit

from prepretrain import config as configs
from prepretrain import jsonl
from prepretrain.cluster import lease
from prepretrain.cluster import slurm as clusters
from prepretrain.config import Config, Evaluating, Slurm, Suite, Training
from prepretrain.distributed import checkpoint
from prepretrain.distributed import group as distributed
from prepretrain.runs import doctor, plan, replay, run, suite
from prepretrain.training import log
from prepretrain.training.fit import Stopped
from prepretrain.training.signals import Signals, deaf_children

logger = logging.getLogger(__name__)

_FOREVER = 10**7  # minutes: processes here have no time limit


def launch(
    stage: str,
    overrides: list[str],
    *,
    init: str | None = None,
    branch: str | None = None,
    out: str | None = None,
    nodes: int = 1,
    procs: int = 1,
    slurm: str | None = None,
    hours: float = 72.0,
    dry_run: bool = False,
) -> Path:
    """Checks a stage's config here, then runs it; returns the run's folder.

    slurm: a partition. hours: time limit of a SLURM job. Raises ValueError for what the user can
    mend, before anything is started.
    """
    config = configs.load(stage, overrides, init, branch)
    folder = _folder(config, stage, out)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out: {folder} is a file, and a run is a folder. Name another.")
    inherited = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    world = int(os.environ["WORLD_SIZE"]) if inherited else nodes * procs
    if nodes < 1 or procs < 1:
        raise ValueError(f"--nodes {nodes} --procs {procs}: both must be at least 1.")
    if nodes > 1 and slurm is None and not inherited:
        raise ValueError(
            f"--nodes {nodes}: more than one machine needs --slurm PARTITION, or torchrun on each."
        )
    if isinstance(config, (Evaluating, Suite)) and config.init is None:
        raise ValueError(
            "--init: an evaluation needs the model to evaluate: a run's folder or a file."
        )
    if dry_run:
        if isinstance(config, Suite):
            entries, facts = suite.dry_run(config, folder, world)
            merged = [f"# {entry.name}\n{configs.text(entry.config)}" for entry in entries]
            _show(merged, {"stage": stage, "entries": facts})
        else:
            _show([configs.text(config)], run.dry_run(config, folder, stage, world))
    elif inherited or (world == 1 and slurm is None):
        _start(config, folder)
    else:
        log.setup()
        if slurm is not None:
            clusters.check(slurm, folder, hours=hours, **asdict(config.slurm))
        (suite if isinstance(config, Suite) else run).check(config, folder, world)
        held = lease.refusal(folder) if isinstance(config, Training) else None
        if held is not None:
            raise ValueError(held)
        if slurm is None:
            here(config, folder, procs)
        else:
            tasks = [Task(one, folder) for one in _jobs(config)]
            size = {"nodes": nodes, "procs": procs, "hours": hours}
            for job in queue(tasks, folder, slurm, config.slurm, **size):
                logger.info("%s: job %s; its output: %s", folder, job.job_id, job.paths.stderr)
    return folder


def look_again(dump: str, procs: int) -> None:
    """Replays a dumped step in `procs` processes here, and prints what was found; the last line is
    JSON. Raises ValueError for what is no dump, or cannot be replayed so."""
    replay.check(Path(dump), procs)
    device = configs.read_training(Path(dump).parents[1] / "config.yaml").device
    distributed.together(procs, _replay, Path(dump), device=device)


def _replay(dump: Path) -> None:
    log.setup()
    rows = replay.replay(dump)
    if distributed.is_main():
        print(replay.told(rows))


def examine(stage: str | None, overrides: list[str], *, out: str | None, procs: int) -> bool:
    """Whether this machine, and a stage's data on it, will do; prints a table, and JSON as its last
    line."""
    config = None if stage is None else configs.load(stage, overrides)
    if config is not None and not isinstance(config, Training):
        raise ValueError(
            f"--doctor: --stage {stage} does not train. Leave it out, or name another."
        )
    folder = Path("runs") if out is None and stage is None else _folder(config, stage or "", out)
    with tempfile.TemporaryDirectory() as place:
        said = Path(place, "said")
        device = "auto" if config is None else config.device
        distributed.together(procs, _examine, folder, config, said, device=device)
        text = said.read_text()
    print(text)
    return json.loads(text.splitlines()[-1])["ok"]


def _examine(folder: Path, config: Training | None, said: Path) -> None:
    found = doctor.examine(folder, config)
    if distributed.is_main():
        said.write_text(doctor.told(found))


def _start(config: Config, folder: Path) -> None:
    (suite if isinstance(config, Suite) else run).start(config, folder)


def _jobs(config: Config) -> list[Config]:
    """What each job does: one does all, unless a suite asks for one each."""
    if not isinstance(config, Suite) or config.jobs == "one":
        return [config]
    return [replace(config, suite=[one]) for one in config.suite]


def _folder(config: Config, stage: str, out: str | None) -> Path:
    """--out; or the run that is evaluated; or the trunk and a branch's length; or runs/<stage>."""
    if out is not None:
        return Path(out)
    if isinstance(config, Training) and config.branch is not None:
        return Path(f"{config.branch.rstrip('/')}_{config.length}")
    if (
        isinstance(config, (Evaluating, Suite))
        and config.init
        and Path(config.init.partition(":")[0]).is_dir()
    ):
        return Path(config.init.partition(":")[0])
    return Path("runs") / stage.removesuffix(".yaml").removeprefix("configs/").lstrip("./")


def _show(merged: list[str], facts: dict[str, Any]) -> None:
    """The merged configs, what a person reads of the facts, and as the last line all of them as one
    JSON object."""
    print("\n---\n".join(merged))
    for entry in facts.get("entries", [facts]):
        if "summary" in entry:
            print(f"---\n{entry['summary']}")
    print(json.dumps(facts))


class Task:
    """What submitit runs in each process; SLURM starts the same again after a requeue, and the run
    resumes."""

    def __init__(self, config: Config, folder: Path, gpus: str | None = None):
        """gpus: the value of CUDA_VISIBLE_DEVICES that the processes are to see, if any: submitit's
        local ones otherwise see no GPU."""
        self.config, self.folder, self.gpus = config, folder, gpus

    def __call__(self) -> None:
        """Joins the others by submitit's description of the job."""
        if clusters.job() is None:
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
            os.environ.update({} if self.gpus is None else {"CUDA_VISIBLE_DEVICES": self.gpus})
        clusters.join()
        _start(self.config, self.folder)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """The same task again: all state is in the run's folder."""
        return submitit.helpers.DelayedSubmission(self)


def here(config: Config, folder: Path, procs: int) -> None:
    """Runs a checked config here to its end: in this process, or in as many as asked for."""
    if procs == 1:
        return _start(config, folder)
    executor = submitit.AutoExecutor(folder=folder / "submitit", cluster="local")
    executor.update_parameters(nodes=1, tasks_per_node=procs, timeout_min=_FOREVER)
    # a terminal's Ctrl-C goes to all processes, and submitit's would kill the others a second later
    with deaf_children():
        job = executor.submit(Task(config, folder, os.environ.get("CUDA_VISIBLE_DEVICES")))
    logger.info("%s: %d processes; their output: %s", folder, procs, job.paths.stderr)
    _follow(job, procs, folder / "log.txt")


def queue(
    tasks: list[Task], folder: Path, partition: str, asked: Slurm, **size: Any
) -> list[submitit.Job]:
    """Submits tasks, several as an array, whose output goes to a folder; they are alike in what they
    need. size: nodes, procs, hours."""
    options = {"partition": partition, **size, **asdict(asked)}
    options["cpus"] = _cores_asked(tasks[0].config, partition, size["procs"])
    return clusters.submit(tasks, folder, **options)


def _cores_asked(config: Config, partition: str, procs: int) -> int:
    """Cores of each process. What no node has is refused here, as SLURM may let such a job wait for
    ever; where the config does not say how many, a node's are shared out."""
    whole, wanted = clusters.cores_of_node(partition), config.slurm.cpus or cores(config)
    if whole is None or wanted * procs <= whole:
        return wanted
    if config.slurm.cpus is not None or procs > whole:
        raise ValueError(
            f"slurm.cpus: {procs} processes on a node with {wanted} cores each, and no node of "
            f"'{partition}' has more than {whole}. Ask for fewer: --procs, slurm.cpus."
        )
    logger.warning(
        "%d cores a process, not the %d that its loading processes could use: a node of '%s' has %d",
        *(whole // procs, wanted, partition, whole),
    )
    return whole // procs


def cores(config: Config) -> int:
    """What a process of a job is given where slurm.cpus does not say: a core for each of its loading
    processes, one to compute, one to spare. SLURM itself gives one."""
    if isinstance(config, Suite):
        given = [entry.get("evaluator", {}).get("workers") for entry in config.suite]
    elif isinstance(config, Evaluating):
        given = [config.evaluator.get("workers")]
    else:
        given = [config.data.workers]
    return max(4 if workers is None else workers for workers in given) + 2


def status(run: str) -> str:
    """How far a run is, for a person: its jobs, step, newest checkpoint, ends so far and logs.

    Raises ValueError for a folder that is no run's.
    """
    folder = Path(run)
    if not (folder / "config.yaml").exists() and not (folder / "submitit").exists():
        raise ValueError(f"--status: {run} is no run's folder: it holds no config.yaml.")
    lines = [str(folder)]
    for job in _submitted(folder):
        lines.append(f"  job {job}: {clusters.state(job) or 'unknown to SLURM'}")
    metrics = folder / "metrics.jsonl"
    if (row := jsonl.last(metrics)) is not None:
        age = time.time() - metrics.stat().st_mtime
        lines.append(f"  step {row['step']} of {_steps(folder)}, {age:.0f} s ago")
    saved = checkpoint.listed(folder)
    lines.append(f"  newest checkpoint: {saved[-1] if saved else 'none'}")
    if (folder / "export" / "model.safetensors").exists():
        lines.append(f"  done: {folder / 'export' / 'model.safetensors'}")
    for one in clusters.attempts(folder):
        step = "" if one.get("step") is None else f" at step {one['step']}"
        lines.append(
            f"  {one['time']} job {one['job']}, start {one['restart'] + 1}: {one['ended']}{step}: "
            f"{one['error'].partition(chr(10))[0][:200]}"
        )
    own = f", of each process: {folder / 'submitit'}/*_log.err"
    lines.append(f"  logs: {folder / 'log.txt'}{own if (folder / 'submitit').is_dir() else ''}")
    return "\n".join(lines)


def _submitted(folder: Path) -> list[str]:
    """The numbers of the SLURM jobs that were submitted for a folder, oldest first."""
    found = [p.name.removesuffix("_submission.sh") for p in folder.glob("submitit/*_submission.sh")]
    return sorted(found)


def _steps(folder: Path) -> str:
    try:
        return str(plan.steps(folder))
    except (ValueError, OSError):  # its data are not here
        return "?"


def _follow(job: submitit.Job, processes: int, path: Path) -> None:
    """Shows the run's log as it grows, until its processes end, to which it passes on what asks them
    to stop. Raises Stopped if they did, RuntimeError if they failed."""
    shown = path.stat().st_size if path.exists() else 0
    asked = Signals((signal.SIGTERM, signal.SIGINT))
    passed = False
    try:
        while True:
            done = job.done()
            if path.exists():
                with path.open(errors="replace") as file:
                    file.seek(shown)
                    print(file.read(), end="", flush=True)
                    shown = file.tell()
            if done:
                break
            if asked.received is not None and not passed:
                os.kill(int(job.job_id), signal.SIGTERM)  # submitit's own process tells the others
                passed = True
            time.sleep(0.5)
    finally:
        asked.restore()
    for task in range(processes):
        error = job.task(task).exception()
        if passed:
            raise Stopped(f"{path.parent}: stopped by a signal. The same command continues it.")
        if error is not None:
            raise RuntimeError(
                f"process {task} failed. Its output: {job.task(task).paths.stderr}\n{error}"
            )
