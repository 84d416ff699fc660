"""The groups of settings: what each key of ``params.yaml`` means and may be. :mod:`dopsd.config` puts them together."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from dopsd.params import AtLeastOne, Beta, EachOnce, Eyes, Pattern, Positive, Rate, Seed, SettingsError

Method = Literal["d-opsd", "sft", "sft-teacher", "off-policy"]
Quantization = Literal["none", "int8", "fp8", "nf4"]
Offload = Literal["none", "model", "group"]
Checkpointing = Literal["none", "every", "every-second", "auto"]
Optimizer = Literal["adamw", "adamw-8bit"]
AdapterKind = Literal["lora", "dora", "lokr"]
Judgement = Literal["captions-without-placeholder", "copies", "folder-names", "long-pictures", "near-duplicates",
                    "small-pictures"]  # fmt: skip
ContextName = Literal["vlm", "edit", "edit-reference", "enhanced-prompt"]

CHECKPOINT_SECONDS = 600
"""Between two checkpoints where ``train.checkpoint_steps`` does not say: at true size each is 2.5 GB."""


def _as_words(value: Any) -> Any:
    """YAML's true and false, as earlier versions had it."""
    return {True: "every", False: "none"}.get(value, value) if isinstance(value, bool) else value


class Group(BaseModel):
    """Keys that are known, and values that do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSettings(Group):
    """The base model, what its teacher is shown, and how it is run."""

    family: str = "z-image"
    """One of :data:`dopsd.models.FAMILIES`."""
    path: Annotated[str, Field(min_length=1)]
    """A diffusers folder, or the hub's name for one (``owner/name``)."""
    revision: str | None = None
    """Branch, tag or commit of a model on the hub; ``None``: its main branch."""
    name: str | None = None
    """What the model card calls the base: its name on the hub. ``None``: ``path`` where that is such a name."""
    licence: str | None = None
    """The base's licence for the model card; ``None``: what its own README says."""
    context: ContextName | None = None
    """What the teacher is shown (docs/method.md); ``None``: the family's own."""
    context_suffix: str | None = None
    """Added to the caption that the teacher reads; ``None``: the family's own."""
    context_variant: str = "long"
    """With ``enhanced-prompt``: which of a row's captions the teacher reads; the student reads the others."""
    context_pixels: tuple[Positive, Positive] = (512 * 512, 768 * 768)
    """Least and most pixels of an image that a VLM is shown."""
    vlm: str | None = None
    """Folder or hub name of the Qwen3-VL for Z-Image's ``vlm`` context; ``None`` means ``path/vlm``."""
    vlm_revision: str | None = None
    vlm_positions: Literal["vlm", "encoder"] = "vlm"
    """Whose rotary frequencies the VLM's language half has: its own, as published, or the text encoder's."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """``auto``: bfloat16 on CUDA, float32 on a CPU (bfloat16 is far slower on most of them)."""
    gradient_checkpointing: Annotated[Checkpointing, BeforeValidator(_as_words)] = "none"
    """Which blocks compute their activations twice instead of holding them. ``auto``: none on a CPU, else what fits
    (:mod:`dopsd.sizing`). ``true`` and ``false`` mean every and none."""
    quantization: Quantization = "none"
    """How the frozen weights of transformer and text encoder are stored; adapters and products keep their precision.
    It changes the base a little, and so what is encoded, learnt and drawn. Needs the extra ``quantization``."""
    offload: Offload = "none"
    """``model``: of the large components one at a time is on the device, the others wait in host memory. ``group``: of
    the transformer a block at a time, the next on its way; it needs every block checkpointed."""
    compile: bool = False
    """Compile the transformer's blocks for training: minutes at the first steps, then fewer passes through memory. The
    same values but for rounding; needs a C compiler."""

    @model_validator(mode="after")
    def _blocks_are_let_go(self) -> ModelSettings:
        if self.offload == "group" and self.gradient_checkpointing not in ("every", "auto"):
            raise ValueError("offload: group needs gradient_checkpointing: every (or auto); without it a backward pass "
                             "holds every block on the device")  # fmt: skip
        if self.offload == "group" and self.compile:
            raise ValueError("offload: group changes a block's weights at every call; leave compile false")
        return self

    @property
    def teacher_variant(self) -> str | None:
        """The caption variant that is the teacher's alone; ``None`` where both read the same caption."""
        return self.context_variant if self.context == "enhanced-prompt" else None

    def decides_learning(self) -> dict[str, Any]:
        """What of this decides what is learnt, the base's own files apart; of resolved settings."""
        return self.decides_encoding() | self.decides_velocity()

    def decides_encoding(self) -> dict[str, Any]:
        """What of this decides encodings."""
        return self._decides(
            "family", "context", "context_suffix", "context_variant", "context_pixels", "vlm_positions", "dtype"
        )

    def decides_velocity(self) -> dict[str, Any]:
        """What of this decides the transformer's answers."""
        return self._decides("family", "dtype")

    def _decides(self, *names: str) -> dict[str, Any]:
        """These settings, and the base's rounding where there is one: what was made without it stays what it is."""
        rounded = () if self.quantization == "none" else ("quantization",)
        return self.model_dump(mode="json", include={*names, *rounded})


