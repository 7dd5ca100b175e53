"""A data set and a model of a few kilobytes, made from parts that several test files share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from trainer.config import BatchConfig, LimitsConfig, ModelConfig, TrainConfig
from trainer.data.describing import Provenance, describe, sidecar_name
from trainer.data.encoding import Encoder, EncoderSettings
from trainer.data.manifest import DataSet
from trainer.data.shards import write_shard
from trainer.data.tokenizer import train_tokenizer
from trainer.model.gpt import GPT
from trainer.model_file import save_model

WORDS = ["the", "cat", "Sat", "on", "it", "for", "naïve", "漢字", "12", "a", "NASA,"]


def texts(count: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, 30)) + f" ({number})" for number in range(count)]


def make_data_set(
    folder: Path,
    *,
    case_folding: bool = False,
    val: Sequence[str] | None = None,
    sources: Sequence[str] | None = None,
    shard_tokens: int = 200,
) -> DataSet:
    """Train and validation shards, the latter of `shard_tokens` each, with a vocabulary of 330."""
    folder.mkdir(parents=True)
    train = texts(60, 0)
    val = texts(12, 1) if val is None else val
    model = folder / "tokenizer.model"
    model.write_bytes(train_tokenizer(train, vocab_size=330, case_folding=case_folding))
    encoder = Encoder(EncoderSettings(tokenizer=model, case_folding=case_folding))
    names: dict[str, list[str]] = {}
    for split, some, size in (("train", train, 10**8), ("val", val, shard_tokens)):
        encoded = encoder.encode(some)
        names[split] = []
        for number, start in enumerate(range(0, encoded.tokens.size, size)):
            name = f"{split}_{number:06d}.bin"
            names[split].append(name)
            write_shard(folder / name, encoded.tokens[start : start + size])
            if encoded.original_bytes is not None:
                write_shard(folder / sidecar_name(name), encoded.original_bytes[start : start + size])
    if sources is not None:
        (folder / "val_sources.json").write_text(json.dumps(list(sources)))
    provenance = Provenance(
        split="by hand", case_folding=case_folding, val_sources=None if sources is None else "val_sources.json"
    )
    dataset = describe(folder, tokenizer=model.name, train=names["train"], val=names["val"], provenance=provenance)
    dataset.save()
    return dataset


def make_model(path: Path, dataset: DataSet, *, seed: int = 0) -> GPT:
    """A model whose losses differ from token to token, saved as training saves it; windows of 32 tokens."""
    config = TrainConfig(
        limits=LimitsConfig(steps=1),
        batch=BatchConfig(train_batch_tokens=64, train_seq_len=32),
        model=ModelConfig(
            vocab_size=dataset.manifest.vocab_size, num_layers=2, model_dim=32, num_heads=2, num_kv_heads=1
        ),
    )
    torch.manual_seed(seed)
    model = GPT(config.model, config.export)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.3)
    hashes = {"tokenizer_sha256": dataset.manifest.tokenizer.sha256, "val_sha256": dataset.manifest.val_sha256}
    save_model(path, model, config, **hashes)
    return model.eval()
