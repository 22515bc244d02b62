"""The embedded vision default: who may see which characters, what a recipe draws, and the seed model's making."""

import json
import unicodedata
from collections import Counter

import numpy as np
import pytest
import torch

from metamoe.data.glyphs import model as glyph_model
from metamoe.data.glyphs import pretrain, world
from metamoe.errors import UserError

SIZES = {"train": 600, "validation": 150, "test": 300}
FAMILY_OF = {face: family for family, faces in world.FAMILIES.items() for face in faces}


@pytest.fixture(scope="module")
def glyphs():
    return world.load_glyphs(list(world.CLIENTS), SIZES, 6000, seed=0)


def recipe_key(record):
    return tuple(sorted(record["image"].items()))


# --- the clients' scripts and D_0


def leaks(char):
    """A client's script in a character, by Unicode alone: its name, what it decomposes into, the mathematical Greek block."""
    names = [unicodedata.name(c, "") for c in char + unicodedata.normalize("NFKD", char)]
    return 0x1D6A8 <= ord(char) <= 0x1D7CB or any(
        w in name for name in names for w in ("GREEK", "COPTIC", "CYRILLIC", "ARMENIAN")
    )


VARIANTS = "αΩяԱևµΩᵝᵸᶿϐϴϵϢⲀ㎂㎛ℽℼ℩֏𝚨𝛁𝛼𝟊𝟋"  # letters, signs, modifiers, symbols, units, mathematics


@pytest.mark.parametrize("char", VARIANTS)
def test_the_check_and_the_rule_both_flag_variants_of_a_clients_script(char):
    assert leaks(char)
    assert world.script_of(char) in world.CLIENTS


def test_the_rule_keeps_the_rest():
    assert [char for char in "AaƔɣאბ١→∀𝐀𝟘½①" if world.script_of(char) or leaks(char)] == []


def test_symbols_named_after_a_greek_letter_are_greek():
    assert world.script_of("⍺") == world.script_of("⍵") == "greek"


def test_no_character_of_the_world_has_a_clients_script():
    chars = {char for char, _ in world.world()}
    assert [char for char in chars if leaks(char)] == []
    assert not chars & set("".join("".join(letters) for letters in world.CLIENTS.values()))


def test_no_public_record_has_a_clients_script(glyphs):
    public, _ = glyphs
    assert [record for record in public if leaks(record["image"]["char"])] == []
    assert not any(
        word in record["answer"] for record in public for word in ("greek", "cyrillic", "armenian")
    )


def test_the_world_is_large_and_varied(glyphs):
    assert len({char for char, _ in world.world()}) > 5000
    sources = Counter(record["source"] for record in glyphs[0])
    assert {"latin", "georgian", "arabic", "hebrew", "mathematical", "number", "symbol"} <= sources.keys()


def test_characters_are_visible_and_named():
    for face in FAMILY_OF:
        assert all(
            unicodedata.category(char)[0] in "LNPS" and unicodedata.name(char, "")
            for char in world.characters(face)
        )
    pairs = world.world()
    for i in np.random.default_rng(0).permutation(len(pairs))[:500]:
        char, family = pairs[i]
        face = world.faces_of(char, (family,))[0]
        assert np.asarray(world.glyph(char, face)).max() > 60, (char, face)


# --- the parts


def test_counts_are_those_asked_for(glyphs):
    public, clients = glyphs
    assert len(public) == 6000 and list(clients) == ["greek", "cyrillic", "armenian"]
    for parts in clients.values():
        assert {part: len(records) for part, records in parts.items()} == SIZES


def test_every_letter_is_a_class_and_comes_up_equally_often(glyphs):
    for name, parts in glyphs[1].items():
        choices = [world.caption(char) for char in world.CLIENTS[name]]
        assert len(set(choices)) == len(choices) == {"greek": 25, "cyrillic": 32, "armenian": 38}[name]
        for records in parts.values():
            assert all(record["choices"] == choices and record["source"] == name for record in records)
            count = Counter(record["answer"] for record in records)
            assert (
                set(count) <= set(choices)
                and max(count.values()) - min(count[choice] for choice in choices) <= 1
            )


