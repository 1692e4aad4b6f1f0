"""Reference models that ship with sg-export. `examples/train_glyphs.py` trained them."""

from pathlib import Path

REFERENCES = {"glyphs": "glyphs.safetensors", "glyphs-early": "glyphs-early.safetensors"}
DEFAULT_REFERENCE = "glyphs"


def reference_path(name: str) -> Path:
    """Return the checkpoint file of the reference model `name`, a key of REFERENCES."""
    return Path(__file__).parent / REFERENCES[name]
