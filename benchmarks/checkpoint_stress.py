"""Kills a tiny run at random instants, and while it saves, renames and removes checkpoints, over and
over. After each kill the newest checkpoint must verify, and hold what the same run, never killed,
had at that step. One JSON line.

python benchmarks/checkpoint_stress.py --kills 50
python benchmarks/checkpoint_stress.py --kills 50 --procs 2 --background
python benchmarks/checkpoint_stress.py --flips 500
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from prepretrain import config
from prepretrain.distributed import checkpoint, ports
from prepretrain.runs import run

CARD = """description: made scenes
licence: made here
train: {source: synthetic, images: 64, size: 32, seed: 0}
"""
STAGE = """model: {encoder: vit_test8, positions: fixed, drop_path: 0.1}
objective: {name: mae, decoder_depth: 1, decoder_width: 32, decoder_heads: 2}
data: {train: scenes, workers: 0}
optim: {lr: 1.0e-2, warmup: 2it}
batch_size: 4
length: %dit
log_every: 1it
shard: {precision: fp32}
checkpoint: {every: 1it, keep: %d, async_save: %s}
"""


AIMS = (
    "writing a checkpoint",
    "manifest written, not yet renamed",
    "removing an old checkpoint",
)


def main() -> None:
    """Prints how many kills hit what, and how many checks failed; exits 1 if one did."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--flips", type=int, default=0, help="bytes to flip, one at a time")
    parser.add_argument("--procs", type=int, default=1, help="processes; all are killed at once")
    parser.add_argument("--steps", type=int, default=40, help="of the run; then it starts anew")
    parser.add_argument("--background", action="store_true", help="checkpoint.async_save")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        Path("datasets").mkdir()
        Path("datasets/scenes.yaml").write_text(CARD)
        found = stress(asked)
    print(json.dumps({"figure": "checkpoint_stress", **vars(asked), **found}))
    sys.exit(1 if found["failures"] else 0)


