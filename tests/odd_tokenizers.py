"""SentencePiece models with other flags than the trainer's own, for tests of what must not depend on them."""

from __future__ import annotations

import io
from collections.abc import Iterable

from sentencepiece import SentencePieceTrainer


def bpe_model(texts: Iterable[str], vocab_size: int, **flags: object) -> bytes:
    """Trained with byte fallback and the competition's special pieces; `flags` add to that or replace it."""
    written = io.BytesIO()
    defaults = {
        "model_type": "bpe",
        "byte_fallback": True,
        "add_dummy_prefix": False,
        "pad_id": 0,
        "bos_id": 1,
        "eos_id": 2,
        "unk_id": 3,
        "num_threads": 1,
        "minloglevel": 2,
    }
    SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=written, vocab_size=vocab_size, **(defaults | flags)
    )
    return written.getvalue()
