"""Launchers of the backward pass of attention: they allocate, plan and launch.

    row_kernel          δ; t under a band; dq                        a program per tile of queries
    token_key_kernel    rows that chosen tokens add to dk and dv      a program per chunk of the queries
    key_kernel          dk and dv                                    a program per tile of keys, or part of its queries
    add_parts_kernel    the sum of those parts                       a program per tile of keys
    token_bias_kernel   the gradient of the token bias               a program per tile of queries, all heads

Guidance asks for dq only, and then runs the first alone.
"""

from __future__ import annotations

import torch

from cvg_kernels._layout import dense_like
from cvg_kernels._triton.attention_arguments import add_tensor, common, tiled_launch
from cvg_kernels._triton.attention_backward_kernels import key_kernel, row_kernel
from cvg_kernels._triton.attention_backward_tiles import (
    backward_key_tile,
    backward_row_tile,
    backward_token_tile,
    parts_of_queries,
)
from cvg_kernels._triton.attention_backward_token_kernels import add_parts_kernel, token_bias_kernel, token_key_kernel
from cvg_kernels._triton.attention_tiles import Tile, is_hopper, processors_of
from cvg_kernels._triton.launch import INTERPRETED, Launch, padded
from cvg_kernels.ops._attention_call import AttentionCall, AttentionGrads, AttentionResult, Needed

#: Tokens that a program takes at once: their gathered keys and products take registers beside what it holds anyway.
_TOKENS_AT_ONCE = 16


def backward_launches(
    call: AttentionCall, result: AttentionResult, grads: AttentionGrads, needed: Needed,
    *, processors: int | None = None, hopper: bool | None = None,
) -> tuple[list[Launch], tuple[torch.Tensor | None, ...]]:  # fmt: skip
    """The launches of the backward pass, and the gradients that they fill, in the order of `Needed`.

    Args:
        call: the arguments.
        result: what the forward pass gave.
        grads: the gradients that come in.
        needed: which gradients go out.
        processors: multiprocessors to plan for; `None` asks the device.
        hopper: whether to plan for Hopper's products and shared memory; `None` asks the device.
    """
    if processors is None:
        processors = 1 if INTERPRETED else processors_of(call.query.device)
    if hopper is None:
        hopper = not INTERPRETED and is_hopper(call.query.device)
    asked = call
    if call.token_ids is not None and call.token_ids.shape[1] == 0:
        call, grads = call._replace(token_ids=None, token_bias=None), grads._replace(maps=None)
    found = {
        "query": dense_like(call.query) if needed.query else None,
        "key": dense_like(call.key) if needed.key else None,
        "value": dense_like(call.value) if needed.value else None,
        "token_bias": _empty_token_grads(asked) if needed.token_bias else None,
    }
    if needed.value and grads.out is None:
        found["value"].zero_()
        needed = needed._replace(value=False)
    plan = _Plan(call, result, grads, needed, found, processors, hopper)
    launches = [*plan.rows(), *plan.keys(), *plan.token_bias()]
    return launches, tuple(found.values())


def backward(
    call: AttentionCall, result: AttentionResult, grads: AttentionGrads, needed: Needed
) -> tuple[torch.Tensor | None, ...]:
    """Returns the gradients asked for; see `AttentionCall`."""
    launches, found = backward_launches(call, result, grads, needed)
    for launch in launches:
        launch.run()
    return found


def _empty_token_grads(call: AttentionCall) -> torch.Tensor:
    return call.token_bias.new_empty(call.token_bias.shape)


