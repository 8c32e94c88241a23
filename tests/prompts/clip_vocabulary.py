"""CLIP's own vocabulary, from the package open_clip where it is installed, and a tokenizer in Python that reads it."""

from __future__ import annotations

import gzip
import importlib.util
import json
import unicodedata
from pathlib import Path
from typing import Any

import regex
from transformers import CLIPTokenizer, PreTrainedTokenizer

_NAME = "bpe_simple_vocab_16e6.txt.gz"
_BEGIN, _END = "<|startoftext|>", "<|endoftext|>"
_MERGES = 49152 - 256 - 2
_WORDS = regex.compile(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")


def table() -> Path | None:
    """The file of merges; the package is not imported, which would take torchvision."""
    spec = importlib.util.find_spec("open_clip")
    folders = (spec.submodule_search_locations if spec else None) or []
    return next((path for folder in folders if (path := Path(folder) / _NAME).exists()), None)


def byte_letters() -> dict[str, int]:
    """The letter that the vocabulary writes for each byte: itself where it can be seen, else one from U+0100 on."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + at): byte for at, byte in enumerate(rest)}


def write_files(folder: Path) -> None:
    """Writes the table as transformers reads it: vocab.json, merges.txt and the settings of CLIP's text encoder."""
    lines = gzip.decompress(table().read_bytes()).decode("utf-8").split("\n")[1 : _MERGES + 1]
    letters = list(byte_letters())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(line.replace(" ", "") for line in lines)]
    vocabulary = {token: at for at, token in enumerate([*tokens, _BEGIN, _END])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), "utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]), "utf-8")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": _END}
    settings |= {"bos_token": _BEGIN, "eos_token": _END, "unk_token": _END}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")


def fast(folder: Path) -> Any:
    """The tokenizer of transformers, from the files of `write_files`."""
    return CLIPTokenizer.from_pretrained(folder)


class SlowCLIP(PreTrainedTokenizer):
    """CLIP's tokenizer in Python, as its paper's code has it; it knows no offsets."""

    def __init__(self, folder: Path) -> None:
        self._vocabulary = json.loads((folder / "vocab.json").read_text("utf-8"))
        self._names = {at: token for token, at in self._vocabulary.items()}
        lines = (folder / "merges.txt").read_text("utf-8").split("\n")[1:-1]
        self._ranks = {tuple(line.split()): at for at, line in enumerate(lines)}
        self._bytes = byte_letters()
        self._letters = {byte: letter for letter, byte in self._bytes.items()}
        super().__init__(model_max_length=77, bos_token=_BEGIN, eos_token=_END, pad_token=_END, unk_token=_END)

    @property
    def vocab_size(self) -> int:
        return len(self._vocabulary)

    def get_vocab(self) -> dict[str, int]:
        return {**self._vocabulary, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **options: Any) -> list[str]:
        text = "".join(one.lower() for one in unicodedata.normalize("NFC", text))  # no other sigma at the end
        return [token for word in _WORDS.findall(text) for token in self._merged(word)]

    def _merged(self, word: str) -> list[str]:
        parts = [self._letters[byte] for byte in word.encode("utf-8")]
        parts[-1] += "</w>"
        while True:
            pairs = [
                (self._ranks.get(pair, len(self._ranks)), at)
                for at, pair in enumerate(zip(parts, parts[1:], strict=False))
            ]
            rank, at = min(pairs, default=(len(self._ranks), 0))
            if rank == len(self._ranks):
                return parts
            parts[at : at + 2] = [parts[at] + parts[at + 1]]

    def _convert_token_to_id(self, token: str) -> int:
        return self._vocabulary.get(token, self._vocabulary[_END])

    def _convert_id_to_token(self, at: int) -> str:
        return self._names[at]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        read = bytes(self._bytes[letter] for letter in "".join(tokens)).decode("utf-8", errors="replace")
        return read.replace("</w>", " ").strip()

    def build_inputs_with_special_tokens(self, ids: list[int], more: Any = None) -> list[int]:
        return [self._vocabulary[_BEGIN], *ids, self._vocabulary[_END]]
