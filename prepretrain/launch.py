"""Starts a stage: in this process, in local processes or on SLURM through submitit, or under
torchrun's."""

import json
import logging
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import submitit

from prepretrain import config as configs
from prepretrain import distributed, doctor, log, replay, run, suite
from prepretrain.config import Config, Evaluating, Suite, Training

logger = logging.getLogger(__name__)


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
        (suite if isinstance(config, Suite) else run).check(config, folder, world)
        for name, job in _jobs(config, folder, slurm):
            _submit(Task(job, folder), folder, nodes, procs, slurm, hours, name)
    return folder


def look_again(dump: str, procs: int) -> None:
    """Replays a dumped step in `procs` processes here, and prints what was found; the last line is
    JSON. Raises ValueError for what is no dump, or cannot be replayed so."""
    replay.check(Path(dump), procs)
    distributed.together(procs, _replay, Path(dump))


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
        distributed.together(procs, _examine, folder, config, said)
        text = said.read_text()
    print(text)
    return json.loads(text.splitlines()[-1])["ok"]


def _examine(folder: Path, config: Training | None, said: Path) -> None:
    found = doctor.examine(folder, config)
    if distributed.is_main():
        said.write_text(doctor.told(found))


def _start(config: Config, folder: Path) -> None:
    (suite if isinstance(config, Suite) else run).start(config, folder)


def _jobs(config: Config, folder: Path, slurm: str | None) -> list[tuple[str, Config]]:
    """(a job's name, what it does): one, unless a suite asks SLURM for one each."""
    if slurm is None or not isinstance(config, Suite) or config.jobs == "one":
        return [(str(folder), config)]
    return [(f"{folder}:{one['stage']}", replace(config, suite=[one])) for one in config.suite]


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
    """The merged configs and, as the last line, the facts as one JSON object."""
    print("\n---\n".join(merged))
    print(json.dumps(facts))


class Task:
    """What submitit runs in each process; SLURM starts the same again after a requeue, and the run
    resumes."""

    def __init__(self, config: Config, folder: Path):
        self.config, self.folder = config, folder

    def __call__(self) -> None:
        """Joins the others by submitit's description of the job."""
        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
        _start(self.config, self.folder)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """The same task again: all state is in the run's folder."""
        return submitit.helpers.DelayedSubmission(self)


def _submit(
    task: Task, folder: Path, nodes: int, procs: int, slurm: str | None, hours: float, name: str
) -> None:
    executor = submitit.AutoExecutor(
        folder=folder / "submitit", cluster="slurm" if slurm else "local"
    )
    executor.update_parameters(
        name=name, nodes=nodes, tasks_per_node=procs, timeout_min=round(hours * 60)
    )
    if slurm:
        executor.update_parameters(slurm_partition=slurm)
    job = executor.submit(task)
    logger.info(
        "%s: job %s of %d x %d processes; its output: %s",
        name,
        job.job_id,
        nodes,
        procs,
        job.paths.stderr,
    )
    if slurm is None:
        _follow(job, nodes * procs, folder / "log.txt")


def _follow(job: submitit.Job, processes: int, path: Path) -> None:
    """Shows the run's log as it grows, until its processes end; raises if they failed."""
    shown = path.stat().st_size if path.exists() else 0
    try:
        while True:
            done = job.done()
            if path.exists():
                with path.open() as file:
                    file.seek(shown)
                    print(file.read(), end="", flush=True)
                    shown = file.tell()
            if done:
                break
            time.sleep(0.5)
    except KeyboardInterrupt:
        job.cancel()
        raise
    for task in range(processes):
        error = job.task(task).exception()
        if error is not None:
            raise RuntimeError(
                f"process {task} failed. Its output: {job.task(task).paths.stderr}\n{error}"
            )
