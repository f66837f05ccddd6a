"""Runs tasks on datatrove's executors, and reads all shards' tables with DuckDB: the only file that
imports them.

A task is a plain function of its number; it is done once datatrove has marked it so, below
OUT/tasks/<table>/completions, and a relaunch runs those that are not. What a task hands to others is
files alone. datatrove keeps what a job of SLURM is to do in executor.pik there, a pickle: one that
somebody else made must never be run.
"""

import contextlib
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from tqdm import tqdm

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
        """spill: where DuckDB puts what does not fit into memory."""
        import duckdb

        self.folder, self.reads = folder, reads
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
    """Where tasks run: in processes here, on SLURM's partition or on a cluster of Ray."""

    workers: int = 1
    slurm: str | None = None
    ray: bool = False
    hours: float = 24.0
    memory: int = 2  # GB a core


def run(task: Task, count: int, logs: Path, machines: Machines, name: str) -> None:
    """Runs those of `count` tasks that are not done. Raises ValueError or RuntimeError, with the
    cause of one, if some could not be; those that ended well stay done."""
    check_packages()
    _local(task, count, logs, machines.workers, name)


def forget(logs: Path, tasks: Iterable[int]) -> None:
    """Marks tasks as not done."""
    for number in tasks:
        (logs / "completions" / f"{number:05d}").unlink(missing_ok=True)


def _executor(task: Task, count: int, logs: Path, first: int, some: int) -> Any:
    from datatrove.executor.local import LocalPipelineExecutor

    return LocalPipelineExecutor(
        [task],
        tasks=count,
        workers=1,
        logging_dir=str(logs),
        local_tasks=some,
        local_rank_offset=first,
    )


def _local(task: Task, count: int, logs: Path, workers: int, name: str) -> None:
    """Gives each process a range of the tasks: LocalPipelineExecutor's own pool waits for ever for a
    process that the system has killed, as it does where memory runs out."""
    missing = _executor(task, count, logs, 0, count).get_incomplete_ranks()
    if not missing:
        return
    workers = min(workers, len(missing))
    ends = [len(missing) * n // workers for n in range(workers + 1)]
    ranges = [
        (missing[a], missing[b - 1] + 1 - missing[a]) for a, b in zip(ends, ends[1:], strict=False)
    ]
    logs.mkdir(parents=True, exist_ok=True)
    _PROCESSES.set_forkserver_preload(["prepretrain.curation.commands"])
    if workers == 1:
        return _work(task, count, logs, *ranges[0], logs / "worker0.log")
    errors = _PROCESSES.SimpleQueue()
    processes = []
    for n, (first, some) in enumerate(ranges):
        given = (task, count, logs, first, some, logs / f"worker{n}.log", errors)
        processes.append(_PROCESSES.Process(target=_reporting, args=given))
    for process in processes:
        process.start()
    with tqdm(total=count, desc=name, unit="task", disable=None) as bar:
        while any(process.is_alive() for process in processes):
            time.sleep(0.1)
            bar.update(sum(1 for _ in (logs / "completions").glob("*")) - bar.n)
    _raise_failures(processes, errors, logs)


def _raise_failures(processes: list, errors: Any, logs: Path) -> None:
    for process in processes:
        process.join()
    if not errors.empty():
        raise errors.get()
    for process in processes:
        if process.exitcode:
            cause = (
                f"was ended by {signal.Signals(-process.exitcode).name}"
                if process.exitcode < 0
                else f"ended with status {process.exitcode}"
            )
            raise RuntimeError(
                f"a worker {cause}; its log is in {logs}. What was done stays done: start the same command "
                f"again, with fewer --workers if memory ran out."
            )


def _reporting(*given: Any) -> None:
    *given, errors = given
    try:
        _work(*given)
    except (ValueError, OSError) as error:
        errors.put(error)
        sys.exit(1)


def _work(task: Task, count: int, logs: Path, first: int, some: int, log: Path) -> None:
    """Runs a range of tasks in this process; what datatrove says goes to a file."""
    from loguru import logger

    with open(log, "a") as file, contextlib.redirect_stderr(file):
        logger.remove()
        try:
            _executor(task, count, logs, first, some).run()
        finally:
            logger.remove()  # datatrove's handler would write to the file that is closed now
