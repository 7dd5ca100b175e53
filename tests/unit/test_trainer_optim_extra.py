"""What both optimisers promise of a whole model: every parameter moved, counted and saved; momentum, decay, work."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from small_data_set import make_data_set
from trainer.config import ModelConfig, OptimizerConfig, TrainConfig
from trainer.data.manifest import DataSet
from trainer.model.gpt import GPT
from trainer.optim import Muon, Optimizers, parameter_groups
from trainer.optim.input_aware import REFRESH_STEPS, inverse_root
from trainer.optim.newton_schulz import POLAR_EXPRESS, SAFETY, polynomials
from trainer.parameters import MATRIX_KINDS, parameters
from trainer.run_plan import RunPlan
from trainer.run_state import RunState
from trainer.steps import take_step

pytestmark = pytest.mark.usefixtures("seeded_on_one_thread")

TINY = ModelConfig(vocab_size=32, num_layers=4, model_dim=16, num_heads=2, num_kv_heads=1)
EVERYTHING = ModelConfig.model_validate(
    TINY.model_dump()
    | {
        "recurrence": {"first": 1, "last": 2},
        "bigram_embedding": {"rows": 16, "dim": 4},
        "value_embedding": {"layers": [0, 3], "dim": 4},
        "smear_gate": True,
        "unet_skips": True,
        "residual_mix": True,
        "parallel_from": 3,
        "tie_embeddings": False,
        "attention_gate": "sparse",
        "activation": "swiglu",
        "xsa_last_layers": 4,
        "ln_scale": True,
    }
)


def random_model(config: ModelConfig, *, track_inputs: float | None = None) -> GPT:
    """No parameter is at a value, such as 0, that keeps another one's gradient at 0."""
    torch.manual_seed(0)
    model = GPT(config, track_inputs=track_inputs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def backward(model: GPT, seed: int) -> None:
    window = torch.randint(32, (4, 9), generator=torch.Generator().manual_seed(seed))
    torch.autograd.backward(model(window[:, :-1].contiguous(), window[:, 1:].contiguous()))


def matrices(model: GPT) -> dict[str, nn.Parameter]:
    kinds = parameters(model.config)
    return {name: p for name, p in model.named_parameters() if kinds[name].kind in MATRIX_KINDS}


class TestWholeModels:
    @pytest.mark.parametrize("config", [TINY, EVERYTHING], ids=["plain", "everything"])
    def test_groups_are_a_partition_and_only_vectors_are_free_of_decay(self, config: ModelConfig) -> None:
        model = GPT(config)
        groups = parameter_groups(model, OptimizerConfig(weight_decay=0.1, embed_weight_decay=0.2))
        listed = [name for group in groups for name in group.parameters]
        assert sorted(listed) == sorted(name for name, _ in model.named_parameters())
        (muon,) = (group for group in groups if group.kind == "muon")
        assert muon.parameters.keys() == matrices(model).keys()
        assert muon.weight_decay == 0.1
        for group in groups:
            for name, parameter in group.parameters.items():
                assert parameter is dict(model.named_parameters())[name]
                if group.kind == "adamw":
                    assert group.weight_decay == (0.0 if group.name == "control" else 0.2)
                    assert (group.name == "control") == (not parameters(config)[name].quantized)

    def test_every_option_is_moved_by_a_step_and_saved(self) -> None:
        """Its state would lack a parameter without gradients, and be refused when it is loaded."""
        model = random_model(EVERYTHING)
        optimizers = Optimizers(model, OptimizerConfig())
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        model.set_recurrence(True)
        backward(model, 0)
        optimizers.step(0, 1.0)
        for name, parameter in model.named_parameters():
            assert not torch.equal(parameter, before[name]), name
        state = optimizers.state_dict()
        assert state["muon"].keys() == matrices(model).keys()
        assert state["muon"].keys() | state["adamw"].keys() == before.keys()
        assert not state["muon"].keys() & state["adamw"].keys()
        Optimizers(model, OptimizerConfig()).load_state_dict(state)

    def test_matrices_of_one_shape_or_its_transpose_are_one_batch(self) -> None:
        model = GPT(TINY)
        muon = Muon(matrices(model), backend_steps=5)
        sizes = sorted(tuple(stack.shape) for stack in muon.take_gradients())
        # q and proj; k and v; fc and its transpose, the MLP's proj: of 4 layers each.
        assert sizes == [(8, 8, 16), (8, 16, 16), (8, 16, 32)]


class TestMomentum:
    def test_it_warms_up_by_the_steps_that_are_done(self) -> None:
        """In the state lies v <- mu v + G, with mu from 0.5 to 0.9 over four steps."""
        model = random_model(TINY)
        config = OptimizerConfig(
            muon_momentum=0.9, muon_momentum_warmup_start=0.5, muon_momentum_warmup_steps=4, matrix_lr=0.01
        )
        optimizers = Optimizers(model, config)
        velocity: dict[str, Tensor] = {}
        for step, momentum in enumerate((0.5, 0.6, 0.7, 0.8, 0.9, 0.9)):
            backward(model, step)
            for name, parameter in matrices(model).items():
                assert parameter.grad is not None
                velocity[name] = momentum * velocity.get(name, torch.zeros(())) + parameter.grad
            optimizers.step(step, 1.0)
            found = optimizers.state_dict()["muon"]
            for name, wanted in velocity.items():
                torch.testing.assert_close(found[name], wanted)

    def test_the_saved_one_lies_as_its_parameter_and_is_a_copy(self) -> None:
        model = random_model(TINY)
        optimizers = Optimizers(model, OptimizerConfig())
        backward(model, 0)
        optimizers.step(0, 1.0)
        saved = optimizers.state_dict()["muon"]
        kept = copy.deepcopy(saved)
        for name, parameter in matrices(model).items():
            assert saved[name].shape == parameter.shape
            assert saved[name].is_contiguous()
        backward(model, 1)
        optimizers.step(1, 1.0)
        for name, momentum in saved.items():
            assert torch.equal(momentum, kept[name]), name
            assert not torch.equal(optimizers.state_dict()["muon"][name], kept[name]), name


class TestClipping:
    def test_nothing_to_clip_is_no_division_by_nothing(self) -> None:
        model = random_model(TINY)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        Optimizers(model, OptimizerConfig(grad_clip_norm=1.0)).step(0, 1.0)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name]), name

    def test_a_parameter_without_a_gradient_counts_nothing(self) -> None:
        model = random_model(TINY)
        for parameter in model.parameters():
            parameter.grad = None
        gain, matrix = model.blocks[0].attn_scale, model.blocks[0].attn.q.weight
        gain.grad, matrix.grad = torch.zeros_like(gain), torch.zeros_like(matrix)
        gain.grad[0], matrix.grad[0, 0] = 3.0, 4.0
        optimizers = Optimizers(model, OptimizerConfig(grad_clip_norm=1.0))
        optimizers.step(0, 1.0)
        state = optimizers.state_dict()
        assert state["adamw"].keys() == {"blocks.0.attn_scale"}
        assert float(state["adamw"]["blocks.0.attn_scale"]["exp_avg"][0]) == pytest.approx(0.1 * 3 / 5, rel=1e-5)
        assert float(state["muon"]["blocks.0.attn.q.weight"][0, 0]) == pytest.approx(4 / 5, rel=1e-5)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return make_data_set(tmp_path_factory.mktemp("optim") / "data")


