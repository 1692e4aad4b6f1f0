"""Entry point of `python -m sg_export`, the command line."""

from sg_export.cli import main

main(prog_name="sg-export")
