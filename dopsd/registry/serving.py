"""The model as MLflow loads it: text in, pictures out. Stored with every version, so it needs nothing of this project.

model = mlflow.pyfunc.load_model("models:/dopsd-style-ink@champion")
images = model.predict(["a fox in [V] style"])          # a list of PIL images
images = model.predict(["a fox in [V] style"], params={"seed": 3})
"""

from typing import Any

import mlflow
import torch
from diffusers.pipelines.z_image.pipeline_z_image import ZImagePipeline
from mlflow.models import set_model


class FewStepModel(mlflow.pyfunc.PythonModel):
    """Base and adapter in plain diffusers. ``steps`` 0 means the number that the adapter was trained for."""

    def load_context(self, context: Any) -> None:
        """Load the pipeline; the base is stored with the version or named by it."""
        config = context.model_config
        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        base = context.artifacts.get("base") or config["base"]
        self.pipeline = ZImagePipeline.from_pretrained(base, torch_dtype=dtype)
        self.pipeline.load_lora_weights(context.artifacts["adapter"])
        if not self.pipeline.get_active_adapters():
            raise RuntimeError("the adapter loaded as nothing: this diffusers is not the one it was made for")
        self.pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
        self.pipeline.set_progress_bar_config(disable=True)
        self.steps, self.side = config["steps"], config["side"]

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]  # MLflow reads the hints
        """One picture per prompt, each from its own seed ``seed + number``."""
        params = params or {}
        prompts = [str(text) for text in (model_input.iloc[:, 0] if hasattr(model_input, "iloc") else model_input)]
        seeds = range(params.get("seed", 0), params.get("seed", 0) + len(prompts))
        return self.pipeline(
            prompt=prompts, num_inference_steps=params.get("steps") or self.steps, height=self.side, width=self.side,
            guidance_scale=0.0, generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        ).images  # fmt: skip


set_model(FewStepModel())
