"""A kernel launch as a value: it can be run, or compiled for a GPU that is not there."""

from __future__ import annotations

import os
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
        """Runs the kernel on the current device."""
        if 0 not in self.grid:
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
        options = {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": self.fp_fusion,
        }
        return triton.compile(source, target=target, options=options)


def strides(name: str, tensor: torch.Tensor | None, axes: str = "bhnd") -> dict[str, int]:
    """The strides of a tensor as kernel arguments `<name>_<axis>`, one letter an axis."""
    values = (0,) * len(axes) if tensor is None else tensor.stride()
    return {f"{name}_{axis}": value for axis, value in zip(axes, values, strict=True)}


def padded(size: int) -> int:
    """The power of two that holds `size`, at least what a tensor-core product takes."""
    return max(16, triton.next_power_of_2(size))
