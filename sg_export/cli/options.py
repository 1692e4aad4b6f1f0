"""Option groups that several commands share.

A group adds its options to a command and passes their values as one dataclass.
"""

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from sg_export.cli.types import ComputeCapabilityType, ImageSizeType, PartsType, RampType, RouteType, SizeType
from sg_runtime.backends import BACKENDS
from sg_runtime.errors import UsageError
from sg_runtime.manifest import SUBSET_RULES

if TYPE_CHECKING:
    from sg_calibration.settings import FeedSettings
    from sg_export.checkpoint import Overrides
    from sg_export.options.engines import EngineOptions
    from sg_export.options.quantize import QuantizeOptions
    from sg_runtime.guidance import Ramp
    from sg_runtime.manifest import GuidanceMode, OnnxTarget, Part, Precision, QuantizedType, SubsetRule

F = TypeVar("F", bound=Callable[..., Any])

INTERVAL = click.option(
    "--interval",
    type=float,
    nargs=2,
    metavar="LOW HIGH",
    help="Times (t or sigma) between which guidance applies. Outside, the strong branch runs alone.",
)


SUBSET = click.option(
    "--subset",
    type=click.Choice(SUBSET_RULES),
    help="When runs draw the tokens that a sparse branch keeps: fresh in every evaluation, or fixed, once for all of "
    "them. By default as the model's own sampling does.",
)


class Group:
    """Options of a command, which gets their values as one argument.

    argument: name of the argument.
    record: dataclass of the values.
    options: decorators that add the options.
    names: names of the parameters that the options add.
    """

    def __init__(self, argument: str, record: Callable[..., object], options: Sequence[Callable[[F], F]]) -> None:
        self.argument, self.record, self.options = argument, record, options
        self.names = tuple(str(parameter.name) for parameter in _parameters(options))

    def __call__(self, command: F) -> F:
        """Add the options to a command."""

        @functools.wraps(command)
        def grouped(**values: Any) -> Any:
            record_values = {option: values.pop(option) for option in self.names}
            return command(**values, **{self.argument: self.record(**record_values)})

        for option in reversed(self.options):
            grouped = option(grouped)
        return grouped  # type: ignore[return-value]


