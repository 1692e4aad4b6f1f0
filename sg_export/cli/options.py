"""What every command shares: errors as messages with exit codes, options, progress, tables."""

import errno
import logging
import re
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from sg_export.progress import Report, silent
from sg_runtime.backends import BACKENDS
from sg_runtime.errors import SgError, UsageError
from sg_runtime.guidance import Ramp
from sg_runtime.manifest import Route

F = TypeVar("F", bound=Callable[..., Any])
RUNS = ("calib_samples", "calib_steps", "calib_seed")
"""Options of the runs that ranges are measured on."""
QUANTIZATION = (
    *("calibration", "calib_data", *RUNS, "method", "exclude", "like"),
    *("gate_cosine", "gate_guided", "allow_quality_loss", "base_precision"),
)
"""Options of INT8 and FP8 alone."""
EXTRAS = {
    "ml_dtypes": "export",
    "onnx": "export",
    "onnx_ir": "export",
    "onnxruntime": "ort",
    "onnxscript": "export",
    "polygraphy": "verify",
    "safetensors": "export",
    "torch": "export",
}
"""The extra that installs a library."""


class Failure(click.ClickException):
    """A message for the user, with the exit code of its kind."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]  # click documents it per class, and reads it per instance


class Command(click.Command):
    """A command whose errors end as one message and the right exit code; `--debug` shows where they came from."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.params.append(click.Option(["--debug"], is_flag=True, help="Show the Python traceback of an error."))

    def invoke(self, context: click.Context) -> Any:
        debug = context.params.pop("debug")
        try:
            return super().invoke(context)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            raise Failure("interrupted; nothing was left half-written", 130) from None
        except Exception as error:
            if debug:
                traceback.print_exc()
            raise failure(error) from error


def failure(error: Exception) -> Failure:
    """The message and exit code of an error."""
    if isinstance(error, SgError):
        return Failure(str(error), error.exit_code)
    if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
        return Failure(f"{error.name} is not installed: pip install 'sg-export[{EXTRAS[error.name]}]'", 2)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return Failure("the disk is full; free some space, or write to another disk", 1)
    if isinstance(error, OSError) and error.filename is not None:
        return Failure(f"{error.filename}: {error.strerror}", 2)
    return Failure(f"unexpected {type(error).__name__}: {error}; run again with --debug, and please report it", 1)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system says of a temporary file beside `path` into a message on `path`, which the user gave."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise Failure(
                f"{path}: the disk is full; free some space, or give an --output on another disk", 1
            ) from error
        raise Failure(f"{path}: cannot be written ({error.strerror or error}): give another --output", 2) from error


class RouteType(click.ParamType[Route]):
    """START-END, both blocks included."""

    name = "START-END"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Route:
        if isinstance(value, Route):
            return value
        try:
            return Route.parse(value)
        except UsageError as error:
            self.fail(str(error), param, context)


class RampType(click.ParamType[Ramp]):
    """A number, or FIRST:LAST for a cosine from the first step's to the last step's."""

    name = "NUMBER|FIRST:LAST"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Ramp:
        if not isinstance(value, str):
            return value  # type: ignore[no-any-return]  # a default
        try:
            numbers = tuple(float(part) for part in value.split(":"))
        except ValueError:
            numbers = ()
        if len(numbers) not in (1, 2):
            self.fail(f"{value!r}: expected a number, or two as FIRST:LAST", param, context)
        return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


class ComputeCapabilityType(click.ParamType[int]):
    """8.6 or 86."""

    name = "SM"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> int:
        match = re.fullmatch(r"(\d{1,2})\.?(\d)", str(value))
        if match is None:
            self.fail(f"{value!r}: expected a compute capability, as 8.6 or 86", param, context)
        return int(match[1] + match[2])


