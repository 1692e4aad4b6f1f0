"""The manifest: what is written reads back the same, and anything else is refused with its place."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sg_runtime.manifest
from sg_runtime.errors import BundleError, UsageError
from sg_runtime.manifest import (
    FLOAT32_MAX,
    SCHEMA_VERSION,
    Cost,
    FileFacts,
    GraphFacts,
    GuidancePlan,
    Level,
    Manifest,
    ModelFacts,
    Route,
    Sampling,
    Source,
    TensorFacts,
    json_schema,
    read_manifest,
    write_manifest,
)

SCHEMA_FILE = Path(sg_runtime.manifest.__file__).with_name("manifest.schema.json")
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)  # JSON in UTF-8 has no lone surrogates
counts = st.integers(1, 2**63 - 1)
numbers = st.floats(allow_nan=False, allow_infinity=False)
scales = st.floats(-FLOAT32_MAX, FLOAT32_MAX)
sparsities = st.floats(0, 1, exclude_max=True)
tensors = st.builds(
    TensorFacts, texts, st.sampled_from(["float32", "int64"]), st.lists(st.one_of(counts, texts), max_size=4).map(tuple)
)
routes = st.tuples(st.integers(0, 99), st.integers(0, 99)).map(lambda pair: Route(min(pair), max(pair)))


@st.composite
def models(draw: st.DrawFn) -> ModelFacts:
    names = draw(st.none() | st.lists(texts, min_size=1, max_size=3).map(tuple))
    sizes = draw(st.lists(counts, min_size=7, max_size=7))
    image_size, channels, patch, width, depth, heads, modulations = sizes
    return ModelFacts(
        family=draw(texts),
        prediction=draw(st.sampled_from(["flow", "edm"])),
        space=draw(st.sampled_from(["pixel", "latent"])),
        image_size=image_size,
        channels=channels,
        patch=patch,
        tokens=draw(st.integers(2, 1000)),
        width=width,
        depth=depth,
        heads=heads,
        num_classes=draw(counts) if names is None else len(names),
        modulations=modulations,
        parameters=draw(counts),
        route=draw(st.none() | routes),
        class_names=names,
    )


@st.composite
def graphs(draw: st.DrawFn, tokens: int, kind: str) -> GraphFacts:
    level = st.builds(Level, sparsities, st.integers(1, tokens))
    levels = {"condition": 0, "dense": 1, "sparse": 1, "guided": 2}[kind]
    return GraphFacts(
        kind=kind,
        levels=tuple(draw(level) for _ in range(levels)),
        file=draw(texts),
        inputs=tuple(draw(st.lists(tensors, max_size=2))),
        outputs=tuple(draw(st.lists(tensors, min_size=1, max_size=2))),
        cost=Cost(draw(counts), draw(counts), draw(counts)),
        parity=draw(st.none() | numbers),
    )


@st.composite
def plans(draw: st.DrawFn, tokens: int) -> GuidancePlan:
    mode = draw(st.sampled_from(["none", "cfg", "sg"]))
    strong = Level(draw(sparsities), draw(st.integers(2, tokens)))
    weak = Level(draw(sparsities), draw(st.integers(1, strong.keep - 1))) if mode == "sg" else strong
    return GuidancePlan(mode, strong, weak, draw(scales))


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    model = draw(models())
    kinds = draw(st.lists(st.sampled_from(["dense", "sparse", "guided"]), max_size=3))
    return Manifest(
        schema_version=SCHEMA_VERSION,
        created_by=draw(texts),
        model=model,
        guidance=draw(plans(model.tokens)),
        sampling=Sampling(draw(st.sampled_from(["euler", "heun"])), draw(counts)),
        precision="fp32",
        opset=draw(counts),
        batch=draw(st.none() | counts),
        condition_rows=draw(counts),
        graphs=tuple(draw(graphs(model.tokens, kind)) for kind in ["condition", *kinds]),
        source=Source(
            draw(texts), draw(texts), draw(st.sampled_from(["ema", "model", "bare"])), draw(st.none() | texts)
        ),
        files=draw(st.dictionaries(texts, st.builds(FileFacts, counts, texts), max_size=3)),
    )


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = json.loads(SCHEMA_FILE.read_bytes())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.fixture
def content(glyphs_bundle: Path) -> Any:
    """The manifest of the reference bundle as JSON, to be altered."""
    return json.loads((glyphs_bundle / "manifest.json").read_bytes())


@pytest.fixture
def read(tmp_path: Path) -> Callable[[Any], Manifest]:
    """Reads altered JSON."""

    def read(content: Any) -> Manifest:
        path = tmp_path / "manifest.json"
        path.write_text(json.dumps(content))
        return read_manifest(path)

    return read


# One manifest after the other goes through the same file: the fixture of the folder need not be fresh for each.
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(manifests())
def test_write_manifest_of_any_manifest_reads_back_equal_and_fits_the_schema(
    tmp_path: Path, validator: jsonschema.Draft202012Validator, manifest: Manifest
) -> None:
    path = tmp_path / "manifest.json"
    write_manifest(manifest, path)
    assert read_manifest(path) == manifest
    validator.validate(json.loads(path.read_bytes()))


def test_read_manifest_of_a_real_bundle_fits_the_schema(
    content: Any, validator: jsonschema.Draft202012Validator
) -> None:
    validator.validate(content)


def test_write_manifest_of_a_real_bundle_writes_the_same_bytes(glyphs_bundle: Path, tmp_path: Path) -> None:
    written = glyphs_bundle / "manifest.json"
    write_manifest(read_manifest(written), tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == written.read_bytes()


def test_json_schema_of_the_code_is_the_file() -> None:
    assert SCHEMA_FILE.read_text(encoding="utf-8") == json_schema() + "\n", sg_runtime.manifest.__doc__


def places(content: Any) -> dict[str, Callable[[Any], Any]]:
    """One object of each kind in a manifest, by a name."""
    return {
        "manifest": lambda c: c,
        "model": lambda c: c["model"],
        "model.route": lambda c: c["model"]["route"],
        "guidance": lambda c: c["guidance"],
        "guidance.strong": lambda c: c["guidance"]["strong"],
        "sampling": lambda c: c["sampling"],
        "graphs.0": lambda c: c["graphs"][0],
        "graphs.0.inputs.0": lambda c: c["graphs"][0]["inputs"][0],
        "graphs.0.cost": lambda c: c["graphs"][0]["cost"],
        "source": lambda c: c["source"],
        "files.graphs/weights.bin": lambda c: c["files"]["graphs/weights.bin"],
    }


@pytest.mark.parametrize("place", places(None))
def test_read_manifest_of_an_unknown_key_names_its_place(
    content: Any, read: Callable[[Any], Manifest], validator: jsonschema.Draft202012Validator, place: str
) -> None:
    places(content)[place](content)["surprise"] = 1
    where = "surprise" if place == "manifest" else f"{place}.surprise"
    with pytest.raises(BundleError) as caught:
        read(content)
    assert f"manifest.json: {where}: " in str(caught.value)
    assert "rebuild it" in str(caught.value)
    assert not validator.is_valid(content)


@pytest.mark.parametrize("place", places(None))
def test_read_manifest_of_a_missing_key_names_its_place(
    content: Any, read: Callable[[Any], Manifest], validator: jsonschema.Draft202012Validator, place: str
) -> None:
    found = places(content)[place](content)
    key = [key for key in found if key != "schema_version"][-1]
    del found[key]
    where = key if place == "manifest" else f"{place}.{key}"
    with pytest.raises(BundleError, match=rf"{where}: .*\(1 faults\); rebuild it$"):
        read(content)
    assert not validator.is_valid(content)


@pytest.mark.parametrize(
    ("where", "change"),
    [
        ("opset", lambda c: c.update(opset="20")),
        ("opset", lambda c: c.update(opset=20.5)),
        ("model.tokens", lambda c: c["model"].update(tokens=True)),
        ("guidance.scale", lambda c: c["guidance"].update(scale="2")),
        ("guidance.mode", lambda c: c["guidance"].update(mode="pag")),
        ("model.class_names.3", lambda c: c["model"]["class_names"].__setitem__(3, 5)),
        ("model.route", lambda c: c["model"].update(route="1-6")),
        ("graphs.1.kind", lambda c: c["graphs"][1].update(kind="thick")),
        ("graphs", lambda c: c.update(graphs={})),
        ("files", lambda c: c.update(files=[])),
        ("precision", lambda c: c.update(precision="fp8")),
    ],
)
def test_read_manifest_of_a_value_of_another_type_names_its_place(
    content: Any, read: Callable[[Any], Manifest], where: str, change: Callable[[Any], object]
) -> None:
    change(content)
    with pytest.raises(BundleError, match=rf"manifest\.json: {where}[:.]"):
        read(content)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_read_manifest_of_another_schema_version_says_what_to_run(
    content: Any, read: Callable[[Any], Manifest], version: object
) -> None:
    content["schema_version"] = version
    content["of_the_future"] = {}  # the version is told first, not the keys that come with it
    with pytest.raises(BundleError) as caught:
        read(content)
    assert f"expected schema version 1, found {version!r}; rebuild the bundle with this sg-export" in str(caught.value)


def test_graph_of_a_kind_and_counts_is_found_or_none(glyphs_bundle: Path) -> None:
    manifest = read_manifest(glyphs_bundle / "manifest.json")
    found = manifest.graph("guided", 64, 16)
    assert found is not None
    assert found.file == "graphs/guided-64-16.onnx"
    assert manifest.graph("guided", 16, 64) is None
    assert manifest.graph("dense", 32) is None
    assert manifest.condition.kind == "condition"


@given(routes)
@settings(deadline=None)
def test_route_of_its_own_text_is_the_same(route: Route) -> None:
    assert Route.parse(str(route)) == route


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2-8,10-12", "expected one route, found several"),
        ("8", "expected START-END, both blocks included, as 2-24"),
        ("-1-8", "expected START-END"),
        ("a-b", "expected START-END"),
        ("8-2", "expected 0 <= start <= end"),
    ],
)
def test_route_of_other_text_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Route.parse(text)


def test_route_of_text_with_spaces_is_read() -> None:
    assert Route.parse(" 2 - 8 ") == Route(2, 8)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, math.nan])
def test_level_of_a_sparsity_out_of_range_is_refused(sparsity: float) -> None:
    with pytest.raises(UsageError, match="expected at least 0 and less than 1"):
        Level(sparsity, 4)


@pytest.mark.parametrize("mode", ["none", "cfg"])
def test_guidance_plan_of_one_sparsity_refuses_two(mode: str) -> None:
    with pytest.raises(UsageError, match=f"{mode} guidance: expected equal sparsities, found 0 .* and 0.5 "):
        GuidancePlan(mode, Level(0.0, 64), Level(0.5, 32), 2.0)


def test_guidance_plan_of_a_scale_that_is_no_number_is_refused() -> None:
    plan = GuidancePlan("sg", Level(0.0, 64), Level(0.5, 32), 2.0)
    for scale in (math.nan, math.inf, -math.inf, math.nextafter(FLOAT32_MAX, math.inf)):
        with pytest.raises(UsageError, match="scale: expected a finite float32 number"):
            replace(plan, scale=scale)
