"""A real SLURM of two virtual nodes: whatever happens to a job, it ends with the bytes of one to which
nothing happened."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import slurm_box
from conftest import furnish
from conftest import processes as in_processes
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from prepretrain.cluster import slurm
from prepretrain.distributed import checkpoint, ports
from prepretrain.runs.launch import launch, status
from prepretrain.scaling import commands, progress, study
from prepretrain.scaling import plan as plans
from prepretrain.scaling.collect import collect

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(slurm_box.missing() is not None, reason=str(slurm_box.missing())),
]
STEPS = 80
SIZE = {"nodes": 2, "procs": 1, "slurm": "debug"}
CLOCKS = ("seconds", "images_per_second", "data_wait")


@pytest.fixture(scope="module")
def box():
    """The cluster, in a place with the small stage, whose clients this process is."""
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as folder:
        os.chmod(folder, 0o755)  # munged refuses a socket that others cannot reach
        made = slurm_box.Box(Path(folder) / "box")
        before, here = dict(os.environ), Path.cwd()
        os.environ.update(made.environment, OMP_NUM_THREADS="1")
        paths = (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))
        os.environ["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
        os.environ["PATH"] += ":/usr/sbin:/sbin"
        os.environ.pop("PREPRETRAIN_DATA", None)
        os.chdir(folder)
        furnish()
        try:
            made.start()
            yield made
        finally:
            made.stop()
            os.chdir(here)
            os.environ.clear()
            os.environ.update(before)


def overrides(**more: str) -> list[str]:
    """What makes the small stage long enough to be interrupted."""
    keys = {"length": f"{STEPS}it", "checkpoint.every": "15it", "data.workers": "1", **more}
    return [f"{key}={value}" for key, value in keys.items()]


def undisturbed(name: str, procs: int, *more: str) -> Path:
    """A run to which nothing happens, in processes without SLURM."""
    in_processes(procs, _trained, f"runs/{name}", [*overrides(), *more])
    return Path("runs", name)


def _trained(rank: int, folder: str, keys: list[str]) -> None:
    launch("small.yaml", keys, out=folder)


@pytest.fixture(scope="module")
def whole(box) -> Path:
    """The run of two processes to which nothing happens."""
    return undisturbed("whole", 2)


def submit(name: str, *more: str, **flags) -> tuple[Path, str]:
    """Submits the small stage; its folder and job."""
    folder = launch("small.yaml", [*overrides(), *more], out=f"runs/{name}", **{**SIZE, **flags})
    jobs = sorted(folder.glob("submitit/*_submission.sh"), key=lambda p: p.stat().st_mtime)
    return folder, jobs[-1].name.partition("_")[0]


def wait(what, seconds: float = 400) -> None:
    """Until what() holds; else fails with what the cluster and its jobs have said."""
    end = time.monotonic() + seconds
    while not what():
        if time.monotonic() > end:
            pytest.fail(f"it does not happen in {seconds:.0f} s\n{said()}", pytrace=False)
        time.sleep(0.1)


def said() -> str:
    """What SLURM knows of jobs and nodes, and the ends of all logs."""
    parts = []
    for command in (["squeue", "--all", "--states=all"], ["scontrol", "--details", "show", "node"]):
        done = subprocess.run(command, capture_output=True, text=True)
        parts.append(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    runs = Path("runs")
    logs = [*Path("box/log").iterdir(), *runs.glob("*/log.txt"), *runs.glob("*/submitit/*_log.*")]
    for path in sorted(logs):
        lines = path.read_text(errors="replace").splitlines()
        parts.append("\n".join([f"{path}: {len(lines)} lines", *lines[-25:]]))
    return "\n\n".join(parts)


def rows(folder: Path) -> list[dict]:
    """metrics.jsonl without what clocks say."""
    path = folder / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [{k: v for k, v in row.items() if k not in CLOCKS} for row in lines]


def reach(folder: Path, step: int) -> None:
    """Waits until a run has got to a step; fails if its job ends before."""

    def over() -> bool:
        return any(end == "over" for _, end in ends(folder))

    wait(lambda: over() or (rows(folder) or [{"step": 0}])[-1]["step"] >= step)
    assert not over(), said()


def finish(job: str, seconds: float = 400) -> str:
    """Waits for a job's end; its state."""
    wait(lambda: slurm.state(job) in slurm.FINAL or hurry(job), seconds)
    return slurm.state(job)


