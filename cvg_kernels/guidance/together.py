"""Several guidance methods at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cvg_kernels.errors import ArgumentError
from cvg_kernels.guidance.base import Guidance
from cvg_kernels.pipeline.session import PipelineSession
from cvg_kernels.pipeline.video_pipeline import VideoPipeline


@dataclass(frozen=True)
class Together:
    """Methods on one pipeline; those that move the latents of a step do so in turn.

        with cvg.Together((cvg.CVG(), cvg.VSTAR())).attach(pipe) as run:
            frames = pipe("a red circle moving left and a blue square moving right").frames[0]

    Attributes:
        methods: in the order in which they move; those of another `Together` count one by one.

    Examples:
        >>> both = cvg.Together((cvg.Vico(), cvg.VSTAR()))
        >>> [type(method).__name__ for method in both.methods]
        ['Vico', 'VSTAR']
    """

    methods: tuple[Guidance, ...]

    def __post_init__(self) -> None:
        given = self.methods if isinstance(self.methods, Iterable) else (self.methods,)
        methods: list[Guidance] = []
        for one in given:
            methods += one.methods if isinstance(one, Together) else (one,)
        for one in methods:
            if not isinstance(one, Guidance):
                raise ArgumentError(f"methods must hold guidance methods, such as Vico(), got {one!r}")
        if not methods:
            raise ArgumentError("methods must hold at least one method, got none")
        object.__setattr__(self, "methods", tuple(methods))

    def attach(
        self, pipe: VideoPipeline, prompt: str | list[str] | None = None, *, own_loop: bool = False
    ) -> PipelineSession:
        """Connects to a pipeline; a context manager that yields one `Run` for all. See `Guidance.attach`."""
        return PipelineSession(pipe, self.methods, prompt, own_loop=own_loop)
