"""A project whose DVC puts links in the place of files: to its own cache, wherever that is, and to nowhere else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from concept_folders import SETTINGS, make

from dopsd.data.captions import save, uncaptioned
from dopsd.data.concept import ConceptError, add_concept
from dopsd.data.manifest import DataError
from dopsd.data.schema import validate_dataset


def dvc(project: Path, *command: str | Path) -> None:
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1"}
    subprocess.run([sys.executable, "-m", "dvc", *command, "-q"], cwd=project, check=True, env=environment)


@pytest.fixture(params=["symlink", "hardlink", "symlink, shared cache", "symlink, cache that is a link"])
def project(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    root = tmp_path / "project"
    root.mkdir()
    subprocess.run(["git", "init", "-q", "--template="], cwd=root, check=True)
    dvc(root, "init")
    kind, _, cache = request.param.partition(", ")
    (root / ".dvc/config").write_text(f"[cache]\n    type = {kind}\n")
    if cache == "shared cache":
        (root / ".dvc/config.local").write_text("[cache]\n    dir = ../../shared\n    shared = group\n")
    elif cache:
        (tmp_path / "large").mkdir()
        (root / ".dvc/cache").symlink_to(tmp_path / "large")
    return root


def cached(tmp_path: Path) -> dict[str, bytes]:
    """All that any cache below ``tmp_path`` holds."""
    return {str(path): path.read_bytes() for path in tmp_path.rglob("files/md5/*/*") if path.is_file()}


def test_links_into_the_cache_are_read_and_written_over_and_the_cache_stays(
    tmp_path: Path, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(tmp_path / "mine")
    make(folder / "holdout", count=2, first=20)
    table, held_out = add_concept(folder, "mine", project, SETTINGS)
    target = project / "data/concepts/mine"
    assert (table.content_hash, held_out) == (validate_dataset(folder, "x", SETTINGS)[0].content_hash, held_out)
    picture = target / "0.png"
    assert picture.is_symlink() or picture.stat().st_nlink > 1, "DVC made links"

    kept = cached(tmp_path)
    rows = [json.loads(line) for line in (target / "metadata.jsonl").read_text().splitlines()]
    rows[2].pop("captions")
    (target / "metadata.jsonl").unlink()
    (target / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dvc(project, "add", "data/concepts/mine")
    kept |= cached(tmp_path)
    (one,), total = uncaptioned(target)
    assert (one.image, total) == ("2.png", 7)
    assert save(one, {"short": "a late fox in [V] style"})
    assert "a late fox" in (target / "metadata.jsonl").read_text()
    assert cached(tmp_path) == kept, "what is written goes beside the cache, and in the link's place"
    before = add_concept(target, "mine", project, SETTINGS)[0]
    assert before.rows[2].captions == (("short", "a late fox in [V] style"),)

    for path in target.rglob("*.png"):
        path.unlink()
    dvc(project, "checkout")
    assert validate_dataset(target, "mine", SETTINGS)[0].content_hash == before.content_hash
    # and a copy of such a folder, with its links, is a data set like any other for who works in the project
    monkeypatch.chdir(project)
    subprocess.run(["cp", "-a", target, tmp_path / "again"], check=True)
    replaced, _ = add_concept(tmp_path / "again", "mine", project, SETTINGS, replace=True)
    assert replaced.content_hash == before.content_hash


@pytest.mark.parametrize("project", ["symlink"], indirect=True)
def test_any_other_link_that_leaves_is_refused(tmp_path: Path, project: Path) -> None:
    """To a file beside the cache, to what is in the cache and no object, to another's cache."""
    make(make(tmp_path / "mine") / "holdout", count=2, first=20)
    add_concept(tmp_path / "mine", "mine", project, SETTINGS)
    target = project / "data/concepts/mine"
    own = target / "4.png"
    assert own.is_symlink()
    held = own.resolve()
    others = tmp_path / "other/.dvc/cache/files/md5" / held.parent.name / held.name
    beside = held.parents[3] / "beside.png"
    odd = held.with_name("odd.png")
    for place in (others, beside, odd):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(held.read_bytes())
        own.unlink()
        own.symlink_to(place)
        with pytest.raises(DataError, match=r"4\.png: is a link that leaves the folder"):
            validate_dataset(target, "mine", SETTINGS)
        with pytest.raises(DataError, match="is a link that leaves the folder"):
            add_concept(target, "mine", project, SETTINGS)
    own.unlink()
    own.symlink_to(held)
    validate_dataset(target, "mine", SETTINGS)