class DataSettings(Group):
    """What a concept data set must be."""

    resolution: Positive
    """Side in pixels of a square image of the trained area; aspect buckets keep this area."""
    placeholder: Annotated[str, Field(min_length=1)] = "[V]"
    min_images: Positive = 4
    max_pixels: Positive = 120_000_000
    """More than this many pixels in one file is refused before it is decoded (decompression bombs)."""
    near_duplicate_bits: Annotated[int, Field(ge=0, le=64)] = 4
    """Two images whose 64-bit perceptual hashes differ in at most this many bits are near duplicates."""
    allow: tuple[Judgement, ...] = ()
    """Faults that are a matter of taste, and none here; the message of each says its word."""


class LoraSettings(Group):
    kind: AdapterKind = "lora"
    """``dora`` trains the length of every output's weights beside it, ``lokr`` a Kronecker product: fewer numbers."""
    rank: Positive = 64
    alpha: Rate | None = None
    """``None`` means ``rank`` (scale 1), which every tool reads alike."""
    init: Literal["kaiming", "gaussian"] = "kaiming"
    """How A starts (B is zero): uniform within ``1 / sqrt(fan in)``, or normal with deviation ``1 / rank``."""
    targets: Annotated[tuple[Pattern, ...], AtLeastOne] | None = None
    """Name patterns of linear layers; ``None`` means the family's own. Every pattern must match something."""


class TeacherSettings(Group):
    kind: Literal["ema", "frozen", "copy"] | None = None
    """``None``: ema, and frozen where the context is ``enhanced-prompt`` (:func:`dopsd.models.resolved`)."""
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.9999
    every: Positive = 1
    """Of optimizer steps: the EMA moves that often, by ``decay ** every``."""
    weights: Literal["device", "cpu"] = "device"
    """With ``tune: full``: where the EMA's and the base's weights wait; from ``cpu`` they come block by block."""
    guidance: Annotated[float, Field(ge=1)] = 1.0
    """1 is the paper. Above, the target is pushed further along what the context changes (docs/method.md)."""
    gain_images: Positive = 16
    """How many samples the teacher gain is measured on before training."""
    on_no_gain: Literal["warn", "refuse"] = "warn"


class ReplaySettings(Group):
    """Every method's, whichever is trained: the base's own prompts, held to the frozen base (docs/method.md)."""

    weight: Annotated[float, Field(ge=0)] = 0.0
    prompts: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _prompts_given(self) -> ReplaySettings:
        if self.weight > 0 and not self.prompts:
            raise ValueError("replay.weight is above 0 but replay.prompts is empty; give prompts of the base's domain")
        return self


