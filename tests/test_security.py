"""Nothing runs that data or a downloaded run names, and what is read back from disk is checked."""

import json
import os
import pickle
import random
import re
import sys
import tarfile
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import prepretrain
from prepretrain import config, files, plugin
from prepretrain.cluster import slurm
from prepretrain.data.card import load_card
from prepretrain.data.loader import Stream
from prepretrain.data.shards import tar_index
from prepretrain.distributed import checkpoint
from prepretrain.distributed.metadata import Reader
from prepretrain.models.load import load
from prepretrain.reports.reconstructions import reconstruct
from prepretrain.reports.tables import rows
from prepretrain.runs import launch as launcher
from prepretrain.runs.export import export, export_released
from prepretrain.runs.launch import launch
from prepretrain.runs.results import add, read


class Bomb:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch exploded",)


MODULE = "import pathlib\npathlib.Path('exploded').touch()\n"


@pytest.fixture(autouse=True)
def unharmed(tmp_path, monkeypatch):
    """No test sets off what it carries."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    assert not list(tmp_path.rglob("exploded")), "what a file names was run"


def describe(saved: Path) -> None:
    """A manifest that fits, which whoever sends a checkpoint writes."""
    names = [p.name for p in saved.iterdir() if p.name != checkpoint.MANIFEST]
    content = {name: checkpoint.describe(saved / name) for name in names}
    (saved / checkpoint.MANIFEST).write_text(json.dumps(content))


def bomb(folder: Path, step: int = 4, **more: object) -> Path:
    """A checkpoint whose metadata is a bomb."""
    saved = folder / "checkpoints" / f"{step:09d}"
    saved.mkdir(parents=True)
    (saved / checkpoint.METADATA).write_bytes(pickle.dumps(Bomb()))
    state = {"format": 2, "step": step, "options": {"encoder": "vit_test8"}, "bad": {}, **more}
    (saved / checkpoint.STATE).write_text(json.dumps(state))
    describe(saved)
    return saved


# --- checkpoints ---


STEPS = ["optim.schedule=step", "optim.milestones=[66.7%]", "branches=[6it]", "length=12it"]
FEATURE_MAE = ["objective={name: feature_mae, teacher: evil, decoder_depth: 1, decoder_width: 32}"]
WAYS = {
    "load": lambda: load("evil"),
    "its encoder": lambda: load("evil:encoder"),
    "export": lambda: export("evil", Path("out")),
    "export --released": lambda: export_released(Path("evil"), Path("out")),
    "report": lambda: reconstruct(["evil"], "colours", 2, "out.png"),
    "--init --dry-run": lambda: launch("small.yaml", [], init="evil", dry_run=True),
    "--init": lambda: launch("small.yaml", [], init="evil"),
    "resume": lambda: launch("small.yaml", STEPS, out="evil"),
    "a teacher": lambda: launch("small.yaml", FEATURE_MAE),
    "an evaluation": lambda: launch("eval/knn", ["data=colours"], init="evil"),
    "a suite": lambda: launch("suite.yaml", [], init="evil"),
    "--branch": lambda: launch("small.yaml", [*STEPS, "length=6it"], branch="evil"),
    "--replay": lambda: launcher.look_again("evil/dumps/000000005", 1),
}


@pytest.fixture
def evil(place):
    """A run's folder as it could be downloaded, with a bomb in each checkpoint."""
    folder = Path("evil")
    stream = Stream(load_card("colours").open("train"), None, batch_size=16, seed=0)
    saved = bomb(folder, data=stream.fingerprint())
    bomb(folder / "dumps" / "000000005")
    dump = {"step": 5, "world": 1, "seed": 0, "position": 64, "processes": [{"batches": []}]}
    (folder / "dumps" / "000000005" / "dump.json").write_text(json.dumps(dump))
    config.write(config.plain(config.load("small.yaml", STEPS)), folder / "config.yaml")
    Path("suite.yaml").write_text("suite: [{stage: eval/knn, data: colours}]\n")
    return saved


