"""`python -m sg_export` is the command line."""

from sg_export.cli import main

main(prog_name="sg-export")
