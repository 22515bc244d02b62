"""The CLIP backbone against open_clip and PyTorch written out, and the vision pipeline through its own command lines."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import make_coop, make_public

import moe
from metamoe import (
    backbones,  # noqa: E402
    uploads,
)
from metamoe.backbones import (
    base,  # noqa: E402
    embedding,
    training,
)
from metamoe.backbones.clip import ClipBackbone
from metamoe.data.glyphs import model as glyph
from metamoe.data.glyphs import world
from metamoe.errors import UserError
from metamoe.records import read_records
from metamoe.rundir import read_json

SIZES = {"train": 12, "validation": 4, "test": 8}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A checkpoint of the small CLIP with random weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("glyph") / "random.safetensors"
    save_file(glyph.create(weights=None)[0].state_dict(), path)
    return path


@pytest.fixture
def backbone(weights):
    return backbones.load_backbone("glyph-clip", weights, "cpu", "float32")


@pytest.fixture(scope="module")
def records():
    return world.load_glyphs(["greek"], SIZES, 40, 0)[1]["greek"]["train"]


@pytest.fixture(scope="module")
def public():
    return world.load_glyphs(["greek"], SIZES, 40, 0)[0]


def pixels(backbone, records):
    return torch.stack([backbone.transform(world.draw(record["image"])) for record in records])


def expert(backbone, scale=0.3, seed=0):
    """A PEFT model whose LoRA factors are all random."""
    model = backbone.add_lora(4, 8, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:
            parameter.data = scale * torch.randn(parameter.shape, generator=generator)
    return model


# --- the transform


@pytest.mark.parametrize("size", [(300, 400), (500, 260), (224, 224), (256, 999)])
def test_the_test_transform_is_open_clips(size):
    """With its own resize, which takes the shorter side to the crop's size, pixel by pixel."""
    base.import_transformers()
    from open_clip import image_transform
    from torchvision import transforms

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    clip = object.__new__(ClipBackbone)
    clip.size, clip.flip = 224, True
    clip.mean, clip.std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    clip.resize = 224
    assert torch.equal(
        clip.transform(image), image_transform(224, is_train=False, mean=clip.mean, std=clip.std)(image)
    )
    clip.resize = 256  # the paper's
    bicubic = transforms.InterpolationMode.BICUBIC
    steps = [
        transforms.Resize(256, bicubic),
        transforms.CenterCrop(224),
        transforms.ToTensor(),
        transforms.Normalize(clip.mean, clip.std),
    ]
    assert torch.equal(clip.transform(image), transforms.Compose(steps)(image))


def test_the_training_transform_crops_and_flips_at_random_but_fixed_by_its_generator():
    base.import_transformers()
    clip = object.__new__(ClipBackbone)
    clip.size, clip.resize, clip.flip, clip.mean, clip.std = 24, 32, True, (0, 0, 0), (1, 1, 1)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 40, 3), dtype=np.uint8))
    whole = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    places = [(t, l, f) for t in range(9) for l in range(17) for f in (False, True)]
    crops = {place: whole[:, place[0] : place[0] + 24, place[1] : place[1] + 24] for place in places}
    found = set()
    for seed in range(40):
        got = clip.transform(image, np.random.default_rng(seed))
        assert torch.equal(got, clip.transform(image, np.random.default_rng(seed)))
        found |= {
            place for place, crop in crops.items() if torch.equal(got, crop.flip(2) if place[2] else crop)
        }
    assert len(found) > 30 and {f for _, _, f in found} == {False, True}


# --- features, classes, routing vectors


def test_features_are_the_post_ln_cls_tokens(backbone, records, weights):
    seen = []
    clean = glyph.create(weights)[0]
    clean.visual.ln_post.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        projected = clean.encode_image(pixels(backbone, records))
        got = torch.from_numpy(backbone.features(records))
        assert got.shape == (len(records), 160) and backbone.width == 160
        assert torch.allclose(got, seen[0][:, 0], atol=1e-5)
        assert torch.allclose(got @ backbone.projection, projected, atol=1e-4)


def test_scores_are_open_clips_own_logits(backbone, records, weights):
    clean, tokenizer = glyph.create(weights)
    with torch.no_grad():
        texts = clean.encode_text(tokenizer(records[0]["choices"]), normalize=True)
        want = (
            clean.logit_scale.exp() * clean.encode_image(pixels(backbone, records), normalize=True) @ texts.T
        )
    got = backbone.scores(backbone.model, records)
    assert len(got) == len(records) and np.allclose(np.stack(got), want.numpy(), atol=1e-3)


