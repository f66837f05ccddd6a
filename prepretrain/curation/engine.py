"""Runs tasks on datatrove's executors, and reads all shards' tables with DuckDB: the only file that
imports them.

A task is a plain function of its number; it is done once datatrove has marked it so, below
OUT/tasks/<table>/completions, and a relaunch runs those that are not. What a task hands to others is
files alone. datatrove keeps what a job of SLURM is to do in executor.pik there, a pickle: one that
somebody else made must never be run.
"""

import contextlib
import errno
import importlib.util
import multiprocessing
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from prepretrain.cluster import slurm as clusters
from prepretrain.curation.folder import Folder
from prepretrain.plugin import require

Task = Callable[[Any, int, int], None]  # (data, which is not used; the task's number; how many)

_PROCESSES = multiprocessing.get_context("forkserver")


def check_packages() -> None:
    """Raises ValueError without what the extra `data` installs."""
    for package in ("datatrove", "duckdb"):
        require(package, "data", "curation")


class Tables:
    """The tables of all shards, for a reduction."""

    def __init__(self, folder: Folder, reads: dict[str, tuple[str, ...]], spill: Path):
        """spill: a folder for what does not fit into memory, removed afterwards."""
        import duckdb

        self.folder, self.reads, self.spill = folder, reads, spill
        self.numbers = range(len(folder.manifest.shards))
        self.database = duckdb.connect(config={"temp_directory": str(spill)})
        for name, columns in reads.items():
            self._view(name, columns)
        shards = pa.table(
            {
                "shard": pa.array(self.numbers, pa.int32()),
                "samples": pa.array([s.samples for s in folder.manifest.shards], pa.int64()),
            }
        )
        self.database.register("shards", shards)

    def _view(self, name: str, columns: Sequence[str]) -> None:
        """A view of all shards' tables of one stage, with the number of the shard."""
        files = [str(self.folder.table(name, number)) for number in self.numbers]
        named = ", ".join(f'"{column}"' for column in ("row", *columns))
        number = r"regexp_extract(filename, '(\d+)\.parquet$', 1)::INTEGER"
        rows = self.database.read_parquet(files, filename=True, hive_partitioning=False)
        rows.project(f"{number} AS shard, {named}").create_view(name)

    def query(self, text: str) -> Any:
        """A query in SQL over the views: one for each table that the stage reads, with `shard`, `row`
        and the columns that it named; and `shards` (shard, samples)."""
        return self.database.sql(text)

    def left(self, name: str, after: Iterable[str]) -> str:
        """A part of a query: the rows of a table against which none of the tables `after` has a
        reason."""
        dropped = (
            f"ANTI JOIN (FROM {one} WHERE reason IS NOT NULL) USING (shard, row)" for one in after
        )
        return " ".join([f"(FROM {name}", *dropped]) + ")"

    def read(self, name: str, number: int) -> pa.Table:
        """One shard's table, with the columns that the stage named."""
        return self.folder.read(name, number, list(self.reads[name]))

    def divided(self, found: Any, columns: dict[str, pa.DataType]) -> Iterable[pa.Table]:
        """Each shard's rows of a query or table with `shard`, `row` and columns, in order; rows that
        it lacks are null."""
        names = ", ".join(f'"{name}"' for name in columns)
        if isinstance(found, pa.Table):
            self.database.register("found", found)
        else:
            found.create_view("found")
        self.database.sql(
            f'CREATE TABLE result AS SELECT shard, "row", {names} FROM found ORDER BY shard, "row"'
        )
        for number in self.numbers:
            yield self._of_shard(number, names)
        self.database.sql("DROP TABLE result")

    def _of_shard(self, number: int, names: str) -> pa.Table:
        samples = self.folder.manifest.shards[number].samples
        rows = self.database.sql(
            f'SELECT n."row", {names} FROM (SELECT range AS "row" FROM range({samples})) n '
            f'LEFT JOIN (SELECT * FROM result WHERE shard = {number}) r ON n."row" = r."row" '
            'ORDER BY n."row"'
        ).to_arrow_table()
        if len(rows) != samples:
            raise ValueError(f"shard {number}: a reduction gave some of its rows twice.")
        return rows