def test_every_client_letter_is_in_every_face_it_needs():
    for name, letters in world.CLIENTS.items():
        assert all(world.script_of(char) == name for char in letters)
        assert {len(world.faces_of(char, world.TRAIN)) for char in letters} == {8}
        assert {len(world.faces_of(char, world.TEST)) for char in letters} == {4 if name == "armenian" else 8}


def test_the_test_part_has_families_that_training_has_not(glyphs):
    for parts in glyphs[1].values():
        families = {
            part: {FAMILY_OF[record["image"]["face"]] for record in records}
            for part, records in parts.items()
        }
        assert families["train"] == families["validation"] == set(world.TRAIN)
        assert families["test"] and families["test"].isdisjoint(families["train"])


def test_no_recipe_comes_twice(glyphs):
    public, clients = glyphs
    records = public + [record for parts in clients.values() for part in parts.values() for record in part]
    assert len({recipe_key(record) for record in records}) == len(records)


def test_parts_follow_the_seed_and_the_public_set_does_not(glyphs):
    public, clients = glyphs
    again, same = world.load_glyphs(["greek"], SIZES, 6000, seed=0)
    other, different = world.load_glyphs(["greek"], SIZES, 500, seed=1)
    assert again == public and other == public[:500]
    assert same["greek"] == clients["greek"] and different["greek"] != clients["greek"]


def test_empty_parts_are_empty():
    public, clients = world.load_glyphs(["greek"], {"train": 0, "validation": 1, "test": 0}, 0, seed=0)
    assert public == [] and [len(records) for records in clients["greek"].values()] == [0, 1, 0]


def test_the_public_set_holds_near_duplicates(glyphs):
    letters = Counter((record["image"]["char"], FAMILY_OF[record["image"]["face"]]) for record in glyphs[0])
    # records with another of their letter and family
    assert sum(count for count in letters.values() if count > 1) / 6000 > 0.5


# --- drawing


def test_a_recipe_draws_the_same_image_again_and_another_seed_another():
    recipe = {"char": "ß", "face": "DejaVuSerif.ttf", "seed": 17}
    image = world.draw(recipe)
    assert (image.size, image.mode) == ((32, 32), "RGB")
    assert (
        image.tobytes() == world.draw(dict(recipe)).tobytes() != world.draw({**recipe, "seed": 18}).tobytes()
    )
    assert image.tobytes() == world.draw(json.loads(json.dumps(recipe))).tobytes()


def test_a_client_has_colours_of_its_own_and_the_public_set_all(glyphs):
    public, clients = glyphs
    assert not any("look" in record["image"] for record in public)
    means = {}
    for name, parts in clients.items():
        records = [record for part in parts.values() for record in part]
        assert all(record["image"]["look"] == name for record in records)
        # paper
        corners = [
            np.asarray(world.draw(record["image"]), float)[:3, :3].mean((0, 1)) / 255
            for record in records[:40]
        ]
        low, high = np.array(world.LOOKS[name][0])
        assert (np.mean(corners, 0) > low - 0.05).all() and (np.mean(corners, 0) < high + 0.05).all()
        means[name] = np.mean(corners, 0)
    assert (
        min(
            np.abs(means[a] - means[b]).max()
            for a, b in (("greek", "cyrillic"), ("greek", "armenian"), ("cyrillic", "armenian"))
        )
        > 0.2
    )
    corners = np.array(
        [np.asarray(world.draw(record["image"]), float)[:3, :3].mean((0, 1)) / 255 for record in public[:300]]
    )
    assert (corners.mean(1) < 0.4).mean() > 0.3 and (
        corners.mean(1) > 0.6
    ).mean() > 0.3  # dark paper and light


