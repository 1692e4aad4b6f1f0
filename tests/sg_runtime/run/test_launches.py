"""One evaluation by the graphs of real bundles, in one or in two engine runs.

Both agree with the formula and with PyTorch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sg_export.loading import load_model
from sg_export.models.sparse import SparseModel
from sg_export.packing.pack import HOISTED_ROWS
from sg_runtime import philox
from sg_runtime.conditions import of_classes
from sg_runtime.errors import UsageError
from sg_runtime.guidance import choose, guide
from sg_runtime.manifest import GuidancePlan, Level, Manifest, TensorFacts, read_manifest
from sg_runtime.run.evaluate import GraphRunner
from sg_runtime.run.kept import restore, rows
from sg_runtime.run.launches import launches
from sg_runtime.run.prepared import Batch, PreparedBranch, PreparedRun, Rows, prepare
from sg_runtime.run.workspace import Workspace
from sg_runtime.sampling import Update, precondition

Array = NDArray[np.float32]

LABELS, SEEDS = np.array([3, 5, 0]), [7, 8, 2**64 - 1]
TIMES = {"flow": 0.6, "edm": 1.7}
SHAPE = (2, 8, 8)

# Tolerance of one FP32 rounding in another order for every sum of the network's three blocks: about
# 3e-7. A fault, such as another token or the wrong class, is above 1e-2.
CLOSE = 1e-5


@cache
def network(checkpoint: Path) -> SparseModel:
    """Return the PyTorch model of a checkpoint, loaded once."""
    return load_model(checkpoint).model


def distance(found: Array, expected: Array) -> float:
    """Return the relative L2 distance, computed in float64."""
    return float(np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected))


@dataclass(frozen=True)
class Case:
    """One way to guide.

    bundle: fixture name of the bundle. guided: the graph that holds both branches, or None.
    branches: the graphs of the single branches. chosen: arguments of `choose`.
    """

    bundle: str
    guided: str | None
    branches: list[str]
    chosen: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([self.bundle.removeprefix("tiny_"), *(str(value) for value in self.chosen.values())])

    @property
    def fused(self) -> list[str]:
        """Graphs that one evaluation runs if it may use any graph."""
        return self.branches if self.guided is None else [self.guided]


CASES = [
    Case("tiny_bundle", "guided-16-8", ["dense", "sparse-8"]),
    Case("tiny_bundle", "guided-12-8", ["sparse-12", "sparse-8"], {"strong_sparsity": 0.25}),
    Case("tiny_bundle", None, ["dense", "sparse-12"], {"sparsity": 0.25}),
    Case("tiny_bundle", None, ["dense", "dense"], {"mode": "cfg"}),
    Case("tiny_bundle", None, ["sparse-12", "sparse-8"], {"mode": "cfg+sg", "strong_sparsity": 0.25}),
    Case("tiny_cfg_bundle", "guided-16-16-null", ["dense", "dense"]),
    Case("tiny_cfg_bundle", "guided-12-12-null", ["sparse-12", "sparse-12"], {"strong_sparsity": 0.25}),
    Case("tiny_cfg_sg_bundle", "guided-12-8-null", ["sparse-12", "sparse-8"]),
    Case("tiny_cfg_sg_bundle", None, ["sparse-12", "sparse-8"], {"mode": "sg"}),
    Case("tiny_autoguidance_bundle", None, ["dense", "weak-sparse-8"]),
    Case("tiny_autoguidance_bundle", None, ["dense", "weak-dense"], {"sparsity": 0.0}),
    Case("tiny_edm_bundle", "guided-12-8", ["sparse-12", "sparse-8"]),
    Case("tiny_edm_bundle", None, ["sparse-12", "sparse-12"], {"mode": "cfg"}),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)


ROWS = HOISTED_ROWS["condition"]


@dataclass(frozen=True)
class Tail:
    """The update next = a x + b D + e r."""

    a: float
    b: float
    e: float
    r: Array


class Setup:
    """A graph runner of three images over a recorder, a prepared run, and a state with its update.

    The prepared run has one evaluation by default. The state is in the middle of a step: exactly
    half of the state at its start.
    """

    def __init__(
        self,
        bundle: Path,
        record: Callable[[Path], Any],
        guidance: GuidancePlan | None = None,
        times: Sequence[float] | None = None,
        images: int = 3,
        batch: int = 3,
        **chosen: Any,
    ) -> None:
        self.bundle = bundle
        self.manifest: Manifest = read_manifest(bundle / "manifest.json")
        self.recorder = record(bundle)
        self.runner = self.run_of(self.manifest, batch)
        self.guidance = guidance or choose(self.manifest, scale=1.7, **chosen)
        times = [TIMES[self.manifest.model.prediction]] if times is None else times
        self.labels, self.seeds = np.resize(LABELS, images), [*SEEDS, *range(images)][:images]
        self.plan: PreparedRun = prepare(
            self.manifest,
            self.runner.hoist,
            self.guidance,
            [Update(step, 0, time, 0.0, 1.0, 0.0) for step, time in enumerate(times)],
            Batch(of_classes(self.manifest.model.labels, self.labels.tolist()), self.seeds),
        )
        self.recorder.runs.clear()
        rng = np.random.default_rng(4)
        r = rng.standard_normal((images, *SHAPE)).astype(np.float32)
        self.x = 0.5 * r
        self.tail = Tail(0.9, -0.7, 0.3, r)

    def run_of(self, manifest: Manifest, batch: int = 3) -> GraphRunner:
        """Return a graph runner over the recorder."""
        return GraphRunner(manifest, self.recorder.lane(), batch, self.recorder.batches)

    def advance(self, index: int = 0, *, fused: bool = True, manifest: Manifest | None = None) -> Array:
        """Return `next` after an evaluation in a workspace.

        The recorder drops the runs that led to the state.
        """
        one = [index, index]
        plan = replace(
            self.plan,
            times=tuple(self.plan.times[k] for k in one),
            scales=tuple(self.plan.scales[k] for k in one),
            branches=tuple(at(branch, one) for branch in self.plan.branches),
        )
        workspace = Workspace(self.recorder.lane(), manifest or self.manifest, len(self.x), 2)
        workspace.start(self.tail.r)
        updates = [
            Update(0, 0, plan.times[0], 0.5, 0.0, 0.0),
            Update(0, 1, plan.times[0], self.tail.a, self.tail.b, self.tail.e),
        ]
        before, ends = len(self.recorder.runs), []
        workspace.advance(plan, updates, lambda: ends.append(len(self.recorder.runs)), lambda _: self.x, fused)
        assert len(ends) == 2
        del self.recorder.runs[before : ends[0]]
        return np.array(workspace.state)

    def following(self, prediction: Array) -> Array:
        """Return the update computed by NumPy in float64."""
        tail = self.tail
        result: Array = tail.a * self.x.astype(np.float64) + tail.b * prediction.astype(np.float64) + tail.e * tail.r
        return result

    def pytorch(self, branch: PreparedBranch, labels: NDArray[np.int64], index: int = 0) -> Array:
        """Return a branch's prediction by PyTorch, from the checkpoint next to the bundle."""
        source = self.manifest.source if branch.network == "main" else self.manifest.weak_source
        assert source is not None
        model = network(self.bundle.parent / source.file)
        scaling = precondition(self.manifest.model.prediction, self.plan.times[index])
        keep = branch.keep[index]
        with torch.no_grad():
            output = model(
                torch.from_numpy(np.float32(scaling.c_in) * self.x),
                torch.full((len(self.x),), scaling.t),
                {"class": torch.from_numpy(labels)},
                None if keep is None else torch.from_numpy(keep),
            ).numpy()
        result: Array = scaling.c_skip * self.x + scaling.c_out * output
        return result


