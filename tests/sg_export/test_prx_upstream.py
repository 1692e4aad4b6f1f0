"""PRX networks with diffusers' weights, compared with diffusers' predictions.

`fixtures/make_prx_fixtures.py` ran its `PRXTransformer2DModel` and documents how. The weights come
from a seed: `fixtures/weights.py`.
"""

import copy
import functools
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from cases import HERE
from torch import Tensor
from weights import random_state, relative_error

from sg_export.adapters import prx, prx_configs
from sg_export.checkpoint import Checkpoint, CheckpointFacts
from sg_export.graph.opset import DEFAULT_OPSET
from sg_export.graph.spec import GraphSpec
from sg_export.graph.trace import trace
from sg_export.models import prx as models
from sg_export.models.dit import modulate
from sg_export.models.prx import PRX
from sg_export.models.sparse import BranchInputs, SparseModel
from sg_export.models.subset import Subset
from sg_runtime.manifest import Level, ModelFacts, Route, Source, Text

FACTS = json.loads((HERE / "prx_upstream.json").read_bytes())
CASES: dict[str, Any] = {case["name"]: case for case in FACTS["cases"]}
RUNS = [(name, "dense") for name in CASES]
ROUTED = [(name, f"routed-{sparsity}") for name, case in CASES.items() for sparsity in case["sparsities"]]
FACTORS = ("c_in", "c_skip", "c_out", "a", "b", "e")
TEXT = ("text_keys", "text_values", "text_bias")
ROUTED_BY_NAME = dict(reversed(ROUTED))

BOUND = 1e-5
"""Bound on the relative error of our FP32 prediction against upstream's.

It is 1.2e-6 at most when measured, from sums in another order, and 3.5e-6 if some frequencies of
the time's sinusoids are rounded the other way, as on another CPU. The mistakes that tests make on
purpose exceed ten times the bound.
"""


def checkpoint_of(name: str) -> Checkpoint:
    """Return a checkpoint with upstream's weights of a case."""
    case = CASES[name]
    values = random_state(case["shapes"], case["seed"], case["gains"])
    tensors = {key: torch.from_numpy(value) for key, value in values.items()}
    return Checkpoint(Source(name, "", "bare", None), tensors, CheckpointFacts(), "")


@functools.cache
def network_of(name: str) -> PRX:
    """Return the adapter's network of a case."""
    case = CASES[name]
    sample = case["config"]["in_channels"], case["config"]["patch_size"]
    return prx.load_network(checkpoint_of(name), tuple(case["size"]), sample=sample, text_tokens=case["padded"])


def copy_of(name: str) -> Any:
    """Return a copy of the network of a case, which a test may change."""
    return copy.deepcopy(network_of(name))


def arrays_of(name: str) -> dict[str, Tensor]:
    """Return inputs and upstream's predictions of a case."""
    with np.load(HERE / "prx_upstream.npz") as stored:
        return {
            key.partition("/")[2]: torch.from_numpy(stored[key]) for key in stored.files if key.startswith(f"{name}/")
        }


def held_by(network: Any, arrays: dict[str, Tensor], prompt: str = "") -> dict[str, Tensor]:
    """Return what a branch holds. prompt: start of the names of embeddings and mask."""
    given = {"t": arrays["t"], "embeddings": arrays[f"{prompt}embeddings"], "mask": arrays[f"{prompt}mask"]}
    return SparseModel(network, Route(0, 0)).held(given)


def model_of(network: Any, name: str) -> SparseModel:
    """Return the network of a case with the case's route."""
    return SparseModel(network, Route(*CASES[name]["route"]))


def kept_in(arrays: dict[str, Tensor], run: str) -> Tensor | None:
    """Return the indices of the kept tokens of a run."""
    return arrays[run.replace("routed", "keep")] if run.startswith("routed") else None


def predict(network: Any, name: str, run: str, **changed: Tensor) -> Tensor:
    """Return our prediction for one run. changed: inputs in place of the stored ones."""
    arrays = arrays_of(name) | changed
    return model_of(network, name).predict(arrays["x"], held_by(network, arrays), kept_in(arrays, run))


