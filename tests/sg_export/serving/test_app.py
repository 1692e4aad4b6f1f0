"""The HTTP application over an engine in this process: answers, errors, metrics, logs."""

import asyncio
import json
import logging
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from sg_export.serving.app import Limits, make_app
from sg_export.serving.engine import LocalEngine
from sg_export.serving.server import json_lines
from sg_runtime.errors import UsageError
from sg_runtime.pipeline import Pipeline
from sg_runtime.service import Request

PATH = "/v1/images/generations"
FAST = {"steps": 1}
SCOPE: dict[str, Any] = {
    "type": "http",
    "method": "POST",
    "path": PATH,
    "query_string": b"",
    "headers": [(b"content-type", b"application/json")],
}
WAIT = 60.0


def shown(client: TestClient, **fields: Any) -> Any:
    """Return the body of the answer to a request for images."""
    answer = client.post(PATH, json=FAST | fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


def error(answer: Any) -> dict[str, Any]:
    """Return the error of an answer, in OpenAI's form."""
    body = answer.json()
    assert list(body) == ["error"]
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return dict(body["error"])


def test_images_of_a_class_are_those_of_the_pipeline(
    client: TestClient, pipe: Pipeline, pictures: Callable[[Any], Any]
) -> None:
    body = shown(client, prompt="A", n=3, seed=7, response_format="b64_json")
    assert np.array_equal(pictures(body), pipe(["A"] * 3, [7, 8, 9], steps=1)[..., 0])
    assert [image["seed"] for image in body["data"]] == [7, 8, 9]
    assert body["model"] == "pixels"
    assert abs(body["created"] - time.time()) < WAIT


def test_prompt_is_a_class_name_and_class_a_name_or_an_index(
    client: TestClient, pipe: Pipeline, pictures: Callable[[Any], Any]
) -> None:
    fields: list[dict[str, Any]] = [{"prompt": "9"}, {"class": "9"}, {"class": 4}]
    found = [pictures(shown(client, seed=1, **each)) for each in fields]
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[1], found[2])
    assert np.array_equal(found[2], pipe([4], [1], steps=1)[..., 0])


def test_guidance_fields_are_those_of_the_pipeline(
    client: TestClient, pipe: Pipeline, pictures: Callable[[Any], Any]
) -> None:
    plans = {
        "sg": pipe.guidance("sg", sparsity=0.5, strong_sparsity=0.0, scale=(4.0, 1.0)),
        "cfg": pipe.guidance("cfg", scale=1.5),
        "none": pipe.guidance("none"),
    }
    fields: dict[str, dict[str, Any]] = {
        "sg": {"sparsity": 0.5, "strong_sparsity": 0, "scale": [4, 1]},
        "cfg": {"scale": 1.5},
        "none": {},
    }
    for mode, plan in plans.items():
        body = shown(client, prompt="B", seed=3, guidance=mode, sampler="heun", steps=2, **fields[mode])
        expected = pipe(["B"], [3], guidance=plan, sampler="heun", steps=2)[..., 0]
        assert np.array_equal(pictures(body), expected)


def test_seed_that_is_not_given_is_another_each_time_and_is_told(client: TestClient) -> None:
    bodies = [shown(client, prompt="A") for _ in range(2)]
    seeds = [body["data"][0]["seed"] for body in bodies]
    assert seeds[0] != seeds[1]
    assert shown(client, prompt="A", seed=seeds[0])["data"] == bodies[0]["data"]


def test_largest_seed_goes_on_at_zero(client: TestClient) -> None:
    data = shown(client, prompt="A", seed=2**64 - 1, n=2)["data"]
    assert [image["seed"] for image in data] == [2**64 - 1, 0]


