"""Bundles whose manifest is invalid or contradicts itself. The message names the place."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Edit = Callable[[Callable[[Any], object]], None]
Refused = Callable[..., None]


@pytest.fixture
def bundle(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Return a copy of the tiny bundle, or of the bundle that a test names."""
    whole = request.getfixturevalue(getattr(request, "param", "tiny_bundle"))
    return Path(shutil.copytree(whole, tmp_path / "bundle"))


def test_load_without_a_manifest_is_refused(bundle: Path, refused: Refused) -> None:
    (bundle / "manifest.json").unlink()
    refused("manifest.json: expected the manifest of a bundle, found No such file or directory; rebuild it")


def test_load_of_a_folder_as_manifest_is_refused(bundle: Path, refused: Refused) -> None:
    (bundle / "manifest.json").unlink()
    (bundle / "manifest.json").mkdir()
    refused("manifest.json: expected the manifest of a bundle, found Is a directory")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"PK\x03\x04",
        b"\xff\xfe{\x00}\x00",  # UTF-16
        b"{'schema_version': 1}",
        b"[" * 100_000,  # deeper than any parser goes
        b'{"schema_version": ' + b"9" * 5000 + b"}",  # longer than the numbers that Python reads
    ],
    ids=["empty", "half", "zip", "utf-16", "python", "deep", "long-number"],
)
def test_load_of_a_manifest_that_is_no_json_is_refused(bundle: Path, refused: Refused, content: bytes) -> None:
    (bundle / "manifest.json").write_bytes(content)
    refused("manifest.json: expected the manifest of a bundle, found invalid JSON (", "; rebuild it")


@pytest.mark.parametrize("content", [b"null", b"[]", b"3", b'"manifest"', b"{}"])
def test_load_of_json_that_is_no_manifest_is_refused(bundle: Path, refused: Refused, content: bytes) -> None:
    (bundle / "manifest.json").write_bytes(content)
    refused("manifest.json: expected schema version 7, found None")


@pytest.mark.parametrize("version", [0, 1, -1, "2", True, 2.0, [2], 10**30])
def test_load_of_an_unknown_schema_version_is_refused(edit: Edit, refused: Refused, version: object) -> None:
    edit(lambda content: content.update(schema_version=version))
    refused(f"expected schema version 7, found {version!r}; rebuild the bundle with this sg-export")


def test_load_of_half_a_character_is_refused(edit: Edit, refused: Refused) -> None:
    r"""`json` reads and writes a lone surrogate, "\ud800"; no text file could hold it."""
    edit(lambda content: content.update(created_by="\ud800"))
    refused("manifest.json: ", "rebuild it")


def test_load_of_an_unknown_key_is_refused(edit: Edit, refused: Refused) -> None:
    edit(lambda content: content["model"].update(decoder="vae"))
    refused("manifest.json: model.decoder: ", "(errors: 1); rebuild it")


