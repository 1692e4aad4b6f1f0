"""Backends. Each runs the graphs of a bundle with one library on one device."""

from sg_runtime.backends.base import Backend, Call, CallSequence, Lane
from sg_runtime.backends.choice import BACKENDS, Choice, choose_backend, choose_onnx_backend, open_backend

__all__ = [
    "BACKENDS",
    "Backend",
    "Call",
    "CallSequence",
    "Choice",
    "Lane",
    "choose_backend",
    "choose_onnx_backend",
    "open_backend",
]
