"""Encoders, heads, objectives and exports, against closed forms and peers."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from test_text import BPE
from torch.testing import assert_close

from prepretrain import plugin
from prepretrain.data.card import open_data
from prepretrain.data.dense import boxes
from prepretrain.data.random import Random
from prepretrain.data.sources.base import Source
from prepretrain.data.sources.synthetic import Synthetic
from prepretrain.data.tags.vocabulary import Vocabulary
from prepretrain.data.transforms import decode, resize_center_crop
from prepretrain.distributed import shard
from prepretrain.losses.sparse import sparse_cross_entropy
from prepretrain.models import weights
from prepretrain.models.encoders import base as encoders
from prepretrain.models.encoders.vit import patchify, unpatchify
from prepretrain.models.export import save
from prepretrain.models.heads.mlp import TwoLayer
from prepretrain.models.load import load
from prepretrain.models.model import Model
from prepretrain.objectives.base import Objective
from prepretrain.objectives.classify import Classify
from prepretrain.objectives.hashtag import Hashtag
from prepretrain.objectives.mae import MAE
from prepretrain.training.fit import seed_all

PARAMETERS = {  # counts of MAWS's released encoders
    "vit_b16": 85_798_656,
    "vit_l16": 303_301_632,
    "vit_h14": 630_764_800,
    "vit_2b14": 1_890_408_960,
    "vit_6.5b14": 6_447_632_384,
}


def small(**options) -> Model:
    """A small model with weights."""
    model = Model(encoder="vit_test8", **options)
    shard.initialise(model, 0)
    return model.eval()


@pytest.mark.parametrize("size", PARAMETERS)
def test_sizes_have_the_released_encoders_parameters_and_key_names(size):
    with torch.device("meta"):
        encoder = encoders.build(size)
        peer = timm.models.VisionTransformer(
            img_size=224,
            patch_size=encoder.stride,
            embed_dim=encoder.width,
            depth=encoder.depth,
            num_heads=encoder.heads,
            num_classes=0,
        )
    assert sum(p.numel() for p in encoder.parameters()) == PARAMETERS[size]
    assert {k: v.shape for k, v in encoder.state_dict().items()} == {
        k: v.shape for k, v in peer.state_dict().items()
    }


def test_the_released_manifest_matches_where_it_is_at_hand():
    path = (
        Path(os.environ.get("PREPRETRAIN_GOLDEN", Path(__file__).parent / "golden"))
        / "maws_manifest.json"
    )
    if not path.exists():
        pytest.skip("the manifest of MAWS's released files is not in PREPRETRAIN_GOLDEN")
    for name, row in json.loads(path.read_text()).items():
        if name.split("/")[0] in ("mae", "mae_in1k", "mae_in21k", "maws") and "_ft_" not in name:
            with torch.device("meta"):
                encoder = encoders.build(name.split("/")[1])
            assert {k: list(v.shape) for k, v in encoder.state_dict().items()} == row["shapes"], (
                name
            )


def test_every_size_encodes_any_multiple_of_its_patch():
    model = small(image_size=40, patch_size=4)
    assert model(torch.zeros(2, 3, 40, 40, dtype=torch.uint8)).shape == (2, 101, 32)
    with pytest.raises(ValueError, match="model.image_size is 40 x 40 and an image is 32 x 32"):
        model(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))


def test_keeping_all_patches_in_order_is_the_plain_encoding():
    model, image = small(), torch.randn(2, 3, 32, 32)
    keep = torch.arange(16).expand(2, -1)
    assert_close(model.encoder(image, keep=keep), model.encoder(image))


def test_hidden_patches_do_not_reach_the_encoder():
    model, image = small(), torch.randn(2, 3, 32, 32)
    mask, token = torch.arange(16).expand(2, -1) < 10, torch.randn(32)
    other = unpatchify(
        torch.where(mask[..., None], torch.randn(2, 16, 192), patchify(image, 8)), 8, (4, 4)
    )
    assert_close(model.encoder(image, hide=(mask, token)), model.encoder(other, hide=(mask, token)))


def test_patches_are_cut_as_the_convolution_of_the_released_files_cuts_them():
    model, image = small(), torch.randn(2, 3, 32, 32)
    projection = model.encoder.patch_embed.proj
    want = projection(image).flatten(2).transpose(1, 2)
    assert_close(F.linear(patchify(image, 8), projection.weight.flatten(1), projection.bias), want)
    assert torch.equal(unpatchify(patchify(image, 8), 8, (4, 4)), image)


def test_an_export_loads_in_timm_with_strict_keys_and_gives_the_same_features(tmp_path):
    model = small(image_size=48)
    save(model, tmp_path, "test")
    peer = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    image = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8)
    with torch.no_grad():
        assert_close(
            peer.forward_features(model.normalise(image)), model(image), rtol=1e-5, atol=1e-5
        )
        assert_close(peer(model.normalise(image)), model.features(image), rtol=1e-5, atol=1e-5)
    again = load(str(tmp_path))
    assert_close(again(image), model(image))
    assert again.options == model.options


def test_positions_are_resampled_for_another_image_size_and_nothing_else_is(tmp_path):
    save(small(), tmp_path, "test")
    larger = load(str(tmp_path), image_size=64)
    assert larger.encoder.pos_embed.shape == (1, 65, 32)
    assert_close(larger.encoder.pos_embed[:, 0], load(str(tmp_path)).encoder.pos_embed[:, 0])


def test_initial_values_depend_on_seed_and_name_only():
    two = MAE(Model(encoder="vit_test8"), decoder_depth=1, decoder_width=32, decoder_heads=2)
    shard.initialise(two, 0)
    assert not any(torch.isnan(p).any() for p in two.parameters())
    names = dict(two.named_parameters())
    again = MAE(Model(encoder="vit_test8"), decoder_depth=1, decoder_width=32, decoder_heads=2)
    shard.initialise(again, 0)
    assert all(torch.equal(p, names[n]) for n, p in again.named_parameters())
    shard.initialise(again, 1)
    assert not torch.equal(again.decoder.pred.weight, names["decoder.pred.weight"])
    blocks = (
        names["model.encoder.blocks.0.attn.qkv.weight"],
        names["model.encoder.blocks.1.attn.qkv.weight"],
    )
    assert not torch.equal(*blocks)


def test_the_sparse_loss_and_its_gradient_equal_the_dense_softmax_cross_entropy():
    torch.manual_seed(0)
    tags = torch.tensor([[3, 7, 1], [2, -1, -1], [9, 0, -1]])
    dense = torch.zeros(3, 10)
    for i, row in enumerate(tags):
        dense[i, row[row >= 0]] = 1
    dense /= dense.sum(1, keepdim=True)
    one, two = (
        torch.randn(3, 10, generator=torch.Generator().manual_seed(1)).requires_grad_()
        for _ in range(2)
    )
    want = -(dense * one.log_softmax(1)).sum(1)
    got = sparse_cross_entropy(two, tags)
    assert_close(got, want)
    want.mean().backward()
    got.mean().backward()
    assert_close(two.grad, one.grad)


def test_the_tanh_head_starts_at_zero():
    head = TwoLayer(small().encoder, classes=5)
    shard.initialise(head, 0)
    assert torch.equal(head(torch.randn(2, 17, head.head.in_features)), torch.zeros(2, 5))
    assert head.pre_logits.weight.std() > 0.1


@pytest.fixture
def vocabulary(tmp_path, monkeypatch) -> Vocabulary:
    monkeypatch.setenv("PREPRETRAIN_DATA", str(tmp_path))
    made = Vocabulary(["cat", "dog", "sea"], [5, 4, 3], source="abc", images=9, min_count=1)
    made.save(tmp_path / "tags.json")
    return made


def test_a_hashtag_run_needs_the_vocabulary_of_its_data(vocabulary, tmp_path):
    objective = Hashtag(Model(encoder="vit_test8"), vocabulary="tags.json")
    assert objective.tags == 3

    class Other:
        fields, fingerprint = ("image", "hashtags"), "xyz"

    class Card:
        name = "other"

    with pytest.raises(ValueError, match="was counted from data abc, and this data is xyz"):
        objective.check(Card, Other())
    with pytest.raises(ValueError, match="objective.tags: 4, and .* holds 3"):
        Hashtag(Model(encoder="vit_test8"), vocabulary="tags.json", tags=4).vocabulary  # noqa: B018
    with pytest.raises(ValueError, match="missing.json"):
        Hashtag(Model(encoder="vit_test8"), vocabulary="missing.json")


class Tags(Source):
    """Images with hashtags, which counts how often they are read."""

    def __init__(self, *tags):
        self.tags, self.groups, self.fingerprint, self.read = tags, [len(tags)], "abc", 0

    def hashtags(self, index):
        self.read += 1
        return self.tags[index]


def test_images_without_a_known_tag_are_left_out(vocabulary, tmp_path):
    build = lambda: Hashtag(Model(encoder="vit_test8"), vocabulary="tags.json")
    source = Tags(["#Cat"], ["dog", "sea"], ["zebra"], [], ["cat", "dog"])
    assert build().repeats(source)[:].tolist() == [1, 1, 0, 0, 1]
    assert build().repeats(source)[:].tolist() == [1, 1, 0, 0, 1]
    assert source.read == 5  # all is kept after the first time, beside the vocabulary
    next(tmp_path.glob("tags.json.rarest-*.npy")).write_bytes(b"torn")
    assert build().repeats(source)[:].tolist() == [1, 1, 0, 0, 1] and source.read == 10
    next(tmp_path.glob("tags.json.rarest-*.npy")).unlink()
    assert build().repeats(Tags(["cat"], ["sea"])) is None  # the order is what it was
    next(tmp_path.glob("tags.json.rarest-*.npy")).unlink()
    with pytest.raises(ValueError, match="no image has a tag that is in .*tags.json"):
        build().repeats(Tags(["zebra"]))


def test_the_hashtag_head_trains_on_ids(vocabulary):
    objective = Hashtag(Model(encoder="vit_test8"), vocabulary="tags.json")
    shard.initialise(objective, 0)
    batch = {
        "image": torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8),
        "tags": torch.tensor([[0, 2], [1, -1]]),
    }
    figures = objective(batch)
    assert_close(
        figures["loss"], torch.tensor(3.0).log()
    )  # the head is zero: all tags are equally likely
    figures["loss"].backward()


LABELS = torch.tensor([0, 1, 2, 1])  # mixing pairs the first with the last, and so on
CLASSES = F.one_hot(LABELS, 3).float()


def handed_on(images: torch.Tensor, labels: torch.Tensor, step: int = 0, **options):
    """(normalised images, the images that the model gets, the target of the loss) in a training step
    of Classify."""
    objective = Classify(Model(encoder="vit_test8", head={"classes": 3}), **options)
    logits, given = torch.zeros(len(images), 3, requires_grad=True), []
    objective.logits = lambda image: given.append(image) or logits
    seed_all(0, step)
    objective({"image": images, "label": labels})["loss"].backward()
    # the gradient of a mean cross-entropy is (softmax - target) / images
    target = logits.detach().softmax(1) - len(images) * logits.grad
    return objective.model.normalise(images), given[0], target


def flat_images(*values: int) -> torch.Tensor:
    """Each image of one value."""
    return torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 32, 32)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_mixup_mixes_pixels_and_classes_of_a_pair_by_the_same_share(smoothing):
    shares = []
    for step in range(8):
        given = (flat_images(0, 80, 160, 240), LABELS, step)
        plain, mixed, target = handed_on(*given, mixup=0.8, smoothing=smoothing)
        share = ((mixed - plain.flip(0)) / (plain - plain.flip(0))).mean()
        assert_close(mixed, share * plain + (1 - share) * plain.flip(0), rtol=1e-4, atol=1e-4)
        classes = share * CLASSES + (1 - share) * CLASSES.flip(0)
        assert_close(target, (1 - smoothing) * classes + smoothing / 3, rtol=1e-4, atol=1e-4)
        shares.append(float(share))
    assert len(set(shares)) == 8 and 0 < min(shares) < 0.4 < max(shares) < 1


def test_cutmix_puts_a_rectangle_of_the_partner_in_and_counts_its_pixels():
    cut = 0
    for step in range(8):
        plain, mixed, target = handed_on(flat_images(0, 80, 160, 240), LABELS, step, cutmix=1.0)
        own = mixed == plain
        assert torch.equal(torch.where(own, plain, plain.flip(0)), mixed)
        assert rectangular(~own[0, 0])
        share = own[0].float().mean()
        assert_close(target, share * CLASSES + (1 - share) * CLASSES.flip(0))
        cut += int(share < 1)
    assert cut == 8


def rectangular(mask: torch.Tensor) -> bool:
    """Whether all that is inside of a mask is one rectangle."""
    return bool(mask.sum() == mask.any(0).sum() * mask.any(1).sum())


def test_erasing_fills_a_rectangle_of_its_share_of_images_with_noise_and_keeps_the_class():
    images, labels = flat_images(*[100] * 64), torch.arange(64) % 3
    plain, given, target = handed_on(images, labels, erasing=0.5)
    erased = (given != plain).any(1)
    assert all(rectangular(mask) for mask in erased)
    area = erased.float().mean((1, 2))
    assert 20 < (area > 0).sum() < 44 and area[area > 0].min() > 0.01 and area.max() < 0.4
    noise = given[given != plain]
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1
    assert_close(target, F.one_hot(labels, 3).float())


def test_smoothing_gives_its_share_to_all_classes_alike():
    plain, given, target = handed_on(flat_images(0, 80, 160, 240), LABELS, smoothing=0.3)
    assert torch.equal(given, plain)
    assert_close(target, 0.7 * CLASSES + 0.1)


def test_evaluation_neither_mixes_nor_erases_nor_smooths_and_pairs_need_an_even_batch():
    model = Model(encoder="vit_test8", head={"classes": 3})
    objective = Classify(model, mixup=0.8, cutmix=1.0, smoothing=0.1, erasing=0.5)
    shard.initialise(objective, 0)
    torch.nn.init.normal_(model.head.linear.weight)
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=generator)
    batch = {"image": image, "label": LABELS}
    found, scores = objective.eval()(batch), model.scores(image)
    assert_close(found["loss"], F.cross_entropy(scores, LABELS))
    assert_close(found["accuracy"], (scores.argmax(1) == LABELS).float().mean())
    assert objective.train()(batch)["loss"] != found["loss"]
    with pytest.raises(ValueError, match="mixes pairs"):
        objective({k: v[:3] for k, v in batch.items()})


TEXTUAL = {"text": BPE, "joint": {"width": 16}}
DECODER = {"decoder_depth": 1, "decoder_width": 32, "decoder_heads": 2}
OBJECTIVES = {  # of images: options of a small model, and of the objective
    "classify": ({"head": {"classes": 3}}, {}),
    "clip": (TEXTUAL, {}),
    "depth": ({"head": {"name": "linear_depth"}}, {"short_side": 48}),
    "detection": ({"head": {"name": "mask_rcnn", "classes": 2, "masks": False}}, {}),
    "feature_mae": ({}, {"teacher": "teacher", **DECODER}),
    "hashtag": ({}, {"vocabulary": "tags.json"}),
    "lit": (TEXTUAL, {}),
    "mae": ({}, DECODER),
    "segmentation": ({"head": {"name": "linear_segmentation", "classes": 2}}, {}),
    "simmim": ({}, {"cell": 8}),
}
WHOLE = ("depth", "detection", "segmentation")  # of whose pictures nothing is cut off


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_every_objective_trains_on_changing_crops_and_is_validated_on_the_centre(
    name, vocabulary, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    if name == "feature_mae":
        save(small(), tmp_path / "teacher", "made by the tests")
    model, options = OBJECTIVES[name]
    objective = plugin.build("objectives", name, Model(encoder="vit_test8", **model), **options)
    scene = Synthetic(images=1, size=40, seed=0)[0] | {"hashtags": ["cat"], "label": 1}
    scene |= {"boxes": np.ones((0, 4)), "classes": np.ones(0, int), "crowds": np.ones(0, bool)}
    scene |= {"size": (40, 40)}
    scene |= {"label_map": np.eye(40, dtype=np.uint8), "depth": np.ones((40, 40), np.float32)}

    def draws(train: bool) -> list[torch.Tensor]:
        made, randoms = objective.transform(train), [Random(0, n % 4, 0) for n in range(8)]
        return [made(scene | {"random": random})["image"] for random in randoms]

    crops, centres = draws(train=True), draws(train=False)
    assert len({crop.numpy().tobytes() for crop in crops}) == 4
    assert all(torch.equal(crops[n], crops[n + 4]) for n in range(4))  # by the sample's randomness
    centre = resize_center_crop(decode(scene["image"]), 32)
    if name in WHOLE:
        centre = boxes.fit((40, 40), 32).image(decode(scene["image"]))
    assert all(torch.equal(one, centre) for one in centres)


def test_reconstructions_show_the_visible_patches_untouched():
    objective = MAE(Model(encoder="vit_test8"), decoder_depth=1, decoder_width=32, decoder_heads=2)
    shard.initialise(objective, 0)
    batch = {
        "image": torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8),
        "noise": torch.rand(2, 16),
    }
    drawn = objective.eval().reconstruct(batch)
    assert torch.equal(drawn["original"], batch["image"])
    keep, masked = objective.split(batch["noise"])
    same = patchify((drawn["reconstructed"] == drawn["original"]).float(), 8).mean(-1)
    assert (same.gather(1, keep) == 1).all() and (same.gather(1, masked) < 1).all()


@pytest.mark.parametrize("name", plugin.names("objectives"))
def test_every_objective_is_described_and_names_its_fields_and_its_options_types(name):
    found = plugin.find("objectives", name)
    assert found.__doc__ and {"image", "video"} & set(found.fields)
    assert all(p.annotation is not p.empty for p in plugin.options(found).values())


def test_an_objective_or_source_that_names_an_unknown_field_is_refused_with_the_nearest(
    tmp_path, monkeypatch
):
    class Deep(Objective):
        fields = ("image", "hashtag")

    with pytest.raises(ValueError, match="no field 'hashtag'. Did you mean 'hashtags'.*FIELDS"):
        Deep(Model(encoder="vit_test8"))
    (tmp_path / "deep_lab").mkdir()
    (tmp_path / "deep_lab" / "depths.py").write_text(
        "from prepretrain.data.sources.base import Source\n"
        "class Depths(Source):\n    fields, groups = ('image', 'normal'), [3]\n"
    )
    (tmp_path / "depths.yaml").write_text("train: {source: deep_lab.depths}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv(plugin.TRUSTED, "deep_lab")
    with pytest.raises(
        ValueError, match="source 'deep_lab.depths': fields: no field 'normal'.*Add one"
    ):
        open_data(f"{tmp_path}/depths.yaml")
    monkeypatch.setitem(Source.FIELDS, "normal", "float32 [H, W, 3]")
    assert open_data(f"{tmp_path}/depths.yaml").fields == ("image", "normal")


def test_a_dotted_name_is_a_module_outside_of_the_package(tmp_path, monkeypatch):
    (tmp_path / "my_lab_objective.py").write_text(
        "from prepretrain.objectives.base import Objective\nclass Mine(Objective):\n    pass\n"
    )
    (tmp_path / "my_lab").mkdir()
    (tmp_path / "my_lab" / "jepa.py").write_text((tmp_path / "my_lab_objective.py").read_text())
    monkeypatch.syspath_prepend(str(tmp_path))
    assert plugin.find("objectives", "my_lab.jepa").__name__ == "Mine"
    with pytest.raises(ValueError, match="there is no module 'my_lab.nothing'"):
        plugin.find("objectives", "my_lab.nothing")


def test_a_parameter_on_the_objective_itself_is_refused_by_name():
    objective = MAE(Model(encoder="vit_test8"), decoder_depth=1, decoder_width=32, decoder_heads=2)
    objective.scale = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="MAE.scale: a parameter must belong to a child module"):
        shard.find_roots(objective)


def test_weights_of_a_part_are_addressed_by_name(tmp_path):
    state = {"a.x": torch.ones(2), "b.x": torch.zeros(2)}
    found = weights.Weights("f", {k: tuple(v.shape) for k, v in state.items()}, state.__getitem__)
    assert torch.equal(found.part("a").read("x"), torch.ones(2))
    assert Random(0, 0, 0)("a").random() == Random(0, 0, 0)("a").random()