def hurry(job: str) -> None:
    """Lets a requeued job start before its time, where the nodes are free."""
    if slurm.state(job) == "PENDING":
        time.sleep(3)  # SLURM has revoked what would start in the second of the requeue
        command = ["scontrol", "update", f"JobId={job}", "StartTime=now"]
        subprocess.run(command, capture_output=True)


def processes(job: str, rank: int) -> list[int]:
    """The process of a job's rank, and what it started, oldest first; the job may be one of an array."""
    number, _, place = job.partition("_")
    whose = f"SLURM_JOB_ID={number}\0", f"SLURM_PROCID={rank}\0"
    if place:
        whose = f"SLURM_ARRAY_JOB_ID={number}\0", f"SLURM_ARRAY_TASK_ID={place}\0", whose[1]
    marks = list(whose)
    marks.append(f"SLURM_CONF={os.environ['SLURM_CONF']}\0")
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            text = (path / "environ").read_text() + "\0"
            name = (path / "cmdline").read_text()
        except OSError:
            continue
        if all(mark in text for mark in marks) and "submitit.core._submit" in name:
            found.append(int(path.name))
    return sorted(found)


def assert_same(folder: Path, whole: Path, steps: int = STEPS) -> None:
    """The bytes of the run to which nothing happened, and each step once in every log."""
    one, two = (run / "export" / "model.safetensors" for run in (folder, whole))
    assert one.read_bytes() == two.read_bytes()
    assert rows(folder) == rows(whole)
    board = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    assert [event.step for event in board.Scalars("loss")] == list(range(1, steps + 1))


def ends(folder: Path) -> list[tuple[int, str]]:
    """(which start, what) of all that attempts.jsonl says."""
    return [(row["restart"], row["ended"]) for row in slurm.attempts(folder)]