def at(branch: PreparedBranch, evaluations: list[int]) -> PreparedBranch:
    """Return a branch reduced to these evaluations."""
    return replace(
        branch,
        held={
            name: Rows(np.stack([held.values[k] for k in evaluations]), held.rows) for name, held in branch.held.items()
        },
        levels=tuple(branch.levels[k] for k in evaluations),
        keep=tuple(branch.keep[k] for k in evaluations),
    )


def check_feeds(runs: Sequence[Any]) -> None:
    """Assert that each run was fed the inputs that its graph's facts list.

    This includes scalars of rank 0 and batches of three images.
    """
    for run in runs:
        assert set(run.feeds) == {tensor.name for tensor in run.graph.inputs}
        for tensor in run.graph.inputs:
            value = run.feeds[tensor.name]
            assert value.dtype == tensor.storage, tensor
            assert value.shape == tuple(3 if size == "B" else size for size in tensor.shape), tensor


# Every way to guide


@cases
@pytest.mark.parametrize("fused", [True, False])
def test_advance_of_any_mode_is_the_formula(
    case: Case, fused: bool, record: Callable[[Path], Any], request: pytest.FixtureRequest
) -> None:
    """The evaluation is one engine run if a graph holds both branches, otherwise two.

    The result equals PyTorch's two branches, combined by the formula.
    """
    own = Setup(request.getfixturevalue(case.bundle), record, **case.chosen)
    found = own.advance(fused=fused)
    assert found.dtype == np.float32
    assert own.recorder.names == (case.fused if fused else case.branches)
    assert {run.output for run in own.recorder.runs} == {"next"}
    check_feeds(own.recorder.runs)

    weak = own.plan.weak
    assert weak is not None
    weak_labels = np.full(3, 5) if own.guidance.row.null_weak else own.labels
    prediction = guide(own.pytorch(own.plan.strong, own.labels), own.pytorch(weak, weak_labels), 1.7)
    assert distance(found, own.following(prediction)) < CLOSE


