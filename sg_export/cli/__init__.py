"""The command line, a shell over `sg_export` and `sg_runtime`.

Heavy libraries are imported inside the commands.
"""

import sys
from contextlib import suppress
from typing import Any

import click

from sg_export.cli.bench import bench
from sg_export.cli.build import build
from sg_export.cli.calibrate import calibrate
from sg_export.cli.doctor import doctor
from sg_export.cli.generate import generate
from sg_export.cli.inspect import inspect
from sg_export.cli.output import prepare_streams
from sg_export.cli.report import report
from sg_export.cli.sample import sample
from sg_export.cli.serve import serve
from sg_export.cli.triton import triton
from sg_export.cli.verify import verify
from sg_runtime import __version__

__all__ = ["main"]


class Main(click.Group):
    """The command line as a whole. No stream ends it in a traceback, whatever its encoding."""

    def main(self, *arguments: Any, **settings: Any) -> Any:
        """Run a command; standard output that cannot be written ends it with exit code 1."""
        prepare_streams()
        try:
            return super().main(*arguments, **settings)
        except OSError as error:
            with suppress(OSError):
                click.echo(f"Error: standard output or error: {error.strerror}", err=True)
            sys.exit(1)


@click.group(cls=Main, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="sg-export")
def main() -> None:
    """Compile token-sparse diffusion transformers, and run them with Sparse Guidance.

    \b
    Start here, with the reference model that ships with sg-export:
      sg-export build --sparsity 0.5 -o glyphs-bundle
      sg-export verify glyphs-bundle
      sg-export generate glyphs-bundle --class A --count 16 -o grid.png

    Exit codes: 0 done, 2 wrong or unsupported request, 3 export failed, 4 engine failed, 5 a parity
    gate failed or samples are not finite, 6 bundle, checkpoint or device unusable here, 130
    interrupted, 143 and 129 ended by SIGTERM and SIGHUP.
    """


for command in (build, calibrate, generate, sample, inspect, verify, bench, report, serve, triton, doctor):
    main.add_command(command)