def _parameters(options: Sequence[Callable[[F], F]]) -> list[click.Parameter]:
    """Return the parameters that these options add, in their order."""

    def nothing() -> None:
        pass

    for option in reversed(options):
        option(nothing)
    added: list[click.Parameter] = getattr(nothing, "__click_params__", [])
    return added[::-1]


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Facts about a checkpoint that the user states by options.

    size: height and width of the picture; several for build and calibrate.
    """

    weights: str | None
    key: str | None
    route: Any
    prediction: Any
    heads: int | None
    size: tuple[tuple[int, int], ...]
    text_tokens: int | None

    @property
    def weight_set(self) -> str | None:
        """The set of weights to read; see `load_model`."""
        if self.key is not None:
            refuse_given(("weights",), f"found with --key {self.key}: leave out one of them")
        return self.key or self.weights

    @property
    def overrides(self) -> "Overrides":
        """The facts that replace those of the checkpoint, with one size."""
        if len(self.size) > 1:
            raise UsageError(f"--size: expected one, found {len(self.size)}: only build and calibrate take several")
        return self.overrides_of_first

    @property
    def overrides_of_first(self) -> "Overrides":
        """The facts that replace those of the checkpoint, with the first size."""
        from sg_export.checkpoint import Overrides

        size = self.size[0] if self.size else None
        return Overrides(self.route, self.heads, self.prediction, size, self.text_tokens)


model_options = Group(
    "source",
    ModelSource,
    (
        click.option(
            "--weights",
            type=click.Choice(["ema", "model"]),
            help="Weights to take from the checkpoint.  [default: ema]",
        ),
        click.option(
            "--key",
            metavar="KEY",
            help="Key of the dict of weights in the checkpoint, or prefix of their names; a.b is b in a. In a folder, "
            "the variant of the weights.  [default: the keys that trainers use]",
        ),
        click.option("--route", type=RouteType(), help="Blocks that run on the kept tokens, both included: 2-24."),
        click.option(
            "--prediction",
            type=click.Choice(["flow", "edm", "x0"]),
            help="Prediction type of the network, if the checkpoint does not state it.",
        ),
        click.option(
            "--heads", type=click.IntRange(min=1), help="Attention heads, if the width is not one of upstream's."
        ),
        click.option(
            "--size",
            type=ImageSizeType(),
            metavar="HEIGHTxWIDTH",
            multiple=True,
            help="Height and width of the picture in pixels, for models with text. Repeatable in build and "
            "calibrate; the first is the default of runs.  [default: the pipeline's]",
        ),
        click.option(
            "--text-tokens",
            type=click.IntRange(min=1),
            help="Tokens of a prompt with padding, for models with text.  [default: the pipeline's, or 256]",
        ),
    ),
)


@dataclass(frozen=True, slots=True)
class DeviceChoice:
    """The device and the backend that the user chooses by options."""

    device: str
    backend: str | None
    threads: int | None


device_options = Group(
    "on",
    DeviceChoice,
    (
        click.option(
            "--device",
            default="auto",
            show_default=True,
            help="Device that runs the bundle: auto, cpu, cuda, or cuda:1 for another GPU.",
        ),
        click.option(
            "--backend",
            type=click.Choice(BACKENDS),
            metavar="BACKEND",
            help=f"Library that runs the bundle: {', '.join(BACKENDS)}.  [default: the fastest that works here]",
        ),
        click.option(
            "--threads",
            type=click.IntRange(min=1),
            help="Threads of a run on the CPU.  [default: one for each core that the process may use]",
        ),
    ),
)


@dataclass(frozen=True, slots=True)
class GuidanceChoice:
    """The guidance of a build, chosen by options.

    sparsity, strong_sparsity: sparsities of the weak and the strong branch.
    scale: guidance scale, or its first and last value.
    guidance: guidance mode.
    weak_checkpoint: checkpoint of the weak network.
    schedule: constant or cosine.
    interval: times between which guidance applies.
    subset: when runs draw kept tokens.
    """

    sparsity: tuple[float, ...]
    strong_sparsity: tuple[float, ...]
    scale: "Ramp"
    guidance: "GuidanceMode | None"
    weak_checkpoint: str | None
    schedule: Any
    interval: tuple[float, float] | None
    subset: "SubsetRule | None"


SPARSITY = click.option(
    "--sparsity",
    type=float,
    multiple=True,
    help="Sparsity of the weak branch: the share of tokens that skip the route. Repeatable; the first is the default "
    "of runs.  [default: 0.5 for sg]",
)
STRONG_SPARSITY = click.option(
    "--strong-sparsity",
    type=float,
    multiple=True,
    default=(0.0,),
    help="Sparsity of the strong branch. Repeatable; the first is the default of runs.  [default: 0]",
)
GUIDANCE = click.option(
    "--guidance",
    type=click.Choice(["sg", "cfg", "cfg+sg", "none"]),
    help="Guidance mode; guided graphs are built for its pairs of sparsities.  [default: sg]",
)
WEAK_CHECKPOINT = click.option(
    "--weak-checkpoint",
    type=click.Path(),
    metavar="PATH",
    help="Earlier checkpoint of the same training run, as the weak branch (AutoGuidance) at any sparsity.",
)

guidance_options = Group(
    "guidance",
    GuidanceChoice,
    (
        SPARSITY,
        STRONG_SPARSITY,
        click.option(
            "--scale",
            type=RampType(),
            default=2.0,
            help="Guidance scale, or FIRST:LAST for one that changes along a cosine over a run.  [default: 2]",
        ),
        GUIDANCE,
        WEAK_CHECKPOINT,
        click.option(
            "--schedule",
            type=click.Choice(["constant", "cosine"]),
            default="constant",
            show_default=True,
            help="Change of sparsity over a run. cosine goes from the first sparsity to the last, through all between.",
        ),
        INTERVAL,
        SUBSET,
    ),
)


@dataclass(frozen=True, slots=True)
class PartChoice:
    """The parts of a bundle, chosen by options.

    parts: names of the parts; None for all that the folders have.
    pipeline: folder of a pipeline.
    vae: folder of an autoencoder.
    text_precision: precision of the text encoder.
    """

    parts: "tuple[Part, ...] | None"
    pipeline: Path | None
    vae: Path | None
    text_precision: "Precision | None"


part_options = Group(
    "chosen_parts",
    PartChoice,
    (
        click.option(
            "--parts",
            type=PartsType(),
            metavar="LIST",
            help="Parts of the bundle, separated by commas: step is the denoiser, text the text encoder, decode the "
            "decoder of latents.  [default: step, and those that --vae, --pipeline or the folder of MODEL has]",
        ),
        click.option(
            "--pipeline",
            type=click.Path(path_type=Path),
            metavar="FOLDER",
            help="Folder of a pipeline of diffusers whose text encoder and decoder are taken.  [default: MODEL, if it "
            "is one]",
        ),
        click.option(
            "--vae",
            type=click.Path(path_type=Path),
            metavar="FOLDER",
            help="Folder of diffusers' AutoencoderKL or AutoencoderDC whose decoder is taken.  [default: the "
            "pipeline's]",
        ),
        click.option(
            "--text-precision",
            type=click.Choice(["fp32", "fp16", "bf16"]),
            help="Type of the text encoder's matmuls. Activations of Gemma are beyond the range of fp16.  [default: "
            "bf16 for GPUs, if --precision is lower than fp32; else fp32]",
        ),
    ),
)


@dataclass(frozen=True, slots=True)
class RangeSource:
    """The runs or the data that ranges of activations are measured on."""

    calib_data: Path | None
    calib_samples: int
    calib_steps: int
    calib_seed: int
    prompts: Path | None

    @property
    def feeds(self) -> "FeedSettings":
        """Settings of the calibration runs."""
        from sg_calibration.settings import FeedSettings

        return FeedSettings(self.calib_samples, self.calib_steps, self.calib_seed)


RUNS = ("calib_samples", "calib_steps", "calib_seed")
"""Options of the calibration runs."""

_FEEDS = (
    click.option(
        "--calib-data",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="Folder of your own calibration inputs (.npz with x, time, and label or embeddings and mask); replaces "
        "the calibration runs.",
    ),
    click.option(
        "--calib-samples",
        type=click.IntRange(min=1),
        default=16,
        show_default=True,
        help="Number of images in the calibration runs, for each pair of sparsities.",
    ),
    click.option(
        "--calib-steps",
        type=click.IntRange(min=25),
        default=25,
        show_default=True,
        help="Steps of each calibration run (Heun); every step is a stratum.",
    ),
    click.option(
        "--calib-seed",
        type=click.IntRange(min=0),
        default=0,
        show_default=True,
        help="First seed of the calibration runs.",
    ),
    click.option(
        "--prompts",
        type=click.Path(path_type=Path, dir_okay=False),
        metavar="FILE",
        help="File with a prompt in each line, for models with a text encoder: of the calibration runs and, in build, "
        "of the gates.  [default: a short list of everyday pictures]",
    ),
)

feed_options = Group("ranges", RangeSource, _FEEDS)


@dataclass(frozen=True, slots=True)
class QuantizationChoice(RangeSource):
    """The quantization of a build, chosen by options.

    calibration: table of ranges.
    method: rule that makes a range from observed values.
    exclude: layers that stay in the base precision.
    quantize_text: quantize the projections of the text.
    like: quantized bundle whose choice of layers to take over.
    gate_cosine, gate_guided: gates, if they differ from those of the type.
    allow_quality_loss: write the bundle even if its gates do not hold.
    """

    calibration: Path | None
    method: Any
    exclude: tuple[str, ...]
    quantize_text: bool
    like: Path | None
    gate_cosine: float | None
    gate_guided: float | None
    allow_quality_loss: bool

    def options(self, type: "QuantizedType") -> "QuantizeOptions":
        """Return the options of a quantization to this type."""
        from sg_calibration.types import QUANTS
        from sg_export.options.quantize import QuantizeOptions
        from sg_runtime.manifest import QualityGates

        usual = QUANTS[type].gates
        cosine = usual.cosine if self.gate_cosine is None else self.gate_cosine
        guided = usual.guided if self.gate_guided is None else self.gate_guided
        return QuantizeOptions(
            type,
            self.method,
            self.calibration,
            self.calib_data,
            self.feeds,
            self.prompts,
            self.exclude,
            self.quantize_text,
            self.like,
            QualityGates(cosine, guided),
            allow_quality_loss=self.allow_quality_loss,
        )


QUANTIZATION = (
    *("calibration", "calib_data", *RUNS, "prompts", "method", "exclude", "quantize_text", "like"),
    *("gate_cosine", "gate_guided", "allow_quality_loss", "base_precision"),
)
"""Options that are only for INT8 and FP8."""

quantization_options = Group(
    "quantization",
    QuantizationChoice,
    (
        click.option(
            "--calibration",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="Table of ranges from sg-export calibrate.  [default: the build measures the ranges]",
        ),
        *_FEEDS,
        click.option(
            "--method",
            type=click.Choice(["min-max", "percentile", "entropy"]),
            help="Rule that makes a range from observed values.  [default: percentile for int8, min-max for fp8]",
        ),
        click.option(
            "--exclude", multiple=True, metavar="LAYER", help="Layer to leave in the base precision; repeatable."
        ),
        click.option(
            "--quantize-text",
            is_flag=True,
            help="Quantize the projections of the text, too, which run once for a prompt.",
        ),
        click.option(
            "--like",
            type=click.Path(path_type=Path),
            metavar="BUNDLE",
            help="Quantized bundle whose choice of layers is taken over; replaces the search for layers.",
        ),
        click.option(
            "--gate-cosine",
            type=click.FloatRange(0, 1),
            help="Minimum cosine similarity of a branch to FP32 at every time.  [default: 0.99 for int8, 0.995 for "
            "fp8]",
        ),
        click.option(
            "--gate-guided",
            type=click.FloatRange(0),
            help="Maximum relative L2 distance of the guided prediction to FP32 at every time.  [default: 0.1 for "
            "int8, 0.06 for fp8]",
        ),
        click.option(
            "--allow-quality-loss", is_flag=True, help="Write the quantized bundle even if its gates do not hold."
        ),
    ),
)


@dataclass(frozen=True, slots=True)
class TargetChoice:
    """The targets of a build, chosen by options.

    target: targets by name.
    batch: image counts.
    sm: compute capabilities, 86 for 8.6.
    workspace: most scratch memory of an engine, in bytes.
    timing_cache: timing cache of TensorRT.
    keep_onnx: keep the ONNX graphs of engines.
    allow_unfused: accept attention without a fused kernel.
    """

    target: tuple[str, ...]
    batch: tuple[int, ...]
    sm: tuple[int, ...]
    workspace: int | None
    timing_cache: Path | None
    keep_onnx: bool
    allow_unfused: bool

    @property
    def onnx_target(self) -> "OnnxTarget":
        """What the ONNX graphs are for.

        Raises UsageError for onnxruntime-cuda next to another target.
        """
        if "onnxruntime-cuda" not in self.target:
            return "onnxruntime"
        if others := [target for target in self.target if target != "onnxruntime-cuda"]:
            raise UsageError(
                f"--target onnxruntime-cuda: expected no other target, found {', '.join(others)}, which does not know "
                f"its operators: build two bundles"
            )
        return "onnxruntime-cuda"

    def engines(self) -> "EngineOptions | None":
        """Return the engines to build; None if only ONNX graphs are built.

        Raises UsageError for options of engines if only ONNX graphs are built.
        """
        from sg_export.options.engines import EngineOptions
        from sg_runtime.manifest import ENGINE_TARGETS

        names = {target: library for library, target in ENGINE_TARGETS.items()}
        libraries = tuple(names[target] for target in dict.fromkeys(self.target) if target in names)
        if not libraries:
            refuse_given(ENGINES, "only for engines: give --target tensorrt-rtx or tensorrt")
            if len(self.batch) > 1:
                raise UsageError(
                    f"--batch: expected at most one for ONNX graphs, which are fixed to it, found {len(self.batch)}: "
                    f"leave it out for graphs that take any batch"
                )
            return None
        return EngineOptions(
            libraries,
            self.batch or (1,),
            self.sm,
            self.workspace,
            self.timing_cache,
            self.keep_onnx or "onnxruntime" in self.target,
            self.allow_unfused,
        )


ENGINES = ("sm", "workspace", "timing_cache", "keep_onnx", "allow_unfused")
"""Options that are only for engines."""

target_options = Group(
    "targets",
    TargetChoice,
    (
        click.option(
            "--target",
            type=click.Choice(["onnxruntime", "onnxruntime-cuda", "tensorrt-rtx", "tensorrt"]),
            multiple=True,
            default=("onnxruntime",),
            show_default=True,
            help="What to build: ONNX graphs, or engines; repeatable. onnxruntime-cuda is alone: ONNX graphs with the "
            "fused operators of ONNX Runtime's CUDA provider. tensorrt-rtx builds without a GPU; tensorrt "
            "(experimental) builds on the GPU that the engine is for.",
        ),
        click.option(
            "--batch",
            type=click.IntRange(min=1),
            multiple=True,
            help="Number of images in one graph run. Repeatable for engines, which have a profile for each.  [default: "
            "any for ONNX graphs, 1 for engines]",
        ),
        click.option(
            "--sm",
            type=ComputeCapabilityType(),
            multiple=True,
            help="Compute capability of the GPUs that TensorRT-RTX builds for; repeatable.  [default: the library's "
            "choice: 8.0, 8.6, 8.9, 12.0, 12.1 in version 1.7]",
        ),
        click.option(
            "--workspace", type=SizeType(), help="Maximum scratch memory of an engine.  [default: the library's choice]"
        ),
        click.option(
            "--timing-cache",
            type=click.Path(path_type=Path, dir_okay=False),
            help="Timing cache file that TensorRT reads and extends. TensorRT-RTX has no timing cache.",
        ),
        click.option(
            "--keep-onnx", is_flag=True, help="Keep the ONNX graphs next to engines in the bundle; verify needs them."
        ),
        click.option("--allow-unfused", is_flag=True, help="Accept engines in which attention has no fused kernel."),
    ),
)


def refuse_given(names: Collection[str], why: str) -> None:
    """Raise UsageError for the first of these options that the user gave to the running command."""
    context = click.get_current_context()
    for option in context.command.params:
        if option.name in names and context.get_parameter_source(option.name) is ParameterSource.COMMANDLINE:
            raise UsageError(f"{option.opts[0]}: {why}")
