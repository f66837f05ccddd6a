"""What a user can get wrong when starting a stage, and what a dry run says."""

import json
import os
import re
import shutil
import struct
import sys
from pathlib import Path

import pytest
import torch
from conftest import command, processes
from safetensors.torch import load_file, save_file
from test_text import BPE
from torch.distributed import run as torchrun

from prepretrain import config, plugin
from prepretrain.data.card import load_card
from prepretrain.data.tags.vocabulary import Vocabulary
from prepretrain.distributed import checkpoint, shard
from prepretrain.distributed import group as distributed
from prepretrain.models.export import save
from prepretrain.models.load import load
from prepretrain.models.model import Model
from prepretrain.runs import plan, run
from prepretrain.runs.launch import launch
from prepretrain.training import log

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(
    str(p.relative_to(ROOT / "configs").with_suffix("")) for p in (ROOT / "configs").rglob("*.yaml")
)
SIZES = [name.removeprefix("size/") for name in CONFIGS if name.startswith("size/")]
WITH_TEXT = ("eval/retrieval", "eval/zeroshot")
EVALUATIONS = [name for name in CONFIGS if name.startswith("eval/")]
STAGES = [name for name in CONFIGS if not name.startswith(("size/", "eval/", "curate/"))]


def facts(capsys, stage: str, *overrides: str, **flags) -> dict:
    """The last line of a dry run."""
    launch(stage, list(overrides), dry_run=True, **flags)
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize(
    "wrong, said",
    [
        (["objective.name=mea"], "no objective 'mea'. Did you mean 'mae'? There are: "),
        (
            ["objective.mask_ration=0.5"],
            "objective.mask_ration: unknown option. Did you mean objective.mask_ratio?",
        ),
        (["optim.lrr=1"], "optim.lrr: unknown key. Did you mean optim.lr?"),
        (["batchsize=4"], "batchsize: unknown key. Did you mean batch_size?"),
        (["batch_size=many"], "batch_size: 'many' is not of type int"),
        (["optim.betas=[0.9]"], "must have 2 values"),
        (["objective.mask_ratio=high"], "objective.mask_ratio: 'high' is not of type float"),
        (["objective.mask_ratio=1.0"], "objective.mask_ratio: 1.0 must lie in"),
        (["objective.mask_ratio=0.99"], "objective.mask_ratio: 0.99 keeps 0 of 16 patches"),
        (["model.encoder=vit_test9"], "no encoder 'vit_test9'. Did you mean 'vit_test8'?"),
        (["model.image_size=30"], "model.image_size: 30 is no multiple"),
        (["model.imagesize=32"], "model.imagesize: unknown option. Did you mean model.image_size?"),
        (["length=ten"], "length: 'ten' is no duration"),
        (["length=50%"], "length: '50%' is a share of the run"),
        (["optim.warmup=100%"], "optim.warmup: 12 steps leave nothing"),
        (["optim.schedule=cosin"], "no schedule 'cosin'. Did you mean 'cosine'?"),
        (["data.train=colour"], "no card 'colour'. Did you mean 'colours'?"),
        (["data.train=colours:test"], "no split 'test'"),
        (["--lr"], "an override is key=value"),
        (["base=size/vit_b17.yaml"], "base: there is no size/vit_b17.yaml"),
        (
            ["evaluators=[{name: liner, data: colours, every: 50%}]"],
            "no evaluator 'liner'. Did you mean 'linear'?",
        ),
    ],
)
def test_a_mistake_names_the_key_the_value_and_the_way_out(place, wrong, said):
    with pytest.raises(ValueError, match=said.replace("?", "[?]")):
        launch("small.yaml", wrong, dry_run=True)
    assert not Path("runs").exists()


def test_a_misspelt_stage_offers_the_nearest_one():
    with pytest.raises(ValueError, match="no stage 'demo/mea'. Did you mean 'demo/mae'?"):
        launch("demo/mea", [], dry_run=True)


def test_an_error_ends_the_command_with_one_line_and_a_failing_status(place):
    done = command("launch.py", "--stage", "small.yaml", "objective.name=mea")
    assert (
        done.returncode == 1
        and done.stderr.startswith("launch: no objective 'mea'")
        and "Traceback" not in done.stderr
    )


def test_a_missing_data_folder_is_an_error_before_anything_starts(place):
    Path("data/photos").rename("data/elsewhere")
    with pytest.raises(ValueError, match="there is nothing at data/photos.*PREPRETRAIN_DATA"):
        launch("small.yaml", ["length=1ep"], dry_run=True)
    with pytest.raises(ValueError, match="there is nothing at data/photos"):
        launch("small.yaml", ["length=1ep"])
    assert not Path("runs/small/metrics.jsonl").exists()


