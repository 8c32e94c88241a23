"""A kernel launch as a value: it can be run, or compiled for a GPU that is not there."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

#: Kernels run in the interpreter, on CPU tensors: for tests.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    Attributes:
        kernel: a `@triton.jit` function.
        grid: number of programs.
        arguments: what varies from call to call, by parameter name; `None` stands for an absent tensor.
        constants: the `tl.constexpr` parameters.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline.
        fp_fusion: whether products and sums may be fused, which rounds once instead of twice.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    fp_fusion: bool = True

    @classmethod
    def matching(cls, kernel, grid, arguments, constants, num_warps, num_stages) -> Launch:
        """A launch with just those arguments and constants that the kernel names."""
        names = set(kernel.arg_names)
        return cls(
            kernel,
            grid,
            {name: value for name, value in arguments.items() if name in names},
            {name: value for name, value in constants.items() if name in names},
            num_warps,
            num_stages,
        )

    def run(self) -> None:
        """Runs the kernel on the device of its tensors, whichever device is the current one."""
        if 0 in self.grid:
            return
        with _device_of(self.arguments.values()):
            self.kernel[self.grid](
                **self.arguments,
                **self.constants,
                num_warps=self.num_warps,
                num_stages=self.num_stages,
                enable_fp_fusion=self.fp_fusion,
            )

    def compile(self, target: GPUTarget) -> CompiledKernel:
        """Compiles the kernel for `target` as `run` would, without a GPU; tensors may be on the meta device."""
        signature, constants, attributes = {}, dict(self.constants), {}
        for index, name in enumerate(self.kernel.arg_names):
            value = self.arguments.get(name)
            if name in constants or value is None or (isinstance(value, int) and value == 1):
                # As at run time: constants, absent tensors, and sizes or strides of 1 are compiled in.
                signature[name] = "constexpr"
                constants.setdefault(name, value)
                continue
            if isinstance(value, torch.Tensor):
                signature[name] = _POINTERS[value.dtype]
                attributes[(index,)] = [["tt.divisibility", 16]]
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i32" if abs(value) < 2**31 else "i64"
                if value % 16 == 0:
                    attributes[(index,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, attributes)
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": self.fp_fusion}
        return triton.compile(source, target=target, options=options)


def _device_of(arguments: Iterable[Any]) -> AbstractContextManager:
    """What makes the GPU of the first tensor the current one: Triton launches on the current device and its stream."""
    device = next((value.device for value in arguments if isinstance(value, torch.Tensor)), None)
    if device is None or device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def strides(name: str, tensor: torch.Tensor | None, axes: str = "bhnd") -> dict[str, int]:
    """The strides of a tensor as kernel arguments `<name>_<axis>`, one letter an axis."""
    values = (0,) * len(axes) if tensor is None else tensor.stride()
    return {f"{name}_{axis}": value for axis, value in zip(axes, values, strict=True)}


def unit_strides(name: str, tensor: torch.Tensor | None, axes: str = "bhnd") -> tuple[dict[str, int], dict[str, int]]:
    """The strides of a tensor as kernel arguments in units, one letter an axis, and the unit as a constant.

    Where the last axis is dense and every other stride divides by 8, the unit is 8 elements: the kernel multiplies by
    a constant 8, and the compiler sees that rows begin at multiples of 16 bytes also where 16 divides no stride, as
    for a head dimension of 40, 72 or 88. Elsewhere the unit is 1. Axes of size 1 have the stride 0, or 1 for the last
    one.

    Returns:
        `{<name>_<axis>: …}`, of which the last is always in elements, and `{<NAME>_UNIT: …}`.
    """
    unit_name = f"{name.upper()}_UNIT"
    if tensor is None:
        return {f"{name}_{axis}": 0 for axis in axes}, {unit_name: 1}
    sizes, steps = tensor.shape, tensor.stride()
    outer = [step if size > 1 else 0 for size, step in zip(sizes[:-1], steps[:-1], strict=True)]
    last = steps[-1] if sizes[-1] > 1 else 1
    unit = 8 if last == 1 and all(step % 8 == 0 for step in outer) else 1
    values = (*(step // unit for step in outer), last)
    return ({f"{name}_{axis}": value for axis, value in zip(axes, values, strict=True)}, {unit_name: unit})


def next_power_of_2(size: int) -> int:
    """The power of two that holds `size`; Triton's own function of that name takes microseconds."""
    return 1 << (size - 1).bit_length()


def padded(size: int) -> int:
    """The power of two that holds `size`, at least what a tensor-core product takes."""
    return max(16, next_power_of_2(size))
