"""What the UNet sees of prompts: embeddings, pooled vectors and SDXL's sizes."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gspn_jax.text_to_image.parts import Parts

# Keyword arguments of the UNet: "context" (B, T, D); for SDXL also "text_embeds" (B, P) and "time_ids" (B, 6).
Condition = dict[str, Any]


class TextEncoders:
    """Tokenizers and text towers of a model.

    Stable Diffusion 1.5 reads the last layer of one tower. SDXL reads the layer before the last of two towers, side by
    side, and the pooled vector of the second (arXiv 2307.01952, section 2.1).
    """

    def __init__(self, parts: Parts):
        self._parts = parts
        self._towers = []
        for tower in parts.text_encoders:
            graph, state = nnx.split(tower)
            self._towers.append((jax.jit(lambda state, ids, graph=graph: nnx.merge(graph, state)(ids)), state))

    def encode(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray | None]:
        """Returns embeddings (B, T, D) and pooled vectors (B, P), None for Stable Diffusion 1.5."""
        found = []
        for tokenizer, (tower, state) in zip(self._parts.tokenizers, self._towers, strict=True):
            found.append(jax.device_get(tower(state, jnp.asarray(tokenizer(prompts)))))
        if len(found) == 1:
            return found[0]["last"], None
        return np.concatenate([each["penultimate"] for each in found], axis=-1), found[-1]["pooled"]

    def condition(self, prompts: Sequence[str], sizes: Sequence[int]) -> Condition:
        """Returns the condition of prompts.

        Args:
            prompts: B texts.
            sizes: original height and width, top and left of the crop, target height and width, in pixels.
        """
        return self._with_sizes(*self.encode(prompts), sizes)

    def negative(self, condition: Condition, negatives: Sequence[str] | None, sizes: Sequence[int]) -> Condition:
        """Returns the condition of negative prompts, or without any: of the empty prompt, or zeros (SDXL)."""
        if negatives is None and self._parts.zero_negative:
            zeros = {name: np.zeros_like(condition[name]) for name in ("context", "text_embeds") if name in condition}
            return {**condition, **zeros}
        return self.condition([""] * len(condition["context"]) if negatives is None else negatives, sizes)

    def _with_sizes(self, context: np.ndarray, pooled: np.ndarray | None, sizes: Sequence[int]) -> Condition:
        if pooled is None:
            return {"context": context}
        ids = np.broadcast_to(np.asarray(sizes, np.float32), (len(context), 6))
        return {"context": context, "text_embeds": pooled, "time_ids": ids}