@pytest.mark.parametrize("way", WAYS)
def test_no_way_to_a_checkpoint_runs_what_it_names(evil, way):
    with pytest.raises(Exception, match="names (posix|nt).system"):
        WAYS[way]()


def test_a_status_of_a_downloaded_run_runs_nothing(evil):
    assert "newest checkpoint: evil" in launcher.status("evil")


def tiny() -> tuple[nn.Module, torch.optim.Optimizer]:
    """A module with an optimizer that has a state."""
    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return module, optimizer


@pytest.fixture
def saved(group, tmp_path, monkeypatch) -> Path:
    """A good checkpoint, in the current directory."""
    monkeypatch.chdir(tmp_path)
    return checkpoint.save(tmp_path / "run", 3, *tiny(), {"step": 3, "options": {}}, keep=2)


def test_a_checkpoint_is_restored_to_the_bit_without_unpickling(saved):
    module, optimizer = tiny()
    optimizer.param_groups[0]["lr"] = 7.0
    for parameter in module.parameters():
        parameter.data.zero_()
    assert checkpoint.restore(saved, module, optimizer)["step"] == 3
    assert optimizer.param_groups[0]["lr"] == 1e-3
    shapes, read_one, _ = checkpoint.open_tensors(saved)
    assert all(torch.equal(read_one(n), p) and p.any() for n, p in module.named_parameters())
    assert shapes["0.weight"] == (2, 3)


def test_a_value_beside_the_tensors_is_not_unpickled(group, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module, optimizer = tiny()
    optimizer.param_groups[0]["lr"] = Bomb()
    saved = checkpoint.save(tmp_path / "run", 3, module, optimizer, {"step": 3}, keep=2)
    assert checkpoint.newest(tmp_path / "run") == saved
    with pytest.raises(ValueError, match="cannot be loaded: .*[Ww]eights"):
        checkpoint.restore(saved, *tiny())


CLASS = b"ctorch.distributed.checkpoint.metadata\nMetadata\n"


@pytest.mark.parametrize(
    "content, message",
    [
        (b"cos\nsystem\n(S'touch exploded'\ntR.", "names os.system"),
        (b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x011\x85R.", "names builtins.eval"),
        (
            b"\x80\x04\x8c\x05torch\x8c\x15serialization.os.fork\x93)R.",
            "names torch.serialization.os",
        ),
        (CLASS + b"N}X\x05\x00\x00\x00storeK\x01s\x86b.", "changes <class"),
        (b"ctorch\nSize\n.", "holds a type"),
        (CLASS + b")R.", "missing|no attribute|holds"),
        (b"", "EOF|Ran out"),
        (b"N.", "holds a NoneType"),
        (b"(" * 100_000, "is not the metadata"),
    ],
)
def test_metadata_is_read_with_an_allow_list(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / checkpoint.METADATA).write_bytes(content)
    with pytest.raises(
        ValueError, match=f"(?s){checkpoint.METADATA}.*({message}).*Nothing of it was run"
    ):
        Reader(str(tmp_path)).read_metadata()


def test_metadata_takes_nothing_from_outside_of_its_folder(saved, tmp_path):
    content = (saved / checkpoint.METADATA).read_bytes()
    (saved / checkpoint.METADATA).write_bytes(content.replace(b"__0_0.distcp", b"../../secret"))
    with pytest.raises(ValueError, match="takes values from '../../secret'"):
        checkpoint.open_tensors(saved)
    Path("secret").write_text("secret")
    (saved / checkpoint.MANIFEST).write_text(
        json.dumps({checkpoint.STATE: {}, checkpoint.METADATA: {}, "../../../secret": {}})
    )
    assert "'../../../secret' is no file of the checkpoint" in checkpoint.damage(saved)


def test_metadata_that_was_mutated_is_read_or_refused_by_name(saved):
    path, draws = saved / checkpoint.METADATA, random.Random(0)
    whole = path.read_bytes()
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(draws.choice([1, 1, 2, 8])):
            content[draws.randrange(len(content))] = draws.randrange(256)
        path.write_bytes(content[: draws.choice([len(content), draws.randrange(len(content))])])
        try:
            checkpoint.open_tensors(saved)
        except ValueError as error:
            assert str(path) in str(error)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("manifest.json", "[" * 100_000, "manifest.json"),
        ("manifest.json", "[1]", "holds \\[1\\] and no dict"),
        ("manifest.json", '{"state.json": 1, ".metadata": null}', "should have None"),
        ("state.json", "{}", "is of step None"),
        ("state.json", "[]", "cannot be read.*no dict"),
        ("state.json", '{"format": "new"}', "is of step None"),
    ],
)
def test_a_damaged_checkpoint_is_described_whatever_it_holds(saved, name, content, message):
    (saved / name).write_text(content)
    if name == checkpoint.STATE:
        describe(saved)
    assert any(re.search(message, one) for one in checkpoint.damage(saved))
    assert checkpoint.newest(saved.parents[1]) is None