class TrainSettings(Group):
    methods: Annotated[tuple[Method, ...], AtLeastOne, EachOnce] = ("d-opsd", "sft")
    """What is trained for the before-and-after table; the first is the one that is exported."""
    seed: Seed = 0
    rollout_steps: Positive = 4
    """K, the number of Euler steps of a roll-out."""
    max_steps: Positive
    max_minutes: Rate | None = None
    """Of steps: neither the teacher gain beforehand nor previews nor checkpoints count."""
    batch_size: Positive
    accumulation: Positive = 1
    learning_rate: Rate
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    optimizer: Optimizer = "adamw"
    """``adamw-8bit``: both moments in a byte per parameter, by bitsandbytes (the extra ``quantization``)."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    clip_norm: Rate = 1.0
    loss: Literal["velocity", "x0"] = "velocity"
    init_from: Annotated[str, Field(min_length=1)] | None = None
    """A file or export that student and EMA teacher begin as; it counts by its content. Adapters of ours, and LoRAs for
    diffusers or ComfyUI, of at most ``lora.rank`` and on layers that ``lora.targets`` names; with ``tune: full``
    weights. The base stays what a frozen teacher and replay answer with."""
    tune: Literal["adapter", "full"] = "adapter"
    """``full``: the transformer's own weights, all or those of ``lora.targets``; nothing else of ``lora`` counts."""
    lora: LoraSettings = LoraSettings()
    teacher: TeacherSettings = TeacherSettings()
    replay: ReplaySettings = ReplaySettings()
    checkpoint_steps: Positive | None = None
    """How many steps a kill may cost; ``None``: ten minutes of steps (:data:`CHECKPOINT_SECONDS`)."""
    preview_steps: Positive = 50
    preview_prompts: tuple[str, ...] = ()
    preview_count: Positive = 6
    """How many held-out rows (else training rows) are previewed where ``preview_prompts`` names none."""
    sft_compute_factor: Rate | None = None
    """SFT is also shown at this many times D-OPSD's steps; ``None``: what :meth:`sft_steps_at_equal_compute` counts."""

    def work(self) -> str:
        """What is going to be trained, in words; why that is twice the work where SFT is shown at equal compute."""
        parts = []
        for method in self.methods:
            steps = f"{method}, {self.max_steps} steps"
            if method == "sft":
                steps += (f", then on to {self.sft_steps_at_equal_compute()} for equal compute: as much work again as "
                          "d-opsd, and only to compare (train.methods: [d-opsd] leaves it out)")  # fmt: skip
            parts.append(steps)
        replayed = ", each with a replayed prompt beside it" if self.replay.weight > 0 else ""
        return f"{'; '.join(parts)}; {self.batch_size * self.accumulation} images a step{replayed}"

    def sft_steps_at_equal_compute(self) -> int:
        """How many SFT steps cost as much as ``max_steps`` of D-OPSD, where a backward pass costs two forwards.

        A step of a roll-out is one teacher forward (a second one with guidance) and a student forward and backward.
        SFT has one student forward and backward. Replay adds the same to both: a roll-out without guidance.
        """
        factor = self.sft_compute_factor
        if factor is None:
            student, teacher = 3, 1
            rollout = self.rollout_steps * (student + teacher * (2 if self.teacher.guidance != 1 else 1))
            replayed = self.rollout_steps * (student + teacher) if self.replay.weight > 0 else 0
            factor = (rollout + replayed) / (student + replayed)
        return round(factor * self.max_steps)


class EvaluationSettings(Group):
    steps: Annotated[tuple[Positive, ...], AtLeastOne, EachOnce] = (1, 2, 4, 8, 32)
    few_steps: Positive | None = None
    """The number of steps that the headline table is about, one of ``steps``; ``None``: the family's own."""
    many_steps: Positive | None = None
    """What few steps are compared with, one of ``steps``; ``None``: the family's own, or the most of ``steps`` where
    they lack it. Beyond what a model was distilled for, more steps are no truth."""
    seed: Seed = 1234
    protocol: Literal["ours", "published"] = "ours"
    """``published``: the paper's prompts and seeds, of ``protocol.jsonl`` beside the data (docs/evaluation.md)."""
    batch_size: Positive = 32
    max_prompts: Positive = 100
    """Concept prompts with a known truth (held-out rows of the data set)."""
    curve_prompts: Positive = 40
    """Prompts for the step counts other than ``few_steps``, and for a second noise."""
    kept_prompts: str | tuple[str, ...] = "data/prompts/general.txt"
    """A file of general prompts, a line each, or the prompts themselves: what the model should go on drawing as
    the base does. ``()`` measures nothing of what was kept."""
    kept_count: Positive = 60
    """How many of them, in an order drawn by the seed."""
    known_prompts: Positive = 60
    """Prompts of the styles whose true pictures a base brings along (its ``world/``)."""
    prompts: tuple[str, ...] = ()
    """Extra prompts without a truth; used alone where a data set has no held-out rows."""
    backbones: Eyes = ("efficientnet-lite0",)
    """What pictures are seen with (docs/evaluation.md): ``KIND``, ``KIND:HUB-NAME[@REVISION]`` or ``KIND:FOLDER``."""
    rubric: str | None = None
    """A text file by which the backbone ``judge`` grades; ``None``: the one that is shipped with it."""

    @property
    def few(self) -> int:
        """The number of few steps, of resolved settings (:func:`dopsd.models.resolved`)."""
        if self.few_steps is None:
            raise ValueError("evaluation.few_steps is left to the family, and was not filled in")
        return self.few_steps

    @property
    def many(self) -> int:
        """The number of many steps, of resolved settings."""
        if self.many_steps is None:
            raise ValueError("evaluation.many_steps is left to the family, and was not filled in")
        return self.many_steps

    @property
    def kept_texts(self) -> tuple[str, ...]:
        """The general prompts, of a concept's own settings (:meth:`Settings.of`). Raises :class:`SettingsError` where
        their file was not there."""
        if isinstance(self.kept_prompts, str):
            raise SettingsError(f"evaluation.kept_prompts: {self.kept_prompts} is no file; name one with a prompt in "
                                "each line, or list the prompts")  # fmt: skip
        return self.kept_prompts

    @model_validator(mode="after")
    def _few_steps_listed(self) -> EvaluationSettings:
        for key, steps in (("few_steps", self.few_steps), ("many_steps", self.many_steps)):
            if steps is not None and steps not in self.steps:
                raise ValueError(f"evaluation.{key} ({steps}) must be one of evaluation.steps")
        return self

    def missing_for(self, registry: RegistrySettings, few: int, many: int) -> str:
        """What is missing for scores that the registry's gate asks for: more steps to compare ``few`` with, prompts
        of which something is to be kept."""
        if many < few:
            return f"evaluation.many_steps ({many}) is below few_steps ({few}); it is what few steps are compared with"
        if not registry.enabled:
            return ""
        if registry.max_few_step_loss is not None and many == few:
            return (f"evaluation.steps {list(self.steps)} has none above {few}, which the registry compares with; "
                    "add a larger number (many_steps), or set registry.enabled to false")  # fmt: skip
        if registry.min_kept is not None and self.kept_prompts == ():
            return ("evaluation.kept_prompts is empty, and the registry asks what was kept; name some, or set "
                    "registry.min_kept to null")  # fmt: skip
        return ""


