"""What the matrices of a trained model are multiplied with: E[x x^T] over windows from all over the train shards."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from trainer.data.manifest import DataSet
from trainer.data.token_stream import TokenStream
from trainer.errors import InputError
from trainer.evaluation_attention import use_best_backend
from trainer.model.gpt import GPT

_PASS_TOKENS = 16384


def calibration_windows(dataset: DataSet, *, tokens: int, seq_len: int, vocab_size: int) -> Tensor:
    """(windows, seq_len) int64 on the CPU: as many windows as `tokens` fill, at least one, evenly spread over the train
    tokens and never overlapping; fewer if there are not so many.

    Raises OSError, ShardError for a token outside the vocabulary, or InputError for less than one window.
    """
    stream = TokenStream(dataset.train_shards)
    most = stream.size // seq_len
    if not most:
        raise InputError(
            f"{dataset.path} has {stream.size} train tokens, less than a window of {seq_len} to calibrate GPTQ with; "
            "prepare more data, or set export.rounding to nearest"
        )
    count = min(most, max(1, tokens // seq_len))
    windows = np.empty((count, seq_len), dtype=np.uint16)
    for number, window in enumerate(windows):
        start = number * most // count * seq_len
        stream.require_vocabulary(start, start + seq_len, vocab_size)
        stream.read(start, window)
    return torch.from_numpy(windows.astype(np.int64))


def input_covariances(model: GPT, windows: Tensor, device: torch.device) -> dict[str, Tensor]:
    """E[x x^T], float32 (columns, columns) on `device`, by the name of each matrix that tokens are multiplied with.

    Of the model as it is scored, the loop on or off as it is there. Tables that are only looked up in have none.
    """
    watched = GPT(model.config, track_inputs="all")
    watched.load_state_dict(model.state_dict())
    watched.set_recurrence(model.recurrence_active)
    watched = watched.to(device).eval()
    use_best_backend(watched, device)
    rows = max(1, _PASS_TOKENS // windows.shape[1])
    with torch.no_grad():
        for some in torch.split(windows, rows):
            inputs = some.to(device)
            watched.token_losses(inputs, inputs)  # the targets of losses that nobody asks for
    return {name: seen.covariance / seen.mass for name, seen in watched.input_covariances().items()}
