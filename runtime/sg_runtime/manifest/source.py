"""What the networks of a bundle were read from."""

from dataclasses import dataclass

from sg_runtime.manifest.base import Strict


@dataclass(frozen=True, slots=True)
class Source(Strict):
    """The checkpoint that a network was read from.

    file: name of the checkpoint's file or folder.
    sha256: SHA-256 of the file in lower-case hex. The shards that an index lists are joined to
    it, in the order of their names. In a folder, the configurations come first.
    weights: set of weights in the file: "ema", "model" or a key; "bare" if the file has only one.
    In a folder, the variant of the weights; "bare" for weights without a variant.
    reference: name of the model if it ships with sg-export, else None.
    """

    file: str
    sha256: str
    weights: str
    reference: str | None

    @property
    def name(self) -> str:
        """Name of the checkpoint on the command line."""
        return self.reference or self.file
