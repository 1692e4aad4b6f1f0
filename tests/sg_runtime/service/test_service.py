"""A service over a real pipeline: shared runs, same images under load, errors of each kind."""

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from sg_export.checkpoint import Overrides
from sg_runtime.errors import (
    BundleError,
    DeadlineError,
    NonFiniteError,
    QueueFullError,
    RefusedError,
    UsageError,
)
from sg_runtime.manifest import Route
from sg_runtime.pipeline import Pipeline
from sg_runtime.service import Request, Service, ServiceSettings, checked

BATCH = 4
WAIT = 60.0
"""Seconds after which a test that waits for an answer fails."""


@pytest.fixture(scope="module")
def pipe(pixel_bundle: Path) -> Pipeline:
    return Pipeline.load(pixel_bundle, "cpu", batch=BATCH, threads=1)


@pytest.fixture
def serve(pipe: Pipeline) -> Iterator[Callable[..., Service]]:
    """Return a function that starts a service with these settings. It is closed after the test."""
    opened: list[Service] = []

    def start(on: Pipeline = pipe, **settings: Any) -> Service:
        opened.append(Service(on, ServiceSettings(**settings)))
        return opened[-1]

    yield start
    for service in opened:
        service.close()


@pytest.fixture
def gate(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> threading.Semaphore:
    """Return a semaphore that each run of the pipeline takes first. It starts at 0."""
    turns, sample = threading.Semaphore(0), pipe.sample

    def gated(*arguments: Any, **settings: Any) -> Any:
        assert turns.acquire(timeout=WAIT)
        return sample(*arguments, **settings)

    monkeypatch.setattr(pipe, "sample", gated)
    return turns


def until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def ask(*classes: int | str, seed: int = 0, **settings: Any) -> Request:
    return Request(classes, tuple(range(seed, seed + len(classes))), steps=settings.pop("steps", 1), **settings)


def alone(pipe: Pipeline, request: Request) -> np.ndarray[Any, Any]:
    """Return the images of a request, each from a run that is filled with copies of it."""
    group = checked(pipe.bundle.manifest, request)
    images = [
        pipe([name] * BATCH, [seed] * BATCH, steps=group.steps, sampler=group.sampler, guidance=group.guidance)[0]
        for name, seed in zip(request.conditions, request.seeds, strict=True)
    ]
    return np.stack(images)


def test_answer_of_a_request_is_what_the_pipeline_gives(serve: Callable[..., Service], pipe: Pipeline) -> None:
    request = ask("A", 3, seed=7, steps=2, scale=3.0, sampler="heun")
    answer = serve().submit(request).result(WAIT)
    assert answer.images.dtype == np.uint8
    assert np.array_equal(answer.images, pipe(["A", 3], [7, 8], steps=2, scale=3.0, sampler="heun"))
    assert answer.led == (2,)
    assert answer.parts.wait > 0
    assert answer.parts.sample > 0


def test_requests_within_the_window_share_a_run(serve: Callable[..., Service]) -> None:
    service = serve(window=30.0)
    futures = [service.submit(ask("A", seed=k)) for k in range(BATCH)]
    led = [future.result(WAIT).led for future in futures]
    assert led == [(BATCH,), (), (), ()]
    assert service.statistics().runs == {BATCH: 1}


def test_requests_together_share_a_run_without_a_window_and_a_wrong_one_is_refused(
    serve: Callable[..., Service],
) -> None:
    service = serve(window=0)
    with service.together():
        futures = [service.submit(Request((k,), (k,), steps=2)) for k in range(BATCH - 1)]
        with pytest.raises(UsageError, match="class 99"):
            service.submit(Request((99,), (0,)))
        time.sleep(0.1)  # the thread of the service would run the first one alone
    for future in futures:
        future.result(WAIT)
    assert service.statistics().runs == {BATCH - 1: 1}


def test_request_of_more_images_than_a_batch_is_split_and_keeps_its_order(
    serve: Callable[..., Service], pipe: Pipeline
) -> None:
    service, request = serve(window=0.0), ask(*(k % 5 for k in range(2 * BATCH + 1)), seed=100)
    answer = service.submit(request).result(WAIT)
    assert np.array_equal(answer.images, alone(pipe, request))
    assert service.statistics().runs == {1: 1, BATCH: 2}
    assert answer.led == (BATCH, BATCH, 1)


def test_images_under_load_are_the_same_whatever_they_were_batched_with(
    serve: Callable[..., Service], pipe: Pipeline
) -> None:
    """Eight threads ask for random images of four groups; every answer is compared."""
    draw, requests = Random(0), []
    kinds: list[dict[str, Any]] = [{}, {"steps": 2}, {"guidance": "none"}, {"scale": 1.5}]
    for _ in range(96):
        classes = [draw.randrange(5) for _ in range(draw.choice([1, 1, 1, 2, 3, 6]))]
        requests.append(ask(*classes, seed=draw.randrange(1000), **draw.choice(kinds)))
    service = serve(window=0.002, queue=1000)
    found: dict[int, Any] = {}

    def client(number: int) -> None:
        pauses = Random(number)
        for index in range(number, len(requests), 8):
            time.sleep(pauses.random() * 0.004)
            found[index] = service.submit(requests[index]).result(WAIT).images

    threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    until(lambda: service.statistics().answered == len(requests))  # counted after the answer
    statistics = service.statistics()
    assert len(found) == len(requests) == statistics.requests
    assert statistics.images == sum(len(request.seeds) for request in requests)
    assert sum(size * count for size, count in statistics.runs.items()) == statistics.images
    assert len(statistics.runs) > 1, "runs of several sizes"
    for index, request in enumerate(requests):
        assert np.array_equal(found[index], alone(pipe, request)), request


def test_submit_beyond_the_queue_is_refused_and_the_others_are_served(
    serve: Callable[..., Service], gate: threading.Semaphore
) -> None:
    service = serve(window=0.0, queue=2)
    running = service.submit(ask("A"))
    until(lambda: service.statistics().queued == 0)
    waiting = service.submit(ask("A", "B"))
    with pytest.raises(QueueFullError, match="expected at most 2 waiting images, found 2 and a request of 1"):
        service.submit(ask("A"))
    gate.release(2)
    assert [len(future.result(WAIT).images) for future in (running, waiting)] == [1, 2]
    statistics = service.statistics()
    assert (statistics.requests, statistics.refused, statistics.longest) == (2, 1, 2)


def test_request_whose_deadline_passes_is_given_up_and_the_next_is_served(
    serve: Callable[..., Service], gate: threading.Semaphore
) -> None:
    service = serve(window=0.0)
    running = service.submit(ask("A"))
    until(lambda: service.statistics().queued == 0)
    late, patient = service.submit(ask("A"), timeout=0.01), service.submit(ask("B"), timeout=WAIT)
    time.sleep(0.02)
    gate.release(2)
    with pytest.raises(DeadlineError, match=r"expected its last run to begin within 0\.01 s, found 1 of 1 images wai"):
        late.result(WAIT)
    assert len(running.result(WAIT).images) == len(patient.result(WAIT).images) == 1
    assert service.statistics().expired == 1


def test_deadline_passes_while_the_window_is_open(serve: Callable[..., Service]) -> None:
    with pytest.raises(DeadlineError):
        serve(window=30.0).submit(ask("A"), timeout=0.01).result(WAIT)


def test_cancelled_request_leaves_the_queue_and_no_run_has_it(
    serve: Callable[..., Service], gate: threading.Semaphore
) -> None:
    service = serve(window=0.0, queue=3)
    running = service.submit(ask("A"))
    until(lambda: service.statistics().queued == 0)
    given_up = service.submit(ask("A", "B", "C"))
    assert given_up.cancel()
    assert service.statistics().queued == 0
    kept = service.submit(ask("B", "C", 0))  # there is room again
    gate.release(2)
    assert len(running.result(WAIT).images) == 1
    assert len(kept.result(WAIT).images) == 3
    assert service.statistics().runs == {1: 1, 3: 1}
    assert service.statistics().cancelled == 1


def test_request_cancelled_during_its_run_discards_its_images(
    serve: Callable[..., Service], gate: threading.Semaphore
) -> None:
    service = serve(window=0.0)
    with service.together():
        given_up, kept = service.submit(ask("A")), service.submit(ask("B"))
    until(lambda: service.statistics().queued == 0)
    assert given_up.cancel()
    gate.release()
    assert len(kept.result(WAIT).images) == 1
    with pytest.raises(CancelledError):
        given_up.result(WAIT)
    assert service.statistics().runs == {2: 1}


def test_image_that_is_not_finite_fails_its_request_alone(
    serve: Callable[..., Service], pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pipeline reports NaN in every run with seed 13, as it does for a model that overflows."""
    sample = pipe.sample

    def sometimes(conditions: Any, seeds: Any, **settings: Any) -> Any:
        if 13 in seeds:
            raise NonFiniteError("expected finite samples")
        return sample(conditions, seeds, **settings)

    monkeypatch.setattr(pipe, "sample", sometimes)
    service = serve(window=0.0)
    with service.together():
        good, bad, other = (service.submit(ask("A", seed=seed)) for seed in (1, 13, 2))
    with pytest.raises(NonFiniteError):
        bad.result(WAIT)
    assert np.array_equal(good.result(WAIT).images, pipe(["A"] * BATCH, [1] * BATCH, steps=1)[:1])
    assert len(other.result(WAIT).images) == 1
    assert service.statistics().failed == 1


def test_error_that_nobody_expects_fails_its_run_and_the_service_goes_on(
    serve: Callable[..., Service], pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    service = serve()
    with monkeypatch.context() as patch:
        patch.setattr(pipe, "decode", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            service.submit(ask("A")).result(WAIT)
    assert "unexpected ZeroDivisionError" in caplog.text
    assert len(service.submit(ask("A")).result(WAIT).images) == 1


@pytest.mark.parametrize(
    ("request_", "field", "message"),
    [
        (ask("Q"), "conditions", "class 'Q': expected one of the model's class names"),
        (ask(5), "conditions", "class 5: expected 0 to 4"),
        (ask("A", negative="dull"), "negative", "expected none: the model is conditioned on classes"),
        (Request(("A",), (1, 2)), "seeds", "seeds: expected 1, one per image, found 2"),
        (Request(("A",), (2**64,)), "seeds", r"seed 18446744073709551616: expected 0 to 2\*\*64 - 1"),
        (ask("A", steps=0), "steps", "steps: expected at least 1, found 0"),
        (ask("A", sampler="dpm"), "sampler", "sampler: expected"),
        (ask("A", size=(9, 9)), "size", "9"),
        (ask("A", sparsity=0.9), "guidance", "sparsity 0.9 is not in this bundle"),
        (ask("A", guidance="autoguidance"), "guidance", "this bundle has no weak checkpoint"),
        (ask("A", scale=float("nan")), "guidance", "scale"),
    ],
)
def test_submit_of_a_wrong_request_names_its_field(
    serve: Callable[..., Service], request_: Request, field: str, message: str
) -> None:
    service = serve()
    with pytest.raises(UsageError, match=message) as caught:
        service.submit(request_)
    assert getattr(caught.value, "field", None) == field
    assert service.statistics().refused == 1


def test_check_of_a_bundle_that_was_replaced_says_so_and_requests_fail(
    serve: Callable[..., Service], pixel_bundle: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    """An own copy of the same content counts as the same bundle."""
    copy = Path(shutil.copytree(pixel_bundle, tmp_path / "bundle"))
    service = serve(Pipeline.load(copy, "cpu", batch=BATCH, threads=1))
    first = service.submit(ask("A")).result(WAIT).images
    shutil.rmtree(copy)
    with pytest.raises(BundleError, match=r"found another one \(none\)"):
        service.check()
    shutil.copytree(pixel_bundle, copy)
    service.check()
    assert np.array_equal(service.submit(ask("A")).result(WAIT).images, first)
    shutil.rmtree(copy)
    shutil.copytree(tiny_bundle, copy)
    told = r"expected the bundle that the service loaded \(manifest [0-9a-f]{12}…\), found another one \([0-9a-f]{12}\)"
    with pytest.raises(BundleError, match=told):
        service.check()
    with pytest.raises(BundleError, match=told):
        service.submit(ask("A")).result(WAIT)


def test_close_refuses_what_waits_and_ends_the_run_in_progress(
    serve: Callable[..., Service], gate: threading.Semaphore
) -> None:
    service = serve(window=0.0)
    running = service.submit(ask("A"))
    until(lambda: service.statistics().queued == 0)
    waiting: Future[Any] = service.submit(ask("A"))
    closing = threading.Thread(target=service.close)
    closing.start()
    gate.release()
    closing.join(WAIT)
    assert len(running.result(WAIT).images) == 1
    with pytest.raises(RefusedError, match="closed before the request was run"):
        waiting.result(WAIT)
    with pytest.raises(RefusedError, match="found a closed one"):
        service.submit(ask("A"))
    with pytest.raises(RefusedError, match="found a closed one"):
        service.check()


def test_service_of_latents_without_a_decoder_is_refused(tiny_bundle: Path) -> None:
    with pytest.raises(UsageError, match="expected a bundle that gives images"):
        Service(Pipeline.load(tiny_bundle, "cpu", batch=1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": -1}, "window: expected 0 to 60 seconds, found -1"),
        ({"queue": 0}, "queue: expected at least 1 image, found 0"),
        ({"pad": 1}, "pad"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ServiceSettings(**settings)


def test_without_padding_a_run_has_the_images_that_wait(
    serve: Callable[..., Service], pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, sample = [], pipe.sample

    def counted(conditions: Any, seeds: Any, **settings: Any) -> Any:
        sizes.append(len(seeds))
        return sample(conditions, seeds, **settings)

    monkeypatch.setattr(pipe, "sample", counted)
    for pad in (True, False):
        serve(pad=pad).submit(ask("A")).result(WAIT)
    assert sizes == [BATCH, 1]


@pytest.mark.slow
def test_prompts_share_a_run_and_a_prompt_without_words_fails_alone(
    serve: Callable[..., Service], build_once: Callable[..., Path], full_pipeline: Path
) -> None:
    pytest.importorskip("tokenizers")
    route = Overrides(route=Route(0, 1))
    bundle = build_once("prx-full-of-two", full_pipeline, guidance="cfg", batch=2, scale=3.0, overrides=route)
    text = Pipeline.load(bundle, "cpu", threads=1)
    service = serve(text, window=0.0)
    settings: dict[str, Any] = {"steps": 1, "scale": 2.0}
    good = Request(("a tram on a beach",), (4,), negative="dull", **settings)
    other = Request(("a cat",), (6,), **settings)
    expected = text(prompts=["a tram on a beach", "a cat"], negative=["dull", None], seeds=[4, 6], steps=1, scale=2.0)
    with service.together():
        answers = [service.submit(good), service.submit(other)]
    assert [len(answer.result(WAIT).images) for answer in answers] == [1, 1]
    assert service.statistics().runs == {2: 1}
    assert np.array_equal(np.concatenate([answer.result(WAIT).images for answer in answers]), expected)
    with service.together():
        kept = service.submit(good)
        bad = service.submit(Request(("http://example.com",), (5,), **settings))
    assert np.array_equal(kept.result(WAIT).images, expected[:1])
    with pytest.raises(UsageError, match="found none after cleaning"):
        bad.result(WAIT)
    assert service.statistics().runs == {1: 1, 2: 1}


def test_service_of_a_bundle_that_was_replaced_since_it_was_loaded_is_refused(
    pixel_bundle: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(pixel_bundle, tmp_path / "bundle"))
    loaded = Pipeline.load(copy, "cpu", batch=BATCH, threads=1)
    shutil.rmtree(copy)
    shutil.copytree(tiny_bundle, copy)
    with pytest.raises(BundleError, match="expected the bundle that was loaded, found another one: load it again"):
        Service(loaded)
