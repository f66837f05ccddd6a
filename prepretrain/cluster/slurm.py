"""SLURM: submits tasks, and decides when a job that ended is started again.

The batch script calls this file before the processes (`begun`: do all nodes see the folder?) and
after them (`ended`: again, or not?). A process that ends otherwise than well says why in
attempts.jsonl; the first line of an attempt is the cause, later ones are its consequences.
"""

import difflib
import json
import logging
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any, NoReturn

import submitit

from prepretrain import jsonl
from prepretrain.distributed import ports

logger = logging.getLogger(__name__)

ATTEMPTS = "attempts.jsonl"
# A process's exit status when a signal stopped it and it can be started again (EX_TEMPFAIL).
STOPPED = 75
FINAL = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"),
    *("TIMEOUT", "REVOKED"),
}


# What an account, a constraint or an amount of memory is made of.
_PLAIN = re.compile(r"[\w.,:+&|*()\[\]@-]+")


def check(
    partition: str,
    folder: Path,
    *,
    hours: float,
    requeues: int,
    extra: tuple[str, ...],
    account: str | None = None,
    qos: str | None = None,
    constraint: str | None = None,
    memory: str | None = None,
    **_: Any,
) -> list[str]:
    """The resources of a partition's nodes, as sinfo names them (gpu:8). Raises ValueError for what
    SLURM could not take, or for a text that would be more than an option in the batch script."""
    plain = {"account": account, "qos": qos, "constraint": constraint, "memory": memory}
    for key, value in plain.items():
        if value is not None and not _PLAIN.fullmatch(value):
            raise ValueError(
                f"slurm.{key}: {value!r} is no text of letters, digits and .,:+&|*()[]@-"
            )
    if not str(folder.absolute()).isprintable():
        raise ValueError(
            f"--out: {str(folder)!r} holds a line's end or the like, which must not come into a batch "
            f"script. Name another folder."
        )
    for line in extra:
        if not line.startswith("-") or not line.isprintable():
            raise ValueError(
                f"slurm.extra: {line!r} is no option of sbatch on one line, as --exclude=node7."
            )
    if requeues < 0:
        raise ValueError(f"slurm.requeues: {requeues} must not be negative.")
    if not hours > 0:
        raise ValueError(f"--hours {hours}: must be above 0.")
    return _resources(partition)


def _resources(partition: str) -> list[str]:
    if shutil.which("sbatch") is None or shutil.which("sinfo") is None:
        raise ValueError(
            f"--slurm {partition}: there is no SLURM here (no sbatch on the PATH). Submit from a "
            "machine of the cluster, or leave --slurm out."
        )
    known = _ask("sinfo", "--noheader", "--format=%R|%G")
    if known is None:
        raise ValueError(f"--slurm {partition}: sinfo gets no answer from SLURM's controller.")
    rows = [line.split("|") for line in known.splitlines()]
    names = sorted({name for name, _ in rows})
    if partition not in names:
        near = difflib.get_close_matches(partition, names, n=1)
        raise ValueError(
            f"--slurm: no partition '{partition}'. "
            + (f"Did you mean '{near[0]}'? " if near else "")
            + f"There are: {', '.join(names)}."
        )
    return [resources for name, resources in rows if name == partition]


def cores_of_node(partition: str) -> int | None:
    """Cores of the partition's largest node; None where SLURM does not say."""
    known = _ask("sinfo", "--noheader", "--Node", f"--partition={partition}", "--format=%c")
    return max(map(int, known.split()), default=None) if known else None


