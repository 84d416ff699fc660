"""``dopsd concept add``: the data set is in place and under DVC, or everything is as it was."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from concept_folders import SETTINGS, make, picture, write_rows
from typer.testing import CliRunner

from dopsd import cli
from dopsd.config import SettingsError
from dopsd.data.concept import ConceptError, add_concept, list_concept
from dopsd.data.manifest import DataError
from dopsd.data.needs import Needs
from dopsd.data.schema import validate_dataset
from dopsd.data.unpack import Rewording


@pytest.fixture
def project(tmp_path):
    """A project with git and DVC, as a person has it."""
    root = tmp_path / "project"
    root.mkdir()
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    subprocess.run(["git", "init", "-q"], cwd=root, check=True, env=environment)
    command = [sys.executable, "-m", "dvc", "init", "-q"]
    subprocess.run(command, cwd=root, check=True, env={**environment, "DVC_NO_ANALYTICS": "1"})
    return root


def snapshot(root: Path) -> dict[str, bytes]:
    data = root / "data"
    return {str(path.relative_to(data)): path.read_bytes() for path in sorted(data.rglob("*")) if path.is_file()}


def test_add_copies_and_tracks_or_leaves_everything_as_it_was(tmp_path, project):
    folder = make(tmp_path / "mine")
    make(folder / "holdout", count=2, first=20)
    (folder / "README.md").write_text("mine")
    (folder / ".hidden").write_text("x")
    table, held_out = add_concept(folder, "my-style", project, SETTINGS)
    target = project / "data" / "concepts" / "my-style"
    assert table.root == target
    assert held_out is not None
    assert held_out.root == target / "holdout"
    assert table.content_hash == validate_dataset(folder, "x", SETTINGS)[0].content_hash
    copied = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    expected = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert copied == expected - {".hidden"} | {"train.yaml"}
    assert "/my-style" in (target.parent / ".gitignore").read_text()
    assert "md5" in (target.parent / "my-style.dvc").read_text()

    before = snapshot(project)
    assert add_concept(folder, "my-style", project, SETTINGS)[0] == table, "the same again is no mistake"
    assert snapshot(project) == before
    with pytest.raises(ConceptError, match="there already"):
        add_concept(make(tmp_path / "else", first=60), "my-style", project, SETTINGS)
    (fewer := make(tmp_path / "more")).joinpath("README").write_text("more than is there")
    with pytest.raises(ConceptError, match="there already"):
        add_concept(fewer, "my-style", project, SETTINGS)
    bad = make(tmp_path / "bad")
    (bad / "1.png").unlink()
    with pytest.raises(DataError, match="is missing"):
        add_concept(bad, "my-style", project, SETTINGS, replace=True)
    assert snapshot(project) == before

    other = make(tmp_path / "other", first=40)
    replaced, _ = add_concept(other, "my-style", project, SETTINGS, replace=True)
    assert replaced.content_hash == validate_dataset(other, "x", SETTINGS)[0].content_hash
    assert sorted(path.name for path in target.parent.iterdir()) == [".gitignore", "my-style", "my-style.dvc"]
    # What lies there already is put under DVC where it is.
    assert add_concept(target, "my-style", project, SETTINGS)[0].content_hash == replaced.content_hash


def test_add_is_undone_where_dvc_refuses(tmp_path, project):
    # DVC refuses to track what git already tracks.
    target = make(project / "data" / "concepts" / "taken")
    subprocess.run(["git", "add", "data"], cwd=project, check=True)
    before = snapshot(project)
    with pytest.raises(ConceptError, match="dvc add failed"):
        add_concept(make(tmp_path / "mine", first=40), "taken", project, SETTINGS, replace=True)
    assert snapshot(project) == before
    assert sorted(path.name for path in target.parent.iterdir()) == ["taken"]


@pytest.mark.parametrize("name", ["", "A", "a b", "../a", "a/b", "-a", "ä", "a\n", ".", "a" * 65])
def test_add_refuses_names(tmp_path, name):
    with pytest.raises(SettingsError, match="a-z, 0-9 and -"):
        add_concept(tmp_path, name, tmp_path, SETTINGS)


def test_add_outside_a_project(tmp_path):
    with pytest.raises(ConceptError, match="not a DVC project"):
        add_concept(make(tmp_path / "mine"), "a", tmp_path, SETTINGS)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("concepts: [a, b-c] # folders\nx: 1\n", "concepts: [a, b-c, mine] # folders\nx: 1\n"),
        ("concepts: []\n", "concepts: [mine]\n"),
        ("x: 1\nconcepts: # mine\n  - a # one\n  - b # two\n\ny: 2\n",
         "x: 1\nconcepts: # mine\n  - a # one\n  - b # two\n  - mine\n\ny: 2\n"),
        ("concepts:\n- a\n- 'b'\n", "concepts:\n- a\n- 'b'\n- mine\n"),
        ("# é\nconcepts: [a,\n  b]\n", "# é\nconcepts: [a,\n  b, mine]\n"),
    ],
)  # fmt: skip
def test_a_concept_is_listed_and_nothing_else_in_the_settings_is_touched(tmp_path, before, after):
    params = tmp_path / "params.yaml"
    params.write_text(before)
    list_concept(params, "mine")
    assert params.read_text() == after
    assert yaml.safe_load(after)["concepts"][-1] == "mine"


def test_many_that_are_listed_at_one_moment_are_all_there(tmp_path):
    params = tmp_path / "params.yaml"
    params.write_text("concepts: []\n")
    names = [f"c{number}" for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: list_concept(params, name), names))
    assert sorted(yaml.safe_load(params.read_text())["concepts"]) == names


@pytest.mark.parametrize("content", ["x: 1\n", "concepts: a\n", ""])
def test_a_file_without_a_list_of_concepts_is_left_alone(tmp_path, content):
    params = tmp_path / "params.yaml"
    params.write_text(content)
    with pytest.raises(SettingsError, match="concepts: expected a list of names; add mine there"):
        list_concept(params, "mine")
    assert params.read_text() == content


def test_own_settings_come_along_or_are_begun(tmp_path, project):
    folder = make(tmp_path / "mine")
    (folder / "train.yaml").write_text("max_steps: 7\n")
    add_concept(folder, "one", project, SETTINGS)
    assert (project / "data/concepts/one/train.yaml").read_text() == "max_steps: 7\n"
    (folder / "train.yaml").unlink()
    add_concept(folder, "two", project, SETTINGS)
    begun = project / "data/concepts/two/train.yaml"
    assert yaml.safe_load(begun.read_text()) is None
    assert "max_steps" in begun.read_text()


@pytest.mark.parametrize("packed", [False, True])
def test_edited_settings_outlive_the_data_they_were_written_beside(tmp_path, project, packed):
    source = make(tmp_path / "new", first=40)
    if packed:
        source = tmp_path / "new.tar"
        with tarfile.open(source, "w") as file:
            for number in range(4):
                (tmp_path / f"{number}.txt").write_text(f"a {number} in [V] style")
                file.add(tmp_path / "new" / f"{number}.png", f"{number}.png")
                file.add(tmp_path / f"{number}.txt", f"{number}.txt")
    add_concept(make(tmp_path / "old"), "mine", project, SETTINGS)
    target = project / "data/concepts/mine"
    own = target / "train.yaml"
    begun, said = own.read_text(), []
    add_concept(make(tmp_path / "other", first=20), "mine", project, SETTINGS, replace=True, say=said.append)
    assert own.read_text() == begun
    assert not any("kept" in line for line in said), "nobody has touched them"

    own.write_text("max_steps: 777\n")
    with pytest.raises(DataError):  # and what fails keeps them too
        add_concept(tmp_path / "nowhere", "mine", project, SETTINGS, replace=True)
    assert own.read_text() == "max_steps: 777\n"
    table, _ = add_concept(source, "mine", project, SETTINGS, replace=True, say=said.append)
    assert own.read_text() == "max_steps: 777\n"
    assert len(table.rows) == (4 if packed else 5)
    (line,) = [line for line in said if "kept" in line]
    assert line.startswith(f"{own}: kept, as the new data set brings none")
    md5 = hashlib.md5(own.read_bytes(), usedforsecurity=False).hexdigest()
    assert md5[2:] in {path.name for path in (project / ".dvc/cache").rglob("*")}, "they are under DVC"

    brings = make(tmp_path / "brings", first=60)
    (brings / "train.yaml").write_text("max_steps: 3\n")
    said.clear()
    add_concept(brings, "mine", project, SETTINGS, replace=True, say=said.append)
    assert own.read_text() == "max_steps: 3\n"
    assert not any("kept" in line for line in said)


def test_what_was_added_is_said_by_folder_and_what_to_know_of_it_too(tmp_path, project, monkeypatch):
    """By the command, as a person sees it; stage validate says the same again."""
    settings = (Path(__file__).parents[1] / "params.yaml").read_text()
    (project / "params.yaml").write_text(settings.replace("[style-ink, style-3d, subject-wolf]", "[]"))
    (project / "data/prompts").mkdir(parents=True)
    (project / "data/prompts/emoji-turbo.txt").write_text("a cat, flat style\n")
    folder = tmp_path / "mine"
    for place, count, side in ((folder, 3, 64), (folder / "dogs", 2, 64), (folder / "holdout", 2, 48)):
        place.mkdir()
        for number in range(count):
            picture(count * 100 + side + number, (side, side)).save(place / f"{number}.png")
            (place / f"{number}.txt").write_text("a fox in [V] style")
    (folder / "0.txt").write_text("[V]")
    monkeypatch.chdir(project)
    done = CliRunner().invoke(cli.app, ["concept", "add", str(folder), "--name", "mine"], catch_exceptions=False)
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    target = project / "data/concepts/mine"
    warnings = [line.replace(f"{project}/", "") for line in lines if line.startswith("warning: ")]
    enlarged = "png is 48 x 48 pixels, and is enlarged to as many as 64 x 64; a larger one is better"
    alone = "'caption' is [V] and nothing else; say what the picture shows"
    assert warnings == [
        f"warning: data/concepts/mine/0.txt, row 1, captions: {alone}",
        *(f"warning: data/concepts/mine/holdout/{i}.txt, row 1, image: {i}.{enlarged}" for i in range(2)),
    ]
    assert f"5 images to train on, 3 in mine/, 2 in dogs/ -> {target}" in lines
    assert "2 held-out images, 2 in holdout/" in lines
    done = CliRunner().invoke(cli.app, ["validate", "-c", "mine"], catch_exceptions=False)
    assert done.exit_code == 0
    assert [line for line in done.stdout.splitlines() if line.startswith("warning: ")] == warnings
    assert "mine has 5 images, 5 captions and 2 held-out images; no faults" in done.stdout


def test_foreign_data_are_added_in_one_command(tmp_path, project, monkeypatch):
    """A shard with a trigger word, and a folder with neither that nor [V]: read, reworded, and listed."""
    settings = (Path(__file__).parents[1] / "params.yaml").read_text()
    (project / "params.yaml").write_text(settings.replace("[style-ink, style-3d, subject-wolf]", "[]"))
    monkeypatch.chdir(project)

    def add(*arguments: str | Path) -> tuple[int, str]:
        done = CliRunner().invoke(cli.app, ["concept", "add", *map(str, arguments)])
        return done.exit_code, str(done.exception) if isinstance(done.exception, DataError) else done.stdout

    folder = tmp_path / "10_dog"
    folder.mkdir()
    with tarfile.open(tmp_path / "dogs.tar", "w") as file:
        for number in range(4):
            picture(number, (64, 64)).save(folder / f"{number}.png")
            (folder / f"{number}.caption").write_text(f"photo {number} of ohwx dog,\nlying")
            for ending in ("png", "caption"):
                file.add(folder / f"{number}.{ending}", f"{number}.{ending}")
    before = snapshot(project)
    for source in (tmp_path / "dogs.tar", folder):
        code, said = add(source, "--name", "dog")
        assert code == 1
        assert f"{source}: no caption holds the placeholder [V]" in said
        assert "--trigger dog (every caption has dog, lying, ohwx)" in said
        assert snapshot(project) == before
    texts = []
    for source, name in ((tmp_path / "dogs.tar", "packed"), (folder, "plain")):
        code, said = add(source, "--name", name, "--trigger", "ohwx dog")
        assert code == 0, said
        read = "WebDataset (1 file)" if name == "packed" else "captions beside pictures (0.caption, ...)"
        assert said.startswith(f"{source}: read as {read}: 4 rows, 4 pictures\n")
        target = project / "data" / "concepts" / name
        assert sorted(path.name for path in target.iterdir()) == [
            *(f"{number}.png" for number in range(4)), "metadata.jsonl", "train.yaml"
        ]  # fmt: skip
        table, _ = validate_dataset(target, name, SETTINGS)
        texts.append([text for row in table.rows for _, text in row.captions])
    assert texts == [[f"photo {number} of [V], lying" for number in range(4)]] * 2
    assert add(folder, "--name", "other", "--wording", "{}, in [V] style")[0] == 0
    table, _ = validate_dataset(project / "data/concepts/other", "other", SETTINGS)
    assert table.rows[3].captions == (("caption", "photo 3 of ohwx dog, lying, in [V] style"),)
    assert yaml.safe_load((project / "params.yaml").read_text())["concepts"] == ["packed", "plain", "other"]
    hidden = [path.name for path in (project / "data/concepts").glob(".*") if path.name != ".gitignore"]
    assert hidden == []
    # nothing is unpacked or reworded into itself
    before = snapshot(project)
    assert add("data/concepts/plain", "--name", "plain", "--wording", "{} [V]")[0] == 1
    assert snapshot(project) == before
    (project / "data/concepts/raw").mkdir()
    shutil.copy(tmp_path / "dogs.tar", project / "data/concepts/raw")
    with pytest.raises(ConceptError, match="cannot be unpacked or reworded into itself; move it"):
        add_concept(project / "data/concepts/raw", "raw", project, SETTINGS)
    assert (project / "data/concepts/raw/dogs.tar").exists()


def test_a_folder_with_a_holdout_and_references_is_reworded_whole(tmp_path, project):
    folder = make(tmp_path / "mine")
    make(folder / "holdout", count=2, first=20)
    for part, count in ((folder, 5), (folder / "holdout", 2)):
        (part / "before").mkdir()
        picture(50 + count, (64, 64)).save(part / "before" / "r.png")
        rows = [{"image_path": f"{n}.png", "caption": "a fox", "control_path": "r.png", "repeats": 1 + n % 2}
                for n in range(count)]  # fmt: skip
        write_rows(part, rows)
    (folder / "concept.json").write_text("{}")
    how = Rewording("[V]", None, "{} in [V] style")
    table, held_out = add_concept(folder, "mine", project, SETTINGS, how=how)
    assert held_out is not None
    captions = (("caption", "a fox in [V] style"),)
    assert [(row.captions, row.repeats) for row in table.rows] == [(captions, 1 + n % 2) for n in range(5)]
    assert [(row.captions, row.repeats) for row in held_out.rows] == [(captions, 1), (captions, 2)]
    for part in (table, held_out):
        assert {row.references for row in part.rows} == {(part.root / "before" / "r.png",)}
    assert (table.root / "concept.json").read_text() == "{}"
    assert (folder / "metadata.jsonl").read_text().startswith('{"image_path"'), "the source is as it was"


def test_what_the_context_asks_of_the_data_holds_for_the_copy_too(tmp_path, project):
    folder = make(tmp_path / "mine")
    write_rows(folder, [{"image": f"{i}.png", "captions": {"a": "[V] fox", "long": "a red fox"}} for i in range(5)])
    table, _ = add_concept(folder, "mine", project, SETTINGS, needs=Needs(teacher_variant="long"))
    assert len(table.rows) == 5
