"""`sg-export triton`: the repository that it writes, and the real server over HTTP and gRPC."""

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.tritonserver import TritonServer, missing, running
from sg_export.triton import Settings, model_config, write_repository
from sg_runtime.bundle import Bundle
from sg_runtime.errors import DeadlineError, DeviceError, NonFiniteError, UsageError
from sg_runtime.pipeline import Pipeline
from sg_runtime.service import Request
from sg_runtime.triton import code_of, device_of, request_of

WAIT = 120.0
"""Seconds after which a request fails."""

needs_server = pytest.mark.skipif(missing() is not None, reason=missing() or "")


def parsed(text: str) -> Any:
    """Return a configuration as Triton's own message."""
    pytest.importorskip("tritonclient")
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    return text_format.Parse(text, model_config_pb2.ModelConfig())


def type_name(tensor: Any) -> str:
    """Return the name of the type of an input or output in a configuration."""
    from tritonclient.grpc import model_config_pb2

    return str(model_config_pb2.DataType.Name(tensor.data_type))


def test_model_config_of_a_model_of_classes_is_what_triton_reads(pixels: Path) -> None:
    settings = Settings(window=0.25, queue=9, timeout=1.5, instances=3, threads=1)
    config = parsed(model_config("pixels", Bundle.open(pixels), settings))
    assert (config.name, config.backend, config.max_batch_size) == ("pixels", "python", 2)
    inputs = [(one.name, type_name(one), list(one.dims), one.optional) for one in config.input]
    assert inputs == [
        ("class", "TYPE_INT64", [1], True),
        ("class_name", "TYPE_STRING", [1], True),
        ("seed", "TYPE_UINT64", [1], False),
    ]
    (image,) = config.output
    assert (image.name, type_name(image), list(image.dims)) == ("image", "TYPE_UINT8", [8, 8, 1])
    (group,) = config.instance_group
    assert (group.count, group.kind, list(group.gpus)) == (3, group.KIND_CPU, [])
    batching = config.dynamic_batching
    policy = batching.default_queue_policy
    assert (list(batching.preferred_batch_size), batching.max_queue_delay_microseconds) == ([2], 250_000)
    assert (policy.max_queue_size, policy.default_timeout_microseconds) == (9, 1_500_000)
    (warmup,) = config.model_warmup
    assert (warmup.batch_size, warmup.count, sorted(warmup.inputs)) == (1, 1, ["class", "seed"])
    assert config.parameters["precision"].string_value == "fp32"


def test_model_config_of_a_text_model_is_what_triton_reads(full_bundle: Path) -> None:
    config = parsed(model_config("text", Bundle.open(full_bundle), Settings()))
    inputs = [(one.name, type_name(one), list(one.dims), one.optional) for one in config.input]
    assert inputs == [
        ("prompt", "TYPE_STRING", [1], False),
        ("negative", "TYPE_STRING", [1], True),
        ("seed", "TYPE_UINT64", [1], False),
    ]
    (image,) = config.output
    assert list(image.dims) == [*Bundle.open(full_bundle).manifest.model.size, 3]
    (warmup,) = config.model_warmup
    assert sorted(warmup.inputs) == ["prompt", "seed"]
    assert warmup.inputs["prompt"].input_data_file == "prompt"


@pytest.mark.parametrize(
    ("device", "kind", "gpus"), [("auto", "KIND_CPU", []), ("cuda", "KIND_GPU", []), ("cuda:1", "KIND_GPU", [1])]
)
def test_model_config_of_a_device_has_its_instances(pixels: Path, device: str, kind: str, gpus: list[int]) -> None:
    config = parsed(model_config("pixels", Bundle.open(pixels), Settings(device=device)))
    (group,) = config.instance_group
    assert (group.Kind.Name(group.kind), list(group.gpus)) == (kind, gpus)
    assert config.model_warmup[0].count == (1 if kind == "KIND_CPU" else 2)


@pytest.mark.parametrize(("kind", "device"), [("CPU", "cpu"), ("GPU", "cuda:2"), ("KIND_GPU", "cuda:2")])
def test_device_of_an_instance_is_what_triton_says(kind: str, device: str) -> None:
    assert device_of(kind, "2") == device


