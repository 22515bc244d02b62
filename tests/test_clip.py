"""The CLIP backbone against open_clip and PyTorch written out, and the vision pipeline's command lines."""

import itertools
import json
import re
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import make_coop, make_public, refused, stage

import moe
from metamoe import agreement, backbones, uploads
from metamoe.backbones import base, embedding, training
from metamoe.data.glyphs import model as glyph
from metamoe.data.glyphs import world
from metamoe.errors import UserError
from metamoe.presets import PRESETS
from metamoe.records import read_records
from metamoe.rundir import read_json

base.import_transformers()  # mends torchvision first, where it does not fit torch
import open_clip  # noqa: E402
from torchvision import transforms  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
PUBLIC, GREEK = world.load_glyphs(["greek"], {"train": 12, "validation": 1, "test": 1}, 40, seed=0)
RECORDS = GREEK["greek"]["train"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A checkpoint of the small CLIP with random weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("glyph") / "random.safetensors"
    save_file(glyph.create(weights=None)[0].state_dict(), path)
    return path


def load(weights):
    return backbones.load_backbone("glyph-clip", weights, "cpu", "float32")


@pytest.fixture
def backbone(weights):
    return load(weights)


def pixels(backbone):
    return torch.stack([backbone.transform(world.draw(record["image"])) for record in RECORDS])


def noise(height, width):
    """The same random image for everybody."""
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def expert(backbone, seed=0):
    """A PEFT model whose LoRA factors are all random."""
    model = backbone.add_lora(4, 8, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def scores(backbone, model, records=RECORDS):
    return np.stack(backbone.scores(model, records))


@torch.no_grad()
def logits(clip, tokenizer, images):
    """open_clip's own."""
    texts = clip.encode_text(tokenizer(RECORDS[0]["choices"]), normalize=True)
    return (clip.logit_scale.exp() * clip.encode_image(images, normalize=True) @ texts.T).numpy()


@pytest.mark.parametrize("size", [(300, 400), (500, 260), (224, 224), (256, 999)])
def test_the_test_transform_is_open_clips(backbone, size):
    """With its own resize, which takes the shorter side to the crop's size, pixel by pixel."""
    image, mean, std = noise(*size), open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    vars(backbone).update(size=224, mean=mean, std=std, resize=224)
    want = open_clip.image_transform(224, is_train=False, mean=mean, std=std)(image)
    assert torch.equal(backbone.transform(image), want)
    backbone.resize = 256  # the paper's
    steps = [transforms.Resize(256, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(224)]
    steps += [transforms.ToTensor(), transforms.Normalize(mean, std)]
    assert torch.equal(backbone.transform(image), transforms.Compose(steps)(image))


def test_the_training_transform_crops_and_flips_at_random_but_fixed_by_its_generator(backbone):
    vars(backbone).update(size=24, resize=32, flip=True, mean=(0,) * 3, std=(1,) * 3)
    image, places, found = noise(32, 40), {}, set()
    whole = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    for top, left in itertools.product(range(9), range(17)):
        crop = whole[:, top : top + 24, left : left + 24]
        places |= {(top, left, False): crop, (top, left, True): crop.flip(2)}
    for seed in range(40):
        got = backbone.transform(image, np.random.default_rng(seed))
        assert torch.equal(got, backbone.transform(image, np.random.default_rng(seed)))
        found |= {place for place, crop in places.items() if torch.equal(got, crop)}
    assert len(found) > 30 and {flipped for _, _, flipped in found} == {False, True}


def test_features_and_scores_are_open_clips_own(backbone, weights):
    """Features are the post-LN CLS tokens; relevance and the DPP take them before the projection."""
    clean, tokenizer = glyph.create(weights)
    seen, images = [], pixels(backbone)
    clean.visual.ln_post.register_forward_hook(lambda module, inputs, output: seen.append(output))
    want = logits(clean, tokenizer, images)
    got = backbone.features(RECORDS)
    assert got.shape == (len(RECORDS), 160) and backbone.width == 160
    assert np.allclose(got, seen[0][:, 0].detach(), atol=1e-5)
    with torch.no_grad():
        projected = clean.encode_image(images)
    assert torch.allclose(torch.from_numpy(got) @ backbone.projection, projected, atol=1e-4)
    assert np.allclose(scores(backbone, backbone.model), want, atol=1e-3)


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
    (tmp_path / "classes.safetensors.json").unlink()  # its hash, by which a damaged file is noticed
    backbone.class_features = {}
    backbone.public_classes(tmp_path)
    assert torch.equal(backbone.text_features(["digit one"])[0], want[0] + 1)


def test_routing_vectors_are_means_over_samples_and_tokens(backbone):
    model = expert(backbone)
    got = backbone.routing_vectors(model, RECORDS * 11)  # more than one batch
    visual, inputs = model.get_base_model().visual, []
    for block in visual.transformer.resblocks:
        block.mlp.register_forward_pre_hook(lambda module, x: inputs.append(x[0]))
    with torch.no_grad():
        visual(pixels(backbone))
    assert got.shape == (6, 160)
    assert torch.allclose(got, torch.stack([x.mean((0, 1)) for x in inputs]), atol=1e-4)


@pytest.mark.parametrize("optimizer, lr", [("adamw", 0.01), ("sgd", 0.5)])
def test_lora_sits_on_the_visual_ffns_alone_and_training_lowers_the_loss(backbone, optimizer, lr):
    frozen = [(p, p.clone()) for p in backbone.model.parameters()]
    model = backbone.add_lora(4, 8, 0)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 6 * 2 * 2
    assert all(".visual.transformer." in n and (".c_fc." in n or ".c_proj." in n) for n in trained)
    settings = {"steps": 6, "batch_size": 4, "warmup_steps": 0, "optimizer": optimizer, "weight_decay": 0.0}
    settings |= {"seed": 0, "label": "test", "classes": RECORDS[0]["choices"]}
    groups = [{"params": list(trained.values()), "lr": lr}]
    losses = training.train(backbone, model, RECORDS[:4], groups, **settings)
    assert len(losses) == 6 and losses[-1] < 0.8 * losses[0]
    kept = set(model.parameters())
    assert all(parameter in kept and torch.equal(parameter, before) for parameter, before in frozen)


def test_an_adapter_opens_with_peft_on_the_plain_model(backbone, weights, tmp_path):
    from peft import PeftModel

    model, seed_model = expert(backbone), load(weights)
    model.save_pretrained(tmp_path)
    want = scores(backbone, model)
    plain = PeftModel.from_pretrained(glyph.create(weights)[0], tmp_path).eval().get_base_model()
    assert np.allclose(logits(plain, backbone.tokenizer, pixels(backbone)), want, atol=1e-3)
    assert not np.allclose(want, scores(seed_model, seed_model.model), atol=0.1)


def test_equal_experts_are_that_expert_in_the_moe_and_no_prediction_depends_on_its_batch(weights, tmp_path):
    """The context is the mean over an image's own tokens, not over the batch."""
    experts, vectors = [], torch.randn(3, 6, 160, generator=torch.Generator().manual_seed(9))
    for seed in range(3):
        model = expert(load(weights), seed)
        model.save_pretrained(tmp_path / f"{seed}" / "adapter")
        experts.append(uploads.read_expert(tmp_path / f"{seed}"))
    equal, other = load(weights), load(weights)
    merged = moe.unify(equal.model, equal.ffn_names, experts[2:] * 3, vectors)
    assert np.allclose(scores(equal, merged), scores(equal, model), atol=1e-3)
    merged = moe.unify(other.model, other.ffn_names, experts, vectors)
    together = scores(other, merged)
    for record, want in zip(RECORDS[:4], together[:4], strict=True):
        assert np.allclose(scores(other, merged, [record])[0], want, atol=1e-4)
    assert np.allclose(scores(other, merged, RECORDS[::-1])[::-1], together, atol=1e-4)


def with_a_cut_image(records, index, folder):
    (folder / "cut.jpg").write_bytes(b"\xff\xd8\xff no image")
    records = [{**record, "choices": ["a"]} for record in records]
    records[index]["image"] = str(folder / "cut.jpg")
    return records


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_images_are_named_and_left_out(backbone, tmp_path, workers):
    backbone.workers = workers
    records = with_a_cut_image(PUBLIC[:6], 2, tmp_path)
    ((indices, features),) = backbone.embed(records)
    assert indices == [0, 1, 3, 4, 5] and np.isfinite(features).all() and backbone.seconds > 0
    assert [i for i, _ in backbone.unreadable] == [2] and "cut.jpg" in backbone.unreadable[0][1]
    ((indices, features),) = backbone.embed([records[2]])
    assert indices == [] and features.shape == (0, 160)
    with_model = [partial(read, backbone.model) for read in (backbone.scores, backbone.routing_vectors)]
    for read in (backbone.features, *with_model):
        with pytest.raises(UserError, match="cut.jpg"):
            read(records)


def test_embedding_d0_goes_on_where_a_kill_stopped_it(backbone, tmp_path, monkeypatch):
    """What was embedded up to the last note is not embedded again; unreadable images are kept in mind."""
    records, public = with_a_cut_image(PUBLIC, 3, tmp_path), tmp_path / "run" / "public"
    for folder in (tmp_path / "whole" / "public", public):
        folder.mkdir(parents=True)
    whole = embedding.public_features(tmp_path / "whole", backbone, records)
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
    with pytest.raises(KeyboardInterrupt):
        embedding.public_features(tmp_path / "run", backbone, records)
    assert not (public / "features.npy").exists()
    noted = read_json(public / ".progress.json")["seconds"]
    got = embedding.public_features(tmp_path / "run", backbone, records)
    assert skips == [0, 3] and np.allclose(got, whole, atol=1e-5, equal_nan=True)
    assert np.flatnonzero(np.isnan(got[:, 0])).tolist() == [3]
    assert sorted(p.name for p in public.iterdir()) == [
        "features.npy",
        "features.npy.json",
        "timing.json",
        "unreadable.json",
    ]
    assert read_json(public / "unreadable.json") == [3]
    assert read_json(public / "timing.json")["embedding_seconds"] >= noted + 31 > 31


# --- the command lines


def done(name, run_dir, *flags):
    result = stage(name, run_dir, *flags)
    assert result.code == 0, result.err
    return result.out


@pytest.mark.slow
def test_the_vision_pipeline_from_proxies_to_the_table(weights, tmp_path):
    run, few = tmp_path / "run", ["--epochs", 2, "--batch-size", 8]
    sizes = ["--train-size", 8, "--validation-size", 2, "--test-size", 4, "--public-size", 40]
    new = ["--backbone", "glyph-clip", "--pretrained", weights, *sizes, "--candidates", 20, "--proxies", 4]
    done("select_proxies", run, *new, "--selection", "similarity")
    done("select_proxies", run, "--selection", "dpp")
    done("train_expert", run, *few, "--data", "private", "--selection", "similarity")
    done("train_expert", run, *few)
    trained = ["btx", "flexolmo", "metamoe", "unrestricted"]
    for method, *flags in (["soup"], ["btm"], *([method, *few] for method in trained)):
        done("unify_moe", run, "--method", method, *flags)
    done("evaluate", run)
    done("evaluate", run, "--audit", "--canaries", 2)
    audit = read_json(run / "privacy.json")
    assert set(audit["membership"]) == {"seed model", "expert", "unified model"} and not audit["extraction"]
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


def test_checkpoints_of_the_papers_clip_and_of_something_else(tmp_path):
    """ViT-B/32 with weights that take no room on disk; then one tensor that is no CLIP."""
    with torch.device("meta"):
        shapes = open_clip.CLIP(**open_clip.get_model_config("ViT-B-32-quickgelu")).state_dict()
    state = {name: torch.zeros(()).expand(t.shape) for name, t in shapes.items()}
    state["visual.proj"] = torch.randn(768, 512)
    torch.save(state, tmp_path / "random.pt")
    backbone = backbones.load_backbone("vit-b-32", tmp_path / "random.pt", "cpu", "float32")
    assert backbone.width == 768 and len(backbone.ffn_names) == 12 and backbone.size == 224
    assert torch.equal(backbone.projection, state["visual.proj"])
    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="other.safetensors.*glyph-clip"):
        backbones.load_backbone("glyph-clip", tmp_path / "other.safetensors", "cpu")


@pytest.mark.parametrize(
    "architecture, say",
    [
        ("ViT-B-33", "close are ViT-B-32"),
        ("RN50", "ResNet"),
        ("ViT-B-16-SigLIP", "timm"),
        ("coca_ViT-B-32", "CoCa"),
        ("hf-hub:laion/CLIP", "none of this name"),
        ("ViT-H-14-quickgelu", "--seed-model openai: is no file"),
        ("ViT-B-32", "--seed-model openai: has quick_gelu True.*take --architecture ViT-B-32-quickgelu"),
    ],
)
def test_an_architecture_that_is_not_the_checkpoints_is_refused(tmp_path, architecture, say):
    flags = ["--backbone", "vit-b-32", "--data-root", tmp_path, "--architecture", architecture]
    assert re.search(say, refused("select_proxies", tmp_path / "run", *flags, watch=tmp_path))
    assert "glyph-clip" in refused("select_proxies", tmp_path / "run", *flags[4:], "--backbone", "glyph-clip")


def add_architecture(folder, name, image_size=224, **changed):
    """Make open_clip know small_vit's architecture with what is `changed`; returns its model_cfg."""
    config = open_clip.get_model_config("small-vit") | changed
    config["vision_cfg"]["image_size"] = image_size
    (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{name}.json")
    return config


def test_a_checkpoint_with_its_configuration_is_run_as_open_clip_runs_it(small_vit, tmp_path):
    """Activation, mean, std and interpolation; as another architecture it is refused."""
    config = {"model_cfg": add_architecture(tmp_path, "small-gelu", quick_gelu=False)}
    config["preprocess_cfg"] = {"mean": [0.5, 0.4, 0.3], "std": 0.2, "interpolation": "bilinear"}
    plain = load_vit(small_vit, "small-vit")
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    small_vit.rename(tmp_path / "open_clip_pytorch_model.bin")
    small_vit = tmp_path / "open_clip_pytorch_model.bin"
    with pytest.raises(UserError, match="has quick_gelu False.*take --architecture small-gelu$"):
        load_vit(small_vit, "small-vit")
    backbone = load_vit(small_vit, "small-gelu")
    clip, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    backbone.resize, image = backbone.size, noise(300, 400)
    assert torch.equal(backbone.transform(image), transform(image))
    with torch.no_grad():
        want = clip.eval().encode_image(transform(image)[None])
        got = backbone.pool(backbone.model, transform(image)[None]) @ backbone.projection
        other = plain.pool(plain.model, transform(image)[None]) @ plain.projection
    assert torch.allclose(got, want, atol=1e-5) and not torch.allclose(other, want, atol=1e-3)
    agreed = {"seed_model": agreement.seed_fingerprint(plain)}
    with pytest.raises(UserError, match="preprocess_cfg"):  # same weights
        agreement.check_seed_model(agreed, backbone)
    config["preprocess_cfg"]["resize_mode"] = "squash"
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="squash"):
        load_vit(small_vit, "small-gelu")


def load_vit(checkpoint, architecture):
    return backbones.load_backbone("vit-b-32", checkpoint, "cpu", "float32", architecture=architecture)


def test_another_image_size_is_resized_in_proportion_and_its_checkpoint_is_told_by_its_shapes(
    small_vit, tmp_path
):
    add_architecture(tmp_path, "small-vit-448", 448, quick_gelu=True)
    torch.save(open_clip.create_model("small-vit-448", pretrained=None).state_dict(), tmp_path / "448.pt")
    with pytest.raises(UserError, match="image_size 448.*take --architecture small-vit-448$"):
        load_vit(tmp_path / "448.pt", "small-vit")
    backbone = load_vit(tmp_path / "448.pt", "small-vit-448")
    assert backbone.transform(noise(600, 700)).shape == (3, 448, 448) and backbone.resize == 512
    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="other.safetensors: its tensors"):
        load_vit(tmp_path / "other.safetensors", "small-vit")


@pytest.mark.slow
def test_datasets_in_coops_layout_from_folders_to_the_table(small_vit, tmp_path, monkeypatch):
    """From JPEGs to the table, with an architecture that run.json names; one D_0 image is cut off."""
    monkeypatch.setitem(PRESETS["vit-b-32"], "architecture", "ViT-B-32-quickgelu")
    pets, run, imagenet = tmp_path / "oxford_pets", tmp_path / "run", tmp_path / "imagenet"
    make_coop(pets, "split_zhou_OxfordPets.json", "images", ["Pug", "Japanese-Chin"], (4, 1, 2))
    names = ["Forest", "SeaLake"]
    make_coop(tmp_path / "eurosat", "split_zhou_EuroSAT.json", "2750", names, (4, 1, 2), nested=True)
    make_public(imagenet / "train", ("n01440764", "n01443537", "n01484850"), 7)
    classes = "n01440764 tench\nn01443537 goldfish\nn01484850 great white shark\n"
    (imagenet / "classnames.txt").write_text(classes)
    cut = imagenet / "train" / "n01440764" / "n01440764_3.JPEG"
    cut.write_bytes(cut.read_bytes()[:200])
    new = ["--backbone", "vit-b-32", "--pretrained", small_vit, "--clients", "pets", "eurosat"]
    new += ["--data-root", tmp_path, "--public", imagenet, "--candidates", 12, "--proxies", 4]
    few = ["--epochs", 1, "--batch-size", 6]
    line = refused("select_proxies", run, *new, watch=tmp_path)
    assert re.search("take --architecture .*small-vit", line)
    new += ["--architecture", "small-vit"]
    out = done("select_proxies", run, *new, "--selection", "dpp")
    assert "small-vit" in refused("select_proxies", run, "--architecture", "ViT-B-32")  # the agreement's
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