def error(network: Any, name: str, run: str, **changed: Tensor) -> float:
    """Return the relative error of our prediction against upstream's."""
    return relative_error(predict(network, name, run, **changed).numpy(), arrays_of(name)[run].numpy())


@pytest.mark.parametrize(("name", "run"), [*RUNS, *ROUTED])
def test_prediction_with_upstream_weights_equals_upstream(name: str, run: str) -> None:
    assert error(network_of(name), name, run) <= BOUND


@pytest.mark.parametrize(("name", "run"), ROUTED)
def test_prediction_with_another_order_of_kept_tokens_is_the_same(name: str, run: str) -> None:
    keep = run.replace("routed", "keep")
    assert error(network_of(name), name, run, **{keep: arrays_of(name)[keep].flip(1)}) <= BOUND


@pytest.mark.parametrize(("name", "run"), ROUTED)
def test_kept_count_is_that_of_the_training_code(name: str, run: str) -> None:
    arrays, sparsity = arrays_of(name), float(run.removeprefix("routed-"))
    kept = arrays[run.replace("routed", "keep")].shape[1]
    assert prx.kept_count(network_of(name).config.tokens, sparsity) == kept


def test_sinusoids_of_large_times_are_upstreams_formula() -> None:
    # The stored cases have small times alone.
    t, count = torch.tensor([1.0, 0.6]), models.FREQUENCIES
    angles = 1000 * t.double()[:, None] * 10000.0 ** (-torch.arange(count, dtype=torch.float64) / count)
    wanted = torch.cat([angles.cos(), angles.sin()], dim=-1)
    # An angle of at most 1000 is rounded by 2^-24 of it four times: in the exponent, the
    # exponential and both products.
    assert (models.sinusoids(t, count, models.TIME_FACTOR) - wanted).abs().max() <= 4 * 1000 * 2**-24


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.5])
@pytest.mark.parametrize(
    ("strong", "weak"),
    [("dense", "routed-0.5"), ("dense", "null-dense"), ("routed-0.5", "null-routed-0.5"), ("dense", "null-routed-0.5")],
    ids=["SG", "CFG", "CFG of routed branches", "CFG + SG"],
)
@pytest.mark.parametrize("name", ["latent", "pixel"])
def test_guided_equals_the_combination_of_upstreams_predictions(
    name: str, strong: str, weak: str, scale: float
) -> None:
    network, arrays = network_of(name), arrays_of(name)
    held = held_by(network, arrays)
    other = held
    if weak.startswith("null-"):
        other = held | {key: held_by(network, arrays, "null-")[key] for key in TEXT}
    branches = (
        BranchInputs(held, kept_in(arrays, strong)),
        BranchInputs(other, kept_in(arrays, weak.removeprefix("null-"))),
    )
    found = model_of(network, name).guided(arrays["x"], *branches, torch.tensor(scale))
    wanted = arrays[weak] + scale * (arrays[strong] - arrays[weak])
    # The combination multiplies the errors of the predictions by up to `scale`.
    assert relative_error(found.numpy(), wanted.numpy()) <= BOUND * max(scale, 1.0)