@pytest.mark.parametrize(
    ("fields", "status", "param", "message"),
    [
        ({"n": 10**9}, 422, "n", "n: expected 1 to 16, found 1000000000"),
        ({"n": 0}, 422, "n", "n: expected 1 to 16, found 0"),
        ({"n": 10**30}, 422, "n", "n: expected 1 to 16, found 1000000"),
        ({"n": "2"}, 422, "n", "n: input should be a valid integer, found '2'"),
        ({"steps": 251}, 422, "steps", "steps: expected 1 to 250, found 251"),
        ({"prompt": "Q"}, 422, "prompt", "class 'Q': expected one of the model's class names"),
        ({"prompt": None}, 422, "prompt", "prompt: expected either prompt or class, found neither"),
        ({"class": 3}, 422, "prompt", "prompt: expected either prompt or class, found both"),
        ({"negative": "dull"}, 422, "negative", "negative: expected none: the model is conditioned on classes"),
        ({"seed": -1}, 422, "seed", "seed: input should be greater than or equal to 0, found -1"),
        ({"seed": 2**64}, 422, "seed", "seed: input should be less than 18446744073709551616"),
        ({"size": "8"}, 422, "size", "size: expected WIDTHxHEIGHT in pixels, for example 768x512, found '8'"),
        ({"size": "16x8"}, 422, "size", "8x16"),
        ({"scale": "high"}, 422, "scale", "scale: input should be a valid number, found 'high'"),
        ({"sparsity": 0.9}, 422, "guidance", "sparsity 0.9 is not in this bundle, which has 0, 0.5"),
        ({"guidance": "strong"}, 422, "guidance", "guidance: expected"),
        ({"sampler": "dpm"}, 422, "sampler", "sampler: expected"),
        (
            {"response_format": "url"},
            422,
            "response_format",
            "response_format: input should be 'b64_json', found 'url'",
        ),
        ({"guidence": "sg"}, 422, "guidence", "guidence: expected one of model, prompt, class, negative, n, size"),
        ({"model": "other"}, 404, "model", "model 'other': expected one of pixels"),
    ],
)
def test_wrong_field_is_refused_with_its_name(
    client: TestClient, fields: dict[str, Any], status: int, param: str, message: str
) -> None:
    answer = client.post(PATH, json={"prompt": "A"} | FAST | fields)
    found = error(answer)
    assert (answer.status_code, found["param"], found["type"]) == (status, param, "invalid_request_error")
    assert message in found["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[1, 2]", b'"A"', b'{"prompt": "A", "n": NaN}', b"\xff\xfe", b"[" * 5000])
def test_body_that_is_no_json_object_is_refused(client: TestClient, body: bytes) -> None:
    answer = client.post(PATH, content=body, headers={"Content-Type": "application/json"})
    found = error(answer)
    assert answer.status_code in (400, 422)
    assert found["type"] == "invalid_request_error"
    if b"NaN" not in body:
        assert answer.status_code == 400
        assert found["code"] == "invalid_json"
        assert found["message"].startswith("body: expected a JSON object, found another content: ")


def test_body_of_another_type_is_refused(client: TestClient) -> None:
    """A page of another server could send such a body without asking."""
    answer = client.post(PATH, content=b'{"prompt": "A"}', headers={"Content-Type": "text/plain"})
    assert (answer.status_code, error(answer)["code"]) == (415, "media_type")
    assert error(answer)["message"] == "Content-Type: expected application/json, found 'text/plain'"


@pytest.mark.parametrize("stated", [True, False])
def test_body_beyond_the_limit_is_refused_with_or_without_its_length(engine: LocalEngine, stated: bool) -> None:
    client = TestClient(make_app([engine], Limits(body=100)))
    body = json.dumps({"prompt": "A", "steps": 1, "user": "x" * 200}).encode()
    content: Any = body if stated else (body[k : k + 50] for k in range(0, len(body), 50))
    answer = client.post(PATH, content=content, headers={"Content-Type": "application/json"})
    assert (answer.status_code, error(answer)["code"]) == (413, "body_too_long")
    assert error(answer)["message"] == "body: expected at most 100 bytes, found more"


@pytest.mark.parametrize("given", [None, "Bearer wrong", "Basic secret", "secret", "Bearer"])
@pytest.mark.parametrize("path", [PATH, "/v1/models", "/v1/models/pixels", "/metrics"])
def test_wrong_key_is_refused(engine: LocalEngine, path: str, given: str | None) -> None:
    client = TestClient(make_app([engine], key="secret"))
    headers = {} if given is None else {"Authorization": given}
    answer = (
        client.post(path, json={"prompt": "A"}, headers=headers) if path == PATH else client.get(path, headers=headers)
    )
    assert (answer.status_code, error(answer)["code"]) == (401, "invalid_api_key")
    assert error(answer)["type"] == "authentication_error"
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert "secret" not in answer.text


def test_right_key_is_accepted_and_health_needs_none(engine: LocalEngine) -> None:
    client = TestClient(make_app([engine], key="secret"))
    assert client.get("/health").status_code == client.get("/ready").status_code == client.get("/").status_code == 200
    answer = client.post(PATH, json={"prompt": "A"} | FAST, headers={"Authorization": "bearer secret"})
    assert answer.status_code == 200


def test_unknown_path_and_method_are_errors_in_the_same_form(client: TestClient) -> None:
    missing, method = client.get("/v1/images"), client.get(PATH)
    assert (missing.status_code, error(missing)["code"]) == (404, "unknown_url")
    assert (method.status_code, error(method)["code"]) == (405, "method_not_allowed")


