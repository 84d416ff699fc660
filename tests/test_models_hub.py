"""Models from the hub: only what is needed is fetched, once, and each way in which it gives nothing is one line."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from dopsd.models.sources import Source, check_pipeline
from tests.fake_hub import COMMIT, FakeHub, Repository
from tests.model_folders import COMPONENTS, EMOJI, NAME, ROOT, one_line

PATTERNS = ["model_index.json", *(f"{name}/*" for name in COMPONENTS)]
TOKEN = "hf_" + "sEcReT" * 5

_ASK = """
import json, sys, types
from pathlib import Path
package = types.ModuleType("dopsd.models")  # without what the package itself imports
package.__path__ = [sys.argv[1]]
sys.modules["dopsd.models"] = package
from dopsd.models import sources
options = json.loads(sys.argv[2])
try:
    source = sources.locate(options.pop("path"), Path(options.pop("root")), **options)
    files = sorted(p.relative_to(source.folder).as_posix() for p in source.folder.rglob("*") if p.is_file())
    print(json.dumps({"folder": str(source.folder), "name": source.name, "revision": source.revision, "files": files,
        "licence": sources.licence_of(source), "identity": sources.identity(source, Path("nowhere/cache.json")),
        "heavy": [m for m in ("torch", "diffusers", "transformers") if m in sys.modules]}))
except sources.ModelError as error:
    print(json.dumps({"error": str(error)}))
