"""Folders of diffusers and transformers models, checked before these libraries read them; and when their hub is asked.

The libraries fall back to pickled weights where there are no others, older ones import what `model_index.json` names,
and none asks whether a configuration fits its weights before it fills the memory.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

from cvg_kernels.errors import ArgumentError
from cvg_kernels.reading import read_object, tensor_headers

#: What pickled weights end in.
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_LIBRARIES = ("diffusers", "transformers")
#: Settings that are counts of blocks: no network has more, and a larger one would never be made.
_COUNTS, _MOST_BLOCKS = re.compile(r"layers|blocks|depth\b"), 4096
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
#: A model of the hub has a name, or an owner and a name.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def options_for(model: str | Path, argument: str = "--model") -> dict[str, Any]:
    """The options with which `from_pretrained` may load what a user named: no pickles, no code, no unasked download.

    A name that is no folder here is one of the Hugging Face hub. That is asked unless `HF_HUB_OFFLINE` (or
    `TRANSFORMERS_OFFLINE`) is set, which a line on standard error says before it happens.

    Args:
        model: a folder, or a name on the hub.
        argument: that the user gave it with.

    Returns:
        `local_files_only`, `use_safetensors` and `trust_remote_code`.

    Raises:
        ArgumentError: for a file, or a name that is none of the hub.
    """
    options = {"use_safetensors": True, "trust_remote_code": False}
    path = Path(model)
    if str(model) and path.is_dir():
        return options | {"local_files_only": True}
    if path.exists():
        raise ArgumentError(f"{argument} must be a folder or a name on the hub, got the file {model}")
    if not _HUB_ID.fullmatch(str(model)) or ".." in str(model):
        raise ArgumentError(f"{argument} must be a folder or a name on the hub, got {str(model)!r}")
    if is_offline():
        return options | {"local_files_only": True}
    place = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    print(
        f"{argument} {str(model)!r} is no folder here: asking {place} for it, which downloads what the cache has not "
        "(HF_HUB_OFFLINE=1 prevents it)",
        file=sys.stderr,
        flush=True,
    )
    return options | {"local_files_only": False}


def is_offline() -> bool:
    """Whether the environment says that the hub is not to be asked."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in names)


def reason_of(error: BaseException, model: str | Path) -> str:
    """Why a model did not load, in one line.

    Args:
        error: that the library raised.
        model: a folder, or a name on the hub.
    """
    if is_offline() and not Path(model).exists():
        return "it is neither a folder nor in the hub's cache, and HF_HUB_OFFLINE is set"
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {text}"


def check_pipeline(folder: Path) -> dict[str, Any]:
    """Checks a pipeline's folder: its index, and the configuration and weights of each component.

    Args:
        folder: with `model_index.json`.

    Returns:
        The index.

    Raises:
        ArgumentError: if the index names code, or a component is not as `check_model` wants.
    """
    path = folder / "model_index.json"
    index = read_object(path)
    kind = index.get("_class_name")
    if not isinstance(kind, str) or not kind.isidentifier():
        raise ArgumentError(f"{path} must name a class of diffusers, code of its own is not run: {kind!r}")
    for name, given in index.items():
        if name.startswith("_") or not isinstance(given, list):
            continue  # settings of the pipeline
        if not name.isidentifier() or len(given) != 2:
            raise ArgumentError(f"{path} must name components and their classes, got {name!r:.60}")
        library, component = given
        if library is None and component is None:
            continue
        if not isinstance(component, str) or not _is_library(library):
            raise ArgumentError(
                f"{path} must name classes of {' and '.join(_LIBRARIES)}, other code is not imported: {name} is "
                f"{given!r}"
            )
        if (folder / name).is_dir():
            check_model(folder / name)
    return index


def check_model(folder: Path) -> None:
    """Checks a component's folder, without reading its weights.

    Raises:
        ArgumentError: for a configuration that is no JSON object, or asks for more blocks than any network has;
            weights that are pickled only, no safetensors files, or said to lie elsewhere.
    """
    for name in ("config.json", "scheduler_config.json", "tokenizer_config.json"):
        path = folder / name
        if path.exists() and name != "tokenizer_config.json":  # which has numbers of 31 digits
            _check_counts(path, read_object(path))
    files = sorted(path.name for path in folder.iterdir())
    pickled = [name for name in files if name.endswith(_PICKLES)]
    safe = [name for name in files if name.endswith(".safetensors")]
    for name in files:
        if name.endswith(".safetensors.index.json"):
            _check_shards(folder / name)
    if pickled and not safe:
        raise ArgumentError(
            f"{folder} must hold safetensors, got pickled weights ({pickled[0]}), which could run code and are never "
            "loaded: save the model again with save_pretrained(…, safe_serialization=True)"
        )
    for name in safe:
        tensor_headers(folder / name)


def numbers_in(folder: Path) -> int:
    """How many numbers the weights in a component's folder have."""
    total = 0
    for path in folder.glob("*.safetensors"):
        for head in tensor_headers(path).values():
            count = 1
            for size in head.shape:
                count *= size
            total += count
    return total


def _is_library(name: Any) -> bool:
    """Whether a component's library is one that may be loaded from: these two, or a pipeline's module in diffusers."""
    if not isinstance(name, str) or not name.isidentifier():
        return False
    if name in _LIBRARIES:
        return True
    import diffusers.pipelines

    found = getattr(diffusers.pipelines, name, None)
    return getattr(found, "__name__", "").startswith("diffusers.")


def _check_counts(path: Path, config: dict[str, Any]) -> None:
    waiting = [("", config)]
    while waiting:
        where, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [(str(name), one) for name, one in value.items()]
        elif isinstance(value, list):
            waiting += [(where, one) for one in value]
        elif isinstance(value, int) and _COUNTS.search(where) and value > _MOST_BLOCKS:
            raise ArgumentError(f"{path} must have {where} of at most {_MOST_BLOCKS}, got {value}")


def _check_shards(path: Path) -> None:
    """Checks the index of weights in several files: these lie beside it."""
    shards = read_object(path).get("weight_map")
    if not isinstance(shards, dict):
        raise ArgumentError(f"{path} must say in which file each weight is, got no weight_map")
    for name in set(map(str, shards.values())):
        if not _NAME.fullmatch(name) or not name.endswith(".safetensors"):
            raise ArgumentError(f"{path} must name safetensors files beside it, got {name!r:.120}")
        if not (path.parent / name).is_file():
            raise ArgumentError(f"{path} names {name}, which is not there")
