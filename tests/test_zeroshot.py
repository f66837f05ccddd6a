"""Zero-shot classification and retrieval: against open_clip, closed forms, and bad names."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import command, processes
from PIL import Image
from test_captions import MODEL
from test_features import tiny_model
from test_text import BPE, small

from prepretrain.data.card import load_card
from prepretrain.distributed import group as distributed
from prepretrain.distributed import shard
from prepretrain.evaluation.evaluators.base import per_class
from prepretrain.evaluation.evaluators.retrieval import Retrieval, recalls
from prepretrain.evaluation.evaluators.zeroshot import Zeroshot, classifier, probabilities
from prepretrain.evaluation.features import extract, extract_texts
from prepretrain.models.export import save
from prepretrain.models.model import Model
from prepretrain.runs.classify import classify
from prepretrain.runs.launch import launch

ROOT = Path(__file__).parents[1]
SPLITS = """
train: {source: synthetic, images: 20, size: 32, seed: 0}
val: {source: synthetic, images: 37, size: 32, seed: 1}
"""


def card(folder: Path, text: str = "") -> str:
    """A card of made scenes with `text` added."""
    path = folder / "scenes.yaml"
    path.write_text(text + SPLITS)
    return str(path)


def noisy() -> Model:
    """A small model with a text tower, whose features differ from image to image."""
    return tiny_model(text=BPE, joint={"width": 16}).eval()


def test_zero_shot_is_open_clips_on_the_same_model_and_images(tmp_path):
    model = noisy()
    save(model, tmp_path / "export", "test")
    place = f"local-dir:{tmp_path / 'export' / 'open_clip'}"
    peer = open_clip.create_model(place).eval()
    evaluator = Zeroshot(data=card(tmp_path))
    source = evaluator.card.open("val")
    names = [row[0] for row in evaluator.class_names(source)]
    weight = open_clip.build_zero_shot_classifier(
        peer, open_clip.get_tokenizer(place), names, open_clip.OPENAI_IMAGENET_TEMPLATES
    )
    ours, cut = classifier(model, [[n] for n in names], evaluator.prompts())
    assert_close = torch.testing.assert_close
    assert_close(ours.T, weight, rtol=1e-4, atol=1e-5)
    _, labels = extract(model, source, pool="joint", share=1.0)
    from prepretrain.data.transforms import decode, resize_center_crop

    pictures = torch.stack(
        [resize_center_crop(decode(source[i]["image"]), 32, share=1.0) for i in range(len(source))]
    )
    with torch.no_grad():
        scores = peer.encode_image(model.normalise(pictures), normalize=True) @ weight
    want = 100 * (scores.argmax(1) == labels).double().mean().item()
    got = evaluator.run(model, tmp_path)
    assert got["top1"] == pytest.approx(want) and got["images"] == 37 and cut == 0
    top5 = (scores.topk(5).indices == labels[:, None]).any(1).double().mean().item()
    assert got["top5"] == pytest.approx(100 * top5)


def _measured(rank: int, folder: str) -> None:
    distributed.init()
    model = noisy()
    state = model.state_dict()
    with torch.device("meta"):
        sharded = Model(**model.options)
    shard.shard(sharded, precision="fp32")
    for name, target in sharded.state_dict(keep_vars=True).items():
        distributed.put(target, state[name])
    found = [
        kind(data=f"{folder}/scenes.yaml", feature_batch=8).run(sharded, Path(folder))
        for kind in (Zeroshot, Retrieval)
    ]
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    distributed.shutdown()


def test_two_processes_with_a_sharded_model_measure_what_one_does(tmp_path):
    data = card(tmp_path, "templates: ['a {}.', '{} in a scene']\n")
    want = [
        kind(data=data, feature_batch=8).run(noisy(), tmp_path) for kind in (Zeroshot, Retrieval)
    ]
    processes(2, _measured, str(tmp_path))
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        for got, expected in zip(found, want):
            assert got == pytest.approx(expected, abs=3)
            assert got["images"] == 37


def test_text_features_are_in_the_order_of_the_texts_whatever_the_batch():
    model, texts = noisy(), [f"{n} bees" for n in range(11)]
    want = extract_texts(model, texts)[0]
    assert want.shape == (11, 16)
    for size in (1, 4, 100):
        torch.testing.assert_close(extract_texts(model, texts, batch_size=size)[0], want)
    assert extract_texts(model, ["dog " * 2500, "a bee"])[1] == 1
    with pytest.raises(ValueError, match="text 1: ' ' is empty"):
        extract_texts(model, ["a", " "])


def test_the_mean_per_class_counts_classes_and_not_images():
    scores = torch.eye(3)[torch.tensor([0, 0, 0, 1])]
    found = per_class(scores, torch.tensor([0, 0, 0, 2]))
    assert found["top1"] == 75 and found["mean_per_class"] == 50


def test_a_classs_synonyms_and_all_templates_are_averaged(tmp_path):
    model = noisy()
    weight, _ = classifier(model, [["bee", "honeybee"], ["frog"]], ["a {}.", "{}"])
    texts = ["a bee.", "bee", "a honeybee.", "honeybee"]
    want = F.normalize(extract_texts(model, texts)[0].mean(0), dim=0)
    torch.testing.assert_close(weight[0], want)


NAMES = "[balle, boite, tente, etoile, croix, coeur, anneau, lune, fleche, feuille]"


def test_a_card_gives_names_and_templates_in_several_languages(tmp_path):
    text = f"templates: {{en: ['a {{}}.'], fr: ['un {{}}.']}}\nnames: {{fr: {NAMES}}}\n"
    data = card(tmp_path, text)
    french = Zeroshot(data=data, language="fr")
    source = french.card.open("val")
    assert french.class_names(source)[5] == ["coeur"] and french.prompts() == ["un {}."]
    english = Zeroshot(data=data)
    assert english.class_names(source)[5] == ["heart"] and english.prompts() == ["a {}."]
    assert Zeroshot(data=data, templates="none").prompts() == ["{}"]
    assert len(Zeroshot(data=data, templates="simple").prompts()) == 7
    assert len(Zeroshot(data=data, names="imagenet").class_names(source)) == 1000
    assert french.run(noisy(), tmp_path)["images"] == 37
    with pytest.raises(ValueError, match="zeroshot.language: 'de' .*en, fr"):
        Zeroshot(data=data, language="de")
    only = Zeroshot(data=card(tmp_path, "templates: {fr: ['un {}.']}\n"), language="fr")
    with pytest.raises(ValueError, match="has no names in 'fr' to classify by"):
        only.class_names(source)


@pytest.mark.parametrize(
    "text, said",
    [
        ("names: [a, '']", "names: class 1 has the name '', which is empty"),
        ("names: [a, []]", "names: class 1 has the name ''"),
        ("names: [a, [b, A]]", "names: classes 0 and 1 are both called 'A', so no text"),
        ("names: []", "names: there are no names"),
        ("names: {fr: a}", "names.fr: 'a' is not a list"),
        ("classes: [a, b]\nnames: [x]", "names: holds 1 names, and there are 2 classes"),
        ("templates: ['a photo']", "templates: 'a photo' must hold {} once"),
        ("templates: {en: []}", r"templates.en: \[\] is not a list"),
    ],
)
def test_names_and_templates_that_cannot_work_are_refused_by_file_and_key(tmp_path, text, said):
    with pytest.raises(ValueError, match=f"scenes.yaml: {said}"):
        load_card(card(tmp_path, text + "\n"))


def test_labels_without_names_are_refused(tmp_path):
    few = tmp_path / "few.yaml"
    few.write_text("names: [a, b]" + SPLITS)
    with pytest.raises(ValueError, match="names 2 classes, and the labels .* go to 9"):
        Zeroshot(data=str(few)).run(noisy(), tmp_path)
    blank = tmp_path / "blank.yaml"
    blank.write_text("classes: ['a', ' ']" + SPLITS)
    with pytest.raises(ValueError, match="blank.yaml: classes: class 1 has the name ' '"):
        evaluator = Zeroshot(data=str(blank))
        evaluator.class_names(evaluator.card)


def test_a_model_without_a_text_tower_is_told_which_stage_makes_one(place, tmp_path):
    run_ = small(BPE)
    save(tiny_model(), tmp_path / "mae", "test")
    save(run_, tmp_path / "clip", "test")
    for stage in ("eval/zeroshot", "eval/retrieval"):
        with pytest.raises(ValueError, match="no text tower.*--stage wsp_clip or --stage wsp_lit"):
            launch(stage, ["data=scenes"], init=str(tmp_path / "mae"), dry_run=True)
        with pytest.raises(ValueError, match="no text tower.*--stage wsp_clip"):
            launch(stage, ["data=scenes"], init=str(tmp_path / "mae"))
    due = "evaluators=[{name: zeroshot, data: scenes, every: 50%}]"
    with pytest.raises(ValueError, match="zeroshot/scenes: this model has no text tower"):
        launch("small.yaml", [due], dry_run=True)


def test_zero_shot_and_retrieval_are_measured_during_a_run_and_after_it(place):
    due = (
        "evaluators=[{name: zeroshot, data: scenes, every: 100%, split: train, templates: simple}, "
        "{name: retrieval, data: scenes, every: 100%, split: train}]"
    )
    stage = ["objective={name: clip}", "data.train=scenes", MODEL, "length=2it", "optim.warmup=0it"]
    launch("small.yaml", [*stage, due], out="runs/clip")
    during = json.loads(Path("runs/clip/results.json").read_text())
    assert during["zeroshot/scenes"]["images"] == during["retrieval/scenes"]["captions"] == 120
    options = ["data=scenes", "evaluator.split=train"]
    launch(
        "eval/zeroshot", [*options, "evaluator.templates=simple"], init="runs/clip", out="runs/e"
    )
    after = json.loads(Path("runs/e/results.json").read_text())
    assert after["zeroshot/scenes"] == pytest.approx(during["zeroshot/scenes"], abs=1)


def test_retrieval_counts_each_way_with_several_captions_an_image():
    image = torch.eye(4)
    text = torch.eye(4)[[0, 1, 1, 0, 3, 2]]  # captions 3 and 4 lie by another image than theirs
    owner = torch.tensor([0, 0, 1, 2, 2, 3])
    found = recalls(image, text, owner)
    assert found["image_to_text_r1"] == 0  # each has an equal rival, or is not near at all
    assert found["text_to_image_r1"] == pytest.approx(100 * 2 / 6)
    assert found["image_to_text_r10"] == found["text_to_image_r5"] == 100
    perfect = recalls(image, torch.eye(4), torch.arange(4))
    assert perfect["mean_recall"] == 100


def test_a_collapsed_model_retrieves_nothing():
    same = torch.ones(20, 3)
    assert recalls(same, same, torch.arange(20))["mean_recall"] == 0


def test_recalls_are_those_of_sorted_ranks():
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(n, 6, generator=generator) for n in (300, 700))
    owner = torch.cat([torch.arange(300), torch.randint(0, 300, (400,), generator=generator)])
    found, scores = recalls(image, text, owner), image @ text.T
    for k in (1, 5, 10):
        near = owner[scores.topk(k, dim=1).indices] == torch.arange(300)[:, None]
        assert found[f"image_to_text_r{k}"] == pytest.approx(100 * near.any(1).double().mean())
        near = scores.T.topk(k, dim=1).indices == owner[:, None]
        assert found[f"text_to_image_r{k}"] == pytest.approx(100 * near.any(1).double().mean())


def test_an_image_without_a_caption_stops_a_retrieval(tmp_path):
    class Silent:
        fields = ("image", "text")

        def __len__(self):
            return 2

        def texts(self, index):
            return {"text": "a bee" if index == 0 else " "}

    evaluator = Retrieval(data=card(tmp_path))
    with pytest.raises(ValueError, match="scenes:val: image 1 has no caption"):
        evaluator.read(Silent(), "scenes:val")


def test_a_person_can_ask_for_probabilities(tmp_path):
    model = noisy()
    save(model, tmp_path / "clip", "test")
    for number, colour in enumerate(((200, 0, 0), (0, 0, 200))):
        Image.new("RGB", (50, 40), colour).save(tmp_path / f"{number}.png")
    images = [str(tmp_path / f"{n}.png") for n in range(2)]
    given = ["classify.py", *images, "--model", str(tmp_path / "clip"), "--names"]
    done = command(*given, "a cat, a dog")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines[0] == images[0] and lines[3] == images[1], done.stderr
    shares = {line[11:]: float(line.split("%")[0]) for line in lines[1:3]}
    assert set(shares) == {"a cat", "a dog"} and sum(shares.values()) == pytest.approx(100, abs=0.2)
    done = command(*given, "cat,,dog")
    assert done.returncode == 1 and "--names: class 1 has the name ''" in done.stderr
    for names, said in ((["cat", "CAT"], "both called 'CAT'"), (["a", " "], "is empty")):
        with pytest.raises(ValueError, match=said):
            classify(str(tmp_path / "clip"), [Path(images[0])], names, ["{}"])
    with pytest.raises(ValueError, match="none.png"):
        classify(str(tmp_path / "clip"), [tmp_path / "none.png"], ["a", "b"], ["{}"])
    with pytest.raises(ValueError, match="has no text tower"):
        probabilities(tiny_model(), torch.zeros(1, 3, 32, 32, dtype=torch.uint8), ["a"], ["{}"])


def test_a_sigmoid_models_probabilities_stand_alone():
    model = small(BPE, bias=True)
    found = probabilities(
        model, torch.zeros(1, 3, 32, 32, dtype=torch.uint8), ["a bee", "a frog"], ["{}"]
    )
    assert found.shape == (1, 2) and (found < 0.01).all()  # its bias starts at -10
