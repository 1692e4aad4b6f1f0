"""Part `outer`: one CUDA graph of our own around several runs of ONNX Runtime."""

from collections.abc import Iterator

from benchmarks.gpu import timing
from benchmarks.gpu.child import Check, Context
from benchmarks.gpu.results import Figure, Finding

RUNS = 8


def outer_capture(_: Context) -> Iterator[Finding]:
    """A captured sequence of steps gives the same latent as the steps, and takes less time.

    Each step is that of part `forms`, in the form mha/affine, from the same latent. ONNX Runtime
    captures nothing itself. The process may abort when it ends.
    """
    import torch

    from benchmarks.gpu import step_form
    from benchmarks.gpu.sessions import WITHOUT

    kept = step_form.KEPT["0/0.5"]
    weights, given = step_form.random_weights(step_form.DEPTH), step_form.feeds(kept, step_form.DEPTH)
    bound, target = step_form.bound("mha", "affine", kept, weights, given, step_form.DEPTH)

    def steps(number: str) -> None:
        for _ in range(RUNS):
            bound.run(number)

    steps(WITHOUT)
    torch.cuda.synchronize()
    wanted = target.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=bound.stream, capture_error_mode="thread_local"):
        steps(WITHOUT)
    target.zero_()
    torch.cuda.synchronize()

    outer = timing.event_ms(graph.replay, bound.stream, 20)
    same = bool(torch.equal(target, wanted))
    steps("1")
    inner = timing.event_ms(lambda: steps("1"), bound.stream, 20)
    figures = (
        Figure.of(f"{RUNS} steps in one graph", "ms", *outer),
        Figure.of(f"{RUNS} graphs of ONNX Runtime", "ms", *inner),
    )
    yield Finding("", same, "" if same else "the replay gives another latent", figures)


CHECKS: tuple[Check, ...] = (outer_capture,)
