"""CLIP's tokenizer: byte-pair encoding of lower-cased text (arXiv 2103.00020, section 2.4)."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

if TYPE_CHECKING:
    import tokenizers

_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
_DEFAULTS = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "model_max_length": 77,
}
_NO_LIMIT = 10**20  # a larger length means that none was set
_MATCHING = ("single_word", "lstrip", "rstrip", "normalized")  # how a special token is found in a text

# A word is one of these, in this order: the ending of a contraction, letters, one digit, other signs.
_WORD = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


class Tokenizer:
    """Turns texts into rows of token ids: start, at most `length` - 2 tokens of the text, end, padding.

        tokenizer = Tokenizer.from_pretrained("stable-diffusion-v1-5/tokenizer")
        ids = tokenizer(["a photo of a cat", ""])  # (2, 77) int32

    A special token that stands in a text becomes that token. SDXL's second tokenizer pads with "!", which its config
    declares a special token: "!" in a text becomes the padding's id there, and not that of the word "!".

    Attributes:
        length: tokens in a row.
    """

    def __init__(self, encoder: "tokenizers.Tokenizer", *, start: int, end: int, padding: int, length: int):
        """Takes what `from_pretrained` reads.

        Args:
            encoder: splits texts, finds special tokens in them, and gives ids.
            start: id before a text.
            end: id after a text.
            padding: id of all places after that.
            length: tokens in a row, at least 2.
        """
        self._encoder = encoder
        self._start, self._end, self._padding = start, end, padding
        self.length = length

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> Self:
        """Reads a tokenizer.

        Args:
            folder: holds tokenizer.json, or else vocab.json and merges.txt. Its tokenizer_config.json and
                special_tokens_map.json, if any, name special tokens and length; by default the end token pads to 77.

        Raises:
            ValueError: names the file that is missing or damaged, or the special token that the vocabulary lacks.
        """
        folder = Path(folder)
        config: dict[str, Any] = dict(_DEFAULTS)
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            if (folder / name).is_file():
                config.update(_read_json(folder / name))
        config["pad_token"] = config.get("pad_token") or config["eos_token"]
        encoder = _read_encoder(folder, unknown=_content(config["unk_token"]))
        ids = {}
        for role in _ROLES:
            ids[role] = encoder.token_to_id(_content(config[role]))
            if ids[role] is None:
                raise ValueError(f"folder: expected a {role} of the vocabulary in {folder}, got {config[role]!r}")
        _add_special_tokens(encoder, folder, config)
        length = config["model_max_length"]
        if type(length) is not int or length < 2:
            raise ValueError(f"folder: expected a model_max_length of at least 2 in {folder}, got {length!r}")
        length = _DEFAULTS["model_max_length"] if length > _NO_LIMIT else length
        return cls(encoder, start=ids["bos_token"], end=ids["eos_token"], padding=ids["pad_token"], length=length)

    def __call__(self, texts: str | Sequence[str]) -> np.ndarray:
        """Returns ids of the tokens of B texts, (B, length) int32; of one text if `texts` is a string.

        Tokens that have no place are cut off; see `cut`.

        Raises:
            ValueError: a text is not a string.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        rows = np.full((len(texts), self.length), self._padding, np.int32)
        for row, text in zip(rows, texts, strict=True):
            ids = [self._start, *self._encode(text).ids[: self.length - 2], self._end]
            row[: len(ids)] = ids
        return rows

    def cut(self, text: str) -> str:
        """Returns the end of a text whose tokens have no place, "" if all have; ValueError for another thing."""
        starts = [start for start, _ in self._encode(text).offsets]
        return text[starts[self.length - 2] :] if len(starts) > self.length - 2 else ""

    def _encode(self, text: str) -> "tokenizers.Encoding":
        if not isinstance(text, str):
            raise ValueError(f"texts: expected a string or strings, got {text!r}")
        return self._encoder.encode(text, add_special_tokens=False)


def _read_encoder(folder: Path, *, unknown: str) -> "tokenizers.Tokenizer":
    import tokenizers  # only this needs it

    whole, vocabulary, merges = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    if not whole.is_file() and not (vocabulary.is_file() and merges.is_file()):
        raise ValueError(f"folder: expected tokenizer.json, or vocab.json and merges.txt, in {folder}, got neither")
    try:
        if whole.is_file():
            encoder = tokenizers.Tokenizer.from_file(str(whole))
            encoder.no_truncation()
            encoder.no_padding()
            return encoder
        ids = json.loads(vocabulary.read_bytes())
        lines = merges.read_text(encoding="utf-8").splitlines()
        pairs: Any = [tuple(line.split()) for line in lines if not line.startswith("#version")]
        model = tokenizers.models.BPE(ids, pairs, unk_token=unknown, end_of_word_suffix="</w>")
    except Exception as error:  # the library raises no narrower class
        raise ValueError(f"folder: expected the files of a tokenizer in {folder}, got damaged ones: {error}") from error
    encoder = tokenizers.Tokenizer(model)
    normalizers, splitters = tokenizers.normalizers, tokenizers.pre_tokenizers
    one_space = normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
    words = splitters.Split(tokenizers.Regex(_WORD), behavior="removed", invert=True)
    bytes_of_words = splitters.ByteLevel(add_prefix_space=False, use_regex=False)
    encoder.normalizer = normalizers.Sequence([normalizers.NFC(), one_space, normalizers.Lowercase()])
    encoder.pre_tokenizer = splitters.Sequence([words, bytes_of_words])
    return encoder


def _add_special_tokens(encoder: "tokenizers.Tokenizer", folder: Path, config: Mapping[str, Any]) -> None:
    """Makes the encoder find the tokens that a config describes, except those that it finds already."""
    from tokenizers import AddedToken

    numbered = [(int(number), token) for number, token in config.get("added_tokens_decoder", {}).items()]
    for number, token in [*sorted(numbered, key=lambda pair: pair[0]), *((None, config[role]) for role in _ROLES)]:
        content, fields = _content(token), token if isinstance(token, Mapping) else {}
        found = {added.content for added in encoder.get_added_tokens_decoder().values()}
        if content not in found:
            matching = {field: bool(fields.get(field, False)) for field in _MATCHING}
            encoder.add_special_tokens([AddedToken(content, **matching)])
        if number is not None and encoder.token_to_id(content) != number:
            got = f"{content!r} with id {encoder.token_to_id(content)}"
            raise ValueError(f"folder: expected the ids of added_tokens_decoder in {folder}, got {got}")


def _content(token: Any) -> str:
    """The token itself, where a config holds a mapping that describes it, too; "" where it holds something else."""
    token = token.get("content") if isinstance(token, Mapping) else token
    return token if isinstance(token, str) else ""


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"folder: expected JSON in {path}, got: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"folder: expected a mapping in {path}, got {type(found).__name__}")
    return found