def test_only_the_allow_list_unpickles():
    package = Path(checkpoint.__file__).parents[1]
    for word in (
        "pickle.load",
        "weights_only=False",
        "allow_pickle=True",
        "yaml.unsafe",
        "yaml.full",
    ):
        assert [p.name for p in package.rglob("*.py") if word in p.read_text()] == []


# --- modules ---


@pytest.fixture
def module(place) -> str:
    """A module that lies in the data, and tells when it is imported."""
    Path("data/trap").mkdir(parents=True)
    Path("data/trap/evil.py").write_text(MODULE)
    return "data.trap.evil"


def test_a_card_names_no_module(module):
    Path("card.yaml").write_text(f"train: {{source: {module}, path: photos}}\n")
    with pytest.raises(
        ValueError, match="card.yaml: train: names the module.*PREPRETRAIN_PLUGINS=data"
    ):
        load_card("card.yaml").open("train")


@pytest.mark.parametrize("options", [{"encoder": 1}, {"encoder": "vit_test8", "head": {"name": 1}}])
def test_weights_name_no_module(module, options):
    text = json.dumps(options).replace("1", json.dumps(module))
    Path("x").mkdir()
    (Path("x") / "model.json").write_text(f'{{"options": {text}}}')
    save_file({"cls_token": torch.zeros(1)}, "x/model.safetensors")
    for act in (partial(load, "x"), partial(launch, "small.yaml", [], init="x", dry_run=True)):
        with pytest.raises(ValueError, match="names the module 'data.trap.evil'"):
            act()


def test_a_tokenizers_folder_runs_no_code_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("transformers")
    import open_clip

    from prepretrain.models.text.open_clip import OpenClipTokenizer

    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers asks, where it may
    Path("own").mkdir()
    tokenizer = {"auto_map": {"AutoTokenizer": [None, "evil.Evil"]}, "tokenizer_class": "Evil"}
    Path("own/tokenizer_config.json").write_text(json.dumps(tokenizer))
    Path("own/config.json").write_text(
        '{"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}'
    )
    Path("own/evil.py").write_text(MODULE)
    given = open_clip.get_model_config("ViT-B-16-SigLIP")["text_cfg"]
    with pytest.raises(ValueError, match="model.text.tokenizer: 'own'"):
        OpenClipTokenizer("ViT-B-16-SigLIP", given, 64, "own")


@pytest.mark.parametrize("architecture", ["hf_hub:some/model", "local-dir:data"])
def test_weights_name_no_architecture_elsewhere(place, architecture):
    with pytest.raises(ValueError, match="is no model of timm's own"):
        prepretrain.Model(encoder="timm", architecture=architecture)


