"""The model as MLflow loads it: text, or text and pictures, in; pictures out. Stored with every version, so it needs
nothing of this project.

model = mlflow.pyfunc.load_model("models:/dopsd-style-ink@champion")
images = model.predict(["a fox in [V] style"])          # a list of PIL images
images = model.predict(["a fox in [V] style"], params={"seed": 3, "height": 768, "width": 1344})

An adapter that was trained on references takes them in order, each a PNG, JPEG or WEBP file in base64:

images = model.predict(pandas.DataFrame({"prompt": ["make it [V]"], "images": [[first, second]]}))
"""

import base64
import binascii
import io
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mlflow
import numpy as np
import torch
from diffusers import AutoModel, DiffusionPipeline
from mlflow.models import set_model
from PIL import Image, ImageCms, ImageOps

MAX_IMAGES = 8
MAX_ENCODED = 32 * 2**20
"""Characters of base64 a picture."""
MAX_PIXELS = 50_000_000
LEAST_SIDE, MAX_SHAPE = 64, 8
"""Of a reference, as the data that was trained on had to be."""
CONTROL = re.compile(r"<\|[^\s<>|]+\|>")
"""How tokenizers write the tokens that no text holds."""
SIDES, MULTIPLE = (64, 4096), 16
MAX_STEPS = 100


class Row(NamedTuple):
    """What is asked for once. ``number`` counts from 0."""

    number: int
    prompt: str
    images: tuple[bytes, ...]


class FewStepModel(mlflow.pyfunc.PythonModel):
    """Base and adapter, or trained transformer, in plain diffusers. A param of 0 stands for what it was trained for."""

    prompt_tokens: int | None = None
    """Most tokens of a prompt, without the turn around it; ``None``: not known."""
    controls: tuple[str, ...] = ()
    """Tokens beside the vocabulary that are written in angle brackets."""

    def load_context(self, context: Any) -> None:
        """Load the pipeline; the base is stored with the version or named by it."""
        config = context.model_config
        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        stored = context.artifacts.get("base")
        named: dict[str, Any] = {} if stored else {"revision": config.get("revision")}
        trained = context.artifacts["adapter"]
        whole = Path(trained).is_dir()
        if whole:  # the transformer itself was trained
            named["transformer"] = AutoModel.from_pretrained(trained, torch_dtype=dtype, use_safetensors=True)
        self.pipeline = DiffusionPipeline.from_pretrained(
            stored or config["base"], torch_dtype=dtype, use_safetensors=True, **named
        )
        if not whole:
            self.pipeline.load_lora_weights(trained, use_safetensors=True)
            if not self.pipeline.get_active_adapters():
                raise RuntimeError("the adapter loaded as nothing: this diffusers is not the one it was made for")
        self.pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
        self.pipeline.set_progress_bar_config(disable=True)
        self.call = config["call"]
        self.edits = bool(config.get("edits"))
        self.prompt_tokens = config.get("prompt_tokens")
        added = (str(token) for token in self.pipeline.tokenizer.added_tokens_decoder.values())
        self.controls = tuple(sorted(token for token in added if re.fullmatch("<.+>", token)))

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]  # MLflow reads the hints
        """One picture per row, each from its own seed ``seed + number``.

        Raises ``ValueError``, one line with the row and what to do, before anything is drawn.
        """
        params = params or {}
        steps, size, seed = _steps(params), _size(params), params.get("seed") or 0
        rows = _rows(model_input, self.edits)
        for row in rows:
            self._check_prompt(row)
        for row in rows:  # decoded once more when it is drawn: all pictures of all rows at a time may be gigabytes
            _pictures(row)
        return [self._draw(row, steps, size, seed) for row in rows]

    def _check_prompt(self, row: Row) -> None:
        """The pipeline would cut a long prompt off without a word, and take a token's name for the token."""
        found = CONTROL.search(row.prompt)
        token = found[0] if found else next((control for control in self.controls if control in row.prompt), None)
        if token is not None:
            raise ValueError(f"row {row.number}: {token} is a control token, not text; remove it or say it in words")
        if self.prompt_tokens is None:
            return
        length = len(self.pipeline.tokenizer(row.prompt, add_special_tokens=False).input_ids)
        if length > self.prompt_tokens:
            raise ValueError(
                f"row {row.number}: the prompt is {length:,} tokens, and {self.prompt_tokens} are read; shorten it"
            )

    def _draw(self, row: Row, steps: int | None, size: tuple[int, int] | None, seed: int) -> Image.Image:
        pictures = _pictures(row)
        trained = (self.call["width"], self.call["height"])
        width, height = size or (_shaped(pictures[0], math.prod(trained)) if pictures else trained)
        arguments = self.call | {"height": height, "width": width} | ({"num_inference_steps": steps} if steps else {})
        if pictures:
            arguments |= {"image": pictures}
        generator = torch.Generator().manual_seed(seed + row.number)
        return self.pipeline(prompt=row.prompt, generator=generator, **arguments).images[0]


# --- what is asked for ------------------------------------------------------------------------------------------------


def _steps(params: Mapping[str, Any]) -> int | None:
    steps = params.get("steps") or None
    if steps is not None and not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"steps: {steps}; give 1 to {MAX_STEPS}, or 0 for what the adapter was trained for")
    return steps


def _size(params: Mapping[str, Any]) -> tuple[int, int] | None:
    """(width, height), or ``None`` where they are left to the model."""
    width, height = params.get("width") or 0, params.get("height") or 0
    if not width and not height:
        return None
    for name, side in (("height", height), ("width", width)):
        if side == 0:
            raise ValueError(f"{name}: missing; give height and width together, or neither")
        if not SIDES[0] <= side <= SIDES[1] or side % MULTIPLE:
            raise ValueError(f"{name}: {side}; give a multiple of {MULTIPLE} from {SIDES[0]} to {SIDES[1]}")
    return width, height


