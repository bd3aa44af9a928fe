"""Precisions of the encoder's linears, one row each. Imports no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Scheme:
    """Where a precision can run, which linears it takes, and what it needs that is not always installed."""

    devices: tuple[str, ...] = ("cpu", "cuda")
    multiple: int = 1  # of which the inputs of a linear must be a multiple; with others bitsandbytes is slow or wrong
    packages: tuple[str, ...] = ()


SCHEMES = {
    "fp32": Scheme(),
    "fp16": Scheme(),
    "bf16": Scheme(),
    "int8": Scheme(multiple=4),
    "nf4": Scheme(multiple=32),
    "fp4": Scheme(multiple=32),
    "dynamic_int8": Scheme(devices=("cpu",)),
    "onnx_int8": Scheme(devices=("cpu",), packages=("onnx", "onnxruntime")),
}