@pytest.mark.parametrize("key", ["objective.name", "optim.name", "model.encoder"])
def test_the_config_of_a_downloaded_run_names_no_module(module, key):
    values = config.plain(config.load("small.yaml", []))
    section, name = key.split(".")
    values[section][name] = module
    Path("evil").mkdir()
    config.write(values, Path("evil/config.yaml"))
    with pytest.raises(ValueError, match="evil/config.yaml: names the module 'data.trap.evil'"):
        reconstruct(["evil"], "colours", 2, "out.png")
    with pytest.raises(ValueError, match="evil/config.yaml: names the module"):
        launch("small.yaml", [], out="evil")
    assert "newest checkpoint" in launcher.status("evil")


def test_a_table_imports_no_evaluator_that_results_name(module):
    Path("evil").mkdir()
    Path("evil/results.json").write_text(json.dumps({f"{module}/colours": {"top1": 1.0}}))
    with pytest.raises(ValueError, match="names the module"):
        rows(["evil"])


def test_a_trusted_module_may_be_named_by_files(place, monkeypatch):
    Path("my_lab").mkdir()
    Path("my_lab/photos.py").write_text(
        "from prepretrain.data.sources.folder import Folder\nclass Photos(Folder):\n    pass\n"
        "    def __init__(self, *, path: str):\n        super().__init__(path=path)\n"
    )
    Path("card.yaml").write_text("train: {source: my_lab.photos, path: photos}\n")
    with pytest.raises(ValueError, match="set PREPRETRAIN_PLUGINS=my_lab"):
        load_card("card.yaml")
    monkeypatch.setenv(plugin.TRUSTED, "other, my_lab")
    assert len(load_card("card.yaml").open("train")) == 60
    monkeypatch.delenv(plugin.TRUSTED)
    assert len(load_card("card.yaml").open("train")) == 60  # the user has imported it by now
    for name in [n for n in sys.modules if n.startswith("my_lab")]:
        del sys.modules[name]


@pytest.mark.parametrize("name", [".", "..", "a..b", "a b.c", "os.", ".os"])
def test_what_is_no_name_of_a_module_is_refused(name):
    with pytest.raises(ValueError, match="objectives: no module '"):
        plugin.find("objectives", name)


# --- anything at all ---


SEEDS = {
    "card": b"description: x\nclasses: &c [cat, dog]\ntrain: {source: folder, path: x, classes: *c}\n",
    "json": b'{"knn/a": {"top1": 1.5, "images": [1, 2, null]}, "b": "\\u00e9"}',
    "config": b"objective: {name: mae}\ndata: {train: x}\noptim: {lr: 1e-3}\nbatch_size: 4\nlength: 1ep\n",
}


def mutated(content: bytes, draws: random.Random) -> bytes:
    """Bytes changed, cut, doubled or put elsewhere."""
    content = bytearray(content)
    for _ in range(draws.choice([1, 1, 2, 5, 20])):
        at, length = draws.randrange(len(content)), draws.randrange(1, 30)
        part = content[at : at + length]
        change = draws.choice(["flip", "flip", "cut", "double", "move", "sign"])
        if change == "flip":
            content[at] = draws.randrange(256)
        elif change == "sign":
            content[at : at + 1] = draws.choice(
                [b"-", b"[", b"{", b"&a ", b"*a", b"\0", b"\n", b"9" * 20]
            )
        elif change == "double":
            content[at:at] = part
        elif len(content) > 2 * length:
            del content[at : at + length]
            if change == "move":
                to = draws.randrange(len(content))
                content[to:to] = part
    return bytes(content)


