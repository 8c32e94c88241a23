"""The definition of every operation, in plain PyTorch: in a checkout the files of python_ref/.

A package that is built has those files in the place of this one (`package-dir` in pyproject.toml).
"""

from pathlib import Path
from typing import TYPE_CHECKING

__path__ = [str(Path(__file__).resolve().parents[2] / "python_ref")]

if TYPE_CHECKING:  # type checkers know nothing of that line
    from python_ref import attention as attention
    from python_ref import coupled_max_flow as coupled_max_flow
    from python_ref import depth_structure as depth_structure
    from python_ref import frame_band_attention as frame_band_attention
    from python_ref import guidance_mix as guidance_mix
    from python_ref import max_flow as max_flow
    from python_ref import min_max_matmul as min_max_matmul
    from python_ref import path_flow as path_flow
    from python_ref import temporal_attention as temporal_attention
    from python_ref import temporal_maps as temporal_maps
    from python_ref import token_peaks as token_peaks
