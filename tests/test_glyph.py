"""The embedded vision default: who may see which characters, what a recipe draws, the seed model's making."""

import itertools
import json
import unicodedata
from collections import Counter

import numpy as np
import pytest
import torch

from metamoe.data.glyphs import model as glyph_model
from metamoe.data.glyphs import pretrain, world
from metamoe.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = {"train": 600, "validation": 150, "test": 300}
TINY = dict(steps=3, batch=4, seed=0, lr=1e-3, warmup=1, log_every=2, checkpoint_every=0)
TINY |= dict(dtype="float32", limit=10)
FAMILY_OF = {face: family for family, faces in world.FAMILIES.items() for face in faces}


@pytest.fixture(scope="module")
def glyphs():
    return world.load_glyphs(list(world.CLIENTS), SIZES, 6000, seed=0)


# --- the clients' scripts, D_0, the parts


def leaks(char):
    """A client's script in a character, by Unicode alone: its name, its decomposition, mathematical Greek."""
    names = [unicodedata.name(c, "") for c in char + unicodedata.normalize("NFKD", char)]
    words = ("GREEK", "COPTIC", "CYRILLIC", "ARMENIAN")
    return 0x1D6A8 <= ord(char) <= 0x1D7CB or any(word in name for name in names for word in words)


def test_the_check_and_the_rule_flag_variants_of_a_clients_script_and_nothing_else():
    for char in "αΩяԱևµΩᵝᵸᶿϐϴϵϢⲀ㎂㎛ℽℼ℩֏𝚨𝛁𝛼𝟊𝟋":  # letters, signs, modifiers, symbols, units, mathematics
        assert leaks(char) and world.script_of(char) in world.CLIENTS, char
    assert [char for char in "AaƔɣאბ١→∀𝐀𝟘½①" if leaks(char) or world.script_of(char)] == []
    assert world.script_of("⍺") == world.script_of("⍵") == "greek"  # symbols named after a Greek letter


def test_no_character_of_the_world_and_no_public_record_has_a_clients_script(glyphs):
    public, chars = glyphs[0], {char for char, _ in world.world()}
    assert [char for char in chars if leaks(char)] == []
    assert not chars & set(itertools.chain.from_iterable(world.CLIENTS.values()))
    assert [record for record in public if leaks(record["image"]["char"])] == []
    text = " ".join(record["answer"] for record in public)
    assert [word for word in ("greek", "cyrillic", "armenian") if word in text] == []


def test_the_world_is_large_and_has_near_duplicates_and_its_characters_are_visible_and_named(glyphs):
    assert len({char for char, _ in world.world()}) > 5000
    sources = {record["source"] for record in glyphs[0]}
    assert {"latin", "georgian", "arabic", "hebrew", "mathematical", "number", "symbol"} <= sources
    letters = Counter((record["image"]["char"], FAMILY_OF[record["image"]["face"]]) for record in glyphs[0])
    # records with another of their letter and family
    assert sum(count for count in letters.values() if count > 1) / 6000 > 0.5
    for char in set().union(*map(world.characters, FAMILY_OF)):
        assert unicodedata.category(char)[0] in "LNPS" and unicodedata.name(char, "")
    pairs = world.world()
    for i in np.random.default_rng(0).permutation(len(pairs))[:500]:
        char, family = pairs[i]
        face = world.faces_of(char, (family,))[0]
        assert np.asarray(world.glyph(char, face)).max() > 60, (char, face)


def test_counts_are_those_asked_for_and_no_recipe_comes_twice(glyphs):
    public, clients = glyphs
    assert len(public) == 6000 and list(clients) == ["greek", "cyrillic", "armenian"]
    for parts in clients.values():
        assert {part: len(records) for part, records in parts.items()} == SIZES
    records = public + [record for client in clients.values() for part in client.values() for record in part]
    assert len({tuple(sorted(record["image"].items())) for record in records}) == len(records)
    empty, few = world.load_glyphs(["greek"], {"train": 0, "validation": 1, "test": 0}, 0, seed=0)
    assert empty == [] and [len(part) for part in few["greek"].values()] == [0, 1, 0]


def test_parts_follow_the_random_seed_and_the_public_set_does_not(glyphs):
    public, clients = glyphs
    again, same = world.load_glyphs(["greek"], SIZES, 6000, seed=0)
    other, different = world.load_glyphs(["greek"], SIZES, 500, seed=1)
    assert again == public and other == public[:500]
    assert same["greek"] == clients["greek"] != different["greek"]


