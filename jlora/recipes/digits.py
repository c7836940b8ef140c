"""Scikit-learn's handwritten digits, upright for the base and shifted for the adapters, and a small ViT."""

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

from jlora.errors import DataError
from jlora.fields import integer, refusal
from jlora.paths import leaves_by_path
from jlora.recipes._losses import cross_entropy
from jlora.train import Batches, Examples, fit, init_state, make_train_step

_TEST_SHARE = 0.25
_SIDE, _BRIGHTEST, _CLASSES = 8, 16.0, 10


class Block(nn.Module):
    """A pre-norm transformer block.

    Attributes:
      heads: attention heads.
      hidden: width of the two-layer perceptron.
    """

    heads: int
    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + nn.MultiHeadDotProductAttention(self.heads, name="attention")(nn.LayerNorm()(x))
        hidden = nn.gelu(nn.Dense(self.hidden, name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(x.shape[-1], name="down")(hidden)


class VisionTransformer(nn.Module):
    """A Vision Transformer (Dosovitskiy et al. 2020, arXiv 2010.11929) for images of 8 x 8, without a class token.

    Attributes:
      width, depth, heads, hidden: of the model.
      patch: the side of a patch in pixels.

    Images `(batch, 8, 8)` -> logits `(batch, 10)`.
    """

    width: int = 64
    depth: int = 4
    heads: int = 4
    hidden: int = 128
    patch: int = 2

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = nn.Conv(self.width, (self.patch, self.patch), strides=self.patch, name="patches")(images[..., None])
        x = x.reshape(x.shape[0], -1, self.width)
        x = x + self.param("positions", nn.initializers.normal(0.02), x.shape[1:])
        for layer in range(self.depth):
            x = Block(self.heads, self.hidden, name=f"block_{layer}")(x)
        return nn.Dense(_CLASSES, name="head")(nn.LayerNorm()(x).mean(axis=1))


def data(rotate: int = 90, invert: bool = True) -> tuple[Examples, Examples]:
    """The digits, turned and inverted, as `(train, test)`.

    Args:
      rotate: degrees, a multiple of 90, counter-clockwise.
      invert: whether dark and bright change places.

    Returns:
      Two mappings of `inputs` (n, 8, 8), float32 in [0, 1], and `labels` (n,), int32; three quarters are for training,
      always the same ones.
    """
    from sklearn.datasets import load_digits

    if integer("data.rotate", rotate, -360) % 90:
        raise refusal("data.rotate", rotate, "a multiple of 90")
    if not isinstance(invert, bool):
        raise refusal("data.invert", invert, "true or false")
    digits = load_digits()
    images = (digits.images / _BRIGHTEST).astype(np.float32)
    images = np.rot90(images, rotate // 90, axes=(1, 2))
    images = np.ascontiguousarray(1 - images if invert else images)
    order = np.random.default_rng(0).permutation(len(images))
    tests = int(len(order) * _TEST_SHARE)
    parts = order[tests:], order[:tests]
    train, test = ({"inputs": images[i], "labels": digits.target[i].astype(np.int32)} for i in parts)
    return train, test


def model(
    width: int = 64,
    depth: int = 4,
    heads: int = 4,
    hidden: int = 128,
    patch: int = 2,
    steps: int = 600,
    seed: int = 0,
    cache: str = "~/.cache/jlora",
    console: Console | None = None,
) -> tuple[nn.Module, Any]:
    """The ViT and its base parameters, trained on upright digits once and cached.

    Args:
      width, depth, heads, hidden, patch: of the model.
      steps: of its training, with AdamW.
      seed: of its init and its training.
      cache: the folder of the cache.
      console: where the progress of its training goes.
    """
    sizes = {"width": width, "depth": depth, "heads": heads, "hidden": hidden, "patch": patch}
    for name, value in (*sizes.items(), ("steps", steps)):
        integer(f"model.{name}", value, 1)
    integer("model.seed", seed, 0, 2**32)
    if width % heads:
        raise refusal("model.heads", heads, f"a divisor of width = {width}")
    if _SIDE % patch:
        raise refusal("model.patch", patch, "a divisor of 8, the side of the images")
    if not isinstance(cache, str):
        raise refusal("model.cache", cache, "the path of a folder")
    module = VisionTransformer(width=width, depth=depth, heads=heads, hidden=hidden, patch=patch)
    settings = json.dumps({**sizes, "steps": steps, "seed": seed, "jax": jax.__version__, "recipe": 1})
    file = Path(cache).expanduser() / f"digits-{hashlib.sha256(settings.encode()).hexdigest()[:12]}.npz"
    init = jax.jit(lambda: module.init(jax.random.key(seed), jnp.zeros((1, _SIDE, _SIDE)))["params"])
    cached = _read(file, jax.eval_shape(init))
    if cached is not None:
        return module, cached
    trained = _pretrain(module, init(), steps, seed, console)
    _write(file, trained)
    return module, trained


def _pretrain(module: nn.Module, params: Any, steps: int, seed: int, console: Console | None) -> Any:
    train, _ = data(rotate=0, invert=False)

    def loss(params: Any, _: Any, batch: Examples, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        return cross_entropy(jnp.asarray(module.apply({"params": params}, batch["inputs"])), batch)

    optimizer = optax.adamw(optax.cosine_decay_schedule(2e-3, steps), weight_decay=1e-2)
    step = make_train_step(loss, optimizer, clip_norm=1.0, seed=seed)
    batches = Batches(train, 64, seed)
    return fit(step, init_state(params, optimizer), None, batches, steps=steps, title="base", console=console).trained


def _read(file: Path, like: Any) -> Any:
    """The cached parameters, or None where there are none that can be used."""
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            leaves = [arrays[path] for path in leaves_by_path(like)]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    if any(found.shape != leaf.shape for found, leaf in zip(leaves, jax.tree.leaves(like), strict=True)):
        return None
    return jax.tree.unflatten(jax.tree.structure(like), [jnp.asarray(leaf) for leaf in leaves])


def _write(file: Path, params: Any) -> None:
    arrays: Mapping[str, Any] = {path: np.asarray(leaf) for path, leaf in leaves_by_path(params).items()}
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            np.savez(stream, **arrays)
        os.replace(temporary, file)
    except OSError as error:
        raise DataError(
            f"{file}: the base cannot be cached: {error.strerror}; give model.cache another folder"
        ) from None
