"""Test weights as a function of (seed, tensor name, element index): no file, no random state, the same in any language.

    fnv1a64(name)  h = 0xcbf29ce484222325; per utf-8 byte: h ^= byte; h *= 0x100000001b3          (mod 2^64)
    mix(z)         z = (z ^ z>>30) * 0xBF58476D1CE4E5B9; z = (z ^ z>>27) * 0x94D049BB133111EB; z ^ z>>31   (mod 2^64)
    key            fnv1a64(name) ^ mix(seed + 0x9E3779B97F4A7C15)
    h(i)           mix(key + (i + 1) * 0x9E3779B97F4A7C15), i the row-major element index
    v(i)           2 * ((h(i) >> 40) * 2^-24) - 1, in [-1, 1), exact in float32
"""

import numpy as np

GOLDEN = 0x9E3779B97F4A7C15
MASK = (1 << 64) - 1


def test_weight(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 weights of the tensor `name`: norms lie around 1, the embedding is wider than the products."""
    v = uniform(seed, name, int(np.prod(shape))).reshape(shape)
    if name.endswith("norm.weight"):  # also layernorm, q_norm and k_norm
        return np.float32(1) + np.float32(0.25) * v
    if name.endswith(".bias"):
        return np.float32(0.5) * v
    if name == "model.embed_tokens.weight":
        return v
    return np.float32(0.25) * v


def uniform(seed: int, name: str, count: int) -> np.ndarray:
    """v(0..count), float32 in [-1, 1)."""
    u = (hashes(seed, name, count) >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
    return np.float32(2) * u - np.float32(1)


def hashes(seed: int, name: str, count: int) -> np.ndarray:
    """h(0..count), uint64."""
    key = fnv1a64(name) ^ int(mix(np.array([(seed + GOLDEN) & MASK], dtype=np.uint64))[0])
    index = np.arange(1, count + 1, dtype=np.uint64)
    return mix(np.uint64(key) + index * np.uint64(GOLDEN))  # numpy arrays of uint64 wrap


def fnv1a64(name: str) -> int:
    h = 0xCBF29CE484222325
    for byte in name.encode("utf-8"):
        h = ((h ^ byte) * 0x100000001B3) & MASK
    return h


def mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