def test_weights_and_biases_asked_for_and_not_installed_is_an_error_before_anything_starts(
    place, monkeypatch
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r'wandb: lab: .*pip install "prepretrain\[wandb\]"'):
        launch("small.yaml", ["wandb=lab"])
    assert not Path("runs/small/metrics.jsonl").exists()


def _cut_off(rank: int, step: int | None) -> None:
    """Trains until a step has been logged, and is gone; or to the end."""
    write = log.Metrics.write

    def leave(self, row: dict) -> None:
        write(self, row)
        if row["step"] == step:
            os._exit(1)

    log.Metrics.write = leave
    launch("small.yaml", ["wandb=lab"], out="runs/a")


def _logged(path: Path) -> list[int]:
    """The steps in a file of Weights & Biases: LevelDB's log format, after 7 bytes of its own."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, record, steps = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # the rest of a block
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or its last piece
            found = Record.FromString(record)
            if found.WhichOneof("record_type") == "history":
                steps.append(found.history.step.num)
            record = b""
    return steps


def test_weights_and_biases_has_every_step_once_in_one_run_after_a_kill(place, monkeypatch):
    pytest.importorskip("wandb")
    for key, value in {"MODE": "offline", "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{key}", value)
    with pytest.raises(RuntimeError):
        processes(1, _cut_off, 6)
    processes(1, _cut_off, None)
    found = sorted(Path("runs/a/wandb").glob("offline-run-*/*.wandb"))
    assert len(found) == 2 and len({path.name for path in found}) == 1
    assert _logged(found[-1]) == list(range(1, 13))


def test_a_section_whose_name_changes_starts_empty(place):
    merged = config.load("small.yaml", ["objective={name: classify, smoothing: 0.1}"])
    assert merged.objective == {"name": "classify", "smoothing": 0.1}


def test_files_named_as_base_come_first_and_overrides_last(place):
    Path("wide.yaml").write_text("base: small.yaml\noptim: {lr: 1e-4}\nbatch_size: 8\n")
    merged = config.load("wide.yaml", ["batch_size=4"])
    assert (merged.optim.lr, merged.optim.warmup, merged.batch_size) == (1e-4, "2it", 4)


@pytest.fixture
def no_data(tmp_path, monkeypatch) -> Path:
    """An empty data folder; the configs and cards are those that we ship."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PREPRETRAIN_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_that_we_ship_passes_a_dry_run_without_its_data(
    stage, no_data, capsys, tmp_path
):
    given = config.load(stage, [])
    vocabulary = given.objective.get("vocabulary")
    if (
        vocabulary is not None and given.objective.get("tags") is None
    ):  # its size is not known before
        (no_data / vocabulary).parent.mkdir(parents=True)
        made = Vocabulary(["cat", "dog"], [2, 1], source="nothing", images=3, min_count=1)
        made.save(no_data / vocabulary)
    overrides = [] if given.model.get("encoder") else ["model.encoder=vit_b16"]
    if load_card(given.data.train.partition(":")[0]).images["train"] is None:  # copies differ
        overrides += ["length=1000it", "optim.warmup=5%"]
    said = facts(capsys, stage, *overrides, out=str(tmp_path / "run"))
    assert said["stage"] == stage and said["steps"] > 0
    assert said["data"].startswith("not here, so not checked: "), said["data"]


@pytest.mark.parametrize("stage", EVALUATIONS)
def test_every_evaluation_that_we_ship_passes_a_dry_run(stage, no_data, capsys, tmp_path):
    text = {"text": BPE, "joint": {"width": 16}} if stage in WITH_TEXT else {}
    head = {"classes": 1000}
    if stage.startswith("eval/detection"):
        text = {"final_norm": False}
        head = {"name": "mask_rcnn", "classes": 80, "channels": 8, "hidden": 8}
    if stage.startswith("eval/segmentation"):
        head = {"name": "linear_segmentation", "classes": 19 if "corruptions" in stage else 150}
    if stage.startswith("eval/depth"):
        head = {"name": "linear_depth"}
    if stage == "eval/video":
        text, head = {"frames": 4}, {"classes": 400}
    model = Model(encoder="vit_test8", head=head, **text)
    shard.initialise(model, 0)
    save(model, tmp_path / "model", "made by the tests")
    said = facts(capsys, stage, init=str(tmp_path / "model"), out=str(tmp_path / "run"))
    entries = said.get("entries", [said])  # a suite has several
    assert said["stage"] == stage and len(entries) == (5 if stage == "eval/suite" else 1)