def test_every_letter_is_a_class_and_comes_up_equally_often(glyphs):
    for name, parts in glyphs[1].items():
        choices = [world.caption(char) for char in world.CLIENTS[name]]
        assert len(set(choices)) == len(choices) == {"greek": 25, "cyrillic": 32, "armenian": 38}[name]
        for records in parts.values():
            assert all(record["choices"] == choices and record["source"] == name for record in records)
            count = Counter(record["answer"] for record in records)
            assert count.keys() <= set(choices)
            assert max(count.values()) - min(count[choice] for choice in choices) <= 1


def test_letters_are_in_every_face_and_the_test_part_has_families_that_training_has_not(glyphs):
    for name, parts in glyphs[1].items():
        letters, count = world.CLIENTS[name], 4 if name == "armenian" else 8
        assert {world.script_of(char) for char in letters} == {name}
        assert {len(world.faces_of(char, world.TRAIN)) for char in letters} == {8}
        assert {len(world.faces_of(char, world.TEST)) for char in letters} == {count}
        train, validation, test = ({FAMILY_OF[r["image"]["face"]] for r in part} for part in parts.values())
        assert train == validation == set(world.TRAIN) and test and test.isdisjoint(train)


# --- drawing


def test_a_recipe_draws_the_same_image_again_and_another_random_seed_another():
    recipe = {"char": "ß", "face": "DejaVuSerif.ttf", "seed": 17}
    image = world.draw(recipe)
    assert (image.size, image.mode) == ((32, 32), "RGB")
    for same in (dict(recipe), json.loads(json.dumps(recipe))):
        assert world.draw(same).tobytes() == image.tobytes()
    assert world.draw(recipe | {"seed": 18}).tobytes() != image.tobytes()


def papers(records):
    """The colours (N, 3) of the paper, from a corner of each drawing, 0 ... 1."""
    corners = [np.asarray(world.draw(record["image"]), float)[:3, :3] for record in records]
    return np.mean(corners, axis=(1, 2)) / 255


def test_a_client_has_colours_of_its_own_and_the_public_set_all(glyphs):
    public, clients = glyphs
    assert not any("look" in record["image"] for record in public)
    means = []
    for name, client in clients.items():
        records = [*itertools.chain(*client.values())]
        assert {record["image"]["look"] for record in records} == {name}
        mean, (low, high) = papers(records[:40]).mean(0), np.array(world.LOOKS[name][0])
        assert (mean > low - 0.05).all() and (mean < high + 0.05).all()
        means.append(mean)
    assert all(np.abs(a - b).max() > 0.2 for a, b in itertools.combinations(means, 2))
    light = papers(public[:300]).mean(1)
    assert (light < 0.4).mean() > 0.3 and (light > 0.6).mean() > 0.3  # dark paper and light


def test_letters_stay_inside_the_canvas_and_capitals_are_larger_than_small_letters_of_their_shape():
    for char, style in (("Щ", "Sans-Bold"), ("Ǻ", "Sans"), ("⟿", "Sans"), ("ﷺ", "Sans"), ("█", "SansMono")):
        face = f"DejaVu{style}.ttf"
        if char in world.characters(face):
            canvas = np.array(world.glyph(char, face))
            canvas[3:-3, 3:-3] = 0
            assert not canvas.any(), char
    heights = [np.ptp(np.nonzero(np.asarray(world.glyph(char, "DejaVuSans.ttf")))[0]) for char in "Вв"]
    assert heights[0] > 1.25 * heights[1]


def test_missing_fonts_and_weights_are_one_clear_line(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="pretrain.py"):
        glyph_model.create(tmp_path / "model.safetensors")
    monkeypatch.setattr(world.matplotlib, "get_data_path", lambda: str(tmp_path))
    with pytest.raises(UserError, match="DejaVuSans.ttf is missing"):
        world.font_path("DejaVuSans.ttf")


# --- the seed model and its training


@pytest.fixture(scope="module")
def untrained():
    torch.manual_seed(0)
    return glyph_model.create(None)


def test_tokens_say_their_text_again(untrained):
    model, tokenizer = untrained
    for text in ("greek small letter alpha", "latin letter o with stroke", "apl symbol i-beam 2"):
        ids = tokenizer([text])
        assert ids.shape == (1, 64) and tokenizer.decode(ids[0]) == text
        assert ids.argmax() == len(text) + 1 and ids.max() == glyph_model.END == ids[0, len(text) + 1]
    ids = tokenizer(["x" * 200, "É, Ünïcode!", ""])  # long and strange texts keep their end
    assert (ids.argmax(1) > 0).all() and ids[0, -1] == glyph_model.END == model.vocab_size - 1
    assert tokenizer.decode(ids[1]) == " ncode"
    chars = {char for char, _ in world.world()}.union(*world.CLIENTS.values())
    assert set("".join(map(world.caption, chars))) <= set(glyph_model.LETTERS)