def test_letters_stay_inside_the_canvas():
    for char, face in [
        ("Щ", "DejaVuSans-Bold.ttf"),
        ("Ǻ", "DejaVuSans.ttf"),
        ("⟿", "DejaVuSans.ttf"),
        ("ﷺ", "DejaVuSans.ttf"),
        ("█", "DejaVuSansMono.ttf"),
    ]:
        if char in world.characters(face):
            canvas = np.array(world.glyph(char, face))
            canvas[3:-3, 3:-3] = 0
            assert not canvas.any(), char


def test_capital_and_small_letter_of_one_shape_differ_in_size():
    heights = [np.ptp(np.nonzero(np.asarray(world.glyph(char, "DejaVuSans.ttf")))[0]) for char in "Вв"]
    assert heights[0] > 1.25 * heights[1]


def test_a_matplotlib_without_fonts_is_one_clear_line(monkeypatch, tmp_path):
    monkeypatch.setattr(world.matplotlib, "get_data_path", lambda: str(tmp_path))
    with pytest.raises(UserError, match="DejaVuSans.ttf is missing"):
        world.font_path("DejaVuSans.ttf")


# --- model and tokenizer


@pytest.fixture(scope="module")
def untrained():
    torch.manual_seed(0)
    return glyph_model.create(None)


def test_tokens_say_their_text_again(untrained):
    tokenizer = untrained[1]
    for text in (
        "greek small letter alpha",
        "latin capital letter o with stroke",
        "apl functional symbol i-beam 2",
    ):
        ids = tokenizer([text])
        assert ids.shape == (1, 64) and tokenizer.decode(ids[0]) == text
        assert ids.argmax() == len(text) + 1 and ids.max() == glyph_model.END == ids[0, len(text) + 1]


def test_long_and_strange_texts_keep_their_end(untrained):
    ids = untrained[1](["x" * 200, "É, Ünïcode!", ""])
    assert (ids.argmax(1) > 0).all() and ids[0, -1] == glyph_model.END
    assert untrained[1].decode(ids[1]) == " ncode"


def test_the_tokenizer_knows_every_letter_of_every_caption(untrained):
    assert glyph_model.END + 1 == untrained[0].vocab_size
    chars = {char for char, _ in world.world()} | {
        char for letters in world.CLIENTS.values() for char in letters
    }
    assert set("".join(map(world.caption, chars))) <= set(glyph_model.LETTERS)


def test_the_model_is_small(untrained):
    count = sum(parameter.numel() for parameter in untrained[0].parameters())
    visual = sum(parameter.numel() for parameter in untrained[0].visual.parameters())
    assert 1e6 < visual < 3e6 and 2 * count < 4.9e6


def test_images_and_texts_land_in_one_space(untrained):
    model, tokenizer = untrained
    images = glyph_model.to_tensor(
        [world.draw({"char": "A", "face": "DejaVuSans.ttf", "seed": i}) for i in range(2)]
    )
    assert (
        images.shape == (2, 3, 32, 32)
        and images.dtype == torch.float32
        and images.min() >= -1
        and images.max() <= 1
    )
    assert model.encode_image(images).shape == model.encode_text(tokenizer(["a", "b"])).shape == (2, 128)


def test_missing_weights_are_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="pretrain.py"):
        glyph_model.create(tmp_path / "model.safetensors")


# --- pre-training

TINY = {
    "steps": 3,
    "batch": 4,
    "seed": 0,
    "lr": 1e-3,
    "warmup": 1,
    "log_every": 2,
    "checkpoint_every": 0,
    "dtype": "float32",
    "limit": 10,
}


def test_batches_hold_trained_pairs_alone_and_no_character_twice():
    training, held_out = pretrain.split_world()
    trained = {(char, face) for char, faces in training.items() for face in faces}
    assert len(held_out) > 1000 and trained.isdisjoint(held_out)
    recipes = pretrain.sample_batch(training, 256, seed=0, step=3)
    assert len({recipe["char"] for recipe in recipes}) == 256
    assert {(recipe["char"], recipe["face"]) for recipe in recipes} <= trained
    assert (
        recipes
        == pretrain.sample_batch(training, 256, seed=0, step=3)
        != pretrain.sample_batch(training, 256, seed=0, step=4)
    )


