"""A written manifest reads back equal.

Any other content is refused, and the message names its place.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from earlier_schemas import as_schema_5
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sg_runtime.manifest
from sg_runtime.errors import BundleError, UsageError
from sg_runtime.manifest import (
    EVEN,
    FLOAT32_MAX,
    FLOAT32_MIN,
    SCHEMA_VERSION,
    BuiltGraph,
    Cost,
    Decoder,
    EngineFacts,
    FileFacts,
    GraphFacts,
    GraphKind,
    GuidanceMode,
    GuidancePlan,
    Karras,
    Labels,
    LayerChoice,
    Level,
    Manifest,
    ModelFacts,
    NetworkName,
    Prediction,
    Profile,
    QualityGates,
    Quantization,
    Route,
    Sampling,
    Shifted,
    Source,
    StratumQuality,
    TensorFacts,
    decode_inputs,
    json_schema,
    read_manifest,
    write_manifest,
)

SCHEMA_FILE = Path(sg_runtime.manifest.__file__).with_name("schema.json")
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)  # JSON in UTF-8 has no lone surrogates
counts = st.integers(1, 2**63 - 1)
numbers = st.floats(allow_nan=False, allow_infinity=False)
scales = st.floats(-FLOAT32_MAX, FLOAT32_MAX)
times = st.floats(0, FLOAT32_MAX)
sparsities = st.floats(0, 1, exclude_max=True)
tensors = st.builds(
    TensorFacts, texts, st.sampled_from(["float32", "int64"]), st.lists(st.one_of(counts, texts), max_size=4).map(tuple)
)
sources = st.builds(Source, texts, texts, st.sampled_from(["ema", "model", "bare"]), st.none() | texts)
layer_plans = st.builds(LayerChoice, texts, st.booleans(), st.booleans(), texts, st.none() | numbers, counts, counts)
quantizations = st.builds(
    Quantization,
    st.sampled_from(["int8", "fp8"]),
    texts,
    texts,
    counts,
    counts,
    st.lists(
        st.builds(LayerChoice, texts, st.booleans(), st.booleans(), texts, st.none() | numbers, counts, counts),
        max_size=2,
    ).map(tuple),
    st.lists(st.builds(StratumQuality, numbers, numbers, numbers, numbers), max_size=2).map(tuple),
    numbers,
    numbers,
    st.builds(QualityGates, numbers, numbers),
    st.booleans(),
    st.none() | numbers,
    st.lists(texts, max_size=2).map(tuple),
    st.lists(texts, max_size=2).map(tuple),
)
MODES: tuple[GuidanceMode, ...] = ("none", "cfg", "sg", "cfg+sg", "autoguidance")
routes = st.tuples(st.integers(0, 99), st.integers(0, 99)).map(lambda pair: Route(min(pair), max(pair)))


@st.composite
def models(draw: st.DrawFn) -> ModelFacts:
    names = draw(st.none() | st.lists(texts, min_size=1, max_size=3).map(tuple))
    patch, width, depth, heads, modulations = draw(st.lists(counts, min_size=5, max_size=5))
    return ModelFacts(
        family=draw(texts),
        prediction=draw(st.sampled_from(["flow", "edm"])),
        space=draw(st.sampled_from(["pixel", "latent"])),
        latent=draw(st.tuples(counts, counts, counts)),
        pixels_per_latent=draw(st.none() | counts),
        patch=patch,
        tokens=draw(st.integers(2, 1000)),
        width=width,
        depth=depth,
        heads=heads,
        conditions=Labels(draw(counts) if names is None else len(names), names),
        held={"modulations": (modulations,)},
        parameters=draw(counts),
        route=draw(st.none() | routes),
        ends=draw(st.lists(texts, max_size=2).map(tuple)),
        masked=draw(st.booleans()),
    )


@st.composite
def graphs(draw: st.DrawFn, tokens: int, kind: GraphKind, network: NetworkName) -> GraphFacts:
    level = st.builds(Level, sparsities, st.integers(1, tokens))
    levels = {"dense": 1, "sparse": 1, "guided": 2}.get(kind, 0)
    inputs = draw(st.lists(tensors, max_size=2))
    if kind == "guided" and draw(st.booleans()):
        inputs.append(TensorFacts("modulations_weak", "float32", ("B", 4)))
    return GraphFacts(
        name=draw(texts),
        kind=kind,
        network=network,
        levels=tuple(draw(level) for _ in range(levels)),
        file=draw(st.none() | texts),
        inputs=tuple(inputs),
        outputs=tuple(draw(st.lists(tensors, min_size=1, max_size=2))),
        cost=Cost(*(draw(counts) for _ in range(4))),
        parity=draw(st.none() | numbers),
    )


@st.composite
def engines(draw: st.DrawFn) -> EngineFacts:
    profile = st.builds(Profile, st.integers(1, 64), st.lists(counts, max_size=2).map(tuple))
    return EngineFacts(
        kind=draw(st.sampled_from(["condition", "dense", "sparse", "guided"])),
        network=draw(st.sampled_from(["main", "weak"])),
        null_weak=draw(st.booleans()),
        file=draw(texts),
        library=draw(st.sampled_from(["tensorrt", "tensorrt_rtx"])),
        version=draw(texts),
        compute_capabilities=tuple(draw(st.lists(counts, min_size=1, max_size=3))),
        profiles=tuple(draw(st.lists(profile, min_size=1, max_size=3))),
        fused_attention=draw(st.none() | counts),
        build_seconds=draw(times),
        build_memory_bytes=draw(counts),
    )


@st.composite
def decoders(draw: st.DrawFn, model: ModelFacts) -> Decoder:
    graph = replace(draw(graphs(model.tokens, "decode", "decoder")), inputs=decode_inputs(model.latent))
    built = BuiltGraph(graph, tuple(draw(st.lists(engines(), max_size=2))))
    return Decoder(draw(sources), draw(st.sampled_from(["fp32", "fp16", "bf16"])), (built,))


@st.composite
def plans(draw: st.DrawFn, tokens: int) -> GuidancePlan:
    mode = draw(st.sampled_from(MODES))
    level = st.builds(Level, sparsities, st.integers(1, tokens))
    strong, strong_last = Level(draw(sparsities), draw(st.integers(2, tokens))), draw(st.none() | level)
    weak, weak_last = draw(level), draw(st.none() | level)
    if mode in ("none", "cfg"):
        weak, weak_last = strong, strong_last
    elif mode != "autoguidance" and strong_last is None and weak_last is None:
        weak = replace(weak, keep=draw(st.integers(1, strong.keep - 1)))
    interval = draw(st.none() | st.tuples(times, times).map(lambda pair: (min(pair), max(pair))))
    return GuidancePlan(mode, strong, weak, draw(scales), strong_last, weak_last, draw(st.none() | scales), interval)


@st.composite
def noise_levels(draw: st.DrawFn) -> Karras:
    low = draw(st.floats(FLOAT32_MIN, FLOAT32_MAX, exclude_max=True))
    return Karras(low, draw(st.floats(low, FLOAT32_MAX, exclude_min=True)), draw(st.floats(1, FLOAT32_MAX)))


shifts = st.builds(
    Shifted, st.floats(FLOAT32_MIN, FLOAT32_MAX), st.none() | st.floats(FLOAT32_MIN, 1, exclude_max=True)
)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    model = draw(models())
    guidance = draw(plans(model.tokens))
    weak_source = draw(sources if guidance.mode == "autoguidance" else st.none() | sources)
    networks: list[NetworkName] = ["main"] if weak_source is None else ["main", "weak"]
    branch: st.SearchStrategy[GraphKind] = st.sampled_from(["dense", "sparse", "guided"])
    branches = draw(st.lists(st.tuples(branch, st.sampled_from(networks)), max_size=3))
    kinds: list[tuple[GraphKind, NetworkName]] = [("condition", network) for network in networks]
    return Manifest(
        schema_version=SCHEMA_VERSION,
        created_by=draw(texts),
        model=model,
        guidance=guidance,
        sampling=Sampling(
            draw(st.sampled_from(["euler", "heun"])),
            draw(counts),
            draw(noise_levels() if model.prediction == "edm" else shifts),
            draw(st.floats(FLOAT32_MIN, FLOAT32_MAX)),
            draw(st.floats(0, 1)) if model.prediction == "x0" else 0.0,
        ),
        precision=draw(st.sampled_from(["fp32", "fp16", "bf16"])),
        fp32_layers=tuple(draw(st.lists(texts, max_size=2))),
        quantization=draw(st.none() | quantizations),
        onnx_target=draw(st.sampled_from(["onnxruntime", "onnxruntime-cuda"])),
        opset=draw(counts),
        batch=draw(st.none() | counts),
        hoisted_rows={"condition": draw(counts)},
        graphs=tuple(draw(graphs(model.tokens, kind, network)) for kind, network in [*kinds, *branches]),
        engines=tuple(draw(st.lists(engines(), max_size=2))),
        source=draw(sources),
        weak_source=weak_source,
        files=draw(st.dictionaries(texts, st.builds(FileFacts, counts, texts), max_size=3)),
        decoder=draw(st.none() | decoders(model)) if model.space == "latent" else None,
    )


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = json.loads(SCHEMA_FILE.read_bytes())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.fixture
def content(pixel_bundle: Path) -> Any:
    """Return a manifest as parsed JSON, which tests alter."""
    return json.loads((pixel_bundle / "manifest.json").read_bytes())


@pytest.fixture
def read(tmp_path: Path) -> Callable[[Any], Manifest]:
    """Return a function that reads altered JSON as a manifest."""

    def read(content: Any) -> Manifest:
        path = tmp_path / "manifest.json"
        path.write_text(json.dumps(content))
        return read_manifest(path)

    return read


# All manifests go through the same file, so the folder fixture need not be fresh for each one.
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(manifests())
def test_write_manifest_of_any_manifest_reads_back_equal_and_fits_the_schema(
    tmp_path: Path, validator: jsonschema.Draft202012Validator, manifest: Manifest
) -> None:
    path = tmp_path / "manifest.json"
    write_manifest(manifest, path)
    assert read_manifest(path) == manifest
    validator.validate(json.loads(path.read_bytes()))


BUNDLES = [f"tiny_{name}bundle" for name in ("", "edm_", "cfg_", "cfg_sg_", "autoguidance_", "cosine_")]


@pytest.mark.parametrize("bundle", BUNDLES)
def test_read_manifest_of_a_real_bundle_fits_the_schema(
    bundle: str, request: pytest.FixtureRequest, validator: jsonschema.Draft202012Validator
) -> None:
    validator.validate(json.loads((request.getfixturevalue(bundle) / "manifest.json").read_bytes()))


@pytest.mark.parametrize("bundle", BUNDLES)
def test_write_manifest_of_a_real_bundle_writes_the_same_bytes(
    bundle: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    written = request.getfixturevalue(bundle) / "manifest.json"
    write_manifest(read_manifest(written), tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == written.read_bytes()


def test_json_schema_of_the_code_is_the_file() -> None:
    assert SCHEMA_FILE.read_text(encoding="utf-8") == json_schema() + "\n", sg_runtime.manifest.__doc__


PLACES = [
    ("tiny_bundle", "", "files"),
    ("tiny_bundle", "model", "conditions"),
    ("tiny_bundle", "model.route", "end"),
    ("tiny_bundle", "guidance", "scale"),
    ("tiny_bundle", "guidance.strong", "keep"),
    ("tiny_cosine_bundle", "guidance.strong_last", "sparsity"),
    ("tiny_cosine_bundle", "guidance.weak_last", "keep"),
    ("tiny_bundle", "sampling", "times"),
    ("tiny_bundle", "graphs.0", "network"),
    ("tiny_bundle", "graphs.0.inputs.0", "shape"),
    ("tiny_bundle", "graphs.0.cost", "activation_bytes"),
    ("tiny_bundle", "graphs.1.levels.0", "keep"),
    ("tiny_bundle", "source", "reference"),
    ("tiny_bundle", "", "weak_source"),
    ("tiny_autoguidance_bundle", "weak_source", "sha256"),
    ("tiny_bundle", "files.graphs/weights|bin", "size"),
]
"""A bundle, an object in its manifest, and a required key of that object.

