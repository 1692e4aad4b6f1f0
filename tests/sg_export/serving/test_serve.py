"""`sg-export serve` on real Ray Serve: two bundles, lost replicas, signals, wrong starts."""

import json
import os
import shutil
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from servers import WAIT, Server, listening, serving, starting, until

from sg_export.serving.deployment import Replica, ReplicaSettings
from sg_runtime.bundle import Bundle
from sg_runtime.errors import BundleError
from sg_runtime.pipeline import Pipeline
from sg_runtime.service import ServiceSettings

pytestmark = pytest.mark.slow

PATH = "/v1/images/generations"
FAST = ("--threads", "1")


@pytest.fixture(scope="module")
def copies(pixels: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return two copies of a bundle, which may be altered."""
    folder = tmp_path_factory.mktemp("copies")
    return [Path(shutil.copytree(pixels, folder / name)) for name in ("first", "second")]


@pytest.fixture(scope="module")
def server(copies: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Return a server of two bundles."""
    with serving(tmp_path_factory.mktemp("server"), *copies, *FAST, "--max-steps", 5000) as found:
        yield found


def metrics(server: Server) -> dict[str, str]:
    """Return the values of the metrics by name and labels."""
    with server.client() as client:
        lines = client.get("/metrics").text.splitlines()
    return dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))


def test_two_bundles_are_served_side_by_side(server: Server, pipe: Pipeline, pictures: Callable[[Any], Any]) -> None:
    assert server.address.startswith("http://127.0.0.1:")
    with server.client() as client:
        until(lambda: client.get("/ready").json() == {"status": "ok", "models": {"first": "ok", "second": "ok"}})
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["first", "second"]
        for model in ("first", "second"):
            body = client.post(PATH, json={"model": model, "prompt": "B", "n": 3, "seed": 5, "steps": 2}).json()
            assert np.array_equal(pictures(body), pipe(["B"] * 3, [5, 6, 7], steps=2)[..., 0])
        until(lambda: 'sg_replicas{model="second"} 1.0' in client.get("/metrics").text)
        wrong = client.post(PATH, json={"prompt": "A", "n": 10**9})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (422, "n")
    assert server.replicas("first")
    assert len(server.replicas("second")) == 1


def test_ports_are_those_of_this_machine_alone_but_one_of_each_replica(server: Server) -> None:
    """Ray Serve binds a port for calls between replicas to all addresses. A token guards it."""
    found = listening(server.process.pid)
    assert any(command.startswith("ray::") for command, _ in found)
    others = [command for command, address in found if address not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")]
    assert [command.partition(":sg-export-")[0] for command in others] == ["ray::ServeReplica"] * len(others)
    assert len(others) == 2


def test_clients_that_go_away_cancel_their_requests_in_the_replica(server: Server) -> None:
    """Four clients leave at once. A replica that went on would make all of their 64 images."""
    before = float(metrics(server)['sg_replica_images{model="first"}'])
    body = json.dumps({"model": "first", "prompt": "A", "n": 16, "steps": 2000}).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: it\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    port = int(server.address.rpartition(":")[2])
    clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(4)]
    for client in clients:
        client.sendall(head.encode() + body)
    until(
        lambda: float(metrics(server)['sg_queue_images{model="first"}']) > 32
    )  # all requests have reached the replica
    for client in clients:
        client.close()
    until(lambda: metrics(server).get('sg_requests_total{model="first",status="499"}') == "4.0")
    until(lambda: metrics(server)['sg_queue_images{model="first"}'] == "0.0")
    assert float(metrics(server)['sg_replica_images{model="first"}']) - before < 64


def test_replica_that_is_killed_loses_no_request_and_no_image_is_wrong(
    server: Server, pipe: Pipeline, pictures: Callable[[Any], Any]
) -> None:
    """The only replica of a bundle is killed within a long request. Two clients ask others."""
    long = {"model": "first", "class": 4, "seed": 10**6, "n": 8, "steps": 1000}
    asked: list[tuple[dict[str, Any], Any]] = []
    done = threading.Event()

    def ask(requests: Iterable[dict[str, Any]]) -> None:
        with server.client() as client:
            for request in requests:
                asked.append((request, client.post(PATH, json=request)))
                if done.is_set():
                    return

    def short(own: int) -> Iterator[dict[str, Any]]:
        for k in count(own, 2):
            yield {"model": "first", "class": k % 5, "seed": k, "n": 1 + k % 2, "steps": 3}

    threads = [threading.Thread(target=ask, args=(requests,)) for requests in (short(0), short(1), [long])]
    (killed,) = server.replicas("first")
    for thread in threads:
        thread.start()
    until(lambda: float(metrics(server)['sg_queue_images{model="first"}']) > 4)  # of the long request
    os.kill(killed, signal.SIGKILL)
    threads[-1].join(WAIT)
    done.set()
    for thread in threads:
        thread.join(WAIT)
    assert long in [request for request, _ in asked]
    assert len(asked) > 2
    for request, answer in asked:
        assert answer.status_code == 200, answer.text
        seeds = range(request["seed"], request["seed"] + request["n"])
        expected = pipe([request["class"]] * len(seeds), seeds, steps=request["steps"])[..., 0]
        assert np.array_equal(pictures(answer.json()), expected)
    assert "replica lost" in server.log.read_text()
    assert killed not in server.replicas("first")
    with server.client() as client:
        until(lambda: client.get("/ready").status_code == 200)


