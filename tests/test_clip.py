"""The CLIP backbone against open_clip and PyTorch written out, and the vision pipeline through its command lines."""

import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import make_coop, make_public, refused, stage

import moe
from metamoe import backbones, uploads
from metamoe.backbones import base, embedding, training
from metamoe.data.glyphs import model as glyph
from metamoe.data.glyphs import world
from metamoe.errors import UserError
from metamoe.presets import PRESETS
from metamoe.records import read_records
from metamoe.rundir import read_json

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def open_clip():
    base.import_transformers()  # mends torchvision first, where it does not fit torch
    import open_clip

    return open_clip


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A checkpoint of the small CLIP with random weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("glyph") / "random.safetensors"
    save_file(glyph.create(weights=None)[0].state_dict(), path)
    return path


@pytest.fixture(scope="module")
def load(weights):
    return lambda: backbones.load_backbone("glyph-clip", weights, "cpu", "float32")


@pytest.fixture
def backbone(load):
    return load()


@pytest.fixture(scope="module")
def data():
    """(public records, a client's training records)"""
    public, clients = world.load_glyphs(["greek"], {"train": 12, "validation": 1, "test": 1}, 40, 0)[:2]
    return public, clients["greek"]["train"]


@pytest.fixture(scope="module")
def records(data):
    return data[1]


def pixels(backbone, records):
    return torch.stack([backbone.transform(world.draw(record["image"])) for record in records])


def expert(backbone, seed=0):
    """A PEFT model whose LoRA factors are all random."""
    model = backbone.add_lora(4, 8, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def scores(backbone, model, records):
    return np.stack(backbone.scores(model, records))


def logits(clip, tokenizer, images, classes):
    """open_clip's own."""
    with torch.no_grad():
        texts = clip.encode_text(tokenizer(classes), normalize=True)
        return (clip.logit_scale.exp() * clip.encode_image(images, normalize=True) @ texts.T).numpy()


# --- the transform


@pytest.mark.parametrize("size", [(300, 400), (500, 260), (224, 224), (256, 999)])
def test_the_test_transform_is_open_clips(backbone, open_clip, size):
    """With its own resize, which takes the shorter side to the crop's size, pixel by pixel."""
    from torchvision import transforms

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    backbone.size, backbone.mean, backbone.std, backbone.resize = 224, mean, std, 224
    want = open_clip.image_transform(224, is_train=False, mean=mean, std=std)(image)
    assert torch.equal(backbone.transform(image), want)
    backbone.resize = 256  # the paper's
    steps = [
        transforms.Resize(256, transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(224),
        transforms.ToTensor(),
        transforms.Normalize(mean, std),
    ]
    assert torch.equal(backbone.transform(image), transforms.Compose(steps)(image))


def test_the_training_transform_crops_and_flips_at_random_but_fixed_by_its_generator(backbone):
    backbone.size, backbone.resize, backbone.flip, backbone.mean, backbone.std = (
        24,
        32,
        True,
        (0,) * 3,
        (1,) * 3,
    )
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 40, 3), dtype=np.uint8))
    whole = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    places = {}
    for top, left in itertools.product(range(9), range(17)):
        crop = whole[:, top : top + 24, left : left + 24]
        places |= {(top, left, False): crop, (top, left, True): crop.flip(2)}
    found = set()
    for seed in range(40):
        got = backbone.transform(image, np.random.default_rng(seed))
        assert torch.equal(got, backbone.transform(image, np.random.default_rng(seed)))
        found |= {place for place, crop in places.items() if torch.equal(got, crop)}
    assert len(found) > 30 and {flipped for _, _, flipped in found} == {False, True}


# --- features, classes, routing vectors


def test_features_and_scores_are_open_clips_own(backbone, records, weights):
    """Features are the post-LN CLS tokens; relevance and the DPP take them before the projection."""
    clean, tokenizer = glyph.create(weights)
    seen = []
    clean.visual.ln_post.register_forward_hook(lambda module, inputs, output: seen.append(output))
    images = pixels(backbone, records)
    want = logits(clean, tokenizer, images, records[0]["choices"])
    got = backbone.features(records)
    assert got.shape == (len(records), 160) and backbone.width == 160
    assert np.allclose(got, seen[0][:, 0].detach(), atol=1e-5)
    with torch.no_grad():
        projected = clean.encode_image(images)
    assert torch.allclose(torch.from_numpy(got) @ backbone.projection, projected, atol=1e-4)
    assert np.allclose(scores(backbone, backbone.model, records), want, atol=1e-3)