def test_models_are_listed_with_what_a_page_needs(client: TestClient) -> None:
    body = client.get("/v1/models").json()
    assert body["object"] == "list"
    (model,) = body["data"]
    assert (model["id"], model["object"]) == ("pixels", "model")
    facts = model["sg_export"]
    assert facts["classes"] == ["A", "B", "C", "0", "9"]
    assert facts["sizes"] == ["8x8"]
    assert facts["modes"] == {"none": [], "cfg": [], "sg": [0.5], "cfg+sg": [0.5]}
    assert client.get("/v1/models/pixels").json() == model
    assert client.get("/v1/models/other").status_code == 404


def test_two_models_are_served_by_their_names(
    local: Callable[..., LocalEngine], pixels: Path, pictures: Callable[[Any], Any]
) -> None:
    client = TestClient(make_app([local(pixels, "one"), local(pixels, "two")]))
    bodies = [shown(client, prompt="A", seed=1, **model) for model in ({}, {"model": "one"}, {"model": "two"})]
    assert [body["model"] for body in bodies] == ["one", "one", "two"]
    assert np.array_equal(pictures(bodies[0]), pictures(bodies[2]))


@pytest.fixture
def gate(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> threading.Semaphore:
    """Return a semaphore that each run takes first. It starts at 0."""
    turns, (pipe,) = threading.Semaphore(0), engine.service._pipes.values()
    sample = pipe.sample

    def gated(*arguments: Any, **settings: Any) -> Any:
        assert turns.acquire(timeout=WAIT)
        return sample(*arguments, **settings)

    monkeypatch.setattr(pipe, "sample", gated)
    return turns


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_full_queue_is_told_with_the_time_to_try_again(local: Callable[..., LocalEngine], pixels: Path) -> None:
    engine = local(pixels, queue=3, window=60.0)
    waiting = engine.service.submit(_request())
    answer = TestClient(make_app([engine])).post(PATH, json={"prompt": "A", "n": 3} | FAST)
    waiting.cancel()
    found = error(answer)
    assert (answer.status_code, found["type"], found["code"]) == (429, "rate_limit_error", "queue_full")
    assert int(answer.headers["Retry-After"]) >= 1
    assert found["message"].startswith("queue: expected at most 3 waiting images, found 1 and a request of 3")


def test_deadline_that_passes_is_told(local: Callable[..., LocalEngine], pixels: Path) -> None:
    """The image waits for a second one to share its run."""
    client = TestClient(make_app([local(pixels, window=60.0)], Limits(timeout=0.05)))
    answer = client.post(PATH, json={"prompt": "A"} | FAST)
    assert (answer.status_code, error(answer)["code"], error(answer)["type"]) == (504, "deadline", "server_error")


def _request() -> Request:
    return Request(("A",), (0,), steps=1)


def test_bundle_that_was_swapped_is_told_and_the_server_is_not_ready(
    local: Callable[..., LocalEngine], pixels: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(pixels, tmp_path / "bundle"))
    client = TestClient(make_app([local(copy, "swapped"), local(pixels, "kept")]))
    assert client.get("/ready").json() == {"status": "ok", "models": {"swapped": "ok", "kept": "ok"}}
    shutil.rmtree(copy)
    shutil.copytree(tiny_bundle, copy)
    answer, ready = client.post(PATH, json={"prompt": "A"} | FAST), client.get("/ready")
    assert (answer.status_code, error(answer)["code"], error(answer)["type"]) == (503, "bundle_changed", "server_error")
    assert "expected the bundle that the service loaded" in error(answer)["message"]
    assert ready.status_code == 503
    assert "start the service again" in ready.json()["models"]["swapped"]
    assert ready.json()["models"]["kept"] == "ok"
    assert client.get("/health").status_code == 200
    assert client.post(PATH, json={"prompt": "A", "model": "kept"} | FAST).status_code == 200


def test_error_that_nobody_expects_is_logged_and_not_shown(
    client: TestClient, engine: LocalEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engine, "generate", lambda *_: 1 / 0)
    with json_lines():
        answer = client.post(PATH, json={"prompt": "A"})
    assert answer.status_code == 500
    assert error(answer)["message"] == "unexpected ZeroDivisionError; the server's log has more"
    line = json.loads(capsys.readouterr().err)
    assert (line["level"], line["status"], line["code"]) == ("error", 500, "internal_error")
    assert "ZeroDivisionError: division by zero" in line["traceback"]


def test_client_that_goes_away_cancels_its_request(engine: LocalEngine, gate: threading.Semaphore) -> None:
    """The first run is held, so that the request of the client still waits when it goes away."""
    app = make_app([engine])
    running = engine.service.submit(_request())
    until(lambda: engine.service.statistics().queued == 0)
    sent: list[Any] = []

    async def call() -> None:
        gone = asyncio.Event()
        messages = iter([{"type": "http.request", "body": b'{"prompt": "A", "steps": 1}', "more_body": False}])

        async def receive() -> Any:
            for message in messages:
                return message
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        task = asyncio.ensure_future(app(SCOPE, receive, send))
        while engine.service.statistics().queued == 0:
            await asyncio.sleep(0.001)
        gone.set()
        await asyncio.wait_for(task, WAIT)

    asyncio.run(call())
    assert sent[0]["status"] == 499
    assert engine.service.statistics().cancelled == 1
    assert engine.service.statistics().queued == 0
    gate.release()
    running.result(WAIT)


def test_client_that_goes_away_while_its_body_is_read_is_no_fault(client: TestClient, engine: LocalEngine) -> None:
    """The body is cut. The client is gone before the rest of it comes."""
    sent: list[Any] = []

    async def call() -> None:
        messages = iter([{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])

        async def receive() -> Any:
            return next(messages)

        async def send(message: Any) -> None:
            sent.append(message)

        await make_app([engine])(SCOPE, receive, send)

    asyncio.run(call())
    assert sent[0]["status"] == 499


def test_metrics_count_requests_images_runs_and_seconds_by_part(client: TestClient) -> None:
    shown(client, prompt="A", n=3, seed=1)
    client.post(PATH, json={"prompt": "Q"})
    client.post(PATH, json={"prompt": "A", "model": "no such model"})
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    rows = dict(line.rsplit(" ", 1) for line in answer.text.splitlines() if not line.startswith("#"))
    assert rows['sg_requests_total{model="pixels",status="200"}'] == "1.0"
    assert rows['sg_requests_total{model="pixels",status="422"}'] == "1.0"
    assert rows['sg_requests_total{model="",status="404"}'] == "1.0"
    assert rows['sg_images_total{model="pixels"}'] == "3.0"
    assert rows['sg_run_images_bucket{le="1.0",model="pixels"}'] == "1.0"
    assert rows['sg_run_images_sum{model="pixels"}'] == "3.0"
    assert rows['sg_replicas{model="pixels"}'] == "1.0"
    assert rows['sg_queue_images{model="pixels"}'] == rows['sg_images_in_progress{model="pixels"}'] == "0.0"
    for part in ("wait", "encode", "sample", "decode", "png", "total"):
        assert rows[f'sg_request_seconds_count{{model="pixels",part="{part}"}}'] == "1.0"


def test_logs_are_a_json_object_a_line(client: TestClient, capsys: pytest.CaptureFixture[str]) -> None:
    with json_lines():
        answer = client.post(PATH, json={"prompt": "A", "seed": 5, "scale": 3.0} | FAST)
        client.get("/health")
        client.post(PATH, json={"prompt": "private words"})
    lines = capsys.readouterr().err
    assert "private" not in lines
    first, second = map(json.loads, lines.splitlines())
    assert first["id"] == answer.headers["X-Request-Id"]
    assert first["guidance"] == "sg, sparsity 0 strong and 0.5 weak, scale 3"
    kept = {
        name: first[name] for name in ("level", "event", "method", "path", "status", "model", "images", "seed", "steps")
    }
    assert kept == {
        "level": "info",
        "event": "request",
        "method": "POST",
        "path": PATH,
        "status": 200,
        "model": "pixels",
        "images": 1,
        "seed": 5,
        "steps": 1,
    }
    assert set(first["parts"]) == {"wait", "encode", "sample", "decode"}
    assert (second["status"], second["code"], second["param"]) == (422, "invalid_value", "prompt")
    assert logging.getLogger("sg_export.serving").propagate


def test_page_loads_nothing_from_elsewhere(client: TestClient) -> None:
    answer = client.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'; connect-src 'self'" in answer.headers["Content-Security-Policy"]
    assert "http://" not in answer.text
    assert "https://" not in answer.text


def test_limits_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UsageError, match="timeout: expected more than 0, found 0"):
        Limits(timeout=0)


def test_text_model_takes_prompts(
    local: Callable[..., LocalEngine], full_bundle: Path, pictures: Callable[[Any], Any]
) -> None:
    pytest.importorskip("tokenizers")
    engine = local(full_bundle, "prx")
    client = TestClient(make_app([engine]))
    body = shown(client, prompt="a tram on a beach", negative="dull", seed=4, scale=2.0)
    pipe = Pipeline.load(full_bundle, "cpu", threads=1)
    expected = pipe(prompts="a tram on a beach", negative="dull", seeds=[4], steps=1, scale=2.0)
    assert np.array_equal(pictures(body), expected)
    assert client.get("/v1/models").json()["data"][0]["sg_export"]["classes"] is None
    for fields, param in (
        ({"class": 3}, "class"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "a", "negative": " "}, "negative"),
    ):
        answer = client.post(PATH, json=FAST | fields)
        assert (answer.status_code, error(answer)["param"]) == (422, param)
