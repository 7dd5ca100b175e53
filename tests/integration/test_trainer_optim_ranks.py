"""Two processes with half of each batch take the steps that one takes with all of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from two_processes import torchrun

# Three layers make odd batches of matrices, which must be filled up. Together: one pass over both halves' rows, so
# that the input covariances are the mean of the two ranks' as well. Every phase begins with new objects.
PROGRAM = """
import json, sys, weakref
import torch
from trainer.config import ModelConfig, OptimizerConfig
from trainer.model.gpt import GPT
from trainer.optim import Optimizers
from trainer.ranks import ALONE, Ranks

torch.set_num_threads(1)
TINY = ModelConfig(vocab_size=32, num_layers=3, model_dim=16, num_heads=2, num_kv_heads=1)
ranks = Ranks.from_environment()

def window(step, half):
    return torch.randint(32, (2, 9), generator=torch.Generator().manual_seed(2 * step + half))

def start(config):
    torch.manual_seed(0)
    model = GPT(TINY, track_inputs=config.input_covariance_decay if config.muon_input_aware else None)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return {"model": model.state_dict(), "optimizers": None}

def steps(config, state, numbers, who):
    model = GPT(TINY, track_inputs=config.input_covariance_decay if config.muon_input_aware else None)
    model.load_state_dict(state["model"])
    optimizers = Optimizers(model, config, ranks=who)
    if state["optimizers"] is not None:
        optimizers.load_state_dict(state["optimizers"])
    for step in numbers:
        halves = [window(step, half) for half in range(2)]
        rows = torch.cat(halves) if who is ALONE else halves[who.rank]
        model(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()).backward()
        optimizers.step(step, 1.0 - 0.1 * step, 0.5)
    return {"model": model.state_dict(), "optimizers": optimizers.state_dict()}

def flat(value, prefix=""):
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in flat(inner, f"{prefix}/{key}").items()}
    return {prefix: value}

def difference(one, other):
    one, other = flat(one), flat(other)
    assert one.keys() == other.keys(), one.keys() ^ other.keys()
    assert all(one[name].shape == other[name].shape for name in one)
    return max(float((one[name] - other[name]).abs().max()) for name in one)

found, matrix = {}, "blocks.0.mlp.fc.weight"
with ranks.joined():
    group = weakref.ref(torch.distributed.group.WORLD)
    import torch._dynamo  # whose imports must not keep the group: a process that ends with one sometimes aborts
    for name, changed in json.loads(sys.argv[1]).items():
        config = OptimizerConfig(matrix_lr=0.02, muon_momentum_warmup_steps=3, weight_decay=0.1, **changed)
        begin = start(config)
        alone = steps(config, begin, range(6), ALONE)
        together = steps(config, begin, range(6), ranks)
        relayed = begin
        for numbers, who in ((range(2), ranks), (range(2, 4), ALONE), (range(4, 6), ranks)):
            relayed = steps(config, relayed, numbers, who)
        sums = [float(tensor.double().sum()) for tensor in flat(together).values()]
        found[name] = {
            "alone": difference(alone, together),
            "relayed": difference(alone, relayed),
            "moved": float((alone["model"][matrix] - begin["model"][matrix]).norm()),
            "ranks_agree": ranks.first_says(sums) == sums,
        }
    said = ranks.first_says([7.0 if ranks.first else 8.0, 2.0**-40])
    whole = torch.arange(8.0).view(4, 2) * (1 + ranks.rank)
    found["collectives"] = [
        said,
        ranks.mean_(whole.clone()).tolist(),
        ranks.mean_shard(whole).tolist(),
        ranks.all_shards(whole[:1]).tolist(),
    ]
    ranks.barrier()
    totals = ranks.sum_float64([float(found[name]["ranks_agree"]) for name in found if name != "collectives"])
if ranks.first:
    print(json.dumps([found, totals, group() is None]))
"""

LOST = """
import os, sys
import torch
from trainer.ranks import Ranks, RanksError
ranks = Ranks.from_environment()
with ranks.joined():
    if ranks.rank == 1:
        os._exit(0)
    calls = {
        "first_says": lambda: ranks.first_says([1.0]),
        "mean_": lambda: ranks.mean_(torch.ones(2)),
        "mean_shard": lambda: ranks.mean_shard(torch.ones(2)),
        "all_shards": lambda: ranks.all_shards(torch.ones(1)),
    }
    for name, call in calls.items():
        try:
            call()
        except RanksError as error:
            print(name, error)
"""

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"grad_clip_norm": 0.02},
    "rows": {"muon_coefficients": "polar_express", "muon_row_normalize": True, "grad_clip_norm": 0.02},
    "neurons": {"muon_neuron_beta2": 0.9},
    "input_aware": {"muon_input_aware": True, "input_covariance_damping": 0.1},
    "input_aware_neurons": {"muon_input_aware": True, "input_covariance_damping": 0.1, "muon_neuron_beta2": 0.9},
}


def test_two_processes_step_as_one_does_and_hand_over_to_each_other(tmp_path: Path) -> None:
    script = tmp_path / "steps.py"
    script.write_text(PROGRAM)
    done = torchrun(script, json.dumps(CONFIGURATIONS))
    assert done.returncode == 0, done.stderr
    found, agreeing, parted = json.loads(done.stdout.splitlines()[-1])
    for name in CONFIGURATIONS:
        assert found[name]["moved"] > 0.1, name
        assert found[name]["alone"] == pytest.approx(0.0, abs=2e-4), name
        assert found[name]["relayed"] == pytest.approx(0.0, abs=2e-4), name
    assert agreeing == [2.0] * len(CONFIGURATIONS)
    assert parted
    assert found["collectives"] == [
        [7.0, 2.0**-40],
        [[0.0, 1.5], [3.0, 4.5], [6.0, 7.5], [9.0, 10.5]],
        [[0.0, 1.5], [3.0, 4.5]],
        [[0.0, 1.0], [0.0, 2.0]],
    ]


def test_a_process_that_is_gone_is_named_by_every_collective(tmp_path: Path) -> None:
    script = tmp_path / "lost.py"
    script.write_text(LOST)
    done = torchrun(script)
    for name in ("first_says", "mean_", "mean_shard", "all_shards"):
        assert f"{name} rank 0 of 2 lost another one while" in done.stdout, done.stderr
