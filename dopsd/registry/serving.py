"""The model as MLflow loads it: text in, pictures out. Stored with every version, so it needs nothing of this project.

model = mlflow.pyfunc.load_model("models:/dopsd-style-ink@champion")
images = model.predict(["a fox in [V] style"])          # a list of PIL images
images = model.predict(["a fox in [V] style"], params={"seed": 3, "height": 768, "width": 1344})
"""

import base64
import io
from typing import Any

import mlflow
import torch
from diffusers import DiffusionPipeline
from mlflow.models import set_model
from PIL import Image, ImageOps

MAX_IMAGE_BYTES = 32 * 2**20


class FewStepModel(mlflow.pyfunc.PythonModel):
    """Base and adapter in plain diffusers. ``steps`` 0 means the number that the adapter was trained for."""

    def load_context(self, context: Any) -> None:
        """Load the pipeline; the base is stored with the version or named by it."""
        config = context.model_config
        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        stored = context.artifacts.get("base")
        named = {} if stored else {"revision": config.get("revision")}
        self.pipeline = DiffusionPipeline.from_pretrained(
            stored or config["base"], torch_dtype=dtype, use_safetensors=True, **named
        )
        self.pipeline.load_lora_weights(context.artifacts["adapter"])
        if not self.pipeline.get_active_adapters():
            raise RuntimeError("the adapter loaded as nothing: this diffusers is not the one it was made for")
        self.pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
        self.pipeline.set_progress_bar_config(disable=True)
        self.call = config["call"]

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]  # MLflow reads the hints
        """One picture per row, each from its own seed ``seed + number``.

        A row is a prompt; a model that edits takes a column ``image`` beside it, one PNG, JPEG or WEBP in base64.
        """
        params = params or {}
        rows = _rows(model_input)
        chosen = {
            "num_inference_steps": params.get("steps") or self.call["num_inference_steps"],
            "height": params.get("height") or self.call["height"], "width": params.get("width") or self.call["width"],
        }  # fmt: skip
        return [
            self.pipeline(
                prompt=prompt, generator=torch.Generator().manual_seed(params.get("seed", 0) + number),
                **(self.call | chosen), **({"image": [_picture(image)]} if image else {}),
            ).images[0]
            for number, (prompt, image) in enumerate(rows)
        ]  # fmt: skip


def _rows(model_input: Any) -> list[tuple[str, str | None]]:
    if not hasattr(model_input, "columns"):
        return [(str(text), None) for text in model_input]
    prompts = [str(text) for text in model_input.iloc[:, 0]]
    images = list(model_input["image"]) if "image" in model_input.columns else [None] * len(prompts)
    return list(zip(prompts, images, strict=True))


def _picture(encoded: str) -> Image.Image:
    if len(encoded) > MAX_IMAGE_BYTES:
        raise ValueError(f"the image is larger than {MAX_IMAGE_BYTES:,} characters of base64; shrink it")
    with Image.open(io.BytesIO(base64.b64decode(encoded)), formats=("PNG", "JPEG", "WEBP")) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


set_model(FewStepModel())
