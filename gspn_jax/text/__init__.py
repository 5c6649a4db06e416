"""Prompts to what a text-to-image network sees of them: token ids, then hidden states of CLIP's text towers."""

from gspn_jax.text.clip import CLIPText
from gspn_jax.text.tokenizer import Tokenizer

__all__ = ["CLIPText", "Tokenizer"]