def test_a_class_prompt_is_encoded_once_and_kept(backbone, tmp_path):
    names = ["latin small letter a", "digit one", "greek small letter pi"]
    (tmp_path / "classes.json").write_text(json.dumps(names[:2]))
    assert backbone.public_classes(tmp_path) == names[:2]
    want = backbone.text_features(names[1:])
    assert torch.allclose(want.norm(dim=1), torch.ones(2)) and list(backbone.class_features) == names
    kept = load_file(tmp_path / "classes.safetensors")["features"]
    assert torch.equal(kept[1], want[0])
    # a later stage takes them from the file
    save_file({"features": kept + 1}, tmp_path / "classes.safetensors")
    backbone.class_features = {}
    backbone.public_classes(tmp_path)
    assert torch.equal(backbone.text_features(["digit one"])[0], want[0] + 1)


def test_routing_vectors_are_means_over_samples_and_tokens(backbone, records):
    model = expert(backbone)
    got = backbone.routing_vectors(model, records * 11)  # more than one batch
    visual, inputs = model.get_base_model().visual, []
    for block in visual.transformer.resblocks:
        block.mlp.register_forward_pre_hook(lambda module, x: inputs.append(x[0]))
    with torch.no_grad():
        visual(pixels(backbone, records))
    assert got.shape == (6, 160)
    assert torch.allclose(got, torch.stack([x.mean((0, 1)) for x in inputs]), atol=1e-4)


# --- experts, the unified model


@pytest.mark.parametrize("optimizer, lr", [("adamw", 0.01), ("sgd", 0.5)])
def test_lora_sits_on_the_visual_ffns_alone_and_training_lowers_the_loss(backbone, records, optimizer, lr):
    frozen = {name: p.clone() for name, p in backbone.model.named_parameters()}
    model = backbone.add_lora(4, 8, 0)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 6 * 2 * 2
    assert all(".visual.transformer." in n and (".c_fc." in n or ".c_proj." in n) for n in trained)
    settings = {"steps": 6, "batch_size": 4, "warmup_steps": 0, "optimizer": optimizer, "weight_decay": 0.0}
    settings |= {"seed": 0, "label": "test", "classes": records[0]["choices"]}
    groups = [{"params": list(trained.values()), "lr": lr}]
    losses = training.train(backbone, model, records[:4], groups, **settings)
    assert len(losses) == 6 and losses[-1] < 0.8 * losses[0]
    after = dict(model.named_parameters())
    for name, before in frozen.items():
        key = f"base_model.model.{name}"
        if key not in after:
            key = f"{key.rpartition('.')[0]}.base_layer.{key.rpartition('.')[2]}"
        assert torch.equal(after[key], before)


def test_an_adapter_opens_with_peft_on_the_plain_model(backbone, load, records, weights, tmp_path):
    from peft import PeftModel

    model = expert(backbone)
    model.save_pretrained(tmp_path)
    want = scores(backbone, model, records)
    plain = PeftModel.from_pretrained(glyph.create(weights)[0], tmp_path).eval().get_base_model()
    got = logits(plain, backbone.tokenizer, pixels(backbone, records), records[0]["choices"])
    assert np.allclose(got, want, atol=1e-3)
    seed_model = load()
    assert not np.allclose(want, scores(seed_model, seed_model.model, records), atol=0.1)


def unified(load, folder, seeds):
    """(backbone, the MoE of random experts, the last of these experts)"""
    experts = []
    for seed in seeds:
        model = expert(load(), seed)
        model.save_pretrained(folder / f"{seed}" / "adapter")
        experts.append(uploads.read_expert(folder / f"{seed}"))
    backbone = load()
    vectors = torch.randn(len(seeds), 6, 160, generator=torch.Generator().manual_seed(9))
    return backbone, moe.unify(backbone.model, backbone.ffn_names, experts, vectors), model


def test_equal_experts_in_the_moe_are_that_expert(load, records, tmp_path):
    backbone, merged, alone = unified(load, tmp_path, [3, 3, 3])
    assert np.allclose(scores(backbone, merged, records), scores(backbone, alone, records), atol=1e-3)


def test_an_images_prediction_does_not_depend_on_its_batch(load, records, tmp_path):
    """The context is the mean over an image's own tokens, not over the batch."""
    backbone, merged, _ = unified(load, tmp_path, [1, 2, 3])
    together = scores(backbone, merged, records)
    for record, want in zip(records[:4], together[:4], strict=True):
        assert np.allclose(backbone.scores(merged, [record])[0], want, atol=1e-4)
    assert np.allclose(scores(backbone, merged, records[::-1])[::-1], together, atol=1e-4)


