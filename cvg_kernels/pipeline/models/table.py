"""The table of denoisers: class → what is known of it, or why it is left out."""

from __future__ import annotations

from cvg_kernels.pipeline.models import cross, joint, unets, wan
from cvg_kernels.pipeline.models.model import Model

MODELS: dict[str, Model] = {
    "UNetMotionModel": unets.UNET_MOTION,
    "UNet3DConditionModel": unets.UNET_3D,
    "I2VGenXLUNet": unets.I2VGENXL,
    "UNetSpatioTemporalConditionModel": unets.UNET_SPATIO_TEMPORAL,
    "LatteTransformer3DModel": unets.LATTE,
    "WanTransformer3DModel": wan.WAN,
    "WanVACETransformer3DModel": wan.WAN,
    "WanAnimateTransformer3DModel": wan.WAN,
    "SkyReelsV2Transformer3DModel": wan.WAN,
    "ChronoEditTransformer3DModel": wan.WAN,
    "HeliosTransformer3DModel": wan.WAN,
    "AnyFlowTransformer3DModel": wan.ANYFLOW,
    "AnyFlowFARTransformer3DModel": wan.ANYFLOW_FAR,
    "CogVideoXTransformer3DModel": joint.COGVIDEOX,
    "ConsisIDTransformer3DModel": joint.COGVIDEOX,
    "EasyAnimateTransformer3DModel": joint.EASYANIMATE,
    "HunyuanVideoTransformer3DModel": joint.HUNYUAN,
    "HunyuanVideoFramepackTransformer3DModel": joint.FRAMEPACK,
    "HunyuanVideo15Transformer3DModel": joint.HUNYUAN_15,
    "MochiTransformer3DModel": joint.MOCHI,
    "MotifVideoTransformer3DModel": joint.MOTIF,
    "LTXVideoTransformer3DModel": cross.LTX,
    "LTX2VideoTransformer3DModel": cross.LTX2,
    "AllegroTransformer3DModel": cross.ALLEGRO,
    "CosmosTransformer3DModel": cross.COSMOS,
    "SanaVideoTransformer3DModel": cross.SANA_VIDEO,
    "Kandinsky5Transformer3DModel": cross.KANDINSKY5,
}

#: Denoisers of videos that are not served: class → what is in the way.
LEFT_OUT: dict[str, str] = {
    "UNet2DConditionModel": "it makes images, and a pipeline that makes videos of it tells it nothing of their frames",
    "WanAnimate2Transformer3DModel": "it is called with lists of latents and caches of keys, by modular pipelines "
    "only",
    "Cosmos3OmniTransformer": "text, image and video are one packed sequence, which it puts together itself",
    "Kandinsky6Transformer3DModel": "its blocks call parts of their attention by hand, for video and audio together",
    "Kandinsky6SRTransformer3DModel": "it attends to no text, and to the video by flex attention",
    "SanaWMTransformer3DModel": "it is not verified: it takes cameras, and another network refines what it makes",
    "SanaWMLTX2RefinerTransformer3DModel": "it refines what another network has made",
    "MiniMaxH3Transformer3DModel": "text, image, audio and video are one packed sequence, sorted by index tensors",
}
