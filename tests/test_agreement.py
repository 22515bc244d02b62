"""Fingerprints of the seed model and of D_0: equal for what computes the same, different for all else."""

import random
import shutil

import pytest
import tiny
from safetensors.torch import load_file, save_file

from metamoe import agreement, backbones
from metamoe.errors import UserError
from metamoe.records import read_records, write_records

pytestmark = pytest.mark.usefixtures("one_thread")
SMOL = "smollm2-135m"


def seed_print(folder, dtype="float32"):
    return agreement.seed_fingerprint(backbones.load_backbone(SMOL, str(folder), "cpu", dtype))


def test_a_seed_model_is_the_same_in_every_dtype_and_format(seed_model, tmp_path):
    want = seed_print(seed_model)
    assert seed_print(seed_model, "bfloat16") == want
    shutil.copytree(seed_model, tmp_path / "sharded")
    (tmp_path / "sharded" / "model.safetensors").unlink()
    loaded = backbones.load_backbone(SMOL, str(seed_model), "cpu", "float32")
    loaded.model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert seed_print(tmp_path / "sharded") == want


@pytest.mark.parametrize(
    "change", [lambda t: t * 1.01, lambda t: t.flip(0)], ids=["one weight", "rows in order"]
)
def test_other_weights_of_the_same_shape_are_another_seed_model(seed_model, tmp_path, change):
    want = seed_print(seed_model)
    shutil.copytree(seed_model, tmp_path / "other")
    tensors = load_file(tmp_path / "other" / "model.safetensors")
    key = "model.layers.0.self_attn.q_proj.weight"
    tensors[key] = change(tensors[key])
    save_file(tensors, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    found = seed_print(tmp_path / "other")
    assert found["weights"] != want["weights"] and found["tokenizer"] == want["tokenizer"]


def test_a_clip_has_a_fingerprint_with_its_projection():
    backbone = backbones.load_backbone("glyph-clip", None, "cpu", "float32")
    want = agreement.seed_fingerprint(backbone)
    assert agreement.seed_fingerprint(backbones.load_backbone("glyph-clip", None, "cpu", "bfloat16")) == want
    backbone.projection = backbone.projection + 0.1
    found = agreement.seed_fingerprint(backbone)
    assert found["weights"] != want["weights"] and found["tokenizer"] == want["tokenizer"]


def test_texts_are_compared_in_order_and_whole(tmp_path):
    records = tiny.public_records(random.Random(0), 12)
    want = agreement.public_fingerprint(records)
    assert want["records"] == 12
    write_records(tmp_path / "r.jsonl", records)
    assert agreement.public_fingerprint(read_records(tmp_path / "r.jsonl")) == want
    renamed = [record | {"source": "a copy of it"} for record in records]
    assert agreement.public_fingerprint(renamed) == want
    for other in (
        records[::-1],
        records[1:],
        [*records, records[0]],
        [records[0] | {"answer": " else"}, *records[1:]],
        [records[0] | {"choices": records[0]["choices"][::-1]}, *records[1:]],
    ):
        assert agreement.public_fingerprint(other) != want


def pictures(folder, size=(8, 6)):
    """Records of an image folder."""
    records = []
    for i, name in enumerate(["cat/0.png", "cat/1.png", "dog/in/2.png"]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        tiny.picture(i, size).save(folder / name)
        records.append({"image": str(folder / name), "answer": name[:3], "source": folder.name})
    return records


def test_an_image_tree_is_the_same_wherever_it_lies(tmp_path):
    want = agreement.public_fingerprint(pictures(tmp_path / "a"))
    assert agreement.public_fingerprint(pictures(tmp_path / "deeper" / "b")) == want
    assert agreement.public_fingerprint(pictures(tmp_path / "c", (80, 60))) != want  # other sizes of files
    records = pictures(tmp_path / "d")
    (tmp_path / "d" / "cat" / "1.png").rename(tmp_path / "d" / "cat" / "9.png")
    records[1]["image"] = str(tmp_path / "d" / "cat" / "9.png")
    assert agreement.public_fingerprint(records) != want


def test_rows_of_a_dataset_are_the_same_wherever_it_lies():
    def rows(place, split="train"):
        return [{"image": {"dataset": place, "split": split, "row": i}, "answer": "cat"} for i in range(3)]

    want = agreement.public_fingerprint(rows("/here"))
    assert agreement.public_fingerprint(rows("owner/name")) == want
    assert agreement.public_fingerprint(rows("/here", "test")) != want


def test_the_hash_of_an_agreement_leaves_out_who_takes_part_and_with_how_much():
    run = {"backbone": SMOL, "seed": 0, "clients": ["a"], "proxies": 5, "train_size": 0}
    want = agreement.agreement_hash(run)
    assert agreement.agreement_hash(run | {"clients": ["a", "b"], "train_size": 9}) == want
    for other in ({"seed": 1}, {"proxies": 6}, {"backbone": "glyph-clip"}, {"loss": "text"}):
        assert agreement.agreement_hash(run | other) != want


def test_a_party_is_told_what_differs(seed_model):
    backbone = backbones.load_backbone(SMOL, str(seed_model), "cpu", "float32")
    agreed = agreement.seed_fingerprint(backbone)
    agreement.check_seed_model({"seed_model": agreed}, backbone)
    for part in ("weights", "tokenizer"):
        with pytest.raises(UserError, match=f"{seed_model}.*other {part}"):
            agreement.check_seed_model({"seed_model": agreed | {part: "0" * 64}}, backbone)
    agreement.check_public({"public": {"records": 3, "sha256": "a"}}, {"records": 3, "sha256": "a"})
    for found, say in (
        ({"records": 2, "sha256": "b"}, "2 records"),
        ({"records": 3, "sha256": "b"}, "order"),
    ):
        with pytest.raises(UserError, match=say):
            agreement.check_public({"public": {"records": 3, "sha256": "a"}}, found)