def test_a_class_prompt_is_encoded_once_and_kept(backbone, tmp_path):
    (tmp_path / "classes.json").write_text(json.dumps(["latin small letter a", "digit one"]))
    assert backbone.public_classes(tmp_path) == ["latin small letter a", "digit one"]
    want = backbone.text_features(["digit one", "greek small letter pi"])
    assert torch.allclose(want.norm(dim=1), torch.ones(2)) and list(backbone.class_features) == [
        "latin small letter a",
        "digit one",
        "greek small letter pi",
    ]
    kept = load_file(tmp_path / "classes.safetensors")["features"]
    assert torch.equal(kept[1], want[0])
    # a later stage takes them from the file
    save_file({"features": kept + 1}, tmp_path / "classes.safetensors")
    backbone.class_features = {}
    backbone.public_classes(tmp_path)
    assert torch.equal(backbone.text_features(["digit one"])[0], want[0] + 1)


def test_routing_vectors_are_means_over_samples_and_tokens(backbone, records):
    model = expert(backbone)
    got = backbone.routing_vectors(model, records * 15)  # more than one batch
    visual, inputs = base.unwrap(model).visual, []
    hooks = [
        visual.transformer.resblocks[i].mlp.register_forward_pre_hook(lambda module, x: inputs.append(x[0]))
        for i in range(6)
    ]
    with torch.no_grad():
        visual(pixels(backbone, records))
    for hook in hooks:
        hook.remove()
    assert got.shape == (6, 160)
    assert torch.allclose(got, torch.stack([x.mean((0, 1)) for x in inputs]), atol=1e-4)


# --- experts, the unified model


def test_lora_sits_on_the_visual_ffns_alone_and_training_lowers_the_loss(backbone, records):
    frozen = {name: p.clone() for name, p in backbone.model.named_parameters()}
    model = backbone.add_lora(4, 8, 0)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 6 * 2 * 2 and all(
        ".visual.transformer." in name and (".c_fc." in name or ".c_proj." in name) for name in trained
    )
    classes = records[0]["choices"]
    for optimizer, lr in (("adamw", 0.01), ("sgd", 0.05)):
        groups = [
            {
                "params": [p.requires_grad_(True) for name, p in model.named_parameters() if name in trained],
                "lr": lr,
            }
        ]
        losses = training.train(
            backbone,
            model,
            records[:6],
            groups,
            steps=25,
            batch_size=6,
            warmup_steps=0,
            optimizer=optimizer,
            weight_decay=0.0,
            seed=0,
            label="test",
            classes=classes,
        )
        assert len(losses) == 25 and np.mean(losses[-4:]) < 0.9 * np.mean(losses[:4])
    after = {
        name.replace(".base_layer", "").removeprefix("base_model.model."): p
        for name, p in model.named_parameters()
    }
    assert all(torch.equal(after[name], p) for name, p in frozen.items())


def test_an_adapter_opens_with_peft_on_the_plain_model(backbone, records, weights, tmp_path):
    from peft import PeftModel

    model = expert(backbone)
    model.save_pretrained(tmp_path)
    want = np.stack(backbone.scores(model, records))
    plain = PeftModel.from_pretrained(glyph.create(weights)[0], tmp_path).eval()
    with torch.no_grad():
        texts = plain.get_base_model().encode_text(backbone.tokenizer(records[0]["choices"]), normalize=True)
        got = (
            backbone.scale
            * plain.get_base_model().encode_image(pixels(backbone, records), normalize=True)
            @ texts.T
        )
    assert np.allclose(got.numpy(), want, atol=1e-3)
    seed = backbones.load_backbone("glyph-clip", weights, "cpu", "float32")
    assert not np.allclose(want, np.stack(seed.scores(seed.model, records)), atol=0.1)


def unified(weights, tmp_path, seeds):
    experts = []
    for seed in seeds:
        model = expert(backbones.load_backbone("glyph-clip", weights, "cpu", "float32"), seed=seed)
        model.save_pretrained(tmp_path / f"{seed}" / "adapter")
        experts.append(uploads.read_expert(tmp_path / f"{seed}"))
    backbone = backbones.load_backbone("glyph-clip", weights, "cpu", "float32")
    vectors = torch.randn(len(seeds), 6, 160, generator=torch.Generator().manual_seed(9))
    return backbone, moe.unify(backbone.model, backbone.ffn_names, experts, vectors), model


def test_equal_experts_in_the_moe_are_that_expert(records, weights, tmp_path):
    backbone, merged, alone = unified(weights, tmp_path, [3, 3, 3])
    assert np.allclose(
        np.stack(backbone.scores(merged, records)), np.stack(backbone.scores(alone, records)), atol=1e-3
    )


def test_an_images_prediction_does_not_depend_on_its_batch(records, weights, tmp_path):
    """The context is the mean over an image's own tokens, not over the batch."""
    backbone, merged, _ = unified(weights, tmp_path, [1, 2, 3])
    together = backbone.scores(merged, records)
    for record, want in zip(records[:4], together, strict=False):
        assert np.allclose(backbone.scores(merged, [record])[0], want, atol=1e-4)
    assert np.allclose(np.stack(backbone.scores(merged, records[::-1])[::-1]), np.stack(together), atol=1e-4)