@dataclass(frozen=True)
class Machines:
    """Where tasks run: in processes here, as arrays of jobs on a partition of SLURM, or on a cluster of
    Ray."""

    workers: int | None = None  # tasks at a time; None: one here, as many as there are elsewhere
    slurm: str | None = None
    ray: bool = False
    hours: float = 24.0  # of a job of SLURM
    cpus: int = 1  # of a task, on SLURM and Ray
    memory: int = 2  # GB a CPU, there
    gpus: int = 0  # of a task whose stage uses one, there
    sbatch: tuple[str, ...] = ()  # more options of a job of SLURM, as account=vision

    def check(self, folder: Path) -> None:
        """Raises ValueError for what cannot be had."""
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"--workers {self.workers}: must be at least 1.")
        if odd := [option for option in self.sbatch if "=" not in option]:
            raise ValueError(f"--sbatch: {odd[0]!r} is not KEY=VALUE, as account=vision.")
        if self.slurm is not None and self.ray:
            raise ValueError("--slurm and --ray: name one of them.")
        if self.slurm is not None:
            clusters.check(self.slurm, folder, hours=self.hours, requeues=0, extra=())
        if self.ray and importlib.util.find_spec("ray") is None:
            raise ValueError("--ray: needs the package ray: pip install ray")


def run(task: Task, count: int, logs: Path, machines: Machines, name: str, gpu: bool) -> None:
    """Runs those of `count` tasks that are not done. Raises ValueError, with the cause of the first,
    if some could not be; those that ended well stay done.

    gpu: whether each is to have machines.gpus.
    """
    task, gpus = _Noted(task, logs), machines.gpus if gpu else 0
    logs.mkdir(parents=True, exist_ok=True)
    if _missing(logs, count):
        if machines.slurm is not None:
            _on_slurm(task, count, logs, machines, name, gpus)
        elif machines.ray:
            _on_ray(task, count, logs, machines, gpus)
        else:
            _here(task, count, logs, machines.workers or 1, name)
    if missing := _missing(logs, count):
        raise ValueError(
            f"{name}: {_cause(logs, missing)} ({len(missing)} of {count} tasks are not done; their logs are "
            f"in {logs}. The same command runs only these.)"
        )


def forget(logs: Path, tasks: Iterable[int]) -> None:
    """Marks tasks as not done."""
    for number in tasks:
        (logs / "completions" / f"{number:05d}").unlink(missing_ok=True)


def _missing(logs: Path, count: int) -> list[int]:
    done = {file.name for file in (logs / "completions").glob("*")}
    return [number for number in range(count) if f"{number:05d}" not in done]


class _Noted:
    """A task that leaves behind why it failed."""

    def __init__(self, task: Task, logs: Path):
        self.task, self.logs = task, logs.absolute()

    def __call__(self, data: Any, number: int, count: int) -> None:
        note = _note(self.logs, number)
        note.unlink(missing_ok=True)
        try:
            self.task(data, number, count)
        except Exception as error:
            expected = isinstance(error, (ValueError, OSError))
            with contextlib.suppress(OSError):  # no space left
                note.parent.mkdir(exist_ok=True)
                note.write_text(str(error) if expected else f"{type(error).__name__}: {error}")
            raise


def _note(logs: Path, number: int) -> Path:
    return logs / "failures" / f"{number:05d}"


def _cause(logs: Path, missing: list[int]) -> str:
    """Why the first of the tasks that failed did."""
    notes = [_note(logs, number) for number in missing]
    text = next((note.read_text() for note in notes if note.exists()), "")
    return text or "tasks ended without a word: killed, perhaps as memory ran out?"


def _watch(logs: Path, count: int, name: str, goes_on: Callable[[], bool], pause: float) -> None:
    """Shows how many tasks are done for as long as they go on."""
    with tqdm(total=count, desc=name, unit="task", disable=None) as bar:
        while True:
            last = not goes_on()
            bar.update(count - len(_missing(logs, count)) - bar.n)
            if last:
                return
            time.sleep(pause)