@cases
def test_prediction_of_any_mode_is_the_formula(
    case: Case, record: Callable[[Path], Any], request: pytest.FixtureRequest
) -> None:
    own = Setup(request.getfixturevalue(case.bundle), record, **case.chosen)
    strong, weak = own.runner.branches(own.x, own.plan, 0)
    assert own.recorder.names == case.branches
    assert distance(strong, weak) > 1e-2, "two branches that agree would prove nothing"
    assert distance(strong, own.pytorch(own.plan.strong, own.labels)) < CLOSE
    own.recorder.runs.clear()
    found = own.runner.prediction(own.x, own.plan, 0)
    assert own.recorder.names == case.fused
    # Two runs share the sum, as in a step with a = e = 0 and b = 1.
    assert {run.output for run in own.recorder.runs} == {"next" if case.guided is None else "prediction"}
    check_feeds(own.recorder.runs)
    assert distance(found, guide(strong, weak, 1.7)) < CLOSE


@cases
def test_advance_at_any_scale_is_linear_in_it(
    case: Case, record: Callable[[Path], Any], request: pytest.FixtureRequest
) -> None:
    """Scale 0 is the weak branch and scale 1 the strong branch.

    This holds in one run and in two. Other scales are linear between and beyond them.
    """
    own = Setup(request.getfixturevalue(case.bundle), record, **case.chosen)
    strong, weak = (own.following(branch) for branch in own.runner.branches(own.x, own.plan, 0))
    for scale in (0.0, 1.0, 0.5, -1.0, 4.0):
        own.plan = replace(own.plan, scales=(scale,))
        for fused in (True, False):
            expected = weak + scale * (strong - weak)
            assert distance(own.advance(fused=fused), expected) < CLOSE, (scale, fused)


def test_advance_of_two_networks_never_runs_a_graph_that_holds_both_branches_of_one(
    record: Callable[[Path], Any], tiny_autoguidance_bundle: Path, tiny_bundle: Path
) -> None:
    """That graph keeps the same number of tokens in each branch."""
    own = Setup(tiny_autoguidance_bundle, record)
    guided = read_manifest(tiny_bundle / "manifest.json").graph("guided", 16, 8)
    assert guided is not None
    manifest = replace(own.manifest, graphs=(*own.manifest.graphs, guided))
    np.testing.assert_array_equal(own.advance(manifest=manifest), own.advance())
    assert own.recorder.names == ["dense", "weak-sparse-8"] * 2


@pytest.mark.parametrize("bundle", ["tiny_bundle", "tiny_edm_bundle"])
def test_advance_without_guidance_runs_the_strong_branch_alone(
    bundle: str, record: Callable[[Path], Any], request: pytest.FixtureRequest
) -> None:
    own = Setup(request.getfixturevalue(bundle), record, mode="none", strong_sparsity=0.25)
    found = own.advance()
    assert own.recorder.names == ["sparse-12"]
    check_feeds(own.recorder.runs)
    assert distance(found, own.following(own.pytorch(own.plan.strong, own.labels))) < CLOSE
    assert own.runner.prediction(own.x, own.plan, 0).dtype == np.float32
    assert own.recorder.names == ["sparse-12", "sparse-12"]


def test_branches_without_guidance_are_refused(record: Callable[[Path], Any], tiny_bundle: Path) -> None:
    own = Setup(tiny_bundle, record, mode="none")
    with pytest.raises(UsageError) as caught:
        own.runner.branches(own.x, own.plan, 0)
    assert str(caught.value) == "branches: expected guidance with two branches, found the strong one alone"


