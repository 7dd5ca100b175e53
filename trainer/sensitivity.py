"""How much the loss minds an error in each row of each matrix: the trace of that row's Fisher information.

For targets y drawn from the model's own predictions, the expectation of the squared gradient of -log p(y) in a row's
weights is the diagonal of the Fisher information F, and an error e of the row costs about e^T F e / 2 nats a token.
Draws of different positions are independent and their gradients have a mean of 0, so the squared gradient of the sum
over a whole pass has the sum of theirs for its expectation: a pass gives one sample of each row's trace.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.errors import InputError
from trainer.evaluation_attention import use_best_backend
from trainer.model.gpt import GPT
from trainer.parameters import parameters

_PASSES = 32
_PASS_TOKENS = 2048
_SEED = 0


def row_traces(model: GPT, windows: Tensor, device: torch.device) -> dict[str, Tensor]:
    """E |d loss / d w_r|^2 a token, float64 (rows,) on the CPU, by the name of each matrix that is quantised.

    In 32 passes over `windows` (windows, time), evenly spread, each of 2,048 tokens, but of one window at least; of the
    model as it is scored. Raises InputError if what it predicts is not finite.
    """
    own = GPT(model.config)
    own.load_state_dict(model.state_dict())
    own.set_recurrence(model.recurrence_active)
    own = own.to(device).eval()
    use_best_backend(own, device)
    names = [name for name, parameter in parameters(model.config).items() if parameter.quantized]
    weights = [own.get_parameter(name) for name in names]
    sums = [torch.zeros(weight.shape[0], dtype=torch.float64, device=device) for weight in weights]
    rows = max(1, _PASS_TOKENS // windows.shape[1])
    chosen = torch.linspace(0, len(windows) - 1, min(len(windows), _PASSES * rows)).long()
    generator = torch.Generator(device=device).manual_seed(_SEED)
    with torch.no_grad():
        first = windows[:1].to(device)
        if not bool(torch.isfinite(own.token_losses(first, first)).all()):
            raise InputError("what the model predicts is not finite; the run diverged, take an earlier checkpoint")
    for some in torch.split(windows[chosen], rows):
        inputs = some.to(device)
        nats = own.token_losses(inputs, own.drawn_targets(inputs, generator)).sum()
        for total, gradient in zip(sums, torch.autograd.grad(nats, weights), strict=True):
            total.add_(gradient.double().square().sum(dim=1))
    return {name: total.cpu() / windows[chosen].numel() for name, total in zip(names, sums, strict=True)}