# --- unreadable images


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_images_are_named_and_left_out(backbone, public, tmp_path, workers):
    backbone.workers = workers
    (tmp_path / "cut.jpg").write_bytes(b"\xff\xd8\xff no image")
    records = [dict(record) for record in public[:6]]
    records[2]["image"] = str(tmp_path / "cut.jpg")
    ((indices, features),) = backbone.embed(records)
    assert indices == [0, 1, 3, 4, 5] and np.isfinite(features).all() and backbone.seconds > 0
    assert [i for i, _ in backbone.unreadable] == [2] and "cut.jpg" in backbone.unreadable[0][1]
    ((indices, features),) = backbone.embed([records[2]])
    assert indices == [] and features.shape == (0, 160)
    for call in (
        backbone.features,
        lambda r: backbone.scores(backbone.model, r),
        lambda r: backbone.routing_vectors(backbone.model, r),
    ):
        with pytest.raises(UserError, match="cut.jpg"):
            call([{**record, "choices": ["a"]} for record in records])


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="other.safetensors.*glyph-clip"):
        backbones.load_backbone("glyph-clip", tmp_path / "other.safetensors", "cpu")


def test_embedding_d0_goes_on_where_a_kill_stopped_it(backbone, public, tmp_path, monkeypatch):
    """The progress is written now and then; what was embedded up to it is not embedded again, unreadable images are kept in mind."""
    records = [dict(record) for record in public]
    records[3]["image"] = str(tmp_path / "cut.jpg")
    for name in ("whole", "run"):
        (tmp_path / name / "public").mkdir(parents=True)
    whole = embedding.public_features(tmp_path / "whole", backbone, records, "float32")
    embed, clock, skips = backbone.embed, itertools.count(0, 31), []
    # every batch is late enough for a note
    monkeypatch.setattr(embedding.time, "perf_counter", lambda: next(clock))

    def killed(records, label, skip=0, every=1, stop=3):
        skips.append(skip)
        for number, batch in enumerate(embed(records, label, skip, every, batch=8)):
            if number == stop:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(backbone, "embed", killed)
    with pytest.raises(KeyboardInterrupt):
        embedding.public_features(tmp_path / "run", backbone, records, "float32")
    assert not (tmp_path / "run" / "public" / "features.npy").exists()
    noted = read_json(tmp_path / "run" / "public" / ".progress.json")["seconds"]
    got = embedding.public_features(tmp_path / "run", backbone, records, "float32")
    assert (
        skips == [0, 3]
        and np.allclose(got, whole, atol=1e-5, equal_nan=True)
        and np.flatnonzero(np.isnan(got[:, 0])).tolist() == [3]
    )
    assert sorted(path.name for path in (tmp_path / "run" / "public").iterdir()) == [
        "features.npy",
        "timing.json",
        "unreadable.json",
    ]
    assert read_json(tmp_path / "run" / "public" / "unreadable.json") == [3]
    assert read_json(tmp_path / "run" / "public" / "timing.json")["embedding_seconds"] >= noted + 31 > 31


# --- the command lines


def stage(*command):
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=tiny.REPO,
        env=tiny.environment(),
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_the_vision_pipeline_from_proxies_to_the_table(weights, tmp_path):
    run = ["--run-dir", tmp_path / "run", "--device", "cpu", "--dtype", "float32"]
    new = [
        "--backbone",
        "glyph-clip",
        "--pretrained",
        weights,
        "--train-size",
        20,
        "--validation-size",
        4,
        "--test-size",
        12,
        "--public-size",
        60,
        "--candidates",
        30,
        "--proxies",
        8,
    ]
    few = ["--epochs", 2, "--batch-size", 16]
    for command in (
        ["select_proxies.py", *run, *new, "--selection", "similarity"],
        ["select_proxies.py", *run, "--selection", "dpp"],
        ["train_expert.py", *run, *few, "--data", "private", "--selection", "similarity"],
        ["train_expert.py", *run, *few],
        *(["unify_moe.py", *run, "--method", method] for method in ("soup", "btm")),
        *(
            ["unify_moe.py", *run, "--method", method, *few]
            for method in ("btx", "flexolmo", "metamoe", "unrestricted")
        ),
        ["evaluate.py", *run],
    ):
        done = stage(*command)
        assert done.returncode == 0, done.stderr
    results = read_json(tmp_path / "run" / "results.json")
    assert [row["model"] for row in results["rows"]] == [
        "unrestricted",
        "zeroshot",
        "expert-greek",
        "expert-cyrillic",
        "expert-armenian",
        "btm",
        "soup",
        "btx",
        "flexolmo",
        "metamoe",
    ]
    assert results["n"] == {"greek": 12, "cyrillic": 12, "armenian": 12}
    # 2 epochs of 24 proxies in batches of 16, of 60 private samples for the upper bound
    steps = {
        name: len(read_json(tmp_path / "run" / "moe" / name / "losses.json"))
        for name in ("btx", "flexolmo", "metamoe", "unrestricted")
    }
    assert steps == {"btx": 4, "flexolmo": 4, "metamoe": 4, "unrestricted": 8}
    public = read_records(tmp_path / "run" / "public" / "records.jsonl")
    assert read_json(tmp_path / "run" / "public" / "classes.json") == sorted({r["answer"] for r in public})
    assert np.load(tmp_path / "run" / "public" / "features.npy").shape == (60, 160)
    again = stage("select_proxies.py", *run, "--selection", "dpp")
    assert again.returncode == 0 and "skipped" in again.stdout
    wrong = stage("select_proxies.py", *run, "--data-root", tmp_path)
    assert (
        wrong.returncode == 2
        and wrong.stderr.startswith("error: --data-root")
        and wrong.stderr.count("\n") == 1
    )


