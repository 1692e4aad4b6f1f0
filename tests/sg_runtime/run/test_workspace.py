"""Runs that stay on their device: buffers, tables and bound launches.

`test_pipeline` checks that the samples are right.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sg_runtime import philox
from sg_runtime.backends import CallSequence
from sg_runtime.bundle import Bundle
from sg_runtime.devices.memory import ALIGNMENT, HostMemory, aligned
from sg_runtime.guidance import guide
from sg_runtime.manifest import EVEN, GraphFacts, Level, SamplerName, read_manifest
from sg_runtime.pipeline import Pipeline
from sg_runtime.run.budget import run_bytes
from sg_runtime.run.kept import restore, rows
from sg_runtime.run.prepared import PreparedBranch, PreparedRun, Rows
from sg_runtime.run.workspace import Workspace
from sg_runtime.sampling import Churn, Update, integrate, precondition, run_times, updates

Array = NDArray[np.float32]
SAMPLERS: tuple[SamplerName, ...] = ("euler", "heun")
CLASSES, SEEDS = [0, 3, None], [0, 1, 2**64 - 1]

# Tolerance of FP32 rounding in another order, outside of the graphs: about 3e-7. A fault, such as
# another buffer, is above 1e-2.
CLOSE = 1e-5


def distance(found: Array, expected: Array) -> float:
    """Return the relative L2 distance, computed in float64."""
    return float(np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected))


@pytest.fixture
def watched(watch: Callable[[Path], Any], request: pytest.FixtureRequest) -> Callable[..., tuple[Pipeline, Any]]:
    """Return a function that makes a pipeline of three images over a watched backend.

    The function takes the name of a bundle's fixture.
    """

    def make(bundle: str, chunk: int | None = None, batch: int = 3) -> tuple[Pipeline, Any]:
        path = request.getfixturevalue(bundle)
        backend = watch(path)
        return Pipeline(Bundle.open(path), backend, batch, chunk), backend

    return make


# What a run computes

WAYS: list[tuple[str, dict[str, Any], Churn | None]] = [
    ("tiny_bundle", {}, None),
    ("tiny_bundle", {"mode": "none", "strong_sparsity": 0.5}, None),
    ("tiny_cfg_bundle", {}, None),
    ("tiny_cfg_sg_bundle", {}, None),
    ("tiny_autoguidance_bundle", {}, None),
    ("tiny_cosine_bundle", {}, None),
    ("tiny_edm_bundle", {}, None),
    ("tiny_edm_bundle", {}, Churn(2, 0.05, 50, 1.003)),
]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("bundle", "chosen", "churn"), WAYS)
def test_sample_of_any_mode_is_its_predictions_put_together(
    bundle: str,
    chosen: dict[str, Any],
    churn: Churn | None,
    sampler: SamplerName,
    fused: bool,
    watched: Callable[..., tuple[Pipeline, Any]],
) -> None:
    """The update is its formula; the predictions are those of `guided`, in separate arrays."""
    pipe, _ = watched(bundle)
    manifest, guidance = pipe.bundle.manifest, pipe.guidance(**chosen)
    times = run_times(5, manifest.sampling.times)
    run = updates(sampler, manifest.model.prediction, times, churn)
    counters = [(update.step, update.evaluation) for update in run]
    plan = pipe.prepare([update.time for update in run], CLASSES, SEEDS, counters=counters, guidance=guidance)

    def advance(index: int, x: Any, r: Any) -> Any:
        a, b, e = (np.float32(value) for value in (run[index].a, run[index].b, run[index].e))
        return a * x + b * pipe.guided(x, plan, index) + e * r

    def noise(step: int) -> Array:
        return np.stack([philox.normal(seed, philox.CHURN, (2, 8, 8), step=step) for seed in SEEDS])

    expected = integrate(run, advance, np.float32(times[0]) * pipe.initial_noise(SEEDS), noise)
    found = pipe.sample(CLASSES, SEEDS, steps=5, sampler=sampler, guidance=guidance, churn=churn, fused=fused)
    assert distance(found, expected) < CLOSE


# Which buffers a run reads and writes


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("chunk", [None, 2])
def test_sample_writes_no_buffer_that_is_read_before_the_step_ends(
    chunk: int | None, sampler: SamplerName, fused: bool, watched: Callable[..., tuple[Pipeline, Any]]
) -> None:
    """The test follows the addresses of the state and of r from launch to launch."""
    pipe, backend = watched("tiny_bundle", chunk)
    pipe.sample(CLASSES, SEEDS, steps=4, sampler=sampler, fused=fused)
    launches = iter(backend.steps)
    state = start = None
    for update in updates(sampler, "flow", run_times(4, EVEN)):
        runs = [next(launches) for _ in range(1 if fused else 2)]
        state = state or runs[0].inputs["x"]
        if update.evaluation == 0:
            start = state
        part = start
        for launch in runs:
            assert launch.inputs["x"] == state
            assert launch.inputs["r"] == part
            assert launch.outputs["next"] not in {state, start, part, *launch.inputs.values()}
            part = launch.outputs["next"]
        state = part
    assert not [*launches]
    assert len({launch.outputs["next"] for launch in backend.steps}) <= 4


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("bundle", ["tiny_bundle", "tiny_cosine_bundle", "tiny_autoguidance_bundle"])
def test_sample_between_its_evaluations_only_runs_graphs(
    bundle: str, fused: bool, watched: Callable[..., tuple[Pipeline, Any]]
) -> None:
    """No array is made, filled, copied or read between evaluations.

    A second run binds nothing and builds no sequence.
    """
    pipe, backend = watched(bundle)
    first = pipe.sample(CLASSES, SEEDS, steps=4, sampler="heun", fused=fused)
    backend.events.clear()
    np.testing.assert_array_equal(pipe.sample(CLASSES, SEEDS, steps=4, sampler="heun", fused=fused), first)
    ran = [number for number, event in enumerate(backend.events) if event in backend.steps]
    assert set(backend.kinds[ran[0] : ran[-1] + 1]) == {"run"}
    assert not [event for event in backend.events if event.kind == "bind" and event.fixed]
    assert "sequence" not in backend.kinds
    # The samples go from their buffer to the result, and from there to the caller.
    assert backend.kinds[ran[-1] + 1 :] == ["empty", "copy", "download"]


def test_sample_with_churn_between_its_evaluations_moves_the_state_alone(
    watched: Callable[..., tuple[Pipeline, Any]],
) -> None:
    """Each step that adds noise moves the state to the CPU and back once."""
    pipe, backend = watched("tiny_edm_bundle")
    churn = Churn(1.0, high=30.0)
    pipe.sample(CLASSES, SEEDS, steps=4, sampler="euler", churn=churn)
    backend.events.clear()
    pipe.sample(CLASSES, SEEDS, steps=4, sampler="euler", churn=churn)
    first = backend.events.index(backend.steps[0])
    noisy = ["download", "upload", "run"]
    assert backend.kinds[first:] == ["run", *noisy * 3, "empty", "copy", "download"]


@pytest.mark.parametrize("bundle", ["tiny_bundle", "tiny_cfg_sg_bundle", "tiny_autoguidance_bundle"])
@pytest.mark.parametrize("fused", [True, False])
def test_sample_reads_each_kind_of_input_from_one_table(
    bundle: str, fused: bool, watched: Callable[..., tuple[Pipeline, Any]]
) -> None:
    """Each evaluation has its own row.

    All arrays that graphs read or write begin at multiples of 256 bytes.
    """
    pipe, backend = watched(bundle)
    pipe.sample(CLASSES, SEEDS, steps=4, sampler="euler", fused=fused)
    manifest = pipe.bundle.manifest
    evaluations = len(backend.steps) // 4
    for launch in backend.steps:
        places = {**launch.inputs, **launch.outputs}
        assert all(address % ALIGNMENT == 0 for address in places.values())
        # "prediction" is an output that nobody reads.
        assert set(places) == {tensor.name for tensor in manifest_graph(manifest, launch.graph).inputs} | {"next"}
    for number in range(evaluations):  # for each launch of a step
        own = backend.steps[number::evaluations]
        facts = {tensor.name: tensor for tensor in manifest_graph(manifest, own[0].graph).inputs}
        for name in facts.keys() - {"x", "r"}:
            values = [3 if size == "B" else int(size) for size in facts[name].shape]
            row = aligned(int(np.prod(values)) * np.dtype(facts[name].dtype).itemsize)
            # The scalars of an evaluation lie together: 7 scalars for each of 2 launches.
            expected = row if facts[name].shape else 14 * ALIGNMENT
            assert {b.inputs[name] - a.inputs[name] for a, b in pairwise(own)} == {expected}, name


def manifest_graph(manifest: Any, name: str) -> GraphFacts:
    (graph,) = (graph for graph in manifest.graphs if graph.name == name)
    return graph


@pytest.mark.parametrize(
    "bundle", ["tiny_bundle", "tiny_cfg_sg_bundle", "tiny_autoguidance_bundle", "tiny_cosine_bundle", "tiny_edm_bundle"]
)
def test_sample_through_calls_that_are_bound_is_that_of_a_fresh_pipeline(
    bundle: str, watched: Callable[..., tuple[Pipeline, Any]]
) -> None:
    """Earlier classes, kept tokens, scales, intervals and modes leave nothing in the tables."""
    pipe, backend = watched(bundle)
    asked: list[dict[str, Any]] = [
        {"classes": [4, 4, 1], "seeds": [5, 6, 7]},
        {"classes": CLASSES, "seeds": [5, 6, 7], "scale": 4.0},
        {"classes": CLASSES, "seeds": SEEDS, "fused": False},
        {"classes": CLASSES, "seeds": SEEDS, "guidance": pipe.guidance(interval=(0.3, 0.7))},
        {"classes": CLASSES, "seeds": SEEDS, "sampler": "euler"},
        {"classes": [4, 4, 1], "seeds": [5, 6, 7]},
    ]
    for arguments in asked:
        fresh, _ = watched(bundle)
        settings = {"steps": 3, "sampler": "heun", **arguments}
        np.testing.assert_array_equal(pipe.sample(**settings), fresh.sample(**settings))
    bound = [event for event in backend.events if event.kind == "bind" and event.fixed]
    assert len(bound) == len({(b.graph, *b.inputs.items(), *b.outputs.items()) for b in bound}), "one was bound twice"


# Arbitrary updates


class FormulaLane:
    """A lane whose step graphs are one formula. Its prediction depends on every input."""

    def __init__(self) -> None:
        self.memory = HostMemory()
        self.sequence = CallSequence

    def enter(self) -> None:
        pass

    def bind(self, graph: GraphFacts, inputs: Any, outputs: Any, *, fixed: bool = False) -> Callable[[], None]:
        target = outputs["next"]
        assert not any(np.shares_memory(target, array) for array in inputs.values())
        ends = ["_strong", "_weak"] if graph.kind == "guided" else [""]

        def call() -> None:
            x, r = inputs["x"], inputs["r"]
            scaling = [inputs[name] for name in ("c_in", "c_skip", "c_out")]
            kept = [(inputs[f"rows{end}"], inputs[f"restore{end}"]) for end in ends]
            found = [formula(x, inputs["modulations"], *own, *scaling) for own in kept]
            guided = guide(*found, inputs["scale"]) if len(found) == 2 else found[0]
            target[...] = inputs["a"] * x + inputs["b"] * guided + inputs["e"] * r

        return call


def formula(x: Any, modulations: Any, rows: Any, restore: Any, c_in: Any, c_skip: Any, c_out: Any) -> Any:
    """Return a prediction of size 1 that differs by evaluation, image and kept tokens."""
    own = modulations.sum(axis=1) + sum(kept @ np.cos(np.arange(kept.shape[1])) for kept in (rows, restore))
    return c_skip * x + c_out * np.tanh(c_in * x + np.sin(own)[:, None, None, None])


NUMBERS = st.sampled_from([-0.75, 0.25, 0.5, 1.0])
STEPS = st.lists(
    st.lists(
        # (a, b, e), noise, scale, and the number of tokens that the weak branch keeps. The number
        # selects one graph of both branches, two graphs, or the strong branch alone.
        st.tuples(
            st.tuples(NUMBERS, NUMBERS, NUMBERS), st.sampled_from([0.0, 0.5]), NUMBERS, st.sampled_from([8, 12, 0])
        ),
        min_size=1,
        max_size=3,
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=100)
@given(steps=STEPS, cuts=st.integers(1, 4), fused=st.booleans(), seed=st.integers(0, 9))
def test_advance_of_any_updates_is_the_formula(
    steps: Any, cuts: int, fused: bool, seed: int, tiny_edm_bundle: Path
) -> None:
    """The updates are cut in any way, in one launch or two.

    No value is lost before its last reader, and no value is stale.
    """
    manifest = read_manifest(tiny_edm_bundle / "manifest.json")
    flat = [(step, number, *rest) for step, parts in enumerate(steps) for number, rest in enumerate(parts)]
    run = [
        Update(step, number, 1.0 + index, *rest[0], rest[1] if number == 0 else 0.0)
        for index, (step, number, *rest) in enumerate(flat)
    ]
    rng = np.random.default_rng(seed)
    modulations = rng.standard_normal((len(run), 2, manifest.model.held["modulations"][0])).astype(np.float32)
    scales, kept = tuple(entry[4] for entry in flat), [entry[5] for entry in flat]

    def branch(held: Sequence[int], counts: Sequence[int]) -> PreparedBranch:
        levels = tuple(Level(1 - keep / 16, keep) if keep else None for keep in counts)
        keep = tuple(
            np.sort(rng.permuted(np.tile(np.arange(16), (3, 1)), axis=1)[:, :n]) if n else None for n in counts
        )
        return PreparedBranch("main", {"modulations": Rows(modulations, np.array(held))}, levels, keep)

    strong, weak = branch([0, 1, 0], [12] * len(run)), branch([0, 1, 0], kept)
    noise = [rng.standard_normal((3, 2, 8, 8)).astype(np.float32) for _ in steps]
    start = rng.standard_normal((3, 2, 8, 8)).astype(np.float32)

    def advance(index: int, x: Any, r: Any) -> Any:
        scaling = precondition("edm", run[index].time)
        found = [
            formula(
                x,
                modulations[index][b.held["modulations"].rows],
                rows(b.keep[index], 16),
                restore(b.keep[index], 16, masked=False),
                scaling.c_in,
                scaling.c_skip,
                scaling.c_out,
            )
            for b in (strong, weak)
            if b.keep[index] is not None
        ]
        guided = guide(*found, scales[index]) if len(found) == 2 else found[0]
        return run[index].a * x + run[index].b * guided + run[index].e * r

    workspace = Workspace(FormulaLane(), manifest, 3, cuts)
    workspace.start(start)
    done: list[int] = []
    for first in range(0, len(run), cuts):
        part = slice(first, first + cuts)
        branches = cut(strong, part), cut(weak, part)
        plan = PreparedRun(manifest.guidance, tuple(u.time for u in run[part]), scales[part], branches)
        workspace.advance(plan, run[part], lambda: done.append(1), lambda step: noise[step], fused)
    assert len(done) == len(run)
    # Float32 compared with mostly float64, in ten updates of size 1.
    np.testing.assert_allclose(workspace.state, integrate(run, advance, start, lambda step: noise[step]), atol=1e-4)


def cut(branch: PreparedBranch, part: slice) -> PreparedBranch:
    """Return a branch reduced to some of its evaluations."""
    held = {name: Rows(rows.values[part], rows.rows) for name, rows in branch.held.items()}
    return replace(branch, held=held, levels=branch.levels[part], keep=branch.keep[part])


# Chunks


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    ("bundle", "churn"),
    [
        ("tiny_bundle", None),
        ("tiny_cosine_bundle", None),
        ("tiny_autoguidance_bundle", None),
        ("tiny_edm_bundle", Churn(2, 0.05, 50, 1.003)),
    ],
)
def test_sample_in_chunks_is_the_same_bits(
    bundle: str, churn: Churn | None, sampler: SamplerName, chunk: int, watched: Callable[..., tuple[Pipeline, Any]]
) -> None:
    """A chunk may end in the middle of a Heun step."""
    asked = {"classes": CLASSES, "seeds": SEEDS, "steps": 5, "sampler": sampler, "churn": churn}
    (whole, _), (pieces, _) = watched(bundle), watched(bundle, chunk)
    seen: list[tuple[int, int]] = []
    found = pieces.sample(**asked, progress=lambda done, total: seen.append((done, total)))
    np.testing.assert_array_equal(found, whole.sample(**asked))
    count = {"euler": 5, "heun": 9}[sampler]
    assert seen == [(done, count) for done in range(1, count + 1)]


def test_sample_in_chunks_holds_no_more_however_many_steps(watched: Callable[..., tuple[Pipeline, Any]]) -> None:
    peaks = []
    for steps in (4, 16):
        pipe, backend = watched("tiny_bundle", 2)
        pipe.sample(CLASSES, SEEDS, steps=steps, sampler="euler")
        peaks.append(backend.memory.peak)
    assert peaks[0] == peaks[1]


# Memory of a run


@pytest.mark.parametrize(
    ("chosen", "batch", "steps", "chunk"),
    [
        pytest.param({}, 5, 8, None, id="plain"),
        pytest.param({"mode": "cfg+sg", "strong_sparsity": 0.25}, 5, 8, None, id="with the row of no class"),
        pytest.param({}, 1, 1, None, id="fewer rows than condition runs on"),
        pytest.param({}, 5, 24, 8, id="several chunks"),
        pytest.param({"strong_sparsity": (0.0, 0.5), "sparsity": (0.5, 0.0)}, 5, 8, None, id="subsets of many sizes"),
    ],
)
def test_run_bytes_is_what_a_run_holds_at_most(
    chosen: dict[str, Any], batch: int, steps: int, chunk: int | None, watched: Callable[..., tuple[Pipeline, Any]]
) -> None:
    """The samples are not counted; there is one class for each image.

    The estimate is at most twice the use, so that it does not refuse runs that fit.
    """
    pipe, backend = watched("tiny_bundle", chunk, batch)
    guidance = pipe.guidance(**chosen)
    samples = pipe.sample(range(batch), range(batch), steps=steps, sampler="euler", guidance=guidance)
    needed = run_bytes(pipe.bundle.manifest, batch, chunk or steps, guidance.row.null_weak)
    held = backend.memory.peak - samples.nbytes
    assert held <= needed
    assert needed <= 2 * held
