"""The files of the shapes pipeline, written so that every release of transformers and diffusers reads them alike."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTextModel, CLIPTokenizer, PreTrainedTokenizerFast

from cvg_kernels.errors import ArgumentError
from cvg_kernels.model_folders import check_model, check_pipeline, numbers_in, reason_of
from cvg_kernels.reading import read_object, read_tensors
from cvg_kernels.writing import write_json, write_tensors, write_text, written_folder

_PREFIX = "text_model."
#: Marks of a text's begin and end; the end also stands for padding and for what is unknown.
START, END = "<|startoftext|>", "<|endoftext|>"


def save_tokenizer(folder: Path, vocabulary: dict[str, int], merges: list[list[str]], length: int) -> CLIPTokenizer:
    """Writes a tokenizer as `vocab.json` and `merges.txt`, and loads it.

    transformers 4 reads these two alone, transformers 5 reads them where there is no `tokenizer.json`.

    Args:
        folder: where to; it is made.
        vocabulary: token → number.
        merges: pairs of the byte-pair encoding, the first learnt first.
        length: most tokens of a text.
    """
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": length,
        "bos_token": START,
        "eos_token": END,
        "pad_token": END,
        "unk_token": END,
    }
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with written_folder(folder) as new:
        write_json(new / "vocab.json", vocabulary)
        write_text(new / "merges.txt", "\n".join(lines) + "\n")
        write_json(new / "tokenizer_config.json", settings)
    return load_tokenizer(folder)


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """Loads what `save_tokenizer` wrote.

    Raises:
        ArgumentError: if there is no tokenizer in the folder.
    """
    read_object(folder / "vocab.json")
    return _tokenizer_from(CLIPTokenizer, folder)


def load_fast_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Loads a tokenizer that is one file, `tokenizer.json`.

    Raises:
        ArgumentError: if there is no tokenizer in the folder.
    """
    read_object(folder / "tokenizer.json")
    return _tokenizer_from(PreTrainedTokenizerFast, folder)


def _tokenizer_from(kind: Any, folder: Path) -> Any:
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library behind it raises that class itself
        reason = " ".join(str(error).split())[:300]
        raise ArgumentError(f"folder must hold a tokenizer, {folder} does not load: {reason}") from error


def save_model(model: Any, folder: Path) -> None:
    """Saves a model of diffusers or transformers: its folder is there whole or not at all, without a path.

    Args:
        model: with `save_pretrained`.
        folder: where to.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with written_folder(folder) as new:
        model.save_pretrained(new, safe_serialization=True)
        settings = read_object(new / "config.json")
        settings.pop("_name_or_path", None)
        write_json(new / "config.json", settings)


def save_text_encoder(encoder: CLIPTextModel, folder: Path) -> None:
    """Saves a text encoder under the names of weights that all releases know.

    From some release of transformers 5 on, `CLIPTextModel` has no `text_model` inside. The newer ones take names with
    and without it, the older ones only those with it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with written_folder(folder) as new:
        encoder.save_pretrained(new, safe_serialization=True)
        weights = read_tensors(new / "model.safetensors")
        named = {_PREFIX + name.removeprefix(_PREFIX): one for name, one in weights.items()}
        write_tensors(new / "model.safetensors", named, {"format": "pt"})


@contextmanager
def without_bars() -> Iterator[None]:
    """Keeps diffusers and transformers from drawing bars: what is loaded inside takes a moment."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    shown = [one for one in (of_diffusers, of_transformers) if one.is_progress_bar_enabled()]
    for one in shown:
        one.disable_progress_bar()
    try:
        yield
    finally:
        for one in shown:
            one.enable_progress_bar()


@without_bars()
def load_model(kind: Any, folder: Path) -> Any:
    """Loads a model of diffusers or transformers from a folder whose weights are those of the model, all and no
    others.

    Their own loading leaves a weight random if the file has none of its name, with a warning at most.

    Args:
        kind: the model's class.
        folder: with its configuration and weights.

    Raises:
        ArgumentError: if weights are missing, left over or of another shape, or the folder holds no such model.
    """
    try:
        if not folder.is_dir():
            raise ArgumentError("there is no such folder")
        check_model(folder)
        _check_size(kind, folder)
        model, found = kind.from_pretrained(
            folder,
            output_loading_info=True,
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are told below, by name
        )
    except Exception as error:  # a configuration may be anything, and so is what it leads to
        raise ArgumentError(
            f"folder must hold a {kind.__name__}, {folder} does not load: {reason_of(error, folder)}"
        ) from error
    wrong = [
        f"{what} {_some(found[f'{what}_keys'])}"
        for what in ("missing", "unexpected", "mismatched")
        if found.get(f"{what}_keys")
    ]
    if wrong:
        raise ArgumentError(f"folder must hold the weights of a {kind.__name__}, got {folder} with {'; '.join(wrong)}")
    return model


@without_bars()
def assemble_from(kind: Any, folder: Path, parts: dict[str, Any]) -> Any:
    """Loads what is left of a pipeline when its networks are loaded: tokenizer, scheduler, settings.

    Args:
        kind: the pipeline's class.
        folder: folder of the pipeline.
        parts: components that are loaded already.

    Raises:
        ArgumentError: if the folder holds no such pipeline.
    """
    try:
        check_pipeline(folder)
        return kind.from_pretrained(
            folder, **parts, local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
    except Exception as error:  # as in `load_model`
        raise ArgumentError(
            f"folder must hold a {kind.__name__}, {folder} does not load: {reason_of(error, folder)}"
        ) from error


def load_networks(kind: Any, folder: Path, networks: dict[str, Any], dtype: torch.dtype) -> Any:
    """Loads a pipeline, its networks in a dtype and without bars.

    Args:
        kind: the pipeline's class.
        folder: folder of the pipeline.
        networks: component → its class.
        dtype: dtype of the weights.

    Raises:
        ArgumentError: as `load_model` and `assemble_from`.
    """
    # torch's own `to`: that of diffusers warns of what these networks do not have
    parts = {name: torch.nn.Module.to(load_model(of, folder / name), dtype) for name, of in networks.items()}
    pipe = assemble_from(kind, folder, parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _check_size(kind: Any, folder: Path) -> None:
    """Checks that a configuration asks for no more memory than its weights have, before it is given.

    Raises:
        ArgumentError: if it does.
    """
    with torch.device("meta"):
        if hasattr(kind, "config_class"):
            model = kind(kind.config_class.from_pretrained(folder, local_files_only=True))
        else:
            model = kind.from_config(kind.load_config(folder, local_files_only=True))
    asked, stored = sum(one.numel() for one in model.parameters()), numbers_in(folder)
    if asked > 2 * stored + 2**20:  # weights that are missing are told by name
        raise ArgumentError(f"its configuration asks for {asked} numbers, its weights have {stored}")


def _some(keys: Iterable[str | tuple], most: int = 4) -> str:
    """The names of some weights; a mismatched one stands before its two shapes."""
    names = sorted(key if isinstance(key, str) else key[0] for key in keys)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
