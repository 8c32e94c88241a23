"""What the backends of `token_peaks` give back besides the peaks, for their own backward pass.

    forward(flow, sharpness, sigma) -> (peaks, sums, blocks)
    backward(grad, flow, sums, blocks, sharpness, sigma) -> the gradient of flow

`sums` `[B, 2, F, h, w]` holds the softmax's largest logit (of kernels the flow of it) and the sum below it. `blocks`
has the smoothed maxima of blocks of voxels, in which a GPU finds the peaks again; the other backends leave zeros in
it, and do not read it.
"""

from __future__ import annotations

#: Places of a frame, and frames, of a block.
BLOCK, FRAMES = 128, 8


def blocks_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of `blocks` for a flow `[B, K, F, h, w]`."""
    batch, tokens, frames, height, width = shape
    return batch, tokens, -(-height * width // BLOCK), -(-frames // FRAMES)
