"""Settings that depend on the device of the candidates, such as `{cuda: 256, cpu: 32}`. Knows launchers; imports no torch.

The driver may run on a login node that has no GPU and no torch. So the device follows from the protocol and the launcher,
before the run is written down.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hpc_compress.config import ConfigError
from hpc_compress.launch.arrays import ArrayLauncher
from hpc_compress.launch.local import visible_gpus

KINDS = {"cuda", "cpu", "cpu_onnx", "cpu_bf16"}  # of devices, as keys of a setting


def chosen(values: Mapping[str, Any], launcher: Any) -> dict[str, Any]:
    """A whole configuration as plain data, with protocol.device decided and one value in place of each {cuda: ..., cpu: ...}.

    The launcher decides the device, so its own settings can't depend on the device.

    Raises: ConfigError when a setting has no value for the device.
    """
    wanted = values["protocol"].get("device", "any")
    elsewhere = isinstance(launcher, ArrayLauncher)
    if wanted == "any":
        on_gpu = launcher.needs_gpu if isinstance(launcher, ArrayLauncher) else bool(visible_gpus())
        wanted = "cuda" if on_gpu else "cpu"
    plain = resolved(values, ("cuda",) if wanted == "cuda" else _cpu_kinds(elsewhere))
    plain["protocol"]["device"] = wanted
    return plain


def resolved(value: Any, kinds: Sequence[str], where: str = "") -> Any:
    """`value` with every mapping from kinds of devices replaced by its first value whose kind is one of `kinds`."""
    if isinstance(value, list):
        return [resolved(item, kinds, f"{where}[{index}]") for index, item in enumerate(value)]
    if not isinstance(value, Mapping):
        return value
    if not value or not value.keys() <= KINDS:
        return {key: resolved(item, kinds, f"{where}.{key}".lstrip(".")) for key, item in value.items()}
    for kind, item in value.items():
        if kind in kinds:
            return resolved(item, kinds, where)
    raise ConfigError(
        f"{where}={dict(value)} has no value for {kinds[-1]}; add {kinds[-1]}: ..., or give one value for all devices"
    )


def describe(protocol: Any, strategy: Mapping[str, Any]) -> str:
    """What was chosen, for the log."""
    base = "fp32" if protocol.base_precision == "fp32" else f"fp32 and {protocol.base_precision}"
    choices = strategy.get("quantizations")
    named = choices.items() if isinstance(choices, Mapping) else ()  # a strategy of a user's own may have none
    weights = ", ".join(f"{name} {step['weight']}" for name, step in named if isinstance(step, Mapping) and step.get("weight"))
    space = strategy.get("space")
    deploys = space.get("deploys") if isinstance(space, Mapping) else None
    possible = ", ".join(name for name, chain in deploys.items() if chain is not None) if isinstance(deploys, Mapping) else ""
    devices = "GPUs" if protocol.device == "cuda" else "CPUs"
    return (
        f"candidates run on {devices} (protocol.device={protocol.device}) in batches of "
        f"{protocol.batch_size}; the base model is timed in {base}; precisions: {weights or possible or 'fp32'}"
    )


def _cpu_kinds(elsewhere: bool) -> tuple[str, ...]:
    """elsewhere: candidates run on another machine, whose processor is not known."""
    onnx = all(importlib.util.find_spec(package) for package in ("onnx", "onnxruntime"))
    bf16 = not elsewhere and bool(_cpu_flags() & {"avx512_bf16", "amx_bf16"})
    return (*(["cpu_onnx"] if onnx else []), *(["cpu_bf16"] if bf16 else []), "cpu")


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())