class SizeType(click.ParamType[int]):
    """Bytes, with a unit: 512M or 4G."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> int:
        match = re.fullmatch(r"(\d+)([KMG]?)i?B?", str(value), re.IGNORECASE)
        if match is None or int(match[1]) == 0:
            self.fail(f"{value!r}: expected a size, as 512M or 4G", param, context)
        return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2].upper()]


INTERVAL = click.option(
    "--interval",
    type=float,
    nargs=2,
    metavar="LOW HIGH",
    help="Times between which guidance applies, t or sigma; outside, the strong branch runs alone.",
)


def _decorated(command: F, options: Sequence[Callable[[F], F]]) -> F:
    """The command with these options, in this order."""
    for option in reversed(options):
        command = option(command)
    return command


def model_options(command: F) -> F:
    """Options that state what a checkpoint does not."""
    options = (
        click.option("--weights", type=click.Choice(["ema", "model"]), help="Weights to take; the EMA by default."),
        click.option("--route", type=RouteType(), help="Blocks that run on the kept tokens, both included: 2-24."),
        click.option(
            "--prediction", type=click.Choice(["flow", "edm"]), help="What the network predicts, where unknown."
        ),
        click.option(
            "--heads", type=click.IntRange(min=1), help="Attention heads, where the width is none of upstream's."
        ),
    )
    return _decorated(command, options)


def feed_options(command: F) -> F:
    """Options that say what ranges of activations are measured on."""
    options = (
        click.option(
            "--calib-data",
            type=click.Path(path_type=Path),
            metavar="DIR",
            help="Shards of your own (.npz with x, time, label) in place of guided runs of the model.",
        ),
        click.option(
            "--calib-samples",
            type=click.IntRange(min=1),
            default=16,
            show_default=True,
            help="Images for each pair of sparsities.",
        ),
        click.option(
            "--calib-steps",
            type=click.IntRange(min=25),
            default=25,
            show_default=True,
            help="Steps of their Heun runs: times at which ranges are seen.",
        ),
        click.option(
            "--calib-seed", type=click.IntRange(min=0), default=0, show_default=True, help="Their first seed."
        ),
    )
    return _decorated(command, options)


def quantization_options(command: F) -> F:
    """Options of int8 and fp8."""
    options = (
        click.option(
            "--calibration",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="Ranges from sg-export calibrate.  [default: they are measured]",
        ),
        feed_options,
        click.option(
            "--method",
            type=click.Choice(["min-max", "percentile", "entropy"]),
            help="How a range follows from what was seen.  [default: percentile for int8, min-max for fp8]",
        ),
        click.option("--exclude", multiple=True, metavar="LAYER", help="A layer to leave as it is; repeatable."),
        click.option(
            "--like",
            type=click.Path(path_type=Path),
            metavar="BUNDLE",
            help="A quantized bundle whose choice of layers to take over, in place of a search.",
        ),
        click.option("--gate-cosine", type=click.FloatRange(0, 1), help="[default: 0.99 for int8, 0.995 for fp8]"),
        click.option("--gate-guided", type=click.FloatRange(0), help="[default: 0.1 for int8, 0.06 for fp8]"),
        click.option("--allow-quality-loss", is_flag=True, help="Write the bundle though its gates do not hold."),
    )
    return _decorated(command, options)


def refuse_given(names: Collection[str], why: str) -> None:
    """Raise UsageError for the first of these options of the running command that was given."""
    context = click.get_current_context()
    for option in context.command.params:
        if option.name in names and context.get_parameter_source(option.name) is ParameterSource.COMMANDLINE:
            raise UsageError(f"{option.opts[0]}: {why}")


def check_parent(path: Path) -> None:
    """Raise UsageError where a file cannot be written for want of its folder, before any work."""
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{path}: cannot be written: found no folder {path.absolute().parent}")


def device_options(command: F) -> F:
    """Options that say what runs a bundle."""
    options = (
        click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, or cuda:1 for another GPU."),
        click.option("--backend", type=click.Choice(BACKENDS), help="[default: the best that works here]"),
    )
    return _decorated(command, options)


@contextmanager
def progress(quiet: bool) -> Iterator[Report]:
    """Report stages on standard error: as a bar on a terminal, a line each elsewhere, not at all if `quiet`."""
    if quiet:
        yield silent
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("", total=None)

            def show(stage: str, done: int, total: int | None, share: float | None = None) -> None:
                told = stage if share is None else f"{stage} {share:.0%}"
                bar.update(task, description=told, completed=done, total=total)

            yield show
    else:
        last = None

        def line(stage: str, done: int, total: int | None, share: float | None = None) -> None:
            nonlocal last
            if stage != last:
                click.echo(stage if total is None else f"[{done + 1}/{total}] {stage}", err=True)
            last = stage

        yield line


@contextmanager
def messages(everything: bool) -> Iterator[None]:
    """Show the warnings of sg-export on standard error, or `everything` that it tells."""

    class Echo(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            click.echo(record.getMessage(), err=True)

    log, handler = logging.getLogger("sg_export"), Echo()
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO if everything else logging.WARNING)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table; columns of numbers are right-aligned. Wide where standard output is no terminal."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title or None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[index], int | float) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell(value)) for value in row))
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def cell(value: object) -> str:
    """A value as table text: floats with four digits, None as a dash."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
