"""Which backend runs a bundle, and why earlier candidates do not. Engines: `test_trt_check`.

Stand-ins replace the GPUs and providers that the runtime finds on this machine.
"""

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import sg_runtime.backends.ort_check
import sg_runtime.backends.trt_check
from sg_runtime.backends import BACKENDS, Choice, choose_backend, open_backend
from sg_runtime.backends.ort import CPU, PROVIDERS, Provider, open_session, strays_of
from sg_runtime.bundle import Bundle
from sg_runtime.devices.gpus import Gpu
from sg_runtime.errors import BundleError, DeviceError, EngineError, MissingExtraError, SgError, UsageError
from sg_runtime.pipeline import Pipeline

ADA, HOPPER = Gpu("NVIDIA GeForce RTX 4090", 89), Gpu("NVIDIA H100 80GB HBM3", 90)
CPU_ONLY = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
NO_ENGINES = (
    "tensorrt-rtx: the bundle has no engines of TensorRT-RTX",
    "tensorrt: the bundle has no engines of TensorRT",
)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that gives this machine the given GPUs and ONNX Runtime providers.

    Whether a provider works: `test_ort_check`.
    """

    def make(*gpus: Gpu, providers: tuple[str, ...] = (CPU_ONLY,)) -> None:
        for module in (sg_runtime.backends.ort_check, sg_runtime.backends.trt_check):
            monkeypatch.setattr(module, "find_gpus", lambda *_: gpus)
        monkeypatch.setattr("onnxruntime.get_available_providers", lambda: [*providers])
        monkeypatch.setattr(sg_runtime.backends.ort_check, "driver_cuda", lambda: (13, 0))
        monkeypatch.setattr(sg_runtime.backends.ort_check, "_load_fault", lambda *_: None)

    return make


@pytest.fixture
def graphs(tiny_bundle: Path) -> Bundle:
    """Return a bundle that holds only ONNX graphs."""
    return Bundle.open(tiny_bundle)


@pytest.fixture
def engines(engine_bundle: Path) -> Bundle:
    """Return a bundle that holds only TensorRT-RTX engines."""
    return Bundle.open(engine_bundle)


@pytest.fixture
def both(engines: Bundle) -> Bundle:
    """Return a bundle with engines whose manifest also lists ONNX files."""
    manifest = engines.manifest
    kept = tuple(replace(graph, file=f"graphs/{graph.name}.onnx") for graph in manifest.graphs)
    return Bundle(engines.path, replace(manifest, graphs=kept))


def refused(kind: type[SgError], bundle: Bundle, device: str = "auto", **chosen: Any) -> str:
    """Return the message of the refusal."""
    with pytest.raises(SgError) as caught:
        choose_backend(bundle, device, **chosen)
    assert isinstance(caught.value, kind), caught.value
    return str(caught.value)


# Graphs


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_choose_backend_of_graphs_without_a_gpu_is_the_cpu(
    graphs: Bundle, machine: Callable[..., None], device: str, caplog: pytest.LogCaptureFixture
) -> None:
    machine()
    with caplog.at_level(logging.INFO, "sg_runtime"):
        choice = choose_backend(graphs, device)
    lacking = (
        f"onnxruntime-cuda: ONNX Runtime here has no {CUDA}; for an NVIDIA GPU: pip uninstall -y onnxruntime "
        f"onnxruntime-gpu, then pip install -e '.[ort-gpu]' in a checkout of sg-export"
    )
    reasons = (*NO_ENGINES, lacking) if device == "auto" else ()
    assert choice == Choice("onnxruntime-cpu", 0, reasons)
    assert str(choice) == "; ".join(["onnxruntime-cpu", *(f"not {reason}" for reason in reasons)])
    assert [record.getMessage() for record in caplog.records] == [f"{graphs.path}: {choice}"]


@pytest.mark.parametrize(("device", "number"), [("auto", 0), ("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)])
def test_choose_backend_of_graphs_with_a_gpu_is_onnx_runtimes(
    graphs: Bundle, machine: Callable[..., None], device: str, number: int
) -> None:
    machine(ADA, HOPPER, providers=(CUDA, CPU_ONLY))
    assert choose_backend(graphs, device) == Choice("onnxruntime-cuda", number, NO_ENGINES)


def test_choose_backend_of_graphs_for_a_gpu_without_the_provider_names_the_extra(
    graphs: Bundle, machine: Callable[..., None]
) -> None:
    machine(ADA)
    assert "pip install -e '.[ort-gpu]' in a checkout of sg-export" in refused(EngineError, graphs, "cuda")


@pytest.mark.parametrize(("device", "gpus"), [("cuda", ()), ("cuda:1", (ADA,)), ("cuda:999", (ADA, HOPPER))])
def test_choose_backend_of_a_gpu_that_is_not_there_is_refused(
    graphs: Bundle, machine: Callable[..., None], device: str, gpus: tuple[Gpu, ...]
) -> None:
    machine(*gpus, providers=(CUDA, CPU_ONLY))
    number = int(device.partition(":")[2] or 0)
    expected = f"cuda:{number}: expected a GPU of this number, found {len(gpus)}"
    assert refused(BundleError, graphs, device) == expected


def test_choose_backend_of_a_driver_that_fails_falls_back_and_says_so(
    graphs: Bundle, machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(providers=(CUDA, CPU_ONLY))

    def fail(extra: str) -> None:
        raise DeviceError("the CUDA driver: cuInit gave CUDA_ERROR_SYSTEM_NOT_READY")

    monkeypatch.setattr(sg_runtime.backends.ort_check, "find_gpus", fail)
    choice = choose_backend(graphs)
    assert choice.name == "onnxruntime-cpu"
    assert choice.rejected[-1] == "onnxruntime-cuda: the CUDA driver: cuInit gave CUDA_ERROR_SYSTEM_NOT_READY"
    assert "cuInit" in refused(DeviceError, graphs, "cuda")


def test_choose_backend_of_graphs_in_bf16_is_a_gpu_or_none(graphs: Bundle, machine: Callable[..., None]) -> None:
    bundle = Bundle(graphs.path, replace(graphs.manifest, precision="bf16"))
    machine(ADA, providers=(CUDA, CPU_ONLY))
    assert choose_backend(bundle).name == "onnxruntime-cuda"
    machine()
    for chosen in ({}, {"device": "cpu"}, {"backend": "onnxruntime-cpu"}):
        assert "its graphs are in BF16, which ONNX Runtime's CPU provider does not run" in refused(
            BundleError, bundle, **chosen
        )


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_choose_backend_of_graphs_for_cuda_is_cuda_or_the_cpu_in_fp32(
    graphs: Bundle, machine: Callable[..., None], precision: Any
) -> None:
    bundle = Bundle(graphs.path, replace(graphs.manifest, precision=precision, onnx_target="onnxruntime-cuda"))
    machine(ADA, providers=(CUDA, CPU_ONLY))
    assert choose_backend(bundle).name == "onnxruntime-cuda"
    machine()
    if precision == "fp32":
        assert choose_backend(bundle).name == "onnxruntime-cpu"
    else:
        expected = f"form for ONNX Runtime's CUDA provider in {precision.upper()}, which onnxruntime-cpu does not run"
        text = refused(BundleError, bundle, "cpu")
        assert expected in text
        assert "--target" not in text  # the command builds graphs for any provider
        assert "ONNX Runtime here has no CUDAExecutionProvider" in refused(EngineError, bundle)


# Engines


def test_choose_backend_of_engines_takes_no_other(engines: Bundle, machine: Callable[..., None]) -> None:
    machine(ADA, HOPPER, providers=(CUDA, CPU_ONLY))
    assert choose_backend(engines) == Choice("tensorrt-rtx", 0, ())
    assert "found NVIDIA H100 80GB HBM3 of 90" in refused(BundleError, engines, "cuda:1")
    machine(providers=(CUDA, CPU_ONLY))
    for chosen in ({}, {"device": "cuda"}, {"backend": "tensorrt-rtx"}):
        assert "expected a GPU of compute capability 80, 86, 89, 120, 121, found none" in refused(
            BundleError, engines, **chosen
        )


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name.startswith("onnxruntime-")])
def test_choose_backend_of_engines_by_onnx_runtime_names_what_keeps_the_graphs(
    engines: Bundle, machine: Callable[..., None], backend: str
) -> None:
    machine(ADA, providers=tuple(provider.name for provider in PROVIDERS.values()))
    message = refused(BundleError, engines, backend=backend)
    assert f"{engines.path}: expected ONNX graphs, found engines alone" in message
    assert "build it with `keep_onnx`, or for the CPU: sg-export build " in message


def test_choose_backend_of_both_falls_from_engines_to_graphs(both: Bundle, machine: Callable[..., None]) -> None:
    """The engines are skipped on another GPU and without a GPU, each time with the reason."""
    machine(ADA, HOPPER, providers=(CUDA, CPU_ONLY))
    assert choose_backend(both) == Choice("tensorrt-rtx", 0, ())
    assert choose_backend(both, "cpu") == Choice("onnxruntime-cpu", 0, ())
    other = choose_backend(both, "cuda:1")
    assert (other.name, other.number, len(other.rejected)) == ("onnxruntime-cuda", 1, 2)
    assert other.rejected[0].startswith(f"tensorrt-rtx: {both.path}: ")
    assert "found NVIDIA H100 80GB HBM3 of 90; build it for this one: " in other.rejected[0]
    machine()
    none = choose_backend(both)
    assert (none.name, len(none.rejected)) == ("onnxruntime-cpu", 3)
    assert "found none; run it on such a machine" in none.rejected[0]
    assert "found none; run it on such a machine" in refused(BundleError, both, "cuda")


def test_choose_backend_of_both_for_another_batch_leaves_the_engines(
    both: Bundle, machine: Callable[..., None]
) -> None:
    machine(ADA, providers=(CUDA, CPU_ONLY))
    choice = choose_backend(both, batch=3)
    assert choice.name == "onnxruntime-cuda"
    assert "batch: expected 1 (the engines' profiles), found 3" in choice.rejected[0]
    assert "batch: expected 1" in refused(UsageError, both, batch=3, backend="tensorrt-rtx")


def test_choose_backend_of_engines_of_two_libraries_asks_each_for_its_own(
    engines: Bundle, machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """First the GPU is unknown to TensorRT-RTX; then TensorRT is not installed."""
    manifest = engines.manifest
    others = tuple(
        replace(engine, library="tensorrt", version="11.4", compute_capabilities=(90,)) for engine in manifest.engines
    )
    bundle = Bundle(engines.path, replace(manifest, engines=(*manifest.engines, *others)))
    versions: dict[str, str | None] = {"tensorrt_rtx": manifest.engines[0].version, "tensorrt": "11.4"}
    monkeypatch.setattr(sg_runtime.backends.trt_check, "installed_version", versions.get)
    machine(HOPPER)
    assert choose_backend(bundle).name == "tensorrt"
    versions["tensorrt"] = None
    machine(ADA)
    assert choose_backend(bundle).name == "tensorrt-rtx"
    assert "its engines need TensorRT, which" in refused(MissingExtraError, bundle, backend="tensorrt")


# Backends chosen by name


@pytest.mark.parametrize("backend", BACKENDS)
def test_choose_backend_by_name_takes_it_or_its_own_error(
    graphs: Bundle, machine: Callable[..., None], backend: str
) -> None:
    """No other backend is chosen."""
    machine(ADA, providers=tuple(provider.name for provider in PROVIDERS.values()))
    if backend.startswith("onnxruntime"):
        assert choose_backend(graphs, backend=backend) == Choice(backend, 0, ())
    machine()
    if backend == "onnxruntime-cpu":
        assert choose_backend(graphs, backend=backend) == Choice(backend, 0, ())
    elif backend.startswith("onnxruntime"):
        assert f"ONNX Runtime here has no {PROVIDERS[backend].name}; " in refused(EngineError, graphs, backend=backend)
    else:
        assert "the bundle has no engines of TensorRT" in refused(BundleError, graphs, backend=backend)


@pytest.mark.parametrize(("backend", "target"), [("tensorrt", "tensorrt"), ("tensorrt-rtx", "tensorrt-rtx")])
def test_choose_backend_of_engines_that_are_not_there_names_the_bundle_and_the_build(
    graphs: Bundle, machine: Callable[..., None], backend: str, target: str
) -> None:
    machine(ADA)
    message = refused(BundleError, graphs, backend=backend)
    assert str(graphs.path) in message
    assert f"--target {target}" in message


@pytest.mark.parametrize("backend", ["onnxruntime", "cuda", "", "TensorRT"])
def test_choose_backend_of_an_unknown_name_lists_those_there_are(graphs: Bundle, backend: str) -> None:
    assert refused(UsageError, graphs, backend=backend) == (
        f"backend {backend!r}: expected one of tensorrt-rtx, tensorrt, onnxruntime-cuda, onnxruntime-cpu"
    )


@pytest.mark.parametrize(
    ("device", "backend"),
    [("cuda", "onnxruntime-cpu"), ("cuda:1", "onnxruntime-cpu"), ("cpu", "onnxruntime-cuda"), ("cpu", "tensorrt")],
)
def test_choose_backend_of_a_device_that_it_does_not_run_on_is_refused(
    graphs: Bundle, device: str, backend: str
) -> None:
    expected = f"backend {backend}: does not run on device {device}: leave one of them out"
    assert refused(UsageError, graphs, device, backend=backend) == expected


@pytest.mark.parametrize("device", ["cuda:1000", "cuda: 1", "cuda:0x1", "cuda:1 ", "cuda:1\n"])
def test_choose_backend_of_an_odd_device_is_refused(graphs: Bundle, device: str) -> None:
    """Python would read some of these as numbers. More cases are in `test_backends`."""
    assert refused(UsageError, graphs, device) == f"device {device!r}: expected auto, cpu, cuda, or cuda:NUMBER"


def test_open_backend_by_name_is_that_backend(graphs: Bundle) -> None:
    backend = open_backend(graphs, backend="onnxruntime-cpu")
    assert (backend.name, backend.lanes, backend.batches) == ("onnxruntime-cpu", None, None)


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_open_backend_of_a_stream_on_the_cpu_is_refused_with_the_choice(
    graphs: Bundle, machine: Callable[..., None], device: str
) -> None:
    machine()
    for stream in (0, 140, object()):
        with pytest.raises(UsageError) as caught:
            open_backend(graphs, device, stream=stream)
        expected = f"stream: expected none on the CPU, which was chosen: {choose_backend(graphs, device)}"
        assert str(caught.value) == expected
    with pytest.raises(UsageError, match="stream: expected none on the CPU"):
        Pipeline.load(graphs.path, device, stream=140)


@pytest.mark.parametrize("name", ["onnxruntime-cuda", "tensorrt-rtx"])
def test_open_backend_of_threads_on_a_gpu_is_refused(
    graphs: Bundle, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sg_runtime.backends.choice.choose_backend", lambda *_, **__: Choice(name, 0, ()))
    with pytest.raises(UsageError, match=f"^`threads`: expected none on a GPU, which was chosen: {name}$"):
        open_backend(graphs, threads=1)


def test_load_of_a_backend_by_name_runs_it(tiny_bundle: Path) -> None:
    assert Pipeline.load(tiny_bundle, backend="onnxruntime-cpu").backend.name == "onnxruntime-cpu"
    with pytest.raises(UsageError, match="backend 'numpy': expected one of tensorrt-rtx, "):
        Pipeline.load(tiny_bundle, backend="numpy")


# Sessions


def test_strays_of_a_session_are_the_nodes_that_run_elsewhere(tiny_bundle: Path) -> None:
    """For another provider's name all nodes are strays; for the session's own provider none is."""
    session = open_session(tiny_bundle / "graphs/dense.onnx", provider=Provider(CPU_ONLY))
    assert strays_of(session, CPU_ONLY) == []
    strays = strays_of(session, CUDA)
    assert len(strays) > 50
    assert [stray for stray in strays if not stray.endswith(f") in {CPU_ONLY}")] == []
    assert "x_embedder/MatMul (MatMul) in CPUExecutionProvider" in strays


def test_open_session_of_nodes_that_run_elsewhere_warns_of_each(
    tiny_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The Azure provider is available and runs none of these nodes."""
    azure = Provider("AzureExecutionProvider")
    session = open_session(tiny_bundle / "graphs/dense.onnx", provider=azure)
    (warning,) = caplog.records
    strays = strays_of(session, azure.name)
    assert warning.levelname == "WARNING"
    assert warning.getMessage() == (
        f"dense.onnx: {len(strays)} nodes are not run by AzureExecutionProvider: {', '.join(strays)}; build "
        f"with a `batch`, so that shapes are known"
    )