def test_bundle_that_is_swapped_is_told_and_the_other_is_served(
    server: Server, copies: list[Path], tiny_bundle: Path
) -> None:
    shutil.rmtree(copies[1])
    shutil.copytree(tiny_bundle, copies[1])
    with server.client() as client:
        answer = client.post(PATH, json={"model": "second", "prompt": "A", "steps": 1})
        ready = client.get("/ready")
        kept = client.post(PATH, json={"model": "first", "prompt": "A", "steps": 1})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "bundle_changed")
    assert ready.status_code == 503
    assert "start the service again" in ready.json()["models"]["second"]
    assert ready.json()["models"]["first"] == "ok"
    assert kept.status_code == 200


def test_replica_of_another_bundle_than_the_server_s_is_refused(pixels: Path, tiny_bundle: Path) -> None:
    settings = ReplicaSettings(ServiceSettings(), batch=2, threads=1)
    with pytest.raises(BundleError, match="expected the bundle that the server started with, found another one: start"):
        Replica(str(pixels), Bundle.open(tiny_bundle).manifest, settings)


def test_port_that_is_taken_by_a_server_is_told(server: Server, pixels: Path, tmp_path: Path) -> None:
    port = server.address.rpartition(":")[2]
    with starting(tmp_path, pixels, "--port", port) as process:
        assert process.wait(WAIT) == 2
    told = f"Error: --port {port}: expected a free port of 127.0.0.1, found one that another process listens on: give"
    assert told in (tmp_path / "log").read_text()


def test_end_by_a_signal_leaves_no_process_and_the_log_is_json(server: Server) -> None:
    assert server.end() == 128 + signal.SIGTERM
    lines = server.log.read_text().splitlines()
    assert lines.pop() == "Error: ended by SIGTERM; nothing was left half-written"
    events = [json.loads(line) for line in lines]
    assert events[0]["event"] == "serving"


def test_server_with_a_key_starts_replicas_as_requests_come_and_ends_by_ctrl_c(pixels: Path, tmp_path: Path) -> None:
    """Eight clients ask one request after another until a second replica runs."""
    options = ("--replicas", "1:2", "--window", "0", "--no-pad", "--batch", "2", "--queue", "1000")
    headers, done = {"Authorization": "Bearer secret"}, threading.Event()
    statuses: list[int] = []

    def ask() -> None:
        with server.client() as client:
            while not done.is_set():
                request = {"prompt": "A", "n": 16, "steps": 50}
                statuses.append(client.post(PATH, json=request, headers=headers).status_code)

    with serving(tmp_path, pixels, *FAST, *options, SG_EXPORT_API_KEY="secret") as server:
        threads = [threading.Thread(target=ask) for _ in range(8)]
        with server.client() as client:
            assert client.get("/v1/models").status_code == 401
            for thread in threads:
                thread.start()
            until(lambda: 'sg_replicas{model="pixels"} 2.0' in client.get("/metrics", headers=headers).text)
            done.set()
            for thread in threads:
                thread.join(WAIT)
        assert set(statuses) == {200}
        assert server.end(signal.SIGINT) == 130
    assert "secret" not in server.log.read_text()


def test_port_that_is_taken_is_told_before_anything_starts(cli: Callable[..., Any], pixels: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = cli("serve", pixels, "--port", port)
    assert result.exit_code == 2
    assert f"--port {port}: expected a free port of 127.0.0.1" in result.output


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("nowhere",), 6, "nowhere: expected a bundle (a directory), found nothing there"),
        (("TINY",), 2, "expected a bundle that gives pictures of 1 or 3 channels, found samples of 2 channels"),
        (("PIXELS", "PIXELS"), 2, "expected bundles with names of their own, found two named pixels"),
        (("PIXELS", "--device", "cuda:1"), 2, "expected auto, cpu or cuda, since Ray chooses the GPU of a replica"),
        (("PIXELS", "--host", "192.0.2.77"), 2, "--host 192.0.2.77, --port 8000: cannot be bound"),
        (("PIXELS", "--host", "no such host"), 2, "--host no such host: expected an address of this machine"),
        (("PIXELS", "--host", "a..b"), 2, "--host a..b: expected an address of this machine"),
        (("PIXELS", "--batch", "3"), 2, "was built for (2), found 3"),
        (("PIXELS", "--images", "9", "--queue", "8"), 2, "--images: expected at most --queue 8, as a request of more"),
        (("PIXELS", "--replicas", "3:2"), 2, "'3:2': expected a number of at least 1, or two as LEAST:MOST"),
        (("PIXELS", "--replicas", "0"), 2, "'0': expected a number of at least 1"),
        (("PIXELS", "--window", "90"), 2, "--window"),
    ],
)
def test_wrong_start_is_told(
    cli: Callable[..., Any], pixels: Path, tiny_bundle: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    places = {"PIXELS": pixels, "TINY": tiny_bundle}
    result = cli("serve", *(places.get(argument, argument) for argument in arguments))
    assert (result.exit_code, message in result.output) == (code, True), result.output


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ("--gpus", "1"),
            2,
            "expected room in Ray for 1 with 1 CPU and 1 GPU each, found room for 0: lower",
        ),
        (("--cluster", "127.0.0.1:9"), 6, "Ray: expected a cluster at 127.0.0.1:9, found none that answers ("),
    ],
)
def test_start_without_room_or_cluster_is_told(
    pixels: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    with starting(tmp_path, pixels, *arguments) as process:
        assert process.wait(WAIT) == code
    assert message in (tmp_path / "log").read_text()


@pytest.mark.parametrize("key", ["", "two words", "kłucz"])
def test_key_that_no_header_can_hold_is_told(
    cli: Callable[..., Any], pixels: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("SG_EXPORT_API_KEY", key)
    result = cli("serve", pixels, "--port", 0)
    assert result.exit_code == 2
    assert "SG_EXPORT_API_KEY: expected visible ASCII characters" in result.output
