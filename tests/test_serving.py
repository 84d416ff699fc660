"""The model that the registry serves: what it takes, what it refuses, and an editing adapter in a fresh process."""

from __future__ import annotations

import base64
import io
import json
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import Flux2KleinPipeline
from PIL import Image

from dopsd import champions
from dopsd.config import load_settings
from dopsd.config.groups import LoraSettings
from dopsd.data.images import bucket_size, load_image
from dopsd.distill.adapters import adapter_parameters, add_adapters, save_adapter
from dopsd.export import CARD_FILE, DIFFUSERS_FILE, export_adapter
from dopsd.identity import VersionIdentity
from dopsd.models import load_family
from dopsd.models.flux2_klein import Flux2Klein
from dopsd.registry import Registry, Verdict
from dopsd.registry.serving import FewStepModel
from tests import published
from tests.family_folders import picture, settings_of
from tests.profiles import DISPLAY_P3, SRGB, grey_profile
from tests.scored import entry, paired
from tests.tiny import CARD

CALL = {"height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 1.0}


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return base64.b64encode(buffer.getvalue()).decode()


def header_only(width: int, height: int) -> str:
    """A PNG that says how large it is, and has nothing to decode."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", b"") + chunk(b"IEND", b"")).decode()


class Drawn(list[dict[str, Any]]):
    """Stands for a pipeline; keeps what it was called with."""

    def __call__(self, **asked: Any) -> Any:
        self.append(asked)
        return SimpleNamespace(images=[Image.new("RGB", (asked["width"], asked["height"]))])


@pytest.fixture
def model() -> FewStepModel:
    return _model(edits=True)


def _model(*, edits: bool) -> FewStepModel:
    served = FewStepModel()
    served.pipeline, served.call, served.edits = Drawn(), dict(CALL), edits
    return served


def _table(*images: Any) -> pd.DataFrame:
    return pd.DataFrame({"prompt": [f"make it [V] {number}" for number in range(len(images))], "images": list(images)})


# --- what it takes ----------------------------------------------------------------------------------------------------


def test_rows_with_and_without_images_mix(model: FewStepModel) -> None:
    first, second = encoded(picture(96, 64, 1)), encoded(picture(64, 128, 2))
    table = _table([first, second], None, float("nan"), [], np.array([second]), (first,))
    model.predict(None, table, {"seed": 7})
    assert [len(asked.get("image", [])) for asked in model.pipeline] == [2, 0, 0, 0, 1, 1]
    assert [asked["generator"].initial_seed() for asked in model.pipeline] == list(range(7, 13))
    assert np.array_equal(model.pipeline[0]["image"][1], picture(64, 128, 2))
    assert [asked["prompt"] for asked in model.pipeline] == list(table["prompt"])
    assert all(asked["num_inference_steps"] == 2 and asked["guidance_scale"] == 1.0 for asked in model.pipeline)


def test_columns_are_known_by_their_names(model: FewStepModel) -> None:
    model.predict(None, _table([encoded(picture(64, 64))])[["images", "prompt"]])
    assert model.pipeline[0]["prompt"] == "make it [V] 0"


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (64, 128), (640, 80), (123, 457), (480, 512)])
def test_an_edit_has_its_first_images_shape_and_the_trained_area(model: FewStepModel, size: tuple[int, int]) -> None:
    model.call |= {"height": 512, "width": 512}
    model.predict(None, _table([encoded(Image.new("RGB", size)), encoded(Image.new("RGB", (64, 256)))], None))
    edit, text = model.pipeline
    assert (edit["width"], edit["height"]) == bucket_size(*size, 512)
    assert (text["width"], text["height"]) == (512, 512)
    model.predict(None, _table([encoded(Image.new("RGB", size))]), {"height": 768, "width": 1344, "steps": 5})
    asked = model.pipeline[2]
    assert (asked["width"], asked["height"], asked["num_inference_steps"]) == (1344, 768, 5)


def test_pictures_are_read_as_those_that_were_trained_on(model: FewStepModel, tmp_path: Path) -> None:
    """Upright, transparency on white, 16-bit grey scaled: one rule, written down in two places."""
    clear = picture(96, 64).convert("RGBA")
    clear.putalpha(100)
    deep = Image.fromarray((np.arange(64 * 96, dtype=np.uint16) * 10).reshape(64, 96))
    turned = Image.Exif()
    turned[0x0112] = 6
    files = {
        "clear.png": encoded(clear), "deep.png": encoded(deep),
        "turned.jpg": encoded(picture(96, 64), "JPEG", exif=turned), "lossy.webp": encoded(picture(96, 64), "WEBP"),
        "wide.jpg": encoded(picture(96, 64), "JPEG", icc_profile=DISPLAY_P3.profile()),
        "clear-wide.png": encoded(clear, icc_profile=DISPLAY_P3.profile()),
        "grey.png": encoded(picture(96, 64).convert("L"), icc_profile=grey_profile(1.8)),
        "deep-grey.png": encoded(deep, icc_profile=grey_profile(1.8)),
        "srgb.png": encoded(picture(96, 64), icc_profile=SRGB.profile()),
        "broken.png": encoded(picture(96, 64), icc_profile=b"x" * 200),
        "other.png": encoded(picture(96, 64), icc_profile=grey_profile(1.8)),
    }  # fmt: skip
    for content in files.values():
        model.predict(None, _table([content]))
    for (name, content), asked in zip(files.items(), model.pipeline, strict=True):
        (taken,) = asked["image"]
        (tmp_path / name).write_bytes(base64.b64decode(content))
        trained = np.asarray(load_image(tmp_path / name, 10**6), dtype=int)
        # a profile that means sRGB moves nothing in training, and here what it does by rounding
        assert np.abs(trained - taken).max() <= (name == "srgb.png"), name
    assert model.pipeline[2]["image"][0].size == (64, 96)


def test_wrapped_base64_is_taken(model: FewStepModel) -> None:
    content = encoded(picture(64, 64))
    model.predict(None, _table(["\n".join(content[at : at + 76] for at in range(0, len(content), 76))]))
    assert len(model.pipeline) == 1


# --- what it refuses --------------------------------------------------------------------------------------------------

SOUND = encoded(Image.new("RGB", (64, 64)))


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        (lambda: [SOUND] * 9, "row 1: 9 images, at most 8"),
        (lambda: SOUND, "row 1: images must be a list"),
        (lambda: 3, "row 1: images must be a list"),
        (lambda: [SOUND, None], "row 1, image 1: no text"),
        (lambda: [SOUND, "A" * (32 * 2**20 + 4)], "row 1, image 1: 33,554,436 characters"),
        (lambda: ["not base64!"], "row 1, image 0: not base64"),
        (lambda: ["é" * 8], "row 1, image 0: not base64"),
        (lambda: ["data:image/png;base64," + SOUND], "row 1, image 0: not base64"),
        (lambda: [base64.b64encode(b"hello").decode()], "row 1, image 0: not a whole"),
        (lambda: [encoded(Image.new("RGB", (64, 64)), "GIF")], "row 1, image 0: not a whole"),
        (lambda: [encoded(picture(128, 128), "JPEG")[:2000]], "row 1, image 0: not a whole"),
        (lambda: [""], "row 1, image 0: not a whole"),
        (lambda: [header_only(8000, 6251)], "row 1, image 0: 8000 x 6251 pixels, at most 50,000,000"),
        (lambda: [header_only(12000, 8000)], "row 1, image 0: 12000 x 8000 pixels, at most 50,000,000"),
        (lambda: [header_only(60000, 60000)], "row 1, image 0: far more than 50,000,000"),
        (lambda: [encoded(Image.new("RGB", (63, 64)))], "row 1, image 0: 63 x 64 pixels, at least 64"),
        (lambda: [encoded(Image.new("RGB", (64, 513)))], "row 1, image 0: 64 x 513 pixels, longer than 8 : 1"),
        (lambda: [encoded(picture(64, 64), "WEBP", save_all=True, append_images=[picture(64, 64, 1)])],
         "row 1, image 0: it is animated"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("error")
def test_a_bad_picture_is_one_line_and_nothing_is_drawn(
    model: FewStepModel, cell: Callable[[], Any], said: str
) -> None:
    with pytest.raises(ValueError, match=f"^{said}.*; ") as caught:
        model.predict(None, _table([SOUND], cell()))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200
    assert not model.pipeline


@pytest.mark.parametrize("prompt", ["", "  ", None, float("nan"), 3])
def test_a_row_without_a_prompt_is_refused(model: FewStepModel, prompt: Any) -> None:
    with pytest.raises(ValueError, match=r"^row 1: the prompt is empty or no text; "):
        model.predict(None, pd.DataFrame({"prompt": ["a fox", prompt]}, dtype=object))


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"steps": 101}, "steps: 101; give 1 to 100"),
        ({"steps": -1}, "steps: -1; give 1 to 100"),
        ({"height": 512}, "width: missing"),
        ({"width": 512}, "height: missing"),
        ({"height": 520, "width": 512}, "height: 520; give a multiple of 16 from 64 to 4096"),
        ({"height": 512, "width": 48}, "width: 48; give a multiple of 16"),
        ({"height": 4112, "width": 512}, "height: 4112; give a multiple of 16"),
        ({"height": -64, "width": 512}, "height: -64; give a multiple of 16"),
    ],
)
def test_params_out_of_bounds_are_refused(model: FewStepModel, params: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=f"^{said}"):
        model.predict(None, ["a fox"], params)
    assert not model.pipeline


def test_the_bounds_themselves_are_taken(model: FewStepModel) -> None:
    limits = {"height": 64, "width": 4096}
    model.predict(None, _table([SOUND] * 8, [encoded(Image.new("RGB", (512, 64)))]), {"steps": 100, **limits})
    model.predict(None, ["a fox"], {"steps": 1, "seed": 0, "height": 0, "width": 0})
    assert [asked["num_inference_steps"] for asked in model.pipeline] == [100, 100, 1]


@pytest.mark.parametrize(("references", "edits"), [([0, 0], False), ([0, 2], True)])
def test_a_version_edits_where_its_rows_have_references_whatever_its_family_could(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, references: list[int], edits: bool
) -> None:
    values = {"path": "base", "family": "flux2-klein"}
    settings = load_settings(Path(__file__).parent.parent / "params.yaml")
    settings = settings.model_copy(update={"model": settings.model.model_copy(update=values)})
    rows = [SimpleNamespace(references=(tmp_path / "r.png",) * count) for count in references]
    opened = SimpleNamespace(source=SimpleNamespace(folder=tmp_path, name=None, revision=None))
    monkeypatch.setattr(champions, "open_base", lambda *_, **__: opened)
    monkeypatch.setattr(champions, "read_concept", lambda *_: (SimpleNamespace(rows=rows), None))
    serving = champions._serving("c", settings, tmp_path)
    assert serving["edits"] is edits
    assert {"height", "width", "num_inference_steps"} <= set(serving["call"])
    assert not {"prompt", "image"} & set(serving["call"])


def test_an_adapter_of_text_alone_refuses_images() -> None:
    model = _model(edits=False)
    with pytest.raises(ValueError, match=r"^row 0: this adapter was trained to draw from text alone; "):
        model.predict(None, _table([SOUND]))
    assert len(model.predict(None, _table(None, []))) == 2


# --- from the registry alone ------------------------------------------------------------------------------------------

SCRIPT = """
import json, sys, mlflow, numpy as np, pandas as pd
mlflow.set_tracking_uri(sys.argv[1])
images = json.loads(open(sys.argv[2]).read())
table = pd.DataFrame([{"prompt": "make it [V]", "images": images}, {"prompt": "a fox in [V] style"}])
edits = mlflow.pyfunc.load_model("models:/dopsd-edits@champion").predict(table, params={"seed": 3})
of_text = mlflow.pyfunc.load_model("models:/dopsd-text@champion")
text = of_text.predict(["a fox in [V] style"])
for prompt, said in (("a <think> fox", "row 1: <think> is a control token"), ("fox " * 501, ", and 500 are read")):
    try:
        of_text.predict(["a fox", prompt])
    except ValueError as error:
        assert said in str(error), error
    else:
        raise AssertionError(prompt)
assert not any(name == "dopsd" or name.startswith("dopsd.") for name in sys.modules)
print(json.dumps([np.asarray(i).tolist() for i in (*edits, *text)]))
"""


@pytest.fixture(scope="module")
def klein(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A stand-in of klein, an adapter that changes a lot, and its export."""
    folder = tmp_path_factory.mktemp("klein")
    base = published.write_klein(folder / "base")
    family = load_family(settings_of("flux2-klein", {"flux2-klein": base}))
    lora = LoraSettings(rank=4)
    pair = add_adapters(family.transformer, lora, family.lora_targets, seed=0, kind="frozen")
    generator = torch.Generator().manual_seed(1)
    for key, value in adapter_parameters(family.transformer, "student").items():
        if "lora_B" in key:
            value.data.copy_(0.3 * torch.randn(value.shape, generator=generator))
    student = save_adapter(folder / "d-opsd.safetensors", family.transformer, "student", lora)
    pair.remove()
    (folder / "d-opsd.json").write_text("{}\n")
    export = export_adapter(student, folder / "export", CARD, Flux2Klein)
    return {
        "adapter": export / DIFFUSERS_FILE, "card": export / CARD_FILE,
        "about": folder / "d-opsd.json", "base": base,
    }  # fmt: skip


def test_an_editing_adapter_draws_in_a_fresh_process_what_plain_diffusers_draws(
    klein: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    registry = Registry(tmp_path)
    client = registry.client
    experiment = client.create_experiment("test", (tmp_path / "artifacts").as_uri())
    scores = entry(tmp_path / "scores", paired())
    for concept, edits in (("edits", True), ("text", False)):
        serving = {"base": "data/base", "revision": None, "call": CALL, "edits": edits, "prompt_tokens": 500}
        run = client.create_run(experiment).info.run_id
        made = VersionIdentity(data="d", settings="s", base="b", method="m")
        outcome = registry.register(concept, run, made, scores, Verdict(True, "good"), {}, klein, serving)
        assert outcome.promoted, outcome.reason
    inputs = mlflow.models.get_model_info("models:/dopsd-edits@champion").signature.inputs
    assert [(c.name, c.required) for c in inputs] == [("prompt", True), ("images", False)]
    references = [picture(128, 64, 3), picture(64, 80, 4)]
    (tmp_path / "images.json").write_text(json.dumps([encoded(image) for image in references]))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, registry.uri, str(tmp_path / "images.json")],
        # as many threads as here: sums of another order differ in the last bits, and some of those in a level
        cwd=elsewhere, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    drawn = [np.array(pixels, np.uint8) for pixels in json.loads(done.stdout.splitlines()[-1])]

    plain = Flux2KleinPipeline.from_pretrained(klein["base"], torch_dtype=torch.float32)
    plain.load_lora_weights(klein["adapter"])
    plain.set_progress_bar_config(disable=True)
    edit = CALL | {"width": 96, "height": 48}
    wanted = [
        {"prompt": "make it [V]", "image": references, "generator": torch.Generator().manual_seed(3), **edit},
        {"prompt": "a fox in [V] style", "generator": torch.Generator().manual_seed(4), **CALL},
        {"prompt": "a fox in [V] style", "generator": torch.Generator().manual_seed(0), **CALL},
    ]
    theirs = [np.asarray(plain(**asked).images[0]) for asked in wanted]
    for ours, other in zip(drawn, theirs, strict=True):
        assert np.array_equal(ours, other)
    fewer = plain(**(wanted[0] | {"image": references[:1], "generator": torch.Generator().manual_seed(3)})).images[0]
    assert not np.array_equal(drawn[0], fewer), "every reference counts"