class _Plan:
    """The launches of one backward pass, and what they share."""

    def __init__(self, call, result, grads, needed, found, processors, hopper) -> None:
        self.call, self.grads, self.needed, self.found = call, grads, needed, found
        self.processors = processors
        self.batch, self.heads, self.queries, self.dim = call.query.shape
        self.key_count = call.key.shape[2]
        self.value_dim = self.dim if call.value is None else call.value.shape[3]
        self.tokens = 0 if call.token_ids is None else call.token_ids.shape[1]
        self.size = (max(self.dim, self.value_dim), call.query.element_size(), hopper)
        self.token_rows = self.tokens > 0 and (grads.maps is not None or call.token_bias is not None)
        through_max = call.band is not None and call.band.row_max_grad
        self.through_max = through_max and (needed.query or needed.key)
        self.keep_delta = needed.key or needed.token_bias
        arguments, self.constants = common(call)
        no_band = {"query_frames": None, "key_frames": None, "falloff2": 0.0, "strength": 0.0}
        self.arguments = no_band | arguments
        self._add(result)

    def _add(self, result: AttentionResult) -> None:
        """Adds what only the backward pass has to the arguments."""
        arguments, constants, grads = self.arguments, self.constants, self.grads
        grad_out = grads.out
        if grad_out is not None and grad_out.stride(-1) != 1:
            grad_out = grad_out.contiguous()
        arguments |= {
            "lse": result.lse, "row_max": result.row_max, "row_argmax": result.row_argmax,
            "grad_maps": None if grads.maps is None else grads.maps.contiguous(),
            "grad_lse": None if grads.lse is None else grads.lse.contiguous(),
            "delta": torch.empty_like(result.lse) if self.keep_delta else None,
            "through_max": torch.empty_like(result.lse) if self.through_max else None,
            "grad_token_bias": self.found["token_bias"], "batch": self.batch,
        }  # fmt: skip
        add_tensor(arguments, constants, "grad_out", grad_out)
        add_tensor(arguments, constants, "out", None if grad_out is None else result.out)
        for name in ("query", "key", "value"):
            add_tensor(arguments, constants, f"grad_{name}", self.found[name])
        constants |= {
            "HAS_OUT": grad_out is not None,
            "HAS_MAPS": grads.maps is not None,
            "HAS_LSE": grads.lse is not None,
            "TOKENS_PAD": _TOKENS_AT_ONCE,
            "THROUGH_MAX": self.through_max,
            "KEEP_DELTA": self.keep_delta,
            "NEED_QUERY": self.needed.query,
        }  # fmt: skip

    def _launch(self, kernel, grid: tuple[int, ...], tile: Tile, arguments=None, constants=None) -> Launch:
        arguments, constants = (self.arguments | (arguments or {}), self.constants | (constants or {}))
        return tiled_launch(kernel, grid, arguments, constants, tile)

    def rows(self) -> list[Launch]:
        """δ, t and dq; nothing if only dv is needed."""
        if not (self.needed.query or self.keep_delta):
            return []
        tile = backward_row_tile(*self.size, band=self.call.band is not None)
        rest = self.key_count % tile.columns
        # Without tensor cores a tile that stands apart would spill, and the mask costs nothing beside the products.
        peel = self.size[1] < 4
        constants = {"PEEL": peel, "REST": padded(rest) if rest and peel else 0}
        programs = -(-self.queries // tile.rows) * self.batch * self.heads
        return [self._launch(row_kernel, (programs,), tile, constants=constants)]

    def keys(self) -> list[Launch]:
        """Dk and dv."""
        wanted = {"key": self.needed.key, "value": self.needed.value}
        if not any(wanted.values()):
            return []
        launches = self._token_keys()
        # Above 128 the sums of both do not fit into the registers of a program that computes each product once.
        together = self.size[0] <= 128 or self.size[1] == 4 or not all(wanted.values())
        for names in (("key", "value"),) if together else (("key",), ("value",)):
            launches += self._keys_of([name for name in names if wanted[name]])
        return launches

    def _token_keys(self) -> list[Launch]:
        """The rows that chosen tokens add to dk and dv."""
        to_key = self.needed.key and self.token_rows
        to_value = self.needed.value and self.token_rows and self.call.token_bias is not None
        self.added = {"key": to_key, "value": to_value}
        self.arguments |= {"chunks": 1, "token_key_parts": None, "token_value_parts": None}
        if not (to_key or to_value):
            return []
        tile = backward_token_tile(*self.size[:2])
        blocks = -(-self.tokens // _TOKENS_AT_ONCE)
        programs = self.batch * self.heads * blocks
        chunks, rows_each = parts_of_queries(programs, self.queries, tile.rows, self.processors)
        self.arguments["chunks"] = chunks
        for name, dim in (("key", self.dim), ("value", self.value_dim)):
            if self.added[name]:
                self.arguments[f"token_{name}_parts"] = self._parts(chunks, self.tokens, dim)
        grid = (chunks * self.batch * self.heads, blocks)
        constants = {"NEED_KEY": to_key, "NEED_VALUE": to_value}
        return [self._launch(token_key_kernel, grid, tile, {"rows_each": rows_each}, constants)]

    def _parts(self, count: int, length: int, dim: int) -> torch.Tensor:
        """Sums over parts of the queries, before they are added up."""
        return self.call.query.new_empty((count, self.batch, self.heads, length, dim), dtype=torch.float32)

    def _keys_of(self, names: list[str]) -> list[Launch]:
        """One pass over the queries, for dk, dv or both, and what adds up parts and rows of tokens."""
        tile = backward_key_tile(*self.size)
        programs = -(-self.key_count // tile.columns) * self.batch * self.heads
        count, rows_each = parts_of_queries(programs, self.queries, tile.rows, self.processors)
        arguments = {"rows_each": rows_each, "key_factor": self.call.scale}
        constants = {"NEED_KEY": "key" in names, "NEED_VALUE": "value" in names}
        finish = []
        for name in names:
            if count > 1 or self.added[name]:
                dim = self.dim if name == "key" else self.value_dim
                parts = self._parts(count, self.key_count, dim)
                add_tensor(arguments, constants, f"grad_{name}", parts[0])
                finish.append(self._add_parts(name, parts))
                if name == "key":
                    arguments["key_factor"] = 1.0
        return [self._launch(key_kernel, (programs, count), tile, arguments, constants), *finish]

    def _add_parts(self, name: str, parts: torch.Tensor) -> Launch:
        """The sum of parts `[parts, B, H, M, D]` and of what tokens add to it."""
        arguments, constants = {}, {}
        add_tensor(arguments, constants, "grad", self.found[name])
        arguments |= {
            "parts": parts, "count": parts.shape[0], "factor": self.call.scale if name == "key" else 1.0,
            "token_parts": self.arguments[f"token_{name}_parts"],
        }  # fmt: skip
        dim = parts.shape[-1]
        constants |= {"DIM": dim, "DIM_PAD": padded(dim), "ADD_TOKENS": self.added[name]}
        tile = Tile(rows=0, columns=32, warps=4, stages=1)
        grid = (-(-self.key_count // tile.columns) * self.batch * self.heads,)
        return self._launch(add_parts_kernel, grid, tile, arguments, constants)

    def token_bias(self) -> list[Launch]:
        """The gradient of the token bias."""
        if not self.needed.token_bias or not self.tokens:
            return []
        tile = backward_token_tile(*self.size[:2])
        grid = (-(-self.queries // tile.rows) * self.batch, -(-self.tokens // _TOKENS_AT_ONCE))
        return [self._launch(token_bias_kernel, grid, tile)]