def _rows(model_input: Any, edits: bool) -> list[Row]:
    if hasattr(model_input, "columns"):
        named = "prompt" in model_input.columns
        prompts = list(model_input["prompt"] if named else model_input.iloc[:, 0])
        images = list(model_input["images"]) if "images" in model_input.columns else [None] * len(prompts)
    else:
        prompts, images = list(model_input), [None] * len(model_input)
    return [
        Row(number, _prompt(number, prompt), _files(number, cell, edits))
        for number, (prompt, cell) in enumerate(zip(prompts, images, strict=True))
    ]


def _prompt(number: int, prompt: Any) -> str:
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"row {number}: the prompt is empty or no text; say what is to be drawn")
    return str(prompt)


def _files(number: int, cell: Any, edits: bool) -> tuple[bytes, ...]:
    """The row's picture files. A table that has some for other rows says "none" as ``None``, NaN or an empty list."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ()
    if isinstance(cell, str | bytes | Mapping) or not isinstance(cell, Iterable):
        raise ValueError(f"row {number}: images must be a list of base64 texts; put a single one into a list too")
    images = list(cell)
    if images and not edits:
        raise ValueError(f"row {number}: this adapter was trained to draw from text alone; leave images out")
    if len(images) > MAX_IMAGES:
        raise ValueError(f"row {number}: {len(images)} images, at most {MAX_IMAGES} are taken; leave some out")
    return tuple(_decoded(f"row {number}, image {place}", image) for place, image in enumerate(images))


def _decoded(where: str, encoded: Any) -> bytes:
    if not isinstance(encoded, str):
        raise ValueError(f"{where}: no text; give the file's bytes in base64")
    if len(encoded) > MAX_ENCODED:
        raise ValueError(f"{where}: {len(encoded):,} characters of base64, at most {MAX_ENCODED:,}; shrink it")
    try:
        return base64.b64decode("".join(encoded.split()), validate=True)
    except (binascii.Error, ValueError):  # ValueError: letters beyond ASCII
        raise ValueError(f"{where}: not base64; encode the file's bytes, without a 'data:' before them") from None


# --- pictures ---------------------------------------------------------------------------------------------------------


def _pictures(row: Row) -> list[Image.Image]:
    return [_picture(f"row {row.number}, image {place}", content) for place, content in enumerate(row.images)]


def _picture(where: str, content: bytes) -> Image.Image:
    """Upright RGB, transparency on white: as the references were read that were trained on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks about metadata, and about a size that is refused here
        try:
            with Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "WEBP")) as image:
                fault = _fault(image)
                if not fault:
                    image.load()
                    return _to_rgb(ImageOps.exif_transpose(image))
        except Image.DecompressionBombError:
            fault = f"far more than {MAX_PIXELS:,} pixels; shrink it"
        except Exception:  # decoders of hostile bytes raise whatever they trip over
            fault = "not a whole PNG, JPEG or WEBP picture; export it again as one of these"
    raise ValueError(f"{where}: {fault}")


def _fault(image: Image.Image) -> str:
    """What its header says against a picture, before anything is decoded."""
    size, sides = f"{image.width} x {image.height} pixels", sorted(image.size)
    if math.prod(sides) > MAX_PIXELS:
        return f"{size}, at most {MAX_PIXELS:,} in all; shrink it"
    if sides[0] < LEAST_SIDE:
        return f"{size}, at least {LEAST_SIDE} a side are needed; give a larger one"
    if sides[1] > MAX_SHAPE * sides[0]:
        return f"{size}, longer than {MAX_SHAPE} : 1; crop it"
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:  # MPO: a phone's JPEG with a preview behind it
        return "it is animated; save one frame as a picture of its own"
    return ""


def _to_rgb(image: Image.Image) -> Image.Image:
    profile, alpha = image.info.get("icc_profile"), None
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit grey: PIL's own conversion clips instead of scaling
        grey = np.asarray(image, dtype=np.float64) / 257
        image = Image.fromarray(grey.clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        alpha = rgba.getchannel("A")
        image = rgba.getchannel("R") if image.mode in ("1", "L", "LA", "La") else rgba.convert("RGB")
    opaque = _to_srgb(image, profile) if profile else image.convert("RGB")
    if alpha is None:
        return opaque
    opaque.putalpha(alpha)
    canvas = Image.new("RGBA", opaque.size, "white")
    canvas.alpha_composite(opaque)
    return canvas.convert("RGB")


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """By its colour profile; one that is damaged, or for another kind of picture, is left aside, as in training."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}[source.profile.xcolor_space.strip()]
        if mode == "RGB" and image.mode != "CMYK":
            image = image.convert("RGB")
        colorimetric = ImageCms.Intent.RELATIVE_COLORIMETRIC
        way = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB", colorimetric)
        return ImageCms.applyTransform(image, way) or image.convert("RGB")
    except Exception:  # the library raises whatever it trips over
        return image.convert("RGB")


def _shaped(image: Image.Image, area: int) -> tuple[int, int]:
    """(width, height) with the picture's shape and about ``area`` pixels, by the rule that sizes were trained by."""
    if image.width % MULTIPLE == image.height % MULTIPLE == 0 and 0.9 * area <= image.width * image.height < area:
        return image.size
    shape, resolution = math.sqrt(image.width / image.height), math.sqrt(area)

    def side(length: float) -> int:
        return max(1, round(length / MULTIPLE)) * MULTIPLE

    return side(resolution * shape), side(resolution / shape)


set_model(FewStepModel())