@pytest.mark.parametrize("size", SIZES)
def test_every_size_that_we_ship_is_the_encoder_of_its_name_in_a_stage(size):
    stage = "simmim" if size.startswith("swinv2") else "mae"
    plan_ = plan.Plan(config.load(stage, [f"base=size/{size}.yaml"]), 8)
    assert plan_.config.model["encoder"] == size


def test_a_dry_run_of_the_largest_model_counts_it_right(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    said = facts(capsys, "mae", "base=size/vit_6.5b14.yaml", procs=8)
    assert said["encoder"] == "vit_6.5b14" and said["encoder_parameters"] == 6_447_632_384
    # 32 blocks of width 4096 on 64 + 1 tokens, the embedding of 64 patches, and a decoder of 8 x
    # 512 on 257
    tokens, width, decoder = 65, 4096, 512
    encoder = 32 * (12 * width**2 * tokens + 2 * tokens**2 * width) + 64 * 588 * width
    decoding = (
        8 * (12 * decoder**2 * 257 + 2 * 257**2 * decoder)
        + tokens * width * decoder
        + 192 * 588 * decoder
    )
    assert said["flops_per_image"] == 2 * (encoder + decoding)
    assert said["images"] == said["steps"] * 4096 and said["steps"] == 1_220_704


def test_the_batch_is_divided_in_the_fewest_equal_parts():
    assert [plan.accumulation(4096, 8, most) for most in (None, 512, 256, 200)] == [1, 1, 2, 4]
    with pytest.raises(ValueError, match="batch_size: 100 does not divide among 8 processes"):
        plan.accumulation(100, 8, None)


@pytest.fixture
def trained(place) -> Path:
    """A run of the small stage."""
    distributed.init()
    Path("runs/mae").mkdir(parents=True)
    run.train(config.load("small.yaml", []), Path("runs/mae"))
    distributed.shutdown()
    return Path("runs/mae")


def test_weights_of_a_run_that_is_not_done_are_named_by_their_step(trained, caplog):
    shutil.rmtree(trained / "export")
    load("runs/mae")
    step = int(checkpoint.newest(trained).name)
    assert f"runs/mae: is not done: its weights are those of step {step}" in caplog.text


STAGE_TWO = ["objective={name: classify}", "model={positions: learned, head: {classes: 3}}"]


def test_init_names_every_key_that_does_not_fit(trained):
    def start(*overrides: str, init: str = "runs/mae") -> None:
        launch("small.yaml", [*STAGE_TWO, *overrides], init=init, dry_run=True, out="runs/new")

    start()
    with pytest.raises(
        ValueError,
        match="model.encoder: the config asks for vit_ti16, and runs/mae holds vit_test8",
    ):
        start("model.encoder=vit_ti16")
    with pytest.raises(
        ValueError,
        match=r"(?s)does not fit.*cls_token is \(1, 1, 32\) and must be \(1, 1, 64\)",
    ):
        start("model.width=64")
    with pytest.raises(ValueError, match="runs/mea: no such run or file"):
        start(init="runs/mea")
    with pytest.raises(ValueError, match="has no part 'text'. There are: encoder"):
        start(init="runs/mae:text")
    save_file({"cls_token": torch.zeros(1, 1, 32), "queue": torch.zeros(3)}, "other.safetensors")
    with pytest.raises(ValueError, match=r"(?s)left over queue.*missing pos_embed"):
        start("model.encoder=vit_test8", init="other.safetensors")
    torch.save({"model": {"cls_token": torch.zeros(1)}, "args": object()}, "pickled.pth")
    with pytest.raises(ValueError, match="cannot be read with weights_only"):
        start("model.encoder=vit_test8", init="pickled.pth")
    Path("cut.safetensors").write_bytes(Path("other.safetensors").read_bytes()[:60])
    with pytest.raises(ValueError, match="cut.safetensors: cannot be read as safetensors"):
        start("model.encoder=vit_test8", init="cut.safetensors")


def test_the_encoder_of_a_released_file_with_more_in_it_is_taken_by_name(trained):
    keys = load_file("runs/mae/export/model.safetensors")  # under MAE's own key names
    torch.save({"model": {**keys, "mask_token": torch.zeros(1, 1, 8)}}, "released.pth")
    with pytest.raises(ValueError, match="left over mask_token"):
        launch(
            "small.yaml", [*STAGE_TWO, "model.encoder=vit_test8"], init="released.pth", dry_run=True
        )
    launch(
        "small.yaml",
        [*STAGE_TWO, "model.encoder=vit_test8"],
        init="released.pth:encoder",
        dry_run=True,
    )


def test_an_evaluation_adds_its_numbers_to_the_run_it_evaluates(trained):
    launch("eval/linear", ["data=colours", "evaluator.protocol=lbfgs"], init="runs/mae")
    launch("eval/lowshot", ["data=colours", "evaluator.shots=[2]"], init="runs/mae/export")
    results = json.loads((trained / "results.json").read_text())
    assert results["linear/colours"]["images"] == 60 and "encoder_parameters" in results
    with pytest.raises(ValueError, match="--init: an evaluation needs the model"):
        launch("eval/linear", ["data=colours"])


def test_two_local_processes_are_started_and_followed_and_see_the_gpus_that_were_chosen(
    place, monkeypatch, capfd
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-7")
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(place), os.environ.get("PYTHONPATH", "")])
    )
    monkeypatch.syspath_prepend(place)
    Path("chosen").mkdir()
    Path("chosen/objective.py").write_text(
        "import os\n"
        "from pathlib import Path\n"
        "from prepretrain.objectives.mae import MAE\n"
        "class Chosen(MAE):\n"
        "    def prepare(self, shard):\n"
        "        seen = os.environ['CUDA_VISIBLE_DEVICES']\n"
        "        Path(f'gpus-{os.environ[\"LOCAL_RANK\"]}').write_text(seen)\n"
    )
    launch("small.yaml", ["length=4it", "objective.name=chosen.objective"], procs=2)
    assert "done. Its weights" in capfd.readouterr().out
    assert Path("runs/small/export/model.safetensors").exists()
    assert [Path(f"gpus-{rank}").read_text() for rank in (0, 1)] == ["5,GPU-7"] * 2