@pytest.mark.parametrize("provider", [CPU, Provider(CPU_ONLY)], ids=["plain", "recorded"])
def test_open_session_on_the_cpu_warns_of_nothing(
    tiny_bundle: Path, provider: Provider, caplog: pytest.LogCaptureFixture
) -> None:
    assert open_session(tiny_bundle / "graphs/dense.onnx", provider=provider).get_providers() == [CPU_ONLY]
    assert not caplog.records


@pytest.mark.parametrize("name", [name for name in PROVIDERS if name != "onnxruntime-cpu"])
@pytest.mark.filterwarnings("ignore:Specified provider:UserWarning")  # ONNX Runtime's own warning, which users see
def test_open_session_of_a_provider_that_is_not_here_is_refused(tiny_bundle: Path, name: str) -> None:
    """ONNX Runtime itself only warns and continues without the provider."""
    with pytest.raises(EngineError, match=rf"^dense\.onnx: .*{PROVIDERS[name].name}") as caught:
        open_session(tiny_bundle / "graphs/dense.onnx", provider=PROVIDERS[name])
    assert caught.value.exit_code == 4


def test_open_session_of_a_damaged_graph_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copy(tiny_bundle / "graphs/dense.onnx", tmp_path / "cut.onnx"))
    copy.write_bytes(copy.read_bytes()[:1000])
    with pytest.raises(EngineError, match=r"^cut\.onnx: ONNX Runtime \S+ cannot open it: "):
        open_session(copy)