@pytest.mark.slow
def test_the_papers_clip_on_datasets_in_coops_layout(tmp_path):
    """ViT-B/32 with random weights out of a checkpoint file, from folders of JPEGs to the table; one D_0 image is cut off."""
    import open_clip

    make_coop(
        tmp_path / "oxford_pets", "split_zhou_OxfordPets.json", "images", ["Pug", "Japanese-Chin"], (4, 1, 2)
    )
    make_coop(
        tmp_path / "eurosat", "split_zhou_EuroSAT.json", "2750", ["Forest", "SeaLake"], (4, 1, 2), nested=True
    )
    make_public(tmp_path / "imagenet" / "train", ("n01440764", "n01443537", "n01484850"), 7)
    (tmp_path / "imagenet" / "classnames.txt").write_text(
        "n01440764 tench\nn01443537 goldfish\nn01484850 great white shark\n"
    )
    cut = tmp_path / "imagenet" / "train" / "n01440764" / "n01440764_3.JPEG"
    cut.write_bytes(cut.read_bytes()[:200])
    torch.manual_seed(0)
    torch.save(
        open_clip.create_model("ViT-B-32-quickgelu", pretrained=None).state_dict(), tmp_path / "random.pt"
    )
    run = ["--run-dir", tmp_path / "run", "--device", "cpu", "--dtype", "float32"]
    new = [
        "--backbone",
        "vit-b-32",
        "--pretrained",
        tmp_path / "random.pt",
        "--clients",
        "pets",
        "eurosat",
        "--data-root",
        tmp_path,
        "--public",
        tmp_path / "imagenet",
        "--candidates",
        12,
        "--proxies",
        4,
    ]
    few = ["--epochs", 1, "--batch-size", 6]
    done = stage("select_proxies.py", *run, *new, "--selection", "dpp")
    assert done.returncode == 0, done.stderr
    assert f"skipped: {cut}" in done.stdout and "waiting for decoded images" in done.stdout
    features = np.load(tmp_path / "run" / "public" / "features.npy")
    assert features.shape == (21, 768) and np.isnan(features[:, 0]).sum() == 1
    for command in (
        ["train_expert.py", *run, *few, "--data", "private"],
        ["train_expert.py", *run, *few, "--workers", 1],
        ["unify_moe.py", *run, *few, "--method", "metamoe"],
        ["evaluate.py", *run, "--models", "zeroshot", "metamoe"],
    ):
        done = stage(*command)
        assert done.returncode == 0, done.stderr
    results = read_json(tmp_path / "run" / "results.json")
    assert results["n"] == {"pets": 4, "eurosat": 4} and [row["model"] for row in results["rows"]] == [
        "zeroshot",
        "metamoe",
    ]
    config = json.loads(
        (
            tmp_path
            / "run"
            / "clients"
            / "pets"
            / "upload"
            / "aligned-dpp"
            / "adapter"
            / "adapter_config.json"
        ).read_text()
    )
    assert len(config["target_modules"]) == 24 and all(
        name.startswith("visual.transformer.resblocks.") for name in config["target_modules"]
    )
    # a corrupt private image ends the run before anything is written
    bad = tmp_path / "oxford_pets" / "images" / "train_0.jpg"
    bad.write_bytes(b"no image")
    refused = stage("select_proxies.py", "--run-dir", tmp_path / "other", *run[2:], *new)
    assert (
        refused.returncode == 2
        and "train_0.jpg" in refused.stderr
        and refused.stderr.count("error:") == 1
        and not (tmp_path / "other").exists()
    )