def test_torchruns_environment_is_used_as_it_is(place):
    given = ["--standalone", "--nproc-per-node", "2", str(ROOT / "tools/launch.py")]
    done = command(torchrun.__file__, *given, "--stage", "small.yaml", "length=4it")
    assert done.returncode == 0, done.stderr
    assert "2 processes" in Path("runs/small/log.txt").read_text()


@pytest.mark.parametrize(
    "line, said",
    [
        ("def no_weight_decays(self): return set()", "no_weight_decays: .*mean no_weight_decay[?]"),
        ("whole_batches = True", "whole_batches: .*mean whole_batch[?]"),
        ("precison = 'fp32'", "precison: .*mean precision[?]"),
    ],
)
def test_a_users_part_with_a_misspelt_name_is_refused_with_the_right_one(
    place, monkeypatch, line, said
):
    code = (
        f"from prepretrain.objectives.base import Objective\nclass Mine(Objective):\n    {line}\n"
    )
    Path("my_lab").mkdir()
    Path("my_lab/mine.py").write_text(code)
    monkeypatch.syspath_prepend(str(place))
    for name in ("my_lab", "my_lab.mine"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ValueError, match=said):
        plugin.find("objectives", "my_lab.mine")


@pytest.mark.parametrize(
    "wrong, said",
    [
        (["optim.name=adam"], "no optimizer 'adam'. Did you mean 'adamw'? There are: adamw, lamb,"),
        (["optim.beta=[0.9, 0.95]"], "optim.beta: unknown key. Did you mean optim.betas?"),
        (["optim.name=sgd", "optim.betas=[0.9, 0.95]"], "optim.betas: unknown key. "),
        (["optim.name=sgd", "optim.momentun=0.8"], "Did you mean optim.momentum?"),
        (["optim.name=lars", "optim.momentum=0"], "optim.name=lars: momentum 0.0 must be more"),
        (["optim.betas=[0.9, 1.5]"], "optim.betas[1]: 1.5 must lie in [0, 1)"),
    ],
)
def test_a_mistake_in_an_optimizers_options_is_named(place, wrong, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        launch("small.yaml", wrong, dry_run=True)


def test_the_options_of_an_optimizer_are_recorded_with_their_defaults(place):
    optim = config.plain(config.load("small.yaml", ["optim.name=sgd"]))["optim"]
    assert (optim["name"], optim["momentum"], optim["nesterov"]) == ("sgd", 0.9, False)
    assert "betas" not in optim and "options" not in optim
