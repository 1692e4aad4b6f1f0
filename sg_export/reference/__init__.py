"""Reference models that ship with sg-export.

`examples/train_glyphs.py` and `examples/train_scenes.py` trained them.
"""

from pathlib import Path

REFERENCES = {"glyphs": "glyphs.safetensors", "glyphs-early": "glyphs-early.safetensors", "scenes": "scenes"}
"""File, or folder of diffusers, of each model."""

DEFAULT_REFERENCE = "glyphs"


def place_of(checkpoint: str | Path) -> Path:
    """Return the path of a checkpoint: the path itself, or that of a reference model by name."""
    name = str(checkpoint)
    return Path(__file__).parent / REFERENCES[name] if name in REFERENCES else Path(checkpoint)
