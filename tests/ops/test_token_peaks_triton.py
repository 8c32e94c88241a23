"""The Triton kernels of token_peaks over several blocks: which of them hold a peak, and gradients across their
borders.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from cvg_kernels._triton import token_peaks  # noqa: E402
from cvg_kernels.reference import token_peaks as reference  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("shape", [(1, 2, 9, 3, 70), (1, 2, 2, 2, 150)], ids=str)
def test_peaks_are_looked_for_in_their_block_alone(shape):
    flow = torch.rand(shape, device=DEVICE)
    flow[0, 0, -1, 1, -7:] += 2  # next to the ends, and 128 places of the other block
    flow[0, 1, 0, 1, 128 - shape[4]] += 2
    grad = torch.tensor([[1.0, -0.7]], device=DEVICE)
    peaks, sums, blocks = token_peaks.forward(flow, 3.0, 0.5)
    assert blocks.shape == token_peaks.blocks_shape(shape) and blocks[0, 0].numel() > 1
    launch, (hits, counts) = token_peaks.hit_launch(flow, sums, blocks, peaks, 3.0, 0.5)
    launch.run()
    assert torch.equal(hits.flatten(2).sum(-1).float(), counts.flatten(2).sum(-1))
    assert torch.equal(counts > 0, blocks == peaks[..., None, None])

    leaf = flow.double().requires_grad_()
    exact = reference.token_peaks(leaf, sharpness=3.0)
    (wanted,) = torch.autograd.grad(exact, leaf, grad.double())
    torch.testing.assert_close(peaks.double(), exact, rtol=1e-5, atol=1e-6)
    found = token_peaks.backward(grad, flow, sums, blocks, 3.0, 0.5)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-6)
    assert torch.equal(found != 0, wanted != 0)
