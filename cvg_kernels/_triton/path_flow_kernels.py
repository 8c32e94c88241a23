"""Min-max flow in Triton: one hop forward, and its gradient.

A hop takes the flow x of K tokens through a matrix of edges at every position,

    y[k, i, l] = max_r min(edge[l, i, r], x[k, r, l]),    edge = hop_weight · hop + skip_weight · I,

and the soft form puts T log Σ exp(·/T) in the place of max, and likewise of min. A tile holds rows × tokens ×
positions: positions lie next to each other in memory, and one load of an edge serves all tokens of the tile. The
min-max product of plain matrices is the same with one token, its columns as positions, and edges that do not depend on
the position.

Hops come as `[B, L, F, F]`, and neighbouring positions lie F² numbers apart: a warp's load of an edge at 32 positions
would touch 32 sectors of 32 bytes, where 4 hold its numbers. `turn_kernel` first writes such a tensor with its
positions innermost, once for all kernels of a call, and every load and store below then moves whole sectors. Bytes of
a hop forward:

    floor  4 L (F² + 2 K F)        here  4 L (3 F² + 2 K F)

from memory, at L = 2560, F = 16, K = 77 27.9 and 33.1 MB; loads of edges repeat for every 8 tokens, 4 L F² ⌈K / 8⌉
bytes, and find them in the second-level cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

_NAN: tl.constexpr = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def soft_narrow(a, b):
    """−log(e^−a + e^−b)."""
    return tl.minimum(a, b) - tl.log(1.0 + tl.exp(-tl.abs(a - b)))


@triton.jit
def hop_vjp(edge, flow, width, grad, temperature, SOFT: tl.constexpr):
    """The shares of edge and flow in the gradient of the width that they lead to.

    Hard: all to the smaller one if the path through it is the widest, half to each if they tie. Soft: both, by
    e^(s − y) with s their soft minimum, divided as the sigmoid of their distance.
    """
    if SOFT:
        to_edge = tl.exp(tl.minimum((width - edge) / temperature, 40.0))
        to_flow = tl.exp(tl.minimum((width - flow) / temperature, 40.0))
        q = 1.0 / (to_edge + to_flow)
        whole = q * q * grad
        return whole * to_edge, whole * to_flow
    whole = tl.where(tl.minimum(edge, flow) == width, grad, 0.0)
    to_edge = tl.where(edge < flow, whole, tl.where(edge == flow, 0.5 * whole, 0.0))
    return to_edge, whole - to_edge


@triton.jit
def tile(ROWS: tl.constexpr, MIDDLE: tl.constexpr, POSITIONS: tl.constexpr, positions):
    """The sample of a program, and the indices of its tile [ROWS, MIDDLE, POSITIONS], each along its own axis."""
    tiles = tl.cdiv(positions, POSITIONS)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    l = tl.program_id(0) % tiles * POSITIONS + tl.arange(0, POSITIONS).to(tl.int64)
    middle = tl.program_id(1) * MIDDLE + tl.arange(0, MIDDLE).to(tl.int64)
    rows = tl.program_id(2) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    return b, rows[:, None, None], middle[None, :, None], l[None, None, :]


@triton.jit
def turn_kernel(
    given, turned, given_b, given_i, given_r, given_l, rows, depth, positions,
    ROWS: tl.constexpr, DEPTH: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """Copies `given`, a strided [B, rows, depth, L], to a contiguous tensor; tiles are turned in shared memory."""
    b, i, r, l = tile(ROWS, DEPTH, POSITIONS, positions)
    inside = (i < rows) & (r < depth) & (l < positions)
    numbers = tl.load(given + b * given_b + i * given_i + r * given_r + l * given_l, mask=inside)
    tl.store(turned + ((b * rows + i) * depth + r) * positions + l, numbers, mask=inside)


@triton.jit
def load_edge(hop, i, r, l, hop_l, hop_i, hop_r, inside, hop_weight, skip_weight):
    """Edges with the skip connection mixed in, 0 outside."""
    edge = tl.load(hop + i * hop_i + r * hop_r + l * hop_l, mask=inside, other=0.0) * hop_weight
    return edge + tl.where((i == r) & inside, skip_weight, 0.0)


@triton.jit
def any_gradient(grad, offsets, first, end, step, inside, COUNT: tl.constexpr):
    """Whether COUNT planes of a gradient, `step` apart, hold a number but 0.

    After a maximum over all positions next to no tile has a gradient; one question to many planes, as each has to wait
    for memory. `offsets` and `inside` are [X, 1, L] or [1, X, L]: the planes are put in place of the axis of size 1.
    """
    planes = first + tl.arange(0, COUNT)
    if offsets.shape[0] == 1:
        planes = planes[:, None, None]
    else:
        planes = planes[None, :, None]
    g = tl.load(grad + offsets + planes.to(tl.int64) * step, mask=inside & (planes < end), other=0.0)
    return tl.max(tl.where(g != 0, 1, 0)) > 0  # NaN is one


@triton.jit
def hop_kernel(
    hop, x, y,
    hop_b, hop_l, hop_i, hop_r, x_b, x_k, x_r, x_l, y_b, y_k, y_i, y_l,
    tokens, rows, depth, positions, hop_weight, skip_weight, temperature,
    SOFT: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """Y of a tile [ROWS, TOKENS, POSITIONS]."""
    b, i, k, l = tile(ROWS, TOKENS, POSITIONS, positions)
    edges, flows = (i < rows) & (l < positions), (k < tokens) & (l < positions)
    hop += b * hop_b
    x += b * x_b

    most = tl.full([ROWS, TOKENS, POSITIONS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS, TOKENS, POSITIONS], tl.float32)
    for r in range(depth):
        edge = load_edge(hop, i, r, l, hop_l, hop_i, hop_r, edges, hop_weight, skip_weight)
        flow = tl.load(x + k * x_k + r * x_r + l * x_l, mask=flows, other=0.0)
        if SOFT:  # log Σ exp with a running maximum
            s = soft_narrow(edge / temperature, flow / temperature)
            above = tl.maximum(most, s)
            total = total * tl.exp(most - above) + tl.exp(s - above)
            most = above
        else:
            narrow = tl.minimum(edge, flow, propagate_nan=_NAN)
            most = tl.maximum(most, narrow, propagate_nan=_NAN)
    if SOFT:
        most = temperature * (most + tl.log(total))
    inside = (i < rows) & flows
    tl.store(y + b * y_b + k * y_k + i * y_i + l * y_l, most, mask=inside)


@triton.jit
def ties_kernel(
    hop, x, y, grad, shared,
    hop_b, hop_l, hop_i, hop_r, x_b, x_k, x_r, x_l, y_b, y_k, y_i, y_l, g_b, g_k, g_i, g_l,
    tokens, rows, depth, positions, hop_weight, skip_weight,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """The gradient of y divided by the number of nodes that its widest path may lead through; laid out as y."""
    b, i, k, l = tile(ROWS, TOKENS, POSITIONS, positions)
    edges, flows = (i < rows) & (l < positions), (k < tokens) & (l < positions)
    inside = (i < rows) & flows
    hop += b * hop_b
    x += b * x_b

    offsets = b * y_b + k * y_k + i * y_i + l * y_l
    width = tl.load(y + offsets, mask=inside, other=0.0)
    ties = tl.zeros([ROWS, TOKENS, POSITIONS], tl.float32)
    for r in range(depth):
        edge = load_edge(hop, i, r, l, hop_l, hop_i, hop_r, edges, hop_weight, skip_weight)
        flow = tl.load(x + k * x_k + r * x_r + l * x_l, mask=flows, other=0.0)
        ties += tl.where(tl.minimum(edge, flow) == width, 1.0, 0.0)
    whole = tl.load(grad + b * g_b + k * g_k + i * g_i + l * g_l, mask=inside, other=0.0)
    tl.store(shared + offsets, whole / tl.maximum(ties, 1.0), mask=inside)


@triton.jit
def flow_gradient_kernel(
    hop, x, y, grad, grad_x,
    hop_b, hop_l, hop_i, hop_r, x_b, x_k, x_r, x_l, y_b, y_k, y_i, y_l, g_b, g_k, g_i, g_l, d_b, d_k, d_r, d_l,
    tokens, rows, depth, positions, hop_weight, skip_weight, temperature,
    SOFT: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """Dx of a tile [ROWS of depth, TOKENS, POSITIONS]: the sum over the rows i that the flow goes on to."""
    b, r, k, l = tile(ROWS, TOKENS, POSITIONS, positions)
    edges, flows = (r < depth) & (l < positions), (k < tokens) & (l < positions)
    inside = (r < depth) & flows
    hop += b * hop_b
    y += b * y_b
    grad += b * g_b

    flow = tl.load(x + b * x_b + k * x_k + r * x_r + l * x_l, mask=inside, other=0.0)
    total = tl.zeros([ROWS, TOKENS, POSITIONS], tl.float32)
    for first in range(0, rows, ROWS):
        if any_gradient(grad, k * g_k + l * g_l, first, rows, g_i, flows, ROWS):
            for i in range(first, tl.minimum(first + ROWS, rows)):
                g = tl.load(grad + k * g_k + i * g_i + l * g_l, mask=flows, other=0.0)
                edge = load_edge(hop, i, r, l, hop_l, hop_i, hop_r, edges, hop_weight, skip_weight)
                width = tl.load(y + k * y_k + i * y_i + l * y_l, mask=flows, other=0.0)
                _, to_flow = hop_vjp(edge, flow, width, g, temperature, SOFT)
                total += to_flow
    tl.store(grad_x + b * d_b + k * d_k + r * d_r + l * d_l, total, mask=inside)


@triton.jit
def hop_gradient_kernel(
    hop, x, y, grad, grad_hop,
    hop_b, hop_l, hop_i, hop_r, x_b, x_k, x_r, x_l, y_b, y_k, y_i, y_l, g_b, g_k, g_i, g_l, d_b, d_l, d_i, d_r,
    tokens, rows, depth, positions, hop_weight, skip_weight, temperature,
    SOFT: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """Dhop of a tile [ROWS, DEPTH, POSITIONS]: the sum over the tokens, in their order."""
    b, i, r, l = tile(ROWS, DEPTH, POSITIONS, positions)
    arriving, leaving = (r < depth) & (l < positions), (i < rows) & (l < positions)
    inside = (r < depth) & leaving
    x += b * x_b
    y += b * y_b
    grad += b * g_b

    edge = load_edge(hop + b * hop_b, i, r, l, hop_l, hop_i, hop_r, inside, hop_weight, skip_weight)
    total = tl.zeros([ROWS, DEPTH, POSITIONS], tl.float32)
    for first in range(0, tokens, DEPTH):
        if any_gradient(grad, i * g_i + l * g_l, first, tokens, g_k, leaving, DEPTH):
            for k in range(first, tl.minimum(first + DEPTH, tokens)):
                g = tl.load(grad + k * g_k + i * g_i + l * g_l, mask=leaving, other=0.0)
                flow = tl.load(x + k * x_k + r * x_r + l * x_l, mask=arriving, other=0.0)
                width = tl.load(y + k * y_k + i * y_i + l * y_l, mask=leaving, other=0.0)
                to_edge, _ = hop_vjp(edge, flow, width, g, temperature, SOFT)
                total += to_edge
    tl.store(grad_hop + b * d_b + l * d_l + i * d_i + r * d_r, total * hop_weight, mask=inside)