def test_advance_in_two_runs_shares_the_update_between_them(record: Callable[[Path], Any], tiny_bundle: Path) -> None:
    """The first run gives a x + b ω D_strong + e r; the second adds b (1 - ω) D_weak.

    Nothing remains to be added outside of the graphs.
    """
    own = Setup(tiny_bundle, record)
    found = own.advance(fused=False)
    first, second = own.recorder.runs
    wanted = [("a", 0.9), ("b", -0.7 * 1.7), ("e", 0.3), ("c_in", 1.0), ("c_skip", 0.0), ("c_out", 1.0)]
    assert [first.feeds[name] for name, _ in wanted] == [np.float32(value) for _, value in wanted]
    np.testing.assert_array_equal(first.feeds["r"], own.tail.r)
    assert [second.feeds[name] for name in ("a", "b", "e")] == [0, np.float32(-0.7 * (1 - 1.7)), 1]
    np.testing.assert_array_equal(second.feeds["x"], own.x)
    strong, weak = own.runner.branches(own.x, own.plan, 0)
    # r of the second run is the result of the first run.
    part = own.tail.a * own.x + own.tail.b * 1.7 * strong + own.tail.e * own.tail.r
    assert distance(second.feeds["r"], part) < CLOSE
    assert distance(found, part + own.tail.b * (1 - 1.7) * weak) < CLOSE


def test_advance_of_an_edm_model_scales_around_the_network(
    record: Callable[[Path], Any], tiny_edm_bundle: Path
) -> None:
    """Every graph that runs gets the scalars of its sigma."""
    own = Setup(tiny_edm_bundle, record)
    own.advance()
    own.advance(fused=False)
    scaling = precondition("edm", 1.7)
    assert len(own.recorder.runs) == 3
    for run in own.recorder.runs:
        expected = [np.float32(value) for value in (scaling.c_in, scaling.c_skip, scaling.c_out)]
        assert [run.feeds[name] for name in ("c_in", "c_skip", "c_out")] == expected


def test_advance_of_the_null_row_alone_gives_every_image_no_class(
    record: Callable[[Path], Any], tiny_cfg_bundle: Path
) -> None:
    own = Setup(tiny_cfg_bundle, record)
    own.advance()
    (run,) = own.recorder.runs
    null = modulations(own.runner, np.array([0.6], np.float32), np.array([5]))[0]
    np.testing.assert_array_equal(run.feeds["modulations_weak"], np.stack([null] * 3))
    assert not np.array_equal(run.feeds["modulations"][0], null)
    np.testing.assert_array_equal(run.feeds["modulations"][1], null)  # the image without a class


# What changes over a run


def test_advance_outside_of_the_interval_runs_the_strong_branch_alone(
    record: Callable[[Path], Any], tiny_cosine_bundle: Path
) -> None:
    """t = 0.95 and 0.1 are outside of the interval.

    Inside, an evaluation is one run, or two runs if no graph holds that pair.
    """
    times = [0.95, 0.9, 0.6, 0.5, 0.15, 0.1]
    own = Setup(tiny_cosine_bundle, record, read_manifest(tiny_cosine_bundle / "manifest.json").guidance, times)
    expected = [
        ["dense"],
        ["guided-16-8"],
        # Half a cosine at 2/5 and 3/5: 0.09 and 0.33, 0.16 and 0.17.
        ["dense", "sparse-12"],
        ["sparse-12", "sparse-12"],
        ["sparse-12", "dense"],
        ["sparse-12"],
    ]
    for index, names in enumerate(expected):
        own.recorder.runs.clear()
        found = own.advance(index)
        assert own.recorder.names == names
        check_feeds(own.recorder.runs)
        prediction = own.pytorch(own.plan.strong, own.labels, index)
        if len(names) == 2 or names[0].startswith("guided"):
            assert own.plan.weak is not None
            weak = own.pytorch(own.plan.weak, own.labels, index)
            prediction = guide(prediction, weak, own.plan.scales[index])
        assert distance(found, own.following(prediction)) < CLOSE
        assert distance(own.runner.prediction(own.x, own.plan, index), prediction) < CLOSE


def test_branches_outside_of_the_interval_are_refused(record: Callable[[Path], Any], tiny_bundle: Path) -> None:
    own = Setup(tiny_bundle, record, times=[0.9, 0.5], interval=(0.4, 0.6))
    with pytest.raises(UsageError, match="branches: expected guidance with two branches, found the strong one"):
        own.runner.branches(own.x, own.plan, 0)
    assert len(own.runner.branches(own.x, own.plan, 1)) == 2