def stress(asked: argparse.Namespace) -> dict:
    """{"failures", "hit": {what was under way: kills}, …}."""
    background = str(asked.background).lower()
    Path("whole.yaml").write_text(STAGE % (asked.steps, asked.steps + 1, background))
    Path("killed.yaml").write_text(STAGE % (asked.steps, 2, background))
    begun = time.monotonic()
    wait(start("whole", Path("runs/whole"), asked.procs))
    length = time.monotonic() - begun
    whole = {int(p.name): content(p) for p in checkpoint.listed(Path("runs/whole"))}
    if sorted(whole) != list(range(1, asked.steps + 1)):
        raise RuntimeError(f"the run that is not killed saved only {sorted(whole)}")
    random.seed(asked.seed)
    found = {"failures": [], "hit": Counter(), "runs": 0, "steps_resumed": 0}
    folder, reached = Path("runs/killed"), 0
    for kill in range(asked.kills):
        pids = start("killed", folder, asked.procs)
        # three quarters of a whole run's time: most kills find it under way; half of them then wait
        # for what random instants seldom meet
        aim = AIMS[kill // 2 % len(AIMS)] if kill % 2 else None
        ended = killed(pids, random.random() * length * 0.75, folder, aim)
        found["hit"][under_way(folder) if not ended else "after the end"] += 1
        newest = checkpoint.newest(folder)
        step = int(newest.name) if newest else 0
        if step < reached:
            found["failures"].append(f"kill {kill}: step {reached} was lost, {step} is left")
        if newest and content(newest) != whole[step]:
            found["failures"].append(f"kill {kill}: {newest} is not what it should be")
        found["steps_resumed"] += step > 0
        reached = step
        if step == asked.steps:
            found["runs"] += 1
            found["failures"] += differing(folder)
            shutil.rmtree(folder)
            reached = 0
    wait(start("killed", folder, asked.procs))
    found["failures"] += differing(folder)
    found["flips_noticed"] = flips(checkpoint.newest(folder), asked.flips)
    if found["flips_noticed"] < asked.flips:
        found["failures"].append("flipped bytes were not noticed")
    return found


def start(stage: str, folder: Path, count: int) -> list[int]:
    """Forks the processes of a run, from this one, which has imported all that they need."""
    port = ports.free()
    pids = []
    for rank in range(count):
        pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        try:
            os.setpgid(0, 0)
            with open(f"printed-{rank}", "a") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            if count > 1:
                os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count)}
                os.environ |= {"LOCAL_RANK": str(rank)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            run.start(config.load(f"{stage}.yaml", []), folder)
            os._exit(0)
        except BaseException as error:
            print(f"failed: {error!r}", file=sys.stderr, flush=True)
            os._exit(1)
    return pids


def wait(pids: list[int]) -> None:
    """Waits for processes; raises if one failed."""
    if any(os.waitpid(pid, 0)[1] for pid in pids):
        raise RuntimeError(Path("printed-0").read_text()[-3000:])


def killed(pids: list[int], seconds: float, folder: Path, aim: str | None) -> bool:
    """Kills processes after a time, and then when `aim` is under way; whether all had come to their
    end by then."""
    time.sleep(seconds)
    deadline = time.monotonic() + 20
    while aim is not None and time.monotonic() < deadline and under_way(folder) != aim:
        if os.waitid(os.P_PID, pids[0], os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break
    ended = all(os.waitid(os.P_PID, p, os.WEXITED | os.WNOHANG | os.WNOWAIT) for p in pids)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    if any(status not in (0, -signal.SIGKILL) for status in statuses):
        raise RuntimeError(f"{statuses}: {Path('printed-0').read_text()[-3000:]}")
    return ended


def under_way(folder: Path) -> str:
    """What a kill has interrupted, by what it left behind."""
    left = [p for p in folder.glob("checkpoints/*") if not p.name.isdigit()]
    if any(p.name.endswith("old") for p in left):
        return AIMS[2]
    if any((p / checkpoint.MANIFEST).exists() for p in left):
        return AIMS[1]
    if left:
        return AIMS[0]
    return "between two saves" if folder.exists() else "before the first"


def content(saved: Path) -> dict[str, str]:
    """{name: digest of its bytes} of every tensor of a checkpoint, the optimizer's too."""
    rows = dcp.FileSystemReader(str(saved)).read_metadata().state_dict_metadata
    target = {
        k: torch.empty(m.size, dtype=m.properties.dtype)
        for k, m in rows.items()
        if hasattr(m, "size")
    }
    dcp.load(target, storage_reader=dcp.FileSystemReader(str(saved)), no_dist=True)
    return {k: hashlib.sha256(v.numpy().tobytes()).hexdigest() for k, v in target.items()}


def differing(folder: Path) -> list[str]:
    """Where a finished run's log or export is not the uninterrupted one's."""
    clocks = ("seconds", "images_per_second", "data_wait")
    wrong = []
    logs = []
    for name in (folder, Path("runs/whole")):
        lines = (name / "metrics.jsonl").read_text().splitlines()
        logs.append([{k: v for k, v in json.loads(x).items() if k not in clocks} for x in lines])
    if logs[0] != logs[1]:
        wrong.append(f"{folder}: its metrics differ")
    if not (folder / "export" / "model.safetensors").exists():
        return wrong  # killed at its very end
    one, two = (
        checkpoint.describe(name / "export" / "model.safetensors")
        for name in (folder, Path("runs/whole"))
    )
    return wrong + ([f"{folder}: its export differs"] if one != two else [])


def flips(saved: Path, count: int) -> int:
    """How many of `count` flipped bits, at random places of all files, are noticed."""
    noticed, files = 0, sorted(p for p in saved.iterdir())
    weights = [p.stat().st_size for p in files]
    for number in range(count):
        # half by size, half by file: small files count, too
        victim = random.choices(files, weights)[0] if number % 2 else random.choice(files)
        good = victim.read_bytes()
        bad = bytearray(good)
        bad[random.randrange(len(bad))] ^= 1 << random.randrange(8)
        victim.write_bytes(bad)
        noticed += bool(checkpoint.damage(saved))
        victim.write_bytes(good)
    return noticed


if __name__ == "__main__":
    main()