def submit(
    tasks: list[Any],
    folder: Path,
    *,
    partition: str,
    nodes: int,
    procs: int,
    hours: float,
    account: str | None = None,
    qos: str | None = None,
    constraint: str | None = None,
    memory: str | None = None,
    gpus: int | None = None,
    cpus: int | None = None,
    requeues: int = 3,
    extra: tuple[str, ...] = (),
) -> list[submitit.Job]:
    """Queues a job of nodes x procs processes for each task, several as an array, named after the
    folder; their output, and attempts.jsonl, go to `folder`. Raises ValueError for what SLURM refuses."""
    asked = {"account": account, "qos": qos, "constraint": constraint}
    limits = {"hours": hours, "requeues": requeues, "extra": extra}
    resources = check(partition, folder, **asked, memory=memory, **limits)
    if gpus is None and any("gpu" in one for one in resources):
        gpus = procs
    minutes = max(1, math.ceil(hours * 60))
    python = f"{shlex.quote(sys.executable)} -m prepretrain.cluster.slurm"
    place = shlex.quote(str(folder.absolute()))
    asked |= {"mem": memory, "gpus-per-node": gpus or None, "cpus-per-task": cpus, "requeue": True}
    # from SLURM 22.05 on, srun does not take over --cpus-per-task of sbatch
    inherited = [] if cpus is None else [f"--cpus-per-task={cpus}"]
    # submitit's own handler, which we replace, gives up after so many time limits
    executor = submitit.AutoExecutor(
        folder / "submitit", cluster="slurm", slurm_max_num_timeout=10**6
    )
    executor.update_parameters(
        name=str(folder),
        nodes=nodes,
        tasks_per_node=procs,
        timeout_min=minutes,
        slurm_partition=partition,
        # seconds to save in; SLURM itself may be a minute early
        slurm_signal_delay_s=min(300, minutes * 60 // 5),
        slurm_srun_args=["--kill-on-bad-exit=1", *inherited],
        slurm_setup=[
            *(f"#SBATCH {line}" for line in extra),
            *([f"{python} begun {place} || exit 1"] if nodes > 1 else []),
        ],
        slurm_teardown=[f"{python} ended {place} {requeues} $?"],
        slurm_additional_parameters={k: v for k, v in asked.items() if v is not None},
    )
    try:
        with executor.batch():
            jobs = [executor.submit(task) for task in tasks]
    except submitit.core.utils.FailedJobError as error:
        text = " ".join(str(error).split())
        raise ValueError(f"--slurm {partition}: sbatch refused: {text}") from error
    return jobs


def _ask(*command: str) -> str | None:
    """What a SLURM command prints; None if it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def state(job: str) -> str | None:
    """A job's state as SLURM names it; None if it does not know the job, or there is no SLURM."""
    found = _ask("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T")
    return found.splitlines()[0] if found else None


def is_active(job: str) -> bool:
    """Whether a job, or any of its array, waits or runs; asks again where there is no answer."""
    for _ in range(5):
        found = _ask("squeue", "--noheader", f"--jobs={job}", "--format=%T")
        if found is not None:
            return bool(found)
        time.sleep(2)
    return False  # which SLURM does not know any more


def job() -> str | None:
    """This process's job, as 17, or 17_2 in an array, if `submit` made it."""
    if os.environ.get("SUBMITIT_EXECUTOR") != "slurm":
        return None
    return _job()


def _job() -> str:
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ["SLURM_JOB_ID"]


def _restart() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT", 0))


def _attempt() -> dict[str, Any]:
    return {"time": time.strftime("%Y-%m-%d %H:%M:%S"), "job": _job(), "restart": _restart()}


def attempts(folder: Path) -> list[dict[str, Any]]:
    """The lines of a folder's attempts.jsonl, but for one that was cut off; [] without one."""
    needs = {"time": str, "job": str, "restart": int, "ended": str, "error": str}
    return list(jsonl.rows(folder / ATTEMPTS, needs))


def _note(folder: Path, **row: Any) -> None:
    with (folder / ATTEMPTS).open("a") as file:
        file.write(json.dumps({**_attempt(), **row}) + "\n")


def _of_this_attempt(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    keys = ("job", "restart")
    mine = _attempt()
    return [row for row in rows if all(row[k] == mine[k] for k in keys)]


def join() -> None:
    """Lets this process, a task of `submit`'s, find the others; and lets a signal end it at once,
    until something that has more to save handles them."""
    given = {k: os.environ[k] for k in ("MASTER_ADDR",) if k in os.environ}
    # after a restart another port, lest the one that was taken be met again
    port = ports.named(f"{submitit.JobEnvironment().job_id} {_restart()}")
    os.environ.setdefault("MASTER_PORT", str(port))  # which submitit then takes
    environment = submitit.helpers.TorchDistributedEnvironment()
    environment.export(set_cuda_visible_devices=False, overwrite=True)
    os.environ.update(given)
    if job() is not None:
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, _leave_at_once)


def _place() -> Path:
    return Path(os.environ["SUBMITIT_FOLDER"]).parent


def _leave_at_once(number: int, frame: types.FrameType | None) -> NoReturn:
    text = f"stopped by {signal.Signals(number).name}"
    _note(_place(), ended="stopped", rank=_rank(), step=None, error=text, fixed=False)
    os._exit(STOPPED)


def _rank() -> int:
    return int(os.environ["SLURM_PROCID"])


def leave(error: Exception, *, stopped: bool) -> None:
    """In a job of `submit`: says in its log and attempts.jsonl why this process ends, and ends it.

    Called before the other processes can notice. Elsewhere it does nothing. stopped: by a signal,
    after all was saved. `error.step`, if there is one, is the step that was reached.
    """
    if job() is None:
        return
    folder, kind = _place(), type(error).__name__
    first = not _of_this_attempt(attempts(folder))
    step, text = getattr(error, "step", None), f"{kind}: {error}"
    how = "stopped" if stopped else "failed"
    _note(
        folder, ended=how, rank=_rank(), step=step, error=text, fixed=isinstance(error, ValueError)
    )
    if first:
        trace = None if stopped or isinstance(error, ValueError) else error
        logger.critical("job %s, process %d: %s", job(), _rank(), text, exc_info=trace)
    sys.stdout.flush()
    sys.stderr.flush()
    # not by raising: submitit would write the error for a submitter that is long gone, and a
    # process group with exchanges under way may not end
    os._exit(STOPPED if stopped else 1)


def begun(folder: Path) -> int:
    """In the batch script: whether all nodes see the folder, as an exit status."""
    mark = folder / f".shared-{_job()}-{os.urandom(4).hex()}"
    mark.touch()
    look = 'test -e "$1" || { sleep 5; test -e "$1"; } || echo "$SLURMD_NODENAME"'
    nodes = os.environ["SLURM_JOB_NUM_NODES"]
    try:
        blind = _ask(
            *("srun", "--overlap", f"--ntasks={nodes}", "--ntasks-per-node=1"),
            *("sh", "-c", look, "sh", str(mark)),
        )
    finally:
        mark.unlink()
    if not blind:  # None: a node does not answer, which is not for us to mend
        return 0
    text = (
        f"{folder}: is not shared: {', '.join(sorted(blind.split()))} cannot see what "
        f"{os.environ.get('SLURMD_NODENAME')} writes there. Give --out a folder that all nodes share."
    )
    _note(folder, ended="failed", step=None, error=f"ValueError: {text}", fixed=True)
    _say(folder, text)
    return 1


def _say(folder: Path, text: str) -> None:
    """To the run's log.txt and the batch script's output."""
    line = f"{time.strftime('%H:%M:%S')} job {_job()}: {text}"
    print(line, file=sys.stderr, flush=True)
    with (folder / "log.txt").open("a") as file:
        file.write(line + "\n")


def ended(folder: Path, requeues: int, status: int) -> int:
    """In the batch script, after its processes: starts the job again if that makes sense; else
    returns its exit status."""
    if status == 0:
        return 0
    again, counts, why = _decide(attempts(folder), requeues, status)
    if again and state(_job()) != "RUNNING":  # cancelled, or taken back by SLURM itself
        again, why = False, f"{why}; SLURM has taken the job"
    _note(folder, ended="again" if again else "over", counts=counts, error=why)
    _say(folder, f"{'starts again' if again else 'ends'}: {why}")
    if again:
        for _ in range(5):
            if _ask("scontrol", "requeue", _job()) is not None:
                time.sleep(120)  # SLURM ends this script
            time.sleep(5)
    return status


def _decide(rows: list[dict[str, Any]], requeues: int, status: int) -> tuple[bool, bool, str]:
    """(whether to start again, whether that counts, why). A stop that gained a step does not count."""
    mine = _of_this_attempt(rows)
    of_job = [row for row in rows if row["job"] == _job()]
    stops = {row.get("step") for row in of_job if row["ended"] == "stopped" and row not in mine}
    if mine and mine[0]["ended"] == "stopped" and mine[0].get("step") not in {None, *stops}:
        return True, False, f"stopped by a signal after step {mine[0]['step']}"
    failures = {(row["error"], row.get("step")) for row in mine if row["ended"] == "failed"}
    cause = mine[0]["error"] if mine else _of_status(status)
    if mine and mine[0].get("fixed"):
        return False, True, f"starting again would not help: {cause}"
    earlier = [row for row in of_job if row["ended"] == "failed" and row not in mine]
    if failures & {(row["error"], row.get("step")) for row in earlier}:
        return False, True, f"the same error at the same step as before: {cause}"
    lost = 1 + sum(row["ended"] == "again" and row.get("counts", True) for row in of_job)
    if lost > requeues:
        return False, True, f"lost start {lost}, and slurm.requeues is {requeues}: {cause}"
    return True, True, f"lost start {lost} of at most {requeues}: {cause}"


def _of_status(status: int) -> str:
    if status > 128:
        return f"a process was ended by signal {status - 128}"
    return f"a process ended with status {status}"


if __name__ == "__main__":
    if sys.argv[1] == "begun":
        sys.exit(begun(Path(sys.argv[2])))
    sys.exit(ended(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])))