def _here(task: Task, count: int, logs: Path, workers: int, name: str) -> None:
    """Runs the tasks in this process, or in several.

    LocalPipelineExecutor.run's own pool would wait for ever for a process that the system has killed,
    as it does where memory runs out; so only its `_run_for_rank` is called, as datatrove's other
    executors do.
    """
    missing = _missing(logs, count)
    workers = min(workers, len(missing))
    shares = [missing[n::workers] for n in range(workers)]
    if workers == 1:
        bar = tqdm(
            shares[0],
            desc=name,
            unit="task",
            initial=count - len(missing),
            total=count,
            disable=None,
        )
        return _check_status(_work(task, count, logs, bar, 0))
    _PROCESSES.set_forkserver_preload(["prepretrain.curation.commands", "datatrove.executor.local"])
    processes = [
        _PROCESSES.Process(target=_worker, args=(task, count, logs, share, n))
        for n, share in enumerate(shares)
    ]
    try:
        for process in processes:
            process.start()
        _watch(logs, count, name, lambda: any(p.is_alive() for p in processes), 0.2)
    finally:
        for process in processes:
            process.terminate()  # where this one was interrupted
            process.join()
    _check_status(max(process.exitcode or 0 for process in processes))


def _check_status(status: int) -> None:
    if status == errno.ENOSPC:  # nobody could write it down
        raise OSError(status, f"{os.strerror(status)}; what is done stays done")


def _worker(*given: Any) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.exit(_work(*given))


def _end_with_parent() -> None:
    """Ends this process once the command was killed: a relaunch would work beside it."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(task: Task, count: int, logs: Path, numbers: Iterable[int], worker: int) -> int:
    """Runs some tasks in this process, one after another, also after one that failed; returns ENOSPC
    where the disk is full, else 0. What datatrove says goes to a file."""
    from datatrove.executor.local import LocalPipelineExecutor
    from loguru import logger

    executor = LocalPipelineExecutor([task], tasks=count, logging_dir=str(logs))
    with open(logs / f"worker{worker}.log", "w") as file, contextlib.redirect_stderr(file):
        logger.remove()
        try:
            for number in numbers:
                try:
                    executor._run_for_rank(number)
                except OSError as error:
                    if error.errno == errno.ENOSPC:
                        return errno.ENOSPC
                except Exception:  # which is in the task's log, and its cause in `failures`
                    continue
        finally:
            logger.remove()  # datatrove's handler would write to the file that is closed now
    return 0


def _on_slurm(task: Task, count: int, logs: Path, machines: Machines, name: str, gpus: int) -> None:
    """Submits the missing tasks as an array, and waits until all have ended."""
    from datatrove.executor.slurm import SlurmPipelineExecutor

    minutes = max(1, round(machines.hours * 60))
    executor = SlurmPipelineExecutor(
        [task],
        tasks=count,
        time=f"{minutes // 60}:{minutes % 60:02d}:00",
        partition=machines.slurm,
        cpus_per_task=machines.cpus,
        mem_per_cpu_gb=machines.memory,
        gpus_per_task=gpus,
        workers=machines.workers or -1,
        job_name=f"curate-{name}",
        qos=None,
        env_command=f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH",
        sbatch_args=dict(option.split("=", 1) for option in machines.sbatch),
        logging_dir=str(logs.absolute()),
    )
    executor.launch_merge_stats = _nothing  # a job more, which would wait for ever for failed tasks
    with open(logs / "submit.log", "w") as file, contextlib.redirect_stderr(file):
        try:
            executor.run()
        except subprocess.CalledProcessError as error:
            raise ValueError(
                f"--slurm {machines.slurm}: sbatch refused {logs}/launch_script.slurm, for the reason above."
            ) from error
    _watch(logs, count, name, lambda: clusters.is_active(executor.job_id), 2)


def _nothing() -> None:
    pass


def _on_ray(task: Task, count: int, logs: Path, machines: Machines, gpus: int) -> None:
    """Runs the missing tasks on the cluster of Ray that RAY_ADDRESS names, or on one of its own."""
    from datatrove.executor.ray import RayPipelineExecutor

    executor = RayPipelineExecutor(
        [task],
        tasks=count,
        workers=machines.workers or -1,
        cpus_per_task=machines.cpus,
        mem_per_cpu_gb=machines.memory,
        gpus_per_task=gpus,
        logging_dir=str(logs.absolute()),
    )
    executor.run()
