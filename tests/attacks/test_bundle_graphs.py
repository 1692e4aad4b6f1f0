"""Bundles with valid manifests whose graphs do not run. The error names the graph."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from sg_runtime.errors import BundleError, EngineError, UsageError
from sg_runtime.pipeline import Pipeline

Edit = Callable[[Callable[[Any], object]], None]


@pytest.fixture
def bundle(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Return a copy of the tiny bundle, or of the bundle that a test names."""
    whole = request.getfixturevalue(getattr(request, "param", "tiny_bundle"))
    return Path(shutil.copytree(whole, tmp_path / "bundle"))


def replace_file(bundle: Path, edit: Edit, name: str, content: bytes) -> None:
    """Replace a file's bytes, and put the new size and hash into the manifest."""
    (bundle / name).write_bytes(content)
    facts = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit(lambda manifest: manifest["files"].update({name: facts}))


@pytest.mark.parametrize("content", [b"", b"no graph", b"\x08\x08"], ids=["empty", "text", "half"])
def test_run_of_a_graph_that_is_none_names_it(bundle: Path, edit: Edit, content: bytes) -> None:
    replace_file(bundle, edit, "graphs/condition.onnx", content)
    with pytest.raises(EngineError, match=r"^condition\.onnx: ONNX Runtime .* cannot open it: ") as caught:
        Pipeline.load(bundle)([0], [0], steps=1)
    assert caught.value.exit_code == 4


def test_run_of_weights_that_are_too_short_names_the_graph(bundle: Path, edit: Edit) -> None:
    replace_file(bundle, edit, "graphs/weights.bin", b"\0" * 64)
    with pytest.raises(EngineError, match=r"^condition\.onnx: ONNX Runtime .* cannot open it: "):
        Pipeline.load(bundle)([0], [0], steps=1)


def test_run_of_another_graph_in_its_place_names_it(bundle: Path, edit: Edit) -> None:
    dense = (bundle / "graphs/dense.onnx").read_bytes()
    replace_file(bundle, edit, "graphs/guided-16-8.onnx", dense)
    with pytest.raises(EngineError, match=r"^graphs/guided-16-8\.onnx: ONNX Runtime failed: "):
        Pipeline.load(bundle)([0], [0], steps=1)


@pytest.mark.parametrize("latent", [(2, 10, 10), (3, 8, 8), (2, 4, 16)])
def test_run_of_a_model_of_another_shape_names_the_graph(
    bundle: Path, edit: Edit, latent: tuple[int, int, int]
) -> None:
    edit(lambda manifest: manifest["model"].update(latent=latent))
    with pytest.raises(EngineError, match=r"^graphs/guided-16-8\.onnx: ONNX Runtime failed: "):
        Pipeline.load(bundle)([0], [0], steps=1)


def edit_graph(edit: Edit, file: str, change: Callable[[Any], object]) -> None:
    """Pass the manifest's entry of one graph through a function."""
    edit(lambda manifest: [change(graph) for graph in manifest["graphs"] if graph["file"] == f"graphs/{file}.onnx"])


def drop_graph(edit: Edit, file: str) -> None:
    """Remove one graph from the manifest's list."""
    edit(
        lambda manifest: manifest.update(
            graphs=[graph for graph in manifest["graphs"] if graph["file"] != f"graphs/{file}.onnx"]
        )
    )


def test_run_of_a_null_condition_that_the_graph_has_not_names_it(bundle: Path, edit: Edit) -> None:
    """The manifest claims CFG + SG, but its guided graph was built for SG.

    It must never run with the class in both branches.
    """
    weak = {"name": "modulations_weak", "dtype": "float32", "shape": ["B", 4]}
    edit_graph(edit, "guided-16-8", lambda graph: graph["inputs"].append(weak))
    edit(lambda manifest: manifest["guidance"].update(mode="cfg+sg"))
    with pytest.raises(EngineError, match=r"^graphs/guided-16-8\.onnx: ONNX Runtime failed: ") as caught:
        Pipeline.load(bundle).sample([0], [0], steps=1)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("bundle", ["tiny_cfg_sg_bundle"], indirect=True)
def test_run_of_a_null_condition_that_the_manifest_hides_names_the_graph(bundle: Path, edit: Edit) -> None:
    """The manifest claims SG, but its guided graph was built for CFG + SG."""

    def hide(graph: Any) -> None:
        graph["inputs"] = [tensor for tensor in graph["inputs"] if tensor["name"] != "modulations_weak"]

    edit_graph(edit, "guided-12-8-null", hide)
    edit(lambda manifest: manifest["guidance"].update(mode="sg"))
    with pytest.raises(EngineError, match=r"^graphs/guided-12-8-null\.onnx: ONNX Runtime failed: .*modulations_weak"):
        Pipeline.load(bundle).sample([0], [0], steps=1)


def test_load_of_levels_that_are_not_the_graphs_names_it(bundle: Path, edit: Edit) -> None:
    edit_graph(edit, "guided-16-8", lambda graph: graph["levels"][1].update(sparsity=0.75, keep=4))
    edit(lambda manifest: manifest["guidance"].update(weak={"sparsity": 0.75, "keep": 4}))
    with pytest.raises(BundleError, match=r"graph guided-16-8: input rows_weak: expected 4 tokens, found \('B', 8\)"):
        Pipeline.load(bundle)


