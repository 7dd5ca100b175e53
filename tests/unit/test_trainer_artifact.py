"""The artifact: exact, self-describing, and closed to damaged or lying files."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.artifact import MAGIC, Artifact, ArtifactError, pack, read_artifact, unpack
from trainer.config import ExportConfig, LimitsConfig, ModelConfig, RecurrenceConfig, TrainConfig
from trainer.model.gpt import GPT
from trainer.parameters import parameters
from trainer.quantization.coding import decode, encode
from trainer.quantization.fake_quant import fake_quantize
from trainer.sizing import INFERENCE_MODULES, parameter_shapes

FRAME = len(MAGIC) + 4 + 32


def _config(bits: int = 6, clip: float | None = None, **export: Any) -> TrainConfig:
    return TrainConfig(
        limits=LimitsConfig(steps=1),
        model=ModelConfig(
            vocab_size=24,
            num_layers=2,
            model_dim=16,
            num_heads=2,
            num_kv_heads=1,
            recurrence=RecurrenceConfig(first=1, last=1, start_fraction=0.5),
        ),
        export=ExportConfig(bits=bits, clip_sigma=clip, **export),
    )


def _state(config: TrainConfig) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in parameter_shapes(config.model).items()}


def _packed(config: TrainConfig, state: dict[str, torch.Tensor] | None = None, loop: bool = True) -> bytes:
    return pack(config, state or _state(config), tokenizer_sha256="ab" * 32, recurrence_active=loop)


@pytest.fixture(scope="module")
def packed() -> bytes:
    config = _config()
    return _packed(config)


@pytest.mark.parametrize(("bits", "clip"), [(4, None), (6, None), (6, 2.0), (8, 12.85)])
def test_holds_exactly_the_fake_quantised_weights(bits: int, clip: float | None) -> None:
    config = _config(bits, clip)
    state = _state(config)
    artifact = unpack(_packed(config, state), "it")
    assert artifact.config == config
    assert artifact.manifest.scheme == f"int{bits}+zlib+ans"
    assert artifact.manifest.tokenizer_sha256 == "ab" * 32
    assert list(artifact.state) == list(state)
    for name, weight in state.items():
        intended = fake_quantize(weight, bits, clip) if weight.dim() == 2 else weight.half().float()
        assert torch.equal(artifact.state[name].view(torch.int32), intended.view(torch.int32))


@pytest.mark.parametrize("loop", [True, False])
def test_its_model_scores_as_the_fake_quantised_model_does(loop: bool) -> None:
    config = _config()
    trained = GPT(config.model, config.export)
    trained.load_state_dict({n: w if w.dim() == 2 else w.half().float() for n, w in _state(config).items()})
    trained.set_recurrence(loop)
    trained.set_fake_quant(True)
    inputs, targets = torch.randint(0, 24, (2, 3, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got = unpack(_packed(config, loop=loop), "it").model("cpu").token_losses(inputs, targets)
        assert torch.equal(got, trained.token_losses(inputs, targets))


def test_gates_and_mixes_are_halves_of_any_rank() -> None:
    options = {"unet_skips": True, "residual_mix": True, "attention_gate": "full", "parallel_from": 1}
    more = {
        "smear_gate": True,
        "tie_embeddings": False,
        "bigram_embedding": {"rows": 9, "dim": 6},
        "value_embedding": {"layers": (1,), "dim": 4},
    }
    plain = _config()
    config = plain.model_copy(update={"model": ModelConfig(**plain.model.model_dump() | options | more)})
    state, table = _state(config), parameters(config.model)
    artifact = unpack(_packed(config, state), "it")
    for name, weight in state.items():
        intended = fake_quantize(weight, 6, None) if table[name].quantized else weight.half().float()
        assert torch.equal(artifact.state[name], intended)
    inputs, targets = torch.randint(0, 24, (2, 3, 9), generator=torch.Generator().manual_seed(1))
    assert bool(torch.isfinite(artifact.model("cpu").token_losses(inputs, targets)).all())


def test_an_artifact_from_before_the_options_is_still_read() -> None:
    """Its config says nothing of them."""
    known = {"vocab_size", "num_layers", "model_dim", "num_heads", "num_kv_heads", "mlp_mult", "activation"}
    known |= {"rope_fraction", "rope_base", "qk_gain_init", "logit_softcap", "tied_embed_init_std"}

    def forget(manifest: dict, _: bytes) -> None:  # type: ignore[type-arg]
        config = json.loads(manifest["config"])
        config["model"] = {name: config["model"][name] for name in known} | {
            "recurrence": {"first": 1, "last": 1, "loops": 2, "start_fraction": 0.5}
        }
        manifest["config"] = json.dumps({"model": config["model"], "limits": {"steps": 1}})

    config = _config()
    artifact = unpack(_forge(_packed(config), forget), "it")
    assert artifact.config == config
    assert torch.equal(artifact.state["blocks.1.attn_scale"], _state(config)["blocks.1.attn_scale"].half().float())


def test_packing_is_deterministic(packed: bytes) -> None:
    assert _packed(_config()) == packed


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_flipped_bit_is_noticed(packed: bytes, data: st.DataObject) -> None:
    damaged = bytearray(packed)
    damaged[data.draw(st.integers(0, len(packed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(ArtifactError, match="it: "):
        unpack(bytes(damaged), "it")


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_cut_or_extension_is_noticed(packed: bytes, data: st.DataObject) -> None:
    for wrong in (packed[: data.draw(st.integers(0, len(packed) - 1))], packed + data.draw(st.binary(min_size=1))):
        with pytest.raises(ArtifactError):
            unpack(wrong, "it")


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_noise_is_refused(noise: bytes) -> None:
    for data in (noise, MAGIC + noise):
        with pytest.raises(ArtifactError):
            unpack(data, "it")


def _forge(packed: bytes, change) -> bytes:  # type: ignore[no-untyped-def]
    """An artifact whose manifest and payload are changed, and whose hashes are right again."""
    length = int.from_bytes(packed[len(MAGIC) : len(MAGIC) + 4], "little")
    head = packed[FRAME : FRAME + length]
    manifest = json.loads(decode(head[4:], int.from_bytes(head[:4], "little")))
    payload = packed[FRAME + length :]
    changed = change(manifest, payload)
    payload = changed if isinstance(changed, bytes) else payload
    manifest["payload_sha256"] = hashlib.sha256(payload).hexdigest()
    text = json.dumps(manifest).encode()
    head = len(text).to_bytes(4, "little") + encode(text)
    return MAGIC + len(head).to_bytes(4, "little") + hashlib.sha256(head).digest() + head + payload


def _huge(manifest: dict, _: bytes) -> None:  # type: ignore[type-arg]
    config = json.loads(manifest["config"])
    config["model"] |= {"vocab_size": 65536, "model_dim": 16384}
    manifest["config"] = json.dumps(config)
    manifest["vocab_size"] = 65536
    half = 0
    for entry, (name, shape) in zip(
        manifest["tensors"], parameter_shapes(ModelConfig(**config["model"])).items(), strict=True
    ):
        assert entry["name"] == name
        entry |= {"shape": shape, "half": half}
        half += shape[0]
    manifest["halves"] = half


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_huge, r"cannot hold \d+ parameters"),
        (lambda m, _: m.update(recurrence_active="yes"), "manifest is not valid"),
        (lambda m, _: m["tensors"][3].update(bits=8), "lies at"),
        (lambda m, _: m["tensors"][3].update(offset=0), "lies at"),
        (lambda m, _: m["tensors"][3].update(shape=[1, 256]), "tensor table"),
        (lambda m, _: m["tensors"].pop(), "tensor table"),
        (lambda m, _: m["tensors"].append(m["tensors"][0]), "tensor table"),
        (lambda m, _: m["tensors"][0].update(length=m["tensors"][0]["length"] - 1), "lies at|do not|fill"),
        (lambda m, _: m.update(halves=m["halves"] + 1), "fp16"),
        (lambda m, _: m.update(halves_length=m["halves_length"] + 1), "fill"),
        (lambda m, _: m.update(vocab_size=25), "vocabulary"),
        (lambda m, _: m.update(scheme="int4+zlib+ans"), "scheme"),
        (lambda m, _: m.update(config="{}"), "config is not valid"),
        (lambda m, _: m.update(more=1), "manifest is not valid"),
        (lambda m, _: m.update(payload_bytes=m["payload_bytes"] + 9), "payload instead of"),
        (lambda _, payload: b"\0" * len(payload), "inflate"),
    ],
)
def test_a_consistent_lie_is_refused(packed: bytes, change, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ArtifactError, match=message):
        unpack(_forge(packed, change), "it")


def test_embeddings_have_their_own_bits() -> None:
    config = _config(5, 2.0, embedding_bits=8)
    state = _state(config)
    artifact = unpack(_packed(config, state), "it")
    assert artifact.manifest.scheme == "int5e8+zlib+ans"
    bits = {entry.name: entry.bits for entry in artifact.manifest.tensors if entry.bits != 16}
    assert bits.pop("tok_emb.weight") == 8
    assert set(bits.values()) == {5}
    assert torch.equal(artifact.state["tok_emb.weight"], fake_quantize(state["tok_emb.weight"], 8, None))
    name = "blocks.0.attn.q.weight"
    assert torch.equal(artifact.state[name], fake_quantize(state[name], 5, 2.0))


def test_an_integer_outside_its_bits_is_refused(packed: bytes) -> None:
    def change(manifest: dict, payload: bytes) -> bytes:  # type: ignore[type-arg]
        first = manifest["tensors"][0]
        stream = encode(b"\x20" * math.prod(first["shape"]))
        for entry in manifest["tensors"][1:]:
            entry["offset"] += len(stream) - first["length"]
        manifest["halves_offset"] += len(stream) - first["length"]
        manifest["payload_bytes"] += len(stream) - first["length"]
        rest = payload[first["length"] :]
        first["length"] = len(stream)
        return stream + rest

    with pytest.raises(ArtifactError, match=r"outside -31\.\.31"):
        unpack(_forge(packed, change), "it")


def test_only_the_configs_finite_weights_are_packed() -> None:
    config = _config()
    state = _state(config)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn_scale"):
        _packed(config, {name: value for name, value in state.items() if name != "blocks.0.attn_scale"})
    state["blocks.1.mlp_scale"][3] = 1e6
    with pytest.raises(ValueError, match="fp16"):
        _packed(config, state)


def test_reading_a_file_names_it(tmp_path: Path, packed: bytes) -> None:
    (tmp_path / "m.caddie").write_bytes(packed)
    artifact = read_artifact(tmp_path / "m.caddie")
    assert isinstance(artifact, Artifact)
    assert artifact.sha256 == hashlib.sha256(packed).hexdigest()
    (tmp_path / "m.caddie").write_bytes(packed[:-1])
    with pytest.raises(ArtifactError, match=r"m\.caddie"):
        read_artifact(tmp_path / "m.caddie")


def test_scoring_imports_exactly_the_modules_that_are_counted_as_code() -> None:
    program = (
        # The last one is for CUDA only.
        "import sys, trainer.artifact, trainer.evaluation, trainer.model.varlen_attention\n"
        "sys.stdout.write(' '.join(sorted(m for m in sys.modules if m.split('.')[0] == 'trainer')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    kernels = {
        name for name in INFERENCE_MODULES if "fused_" in name or name.endswith("_kernels")
    }  # for CUDA only, too
    assert len(kernels) == 6
    assert tuple(done.stdout.split()) == tuple(sorted(set(INFERENCE_MODULES) - kernels))
