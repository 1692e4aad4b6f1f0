"""What diffusers' configurations state about a PRX, and what is refused."""

import json
import re
from typing import Any

import pytest
from cases import HERE
from prx_folders import PIXEL, transformer_config

from sg_export.adapters import prx_configs
from sg_export.models.prx import PRXConfig
from sg_runtime.errors import CheckpointError
from sg_runtime.manifest import Sampling, Shifted
from sg_runtime.sampling import run_times

STATED = {**transformer_config(PIXEL), "mlp_ratio": 1.3}
"""config.json of `PIXEL`. int(1.3 * 16) is 20."""


def test_check_config_accepts_the_config_of_the_network() -> None:
    prx_configs.check_config(STATED, PIXEL, "config.json")


def test_check_config_takes_upstreams_default_of_axes() -> None:
    config = PRXConfig((4, 6), 1, 32, 128, 2, 2, 20, 5, 3)
    prx_configs.check_config({"axes_dim": None}, config, "config.json")
    with pytest.raises(CheckpointError, match=r"axes_dim: expected \[4, 4\].*found \[32, 32\]"):
        prx_configs.check_config({"axes_dim": None}, PIXEL, "config.json")


@pytest.mark.parametrize("name", [name for name in STATED if name[0] != "_"])
def test_check_config_refuses_another_value_by_its_field(name: str) -> None:
    other = [2, 6] if name == "axes_dim" else not STATED[name] if name == "resolution_embeds" else STATED[name] + 1
    with pytest.raises(CheckpointError, match=rf"^config\.json: {name}: expected .*, found {re.escape(str(other))}$"):
        prx_configs.check_config({**STATED, name: other}, PIXEL, "config.json")


def test_check_config_refuses_an_unknown_field() -> None:
    with pytest.raises(CheckpointError, match="guidance_embeds: expected no such field, found True"):
        prx_configs.check_config({**STATED, "guidance_embeds": True}, PIXEL, "config.json")


FACTS = json.loads((HERE / "prx_upstream.json").read_bytes())


@pytest.mark.parametrize(
    "case", FACTS["schedules"], ids=lambda case: f"{case['shift']:g}-{case['num_train_timesteps']}-{case['steps']}"
)
def test_read_scheduler_gives_the_times_of_diffusers(case: dict[str, Any]) -> None:
    """Diffusers rounds its times to float32."""
    stated = {**FACTS["scheduler"], "shift": case["shift"], "num_train_timesteps": case["num_train_timesteps"]}
    times = run_times(case["steps"], prx_configs.read_scheduler(stated, "scheduler_config.json"))
    assert times == pytest.approx(case["sigmas"], rel=2**-22)


def test_read_scheduler_of_missing_fields_takes_upstreams_defaults() -> None:
    stated = {"_class_name": FACTS["scheduler"]["_class_name"]}
    assert (
        prx_configs.read_scheduler(stated, "")
        == prx_configs.read_scheduler(FACTS["scheduler"], "")
        == Shifted(1.0, 0.001)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "DDIMScheduler"}, "_class_name: expected FlowMatchEulerDiscreteScheduler, found DDIMSchedule"),
        ({"_class_name": None}, "_class_name: expected FlowMatchEulerDiscreteScheduler, found None"),
        ({"use_dynamic_shifting": True}, "use_dynamic_shifting: expected none, found True: it is not supported"),
        ({"shift_terminal": 0.02}, "shift_terminal: expected none, found 0.02: it is not supported"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas: expected none, found True: it is not supported"),
        ({"use_exponential_sigmas": True}, "use_exponential_sigmas: expected none, found True: it is not supported"),
        ({"use_beta_sigmas": True}, "use_beta_sigmas: expected none, found True: it is not supported"),
        ({"invert_sigmas": True}, "invert_sigmas: expected none, found True: it is not supported"),
        ({"stochastic_sampling": True}, "stochastic_sampling: expected none, found True: it is not supported"),
        ({"solver": "heun"}, "solver: expected no such field, found heun: it is not supported"),
        ({"shift": "3"}, "shift: expected a number, found '3'"),
        ({"shift": True}, "shift: expected a number, found True"),
        ({"shift": 0.0}, "shift: expected a float32 number above 0, found 0.0"),
        ({"shift": -999.0}, "shift: expected a float32 number above 0, found -999.0"),
        ({"shift": float("nan")}, "shift: expected a float32 number above 0, found nan"),
        ({"num_train_timesteps": 1}, "num_train_timesteps: expected a number of at least 2, found 1"),
        ({"num_train_timesteps": 1e3}, "num_train_timesteps: expected a number of at least 2, found 1000.0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_read_scheduler_refuses_what_is_not_supported_by_its_field(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        prx_configs.read_scheduler({**FACTS["scheduler"], **change}, "scheduler_config.json")
    assert str(caught.value).startswith(f"scheduler_config.json: {message}")


def test_default_sampling_is_that_of_both_codes() -> None:
    times = Shifted(3.0, None)
    assert prx_configs.default_sampling("flow", times, 1.0) == Sampling("euler", 28, times, 1.0, 0.0)
    assert prx_configs.default_sampling("x0", times, 2.0) == Sampling("euler", 28, times, 2.0, 0.05)