@pytest.mark.parametrize("count", [100, pytest.param(4000, marks=pytest.mark.faults)])
@pytest.mark.parametrize("kind", ["card", "json", "config", "tar", "index", "metadata"])
def test_whatever_a_file_holds_it_is_read_or_refused_by_name(
    kind, count, group, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    names = {"tar": "x.tar", "index": "x.tar.index", "metadata": checkpoint.METADATA}
    path = Path(names.get(kind, "x.yaml"))
    if kind in ("tar", "index"):
        with tarfile.open("x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
            for name in ("a.jpg", "a.json", "ü" * 120 + ".jpg", "b.cls"):
                tar.addfile(tarfile.TarInfo(name))
        tar_index.Index(Path("x.tar"))
    if kind == "metadata":
        path = checkpoint.save(tmp_path / "run", 3, *tiny(), {"step": 3}, keep=1) / path
    ways = {
        "card": lambda: load_card(str(path)).open("train"),
        "json": lambda: files.read_json(path),
        "config": lambda: config.load(str(path), []),
        "tar": lambda: tar_index.walk(path),
        "index": lambda: tar_index.Index(Path("x.tar")).key(0) == "a" or pytest.fail("another key"),
        "metadata": lambda: Reader(str(path.parent)).read_metadata(),
    }
    draws, whole = random.Random(count), SEEDS[kind] if kind in SEEDS else path.read_bytes()
    for number in range(count):
        path.write_bytes(mutated(whole, draws))
        os.utime(path, ns=(number, number))
        try:
            ways[kind]()
        except ValueError as error:
            assert kind == "config" or str(path) in str(error)


# --- SLURM ---


INJECTION = "x\ntouch exploded\n: "


@pytest.mark.parametrize("key", ["account", "qos", "constraint", "memory", "extra", "--out"])
@pytest.mark.parametrize("text", [INJECTION, "x\x0btouch exploded", "x\u2028y", "x\0"])
def test_no_text_becomes_a_line_of_the_batch_script(key, text):
    given = {"hours": 1.0, "requeues": 0, "extra": ()}
    given |= {"extra": (f"--{text}",)} if key == "extra" else {}
    given |= {key: text} if key not in ("extra", "--out") else {}
    folder = Path(text if key == "--out" else "runs/a")
    with pytest.raises(ValueError, match=f"^(slurm.)?{key}: "):
        slurm.check("gpu", folder, **given)


@pytest.mark.parametrize(
    "value", ["lab-a_1", "a100|h100", "[rack1*2&rack2*1]", "500GB", "user@lab"]
)
def test_what_slurm_takes_is_let_through(value):
    assert slurm._PLAIN.fullmatch(value)


# --- files ---


def test_a_draft_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(RuntimeError):
        with files.draft(path) as place:
            place.write_text("half")
            raise RuntimeError
    assert files.read_json(path) == {"a": 1} and [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_draft_does_not_follow_a_link(tmp_path, monkeypatch):
    (tmp_path / "victim").write_text("mine")
    monkeypatch.setattr(files.os, "urandom", lambda n: b"\0" * n)
    (tmp_path / f".x.{'00' * 8}").symlink_to(tmp_path / "victim")
    with pytest.raises(FileExistsError):
        files.write_json(tmp_path / "x", {})
    assert (tmp_path / "victim").read_text() == "mine"


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff", b"[" * 100_000, b"[1]", b"null", b'{"a": 1']
)
def test_json_that_is_damaged_is_refused_by_name(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match="x.json: is damaged"):
        files.read_json(tmp_path / "x.json")


@pytest.mark.parametrize(
    "content", ["null", "[]", '{"knn/a": null}', '{"knn/a": {"top1": "x"}}', "{"]
)
def test_damaged_results_are_refused_by_name(group, tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    for act in (
        partial(read, tmp_path),
        partial(add, tmp_path, {"a": 1}),
        partial(rows, [tmp_path]),
    ):
        with pytest.raises(ValueError, match="results.json: is damaged"):
            act()
    assert (tmp_path / "results.json").read_text() == content
    (tmp_path / "results.json").write_text('{"knn/a": {"other": 1}}')
    with pytest.raises(ValueError, match="results.json: knn/a: lacks its metric top1"):
        rows([tmp_path])


@pytest.mark.parametrize("content", ['{"knn/a": null}', "[]", '{"knn/a": [1]}'])
def test_damaged_evaluations_are_refused_by_name(group, tmp_path, content):
    (tmp_path / "evaluations.json").write_text(content)
    with pytest.raises(ValueError, match="evaluations.json: is damaged"):
        read(tmp_path)
