"""Upgrade manifests of earlier schema versions to the current version."""

from collections.abc import Callable, Mapping
from typing import Any

_ENDS = ["x_embedder", "t_embedder", "y_embedder", "final_layer.linear"]
"""Modules at both ends of the network, the same in all families of schema 3."""


def upgraded(content: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a manifest, upgraded to the newest schema that its version leads to.

    Content that does not fit its own schema is not checked here. The reader refuses it.
    """
    while type(version := content.get("schema_version")) is int and version in _UPGRADES:  # True == 1
        content = _UPGRADES[version](content)
    return content


def _from_3(content: dict[str, Any]) -> dict[str, Any]:
    """Upgrade from schema 3 to 4.

    Schema 4 replaces image side and channels by the latent shape, and adds the end modules.
    """
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


def _from_4(content: dict[str, Any]) -> dict[str, Any]:
    """Upgrade from schema 4 to 5.

    Schema 5 adds `masked` and `onnx_target`. Graphs of schema 4 read kept tokens by other inputs,
    which the runtime still fills, and add 1 to the scales of modulations themselves.
    """
    content = {**content, "schema_version": 5, "onnx_target": "onnxruntime"}
    model = content.get("model")
    if not isinstance(model, dict):
        return content
    return {**content, "model": {**model, "masked": model.get("family") == "maskdit"}}


def _from_5(content: dict[str, Any]) -> dict[str, Any]:
    """Upgrade from schema 5 to 6.

    Schema 6 makes the classes one kind of condition, gives shapes and rows by name, and states the
    times of runs: in schema 5 a model without noise levels has evenly spaced times.
    """
    rest = {name: value for name, value in content.items() if name != "condition_rows"}
    content = {**rest, "schema_version": 6, "hoisted_rows": {"condition": content.get("condition_rows")}}
    if isinstance(sampling := content.get("sampling"), dict) and "karras" in sampling:
        conventions = {name: value for name, value in sampling.items() if name != "karras"}
        levels = sampling["karras"]
        even = {"shift": 1.0, "last": None}
        content["sampling"] = {**conventions, "times": even if levels is None else levels}
    model = content.get("model")
    if not isinstance(model, dict):
        return content
    old = ("num_classes", "class_names", "modulations")
    facts = {name: value for name, value in model.items() if name not in old}
    added = {
        "conditions": {"count": model.get("num_classes"), "names": model.get("class_names")},
        "held": {"modulations": [model.get("modulations")]},
        "pixels_per_latent": 1 if model.get("space") == "pixel" else None,
    }
    return {**content, "model": {**facts, **added}}


def _from_6(content: dict[str, Any]) -> dict[str, Any]:
    """Upgrade from schema 6 to 7, which adds text encoder and decoder."""
    return {**content, "schema_version": 7}


_UPGRADES: Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]] = {3: _from_3, 4: _from_4, 5: _from_5, 6: _from_6}
