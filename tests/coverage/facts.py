"""What the oracle cannot see for itself: the sizes of grids, where text mixes, and why something is left out."""

from __future__ import annotations

from tests.pipelines import PipelineCase

Grid = tuple[int, int, int]  # frames, rows, columns

#: Denoiser → full names of its modules in which the tokens of the text mix, or which sum them up.
MIXERS = {
    "HunyuanVideoTransformer3DModel": r"context_embedder",
    "HunyuanVideoFramepackTransformer3DModel": r"context_embedder",
    "HunyuanVideo15Transformer3DModel": r"context_embedder",
    "Kandinsky5Transformer3DModel": r"text_transformer_blocks\.\d+",
    "MochiTransformer3DModel": r"time_embed\.pooler",
    # before the denoiser: a norm over all tokens, and attention among them
    "LTX2VideoTransformer3DModel": r"connectors\.(text_proj_in|video_connector\..*\.attn1)",
}

#: Cases that cannot end in latents, or end in a list of them.
DECODED = ("wan_modular", "framepack")

#: Cases whose pipeline exchanges its scheduler in every run.
OWN_SCHEDULER = ("text2video_zero",)

#: Cases whose pipeline gives the layers other processors in every run, so that a swap before it is undone.
OWN_PROCESSORS = ("text2video_zero",)

#: Cases whose latents cannot be moved: of every frame a scheduler of its own.
UNMOVED = ("skyreels_v2_df",)

#: Frames, rows and columns of the tokens, of cases whose latents are not stated.
_GRIDS: dict[str, Grid] = {
    "wan_vace": (3, 2, 2),
    "wan_animate": (4, 1, 1),
    "skyreels_v2": (3, 2, 2),
    "skyreels_v2_df": (3, 2, 2),
    "skyreels_v2_i2v": (3, 2, 2),
    "chronoedit": (2, 2, 2),
    "anyflow": (3, 2, 2),
    "anyflow_far": (1, 2, 2),  # a frame at a time
    "helios": (9, 2, 2),
    "hunyuan_video": (3, 2, 4),
    "hunyuan_video_true_cfg": (3, 2, 4),
    "hunyuan_skyreels_i2v": (3, 2, 4),
    "hunyuan_video_i2v": (3, 2, 4),
    "framepack": (3, 2, 2),
    "hunyuan_video15": (5, 4, 4),
    "cosmos": (3, 4, 4),
    "cosmos2_video2world": (3, 2, 2),
    "cosmos2_5": (3, 2, 2),
    "ltx": (3, 8, 8),
    "ltx_i2v": (3, 8, 8),
    "ltx_condition": (3, 8, 8),
    "ltx2": (3, 16, 16),
    "mochi": (2, 2, 2),
    "allegro": (2, 2, 3),
    "easyanimate": (2, 1, 1),
    "kandinsky5": (2, 2, 2),
    "sana_video": (3, 2, 2),
    "sana_video_instruction": (3, 2, 2),
    "motif_video": (3, 2, 2),
}

#: Cases whose maps of words are refused, and why; what the table says of them.
WITHOUT_MAPS: dict[str, str] = {
    "svd": "it attends to no text",
    "text2video_zero": "an image model, and its pipeline tells it nothing of frames",
    "animatediff_freenoise_prompts": "the prompt changes on the way, so a word stands in different places",
    "animatediff_freenoise_split": "layers are handed parts of a batch",
}

#: Cases whose denoiser torch cannot differentiate on a CPU, and why.
WITHOUT_GRADIENTS = {"anyflow_far": "flex attention has no backward pass on a CPU"}

_SAME = "no tiny pipeline of its own; the denoiser is covered"
_MODULAR = "modular, and its denoiser has no other pipeline"

#: Pipelines of diffusers that no case stands for, and why.
LEFT_OUT: dict[str, str] = {
    "ConsisIDPipeline": "needs opencv; its denoiser is covered without it",
    "Cosmos2TextToImagePipeline": "makes an image",
    "Cosmos2_5_TransferPipeline": _SAME,
    "Cosmos3OmniPipeline": "one packed sequence of text and video, and no encode_prompt",
    "CosmosVideoToWorldPipeline": _SAME,
    "EasyAnimateControlPipeline": _SAME,
    "EasyAnimateInpaintPipeline": _SAME,
    "HeliosPyramidPipeline": "the grid changes from stage to stage",
    "HunyuanVideo15ImageToVideoPipeline": _SAME,
    "JoyImageEditPipeline": "makes an image",
    "Kandinsky5I2VPipeline": _SAME,
    "Kandinsky6SRPipeline": "no text",
    "Kandinsky6TI2VAPipeline": "its blocks call parts of their attention by hand, for video and audio together",
    "LTX2ConditionPipeline": _SAME,
    "LTX2DFRPipeline": _SAME,
    "LTX2DFRTemporalRefinePipeline": _SAME,
    "LTX2HDRPipeline": _SAME,
    "LTX2ImageToVideoPipeline": _SAME,
    "LTX2InContextPipeline": _SAME,
    "LTX2LatentUpsamplePipeline": "no denoiser",
    "LTX2VideoDiffusionDecodePipeline": "a decoder",
    "LTXI2VLongMultiPromptPipeline": "several prompts on the way, in windows",
    "LTXLatentUpsamplePipeline": "no denoiser",
    "MotifVideoImage2VideoPipeline": _SAME,
    "SanaImageToVideoPipeline": _SAME,
    "SanaWMPipeline": "its attention to the text stands in modules without a processor",
    "SkyReelsV2DiffusionForcingImageToVideoPipeline": _SAME,
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline": _SAME,
    "TextToVideoZeroSDXLPipeline": "an image model; as TextToVideoZeroPipeline",
    "WanAnimate2ModularPipeline": _MODULAR,
    "MiniMaxH3ModularPipeline": _MODULAR,
}


def grids_of(case: PipelineCase) -> set[Grid]:
    """The grids that the layers of a case's network may have; none where no maps are made."""
    if case.name in _GRIDS:
        return {_GRIDS[case.name]}
    if case.name == "i2vgenxl":
        return {(2, 16, 16), (2, 8, 8)}
    if case.latents is None:
        return set()
    frames, rows, columns = case.latents
    if case.denoiser.startswith("UNet"):
        return {(frames, rows, columns), (frames, -(-rows // 2), -(-columns // 2))}
    together = 2 if case.name == "cogvideox15" else 1
    return {(frames // together, rows // 2, columns // 2)}


def video_begins(case: PipelineCase, tokens: int, video: int) -> int:
    """Where the tokens of the video begin in a sequence of video and text.

    Args:
        case: whose.
        tokens: of the sequence.
        video: tokens of the video.
    """
    if case.name == "framepack":
        return 13  # behind the tokens of earlier frames
    last = case.denoiser.startswith(("Hunyuan", "Mochi", "Motif"))
    return 0 if last else tokens - video
