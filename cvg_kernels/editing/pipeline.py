"""`StructureContentPipeline`: Gen-1's editor, a clip's structure with other content."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, PriorTransformer, UNetMotionModel
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer, PreTrainedModel

from cvg_kernels.editing.content import content_tokens, embed_images, embed_texts, predict_image_embedding
from cvg_kernels.editing.depth import estimate_depth
from cvg_kernels.editing.given import (
    check_call,
    check_callback,
    check_generator,
    clips_of,
    common_count,
    depth_of,
    images_in,
    pictures_of,
    texts_in,
    texts_of,
)
from cvg_kernels.editing.structure import structure_channels, structure_latents, structure_maps
from cvg_kernels.errors import ArgumentError, is_whole
from cvg_kernels.pipeline.temporal_layers import temporal_layers_off

_EVERYTHING = 1_000_000  # tokens, more than any prompt has


@dataclass
class StructureContentOutput(BaseOutput):
    """What an edit gives.

    Attributes:
        frames: the edited clips, as `output_type` asks; of "pt" `[B, F, 3, H, W]` in [0, 1].
        structure: what was kept of the clips, float32 `[B, F, H, W]` in [0, 1].
    """

    frames: Any
    structure: torch.Tensor


class StructureContentPipeline(DiffusionPipeline):
    """Gives a clip other content and keeps its structure, as Gen-1 does.

        pipe = cvg.shapes.load_editor()
        frames = pipe(video=clip, prompt="a blue square", structure=2).frames[0]

    Structure is the depth of every frame after t_s rounds of blur (`structure_maps`), encoded by the clip's own
    autoencoder and put beside the noisy latents together with t_s. Content is the CLIP embedding of an image, or one
    that the prior predicts from the text, read by cross-attention behind the words of the prompt:

        v̂ = v_∅ + ω (v_c − v_∅),    v = v_θ([z_t, E(s), t_s], t, [words, content])

    where ∅ has the words of the negative prompt and no content, and the structure stays. Gen-1 itself has no words
    there: here they make the maps of words visible to `capture` and steerable by Vico and CVG. Its temporal scale is
    `Gen1(temporal_scale=…)`, attached as to any pipeline.

    Args:
        vae: the autoencoder of the clips' frames.
        text_encoder: makes of the words the tokens that the denoiser reads.
        tokenizer: tokenizer of both text encoders.
        unet: the denoiser; its input has the channels of the latents, of the structure's latents, and 4 of t_s.
        scheduler: any of diffusers' that fits the denoiser's prediction.
        content_encoder: CLIP, of images and texts.
        prior: predicts the embedding of an image from that of a text.
        depth_estimator: a depth model of transformers.
        prior_scheduler: scheduler of a prior that is a diffusion model; `None` where it is a regression.

    Attributes:
        vae_scale_factor: pixels a side of one latent.
        video_processor: makes pictures of tensors.
        model_cpu_offload_seq: the order of the models for diffusers' offloading.
    """

    model_cpu_offload_seq = "depth_estimator->text_encoder->content_encoder->prior->unet->vae"
    _optional_components = ["prior_scheduler", "depth_estimator"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNetMotionModel,
        scheduler: DDIMScheduler,
        content_encoder: CLIPModel,
        prior: PriorTransformer,
        depth_estimator: PreTrainedModel | None = None,
        prior_scheduler: DDIMScheduler | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            content_encoder=content_encoder,
            prior=prior,
            depth_estimator=depth_estimator,
            prior_scheduler=prior_scheduler,
        )
        self.vae_scale_factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor)

    # -- what the denoiser is told

    def encode_prompt(
        self,
        prompt: str | Sequence[str] | None,
        device: torch.device | None = None,
        num_videos_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | Sequence[str] | None = None,
        batch_size: int = 1,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Encodes the words of prompts, and of negative prompts, as `[B, N, C]` each.

        Args:
            prompt: one text or one a clip; `None` for no words.
            device: where to.
            num_videos_per_prompt: clips made of each.
            do_classifier_free_guidance: whether the negative ones are wanted.
            negative_prompt: one text or one a clip; `None` for no words.
            batch_size: clips, where one text, or none, stands for all.
        """

        def encode(text: str | Sequence[str] | None) -> torch.Tensor:
            texts = [text or ""] if text is None or isinstance(text, str) else list(text)
            texts = texts * batch_size if len(texts) == 1 else texts
            tokens = self._tokens(texts).to(device or self._execution_device)
            rows = self.text_encoder(tokens)[0]
            return rows.repeat_interleave(num_videos_per_prompt, 0)

        return encode(prompt), encode(negative_prompt) if do_classifier_free_guidance else None

    def encode_content(
        self,
        prompt: Sequence[str] | None,
        image: torch.Tensor | None,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> torch.Tensor:
        """Embeds content as `[B, D]` of length 1: of images, or, through the prior, of texts.

        Args:
            prompt: the texts, where there is no image.
            image: `[B, 3, H, W]` in [0, 1].
            generator: generator of a diffusion prior, one or one a text.
        """
        if image is not None:
            return embed_images(self.content_encoder, image)
        if prompt is None:
            raise ArgumentError("prompt must be given where there is no image")
        texts = embed_texts(self.content_encoder, self._tokens(prompt).to(self._execution_device))
        return predict_image_embedding(self.prior, texts, self.prior_scheduler, generator=generator)

    def _tokens(self, texts: Sequence[str]) -> torch.Tensor:
        return self.tokenizer(
            list(texts),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids

    def _depth(self, video: torch.Tensor | None, depth: torch.Tensor | None) -> torch.Tensor:
        """Depth `[B, F, H, W]`: that which is given, or the estimate."""
        if depth is not None:
            return depth
        if self.depth_estimator is None:
            raise ArgumentError("depth must be given, since the pipeline has no depth_estimator")
        if video is None:
            raise ArgumentError("video must be given where there is no depth")
        return torch.stack([estimate_depth(self.depth_estimator, clip) for clip in video])

    def _warn_of_long(self, texts: Sequence[str]) -> None:
        """Tells of words that are not read."""
        longest = self.tokenizer.model_max_length
        for text in texts:
            count = len(self.tokenizer(text, truncation=True, max_length=_EVERYTHING).input_ids)
            if count > longest:
                warnings.warn(
                    f"the end of a prompt is not read: {longest} of its {count} tokens are, of {text!r}", stacklevel=4
                )

    # -- the call

    @property
    def guidance_scale(self) -> float:
        """The scale of the call that is under way."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the call that is under way evaluates the denoiser without content, too."""
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """How many steps the call that is under way makes."""
        return self._num_timesteps

    @torch.no_grad()
    def __call__(
        self,
        video: Any = None,
        prompt: str | list[str] | None = None,
        image: Any = None,
        structure: int = 3,
        depth: Any = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 20,
        guidance_scale: float = 3.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Any, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> StructureContentOutput | tuple:
        """Edits clips.

        Args:
            video: a clip, or several of one length: PIL images, arrays `[F, H, W, 3]` or tensors `[F, 3, H, W]` in
                [0, 1], or a batch of such. Only its depth is read.
            prompt: what is to be seen, one text or one a clip. It is the content unless there is an image; its words
                are read as well.
            image: shows what is to be seen: one image (PIL, an array or `[3, H, W]`) or one a clip.
            structure: t_s, rounds of blur that the depth goes through: 0 keeps outlines, 7 next to nothing.
            depth: tensor or array `[F, H, W]` or `[B, F, H, W]`, larger nearer, in the place of an estimate; video may
                be left out then.
            negative_prompt: words of the branch without content.
            height: height of the edited clip in pixels; `None` takes what the denoiser was trained on, as does
                `width`.
            width: likewise.
            num_inference_steps: denoising steps.
            guidance_scale: ω; up to 1 the branch without content is left out.
            generator: source of the noise, one or one a clip.
            latents: noise `[B, C, F, h, w]` of variance 1 to start from, in the place of drawn noise.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: `False` returns the tuple (frames, structure).
            callback_on_step_end: called as (pipe, step, timestep, {"latents": …}) and may return other latents.
            callback_on_step_end_tensor_inputs: only "latents".

        Raises:
            ArgumentError: if an argument does not fit, named with what is accepted.
        """
        check_call(
            video=video,
            prompt=prompt,
            image=image,
            depth=depth,
            negative_prompt=negative_prompt,
            structure=structure,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            output_type=output_type,
        )
        shown = callback_on_step_end_tensor_inputs
        check_callback(callback_on_step_end, shown, self._callback_tensor_inputs)
        prompt, negative = (texts_of("prompt", prompt), texts_of("negative_prompt", negative_prompt))
        self._warn_of_long((prompt or []) + (negative or []))
        device, dtype = self._execution_device, self.unet.dtype
        size = self._size(height, width)
        clips = None if video is None else clips_of(video, size).to(device)
        given = None if depth is None else depth_of(depth, clips, size).to(device)
        depth = self._depth(clips, given)
        batch = common_count(
            video=len(depth), prompt=texts_in(prompt), negative_prompt=texts_in(negative), image=images_in(image)
        )
        check_generator(generator, batch)
        generator = list(generator) if isinstance(generator, tuple) else generator
        if len(depth) == 1:
            depth = depth.expand(batch, -1, -1, -1)
        frames = depth.shape[1]
        longest = self.unet.config.motion_max_seq_length
        if frames > longest:
            raise ArgumentError(f"video must have at most {longest} frames with this denoiser, got {frames}")
        seen = structure_maps(depth, structure)
        channels = structure_channels(structure_latents(self.vae, seen), structure).to(dtype)

        self._guidance_scale = guidance_scale
        guided = self.do_classifier_free_guidance
        words, no_words = self.encode_prompt(prompt, device, 1, guided, negative, batch_size=batch)
        pictures = None if image is None else pictures_of(self.video_processor, image, batch).to(device)
        texts = prompt * batch if texts_in(prompt) == 1 and prompt else prompt
        content = self.encode_content(texts, pictures, generator).to(words.dtype)
        text = torch.cat([words, content_tokens(content, words.shape[-1])], 1)
        if no_words is not None:
            nothing = content_tokens(torch.zeros_like(content), words.shape[-1])
            text = torch.cat([torch.cat([no_words, nothing], 1), text])
            channels = torch.cat([channels] * 2)
        text = text.to(dtype).repeat_interleave(frames, 0)

        self.scheduler.set_timesteps(num_inference_steps, device=device)
        shape = (batch, self.vae.config.latent_channels, *channels.shape[2:])
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        elif not torch.is_tensor(latents) or tuple(latents.shape) != shape:
            given = getattr(latents, "shape", type(latents).__name__)
            raise ArgumentError(f"latents must be a tensor {shape}, got {given}")
        noise: torch.Tensor = latents.to(device, dtype) * self.scheduler.init_noise_sigma
        # a single frame is an image, as in training: time has nothing to add
        with temporal_layers_off(self.unet) if frames == 1 else nullcontext():
            clean = self._denoise(noise, channels, text, generator, callback_on_step_end, shown)
        if output_type == "latent":
            result = clean
        else:
            result = self.video_processor.postprocess_video(self._decode(clean), output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return result, seen
        return StructureContentOutput(frames=result, structure=seen)

    def _denoise(
        self,
        latents: torch.Tensor,
        channels: torch.Tensor,
        text: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None,
        callback: Callable | None,
        shown: Sequence[str],
    ) -> torch.Tensor:
        """Runs the scheduler from noise to clean latents."""
        timesteps = self.scheduler.timesteps
        takes = inspect.signature(type(self.scheduler).step).parameters
        options = {"generator": generator} if "generator" in takes else {}  # of their fresh noise
        self._num_timesteps = len(timesteps)
        # torch.compiler.disable, which diffusers has on it, hides what it takes
        with self.progress_bar(total=len(timesteps)) as bar:  # pyright: ignore[reportCallIssue]
            for index, timestep in enumerate(timesteps):
                noisy = torch.cat([latents] * (len(channels) // len(latents)))
                noisy = self.scheduler.scale_model_input(noisy, timestep)
                prediction = self.unet(
                    torch.cat([noisy, channels], 1), timestep, encoder_hidden_states=text, return_dict=False
                )[0]
                if self.do_classifier_free_guidance:
                    without, with_content = prediction.chunk(2)
                    prediction = without + self._guidance_scale * (with_content - without)
                latents = self.scheduler.step(prediction, timestep, latents, return_dict=False, **options)[0]
                if callback is not None:
                    values = {"latents": latents} if "latents" in shown else {}
                    latents = (callback(self, index, timestep, values) or {}).get("latents", latents)
                bar.update()
        return latents

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Frames `[B, 3, F, H, W]` in [−1, 1]."""
        flat = latents.transpose(1, 2).flatten(0, 1) / self.vae.config.scaling_factor
        pixels = self.vae.decode(flat.to(self.vae.dtype)).sample
        return pixels.unflatten(0, (len(latents), -1)).transpose(1, 2)

    # -- what is given, checked

    def _size(self, height: int | None, width: int | None) -> tuple[int, int]:
        known = self.unet.config.sample_size
        known = (known, known) if isinstance(known, int) else tuple(known)
        factor = self.vae_scale_factor * 2 ** (len(self.unet.config.block_out_channels) - 1)
        size = []
        for name, asked, latent in zip(("height", "width"), (height, width), known, strict=True):
            pixels = latent * self.vae_scale_factor if asked is None else asked
            if not is_whole(pixels, 1) or pixels % factor:
                raise ArgumentError(f"{name} must be a multiple of {factor}, got {asked!r}")
            size.append(pixels)
        return tuple(size)
