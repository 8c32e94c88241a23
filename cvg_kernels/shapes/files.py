"""The files of the shapes pipeline, written so that every release of transformers and diffusers reads them alike."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from cvg_kernels.errors import ArgumentError

_PREFIX = "text_model."
#: Marks of a text's begin and end; the end also stands for padding and for what is unknown.
START, END = "<|startoftext|>", "<|endoftext|>"


def save_tokenizer(
    folder: Path, vocabulary: dict[str, int], merges: list[list[str]], length: int
) -> CLIPTokenizer:
    """Writes a tokenizer as `vocab.json` and `merges.txt`, and loads it.

    transformers 4 reads these two alone, transformers 5 reads them where there is no `tokenizer.json`.

    Args:
        folder: where to; it is made.
        vocabulary: token → number.
        merges: pairs of the byte-pair encoding, the first learnt first.
        length: most tokens of a text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "vocab.json", vocabulary)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": length,
        "bos_token": START,
        "eos_token": END,
        "pad_token": END,
        "unk_token": END,
    }
    _write(folder / "tokenizer_config.json", settings)
    return CLIPTokenizer.from_pretrained(folder)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def save_text_encoder(encoder: CLIPTextModel, folder: Path) -> None:
    """Saves a text encoder under the names of weights that all releases know.

    From some release of transformers 5 on, `CLIPTextModel` has no `text_model` inside. The newer ones take names with and
    without it, the older ones only those with it.
    """
    encoder.save_pretrained(folder, safe_serialization=True)
    file = folder / "model.safetensors"
    weights = load_file(file)
    named = {_PREFIX + name.removeprefix(_PREFIX): weight for name, weight in weights.items()}
    renamed = file.with_suffix(".renamed")  # not over the file that `weights` are mapped from
    save_file(named, renamed, metadata={"format": "pt"})
    os.replace(renamed, file)


def load_model(kind: Any, folder: Path) -> Any:
    """Loads a model of diffusers or transformers from a folder whose weights are those of the model, all and no others.

    Their own loading leaves a weight random if the file has none of its name, with a warning at most.

    Args:
        kind: the model's class.
        folder: with its configuration and weights.

    Raises:
        ArgumentError: if weights are missing, left over or of another shape, or the folder holds no such model.
    """
    try:
        model, found = kind.from_pretrained(
            folder,
            output_loading_info=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # they are told below, by name
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ArgumentError(
            f"folder must hold a {kind.__name__}, {folder} does not load: {reason}"
        ) from error
    wrong = [
        f"{what} {_some(found[f'{what}_keys'])}"
        for what in ("missing", "unexpected", "mismatched")
        if found.get(f"{what}_keys")
    ]
    if wrong:
        raise ArgumentError(
            f"folder must hold the weights of a {kind.__name__}, got {folder} with {'; '.join(wrong)}"
        )
    return model


def _some(keys: Iterable[str | tuple], most: int = 4) -> str:
    """The names of some weights; a mismatched one stands before its two shapes."""
    names = sorted(key if isinstance(key, str) else key[0] for key in keys)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
