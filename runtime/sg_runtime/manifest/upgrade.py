"""Manifests of earlier schema versions as one of today."""

from collections.abc import Callable, Mapping
from typing import Any

_ENDS = ["x_embedder", "t_embedder", "y_embedder", "final_layer.linear"]
"""Of all families that schema 3 knows."""


def upgraded(content: dict[str, Any]) -> dict[str, Any]:
    """The content of a manifest in the newest schema that its version leads to.

    What does not fit its own schema is left for the reader to refuse.
    """
    while type(version := content.get("schema_version")) is int and version in _UPGRADES:  # True == 1
        content = _UPGRADES[version](content)
    return content


def _from_3(content: dict[str, Any]) -> dict[str, Any]:
    """Schema 4 has the latent's shape in place of one side and the channels, and names the modules at both ends."""
    model = content.get("model")
    if not isinstance(model, dict):
        return {**content, "schema_version": 4}
    facts = {name: value for name, value in model.items() if name not in ("image_size", "channels")}
    side = model.get("image_size")
    return {
        **content,
        "schema_version": 4,
        "model": {**facts, "latent": [model.get("channels"), side, side], "ends": _ENDS},
    }


_UPGRADES: Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]] = {3: _from_3}