def test_load_of_a_number_as_text_is_refused(edit: Edit, refused: Refused) -> None:
    edit(lambda content: content["model"].update(tokens="16"))
    refused("manifest.json: model.tokens: ", "valid integer")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["guidance"]["weak"].update(keep=16), "expected a weak branch sparser than the strong one"),
        (lambda c: c["guidance"]["weak"].update(keep=0), "keep: expected at least 1, found 0"),
        (lambda c: c["guidance"]["strong"].update(keep=17), "keep: expected at most the model's 16 tokens, found 17"),
        (lambda c: c["graphs"][-1]["levels"][0].update(keep=99), "expected at most the model's 16 tokens, found 99"),
        (lambda c: c["guidance"].update(mode="cfg"), "cfg guidance: expected equal sparsities"),
        (lambda c: c["guidance"].update(scale=float("nan")), "scale: expected a finite float32 number, found nan"),
        (lambda c: c["guidance"].update(scale=float("inf")), "scale: expected a finite float32 number, found inf"),
        (lambda c: c["guidance"]["weak"].update(sparsity=1.5), "sparsity 1.5: expected at least 0 and less than 1"),
        (lambda c: c["model"]["conditions"].update(names=["one"]), "class_names: expected 5 names, found 1"),
        (lambda c: c["model"]["route"].update(start=2, end=1), "route 2-1: expected 0 <= start <= end"),
        (lambda c: c["model"].update(latent=[-2, 8, 8]), "latent: expected sizes of at least 1, found (-2, 8, 8)"),
        (lambda c: c["model"].update(latent=[2, 8, 0]), "latent: expected sizes of at least 1, found (2, 8, 0)"),
        (lambda c: c["model"]["conditions"].update(count=-1), "count: expected at least 1, found -1"),
        (lambda c: c["sampling"].update(steps=0), "steps: expected at least 1, found 0"),
        (lambda c: c.update(batch=0), "batch: expected at least 1, found 0"),
        (lambda c: c.update(batch=-3), "batch: expected at least 1, found -3"),
        (
            lambda c: c["hoisted_rows"].update(condition=0),
            "hoisted_rows: expected at least 1 for condition, found {'condition': 0}",
        ),
        (lambda c: c["graphs"].pop(0), "graphs: expected a condition graph for the main network, found none"),
        (lambda c: c.update(graphs=[]), "graphs: expected a condition graph for the main network, found none"),
        (lambda c: c["graphs"][1].update(outputs=[]), "graph dense: outputs: expected at least one, found none"),
        (lambda c: c["graphs"][1].update(levels=[]), "graph dense: levels: expected 1 for dense, found 0"),
        (lambda c: c["graphs"][-1]["levels"].pop(), "levels: expected 2 for guided, found 1"),
        (lambda c: c["graphs"][0].update(kind="dense"), "graph condition: levels: expected 1 for dense, found 0"),
    ],
)
def test_load_of_a_manifest_that_contradicts_itself_is_refused(
    edit: Edit, refused: Refused, change: Callable[[Any], object], message: str
) -> None:
    edit(change)
    refused("manifest.json: ", message, "; rebuild it")


def ends(**values: Any) -> Callable[[Any], object]:
    """Return a change that replaces parts of the guidance plan."""
    return lambda content: content["guidance"].update(values)


def levels(**values: Any) -> Callable[[Any], object]:
    """Return a change that replaces noise levels."""
    return lambda content: content["sampling"]["times"].update(values)


def noise(**values: Any) -> Callable[[Any], object]:
    """Return a change that replaces conventions about noise."""
    return lambda content: content["sampling"].update(values)


NO_LEVELS = "sampling: times: expected noise levels for an edm model, and times from 1 to 0 for other models"
INTERVAL = "interval: expected 0 <= lowest time <= highest time, found "
LEVELS = "noise levels: expected 0 < sigma_min < sigma_max in float32 and rho of at least 1, found "