def test_load_of_tokens_that_the_model_has_not_names_the_graph(bundle: Path, edit: Edit) -> None:
    """Kept tokens drawn from a thousand would point far beyond the model's sixteen tokens."""
    edit(lambda manifest: manifest["model"].update(tokens=1000))
    with pytest.raises(BundleError, match=r": input restore: expected 1000 tokens, found \('B', 16\)"):
        Pipeline.load(bundle)


def test_run_of_tokens_that_the_graph_has_not_names_it(bundle: Path, edit: Edit) -> None:
    """The manifest claims a thousand tokens. Nothing is read or written beyond sixteen."""

    def claim(graph: Any) -> None:
        for tensor in graph["inputs"]:
            if tensor["name"].startswith("restore"):
                tensor["shape"][1] = 1000

    for name in ("sparse-12", "sparse-8", "guided-16-8", "guided-12-8"):
        edit_graph(edit, name, claim)
    edit(lambda manifest: manifest["model"].update(tokens=1000))
    edit(lambda manifest: manifest["guidance"].update(strong={"sparsity": 0.25, "keep": 12}))
    pipe = Pipeline.load(bundle)
    for fused, name in ((True, "guided-12-8"), (False, "sparse-12")):
        with pytest.raises(EngineError, match=rf"^graphs/{name}\.onnx: ONNX Runtime failed: ") as caught:
            pipe.sample([0], [0], steps=1, fused=fused)
        assert caught.value.exit_code == 4


@pytest.mark.parametrize("bundle", ["tiny_edm_bundle"], indirect=True)
@pytest.mark.parametrize("batch", [2, 4])
def test_run_of_another_batch_than_the_graphs_names_the_graph(bundle: Path, edit: Edit, batch: int) -> None:
    edit(lambda manifest: manifest.update(batch=batch))
    with pytest.raises(EngineError, match=r"^graphs/guided-12-8\.onnx: ONNX Runtime failed: "):
        Pipeline.load(bundle).sample([0], [0], steps=1)


@pytest.mark.parametrize("bundle", ["tiny_autoguidance_bundle"], indirect=True)
def test_run_of_a_weak_network_without_its_weights_names_its_graph(bundle: Path, edit: Edit) -> None:
    replace_file(bundle, edit, "graphs/weights-weak.bin", b"\0" * 64)
    pipe = Pipeline.load(bundle)
    with pytest.raises(EngineError, match=r"^weak-condition\.onnx: ONNX Runtime .* cannot open it: ") as caught:
        pipe.sample([0], [0], steps=1)
    assert caught.value.exit_code == 4
    assert pipe.sample([0], [0], steps=1, guidance=pipe.guidance("none")).shape == (1, 2, 8, 8)


@pytest.mark.parametrize(
    ("bundle", "missing", "message"),
    [
        ("tiny_autoguidance_bundle", "weak-sparse-8", "--weak-checkpoint PATH --sparsity 0.5"),
        ("tiny_autoguidance_bundle", "dense", "--strong-sparsity 0"),
        ("tiny_cosine_bundle", "dense", "--strong-sparsity 0"),
    ],
    indirect=["bundle"],
)
def test_run_of_a_level_without_a_graph_names_the_build(bundle: Path, edit: Edit, missing: str, message: str) -> None:
    """The bundle lists no graph for the sparsity of its own guidance plan.

    This is a usage error, because another plan may work.
    """
    drop_graph(edit, missing)
    edit(lambda manifest: manifest["files"].pop(f"graphs/{missing}.onnx"))
    (bundle / f"graphs/{missing}.onnx").unlink()
    with pytest.raises(UsageError) as caught:
        Pipeline.load(bundle).sample([0], [0], steps=2)
    command = "sg-export build tiny.safetensors --route 1-1 --prediction flow --heads 2"
    assert str(caught.value).endswith(f"build it with: {command} {message}")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("bundle", ["tiny_cosine_bundle"], indirect=True)
def test_run_of_a_schedule_that_ends_where_nothing_was_built_names_the_build(bundle: Path, edit: Edit) -> None:
    edit(lambda manifest: manifest["guidance"].update(strong_last={"sparsity": 0.75, "keep": 4}))
    with pytest.raises(UsageError, match=r"^sparsity 0\.75 has no single-branch graph in this bundle; .* 0\.75$"):
        Pipeline.load(bundle).sample([0], [0], steps=4)


@pytest.mark.parametrize(
    ("name", "output"), [("condition", "modulations"), ("guided-16-8", "next"), ("guided-16-8", "prediction")]
)
def test_run_of_an_output_that_is_not_there_names_the_graph(bundle: Path, edit: Edit, name: str, output: str) -> None:
    model = onnx.load(bundle / f"graphs/{name}.onnx", load_external_data=False)
    for names in (names for node in model.graph.node for names in (node.input, node.output)):
        names[:] = ["renamed" if tensor == output else tensor for tensor in names]
    for value in model.graph.output:
        value.name = "renamed" if value.name == output else value.name
    replace_file(bundle, edit, f"graphs/{name}.onnx", model.SerializeToString())
    pipe = Pipeline.load(bundle)
    x = pipe.initial_noise([0])
    calls = {
        "next": lambda: pipe.sample([0], [0], steps=1),
        "prediction": lambda: pipe.guided(x, pipe.prepare_once(0.5, [0])),
    }
    with pytest.raises(EngineError, match=rf"^graphs/{name}\.onnx: ONNX Runtime failed: .*{output}"):
        calls.get(output, calls["next"])()