"|" is a dot that does not separate two parts.
"""


def found_at(content: Any, place: str) -> Any:
    """Return the object at a place."""
    for part in place.split(".") if place else []:
        content = content[int(part) if part.isdigit() else part.replace("|", ".")]
    return content


@pytest.mark.parametrize(("bundle", "place", "key"), PLACES)
@pytest.mark.parametrize("fault", ["unknown", "missing"])
def test_read_manifest_of_other_keys_names_their_place(
    bundle: str,
    place: str,
    key: str,
    fault: str,
    request: pytest.FixtureRequest,
    read: Callable[[Any], Manifest],
    validator: jsonschema.Draft202012Validator,
) -> None:
    content = json.loads((request.getfixturevalue(bundle) / "manifest.json").read_bytes())
    if fault == "unknown":
        key = "surprise"
        found_at(content, place)[key] = 1
    else:
        del found_at(content, place)[key]
    with pytest.raises(BundleError) as caught:
        read(content)
    where = f"{place}.{key}".removeprefix(".").replace("|", ".")
    assert f"manifest.json: {where}: " in str(caught.value)
    assert str(caught.value).endswith("(errors: 1); rebuild it")
    assert not validator.is_valid(content)


def test_read_manifest_of_a_plan_without_the_keys_of_what_changes_is_constant(
    content: Any, read: Callable[[Any], Manifest], validator: jsonschema.Draft202012Validator
) -> None:
    for key in ("strong_last", "weak_last", "scale_last", "interval"):
        assert content["guidance"].pop(key) is None
    assert read(content).guidance == GuidancePlan("sg", Level(0.0, 16), Level(0.5, 8), 2.0)
    assert validator.is_valid(content)


@pytest.mark.parametrize(
    ("where", "change"),
    [
        ("opset", lambda c: c.update(opset="20")),
        ("opset", lambda c: c.update(opset=20.5)),
        ("model.tokens", lambda c: c["model"].update(tokens=True)),
        ("guidance.scale", lambda c: c["guidance"].update(scale="2")),
        ("guidance.mode", lambda c: c["guidance"].update(mode="pag")),
        ("guidance.scale_last", lambda c: c["guidance"].update(scale_last=[1, 2])),
        ("guidance.weak_last", lambda c: c["guidance"].update(weak_last=0.5)),
        ("guidance.interval", lambda c: c["guidance"].update(interval=0.5)),
        ("guidance.interval", lambda c: c["guidance"].update(interval=[0.1])),
        ("guidance.interval", lambda c: c["guidance"].update(interval=[0.1, 0.2, 0.3])),
        ("guidance.interval.1", lambda c: c["guidance"].update(interval=[0.1, "0.2"])),
        ("sampling.times.Karras", lambda c: c["sampling"].update(times=7)),
        ("sampling.noise_scale", lambda c: c["sampling"].update(noise_scale="2")),
        ("sampling.sampler", lambda c: c["sampling"].update(sampler="ddim")),
        ("model.prediction", lambda c: c["model"].update(prediction="eps")),
        ("graphs.1.network", lambda c: c["graphs"][1].update(network="strong")),
        ("weak_source", lambda c: c.update(weak_source="tiny.safetensors")),
        ("model.conditions.Labels.names.3", lambda c: c["model"]["conditions"]["names"].__setitem__(3, 5)),
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


def test_read_manifest_of_schema_3_is_that_of_today(content: Any, read: Callable[[Any], Manifest]) -> None:
    """Schema 3 had one side for height and width.

    All its networks had the same modules at their ends.
    """
    expected, content = read(content), as_schema_5(content)
    model = content["model"]
    channels, side, _ = model.pop("latent")
    assert model.pop("ends") == ["x_embedder", "t_embedder", "y_embedder", "final_layer.linear"]
    del model["masked"], content["onnx_target"], content["passes"]
    model |= {"image_size": side, "channels": channels}
    assert read({**content, "schema_version": 3}) == expected


@pytest.mark.parametrize(("family", "masked"), [("tread", False), ("maskdit", True)])
def test_read_manifest_of_schema_4_knows_what_replaces_dropped_tokens(
    content: Any, read: Callable[[Any], Manifest], family: str, masked: bool
) -> None:
    content = as_schema_5(content)
    del content["model"]["masked"], content["onnx_target"], content["passes"]
    content["model"]["family"] = family
    manifest = read({**content, "schema_version": 4})
    assert (manifest.model.masked, manifest.onnx_target) == (masked, "onnxruntime")


@pytest.mark.parametrize("bundle", ["tiny_bundle", "tiny_edm_bundle"])
def test_read_manifest_of_schema_5_is_that_of_today(
    bundle: str, request: pytest.FixtureRequest, read: Callable[[Any], Manifest]
) -> None:
    content = json.loads((request.getfixturevalue(bundle) / "manifest.json").read_bytes())
    del content["guidance"]["subset"]
    assert read(as_schema_5(content)) == read(content)


@pytest.mark.parametrize("change", [{"model": None}, {"model": {}}, {"model": {"image_size": "8", "channels": 2}}])
def test_read_manifest_of_schema_3_that_does_not_fit_is_refused(
    content: Any, read: Callable[[Any], Manifest], change: dict[str, Any]
) -> None:
    with pytest.raises(BundleError, match=r"manifest\.json: model"):
        read({**content, "schema_version": 3, **change})


@pytest.mark.parametrize("version", [0, 1, "2", None])
def test_read_manifest_of_another_schema_version_says_what_to_run(
    content: Any, read: Callable[[Any], Manifest], version: object
) -> None:
    content["schema_version"] = version
    content["of_the_future"] = {}  # the version is reported first, not the unknown key
    with pytest.raises(BundleError) as caught:
        read(content)
    assert (
        f"expected schema version {SCHEMA_VERSION}, found {version!r}; rebuild the bundle with this sg-export"
        in str(caught.value)
    )


def test_graph_of_a_kind_and_counts_is_found_or_none(tiny_bundle: Path) -> None:
    manifest = read_manifest(tiny_bundle / "manifest.json")
    found = manifest.graph("guided", 16, 8)
    assert found is not None
    assert found.file == "graphs/guided-16-8.onnx"
    assert not found.null_weak
    assert manifest.graph("guided", 8, 16) is None
    assert manifest.graph("guided", 16, 8, null_weak=True) is None
    assert manifest.graph("guided", 16, 8, network="weak") is None
    assert manifest.graph("dense", 8) is None
    assert manifest.hoisted("main")[0].file == "graphs/condition.onnx"


def test_graph_of_a_weak_branch_without_a_class_is_another(tiny_cfg_sg_bundle: Path) -> None:
    manifest = read_manifest(tiny_cfg_sg_bundle / "manifest.json")
    assert manifest.graph("guided", 12, 8) is None
    found = manifest.graph("guided", 12, 8, null_weak=True)
    assert found is not None
    assert found.file == "graphs/guided-12-8-null.onnx"
    assert found.null_weak


def test_graph_of_another_network_is_another(tiny_autoguidance_bundle: Path) -> None:
    manifest = read_manifest(tiny_autoguidance_bundle / "manifest.json")
    files = [manifest.graph("dense", 16, network=network) for network in ("main", "weak")]
    assert [graph and graph.file for graph in files] == ["graphs/dense.onnx", "graphs/weak-dense.onnx"]
    assert manifest.hoisted("weak")[0].file == "graphs/weak-condition.onnx"


def test_condition_of_a_network_that_is_not_there_names_the_build(tiny_bundle: Path) -> None:
    with pytest.raises(UsageError) as caught:
        read_manifest(tiny_bundle / "manifest.json").hoisted("weak")
    assert str(caught.value) == (
        "autoguidance: this bundle has no weak checkpoint; "
        "build it with: sg-export build tiny.safetensors --route 1-1 --prediction flow --heads 2 --weak-checkpoint PATH"
    )


@pytest.mark.parametrize(("reference", "name"), [("glyphs", "glyphs"), (None, "file.pt")])
def test_source_by_name_is_the_reference_or_the_file(reference: str | None, name: str) -> None:
    assert Source("file.pt", "00", "ema", reference).name == name


@given(routes)
def test_route_of_its_own_text_is_the_same(route: Route) -> None:
    assert Route.parse(str(route)) == route


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2-8,10-12", "expected one route, found several"),
        ("8", "expected START-END, both blocks included, such as 2-24"),
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


@pytest.mark.parametrize("keep", [0, -1])
def test_level_that_keeps_no_token_is_refused(keep: int) -> None:
    with pytest.raises(UsageError, match=f"keep: expected at least 1, found {keep}"):
        Level(0.5, keep)


DENSE, QUARTER, HALF = Level(0.0, 64), Level(0.25, 48), Level(0.5, 32)


@pytest.mark.parametrize("mode", ["none", "cfg"])
def test_guidance_plan_of_one_sparsity_refuses_two(mode: GuidanceMode) -> None:
    message = rf"{mode} guidance: expected equal sparsities, found 0 \(strong\) and 0\.5 \(weak\)"
    with pytest.raises(UsageError, match=message):
        GuidancePlan(mode, DENSE, HALF, 2.0)
    with pytest.raises(UsageError, match=f"{mode} guidance: expected equal sparsities"):
        GuidancePlan(mode, DENSE, DENSE, 2.0, HALF, QUARTER)
    with pytest.raises(UsageError, match=f"{mode} guidance: expected equal sparsities"):
        GuidancePlan(mode, DENSE, DENSE, 2.0, HALF)
    assert GuidancePlan(mode, DENSE, DENSE, 2.0, HALF, HALF).weak_last == HALF


@pytest.mark.parametrize("mode", ["sg", "cfg+sg"])
@pytest.mark.parametrize(("strong", "weak"), [(HALF, HALF), (HALF, DENSE), (DENSE, Level(0.001, 64))])
def test_guidance_plan_of_a_weak_branch_that_is_not_sparser_is_refused(
    mode: GuidanceMode, strong: Level, weak: Level
) -> None:
    """If the sparsities change over a run, they may meet or cross."""
    with pytest.raises(UsageError) as caught:
        GuidancePlan(mode, strong, weak, 2.0)
    assert str(caught.value) == (
        f"{mode} guidance: expected a weak branch sparser than the strong one, found sparsity {weak.sparsity:g} "
        f"(weak, {weak.keep} tokens) and {strong.sparsity:g} (strong, {strong.keep} tokens); "
        f"raise `sparsity` or lower `strong_sparsity`"
    )
    assert GuidancePlan(mode, strong, weak, 2.0, strong_last=QUARTER).strong == strong
    assert GuidancePlan(mode, strong, weak, 2.0, weak_last=QUARTER).strong == strong
    assert GuidancePlan("autoguidance", strong, weak, 2.0).strong == strong


def test_guidance_plan_of_an_unknown_mode_is_refused() -> None:
    with pytest.raises(UsageError) as caught:
        GuidancePlan("pag", DENSE, HALF, 2.0)  # type: ignore[arg-type]
    assert str(caught.value) == "guidance: expected one of none, cfg, sg, cfg+sg, autoguidance, found 'pag'"


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf, math.nextafter(FLOAT32_MAX, math.inf)])
@pytest.mark.parametrize("field", ["scale", "scale_last"])
def test_guidance_plan_of_a_scale_that_is_no_number_is_refused(field: str, scale: float) -> None:
    arguments: dict[str, Any] = {"scale": 2.0, field: scale}
    with pytest.raises(UsageError, match=rf"^scale: expected a finite float32 number, found {re.escape(str(scale))}$"):
        GuidancePlan("sg", DENSE, HALF, **arguments)


@pytest.mark.parametrize(
    "interval", [(0.5, 0.4), (-0.1, 0.5), (math.nan, 0.5), (0.1, math.nan), (0.1, math.inf), (-1.0, -0.5)]
)
def test_guidance_plan_of_an_interval_that_is_none_is_refused(interval: tuple[float, float]) -> None:
    with pytest.raises(UsageError) as caught:
        GuidancePlan("sg", DENSE, HALF, 2.0, interval=interval)
    assert str(caught.value) == (
        f"interval: expected 0 <= lowest time <= highest time, found {interval[0]:g} to {interval[1]:g}"
    )


@pytest.mark.parametrize("interval", [(0.0, 0.0), (0.5, 0.5), (0.0, FLOAT32_MAX)])
def test_guidance_plan_of_an_interval_of_one_time_or_all_is_one(interval: tuple[float, float]) -> None:
    assert GuidancePlan("sg", DENSE, HALF, 2.0, interval=interval).interval == interval


@pytest.mark.parametrize(
    ("mode", "null_weak", "network"),
    [
        ("none", False, "main"),
        ("cfg", True, "main"),
        ("sg", False, "main"),
        ("cfg+sg", True, "main"),
        ("autoguidance", False, "weak"),
    ],
)
def test_guidance_plan_of_a_mode_knows_its_weak_branch(
    mode: GuidanceMode, null_weak: bool, network: NetworkName
) -> None:
    plan = GuidancePlan(mode, DENSE, DENSE if mode in ("none", "cfg") else HALF, 2.0)
    assert (plan.row.null_weak, plan.row.weak_network) == (null_weak, network)


@pytest.mark.parametrize(
    ("low", "high", "rho"),
    [
        (0.0, 80.0, 7.0),
        (-0.002, 80.0, 7.0),
        (1e-45, 80.0, 7.0),
        (80.0, 80.0, 7.0),
        (80.0, 0.002, 7.0),
        (0.002, math.inf, 7.0),
        (0.002, 1e39, 7.0),
        (0.002, 80.0, 0.0),
        (0.002, 80.0, 0.5),  # sigma_max**(1 / rho) would overflow below some rho
        (0.002, 80.0, -7.0),
        (0.002, 80.0, math.inf),
        (math.nan, 80.0, 7.0),
        (0.002, math.nan, 7.0),
        (0.002, 80.0, math.nan),
    ],
)
def test_karras_of_levels_that_are_none_is_refused(low: float, high: float, rho: float) -> None:
    with pytest.raises(UsageError) as caught:
        Karras(low, high, rho)
    assert str(caught.value) == (
        f"noise levels: expected 0 < sigma_min < sigma_max in float32 and rho of at least 1, found {low:g}, {high:g} "
        f"and {rho:g}"
    )


@pytest.mark.parametrize("steps", [0, -1])
def test_sampling_of_no_step_is_refused(steps: int) -> None:
    with pytest.raises(UsageError, match=f"steps: expected at least 1, found {steps}"):
        Sampling("euler", steps, EVEN)


@pytest.mark.parametrize("shift", [0.0, -3.0, 1e39, math.inf, math.nan])
def test_shifted_by_what_is_no_shift_is_refused(shift: float) -> None:
    with pytest.raises(UsageError) as caught:
        Shifted(shift, None)
    assert str(caught.value) == f"times: shift: expected a float32 number above 0, found {shift:g}"


@pytest.mark.parametrize("last", [0.0, -0.1, 1.0, 1e-320, math.nan])
def test_shifted_to_what_is_no_last_time_is_refused(last: float) -> None:
    with pytest.raises(UsageError) as caught:
        Shifted(3.0, last)
    assert str(caught.value) == f"times: last: expected a float32 number above 0 and below 1, found {last:g}"


@pytest.mark.parametrize("scale", [0.0, -1.0, 1e39, math.nan])
def test_sampling_from_noise_of_no_size_is_refused(scale: float) -> None:
    with pytest.raises(UsageError) as caught:
        Sampling("euler", 4, EVEN, scale)
    assert str(caught.value) == f"noise_scale: expected a float32 number above 0, found {scale:g}"


@pytest.mark.parametrize("floor", [-0.1, 1.1, math.nan])
def test_sampling_with_a_floor_that_is_no_time_is_refused(floor: float) -> None:
    with pytest.raises(UsageError) as caught:
        Sampling("euler", 4, EVEN, 1.0, floor)
    assert str(caught.value) == f"time_floor: expected 0 to 1, found {floor:g}"


def test_model_facts_of_other_names_than_classes_are_refused(tiny_bundle: Path) -> None:
    model = read_manifest(tiny_bundle / "manifest.json").model
    with pytest.raises(UsageError, match=r"^class_names: expected 5 names, found 1$"):
        replace(model.labels, names=("one",))


@pytest.mark.parametrize(("kind", "expected"), [("condition", 0), ("dense", 1), ("sparse", 1), ("guided", 2)])
def test_graph_facts_of_other_levels_than_the_kinds_are_refused(
    tiny_bundle: Path, kind: GraphKind, expected: int
) -> None:
    graph = read_manifest(tiny_bundle / "manifest.json").hoisted("main")[0]
    for found in {0, 1, 2, 3} - {expected}:
        with pytest.raises(UsageError) as caught:
            replace(graph, kind=kind, levels=(DENSE,) * found)
        assert str(caught.value) == (f"graph condition: levels: expected {expected} for {kind}, found {found}")


def test_graph_facts_without_an_output_are_refused(tiny_bundle: Path) -> None:
    graph = read_manifest(tiny_bundle / "manifest.json").hoisted("main")[0]
    with pytest.raises(UsageError, match=r"^graph condition: outputs: expected at least one, found none$"):
        replace(graph, outputs=())


# Consistency of the entire manifest


@pytest.fixture
def two_networks(tiny_autoguidance_bundle: Path) -> Manifest:
    return read_manifest(tiny_autoguidance_bundle / "manifest.json")


@pytest.mark.parametrize(
    ("prediction", "times"), [("flow", Karras(0.002, 80.0, 7.0)), ("x0", Karras(0.002, 80.0, 7.0)), ("edm", EVEN)]
)
def test_manifest_of_times_of_another_prediction_is_refused(
    two_networks: Manifest, prediction: Prediction, times: Karras | Shifted
) -> None:
    model, sampling = replace(two_networks.model, prediction=prediction), Sampling("euler", 4, times)
    with pytest.raises(UsageError) as caught:
        replace(two_networks, model=model, sampling=sampling)
    assert str(caught.value) == (
        "sampling: times: expected noise levels for an edm model, and times from 1 to 0 for other models"
    )


@pytest.mark.parametrize(("prediction", "times"), [("flow", EVEN), ("edm", Karras(0.002, 80.0, 7.0))])
def test_manifest_of_a_floor_for_what_does_not_divide_by_time_is_refused(
    two_networks: Manifest, prediction: Prediction, times: Karras | Shifted
) -> None:
    model = replace(two_networks.model, prediction=prediction)
    with pytest.raises(UsageError, match=f"^sampling: time_floor: expected 0 for a model of {prediction}$"):
        replace(two_networks, model=model, sampling=Sampling("euler", 4, times, 1.0, 0.05))


def test_manifest_of_autoguidance_without_a_weak_source_is_refused(two_networks: Manifest) -> None:
    with pytest.raises(UsageError) as caught:
        replace(two_networks, weak_source=None)
    assert str(caught.value) == "weak_source: expected a checkpoint for autoguidance, found none"


@pytest.mark.parametrize("network", ["main", "weak"])
def test_manifest_without_the_condition_of_a_network_is_refused(two_networks: Manifest, network: NetworkName) -> None:
    kept = tuple(graph for graph in two_networks.graphs if (graph.kind, graph.network) != ("condition", network))
    with pytest.raises(UsageError) as caught:
        replace(two_networks, graphs=kept)
    assert str(caught.value) == f"graphs: expected a condition graph for the {network} network, found none"


@pytest.mark.parametrize("field", ["strong", "weak", "strong_last", "weak_last"])
def test_manifest_of_a_plan_that_keeps_more_than_all_tokens_is_refused(two_networks: Manifest, field: str) -> None:
    change: dict[str, Any] = {field: Level(0.5, 17)}
    with pytest.raises(UsageError) as caught:
        replace(two_networks, guidance=replace(two_networks.guidance, **change))
    assert str(caught.value) == "keep: expected at most the model's 16 tokens, found 17"
