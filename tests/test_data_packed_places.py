"""What the names of packed files and of the folders in them say: held out, regularisation, kohya's repeats."""

from __future__ import annotations

import pytest
from packed_sets import CAPTIONS, is_as_packed, parquet, refused, rows_of, samples, saved, shard, unpacked

from dopsd.data.folders import says_held_out

HELD_OUT = [
    "test.tar", "test-00000-of-00001.parquet", "validation/x.arrow", "imagenet1k-validation-00.tar",
    "mine-test/data.arrow", "hold-out-0.tar", "holdout/x", "holdout_2.tar", "held_out.tar", "val2017.tar",
    "my_val_set.tar", "a.test.tar", "data/eval/0.tar", "my-dev.parquet", "test_images-1.tar", "valid.tar",
    "TEST.tar", "evaluation.tar", "01testing.tar",
]  # fmt: skip
TRAINED_ON = [
    "train.tar", "contest.tar", "latest-0.tar", "valley.tar", "devil.tar", "evaluated.tar", "hold-0.tar",
    "out-hold.tar", "interval-1.tar", "attestation.parquet", "héval.tar", "data/0.tar", "portfolio.tar",
]  # fmt: skip


@pytest.mark.parametrize("name", HELD_OUT)
def test_a_splits_word_counts_wherever_it_stands(name):
    assert says_held_out(name)
    assert says_held_out(f"some/{name}")


@pytest.mark.parametrize("name", TRAINED_ON)
def test_a_word_that_only_holds_a_splits_word_does_not(name):
    assert not says_held_out(name)


@pytest.mark.parametrize("folder", ["holdout", "val", "test", "hold-out", "my set/test_images", "./Validation"])
def test_members_in_a_folder_that_is_for_testing_are_held_out(tmp_path, folder):
    members = samples(4, key="train/{}") + samples(2, first=20, key=f"{folder}/{{}}")
    found, held_out, said = unpacked(shard(tmp_path / "a.tar", members))
    assert is_as_packed(found, range(4))
    assert is_as_packed(held_out, range(20, 22))
    assert said[0].endswith(f", 2 of them held out as their split's name says (a.tar: {folder}/)")


def test_a_pictures_own_name_says_nothing_of_its_split(tmp_path):
    found, held_out, _ = unpacked(shard(tmp_path / "a.tar", samples(key="x/test-{}")))
    assert is_as_packed(found, range(5))
    assert held_out == []


@pytest.mark.parametrize(
    "names", [("imagenet1k-train-00.tar", "imagenet1k-validation-00.tar"), ("0.tar", "hold-out-0.tar")]
)
def test_shards_whose_split_stands_in_the_middle_of_their_names(tmp_path, names):
    for number, name in enumerate(names):
        shard(tmp_path / "s" / name, samples(4 - 2 * number, first=20 * number))
    found, held_out, said = unpacked(tmp_path / "s")
    assert is_as_packed(found, range(4))
    assert is_as_packed(held_out, range(20, 22))
    assert said[0].endswith(f"held out as their split's name says ({names[1]})")


def test_which_files_were_held_out_is_said_of_saved_folders_and_of_many(tmp_path):
    saved(tmp_path / "all" / "train")
    for number in range(6):
        saved(tmp_path / "all" / f"mine-test-{number}", rows_of(1, first=30 + number))
    found, held_out, said = unpacked(tmp_path / "all")
    assert is_as_packed(found, range(5))
    assert len(held_out) == 6
    named = ", ".join(f"mine-test-{number}/data.arrow" for number in range(4))
    assert said[0].endswith(f"6 of them held out as their split's name says ({named}, and 2 more)")


@pytest.mark.parametrize(
    ("shard_name", "folder", "place"),
    [
        ("a.tar", "reg/1_dog", "a.tar: reg/1_dog/0"),
        ("a.tar", "regularisation images", "a.tar: regularisation images/0"),
        ("a.tar", "class_images", "a.tar: class_images/0"),
        ("reg/a.tar", "x", "reg/a.tar: x/0"),
        ("reg-000.tar", "x", "reg-000.tar: x/0"),
    ],
)
def test_regularisation_pictures_are_refused(tmp_path, shard_name, folder, place):
    shard(tmp_path / "s" / "0.tar", samples(3))
    shard(tmp_path / "s" / shard_name, samples(2, first=20, key=f"{folder}/{{}}"))
    problem = "a name there says regularisation pictures, which nothing here uses; pack it again without, or under"
    assert refused(tmp_path / "s") == f"{tmp_path}/s: {place}: {problem} another name"


def test_regularisation_pictures_in_parquet_are_refused(tmp_path):
    parquet(tmp_path / "s" / "0.parquet")
    parquet(tmp_path / "s" / "reg" / "0.parquet", rows_of(2, first=20))
    assert "/s: reg/0.parquet: a name there says regularisation pictures" in refused(tmp_path / "s")


def test_kohyas_repeats_are_kept(tmp_path):
    members = samples(2, key="img/10_fox/{}") + samples(2, first=20, key="img/1_dog/{}")
    repeats = [repeats for *_, repeats in unpacked(shard(tmp_path / "00_a.tar", members))[0]]
    assert repeats == [10, 10, 1, 1]
    members += [("img/2_cat/0.png", samples(1, first=40)[0][1]), ("img/2_cat/0.json", b'{"repeats": 3, "text": "[V]"}')]
    assert unpacked(shard(tmp_path / "a.tar", members))[0][-1][1:] == ("[V]", 3), "what a row says itself counts"
    assert CAPTIONS[0] in [text for _, text, _ in unpacked(tmp_path / "a.tar")[0]]
    members += samples(1, first=50, key="0_fox/{}")
    assert "a.tar: 0_fox/0: a name there says 0 repeats, so leave it out;" in refused(
        shard(tmp_path / "a.tar", members)
    )