def test_the_loss_is_the_symmetric_cross_entropy(untrained):
    model, tokenizer = untrained
    images, ids = torch.randn(3, 3, 32, 32), tokenizer(["a", "bc", "d e"])
    with torch.no_grad():
        loss = pretrain.contrastive_loss(model, images, ids)
        logits = (
            model.logit_scale.exp()
            * model.encode_image(images, normalize=True)
            @ model.encode_text(ids, normalize=True).T
        )
        expected = -(logits.log_softmax(1).diagonal() + logits.log_softmax(0).diagonal()).mean() / 2
    torch.testing.assert_close(loss, expected)


def test_a_few_steps_learn_a_batch_and_write_weights_and_log(tmp_path, monkeypatch):
    batch = pretrain.sample_batch(pretrain.split_world()[0], 8, seed=0, step=0)
    monkeypatch.setattr(pretrain, "sample_batch", lambda *_: batch)
    log = pretrain.train(
        tmp_path / "model.safetensors", **{**TINY, "steps": 12, "log_every": 4, "checkpoint_every": 600}
    )
    assert log[-1]["loss"] < 0.7 * log[1]["loss"]
    assert [row["step"] for row in log[1:]] == [4, 8, 12]
    assert [json.loads(line) for line in (tmp_path / "pretrain.log").read_text().splitlines()] == log
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "pretrain.log"]
    assert (tmp_path / "model.safetensors").stat().st_size <= 5e6
    model, tokenizer = glyph_model.create(tmp_path / "model.safetensors")
    assert pretrain.zero_shot_accuracy(model, tokenizer, pretrain.split_world()[1], limit=10)[
        0
    ] == pytest.approx(log[-1]["accuracy"], abs=1e-4)


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    whole, killed = tmp_path / "whole" / "model.safetensors", tmp_path / "killed" / "model.safetensors"
    for out in (whole, killed):
        out.parent.mkdir()
    log = pretrain.train(whole, **TINY)
    sample = pretrain.sample_batch

    def sample_and_die(training, size, seed, step):
        if step == 2:
            raise KeyboardInterrupt
        return sample(training, size, seed, step)

    monkeypatch.setattr(pretrain, "sample_batch", sample_and_die)
    with pytest.raises(KeyboardInterrupt):
        pretrain.train(killed, **TINY)
    assert not killed.exists()
    with pytest.raises(UserError, match="other settings"):
        pretrain.train(killed, **{**TINY, "lr": 1e-2})
    steps = []
    monkeypatch.setattr(
        pretrain, "sample_batch", lambda *arguments: steps.append(arguments[-1]) or sample(*arguments)
    )
    resumed = pretrain.train(killed, **TINY)
    assert steps == [2] and killed.read_bytes() == whole.read_bytes()
    strip = [[{**row, "seconds": 0} for row in rows] for rows in (log, resumed)]
    assert strip[0] == strip[1]


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"batch": 1}, {"batch": 10**6}, {"warmup": 0}])
def test_settings_that_make_no_sense_are_one_clear_line(tmp_path, wrong):
    with pytest.raises(UserError, match="--batch lies between 2 and"):
        pretrain.train(tmp_path / "model.safetensors", **{**TINY, **wrong})


def test_the_seed_model_in_the_repository_reads_held_out_images():
    assert glyph_model.WEIGHTS.stat().st_size <= 5e6
    rows = [
        json.loads(line) for line in glyph_model.WEIGHTS.with_name("pretrain.log").read_text().splitlines()
    ]
    model, tokenizer = glyph_model.create()
    accuracy, captions = pretrain.zero_shot_accuracy(model, tokenizer, pretrain.split_world()[1])
    assert captions == rows[-1]["captions"] > 500
    assert accuracy == pytest.approx(rows[-1]["accuracy"], abs=0.01)  # what its log says
    assert accuracy > 0.5  # chance: about one in a thousand