@pytest.mark.usefixtures("undecomposed")
@pytest.mark.parametrize(
    ("name", "weak"), [("latent", "routed-0.5"), ("pixel", "null-routed-0.5")], ids=["SG", "CFG + SG of pixels"]
)
def test_guided_graph_equals_the_combination_of_upstreams_predictions(name: str, weak: str) -> None:
    network, arrays, scale = network_of(name), arrays_of(name), 2.0
    images, tokens = len(arrays["t"]), network.config.tokens
    keep = arrays["keep-0.5"]
    spec = GraphSpec("guided", (Level(0.0, tokens), Level(0.5, keep.shape[1])), null_weak=weak.startswith("null-"))
    facts = ModelFacts(
        family="prx",
        prediction="flow",
        space="latent",
        latent=(network.config.channels, *network.config.image_size),
        pixels_per_latent=None,
        patch=network.config.patch,
        tokens=tokens,
        width=network.config.width,
        depth=network.config.depth,
        heads=network.config.heads,
        conditions=Text(network.config.text_tokens, network.config.context),
        held=network.held,
        parameters=1,
        route=None,
        ends=network.ends,
        masked=False,
    )
    (model,) = trace(model_of(network, name), [spec], facts, images, DEFAULT_OPSET)
    subset = Subset.of(keep, tokens, masked=False)
    values = {"x": arrays["x"], "r": torch.zeros_like(arrays["x"]), **held_by(network, arrays)}
    values |= {"rows_weak": subset.rows, "restore_weak": subset.restore, "scale": torch.tensor(scale)}
    if spec.null_weak:
        values |= {f"{key}_weak": held_by(network, arrays, "null-")[key] for key in TEXT}
    values |= {factor: torch.tensor(1.0 if factor in ("c_in", "c_out") else 0.0) for factor in FACTORS}
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    prediction, _ = session.run(None, {key: value.numpy() for key, value in values.items()})
    wanted = arrays[weak] + scale * (arrays["dense"] - arrays[weak])
    assert relative_error(prediction, wanted.numpy()) <= BOUND * scale