def after_a_step(dataset: DataSet, done: float, **optimizer: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights before and after one step at progress `done`; without a warmdown the learning rates are whole."""
    config = TrainConfig.model_validate(
        {
            "limits": {"steps": 100},
            "model": {"vocab_size": 330, "num_layers": 1, "model_dim": 16, "num_heads": 2, "num_kv_heads": 1},
            "batch": {"train_batch_tokens": 64, "train_seq_len": 16},
            "data": {"prefetch_batches": 0},
            "schedule": {"warmdown_fraction": 0.0},
            "optimizer": {"matrix_lr": 0.04, "tied_embed_lr": 0.02, **optimizer},
            "device": "cpu",
        }
    )
    state = RunState(RunPlan.make(config, dataset, torch.device("cpu")), None)
    before = {name: parameter.detach().clone() for name, parameter in state.model.named_parameters()}
    take_step(state, done)
    return before, {name: parameter.detach() for name, parameter in state.model.named_parameters()}


@pytest.mark.parametrize(("done", "left"), [(0.0, 1.0), (0.5, 1.0), (0.75, 0.5), (1.0, 0.0)])
def test_decay_tapers_in_the_steps_of_a_run(dataset: DataSet, done: float, left: float) -> None:
    """The decay is what a step with it moves beyond one without: lr x decay x what is left of it."""
    before, plain = after_a_step(dataset, done)
    _, found = after_a_step(dataset, done, weight_decay=0.5, embed_weight_decay=0.25, weight_decay_taper=0.5)
    for name, kind in ((name, parameter.kind) for name, parameter in parameters(_model_of(dataset)).items()):
        rate = {"embedding": 0.02 * 0.25, "control": 0.0}.get(kind, 0.04 * 0.5)
        torch.testing.assert_close(found[name] - plain[name], -rate * left * before[name], rtol=1e-3, atol=1e-6)


def _model_of(dataset: DataSet) -> ModelConfig:
    return ModelConfig(vocab_size=dataset.manifest.vocab_size, num_layers=1, model_dim=16, num_heads=2, num_kv_heads=1)


class TestInputAware:
    CONFIG = OptimizerConfig(muon_input_aware=True)

    def test_a_refresh_costs_what_is_said(self) -> None:
        with FlopCounterMode(display=False) as counter:
            inverse_root(torch.eye(24).expand(3, 24, 24))
        assert counter.get_total_flops() == 3 * 64 * 24**3

    def test_zeros_stay_finite(self) -> None:
        assert bool(inverse_root(torch.zeros(2, 5, 5)).isfinite().all())

    @pytest.mark.parametrize("scale", [1e-3, 30.0])
    def test_directions_do_not_depend_on_the_scale_of_the_inputs(self, scale: float) -> None:
        """Inputs x scale: gradients grow with it, covariances with its square."""
        rows = torch.randn(200, 6)
        gradient = torch.randn(4, 6)
        covariance = rows.t() @ rows / len(rows)
        update = gradient @ inverse_root(covariance[None])[0]
        scaled = (gradient * scale) @ inverse_root((covariance * scale**2)[None])[0]
        torch.testing.assert_close(scaled, update, rtol=1e-4, atol=1e-4)

    def test_a_run_that_did_not_observe_its_inputs_can_begin_to(self) -> None:
        plain = random_model(TINY)
        before = Optimizers(plain, OptimizerConfig())
        backward(plain, 0)
        before.step(0, 1.0)
        aware = random_model(TINY, track_inputs=0.9)
        optimizers = Optimizers(aware, self.CONFIG)
        optimizers.load_state_dict(before.state_dict())
        backward(aware, 1)
        optimizers.step(1, 1.0)  # not a step at which roots are due: there are none yet
        assert REFRESH_STEPS > 1
        state = optimizers.state_dict()
        assert all("root" in saved for saved in state["inputs"].values())
        assert bool(torch.stack([p.isfinite().all() for p in aware.parameters()]).all())

        back = Optimizers(plain, OptimizerConfig())  # and a run may go back to plain Muon
        back.load_state_dict(state)
        assert back.state_dict()["inputs"] == {}
        for name, momentum in back.state_dict()["muon"].items():
            assert torch.equal(momentum, state["muon"][name])

    def test_matrices_that_share_an_input_are_saved_once(self) -> None:
        model = random_model(TINY, track_inputs=0.9)
        optimizers = Optimizers(model, self.CONFIG)
        backward(model, 0)
        optimizers.step(0, 1.0)
        saved = optimizers.state_dict()["inputs"]
        # q, k and v read one input; proj, fc and the MLP's proj one each: of 4 layers.
        assert len(saved) == 16
        assert {tuple(each["covariance"].shape) for each in saved.values()} == {(16, 16), (32, 32)}
        observed = model.input_covariances()
        for name, each in saved.items():
            assert torch.equal(each["covariance"], observed[name].covariance)
            assert each["covariance"].data_ptr() != observed[name].covariance.data_ptr()


def test_polar_express_ends_in_the_quintic_of_newton_and_schulz() -> None:
    """p = (15 s - 10 s^3 + 3 s^5) / 8, which leaves of an error its third power; the steps before come ever nearer."""
    a, b, c = polynomials("polar_express", 20)[-1]
    assert (8 * a, 8 * b, 8 * c) == (15.0, -10.0, 3.0)
    assert (a + b + c, a + 3 * b + 5 * c, 3 * 2 * b + 5 * 4 * c) == (1.0, 0.0, 0.0)
    distances = [abs(quintic[0] - a) for quintic in POLAR_EXPRESS]
    assert distances == sorted(distances, reverse=True)
    assert polynomials("polar_express", 7)[-1] == pytest.approx([a / SAFETY, b / SAFETY**3, c / SAFETY**5], abs=1e-5)