# Groups of images


@pytest.mark.parametrize(
    ("bundle", "images", "rows"),
    [
        ("tiny_cfg_sg_bundle", 3, [3]),
        ("tiny_cfg_sg_bundle", 1, [3]),
        ("tiny_cfg_sg_bundle", 7, [3, 3, 3]),
        ("tiny_bundle", 2, [2]),
        ("tiny_bundle", 5, [5]),
        ("tiny_bundle", 7, [5, 5]),
    ],
)
@pytest.mark.parametrize("chosen", [{}, {"mode": "cfg"}], ids=["one run", "two runs"])
def test_prediction_of_any_count_of_images_fills_up_the_last_run(
    bundle: str,
    images: int,
    rows: list[int],
    chosen: dict[str, Any],
    record: Callable[[Path], Any],
    request: pytest.FixtureRequest,
) -> None:
    """Graphs of three images always get three.

    Graphs of a symbolic batch get five, or all images if there are fewer.
    """
    own = Setup(request.getfixturevalue(bundle), record, images=images, batch=5, **chosen)
    found = own.runner.prediction(own.x, own.plan, 0)
    assert found.shape == own.x.shape
    runs = own.recorder.runs
    assert [len(run.feeds["x"]) for run in runs] == rows * (2 if chosen else 1)
    order = [image for run in runs[: len(rows)] for image in run.feeds["x"]]
    expected = [*own.x, *[own.x[-1]] * (sum(rows) - images)]
    np.testing.assert_array_equal(order, expected)
    for name in ("modulations", "r"):
        assert all(len(run.feeds[name]) == len(run.feeds["x"]) for run in runs)
    strong, weak = own.runner.branches(own.x, own.plan, 0)
    assert distance(found, guide(strong, weak, 1.7)) < CLOSE


def test_prediction_of_an_image_is_the_same_in_any_company(
    record: Callable[[Path], Any], tiny_cfg_sg_bundle: Path
) -> None:
    """In a graph of three images the bits are the same, with or without padding."""
    seven, two = (Setup(tiny_cfg_sg_bundle, record, images=images) for images in (7, 2))
    found = seven.runner.prediction(seven.x, seven.plan, 0)
    np.testing.assert_array_equal(two.runner.prediction(seven.x[:2], two.plan, 0), found[:2])


def modulations(runner: GraphRunner, t: Array, classes: NDArray[np.int64]) -> Any:
    """Return the modulations of the main network at these times and classes, (S, M)."""
    (condition,) = runner.manifest.hoisted("main")
    return runner.hoist(condition, {"t": t, "class": classes})["modulations"]


