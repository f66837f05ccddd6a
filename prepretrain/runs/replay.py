"""Takes one dumped step again, to find where the first value that is not finite comes from."""

from functools import partial
from pathlib import Path
from typing import Any

from prepretrain import config as configs
from prepretrain.data.loader import Stream, to_device
from prepretrain.distributed import checkpoint, shard
from prepretrain.distributed import group as distributed
from prepretrain.files import read_json
from prepretrain.runs.plan import Plan, build_optimizer
from prepretrain.training import fit as train
from prepretrain.training import numerics


def replay(dump: Path) -> list[dict[str, Any]]:
    """Computes a dumped step's losses and gradients as they were, from the weights that it started
    from, and changes nothing; called by all processes. A row for each process of then and each of its
    micro batches: {"process", "part", "loss", "found": see FirstNotFinite, "keys"}.

    One process takes all shares in turn; as many as there were take one each. Raises ValueError for a
    folder without a dump or without its weights, and for any other number of processes.
    """
    given = _read(dump)
    config = configs.read_training(dump.parents[1] / "config.yaml")
    plan, source, order = Plan(config, given["world"]).open_data()
    objective, rank, changes = plan.objective, distributed.rank(), plan.open_changes()
    ranks = range(given["world"]) if distributed.world() == 1 else [rank]
    if objective.whole_batch and distributed.world() != given["world"]:
        raise ValueError(
            f"--procs {distributed.world()}: objective '{config.objective['name']}' looks at all images "
            f"of a batch at once, so all {given['world']} processes are needed: --procs {given['world']}."
        )
    how = plan.sharding(*distributed.machine())
    mesh_options = {"group": how.group, "reshard": how.reshard}
    mesh_options["precision"] = shard.chosen(config.shard.precision)
    shard.shard(objective, **mesh_options)
    objective.prepare(partial(shard.shard, **mesh_options))
    saved = checkpoint.newest(dump)
    if saved is None:
        raise ValueError(f"{dump}: its checkpoint is damaged, so there is nothing to replay from.")
    kept = checkpoint.restore(saved, objective, build_optimizer(config, objective))
    objective.train()
    rows = []
    for one in ranks:
        stream = Stream(
            source,
            objective.transform(train=True),
            batch_size=config.batch_size,
            accumulate=plan.accumulate,
            order=order,
            changes=changes,
            rank=one,
            world=given["world"],
        )
        if stream.fingerprint(numerics.position_of(kept)) != kept["data"]:
            raise ValueError(f"{dump}: data.train is not what it was. Restore the data.")
        train.seed_all(config.seed, given["step"] - 1, one)
        batches = stream.batches(given["position"])
        for part, dumped in enumerate(given["processes"][one]["batches"]):
            batch = next(batches)
            if batch["key"] != dumped["key"]:
                raise RuntimeError(f"{dump}: process {one}, part {part}: other images than then.")
            rows.append({"process": one, "part": part, **_look(objective, batch)})
    return [row for part in distributed.all_gather_object(rows) for row in part]


def check(dump: Path, procs: int) -> None:
    """Raises ValueError for what is no dump, or cannot be replayed by so many processes."""
    world = _read(dump)["world"]
    if procs not in (1, world):
        raise ValueError(
            f"--procs {procs}: this step was taken by {world} processes: give --procs 1 or {world}."
        )


def _read(dump: Path) -> dict[str, Any]:
    try:
        given = read_json(dump / numerics.DUMP)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--replay {dump}: holds no dump: {error}. Give a folder such as runs/mae/dumps/000001234."
        ) from error
    if not checkpoint.listed(dump):
        raise ValueError(
            f"--replay {dump}: holds no weights; only the first dumps of a run do. Replay one of "
            f"{', '.join(sorted({p.parent.name for p in dump.parent.glob('*/checkpoints')})) or 'none'}."
        )
    return given


def _look(objective: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """One forward and backward pass under observation."""
    batch.pop("bad")
    watched = numerics.FirstNotFinite(objective)
    try:
        figures = objective(to_device(batch))
        figures["loss"].backward()
    finally:
        watched.close()
    for parameter in objective.parameters():
        parameter.grad = None
    return {
        "loss": numerics.as_json(figures["loss"]),
        "found": watched.found,
        "keys": batch["key"],
    }


def told(rows: list[dict[str, Any]]) -> str:
    """What a replay found, a line for each part."""
    lines = []
    for row in rows:
        found = row["found"]
        where = (
            "all finite"
            if found is None
            else f"first not finite: {found['module']} ({found['where']})"
        )
        lines.append(f"process {row['process']}, part {row['part']}: loss {row['loss']}: {where}")
        if found is not None:
            lines.append(f"  images: {' '.join(row['keys'])}")
    return "\n".join(lines)