# --- unreadable images


def with_a_cut_image(records, index, folder):
    (folder / "cut.jpg").write_bytes(b"\xff\xd8\xff no image")
    records = [{**record, "choices": ["a"]} for record in records]
    records[index]["image"] = str(folder / "cut.jpg")
    return records


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_images_are_named_and_left_out(backbone, data, tmp_path, workers):
    backbone.workers = workers
    records = with_a_cut_image(data[0][:6], 2, tmp_path)
    ((indices, features),) = backbone.embed(records)
    assert indices == [0, 1, 3, 4, 5] and np.isfinite(features).all() and backbone.seconds > 0
    assert [i for i, _ in backbone.unreadable] == [2] and "cut.jpg" in backbone.unreadable[0][1]
    ((indices, features),) = backbone.embed([records[2]])
    assert indices == [] and features.shape == (0, 160)
    model = backbone.model
    for of in (
        backbone.features,
        lambda r: backbone.scores(model, r),
        lambda r: backbone.routing_vectors(model, r),
    ):
        with pytest.raises(UserError, match="cut.jpg"):
            of(records)


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="other.safetensors.*glyph-clip"):
        backbones.load_backbone("glyph-clip", tmp_path / "other.safetensors", "cpu")


def test_embedding_d0_goes_on_where_a_kill_stopped_it(backbone, data, tmp_path, monkeypatch):
    """What was embedded up to the last note is not embedded again; unreadable images are kept in mind."""
    records = with_a_cut_image(data[0], 3, tmp_path)
    for name in ("whole", "run"):
        (tmp_path / name / "public").mkdir(parents=True)
    whole = embedding.public_features(tmp_path / "whole", backbone, records, "float32")
    embed, clock, skips = backbone.embed, itertools.count(0, 31), []
    # every batch is late enough for a note
    monkeypatch.setattr(embedding.time, "perf_counter", lambda: next(clock))

    def killed(records, label, skip=0, every=1):
        skips.append(skip)
        for number, batch in enumerate(embed(records, label, skip, every, batch=8)):
            if number == 3:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(backbone, "embed", killed)
    public = tmp_path / "run" / "public"
    with pytest.raises(KeyboardInterrupt):
        embedding.public_features(tmp_path / "run", backbone, records, "float32")
    assert not (public / "features.npy").exists()
    noted = read_json(public / ".progress.json")["seconds"]
    got = embedding.public_features(tmp_path / "run", backbone, records, "float32")
    assert skips == [0, 3] and np.allclose(got, whole, atol=1e-5, equal_nan=True)
    assert np.flatnonzero(np.isnan(got[:, 0])).tolist() == [3]
    assert sorted(p.name for p in public.iterdir()) == ["features.npy", "timing.json", "unreadable.json"]
    assert read_json(public / "unreadable.json") == [3]
    assert read_json(public / "timing.json")["embedding_seconds"] >= noted + 31 > 31


# --- the command lines


def done(name, run_dir, *flags):
    result = stage(name, run_dir, *flags)
    assert result.code == 0, result.err
    return result.out


@pytest.mark.slow
def test_the_vision_pipeline_from_proxies_to_the_table(weights, tmp_path):
    run = tmp_path / "run"
    sizes = ["--train-size", 8, "--validation-size", 2, "--test-size", 4, "--public-size", 40]
    new = ["--backbone", "glyph-clip", "--pretrained", weights, *sizes, "--candidates", 20, "--proxies", 4]
    few = ["--epochs", 2, "--batch-size", 8]
    done("select_proxies", run, *new, "--selection", "similarity")
    done("select_proxies", run, "--selection", "dpp")
    done("train_expert", run, *few, "--data", "private", "--selection", "similarity")
    done("train_expert", run, *few)
    for method in ("soup", "btm"):
        done("unify_moe", run, "--method", method)
    trained = ["btx", "flexolmo", "metamoe", "unrestricted"]
    for method in trained:
        done("unify_moe", run, "--method", method, *few)
    done("evaluate", run)
    results = read_json(run / "results.json")
    experts = ["expert-greek", "expert-cyrillic", "expert-armenian"]
    rows = ["unrestricted", "zeroshot", *experts, "btm", "soup", *trained[:3]]
    assert [row["model"] for row in results["rows"]] == rows
    assert results["n"] == {"greek": 4, "cyrillic": 4, "armenian": 4}
    # 2 epochs of 12 proxies in batches of 8, of 24 private samples for the upper bound
    assert [len(read_json(run / "moe" / name / "losses.json")) for name in trained] == [4, 4, 4, 6]
    answers = {record["answer"] for record in read_records(run / "public" / "records.jsonl")}
    assert read_json(run / "public" / "classes.json") == sorted(answers)
    assert np.load(run / "public" / "features.npy").shape == (40, 160)
    assert "skipped" in done("select_proxies", run, "--selection", "dpp")
    assert refused("select_proxies", run, "--data-root", tmp_path).startswith("error: --data-root")