@settings(max_examples=50)
@given(images=st.integers(1, 40), batch=st.integers(1, 40))
def test_groups_of_any_count_cover_each_image_in_order(
    images: int, batch: int, tiny_bundle: Path, tiny_cfg_bundle: Path, record: Callable[[Path], Any]
) -> None:
    for bundle in (tiny_bundle, tiny_cfg_bundle):
        manifest = read_manifest(bundle / "manifest.json")
        recorder = record(bundle)
        groups = list(GraphRunner(manifest, recorder.lane(), batch, recorder.batches).groups(images))
        rows = manifest.batch or min(batch, images)
        assert {len(group) for group in groups} == {rows}
        assert len(groups) == -(-images // rows)
        flat = np.concatenate(groups)
        np.testing.assert_array_equal(flat[:images], np.arange(images))
        assert set(flat[images:]) <= {images - 1}


@pytest.mark.parametrize("rows", [1, ROWS - 1, ROWS, ROWS + 1, 2 * ROWS + 7])
def test_condition_of_any_row_count_runs_at_one_length(
    rows: int, record: Callable[[Path], Any], tiny_bundle: Path
) -> None:
    """With another row count, a machine or a kernel could round the rows differently."""
    manifest = read_manifest(tiny_bundle / "manifest.json")
    recorder = record(tiny_bundle)
    runner = GraphRunner(manifest, recorder.lane(), 3)
    t, classes = np.linspace(0, 1, rows, dtype=np.float32), np.arange(rows) % 6
    found = modulations(runner, t, classes)
    assert found.shape == (rows, manifest.model.held["modulations"][0])
    assert [len(run.feeds["t"]) for run in recorder.runs] == [ROWS] * -(-rows // ROWS)
    assert {run.output for run in recorder.runs} == {"modulations"}
    for row in {0, rows // 2, rows - 1}:
        alone = modulations(runner, t[row : row + 1], classes[row : row + 1])
        np.testing.assert_array_equal(alone[0], found[row])


# Missing graphs


@pytest.mark.parametrize(
    ("bundle", "chosen", "missing", "remedy"),
    [
        ("tiny_bundle", {}, "sparse-8", "0.5 has no single-branch graph in this bundle; {} --sparsity 0.5"),
        ("tiny_bundle", {}, "dense", "0 has no single-branch graph in this bundle; {} --strong-sparsity 0"),
        (
            "tiny_autoguidance_bundle",
            {"sparsity": 0.5},
            "weak-sparse-8",
            "0.5 has no single-branch graph in this bundle; {} --weak-checkpoint PATH --sparsity 0.5",
        ),
    ],
)
def test_branches_without_a_graph_name_the_build(
    bundle: str,
    chosen: dict[str, Any],
    missing: str,
    remedy: str,
    record: Callable[[Path], Any],
    request: pytest.FixtureRequest,
) -> None:
    own = Setup(request.getfixturevalue(bundle), record, **chosen)
    graphs = tuple(graph for graph in own.manifest.graphs if graph.file != f"graphs/{missing}.onnx")
    runner = own.run_of(replace(own.manifest, graphs=graphs))
    with pytest.raises(UsageError) as caught:
        runner.branches(own.x, own.plan, 0)
    build = "build it with: sg-export build tiny.safetensors --route 1-1 --prediction flow --heads 2"
    assert str(caught.value) == f"sparsity {remedy.format(build)}"


def test_condition_of_a_network_that_is_not_there_names_the_build(
    record: Callable[[Path], Any], tiny_bundle: Path
) -> None:
    """The guidance plan was made for another bundle."""
    dense = Level(0.0, 16)
    with pytest.raises(UsageError) as caught:
        Setup(tiny_bundle, record, GuidancePlan("autoguidance", dense, dense, 2.0))
    assert str(caught.value) == (
        "autoguidance: this bundle has no weak checkpoint; "
        "build it with: sg-export build tiny.safetensors --route 1-1 --prediction flow --heads 2 --weak-checkpoint PATH"
    )


def test_launch_of_a_graph_of_schema_4_feeds_tokens(record: Callable[[Path], Any], tiny_bundle: Path) -> None:
    """Its graphs have one input for the kept tokens of a branch: their places in the image."""
    own = Setup(tiny_bundle, record, strong_sparsity=0.25)
    graph = own.manifest.graph("guided", 12, 8)
    assert graph is not None
    kept = tuple(TensorFacts(f"keep_{end}", "int64", ("B", n)) for end, n in (("strong", 12), ("weak", 8)))
    inputs = (*(tensor for tensor in graph.inputs if not tensor.name.startswith(("rows", "restore"))), *kept)
    earlier = replace(own.manifest, graphs=(own.manifest.hoisted("main")[0], replace(graph, inputs=inputs)))
    (launch,) = launches(earlier, own.plan, 0, 0.0, 1.0, 0.0)
    for end, branch in zip(("strong", "weak"), own.plan.branches, strict=True):
        (keep,) = launch.inputs[f"keep_{end}"].kept(own.plan, [0], earlier.model)
        np.testing.assert_array_equal(keep, branch.keep[0])


def test_advance_of_given_subsets_feeds_them(record: Callable[[Path], Any], tiny_bundle: Path) -> None:
    """The kept tokens of the prepared run are used, whoever made them."""
    own = Setup(tiny_bundle, record, strong_sparsity=0.25)
    weak = own.plan.weak
    assert weak is not None
    keep = np.stack([philox.subset(seed, 16, 8, step=5, evaluation=0, branch=philox.WEAK) for seed in SEEDS])
    own.plan = replace(own.plan, branches=(own.plan.strong, replace(weak, keep=(keep,))))
    own.advance()
    (run,) = own.recorder.runs
    strong = own.plan.strong.keep[0]
    assert strong is not None
    for end, expected in (("weak", keep), ("strong", strong)):
        np.testing.assert_array_equal(run.feeds[f"rows_{end}"], rows(expected, 16))
        np.testing.assert_array_equal(run.feeds[f"restore_{end}"], restore(expected, 16, masked=False))
    assert run.feeds["scale"] == np.float32(1.7)