def test_the_model_is_small_and_its_loss_the_symmetric_cross_entropy_of_images_and_texts(untrained):
    model, tokenizer = untrained
    count, visual = (sum(p.numel() for p in part.parameters()) for part in (model, model.visual))
    assert 1e6 < visual < 3e6 and 2 * count < 4.9e6
    drawings = [world.draw({"char": "A", "face": "DejaVuSans.ttf", "seed": i}) for i in range(2)]
    images = glyph_model.to_tensor(drawings)
    assert images.shape == (2, 3, 32, 32) and images.dtype == torch.float32 and images.abs().max() <= 1
    assert model.encode_image(images).shape == model.encode_text(tokenizer(["a", "b"])).shape == (2, 128)
    images, ids = torch.randn(3, 3, 32, 32), tokenizer(["a", "bc", "d e"])
    with torch.no_grad():
        loss = pretrain.contrastive_loss(model, images, ids)
        texts = model.encode_text(ids, normalize=True)
        logits = model.logit_scale.exp() * model.encode_image(images, normalize=True) @ texts.T
    expected = -(logits.log_softmax(1).diagonal() + logits.log_softmax(0).diagonal()).mean() / 2
    torch.testing.assert_close(loss, expected)


def test_batches_hold_trained_pairs_alone_and_no_character_twice():
    training, held_out = pretrain.split_world()
    trained = {(char, face) for char, faces in training.items() for face in faces}
    assert len(held_out) > 1000 and trained.isdisjoint(held_out)
    recipes = pretrain.sample_batch(training, 256, seed=0, step=3)
    assert len({recipe["char"] for recipe in recipes}) == 256
    assert {(recipe["char"], recipe["face"]) for recipe in recipes} <= trained
    assert recipes == pretrain.sample_batch(training, 256, seed=0, step=3)
    assert recipes != pretrain.sample_batch(training, 256, seed=0, step=4)


def test_a_few_steps_learn_a_batch_and_write_weights_and_log(tmp_path, monkeypatch):
    (training, held_out), out = pretrain.split_world(), tmp_path / "model.safetensors"
    batch = pretrain.sample_batch(training, 8, seed=0, step=0)
    monkeypatch.setattr(pretrain, "sample_batch", lambda *_: batch)
    log = pretrain.train(out, **TINY | {"steps": 12, "log_every": 4, "checkpoint_every": 600})
    assert log[-1]["loss"] < 0.7 * log[1]["loss"]
    assert [row["step"] for row in log[1:]] == [4, 8, 12]
    assert [json.loads(line) for line in (tmp_path / "pretrain.log").read_text().splitlines()] == log
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "pretrain.log"]
    assert out.stat().st_size <= 5e6
    accuracy = pretrain.zero_shot_accuracy(*glyph_model.create(out), held_out, limit=10)[0]
    assert accuracy == pytest.approx(log[-1]["accuracy"], abs=1e-4)


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    whole, killed = tmp_path / "whole.safetensors", tmp_path / "killed.safetensors"
    log, sample, steps = pretrain.train(whole, **TINY), pretrain.sample_batch, []

    def sample_and_die(training, size, seed, step):
        steps.append(step)
        if steps == [0, 1, 2]:
            raise KeyboardInterrupt
        return sample(training, size, seed, step)

    monkeypatch.setattr(pretrain, "sample_batch", sample_and_die)
    with pytest.raises(KeyboardInterrupt):
        pretrain.train(killed, **TINY)
    assert not killed.exists()
    with pytest.raises(UserError, match="other settings"):
        pretrain.train(killed, **TINY | {"lr": 1e-2})
    resumed = pretrain.train(killed, **TINY)
    assert steps == [0, 1, 2, 2] and killed.read_bytes() == whole.read_bytes()
    assert [row | {"seconds": 0} for row in resumed] == [row | {"seconds": 0} for row in log]


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"batch": 1}, {"batch": 10**6}, {"warmup": 0}])
def test_settings_that_make_no_sense_are_one_clear_line(tmp_path, wrong):
    with pytest.raises(UserError, match="--batch lies between 2 and"):
        pretrain.train(tmp_path / "model.safetensors", **TINY | wrong)


@pytest.mark.slow
def test_the_seed_model_in_the_repository_reads_held_out_images():
    assert glyph_model.WEIGHTS.stat().st_size <= 5e6
    last = json.loads(glyph_model.WEIGHTS.with_name("pretrain.log").read_text().splitlines()[-1])
    accuracy, captions = pretrain.zero_shot_accuracy(*glyph_model.create(), pretrain.split_world()[1])
    assert captions == last["captions"] > 500
    assert accuracy == pytest.approx(last["accuracy"], abs=0.01)  # what its log says
    assert accuracy > 0.5  # chance: about one in a thousand