@pytest.mark.parametrize("null", [False, True], ids=["SG", "CFG"])
def test_guided_runs_a_block_before_the_route_once_for_branches_with_the_same_text(
    null: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, arrays, rows = network_of("latent"), arrays_of("latent"), list[int]()

    def counted(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        rows.append(x.shape[1])
        return modulate(x, shift, scale)

    monkeypatch.setattr(models, "modulate", counted)
    monkeypatch.setattr("sg_export.models.dit.modulate", counted)  # of the last norm
    held = held_by(network, arrays)
    other = held | {key: held_by(network, arrays, "null-")[key] for key in TEXT} if null else held
    keep = arrays["keep-0.5"]
    branches = BranchInputs(held), BranchInputs(other, keep)
    model_of(network, "latent").guided(arrays["x"], *branches, torch.tensor(2.0))
    count = network.config.tokens
    prefix = 2 * count if null else count
    # Time alone makes the modulations: they are shared, so each is one operation on all rows. The
    # last one follows the combination of the branches.
    assert rows == [*[prefix] * 2, *[count + keep.shape[1]] * 2, *[2 * count] * 2, count]


@pytest.mark.parametrize("published", FACTS["published"], ids=lambda published: published["name"])
def test_parameters_of_published_shapes_equal_upstream(published: dict[str, Any]) -> None:
    theirs = published["config"]
    config = models.PRXConfig(
        image_size=(64, 64),
        patch=theirs["patch_size"],
        channels=theirs["in_channels"],
        width=theirs["hidden_size"],
        depth=theirs["depth"],
        heads=theirs["num_heads"],
        mlp_width=int(theirs["hidden_size"] * theirs["mlp_ratio"]),
        context=theirs["context_in_dim"],
        text_tokens=prx_configs.TEXT_TOKENS,
        bottleneck=theirs.get("bottleneck_size"),
        resolution=theirs.get("resolution_embeds", False),
    )
    with torch.device("meta"):
        network = PRX(config)
    assert sum(parameter.numel() for parameter in network.parameters()) == published["parameters"]
    assert prx.SAMPLES[config.channels * config.patch**2] == (config.channels, config.patch)


@pytest.mark.parametrize("run", ["dense", "routed-0.5"])
def test_prediction_in_bf16_is_near(run: str) -> None:
    network, arrays = copy_of("latent").to(torch.bfloat16), arrays_of("latent")
    changed = {key: arrays[key].to(torch.bfloat16) for key in ("x", "embeddings")}
    found = predict(network, "latent", run, **changed)
    assert found.dtype == torch.bfloat16
    # BF16 rounds to 4e-3. The errors of some twenty operations in a row add up.
    assert relative_error(found.float().numpy(), arrays[run].numpy()) <= 5e-2


@pytest.mark.parametrize("name", ["latent", "pixel"])
def test_prediction_of_an_image_is_independent_of_its_batch(name: str) -> None:
    run, arrays = ROUTED_BY_NAME[name], arrays_of(name)
    for image in range(len(arrays["t"])):
        own = {key: array[image : image + 1] for key, array in arrays.items()}
        found = predict(network_of(name), name, run, **own)
        assert relative_error(found.numpy(), own[run].numpy()) <= BOUND


@pytest.mark.parametrize(("name", "run"), [("latent", "dense"), ("latent", "routed-0.5")])
def test_prediction_is_independent_of_padded_text(name: str, run: str) -> None:
    arrays = arrays_of(name)
    other = torch.where(arrays["mask"][..., None], arrays["embeddings"], 100.0)
    assert torch.equal(predict(network_of(name), name, run, embeddings=other), predict(network_of(name), name, run))


def test_prediction_of_an_exact_length_equals_the_padded_one() -> None:
    arrays, (_, length) = arrays_of("latent"), CASES["latent"]["lengths"]
    own = {key: array[1:] for key, array in arrays.items()}
    own |= {"embeddings": own["embeddings"][:, :length], "mask": own["mask"][:, :length]}
    found = predict(network_of("latent"), "latent", "dense", **own)
    assert relative_error(found.numpy(), own["dense"].numpy()) <= BOUND


def without_positions(network: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(models, "rotate", lambda x, rows: x)


def columns_before_rows(network: Any, patch: pytest.MonkeyPatch) -> None:
    rows, columns = network.config.grid
    network.rope = network.rope.view(rows, columns, -1).transpose(0, 1).reshape(rows * columns, -1)


def turned_the_other_way(network: Any, patch: pytest.MonkeyPatch) -> None:
    # Scores depend on differences of positions: it is the sign of the angle that is seen.
    cosines, sines = network.rope.chunk(2, dim=-1)
    network.rope = torch.cat([cosines, -sines], dim=-1)


def halves_for_pairs(network: Any, patch: pytest.MonkeyPatch) -> None:
    def rotate(x: Tensor, rows: Tensor) -> Tensor:
        cosines, sines = rows[:, :, None].chunk(2, dim=-1)
        return x * cosines + x.roll(x.shape[-1] // 2, dims=-1) * sines

    patch.setattr(models, "rotate", rotate)


def padding_not_masked(network: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(models, "PADDED", 0.0)


def query_norm_for_keys(network: Any, patch: pytest.MonkeyPatch) -> None:
    for block in network.blocks:
        block.attention.norm_k = block.attention.norm_q


def image_norm_for_text(network: Any, patch: pytest.MonkeyPatch) -> None:
    for block in network.blocks:
        block.attention.norm_added_k = block.attention.norm_k


def half_the_heads(network: Any, patch: pytest.MonkeyPatch) -> None:
    for block in network.blocks:
        values = block.attention.norm_q.weight.shape[0]
        for norm in (block.attention.norm_q, block.attention.norm_k, block.attention.norm_added_k):
            norm.weight.data = norm.weight.data.repeat(2)
        assert block.attention.heads * values == network.config.width
        block.attention.heads //= 2
    network.rope = torch.cat([part.repeat(1, 2) for part in network.rope.chunk(2, dim=-1)], dim=-1)


def keys_before_queries(network: Any, patch: pytest.MonkeyPatch) -> None:
    for block in network.blocks:
        query, key, value = block.attention.img_qkv_proj.weight.data.chunk(3)
        block.attention.img_qkv_proj.weight.data = torch.cat([key, query, value])


def scale_before_shift(network: Any, patch: pytest.MonkeyPatch) -> None:
    for block in network.blocks:
        lin, width = block.modulation.lin, network.config.width
        for parameter in (lin.weight, lin.bias):
            first, second, rest = parameter.data.split([width, width, 4 * width])
            parameter.data = torch.cat([second, first, rest])


def gate_and_up_exchanged(network: Any, patch: pytest.MonkeyPatch) -> None:
    for block in network.blocks:
        block.gate_proj, block.up_proj = block.up_proj, block.gate_proj


def sines_before_cosines(network: Any, patch: pytest.MonkeyPatch) -> None:
    original = models.sinusoids
    patch.setattr(models, "sinusoids", lambda *given: original(*given).roll(models.FREQUENCIES, dims=-1))


def time_not_scaled(network: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(models, "TIME_FACTOR", 1.0)


def one_block_left_out(network: Any, patch: pytest.MonkeyPatch) -> None:
    network.blocks[1].forward = lambda tokens, branches, rows: tokens


def channels_after_pixels(network: Any, patch: pytest.MonkeyPatch) -> None:
    c = network.config
    weight = network.final_layer.linear.weight.data.view(c.channels, c.patch**2, -1)
    network.final_layer.linear.weight.data = weight.transpose(0, 1).reshape(-1, c.width)


MISTAKES = [
    without_positions,
    columns_before_rows,
    turned_the_other_way,
    halves_for_pairs,
    padding_not_masked,
    query_norm_for_keys,
    image_norm_for_text,
    half_the_heads,
    keys_before_queries,
    scale_before_shift,
    gate_and_up_exchanged,
    sines_before_cosines,
    time_not_scaled,
    one_block_left_out,
    channels_after_pixels,
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
@pytest.mark.parametrize("run", ["dense", "routed-0.5"])
def test_prediction_with_a_mistake_exceeds_bound(
    mistake: Callable[[Any, pytest.MonkeyPatch], None], run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = copy_of("latent")
    mistake(network, monkeypatch)
    assert error(network, "latent", run) > 10 * BOUND


def test_prediction_with_first_positions_for_kept_tokens_exceeds_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Subset, "positions", lambda self: self.all_positions()[:, : self.rows.shape[1]])
    assert error(network_of("latent"), "latent", "routed-0.5") > 10 * BOUND


def test_prediction_with_width_before_height_exceeds_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    network, original = copy_of("pixel"), models.ResolutionEmbedder.forward
    monkeypatch.setattr(models.ResolutionEmbedder, "forward", lambda self, size: original(self, size.flip(0)))
    assert error(network, "pixel", "dense") > 10 * BOUND


@pytest.mark.parametrize(
    "layer", ["blocks.0.img_pre_norm", "blocks.1.post_attention_layernorm", "final_layer.norm_final"]
)
def test_prediction_with_larger_epsilon_exceeds_bound(layer: str) -> None:
    network = copy_of("small")
    network.get_submodule(layer).eps = 1e-5
    assert error(network, "small", "routed-0.5") > 10 * BOUND


@pytest.mark.parametrize("norm", ["norm_q", "norm_k", "norm_added_k"])
def test_prediction_with_larger_epsilon_of_heads_exceeds_bound(norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = models.HeadNorm.forward

    def forward(self: models.HeadNorm, x: Tensor) -> Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(models, "EPSILON", 1e-4 if self in changed else 1e-6)
            return original(self, x)

    network = network_of("small")
    changed = [network.get_submodule(f"blocks.{index}.attention.{norm}") for index in range(network.layers)]
    monkeypatch.setattr(models.HeadNorm, "forward", forward)
    assert error(network, "small", "routed-0.5") > 10 * BOUND


# Only the first of identical blocks is tested.
@pytest.mark.parametrize(
    "key", [key for key in CASES["pixel"]["shapes"] if not key.startswith(("blocks.1", "blocks.2"))]
)
def test_prediction_with_one_tensor_changed_exceeds_bound(key: str) -> None:
    network = copy_of("pixel")
    network.state_dict()[key].mul_(1.01)
    # In particular, every tensor of the random weights affects the result.
    assert error(network, "pixel", "routed-0.5") > BOUND