def test_a_job_that_is_preempted_and_then_loses_a_process_ends_with_the_weights_of_one_left_alone(
    box, whole
):
    folder, job = submit("preempted")
    reach(folder, 20)
    box.ask("sbatch", "-p", "urgent", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
    wait(lambda: (0, "again") in ends(folder))
    stopped = slurm.attempts(folder)[0]["step"]
    wait(lambda: rows(folder)[-1]["step"] > stopped or hurry(job))
    os.kill(processes(job, rank=1)[0], signal.SIGKILL)
    assert finish(job) == "COMPLETED"
    assert_same(folder, whole)
    assert {end for end in ends(folder) if end[0] == 0} == {(0, "stopped"), (0, "again")}
    assert (1, "again") in ends(folder)
    # saved when it was asked, not when it would have been due
    assert f"continues from {folder}/checkpoints/{stopped:09d}" in (folder / "log.txt").read_text()


@pytest.mark.faults
def test_a_killed_process_brings_the_job_down_and_it_starts_again(box, whole):
    folder, job = submit("killed")
    reach(folder, 20)
    os.kill(processes(job, rank=1)[0], signal.SIGKILL)
    assert finish(job) == "COMPLETED"
    assert_same(folder, whole)
    assert (0, "again") in ends(folder) and "lost start 1 of at most 3" in (
        folder / "log.txt"
    ).read_text()
    said = status(str(folder))
    assert f"job {job}: COMPLETED" in said and f"step {STEPS} of {STEPS}" in said
    assert "lost start 1 of at most 3" in said and f"{folder}/log.txt" in said


@pytest.mark.parametrize(
    "more, flags, said",
    [
        (
            [],
            {"slurm": "debgu"},
            "no partition 'debgu'. Did you mean 'debug'[?] There are: debug, gpu, urgent",
        ),
        ([], {"procs": 3}, "batch_size: 16 does not divide among 6 processes"),
        (["shard.group=3"], {"procs": 2}, "shard.group: 3 must divide the number of processes, 4"),
        (
            ["slurm.extra=[--no-such-option]"],
            {},
            "sbatch refused: .*unrecognized option .--no-such-option",
        ),
        (["slurm.extra=[exclusive]"], {}, "slurm.extra: 'exclusive' is no option of sbatch"),
        (['slurm.extra=["--exclusive\\n#SBATCH -N9"]'], {}, "slurm.extra: .* on one line"),
        (["slurm.requeues=-1"], {}, "slurm.requeues: -1 must be at least 0"),
        ([], {"hours": 0.0}, "--hours 0.0: must be above 0"),
        (["slurm.memory=900GB"], {}, "sbatch refused"),
        (["slurm.cpus=3"], {"procs": 2}, "slurm.cpus: 2 processes .* has more than 4. Ask for"),
    ],
)
def test_what_slurm_or_the_run_could_not_take_is_refused_before_it_is_queued(
    box, more, flags, said
):
    with pytest.raises(ValueError, match=said):
        submit("wrong", *more, **flags)
    assert not box.ask("squeue", "--noheader", "--name=runs/wrong")


def test_a_job_asks_for_what_the_config_says_and_for_a_gpu_for_each_process(box):
    keys = ["slurm.memory=1GB", "slurm.cpus=2", "slurm.extra=[--hold]"]
    _, job = submit("asks", *keys, procs=2, hours=2.0, slurm="gpu")
    shown = box.ask("scontrol", "show", "job", job).split()
    box.ask("scancel", job)
    asked = ["Partition=gpu", "NumNodes=2-2", "NumTasks=4", "CPUs/Task=2", "MinMemoryNode=1G"]
    asked += ["TresPerNode=gres:gpu:2", "TimeLimit=02:00:00", "Requeue=1", "Reason=JobHeldUser"]
    assert not [one for one in asked if one not in shown], shown


def test_a_job_asks_for_no_more_cores_than_a_node_has(box):
    _, job = submit("cores", "data.workers=9", "slurm.extra=[--hold]", procs=2)
    shown = box.ask("scontrol", "show", "job", job)
    box.ask("scancel", job)
    assert "CPUs/Task=2" in shown


def test_without_slurm_the_error_says_so(box, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match="--slurm debug: there is no SLURM here"):
        submit("nowhere")


@pytest.mark.faults
def test_a_job_whose_port_another_program_holds_starts_again_at_another_port(box, whole):
    folder, job = submit("port", "slurm.extra=[--hold]")
    with socket.socket() as held:
        held.bind(("0.0.0.0", ports.named(f"{job} 0")))
        held.listen()
        box.ask("scontrol", "release", job)
        assert finish(job) == "COMPLETED"
    assert "address already in use" in slurm.attempts(folder)[0]["error"]
    assert_same(folder, whole)


@pytest.mark.faults
def test_a_job_at_its_time_limit_goes_on_in_the_next_one_as_often_as_it_takes(box):
    long = "length=2000it"
    whole = undisturbed("whole_long", 2, long)
    # SLURM signals a job of two minutes after 36 to 66 seconds
    folder, job = submit("limited", long, "slurm.requeues=0", hours=2 / 60)
    assert finish(job, 900) == "COMPLETED"
    assert_same(folder, whole, 2000)
    assert (0, "again") in ends(folder)


@pytest.mark.faults
def test_a_signal_to_one_process_only_stops_them_all_at_the_same_step(box, whole):
    folder, job = submit("one_signal")
    reach(folder, 20)
    os.kill(processes(job, rank=1)[0], signal.SIGTERM)
    assert finish(job) == "COMPLETED"
    assert_same(folder, whole)


@pytest.mark.faults
def test_sigterm_to_all_that_a_job_started_is_a_preemption_too(box, whole):
    folder, job = submit("sigterm")
    reach(folder, 20)
    box.ask("scancel", "--signal=TERM", job)
    assert finish(job) == "COMPLETED"
    assert_same(folder, whole)
    assert ends(folder)[0] == (0, "stopped")


@pytest.mark.faults
def test_a_job_requeued_by_hand_goes_on(box, whole):
    folder, job = submit("by_hand")
    reach(folder, 20)
    box.ask("scontrol", "requeue", job)
    assert finish(job) == "COMPLETED"
    assert_same(folder, whole)


@pytest.mark.faults
def test_a_cancelled_job_stays_cancelled_and_the_same_command_goes_on(box, whole):
    folder, job = submit("cancelled")
    reach(folder, 20)
    box.ask("scancel", job)
    assert finish(job) == "CANCELLED"
    wait(lambda: slurm.state(job) == "CANCELLED")
    _, other = submit("cancelled")
    assert other != job and finish(other) == "COMPLETED"
    assert slurm.state(job) == "CANCELLED"
    assert_same(folder, whole)


@pytest.mark.faults
def test_a_job_whose_node_dies_goes_on_when_there_are_nodes_again(box, whole):
    folder, job = submit("node")
    reach(folder, 20)
    box.kill_node("n2")
    time.sleep(35)  # past SlurmdTimeout
    box.start_node("n2")
    assert finish(job) == "COMPLETED"
    assert_same(folder, whole)
    box.wait_idle()


@pytest.mark.faults
def test_the_same_error_at_the_same_step_ends_the_job_after_the_second_time(box):
    folder, job = submit("diverges", "optim.lr=1e30", "optim.warmup=0it")
    assert finish(job) == "FAILED"
    text = (folder / "log.txt").read_text()
    assert "is not finite" in text and "the same error at the same step as before" in text
    assert [end for end in ends(folder) if end[1] in ("again", "over")] == [
        (0, "again"),
        (1, "over"),
    ]


@pytest.mark.faults
def test_a_job_that_keeps_being_killed_starts_again_so_many_times_and_no_more(box):
    folder, job = submit("unlucky", "slurm.requeues=1")
    for restart in range(2):
        wait(lambda: slurm.state(job) == "RUNNING" and processes(job, rank=1))
        reach(folder, 10 + 30 * restart)
        os.kill(processes(job, rank=1)[0], signal.SIGKILL)
        wait(lambda: len([1 for _, end in ends(folder) if end in ("again", "over")]) > restart)
    assert finish(job) == "FAILED"
    assert "lost start 2, and slurm.requeues is 1" in (folder / "log.txt").read_text()


@pytest.mark.faults
def test_the_second_job_on_a_folder_refuses_and_leaves_the_first_alone(box, whole):
    folder, job = submit("two", nodes=1, procs=2)
    _, other = None, box.ask("sbatch", "--parsable", str(next(folder.glob("submitit/*.sh"))))
    # the same script, as if two had submitted at the same time
    Path(folder / f"submitit/{other}_submitted.pkl").write_bytes(
        (folder / f"submitit/{job}_submitted.pkl").read_bytes()
    )
    assert {finish(job), finish(other)} == {"COMPLETED", "FAILED"}
    text = (folder / "log.txt").read_text()
    assert "two jobs must not write to one run" in text
    assert_same(folder, whole)
    with pytest.raises(ValueError, match="must not write to one run"):
        submit("two_here", nodes=1, procs=2)
        reach(Path("runs/two_here"), 1)
        submit("two_here", nodes=1, procs=2)
    box.ask("scancel", "--name=runs/two_here")


@pytest.mark.faults
def test_two_processes_on_each_of_two_nodes_survive_a_preemption_and_a_death(box):
    whole = undisturbed("whole_of_four", 4)
    folder, job = submit("four", procs=2)
    reach(folder, 15)
    os.kill(processes(job, rank=2)[0], signal.SIGUSR2)
    wait(lambda: (0, "again") in ends(folder))
    reach(folder, 50)
    os.kill(processes(job, rank=3)[0], signal.SIGKILL)
    assert finish(job) == "COMPLETED"
    assert_same(folder, whole)


@pytest.mark.faults
def test_a_folder_that_a_node_does_not_see_is_an_error_that_names_the_node(box):
    private = Path("private").absolute()
    private.mkdir()
    hide = ("unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {private} && exec "$@"', "sh")
    try:
        box.ask(*hide, "true")
    except RuntimeError as error:
        pytest.skip(f"a node cannot be given a file system of its own here: {error}")
    box.kill_node("n2")
    box.start_node("n2", *hide)
    try:
        box.wait_idle()
        folder = launch("small.yaml", overrides(), out=str(private / "run"), **SIZE)
        job = next(folder.glob("submitit/*_submission.sh")).name.partition("_")[0]
        assert finish(job) == "FAILED"
        assert "is not shared: n2 cannot see" in (folder / "log.txt").read_text()
    finally:
        box.kill_node("n2")
        box.start_node("n2")
        box.wait_idle()


@pytest.mark.faults
def test_a_suite_with_a_job_for_each_entry_is_one_array_and_each_goes_on_after_a_stop(box, whole):
    linear = "{stage: eval/linear, data: colours, evaluator: {protocol: lbfgs, workers: 0}}"
    lowshot = "{stage: eval/lowshot, data: colours, evaluator: {shots: [1], seeds: 2, workers: 0}}"
    Path("suite.yaml").write_text(f"suite: [{linear}, {lowshot}]\njobs: each\n")
    folder = launch("suite.yaml", [], init=str(whole), nodes=1, procs=1, slurm="debug")
    job = next(folder.glob("submitit/*_submission.sh")).name.partition("_")[0]
    wait(lambda: processes(job, rank=0) or slurm.state(f"{job}_0") in slurm.FINAL)
    for task in (0, 1):
        assert finish(f"{job}_{task}") == "COMPLETED"
    assert {"linear/colours", "lowshot/colours"} <= json.loads(
        (folder / "results.json").read_text()
    ).keys()


@pytest.mark.faults
def test_an_evaluation_that_is_stopped_starts_again(box, whole):
    Path("lab").mkdir(exist_ok=True)
    Path("lab/slow.py").write_text(
        "import time\nfrom pathlib import Path\n"
        "from prepretrain.evaluation.evaluators.base import Evaluator\n\n"
        "class Slow(Evaluator):\n    headline = 'seen'\n\n"
        "    def run(self, model, folder):\n"
        "        again = Path('slow').exists()\n        Path('slow').touch()\n"
        "        time.sleep(0 if again else 300)\n        return {'seen': 1.0}\n"
    )
    Path("slow.yaml").write_text("evaluator: {name: lab.slow}\ndata: colours\n")
    os.environ["PYTHONPATH"] += f":{Path.cwd()}"
    sys.path.insert(0, str(Path.cwd()))
    folder = launch("slow.yaml", [], init=str(whole), out="runs/slow", nodes=1, slurm="debug")
    job = next(folder.glob("submitit/*_submission.sh")).name.partition("_")[0]
    wait(Path("slow").exists)
    box.ask("scancel", "--signal=USR2", job)
    assert finish(job) == "COMPLETED"
    assert ends(folder)[:2] == [(0, "stopped"), (0, "again")]
    assert not checkpoint.listed(folder)


STUDY = """stage: small.yaml
set:
  optim: {schedule: step, milestones: [75%], warmup: 2it}
  validation: {data: "colours:val", images: 8, every: 100%}
  checkpoint: {every: 20it}
axes:
  data.subset: [50%, 100%]
  length: [40it, 60it, 80it]
evaluations:
  - {stage: eval/knn, data: colours, evaluator: {k: 3, workers: 0}}
"""


@pytest.mark.faults
def test_a_study_of_six_runs_of_which_one_is_killed_ends_complete(box):
    Path("study.yaml").write_text(STUDY)
    go = lambda: commands.run("study.yaml", None, 1, 1, jobs=1, slurm="debug", hours=1.0)
    go()
    found, folder = study.read("study.yaml"), Path("runs/study")
    planned = plans.plan(found)
    jobs = progress.jobs(found).read()
    trunk = jobs["50pct-80it"]["train"]
    reach(folder / "50pct-80it", 30)
    os.kill(processes(trunk, rank=0)[0], signal.SIGKILL)
    go()  # what is queued is not queued twice
    assert progress.jobs(found).read() == jobs
    every = [job for one in jobs.values() for job in one.values()]
    for job in sorted(every):
        assert finish(job, 900) == "COMPLETED", said()
    assert {one.what for one in progress.states(found, planned)} == {"done"}
    assert (0, "again") in ends(folder)
    trained = sum(row.get("loss") is not None for one in planned for row in rows(one.run.folder))
    assert trained == sum(one.own_steps for one in planned) == 2 * (80 + 15 + 10)
    go()
    assert progress.jobs(found).read() == jobs
    paths, left = collect(found, planned, 1)
    assert len(paths[0].read_text().splitlines()) == 7 and not left
