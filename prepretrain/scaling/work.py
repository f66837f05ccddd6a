"""Runs a study: several runs at a time on this machine, or all as SLURM's arrays."""

import logging
import multiprocessing
import os
import signal
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from prepretrain.config import Config, Slurm
from prepretrain.runs.launch import Task, here, queue
from prepretrain.scaling import progress
from prepretrain.scaling.plan import Planned
from prepretrain.scaling.study import Study
from prepretrain.training.fit import Stopped
from prepretrain.training.signals import Signals, deaf_children

logger = logging.getLogger(__name__)

_LOOK = 0.2  # seconds between looks at what runs

# new processes are copies of one that has imported everything, which takes five seconds
_PROCESSES = multiprocessing.get_context("forkserver")


def _configs(study: Study, one: Planned) -> list[Config]:
    """What is still to be done for a run: its training, then its evaluations."""
    training = [] if one.trained else [one.config]
    return training + ([one.run.suite(study.evaluations)] if study.evaluations else [])


@dataclass(frozen=True)
class Job:
    """A run that runs in a process of its own."""

    one: Planned
    process: Any
    answer: Connection  # what it sends if it fails
    slot: int  # which of the machine's places it has
    log: Path

    def error(self) -> str | None:
        """Why a process that has ended failed; None if it did not."""
        if self.process.exitcode == 0:
            return None
        try:
            said = self.answer.recv()
        except EOFError:
            said = f"its process ended with {self.process.exitcode}"
        return f"{said} (its output: {self.log})"


class Here:
    """Runs what is not done, `jobs` runs at a time, each in `procs` processes of its own. What branches
    off a run waits until that one is trained."""

    def __init__(self, study: Study, planned: list[Planned], *, jobs: int, procs: int):
        self.study, self.procs = study, procs
        states = progress.states(study, planned)
        todo = [state.what not in ("done", "training") for state in states]
        self.waiting = [one for one, needed in zip(planned, todo) if needed]
        self.running: list[Job] = []
        self.free = list(range(jobs))
        self.failed: dict[str, str] = {}
        self.notes = progress.failures(study)
        self.devices = _devices(jobs, procs)

    def run(self) -> dict[str, str]:
        """{run that failed: why}. Raises Stopped after a signal, once what ran has saved itself."""
        _PROCESSES.set_forkserver_preload(["prepretrain.runs.launch"])
        asked, passed = Signals((signal.SIGTERM, signal.SIGINT)), False
        self.notes.write(**{one.name: None for one in self.waiting})
        try:
            while self.running or (self.waiting and asked.received is None):
                self._reap(stopped=asked.received is not None)
                if asked.received is None:
                    self._start_ready()
                elif not passed:
                    for job in self.running:
                        job.process.terminate()
                    passed = True
                time.sleep(_LOOK)
        finally:
            asked.restore()
        if asked.received is not None:
            raise Stopped(
                f"{self.study.folder}: stopped by a signal. The same command continues it."
            )
        return self.failed

    def _reap(self, *, stopped: bool) -> None:
        for job in [job for job in self.running if not job.process.is_alive()]:
            self.running.remove(job)
            self.free.append(job.slot)
            error = job.error()
            if error is None:
                logger.info("%s: done", job.one.name)
            elif not stopped:
                self._fail(job.one, error)

    def _start_ready(self) -> None:
        for one in list(self.waiting):
            trunk = one.trunk
            if trunk is not None and trunk.name in self.failed and not trunk.trained:
                self._fail(one, f"its trunk {trunk.name} failed")
            elif self.free and (trunk is None or one.trained or trunk.trained):
                self.running.append(self._start(one))
            else:
                continue
            self.waiting.remove(one)

    def _start(self, one: Planned) -> Job:
        one.run.folder.mkdir(parents=True, exist_ok=True)
        log, slot = one.run.folder / "output.txt", self.free.pop(0)
        answer, sender = _PROCESSES.Pipe(duplex=False)
        given = (
            _configs(self.study, one),
            one.run.folder,
            self.procs,
            self.devices[slot],
            log,
            sender,
        )
        # a terminal's Ctrl-C goes to all processes, and this one passes it on
        with deaf_children():
            process = _PROCESSES.Process(target=_work, args=given)
            process.start()
        sender.close()
        logger.info("%s: starts", one.name)
        return Job(one, process, answer, slot, log)

    def _fail(self, one: Planned, why: str) -> None:
        self.failed[one.name] = why
        self.notes.write(**{one.name: why})
        logger.error("%s: failed: %s", one.name, why)


