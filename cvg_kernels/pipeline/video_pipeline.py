"""`VideoPipeline`: what a pipeline must have, for type checkers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol


class VideoPipeline(Protocol):
    """What capture and the methods need of a pipeline, for type checkers; every pipeline of diffusers has it.

    Besides what is declared here a pipeline has its components as attributes: a `scheduler`, and as its denoiser a
    `unet` or a `transformer` (`transformer_2` beside it, in Wan 2.2). diffusers sets them when it makes a pipeline and
    declares none, and so does this protocol: a checker lets any name pass, and a pipeline without the one that is
    needed is an `ArgumentError` when it is given. `encode_prompt` is not needed. Nothing has to derive from this.

        def guided(pipe: cvg.VideoPipeline, prompt: str) -> torch.Tensor:
            with cvg.CVG().attach(pipe):
                return pipe(prompt, output_type="pt").frames

    `DiffusionPipeline.from_pretrained` gives checkers the base class, which cannot be called: they accept
    `AnimateDiffPipeline.from_pretrained` and the like.
    """

    @property
    def components(self) -> dict[str, Any]:
        """The parts of the pipeline by name."""
        ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Makes a video."""
        ...

    if TYPE_CHECKING:  # at run time a class that derives from this one has the attributes that it has

        def __getattr__(self, name: str, /) -> Any: ...

        def __setattr__(self, name: str, value: Any, /) -> None: ...
