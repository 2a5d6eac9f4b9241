"""Similarity of texts to exemplars: cosines of sentence embeddings.

The cosines are pure numpy; the encoder is loaded on the first text. N texts, M exemplars, D widths.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jobs import catalog
from jobs.errors import ModelError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def cosine_similarity(texts_ND: np.ndarray, exemplars_MD: np.ndarray) -> np.ndarray:
    """Cosine of every text with every exemplar.

    Args:
        texts_ND: Embeddings, shape (texts, width), any float dtype; computed in float64.
        exemplars_MD: Same, shape (exemplars, width).

    Returns:
        Shape (texts, exemplars), float64, from -1 to 1; NaN where an embedding is zero.

    Raises:
        ValueError: If the widths differ.
    """
    if texts_ND.shape[1] != exemplars_MD.shape[1]:
        raise ValueError(f"texts are {texts_ND.shape[1]} wide, exemplars {exemplars_MD.shape[1]}")
    cosines_NM: np.ndarray = _unit(texts_ND) @ _unit(exemplars_MD).T
    return cosines_NM.clip(-1.0, 1.0)


def _unit(embeddings_ND: np.ndarray) -> np.ndarray:
    wide_ND = embeddings_ND.astype(np.float64)
    norms_N1 = np.linalg.norm(wide_ND, axis=1, keepdims=True)
    return wide_ND / np.where(norms_N1 == 0, np.nan, norms_N1)


def embed(texts: Sequence[str], encoder: str) -> np.ndarray:
    """Embeddings of the texts, shape (texts, width), float32; computed on the CPU.

    The encoder reads the beginning of a long text only: 256 word pieces in the case of all-minilm-l6-v2.

    Args:
        texts: Any texts; half surrogate pairs are read as question marks.
        encoder: A name that `steersweep models add` knows, a folder, or a Hugging Face id with an optional
            `@revision`.

    Raises:
        ModelError: If there is no such encoder on this machine, or sentence-transformers is absent.
    """
    clean = [text.encode("utf-8", "replace").decode() for text in texts]
    loaded = _load(catalog.resolve(encoder))
    return np.asarray(loaded.encode(clean, convert_to_numpy=True, show_progress_bar=False), dtype=np.float32)


@functools.cache
def _load(encoder: str) -> "SentenceTransformer":
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ModelError("an encoder needs the package sentence-transformers; run `make install`") from error
    name, _, revision = (encoder, "", "") if Path(encoder).is_dir() else encoder.partition("@")
    try:
        return SentenceTransformer(name, device="cpu", revision=revision or None)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load the encoder {encoder!r}: {error}") from error


def exemplar_cosines(
    texts: Sequence[str], exemplars: Sequence[Sequence[str]], encoder: str
) -> list[np.ndarray]:
    """For each text, its cosines with its own exemplars; NaN for a text or exemplar of white space alone.

    Every distinct text is embedded once.

    Raises:
        ModelError: As `embed` does.
    """
    spoken = {text for group in (texts, *exemplars) for text in group if text.strip()}
    distinct = sorted(spoken)
    if not distinct:
        return [np.full(len(own), np.nan) for own in exemplars]
    embeddings = embed(distinct, encoder)
    rows = dict(zip(distinct, embeddings, strict=True))
    blank = np.zeros(embeddings.shape[1])

    def stacked(group: Sequence[str]) -> np.ndarray:
        return np.stack([rows.get(text, blank) for text in group])

    return [
        cosine_similarity(stacked([text]), stacked(own))[0] if own else np.empty(0)
        for text, own in zip(texts, exemplars, strict=True)
    ]
