"""Token mixers on (B, H, W, C) maps, one file each: built as `Mixer(features, ..., rngs=)`, called on a map."""

from gspn_jax.mixers.attention import SoftmaxAttention
from gspn_jax.mixers.gspn import GSPNMixer

__all__ = ["GSPNMixer", "SoftmaxAttention"]