@pytest.mark.parametrize(
    ("bundle", "change", "message"),
    [
        # Guidance for which the bundle has no network
        ("tiny_bundle", ends(mode="autoguidance"), "weak_source: expected a checkpoint for autoguidance, found none"),
        (
            "tiny_autoguidance_bundle",
            lambda c: c.update(weak_source=None),
            "weak_source: expected a checkpoint for autoguidance, found none",
        ),
        (
            "tiny_autoguidance_bundle",
            lambda c: c.update(graphs=[g for g in c["graphs"] if g["file"] != "graphs/weak-condition.onnx"]),
            "graphs: expected a condition graph for the weak network, found none",
        ),
        (
            "tiny_autoguidance_bundle",
            lambda c: c["graphs"][0].update(network="weak"),
            "graphs: expected a condition graph for the main network, found none",
        ),
        (
            "tiny_bundle",
            lambda c: c.update(weak_source=c["source"]),
            "graphs: expected a condition graph for the weak network, found none",
        ),
        ("tiny_bundle", lambda c: c["graphs"][1].update(network="third"), "graphs.1.network: "),
        ("tiny_bundle", ends(mode="pag"), "guidance.mode: "),
        # Sparsities
        ("tiny_cfg_bundle", ends(mode="sg"), "sg guidance: expected a weak branch sparser than the strong one"),
        ("tiny_cfg_sg_bundle", ends(mode="cfg"), "cfg guidance: expected equal sparsities"),
        (
            "tiny_cfg_bundle",
            ends(weak_last={"sparsity": 0.25, "keep": 12}),
            "cfg guidance: expected equal sparsities",
        ),
        (
            "tiny_cosine_bundle",
            ends(strong_last=None, weak_last=None, weak={"sparsity": 0.0, "keep": 16}),
            "sg guidance: expected a weak branch sparser than the strong one",
        ),
        (
            "tiny_cosine_bundle",
            ends(strong_last={"sparsity": 0.25, "keep": 17}),
            "keep: expected at most the model's 16 tokens, found 17",
        ),
        ("tiny_cosine_bundle", ends(weak_last={"sparsity": 0.0, "keep": 0}), "keep: expected at least 1, found 0"),
        (
            "tiny_cosine_bundle",
            ends(weak_last={"sparsity": 1.0, "keep": 4}),
            "sparsity 1: expected at least 0 and less than 1",
        ),
        ("tiny_cosine_bundle", ends(strong_last=0.25), "guidance.strong_last: "),
        # Scale and interval
        ("tiny_cosine_bundle", ends(scale_last=float("nan")), "scale: expected a finite float32 number, found nan"),
        ("tiny_cosine_bundle", ends(scale_last=1e39), "scale: expected a finite float32 number, found 1e+39"),
        ("tiny_cosine_bundle", ends(interval=[0.9, 0.15]), INTERVAL + "0.9 to 0.15"),
        ("tiny_cosine_bundle", ends(interval=[-1, 0.15]), INTERVAL + "-1 to 0.15"),
        ("tiny_cosine_bundle", ends(interval=[float("nan"), 1]), INTERVAL + "nan to 1"),
        ("tiny_cosine_bundle", ends(interval=[0, float("inf")]), INTERVAL + "0 to inf"),
        ("tiny_cosine_bundle", ends(interval=[0.1]), "guidance.interval.1: "),
        # Noise levels
        ("tiny_bundle", lambda c: c["model"].update(prediction="edm"), NO_LEVELS),
        ("tiny_edm_bundle", lambda c: c["model"].update(prediction="flow"), NO_LEVELS),
        ("tiny_edm_bundle", lambda c: c["sampling"].update(times={"shift": 1.0, "last": None}), NO_LEVELS),
        (
            "tiny_bundle",
            lambda c: c["sampling"].update(times={"sigma_min": 0.002, "sigma_max": 80, "rho": 7}),
            NO_LEVELS,
        ),
        ("tiny_edm_bundle", levels(sigma_min=0), LEVELS + "0, 80 and 7"),
        ("tiny_edm_bundle", levels(sigma_min=-0.002), LEVELS + "-0.002, 80 and 7"),
        ("tiny_edm_bundle", levels(sigma_min=1e-320), LEVELS + "9.99989e-321, 80 and 7"),
        ("tiny_edm_bundle", levels(sigma_max=0.001), LEVELS + "0.002, 0.001 and 7"),
        ("tiny_edm_bundle", levels(sigma_max=1e300), LEVELS + "0.002, 1e+300 and 7"),
        ("tiny_edm_bundle", levels(rho=0), LEVELS + "0.002, 80 and 0"),
        ("tiny_edm_bundle", levels(rho=1e-9), LEVELS + "0.002, 80 and 1e-09"),
        ("tiny_edm_bundle", levels(rho=float("nan")), LEVELS + "0.002, 80 and nan"),
        ("tiny_edm_bundle", levels(s_churn=40), "sampling.times.Karras.s_churn: "),
        ("tiny_bundle", levels(shift=0), "times: shift: expected a float32 number above 0, found 0"),
        ("tiny_bundle", levels(shift=1e39), "times: shift: expected a float32 number above 0, found 1e+39"),
        ("tiny_bundle", levels(last=1), "times: last: expected a float32 number above 0 and below 1, found 1"),
        ("tiny_bundle", noise(noise_scale=0), "noise_scale: expected a float32 number above 0, found 0"),
        ("tiny_bundle", noise(noise_scale=float("inf")), "noise_scale: expected a float32 number above 0, found inf"),
        ("tiny_bundle", noise(time_floor=2), "time_floor: expected 0 to 1, found 2"),
        ("tiny_bundle", noise(time_floor=0.05), "sampling: time_floor: expected 0 for a model of flow"),
    ],
    indirect=["bundle"],
)
def test_load_of_guidance_or_noise_levels_that_cannot_be_is_refused(
    bundle: Path, edit: Edit, refused: Refused, change: Callable[[Any], object], message: str
) -> None:
    edit(change)
    refused("manifest.json: ", message, "; rebuild it")
