"""The table of denoisers: class → what is known of it, or why it is left out."""

from __future__ import annotations

from cvg_kernels.pipeline.models.joint import COGVIDEOX
from cvg_kernels.pipeline.models.model import Model
from cvg_kernels.pipeline.models.unets import LATTE, UNET_3D, UNET_MOTION
from cvg_kernels.pipeline.models.wan import WAN

MODELS: dict[str, Model] = {
    "UNetMotionModel": UNET_MOTION,
    "UNet3DConditionModel": UNET_3D,
    "LatteTransformer3DModel": LATTE,
    "WanTransformer3DModel": WAN,
    "WanVACETransformer3DModel": WAN,
    "CogVideoXTransformer3DModel": COGVIDEOX,
}

#: Denoisers of videos that are not served: class → what is in the way.
LEFT_OUT: dict[str, str] = {}
