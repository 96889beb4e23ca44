"""The exported folder is K2-Instruct's own format and computes what the training model computes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import k2lite
from tools.demo_training.export import export, load_exported, round_like_export
from tools.demo_training.shape import CONFIG
from tools.demo_training.transformer import Transformer

from .miniature import MINI_CONFIG, miniature

IDS = [(7 * at * at + 3) % 500 for at in range(40)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    model = miniature()
    with torch.no_grad():
        for moe in model.moes:
            moe.bias += torch.linspace(-0.2, 0.2, len(moe.bias))
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.linspace(0.5, 1.5, len(parameter)))
    path = tmp_path_factory.mktemp("export") / "model"
    export(model, MINI_CONFIG, tokenizer_folder, path)
    torch.save(model.state_dict(), path.parent / "trained.pt")
    return path


@pytest.fixture
def trained(folder: Path) -> Transformer:
    model = miniature(seed=9)
    model.load_state_dict(torch.load(folder.parent / "trained.pt", weights_only=True))
    return model


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            found |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    return found


def test_the_runtime_gives_the_training_models_logits(
    folder: Path, trained: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    round_like_export(trained)
    # autocast off: what is compared is the function, not bfloat16's rounding
    monkeypatch.setattr("tools.demo_training.transformer.LOW", torch.float32)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: torch.set_grad_enabled(False))
    ids = torch.tensor([IDS])
    with torch.no_grad():
        ours = trained.head(trained(ids, torch.arange(len(IDS))[None], torch.zeros_like(ids)))[0]
    theirs = k2lite.load(folder, backend="reference", context=64).logits(IDS)
    assert (ours - theirs).abs().max() / theirs.abs().max() < 0.03
    assert float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()) > 0.9


def test_tensors_have_the_types_and_names_of_k2_instruct(folder: Path) -> None:
    found = tensors(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(found)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    assert sorted(set(index["weight_map"].values())) == [f"model-{n}-of-4.safetensors" for n in (1, 2, 3, 4)]
    for name, tensor in found.items():
        if name.endswith("e_score_correction_bias"):
            expected = torch.float32
        elif "_proj" in name:
            expected = torch.float32 if name.endswith("scale_inv") else torch.float8_e4m3fn
        else:
            expected = torch.bfloat16
        assert tensor.dtype == expected, name
    experts = MINI_CONFIG["n_routed_experts"]
    assert f"model.layers.1.mlp.experts.{experts - 1}.down_proj.weight_scale_inv" in found
    assert "model.layers.0.mlp.gate_proj.weight" in found
    assert "model.layers.1.mlp.gate.weight" in found


def test_an_expert_on_disk_is_its_part_of_the_stack(folder: Path, trained: Transformer) -> None:
    found = tensors(folder)
    for name, part in zip(("gate_proj", "up_proj"), trained.moes[1].gate_up_proj.detach()[5], strict=True):
        at = f"model.layers.2.mlp.experts.5.{name}.weight"
        value = found[at].float() * found[f"{at}_scale_inv"]
        assert (value - part).abs().max() <= part.abs().max() / 16


def test_rounding_is_what_the_export_wrote(folder: Path, trained: Transformer) -> None:
    found = tensors(folder)
    round_like_export(trained)
    at = "model.layers.1.mlp.experts.3.up_proj.weight"
    value = found[at].float() * found[f"{at}_scale_inv"]
    assert torch.equal(value, trained.moes[0].gate_up_proj.detach()[3, 1])
    assert torch.equal(found["lm_head.weight"].float(), trained.lm_head.weight.detach())


def test_training_goes_on_from_an_exported_folder(folder: Path, trained: Transformer) -> None:
    again = miniature(seed=9)
    load_exported(again, folder)
    round_like_export(trained)
    for name, value in trained.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_an_export_replaces_the_folder_whole(folder: Path, trained: Transformer, tokenizer_folder: Path) -> None:
    target = folder.parent / "again"
    target.mkdir()
    (target / "stale").touch()
    export(trained, MINI_CONFIG, tokenizer_folder, target)
    assert sorted(path.name for path in target.iterdir()) == sorted(path.name for path in folder.iterdir())
    assert not target.with_name("again.partial").exists()


def test_the_config_is_k2_instructs_in_kind(shared: Path) -> None:
    """The same keys and constants as the published file; only sizes differ."""
    theirs = json.loads((shared / "data/Kimi-K2-Instruct/config.json").read_text())
    assert CONFIG["quantization_config"] == theirs["quantization_config"]
    for key in ("model_type", "architectures", "scoring_func", "topk_method", "norm_topk_prob", "routed_scaling_factor",
                "n_shared_experts", "first_k_dense_replace", "rope_theta", "rms_norm_eps", "hidden_act"):  # fmt: skip
        assert CONFIG[key] == theirs[key], key
    assert set(CONFIG["rope_scaling"]) == set(theirs["rope_scaling"])
    assert CONFIG["max_position_embeddings"] == 8192