@pytest.mark.slow
def test_the_papers_clip_loads_from_a_checkpoint(open_clip, tmp_path):
    """ViT-B/32 with random weights."""
    clip = open_clip.create_model("ViT-B-32-quickgelu", pretrained=None)
    torch.save(clip.state_dict(), tmp_path / "random.pt")
    backbone = backbones.load_backbone("vit-b-32", tmp_path / "random.pt", "cpu", "float32")
    assert backbone.width == 768 and len(backbone.ffn_names) == 12 and backbone.size == 224
    assert torch.equal(backbone.projection, clip.visual.proj)


@pytest.fixture
def small_vit(open_clip, tmp_path, monkeypatch):
    """Give the backbone vit-b-32 an architecture of two narrow layers; returns a checkpoint of it."""
    config = {"embed_dim": 32, "quick_gelu": True}
    config["vision_cfg"] = {"image_size": 224, "layers": 2, "width": 64, "head_width": 32, "patch_size": 32}
    config["text_cfg"] = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    (tmp_path / "small-vit.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "small-vit.json")
    monkeypatch.setitem(PRESETS["vit-b-32"], "architecture", "small-vit")
    torch.manual_seed(0)
    torch.save(open_clip.create_model("small-vit", pretrained=None).state_dict(), tmp_path / "small.pt")
    return tmp_path / "small.pt"


@pytest.mark.slow
def test_datasets_in_coops_layout_from_folders_to_the_table(small_vit, tmp_path):
    """From JPEGs to the table; one D_0 image is cut off."""
    pets, run = tmp_path / "oxford_pets", tmp_path / "run"
    make_coop(pets, "split_zhou_OxfordPets.json", "images", ["Pug", "Japanese-Chin"], (4, 1, 2))
    names = ["Forest", "SeaLake"]
    make_coop(tmp_path / "eurosat", "split_zhou_EuroSAT.json", "2750", names, (4, 1, 2), nested=True)
    imagenet = tmp_path / "imagenet"
    make_public(imagenet / "train", ("n01440764", "n01443537", "n01484850"), 7)
    classes = "n01440764 tench\nn01443537 goldfish\nn01484850 great white shark\n"
    (imagenet / "classnames.txt").write_text(classes)
    cut = imagenet / "train" / "n01440764" / "n01440764_3.JPEG"
    cut.write_bytes(cut.read_bytes()[:200])
    new = ["--backbone", "vit-b-32", "--pretrained", small_vit, "--clients", "pets", "eurosat"]
    new += ["--data-root", tmp_path, "--public", imagenet, "--candidates", 12, "--proxies", 4]
    few = ["--epochs", 1, "--batch-size", 6]
    out = done("select_proxies", run, *new, "--selection", "dpp")
    assert f"skipped: {cut}" in out and "waiting for decoded images" in out
    features = np.load(run / "public" / "features.npy")
    assert features.shape == (21, 64) and np.isnan(features[:, 0]).sum() == 1
    done("train_expert", run, *few, "--data", "private")
    done("train_expert", run, *few, "--workers", 1)
    done("unify_moe", run, *few, "--method", "metamoe")
    done("evaluate", run, "--models", "zeroshot", "metamoe")
    results = read_json(run / "results.json")
    assert results["n"] == {"pets": 4, "eurosat": 4}
    assert [row["model"] for row in results["rows"]] == ["zeroshot", "metamoe"]
    adapter = run / "clients" / "pets" / "upload" / "aligned-dpp" / "adapter"
    targets = read_json(adapter / "adapter_config.json")["target_modules"]
    assert len(targets) == 4 and all(name.startswith("visual.transformer.resblocks.") for name in targets)
    # a corrupt private image ends the run before anything is written
    (pets / "images" / "train_0.jpg").write_bytes(b"no image")
    assert "train_0.jpg" in refused("select_proxies", tmp_path / "other", *new)
    assert not (tmp_path / "other").exists()
