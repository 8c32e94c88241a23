"""What the files of a shapes pipeline must be."""

from __future__ import annotations

from safetensors.torch import load_file


def written_for_all(folder) -> bool:
    """Names that old and new releases know; and no file that only the newer ones read."""
    names = load_file(folder / "text_encoder" / "model.safetensors")
    files = {path.name for path in (folder / "tokenizer").iterdir()}
    return all(name.startswith("text_model.") for name in names) and files == {
        "vocab.json",
        "merges.txt",
        "tokenizer_config.json",
    }