def _devices(jobs: int, procs: int) -> list[str | None]:
    """The GPUs of each of the runs at a time, as CUDA_VISIBLE_DEVICES; None leaves it as it is."""
    count = torch.cuda.device_count()
    if count < jobs * procs:
        return [None] * jobs
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else [str(i) for i in range(count)]
    return [",".join(names[i * procs : (i + 1) * procs]) for i in range(jobs)]


def _work(
    todo: list[Config],
    folder: Path,
    procs: int,
    devices: str | None,
    log: Path,
    answer: Connection,
) -> None:
    """What a run's process does; its output goes to a file."""
    output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update({} if devices is None else {"CUDA_VISIBLE_DEVICES": devices})
    try:
        for config in todo:
            here(config, folder, procs)
    except BaseException as error:
        answer.send(f"{type(error).__name__}: {error}")
        raise


def on_slurm(
    study: Study, planned: list[Planned], *, partition: str, nodes: int, procs: int, hours: float
) -> list[str]:
    """Submits what is not done and not queued: an array of trunks and lone runs, one of each trunk's
    branches that waits for it, and for each array one of evaluations, run by run. The jobs' numbers.
    """
    folder, notes = study.folder, progress.jobs(study)
    size: dict[str, Any] = {"nodes": nodes, "procs": procs, "hours": hours}
    known, submitted = notes.read(), []
    todo = [
        one
        for one, state in zip(planned, progress.states(study, planned))
        if state.what not in ("done", "training", "queued")
    ]

    def submit(some: list[Planned], tasks: list[Task], kind: str, after: str | None) -> list[str]:
        asked = _after(some[0].config.slurm, after)
        ids = [job.job_id for job in queue(tasks, folder, partition, asked, **size)]
        for one, job in zip(some, ids):
            known[one.name] = known.get(one.name, {}) | {kind: job}
        notes.write(**known)
        submitted.extend(ids)
        return ids

    for one in todo:
        known[one.name] = {}
    groups: dict[str | None, list[Planned]] = {}
    for one in todo:
        if not one.trained:
            waits = one.trunk is not None and not one.trunk.trained
            groups.setdefault(one.trunk.name if waits else None, []).append(one)
    for trunk, some in groups.items():
        after = None if trunk is None else f"afterok:{known[trunk]['train']}"
        ids = submit(some, [Task(one.config, one.run.folder) for one in some], "train", after)
        if study.evaluations:
            tasks = [_evaluation(study, one) for one in some]
            each = f"aftercorr:{ids[0].partition('_')[0]}"
            submit(some, tasks, "evaluate", each if len(ids) > 1 else f"afterok:{ids[0]}")
    trained = [one for one in todo if one.trained]
    if trained:
        submit(trained, [_evaluation(study, one) for one in trained], "evaluate", None)
    return submitted


def _evaluation(study: Study, one: Planned) -> Task:
    return Task(one.run.suite(study.evaluations), one.run.folder)


def _after(asked: Slurm, dependency: str | None) -> Slurm:
    """What a job asks for, with a job that must have succeeded before it starts."""
    if dependency is None:
        return asked
    lines = (f"--dependency={dependency}", "--kill-on-invalid-dep=yes")
    return Slurm(**{**vars(asked), "extra": (*asked.extra, *lines)})