"""


def command(**options: object) -> list[str]:
    return [sys.executable, "-c", _ASK, str(ROOT / "dopsd" / "models"), json.dumps(options)]


@pytest.fixture
def hub():
    with FakeHub({NAME: Repository(files_of_the_hub())}) as hub:
        yield hub


def files_of_the_hub() -> dict[str, bytes]:
    wanted = {p.relative_to(EMOJI).as_posix(): p.read_bytes() for p in EMOJI.rglob("*") if p.is_file()}
    wanted = {name: content for name, content in wanted.items() if not name.startswith("vlm/")}
    more = (
        "transformer/pytorch_model.bin",
        "vae/weights.ckpt",
        "text_encoder/x.pt",
        "tokenizer/code.py",
        "all.safetensors",
    )
    return {
        **wanted,
        "README.md": b"---\nlicense: apache-2.0\n---\nhi\n",
        "assets/a.png": b"x",
        **dict.fromkeys(more, b"x"),
    }


@pytest.fixture
def ask(hub, tmp_path):
    """Locate in a process of its own, as the hub's library reads its settings when it is imported."""

    def ask(path: str = NAME, environment: dict[str, str] | None = None, **options: object) -> dict:
        (tmp_path / "root").mkdir(exist_ok=True)
        done = subprocess.run(
            command(path=path, root=str(tmp_path / "root"), patterns=PATTERNS, **options),
            cwd=ROOT, env=hub.environment(tmp_path / "home", HF_HUB_DISABLE_PROGRESS_BARS="1", **environment or {}),
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert TOKEN not in done.stdout
        assert done.stderr == "", "the library's own notes are not shown"
        answer = json.loads(done.stdout)
        if "error" in answer:
            one_line(answer["error"], "model.path" if path == NAME else path)
        return answer

    return ask


def test_needed_files_are_fetched_once_and_then_come_from_the_cache(hub, ask):
    answer = ask(environment={"HF_TOKEN": TOKEN})
    needed = {name for name in hub.repositories[NAME].files if name.split("/")[0] in COMPONENTS}
    needed = {name for name in needed if not name.endswith((".bin", ".ckpt", ".pt", ".py"))}
    needed |= {"model_index.json", "README.md"}
    assert set(answer["files"]) == hub.fetched() == needed
    assert (answer["name"], answer["revision"], answer["licence"]) == (NAME, COMMIT, "apache-2.0")
    assert answer["identity"]["transformer"] == f"{NAME}@{COMMIT}/transformer"
    assert answer["heavy"] == []
    assert hub.tokens == {f"Bearer {TOKEN}"}, "the library brings its own token"
    check_pipeline(Source(Path(answer["folder"]), NAME, COMMIT), "ZImagePipeline", COMPONENTS)

    hub.requests.clear()
    assert ask(revision=COMMIT) == answer
    assert hub.requests == [], "a commit that is in the cache is known without asking"
    assert ask(revision="v1") == answer
    assert hub.requests
    assert not hub.fetched()

    (Path(answer["folder"]) / "vae" / "config.json").unlink()
    assert ask(revision=COMMIT) == answer, "what is missing of a commit is fetched"
    hub.stop()
    assert ask() == ask(revision=COMMIT) == ask(revision="v1") == answer
    assert ask(environment={"HF_HUB_OFFLINE": "1"}) == answer
    (Path(answer["folder"]) / "README.md").unlink()
    assert ask()["files"] == sorted(needed - {"README.md"}), "a missing README.md stops nobody without network"
    (Path(answer["folder"]) / "vae" / "config.json").unlink()
    one_line(ask()["error"], "not all", "cannot be reached", f"`hf download {NAME} --local-dir DIR`")


def test_single_files_of_others_in_the_cache_are_no_model(hub, ask, tmp_path):
    folder = tmp_path / "home" / "hub" / f"models--{NAME.replace('/', '--')}" / "snapshots" / COMMIT
    (folder / "vae").mkdir(parents=True)
    (folder / "vae" / "config.json").write_text("{}")
    assert "model_index.json" in ask(revision=COMMIT)["files"]


def test_a_folder_of_the_hubs_name_comes_first(hub, ask, tmp_path):
    (tmp_path / "root" / NAME).mkdir(parents=True)
    assert ask()["name"] is None
    assert hub.requests == []
    sibling = NAME.replace("Turbo", "Base")
    one_line(ask(sibling)["error"], "revision")
    assert hub.requests == [], "a misspelt folder is no question to the hub"
    hub.repositories[sibling] = hub.repositories[NAME]
    assert ask(sibling, revision="main")["name"] == sibling


@pytest.mark.parametrize(
    ("change", "environment", "words"),
    [
        ({"gated": "files"}, {}, ("gated", "licence", "its page on the hub", "`hf auth login`")),
        ({"gated": "files"}, {"HF_TOKEN": TOKEN}, ("gated", "`hf auth login`")),
        ({"gated": "all"}, {}, ("gated", "`hf auth login`")),
        ({"gated": "all"}, {"HF_TOKEN": TOKEN}, ("gated", "`hf auth login`")),
        ({"answer": 401}, {"HF_TOKEN": TOKEN}, ("valid token", "`hf auth login`", "HF_TOKEN")),
        ({"answer": 403}, {"HF_TOKEN": TOKEN}, ("licence", "`hf auth login`")),
        ({"answer": 404}, {}, ("404",)),
        ({"answer": 500}, {}, ("(500)", "try later", "`hf download")),
        ({"answer": 429}, {}, ("(429)", "try later")),
        ({"revisions": ()}, {}, ("no revision 'v1'", "branch, a tag or a full commit")),
        ({"files": {"other.gguf": b"x"}}, {}, ("none of the files",)),
        ({}, {"HF_HUB_OFFLINE": "1"}, ("HF_HUB_OFFLINE", "--revision v1 --local-dir DIR`", "set model.path to DIR")),
        ({}, {"HF_ENDPOINT": "http://127.0.0.1:9"}, ("cannot be reached", "set model.path to DIR")),
        ({}, {"HF_ENDPOINT": "http://no-such-host.invalid"}, ("cannot be reached", "--revision v1 --local-dir DIR`")),
        ({}, {"HF_TOKEN": TOKEN + "é"}, ("hf download",)),
        ({}, {"HF_HOME": "/proc/none"}, ("HF_HOME",)),
    ],
)  # fmt: skip
def test_a_hub_that_gives_nothing_is_one_line(hub, ask, change, environment, words):
    for name, value in change.items():
        setattr(hub.repositories[NAME], name, value)
    one_line(ask(revision="v1", environment=environment)["error"], NAME, *words)


def test_a_download_that_breaks_off_is_one_line_and_goes_on_later(hub, ask):
    hub.repositories[NAME].breaks = "vae/config.json"
    one_line(ask()["error"], "broke off", "run again, what was fetched is kept")
    had = hub.fetched() - {"vae/config.json"}
    hub.repositories[NAME].breaks = ""
    hub.requests.clear()
    assert "vae/config.json" in ask()["files"]
    assert not hub.fetched() & had


def test_a_name_that_the_hub_does_not_know_is_one_line(ask):
    words = ("models/foo", "no such folder here", "no such model on the hub", "spelling", "`hf auth login`")
    one_line(ask("models/foo")["error"], "not open to this machine", *words)
    one_line(ask("models/foo", environment={"HF_TOKEN": TOKEN})["error"], *words)
    one_line(ask("o/" + "x" * 120)["error"], "not a name that the hub allows")


def test_the_bar_is_seen_though_the_librarys_own_are_off(hub, tmp_path):
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    environment = hub.environment(tmp_path / "home", HF_HUB_DISABLE_PROGRESS_BARS="1")
    asked = command(path=NAME, root=str(tmp_path), patterns=PATTERNS)
    process = subprocess.Popen(asked, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 65536):
            shown += chunk
    except OSError:
        pass  # so a terminal ends whose other side is closed
    finally:
        os.close(ours)
    assert process.wait(60) == 0
    assert b"Fetching" in shown
    assert b"100%" in shown
    assert b"Traceback" not in shown


def test_flows_try_again_where_the_hub_was_away_and_not_where_it_said_no():
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    from prefect.states import Failed

    from dopsd.models.folder import HubAway, ModelError
    from dopsd.models.hub import _away
    from flows.train import is_infrastructure

    class Answer:
        def __init__(self, status: int) -> None:
            self.status_code, self.headers, self.request = status, {}, None

    def http(status: int) -> HfHubHTTPError:
        return HfHubHTTPError("x", response=Answer(status))  # type: ignore[arg-type]

    assert [_away(error) for error in (ConnectionError(), http(503), http(404), OfflineModeIsEnabled())] == [
        True, True, False, False,
    ]  # fmt: skip
    assert not _away(OSError(28, "No space left on device"))
    tried = [is_infrastructure(None, None, Failed(data=kind("x"))) for kind in (HubAway, ModelError)]
    assert tried == [True, False]
