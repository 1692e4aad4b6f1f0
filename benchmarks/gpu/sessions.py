"""Sessions of ONNX Runtime's CUDA provider over PyTorch tensors, without this project's runtime."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto

WITHOUT = "-1"
"""The `gpu_graph_id` of a run that is neither captured nor replayed."""


class Bound:
    """A model in a session whose inputs and output are PyTorch tensors on the GPU.

    stream: PyTorch stream of its runs. Runs of one `gpu_graph_id` are captured and then replayed.
    """

    def __init__(self, model: onnx.ModelProto, inputs: Mapping[str, Any], output: str, target: Any) -> None:
        """Open the session and bind it.

        inputs: tensors by the names of the model's inputs. output: name of the model's output.
        target: tensor that it is written to.
        """
        import onnxruntime as ort
        import torch

        kinds = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16, torch.int64: TensorProto.INT64}
        self.stream: Any = torch.cuda.Stream()
        options = {
            "device_id": "0",
            "user_compute_stream": str(self.stream.cuda_stream),
            "enable_cuda_graph": "1",
            "use_tf32": "0",
        }
        settings = ort.SessionOptions()
        settings.log_severity_level = 3
        ort.preload_dlls()  # load CUDA and cuDNN from NVIDIA's Python packages
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            onnx.save(model, path, save_as_external_data=True, location="weights.bin")
            providers = [("CUDAExecutionProvider", options)]
            self._session = ort.InferenceSession(str(path), settings, providers=providers, enable_fallback=0)
        if "CUDAExecutionProvider" not in self._session.get_providers():
            raise RuntimeError(f"expected CUDAExecutionProvider, found {self._session.get_providers()}")
        self._binding = self._session.io_binding()
        self._tensors = {**inputs, output: target}  # ONNX Runtime holds only their addresses
        for name, tensor in self._tensors.items():
            bind = self._binding.bind_output if name == output else self._binding.bind_input
            bind(name, "cuda", 0, kinds[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
        torch.cuda.synchronize()

    def run(self, number: str) -> None:
        """Submit a run without waiting. number: its `gpu_graph_id`, or WITHOUT."""
        import onnxruntime as ort

        choice = ort.RunOptions()
        choice.add_run_config_entry("disable_synchronize_execution_providers", "1")
        choice.add_run_config_entry("gpu_graph_id", number)
        self._session.run_with_iobinding(self._binding, choice)