def test_write_repository_twice_holds_both_models_and_force_replaces_one(pixels: Path, tmp_path: Path) -> None:
    repository = tmp_path / "new/models"
    first = write_repository(pixels, repository)
    second = write_repository(pixels, repository, Settings(batch=2), name="linked", link=True)
    assert (first, second) == (repository / "pixels", repository / "linked")
    assert sorted(path.name for path in repository.iterdir()) == ["linked", "pixels"]
    assert not first.joinpath("1/bundle").is_symlink()
    assert second.joinpath("1/bundle").resolve() == pixels.resolve()
    for model in (first, second):
        assert Bundle.open(model / "1/bundle").manifest == Bundle.open(pixels).manifest
        compile((model / "1/model.py").read_text(), "model.py", "exec")
    (first / "1/__pycache__").mkdir()
    (first / "1/__pycache__/model.cpython-311.pyc").touch()
    write_repository(pixels, repository, Settings(queue=3), force=True)
    assert "max_queue_size: 3" in (first / "config.pbtxt").read_text()
    assert not (first / "1/__pycache__").exists()


def taken(repository: Path) -> None:
    """Make a repository with a model of another program."""
    (repository / "pixels").mkdir(parents=True)
    (repository / "pixels/config.pbtxt").write_text('name: "pixels"\n')


def with_notes(repository: Path, pixels: Path) -> None:
    """Make a repository whose models hold files of the user."""
    for name, place in (("pixels", "notes.txt"), ("inside", "1/bundle/notes.txt"), ("warm", "warmup/notes.txt")):
        path = write_repository(pixels, repository, name=name) / place
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")


@pytest.mark.parametrize(
    ("bundle", "options", "code", "message"),
    [
        ("nowhere", (), 6, "nowhere: expected a bundle (a directory), found nothing there"),
        ("TINY", (), 2, "expected a bundle that gives pictures of 1 or 3 channels, found samples of 2 channels"),
        ("PIXELS", ("-o", "file"), 2, "file: expected a folder, found a file: give another --output"),
        ("PIXELS", ("-o", "other"), 2, "expected a model repository, which holds only folders of models, found notes"),
        ("PIXELS", ("-o", "taken"), 2, "exists: give another --output or --name, or --force to replace it"),
        ("PIXELS", ("-o", "taken", "--force"), 2, "is not a model of sg-export triton, so --force does not replace"),
        ("PIXELS", ("-o", "noted", "--force"), 2, "found notes.txt: --force would delete them: move them"),
        ("PIXELS", ("-o", "noted", "--name", "inside", "--force"), 2, "found 1/bundle/notes.txt: --force would delete"),
        ("PIXELS", ("-o", "noted", "--name", "warm", "--force"), 2, "found warmup/notes.txt: --force would delete"),
        ("PIXELS", ("--name", "two words"), 2, "name: expected letters, digits"),
        ("PIXELS", ("--batch", "3"), 2, "was built for (2), found 3"),
        ("PIXELS", ("--device", "gpu"), 2, "device: expected auto, cpu, cuda, or a GPU such as cuda:1, found gpu"),
        (
            "PIXELS",
            ("--device", "cuda", "--backend", "onnxruntime-cpu"),
            2,
            "expected one of a GPU for the device cuda",
        ),
        ("PIXELS", ("--device", "cpu", "--backend", "tensorrt"), 2, "expected onnxruntime-cpu for the device cpu"),
        ("PIXELS", ("--timeout", "0"), 2, "--timeout"),
        ("PIXELS", ("--instances", "0"), 2, "--instances"),
    ],
)
def test_wrong_call_is_told_and_leaves_nothing(
    cli: Callable[..., Any],
    pixels: Path,
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bundle: str,
    options: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    Path("other/notes").mkdir(parents=True)
    taken(Path("taken"))
    with_notes(Path("noted"), pixels)
    before = sorted(map(str, Path().rglob("*")))
    given = options if "-o" in options else (*options, "-o", "new")
    result = cli("triton", {"PIXELS": pixels, "TINY": tiny_bundle}.get(bundle, bundle), *given)
    assert (result.exit_code, message in " ".join(result.output.split())) == (code, True), result.output
    assert sorted(map(str, Path().rglob("*"))) == before


def column(*values: object, dtype: Any = np.int64) -> Any:
    """Return a tensor (N, 1)."""
    return np.array(values, dtype)[:, None]


def test_request_of_tensors_and_parameters_is_what_they_say(pipe: Pipeline) -> None:
    manifest = pipe.bundle.manifest
    inputs = {"class_name": column(b"B", b"0", dtype=object), "seed": column(1, 2**64 - 1, dtype=np.uint64)}
    given = {
        "steps": "7",
        "guidance": "sg",
        "scale": "1:2.5",
        "sparsity": 0.5,
        "size": "8x8",
        "binary_data_output": True,
    }
    assert request_of(manifest, inputs, given, 10) == Request(
        ("B", "0"), (1, 2**64 - 1), steps=7, guidance="sg", scale=(1.0, 2.5), sparsity=0.5, size=(8, 8)
    )
    assert request_of(manifest, {"class": column(3), "seed": column(1)}, {}, 10) == Request((3,), (1,))


@pytest.mark.parametrize(
    ("inputs", "given", "message"),
    [
        ({}, {}, "expected one of class, class_name, found none"),
        ({"class": column(1), "class_name": column(b"A", dtype=object)}, {}, "found class and class_name"),
        ({"class": np.zeros((1, 2), np.int64)}, {}, "class: expected the shape (N, 1), found (1, 2)"),
        ({"class_name": column(b"\xff", dtype=object)}, {}, "class_name: expected text in UTF-8, found other bytes"),
        ({"class": column(1)}, {"stepz": 3}, "parameter stepz: expected one of steps, sampler"),
        ({"class": column(1)}, {"steps": 11}, "steps: expected at most 10, found 11"),
        ({"class": column(1)}, {"steps": 2.5}, "steps: expected a whole number, found 2.5"),
        ({"class": column(1)}, {"steps": True}, "steps: expected a whole number, found True"),
        ({"class": column(1)}, {"scale": "1:2:3"}, "scale: expected a number, or two as FIRST:LAST, found '1:2:3'"),
        ({"class": column(1)}, {"scale": True}, "scale: expected a number"),
        ({"class": column(1)}, {"guidance": 1}, "guidance: expected a text, found 1"),
        ({"class": column(1)}, {"size": "8"}, "size: expected HEIGHTxWIDTH in pixels, found '8'"),
    ],
)
def test_request_of_wrong_tensors_or_parameters_is_refused(
    pipe: Pipeline, inputs: dict[str, Any], given: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        request_of(pipe.bundle.manifest, {**inputs, "seed": column(0)}, given, 10)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("x"), "INVALID_ARG"),
        (DeviceError("x"), "UNAVAILABLE"),
        (DeadlineError("x"), "UNAVAILABLE"),
        (NonFiniteError("x"), "INTERNAL"),
        (ValueError("x"), "INTERNAL"),
    ],
)
def test_code_of_an_error_is_triton_s(error: Exception, code: str) -> None:
    assert code_of(error) == code


