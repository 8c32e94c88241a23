"""The denoisers that are known, and how each one is called.

Supporting another model is one entry, in the file of its family, and its class in `table.py`.
"""

from cvg_kernels.pipeline.models.by_range import TextRange, model_by_range
from cvg_kernels.pipeline.models.grids import unet_grid
from cvg_kernels.pipeline.models.lookup import arguments_of, denoisers_of, known_model, model_of, named_model, unwrap
from cvg_kernels.pipeline.models.model import Grid, Kind, Layers, Model, TextOrder, TextPlace
from cvg_kernels.pipeline.models.table import LEFT_OUT, MODELS

__all__ = [
    "LEFT_OUT",
    "MODELS",
    "Grid",
    "Kind",
    "Layers",
    "Model",
    "TextOrder",
    "TextPlace",
    "TextRange",
    "arguments_of",
    "denoisers_of",
    "known_model",
    "model_by_range",
    "model_of",
    "named_model",
    "unet_grid",
    "unwrap",
]