class ComputeSettings(Group):
    """Where training runs. None of it changes what is learnt (to float32 rounding, over the number of workers)."""

    launcher: Literal["ray", "local"] = "ray"
    """``ray``: a Ray Train job, on the cluster in ``RAY_ADDRESS`` or on a Ray of its own on this machine. ``local``:
    in this process, for debugging."""
    workers: Positive | tuple[Positive, Positive] = 1
    """Data-parallel workers; least and most of them where the cluster may grow and shrink while it trains."""
    sharded: bool = False
    """Whether the workers divide the base's transformer among them (FSDP2) instead of each holding all of it."""
    resize_seconds: Rate = 60
    """How often a job with a least and a most of workers looks whether it can have more; a change costs the steps since
    its last checkpoint and the start of the workers."""
    cpus_per_worker: Positive | None = None
    """``None``: one per GPU worker, else this machine's CPUs shared among the workers."""
    gpus_per_worker: Annotated[float, Field(ge=0)] | None = None
    """``None``: 1 where ``model.device`` is or finds CUDA, else 0."""
    memory_gib: Rate | None = None
    """Memory that Ray sets aside for each worker; ``None`` asks for none."""
    storage: str | None = None
    """Where checkpoints of running jobs are: a folder that all nodes see, or ``s3://bucket/folder``; ``None`` means
    ``.cache/ray`` here."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """How often a job goes on from its last checkpoint after a worker or a node died."""

    @model_validator(mode="after")
    def _workers_in_order(self) -> ComputeSettings:
        if isinstance(self.workers, tuple) and self.workers[0] > self.workers[1]:
            raise ValueError(
                f"compute.workers: the least ({self.workers[0]}) is more than the most ({self.workers[1]})"
            )
        if self.sharded and (not isinstance(self.workers, int) or self.launcher == "local"):
            raise ValueError("compute.sharded needs launcher: ray and a fixed number of compute.workers")
        return self


class ExportSettings(Group):
    """The files that are given away. The adapter they are made from, in ``runs/NAME/adapters``, is float32."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """A bfloat16 pipeline draws the same pictures from either; float32 files are twice as large. Of a full tuning the
    base's own type is kept."""


class RegistrySettings(Group):
    """When an adapter becomes the champion of its concept."""

    enabled: bool = True
    min_learnt: Annotated[float, Field(ge=0)] | None = 0.0
    """Above this the 95 % interval must be of what a version learnt beyond the untuned base; ``None``: not asked."""
    min_kept: Annotated[float, Field(le=1)] | None = 0.25
    """Least mean of what is kept of the base's own pictures: 1 the same picture, 0 as far as another seed's; ``None``:
    not asked."""
    max_few_step_loss: Annotated[float, Field(ge=0)] | None = 0.1
    """How much more than the base a version may lose from many steps to few, as a share of what it learnt, and on
    general prompts of what was kept; ``None``: not asked."""
    min_diversity: Annotated[float, Field(ge=0)] | None = 0.25
    """Least distance between two seeds' pictures of the concept, as a share of the base's: a model that draws one
    average picture whatever it is asked is liker to the training pictures than real ones are. ``None``: not asked."""
    tolerance: Annotated[float, Field(ge=0)] | None = None
    """How far below champion and anchor any score may be and still count as not worse; ``None``: what chance does to
    the anchor itself, score by score (:mod:`dopsd.registry.gate`)."""
    max_base_gib: Annotated[float, Field(ge=0)] = 0.5
    """A base up to this size is stored with every version, so that the registry alone is enough; larger: its path."""


class TrackingSettings(Group):
    experiment: str = "dopsd"
    enabled: bool = True
