"""Tiny pipelines with random weights, built without a network: the real classes of diffusers, made small.

Sizes follow the tiny configurations of diffusers' own tests (Apache-2.0). Nothing is built on import.
"""

from tests.pipelines import cogvideox, cosmos, hunyuan, image_unets, latte, ltx2, others, unets, wan, wan_relatives
from tests.pipelines.case import PROMPT, SAME, STEPS, PipelineCase, denoisers, in_float64, run

__all__ = ["PIPELINES", "PROMPT", "SAME", "STEPS", "PipelineCase", "denoisers", "in_float64", "run"]

_FAMILIES = (unets, latte, wan, cogvideox, wan_relatives, hunyuan, cosmos, ltx2, image_unets, others)

#: Every case by its name.
PIPELINES: dict[str, PipelineCase] = {
    case.name: case for family in _FAMILIES for case in vars(family).values() if isinstance(case, PipelineCase)
}
