"""A folder with a small real data set of photos, its cards and configs, to run stages in."""

import faulthandler
import gc
import importlib
import logging
import os
import runpy
import subprocess
import sys
import tempfile
from multiprocessing import forkserver, resource_tracker, util
from multiprocessing.process import BaseProcess as Process
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as multiprocessing
from PIL import Image

from prepretrain.data.card import load_card
from prepretrain.data.sources.base import Source
from prepretrain.data.tags.vocabulary import Vocabulary
from prepretrain.distributed import group as distributed
from prepretrain.distributed import ports
from prepretrain.evaluation import leaks

# Much is compared to the last bit, in two processes and more, as only a CPU can. `make gpu` is for GPUs.
sees_a_gpu = torch.cuda.is_available
torch.cuda.is_available = distributed._has_gpus = lambda: False

CARD = """description: three colours
licence: made by the tests
classes: [blue, green, red]
train: {source: folder, path: photos}
val: {source: folder, path: photos}
"""

SCENES = """description: made scenes with hashtags
licence: made by the tests
train: {source: synthetic, images: 120, size: 40, seed: 0}
"""

MAE = """model: {encoder: vit_test8, positions: fixed}
objective: {name: mae, decoder_depth: 1, decoder_width: 32, decoder_heads: 2}
data: {train: colours, workers: 0}
optim: {lr: 1.0e-2, warmup: 2it}
batch_size: 16
length: 12it
log_every: 1it
shard: {precision: fp32}
checkpoint: {every: 4it, keep: 9}
device: cpu
"""


# Files with the longest tests, most of which wait: started last, they would be what is left at the end.
LONGEST = ("test_slurm", "test_benchmarks", "test_faults", "test_launch")


def pytest_collection_modifyitems(items):
    """Lets them begin."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    """Forks the server of new processes from this one, which has imported what all tests need: a
    server that is started imports it again, and each of its processes the test's own file."""
    if session.items:  # xdist's own process runs no test
        gc.freeze()  # what the imports made stays, and to look through it takes a second each time
        resource_tracker.ensure_running()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(util, "spawnv_passfds", _forked)
            forkserver.ensure_running()


def _forked(path: bytes, arguments: list[str], kept: list[int]) -> int:
    """Runs Python's code, its last argument, in a copy of this process that holds only these files."""
    if child := os.fork():
        return child
    faulthandler.disable()  # pytest's, to a file that is closed here
    ends = sorted({2, *kept, os.sysconf("SC_OPEN_MAX")})
    for before, after in zip(ends, ends[1:]):
        os.closerange(before + 1, after)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
    logging.root.handlers.clear()  # pytest's
    importlib.reload(forkserver)  # the copied one waits for a lock that nobody gives back
    try:
        exec(arguments[-1])
    finally:
        os._exit(0)


def pytest_make_parametrize_id(val, argname):
    """Bytes do not name a test: some hold the time (gzip's), and workers must agree on names."""
    return argname if isinstance(val, bytes) else None


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """The current directory: a card `colours` of 60 photos, and a stage `small.yaml`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PREPRETRAIN_DATA", raising=False)
    furnish()
    return tmp_path


def furnish() -> None:
    """Makes what `place` promises in the current directory."""
    rng = np.random.default_rng(0)
    for i in range(60):
        colour = i % 3
        pixels = rng.random((40, 48, 3)) * 150 + 100 * np.eye(3)[2 - colour]
        path = Path("data/photos", ("blue", "green", "red")[colour], f"{i:03d}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype("uint8")).save(path)
    Path("datasets").mkdir()
    Path("datasets/colours.yaml").write_text(CARD)
    Path("datasets/scenes.yaml").write_text(SCENES)
    Path("small.yaml").write_text(MAE)
    scenes = load_card("scenes").open("train")
    tags = (scenes.hashtags(i) for i in range(len(scenes)))
    Vocabulary.count(tags, source=scenes.fingerprint, min_count=2).save(Path("data/tags.json"))


def listed(folder: Path, leaked: dict[str, tuple[Source, list[int]]]) -> str:
    """A curation's folder whose stage leaks has found near-copies of these images of each set."""
    (folder / "leaks").mkdir(parents=True, exist_ok=True)
    found = {
        address: leaks.Leaked(source.fingerprint, len(source), numbers, [])
        for address, (source, numbers) in leaked.items()
    }
    leaks.write(folder, "web:train", found)
    return str(folder)


@pytest.fixture
def group():
    """A process group of this process alone."""
    distributed.init()
    yield
    distributed.shutdown()


def start(out: Path, script: str, *arguments: str, **environment: str) -> Process:
    """Starts one of the tools as a command does, in a process of its own; what it prints goes to
    `out`, and its errors to `out`.err."""
    given = (script, arguments, {**os.environ, "OMP_NUM_THREADS": "1", **environment}, out)
    process = multiprocessing.get_context("forkserver").Process(target=_tool, args=given)
    process.start()
    return process


def command(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs one of the tools to its end."""
    with tempfile.TemporaryDirectory() as place:
        out = Path(place, "out")
        process = start(out, script, *arguments, **environment)
        process.join()
        said = (out.read_text(), Path(f"{out}.err").read_text())
    return subprocess.CompletedProcess(arguments, process.exitcode, *said)


def _tool(script: str, arguments: tuple[str, ...], environment: dict, out: Path) -> None:
    for number, path in ((1, out), (2, f"{out}.err")):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [script, *arguments]
    sys.path[:0] = [p for p in environment.get("PYTHONPATH", "").split(os.pathsep) if p]
    torch.set_num_threads(1)
    runpy.run_path(str(Path(__file__).parents[1] / "tools" / script), run_name="__main__")


def processes(count: int, function, *arguments) -> None:
    """Runs function(rank, *arguments) in `count` processes that can find each other; raises, with
    what they printed, if one fails."""
    with tempfile.TemporaryDirectory() as place:
        given = (count, ports.free(), place, dict(os.environ), function, arguments)
        try:
            multiprocessing.start_processes(_joined, given, nprocs=count, start_method="forkserver")
        except Exception as error:
            printed = [f"{p.name} printed:\n{p.read_text()[-6000:]}" for p in Path(place).iterdir()]
            raise RuntimeError("\n".join(sorted(printed))) from error


def _joined(
    rank: int, count: int, port: int, place: str, environment: dict, function, arguments: tuple
) -> None:
    printed = os.open(Path(place, f"process {rank}"), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(printed, 2)
    faulthandler.enable()  # a process that is aborted says where it was
    os.environ.clear()
    os.environ.update(
        environment,
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(count),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    torch.set_num_threads(1)
    function(rank, *arguments)
