"""Features of a split: each image once, in order, whatever the number of ranks."""

import io
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from conftest import processes
from filelock import FileLock
from PIL import Image
from pyarrow import parquet

from prepretrain.data.sources.base import Source
from prepretrain.data.sources.listed import Listed
from prepretrain.data.sources.parquet import Parquet
from prepretrain.data.sources.shards import Shards
from prepretrain.distributed import group as distributed
from prepretrain.distributed import shard, shared
from prepretrain.evaluation import feature_store, features
from prepretrain.evaluation.evaluators.linear import Linear
from prepretrain.evaluation.features import extract, fingerprint, frozen
from prepretrain.models.model import Model
from prepretrain.objectives.mae import MAE


class Pictures(Source):
    """`count` small JPEGs whose label is their number."""

    fields = ("image", "label")
    fingerprint = "pictures"

    def __init__(self, count: int, **changed: object):
        self.groups, self.changed, self.read = [count], changed, []

    def __getitem__(self, index: int) -> dict:
        self.read.append(index)
        pixels = np.random.default_rng(index).integers(0, 255, (4, 4, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).resize((40, 36)).save(file, "JPEG")
        return {"key": f"k{index}", "image": file.getvalue(), "label": index, **self.changed}

    def key(self, index: int) -> str:
        return f"k{index}"

    def label(self, index: int) -> int:
        return self.changed.get("label", index)


def tiny_model(**options: object) -> Model:
    model = Model(encoder="vit_test8", **options)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return model


def _save(rank: int, folder: str) -> None:
    distributed.init()
    found = extract(tiny_model(), Pictures(13), batch_size=4)
    torch.save((*found, file_of(found[0])), f"{folder}/{rank}.pt")
    shared._made = lambda size: None  # no room for a file that all processes share
    own = extract(tiny_model(), Pictures(13), batch_size=4)
    assert torch.equal(own[0], found[0]) and file_of(own[0]) is None
    feature_store.ROWS = 5
    source = Pictures(13)
    found = extract(tiny_model(), source, batch_size=2, cache=Path(folder) / "cache")
    torch.save((*found, source.read, fingerprints()), f"{folder}/cached{rank}.pt")
    distributed.shutdown()


def file_of(tensor: torch.Tensor) -> str | None:
    """The device and inode of the file that a tensor's memory is of."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(end, 16) for end in line.split()[0].split("-"))
        if low <= tensor.data_ptr() < high:
            device, inode = line.split()[3:5]
            return None if inode == "0" else f"{device} {inode}"
    raise AssertionError("the tensor lies nowhere")


def test_features_come_in_the_sources_order_with_their_labels():
    features, labels = extract(tiny_model(), Pictures(13), batch_size=4)
    assert features.shape == (13, 32) and features.dtype == torch.float32
    assert labels.tolist() == list(range(13))
    one, _ = extract(tiny_model(), Pictures(1), batch_size=4)
    torch.testing.assert_close(features[:1], one)


@pytest.mark.parametrize("world", [2, 3])
def test_more_ranks_give_the_same_features_and_hash_as_one_where_nothing_divides(world, tmp_path):
    alone, labels = extract(tiny_model(), Pictures(13), batch_size=4)
    processes(world, _save, str(tmp_path))
    distributed.init()
    hashes, read = fingerprints(), []
    distributed.shutdown()
    assert len(set(hashes)) == 1 and hashes[0] != fingerprint(tiny_model())
    files = set()
    for rank in range(world):
        features, found, file = torch.load(tmp_path / f"{rank}.pt")
        files.add(file)
        assert found.tolist() == labels.tolist()
        torch.testing.assert_close(features, alone)
        features, found, mine, others = torch.load(tmp_path / f"cached{rank}.pt")
        assert others == hashes and found.tolist() == labels.tolist()
        torch.testing.assert_close(features, alone)
        read += mine
    assert len(files) == 1 and None not in files  # all processes have the same memory
    # a rank without an image of its own takes a chunk's first to fill its batch
    assert sorted(set(read)) == list(range(13)) and len(read) <= 13 + world
    source = Pictures(13)
    torch.testing.assert_close(extract(tiny_model(), source, cache=tmp_path / "cache")[0], alone)
    assert not source.read  # what several ranks wrote, one finds


def test_a_source_without_labels_is_named():
    source = Pictures(3)
    source.fields = ("image",)
    with pytest.raises(ValueError, match="demo:val: has no labels"):
        extract(tiny_model(), source, name="demo:val")


def test_an_image_without_a_label_is_named():
    with pytest.raises(ValueError, match="k0.*no label"):
        extract(tiny_model(), Pictures(3, label=None), name="demo:val")


def test_an_image_without_a_label_is_named_also_where_its_features_are_kept(tmp_path):
    extract(tiny_model(), Pictures(3), cache=tmp_path)
    with pytest.raises(ValueError, match="k0.*no label"):
        extract(tiny_model(), Pictures(3, label=None), cache=tmp_path)
    features, labels = extract(
        tiny_model(), Pictures(3, label=None), labelled=False, cache=tmp_path
    )
    assert labels.tolist() == [0, 0, 0] and len(features) == 3


def test_an_unreadable_image_stops_the_evaluation():
    with pytest.raises(ValueError, match="unreadable"):
        extract(tiny_model(), Pictures(3, image=b"not an image"))


def test_an_image_that_is_evaluated_twice_is_an_error(monkeypatch):
    whole = features.evaluation_batches
    monkeypatch.setattr(
        features, "evaluation_batches", lambda *a, **k: [*whole(*a, **k), *whole(*a, **k)]
    )
    with pytest.raises(RuntimeError, match="5 were not evaluated exactly once"):
        extract(tiny_model(), Pictures(5))


def test_features_that_are_not_finite_are_an_error():
    model = tiny_model()
    model.encoder.norm.weight.data.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="not finite"):
        extract(model, Pictures(3))


def test_the_model_trains_again_after_an_evaluation_where_it_trained_before():
    model = tiny_model().train()
    model.encoder.norm.eval()
    with frozen(model):
        assert not model.training and not torch.is_grad_enabled()
    assert model.training and not model.encoder.norm.training and torch.is_grad_enabled()


@pytest.mark.parametrize("on_gpu, within", [(True, "high"), (False, "highest")])
def test_a_gpu_multiplies_in_tf32_while_features_are_computed_and_no_longer(
    monkeypatch, on_gpu, within
):
    monkeypatch.setattr(distributed, "on_gpu", lambda: on_gpu)
    model, seen = tiny_model(), []
    model.encoder.register_forward_hook(
        lambda *_: seen.append(torch.get_float32_matmul_precision())
    )
    monkeypatch.setattr(features, "evaluation_batches", one_batch)
    extract(model, Pictures(3))
    assert seen == [within] and torch.get_float32_matmul_precision() == "highest"
    model.encoder.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        extract(model, Pictures(3))
    assert torch.get_float32_matmul_precision() == "highest"


def one_batch(source: Source, transform: Callable, **_: object) -> list[dict]:
    """A source as one batch, without the loader, which would pin it in memory for a GPU."""
    rows = [transform(source[i]) for i in range(len(source))]
    batch = {name: [row[name] for row in rows] for name in ("image", "label")}
    image, label = torch.stack(batch["image"]), torch.tensor(batch["label"])
    return [{"image": image, "label": label, "position": list(range(len(rows)))}]


def _evaluate_then_train(rank: int) -> None:
    distributed.init()
    with torch.device("meta"):
        objective = MAE(
            Model(encoder="vit_test8"), decoder_depth=1, decoder_width=32, decoder_heads=2
        )
    shard.shard(objective, precision="fp32")
    shard.initialise(objective, 0)
    extract(objective.model, Pictures(3))
    image = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    objective({"image": image, "noise": torch.rand(2, 16)})["loss"].backward()
    distributed.shutdown()


def test_a_sharded_model_trains_after_an_evaluation():
    processes(1, _evaluate_then_train)


def kept(folder: Path, **options: object) -> list[int]:
    """The images that a pass with a cache reads, each once; its features are those without one."""
    source, model = Pictures(13), options.pop("model", None) or tiny_model()
    features, labels = extract(model, source, batch_size=4, cache=folder, **options)
    other, _ = extract(model, Pictures(13), batch_size=4, **options)
    torch.testing.assert_close(features, other)
    assert labels.tolist() == list(range(13)) and features.dtype == torch.float32
    return source.read


def test_features_are_computed_once_for_each_model_and_way_of_reading(tmp_path):
    assert kept(tmp_path) == list(range(13)) and kept(tmp_path) == []
    other = tiny_model()
    other.encoder.norm.bias.data[0] += 1e-3
    for options in (
        {"model": other},
        {"model": tiny_model(mean=[0.5, 0.5, 0.5])},
        {"pool": "mean"},
        {"layer": 1},
        {"share": 1.0},
        {"resize": "squash"},
    ):
        assert kept(tmp_path, **options) == list(range(13)), options
        assert kept(tmp_path, **options) == [], options
    for changed in ({"fingerprint": "other pictures"}, {"stamp": "written anew"}):
        source = Pictures(13)
        vars(source).update(changed)
        extract(tiny_model(), source, cache=tmp_path)
        assert source.read == list(range(13))
    shutil.rmtree(tmp_path)
    assert kept(tmp_path) == list(range(13))


def test_what_is_missing_is_computed_in_one_pass_and_kept_as_it_comes(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_store, "ROWS", 4)
    events = []
    whole, write = features.evaluation_batches, feature_store.Store.write

    def passes(*given: object, **options: object):
        events.append("pass")
        for batch in whole(*given, **options):
            events.append("batch")
            yield batch

    def writes(store: feature_store.Store, first: int, rows: torch.Tensor) -> None:
        events.append(first)
        write(store, first, rows)

    monkeypatch.setattr(features, "evaluation_batches", passes)
    monkeypatch.setattr(feature_store.Store, "write", writes)
    extract(tiny_model(), Pictures(13), batch_size=4, cache=tmp_path)
    assert events == ["pass", "batch", 0, "batch", 4, "batch", 8, "batch", 12]
    (file,) = tmp_path.glob("*.bin")
    torn = file.read_bytes()
    file.write_bytes(b"\xff" * 64 + torn[64:-64] + b"\xff" * 64)  # the first chunk and the last
    events.clear()
    extract(tiny_model(), Pictures(13), batch_size=2, cache=tmp_path)
    assert events.count("pass") == 1 and [e for e in events if type(e) is int] == [0, 12]
    assert file.read_bytes() == torn


@pytest.mark.parametrize("world, size", [(1, 4), (2, 4), (3, 4), (3, 256), (7, 2), (64, 1)])
def test_whatever_the_processes_read_at_a_time_lies_together(monkeypatch, world, size):
    monkeypatch.setattr(distributed, "world", lambda: world)
    rows = torch.cat([torch.arange(5, 29), torch.arange(40, 67)])
    order = features._in_turn(rows, size)
    share = -(-len(rows) // world)
    batches = [part.split(min(size, share)) for part in order.split(share)]
    together = [
        part for parts in itertools.zip_longest(*batches) for part in parts if part is not None
    ]
    assert torch.cat(together).tolist() == rows.tolist()


class Killing(Pictures):
    """Kills its process at its tenth image."""

    def __getitem__(self, index: int) -> dict:
        if index == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def _killed(folder: Path) -> None:
    feature_store.ROWS = 4
    extract(tiny_model(), Killing(13), batch_size=4, cache=folder)


def test_a_pass_that_was_killed_goes_on_from_its_last_whole_chunk(tmp_path, monkeypatch):
    child = multiprocessing.get_context("fork").Process(target=_killed, args=(tmp_path,))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    monkeypatch.setattr(feature_store, "ROWS", 4)
    assert kept(tmp_path) == [8, 9, 10, 11, 12]
    assert kept(tmp_path) == []


def test_a_chunk_that_changed_on_disk_is_computed_again_and_a_torn_file_whole(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(feature_store, "ROWS", 4)
    kept(tmp_path)
    (file,) = tmp_path.glob("*.bin")
    with open(file, "r+b") as stream:  # a NaN in the sixth image's features
        stream.seek(5 * 32 * 4)
        stream.write(np.array([np.nan], "<f4").tobytes())
    assert kept(tmp_path) == [4, 5, 6, 7]
    with open(file, "r+b") as stream:  # the last value
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\1")
    assert kept(tmp_path) == [12]
    os.truncate(file, file.stat().st_size - 8)
    assert kept(tmp_path) == list(range(13))
    (described,) = tmp_path.glob("*.json")
    described.write_text(described.read_text()[:40])
    assert kept(tmp_path) == list(range(13)) and kept(tmp_path) == []


@pytest.mark.parametrize("key", ["rows", "shape", "dtype", "chunk", "crc32"])
@pytest.mark.parametrize("value", [None, "x", 0, -3, [], {}, 10**30, "object", [2, "x"], 12])
def test_a_store_whose_description_is_damaged_counts_as_none(tmp_path, key, value):
    store = feature_store.Store.create(tmp_path / "x", 13, (4,), "float32")
    described = tmp_path / "x.json"
    head = json.loads(described.read_text())
    described.write_text(json.dumps(head | {key: value}))
    found = feature_store.Store.open(tmp_path / "x")
    assert found is None or (key in ("chunk", "crc32") and found.missing())
    described.write_text(json.dumps({k: v for k, v in head.items() if k != key}))
    assert feature_store.Store.open(tmp_path / "x") is None and store.bytes


def test_features_that_are_not_finite_are_never_kept(tmp_path):
    model = tiny_model()
    model.encoder.norm.weight.data.fill_(float("nan"))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="not finite"):
            extract(model, Pictures(3), cache=tmp_path)


def test_while_another_process_writes_features_are_computed_without(tmp_path):
    kept(tmp_path)
    (file,) = tmp_path.glob("*.bin")
    file.unlink()
    with FileLock(f"{file.with_suffix('')}.lock"):
        assert kept(tmp_path) == list(range(13)) and not file.exists()


def test_all_tokens_are_kept_in_half_precision_and_only_on_disk(tmp_path):
    model, source = tiny_model(), Pictures(5)
    with pytest.raises(ValueError, match="tokens of all images are kept on disk only"):
        extract(model, source, pool="tokens")
    tokens, labels = extract(model, source, pool="tokens", layer=1, cache=tmp_path)
    assert tokens.shape == (5, 17, 32) and tokens.dtype == torch.float16
    pooled, _ = extract(model, Pictures(5), layer=1)
    torch.testing.assert_close(tokens[:, 0].float(), pooled, atol=1e-2, rtol=1e-2)
    assert labels.tolist() == list(range(5))


def test_a_disk_without_room_is_refused_before_it_starts(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=5000))
    with pytest.raises(ValueError, match="demo:val: its features take .* are free"):
        extract(tiny_model(), Pictures(5), pool="tokens", name="demo:val", cache=tmp_path)
    assert not list(tmp_path.glob("*.bin"))


def bitmap(seed: int) -> bytes:
    """A picture of one colour, whose file has the same size whatever the seed."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (seed, 0, 0)).save(file, "BMP")
    return file.getvalue()


def write_shard(folder: Path, images: list[bytes], labels: list[int]) -> Source:
    with tarfile.open(folder / "0.tar", "w") as tar:
        for i, (image, label) in enumerate(zip(images, labels)):
            for name, data in ((f"{i}.png", image), (f"{i}.cls", str(label).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return Shards(path=str(folder))


def write_parquet(folder: Path, images: list[bytes], labels: list[int]) -> Source:
    table = pyarrow.table({"image": images, "label": labels})
    parquet.write_table(table, folder / "0.parquet", compression="none", use_dictionary=False)
    return Parquet(path=str(folder))


def write_list(folder: Path, images: list[bytes], labels: list[int]) -> Source:
    for i, image in enumerate(images):
        (folder / f"{i}.bmp").write_bytes(image)
    rows = "".join(f"{i}.bmp {label}\n" for i, label in enumerate(labels))
    (folder / "list.txt").write_text(rows)
    return Listed(path=str(folder), listing=str(folder / "list.txt"))


@pytest.mark.parametrize("write", [write_shard, write_parquet, write_list])
def test_what_was_mended_in_the_data_is_never_read_from_the_cache(tmp_path, write):
    """In each case the files have the size that they had, and so the training's fingerprint."""
    data, cache = tmp_path / "data", tmp_path / "cache"
    data.mkdir()
    pictures = [bitmap(seed) for seed in range(4)]
    before = write(data, pictures, [0, 1, 0, 1])
    features, labels = extract(tiny_model(), before, cache=cache)
    kept, times = features.clone(), [(f, f.stat()) for f in data.iterdir()]
    mended = write(data, pictures, [1, 0, 0, 1])
    for file, stat in times:  # even where the mended file has the old one's time
        if file.suffix != ".index":
            os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    mended = type(before)(**options(write, data))
    found, labels = extract(tiny_model(), mended, cache=cache)
    assert labels.tolist() == [1, 0, 0, 1] and torch.equal(found, kept)
    replaced = write(data, [bitmap(seed + 90) for seed in range(4)], [1, 0, 0, 1])
    found, _ = extract(tiny_model(), replaced, cache=cache)
    assert replaced.fingerprint == mended.fingerprint and replaced.stamp != mended.stamp
    assert not torch.equal(found, kept)
    torch.testing.assert_close(found, extract(tiny_model(), replaced)[0])


def options(write: Callable, data: Path) -> dict:
    return {"path": str(data)} | (
        {"listing": str(data / "list.txt")} if write is write_list else {}
    )


def test_features_of_changed_images_are_not_kept(tmp_path):
    with pytest.raises(ValueError, match="changed images are not cached"):
        extract(tiny_model(), Pictures(3), change=lambda image, random: 255 - image, cache=tmp_path)


def fingerprints() -> list[str]:
    """Of one model, replicated, sharded over all ranks, and recomputing its blocks."""
    found = []
    for group, recompute in ((1, "none"), (None, "none"), (None, "block")):
        with torch.device("meta"):
            objective = MAE(
                Model(encoder="vit_test8"), decoder_depth=1, decoder_width=32, decoder_heads=2
            )
        shard.shard(objective, precision="fp32", group=group, recompute=recompute)
        shard.initialise(objective, 0)
        found.append(fingerprint(objective.model))
    return found


def test_two_evaluations_of_a_run_share_its_features(tmp_path):
    card = tmp_path / "scenes.yaml"
    card.write_text(
        "train: {source: synthetic, images: 40, size: 32}\n"
        "val: {source: synthetic, images: 9, size: 32, seed: 1}\n"
    )
    options = {"data": str(card), "pool": "mean"}
    found = Linear(**options, protocol="ridge").run(tiny_model(), tmp_path)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "features").iterdir()}
    assert {path.name.split("-")[0] for path in files} == {"scenes_train", "scenes_val"}
    again = Linear(**options, protocol="ridge").run(tiny_model(), tmp_path)
    assert again == found == Linear(**options, protocol="ridge").run(tiny_model(), None)
    Linear(**options, protocol="lbfgs").run(tiny_model(), tmp_path)
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "features").iterdir()}
