"""Capture on diffusers: which attention is which, words to tokens, the drop-in processors, and the records."""

import sys
from types import ModuleType

from cvg_kernels.capture.capture import Capture, Record, capture
from cvg_kernels.capture.layer_capture import LayerCapture
from cvg_kernels.capture.processors import ProcessorSwap, processors, use_processors

__all__ = [
    "Capture",
    "LayerCapture",
    "ProcessorSwap",
    "Record",
    "capture",
    "processors",
    "use_processors",
]


class _CallableModule(ModuleType):
    """The folder and its main function share a name, so `cvg_kernels.capture` is both."""

    __call__ = staticmethod(capture)


sys.modules[__name__].__class__ = _CallableModule