@pytest.mark.parametrize("project", ["symlink"], indirect=True)
@pytest.mark.parametrize("part", ["", "holdout/"])
@pytest.mark.parametrize("inside", ["", "holdout/"])
def test_a_data_sets_own_configuration_opens_and_hides_nothing(
    tmp_path: Path, project: Path, part: str, inside: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(make(tmp_path / "mine") / "holdout", count=2, first=20)
    add_concept(tmp_path / "mine", "mine", project, SETTINGS)
    target = project / "data/concepts/mine"
    link = target / f"{part}0.png"
    held = link.resolve()
    secret = tmp_path / "secret"
    stolen = secret / "files/md5" / held.parent.name / held.name
    stolen.parent.mkdir(parents=True)
    stolen.write_bytes(held.read_bytes())
    own = target / inside / ".dvc"
    own.mkdir()
    link.unlink()
    link.symlink_to(stolen)
    for work in (tmp_path, project, target, target / "holdout"):
        monkeypatch.chdir(work)
        for line in ("", f"    dir = {secret}\n"):
            (own / "config").write_text(f"[cache]\n{line}")
            with pytest.raises(DataError, match=rf"{target}/{part}0\.png: is a link that leaves the folder") as refused:
                validate_dataset(target, "mine", SETTINGS)
            leaving = [fault.file for fault in refused.value.faults if "a link that leaves" in fault.problem]
            assert set(leaving) == {str(link), str(link.with_name("metadata.jsonl"))}, "that file and its row alone"
    # the project's own cache is read all the same
    link.unlink()
    link.symlink_to(held)
    assert validate_dataset(target, "mine", SETTINGS)[1] is not None


def test_a_change_of_the_cache_is_noticed(tmp_path: Path) -> None:
    (project := tmp_path / "project").mkdir()
    dvc(project, "init", "--no-scm")
    (project / ".dvc/config").write_text("[core]\n    no_scm = true\n[cache]\n    type = symlink\n")
    add_concept(make(tmp_path / "mine"), "mine", project, SETTINGS)
    dvc(project, "cache", "dir", tmp_path / "elsewhere")
    with pytest.raises(DataError, match="is a link that leaves the folder"):
        validate_dataset(project / "data/concepts/mine", "mine", SETTINGS)
    # as a remote, which is how DVC 1 was told
    (project / ".dvc/config").write_text(
        "[core]\n    no_scm = true\n[cache]\n    local = old\n['remote \"old\"']\n    url = cache\n"
    )
    validate_dataset(project / "data/concepts/mine", "mine", SETTINGS)


def _files(project: Path) -> dict[str, tuple[bytes, int, bool]]:
    files = [path for path in (project / "data").rglob("*") if path.is_file()]
    return {str(p): (p.read_bytes(), p.stat().st_mode, p.is_symlink()) for p in [*files, project / "params.yaml"]}


@pytest.mark.parametrize("kind", ["symlink", "hardlink"])
@pytest.mark.parametrize("how", ["fresh", "replace", "in place"])
def test_whatever_fails_after_dvc_has_made_links_all_is_as_before(tmp_path: Path, kind: str, how: str) -> None:
    """The last step fails: the settings have no list to put the name in."""
    (project := tmp_path / "project").mkdir()
    subprocess.run(["git", "init", "-q", "--template="], cwd=project, check=True)
    dvc(project, "init")
    dvc(project, "config", "cache.type", kind)
    (project / "params.yaml").write_text("concepts: none\n")
    add_concept(make(tmp_path / "other", first=40), "other", project, SETTINGS)
    folder = make(tmp_path / "mine" if how != "in place" else project / "data/concepts/mine")
    if how == "replace":
        add_concept(make(tmp_path / "old", first=20), "mine", project, SETTINGS)
    before = _files(project)
    with pytest.raises(ValueError, match="concepts: expected a list of names"):
        add_concept(folder, "mine", project, SETTINGS, how == "replace", listed_in=project / "params.yaml")
    assert _files(project) == before
    names = {path.name for path in (project / "data/concepts").iterdir()}
    assert names == {"other", "other.dvc", ".gitignore"} | {"fresh": set(), "replace": {"mine", "mine.dvc"}}.get(
        how, {"mine"}
    )
    (project / "params.yaml").write_text("concepts: []\n")
    add_concept(folder, "mine", project, SETTINGS, how == "replace", listed_in=project / "params.yaml")


def test_own_settings_that_lead_nowhere_are_not_written_through(tmp_path: Path) -> None:
    """A cache that was emptied: begun settings must not become what the cache has under another content's name."""
    (project := tmp_path / "project").mkdir()
    dvc(project, "init", "--no-scm")
    dvc(project, "config", "cache.type", "symlink")
    add_concept(make(tmp_path / "mine"), "mine", project, SETTINGS)
    target = project / "data/concepts/mine"
    held = (target / "train.yaml").resolve()
    held.unlink()
    with pytest.raises((ConceptError, DataError)):
        add_concept(target, "mine", project, SETTINGS)
    assert not held.exists()