@pytest.fixture(scope="module")
def server(pixels: Path, full_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """Return a server of three models: one of classes, one with text, and one without its bundle.

    The first is loaded. The window is long enough for requests of a busy machine to meet.
    """
    repository = tmp_path_factory.mktemp("triton") / "models"
    settings = Settings(window=2.0, threads=1, max_steps=20)
    write_repository(pixels, repository, settings)
    write_repository(full_bundle, repository, Settings(window=0.0, threads=1), name="text", link=True)
    shutil.rmtree(write_repository(pixels, repository, settings, name="broken") / "1/bundle")
    options = ("--model-control-mode=explicit", "--load-model=pixels")
    with running(repository, tmp_path_factory.mktemp("server"), *options) as found:
        yield found


@pytest.fixture
def http(server: TritonServer) -> Iterator[Any]:
    from tritonclient import http

    with http.InferenceServerClient(server.http, concurrency=4, network_timeout=WAIT) as client:
        yield client


@pytest.fixture
def grpc(server: TritonServer) -> Iterator[Any]:
    from tritonclient import grpc

    with grpc.InferenceServerClient(server.grpc) as client:
        yield client


def inputs_of(module: Any, **columns: Any) -> list[Any]:
    """Return the inputs of a request of a client library."""
    types = {"class": "INT64", "seed": "UINT64"}
    made = []
    for name, values in columns.items():
        made.append(module.InferInput(name, list(values.shape), types.get(name, "BYTES")))
        made[-1].set_data_from_numpy(values)
    return made


def classes(module: Any, *numbers: int, first: int = 0) -> list[Any]:
    """Return the inputs of a request of classes, with seeds from `first`."""
    seeds = range(first, first + len(numbers))
    return inputs_of(module, **{"class": column(*numbers), "seed": column(*seeds, dtype=np.uint64)})


def batches(client: Any) -> dict[int, int]:
    """Return the number of executions by batch size."""
    found = client.get_inference_statistics("pixels")["model_stats"][0]["batch_stats"]
    return {int(one["batch_size"]): int(one["compute_infer"]["count"]) for one in found}


@pytest.mark.slow
@needs_server
def test_images_by_http_are_those_of_the_pipeline(http: Any, pipe: Pipeline) -> None:
    from tritonclient import http as module

    assert http.is_model_ready("pixels")
    assert http.get_model_config("pixels")["max_batch_size"] == 2
    given = {"steps": 3, "scale": 2.5}
    found = http.infer("pixels", classes(module, 1, 4, first=5), parameters=given).as_numpy("image")
    assert found.dtype == np.uint8
    assert np.array_equal(found, pipe([1, 4], [5, 6], steps=3, scale=2.5))


@pytest.mark.slow
@needs_server
def test_images_by_grpc_are_those_of_the_pipeline(grpc: Any, pipe: Pipeline) -> None:
    from tritonclient import grpc as module

    names = column(b"B", dtype=object)
    made = inputs_of(module, class_name=names, seed=column(2**64 - 1, dtype=np.uint64))
    given = {"steps": 2, "guidance": "sg", "scale": "3:1"}
    found = grpc.infer("pixels", made, parameters=given, client_timeout=WAIT).as_numpy("image")
    assert np.array_equal(found, pipe(["B"], [2**64 - 1], steps=2, scale=(3.0, 1.0)))


@pytest.mark.slow
@needs_server
def test_images_of_prompts_are_those_of_the_pipeline(http: Any, full_bundle: Path) -> None:
    """The model is loaded, which asks it for an image of the warm-up prompt."""
    from tritonclient import http as module

    http.load_model("text")
    texts = {"prompt": column(b"a tram on a beach", dtype=object), "negative": column(b"dull", dtype=object)}
    pipe = Pipeline.load(full_bundle, "cpu", threads=1)
    for given in ({"prompt": texts["prompt"]}, texts):
        made = inputs_of(module, **given, seed=column(4, dtype=np.uint64))
        found = http.infer("text", made, parameters={"steps": 2, "scale": 2.0}).as_numpy("image")
        negative = "dull" if "negative" in given else None
        expected = pipe(prompts="a tram on a beach", negative=negative, seeds=[4], steps=2, scale=2.0)
        assert np.array_equal(found, expected)
    http.unload_model("text")


@pytest.mark.slow
@needs_server
def test_requests_at_once_share_a_batch_and_a_wrong_one_fails_alone(http: Any, pipe: Pipeline) -> None:
    """The three pairs have equal parameters, different ones, and an unknown class."""
    from tritonclient import http as module
    from tritonclient.utils import InferenceServerException

    before = batches(http)
    pairs = [((1, 2), (2, 2)), ((3, 2), (3, 3)), ((1, 2), (99, 2))]
    for number, pair in enumerate(pairs):
        asked = [
            http.async_infer("pixels", classes(module, own, first=number), parameters={"steps": steps})
            for own, steps in pair
        ]
        for (own, steps), answer in zip(pair, asked, strict=True):
            if own == 99:
                with pytest.raises(InferenceServerException, match="class 99: expected 0 to 4"):
                    answer.get_result(timeout=WAIT)
            else:
                image = answer.get_result(timeout=WAIT).as_numpy("image")
                assert np.array_equal(image, pipe([own], [number], steps=steps))
    end = time.monotonic() + WAIT  # Triton counts a batch after its responses
    while batches(http)[2] - before.get(2, 0) < 3:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert batches(http)[2] - before.get(2, 0) == 3


@pytest.mark.slow
@needs_server
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 21}, "steps: expected at most 20, found 21"),
        ({"guidance": "autoguidance"}, "autoguidance"),
        ({"color": "red"}, "parameter color: expected one of steps, sampler"),
    ],
)
def test_wrong_parameters_are_told_by_the_server(grpc: Any, given: dict[str, Any], message: str) -> None:
    from tritonclient import grpc as module
    from tritonclient.utils import InferenceServerException

    with pytest.raises(InferenceServerException, match=message) as caught:
        grpc.infer("pixels", classes(module, 1, 2), parameters=given, client_timeout=WAIT)
    assert "INVALID_ARGUMENT" in str(caught.value.status())


@pytest.mark.slow
@needs_server
def test_name_that_no_class_has_and_request_beyond_the_batch_are_told(http: Any) -> None:
    from tritonclient import http as module
    from tritonclient.utils import InferenceServerException

    wrong = inputs_of(module, class_name=column(b"Q", b"A", dtype=object), seed=column(0, 1, dtype=np.uint64))
    with pytest.raises(InferenceServerException, match="class 'Q': expected one of the model's class names"):
        http.infer("pixels", wrong)
    with pytest.raises(InferenceServerException, match="batch-size must be <= 2"):
        http.infer("pixels", classes(module, 1, 2, 3))


@pytest.mark.slow
@needs_server
def test_model_without_its_bundle_is_not_loaded_and_says_why(http: Any) -> None:
    from tritonclient.utils import InferenceServerException

    with pytest.raises(InferenceServerException, match="expected the bundle of this model, found none"):
        http.load_model("broken")
    assert http.is_model_ready("pixels")
