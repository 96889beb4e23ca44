"""GGUF files as others write them, read into a folder by `quantize`; the gguf package says what their values are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import k2lite
from k2lite.gguf_model import as_folder, open_gguf
from k2lite.model_folder import open_model
from k2lite.quant import conversion
from k2lite.quant.errors import CheckpointError, ConfigError, K2LiteError
from k2lite.quant.method import Method
from k2lite.quant.quantization_plan import QuantizationPlan, plan_quantization
from k2lite.quant.quantizer import Job, quantize
from k2lite.quant.recipe import Recipe
from tests.quant.quantizing import write_source
from tests.quant.test_gguf_export import expected, gguf_name, write

KEEP = Recipe(experts="keep", trunk="keep", lm_head="keep")
CONFIG = {"hidden_size": 256, "moe_intermediate_size": 256, "n_routed_experts": 4, "num_experts_per_tok": 2}
Change = Callable[[dict[str, np.ndarray]], None]
K_QUANTS = ("Q4_K", "Q6_K", "Q2_K", "Q3_K", "Q5_K", "MXFP4", "Q4_1", "Q5_0", "IQ4_XS")


def read_back(path: Path, folder: Path, recipe: Recipe = KEEP) -> dict[str, torch.Tensor]:
    """Through `quantize` into a folder; returns its stored tensors."""
    from k2lite.quant.file_reading import read_json_object
    from k2lite.quant.quantized_config import quantized_config

    model = open_gguf(path)
    model.checkpoint.raise_for_problems()
    plan = plan_quantization(model.checkpoint, recipe)
    with as_folder(model) as small:
        config = quantized_config(read_json_object(small / "config.json"), plan)
        quantize(Job(plan, small, {}, config, folder), resume=False, report=lambda _: None)
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def gguf_plan(path: Path) -> QuantizationPlan:
    return plan_quantization(open_gguf(path).checkpoint, KEEP)


def as_bf16(value: np.ndarray) -> np.ndarray:
    return torch.from_numpy(value.astype(np.float32)).to(torch.bfloat16).float().numpy()


def test_a_bf16_file_read_back_computes_the_same_logits(tmp_path: Path) -> None:
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 1.0, "beta_slow": 1.0,
            "mscale": 1.0, "mscale_all_dim": 1.0}  # fmt: skip
    write_source(tmp_path / "model", "bf16", rope_scaling=yarn)
    write(tmp_path / "model", tmp_path / "model.gguf", "bf16")
    read_back(tmp_path / "model.gguf", tmp_path / "back")
    ids = list(range(3, 40))
    before = k2lite.load(tmp_path / "model", backend="reference").logits(ids)
    after = k2lite.load(tmp_path / "back", backend="reference").logits(ids)
    assert torch.equal(before, after)
    formats = open_model(tmp_path / "back")[1].formats()
    assert set(formats["routed experts"]) == set(formats["attention"]) == {"bf16"}


def test_int4_through_q4_0_is_the_same_bytes(tmp_path: Path) -> None:
    write_source(tmp_path / "model", "int4")
    write(tmp_path / "model", tmp_path / "model.gguf", "q4_0")
    back = read_back(tmp_path / "model.gguf", tmp_path / "back")
    before = {
        name: tensor
        for file in (tmp_path / "model").glob("*.safetensors")
        for name, tensor in load_file(file).items()
        if ".mlp.experts." in name
    }
    assert len(before) == 2 * 8 * 3 * 3
    for name, tensor in before.items():
        assert torch.equal(back[name], tensor), name
    assert k2lite.load(tmp_path / "back", backend="reference").logits([1, 2, 3]).isfinite().all()


def foreign(
    folder: Path,
    path: Path,
    *,
    types: tuple[str, ...] = ("F32",),
    change: Change = lambda _: None,
    old: bool = False,
    heads: int = 4,
) -> dict[str, np.ndarray]:
    """A file as llama.cpp writes it, by the gguf package; returns each tensor's values. `types` take turns over the
    experts and matrices whose rows they fit; blocks are random bytes where the package can't quantize."""
    weights = write_source(folder, "f32", **CONFIG, num_attention_heads=heads, num_key_value_heads=heads)
    tensors = {gguf_name(name): value for name, value in expected(weights, heads=heads, nope=16)}
    change(tensors)
    writer = gguf.GGUFWriter(path, "deepseek2")
    integers = {"block_count": 3, "context_length": 512, "embedding_length": 256, "feed_forward_length": 384,
                "leading_dense_block_count": 1, "expert_feed_forward_length": 256, "expert_count": 4,
                "expert_used_count": 2, "expert_shared_count": 1, "expert_gating_func": 2, "vocab_size": 160,
                "attention.head_count": heads, "attention.head_count_kv": heads if old else 1,
                "attention.q_lora_rank": 128, "attention.kv_lora_rank": 128, "rope.dimension_count": 8,
                "attention.key_length": 24 if old else 136, "attention.value_length": 32 if old else 128,
                **({} if old else {"attention.key_length_mla": 24, "attention.value_length_mla": 32})}  # fmt: skip
    for key, value in integers.items():
        writer.add_uint32(f"deepseek2.{key}", value)
    for key, number in (("rope.freq_base", 50000.0), ("expert_weights_scale", 2.827)):
        writer.add_float32(f"deepseek2.{key}", number)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_expert_weights_norm(True)
    writer.add_tokenizer_model("none")
    values, generator, turn = {}, np.random.default_rng(3), 0
    for name, value in tensors.items():
        kind = gguf.GGMLQuantizationType.F32
        if value.ndim > 1 and "gate_inp" not in name:
            fitting = [
                t for t in types if value.shape[-1] % gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[t]][0] == 0
            ]
            kind = gguf.GGMLQuantizationType[fitting[turn % len(fitting)]]
            turn += 1
        try:
            data = gguf.quantize(np.ascontiguousarray(value), kind)
        except NotImplementedError:
            elements, nbytes = gguf.GGML_QUANT_SIZES[kind]
            # small bytes are small F16 scales: no NaN, no infinity
            data = generator.integers(0, 60, (*value.shape[:-1], value.shape[-1] // elements * nbytes), dtype=np.uint8)
        raw = kind if kind.name not in ("F32", "F16") else None
        writer.add_tensor(name, data, raw_dtype=raw)
        values[name] = gguf.dequantize(data, kind).reshape(value.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def assert_same(back: dict[str, torch.Tensor], values: dict[str, np.ndarray], heads: int = 4) -> None:
    """Every tensor of the folder has the file's values, in whatever type `keep` gave it."""
    dense = {name: tensor for name, tensor in back.items() if not name.endswith(("_packed", "_scale", "_shape"))}
    wanted = {gguf_name(name): tensor for name, tensor in expected(dense, heads=heads, nope=16)}
    assert wanted.keys() == values.keys()
    for name, value in values.items():
        as_stored = torch.from_numpy(value.copy())
        if not np.array_equal(wanted[name], value):
            as_stored = as_stored.to(torch.bfloat16).float()
        assert np.array_equal(wanted[name], as_stored.numpy()), name


@pytest.mark.parametrize("types", [("F32",), ("BF16", "F16"), ("Q8_0",), (*K_QUANTS, "F32")])
def test_every_type_is_read(tmp_path: Path, types: tuple[str, ...]) -> None:
    values = foreign(tmp_path / "source", tmp_path / "m.gguf", types=(*types, "F16"))
    back = read_back(tmp_path / "m.gguf", tmp_path / "back")
    assert_same(back, values)


def test_old_files_have_kv_b_proj_in_one_and_others_gate_and_up_together(tmp_path: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        for layer in range(3):
            key, value = tensors.pop(f"blk.{layer}.attn_k_b.weight"), tensors.pop(f"blk.{layer}.attn_v_b.weight")
            joined = np.concatenate((key.transpose(0, 2, 1), value), axis=1)
            tensors[f"blk.{layer}.attn_kv_b.weight"] = joined.reshape(-1, joined.shape[-1])
            if layer:
                halves = [tensors.pop(f"blk.{layer}.ffn_{half}_exps.weight") for half in ("gate", "up")]
                tensors[f"blk.{layer}.ffn_gate_up_exps.weight"] = np.concatenate(halves, axis=1)

    foreign(tmp_path / "source", tmp_path / "m.gguf", change=change, old=True)
    back = read_back(tmp_path / "m.gguf", tmp_path / "back")
    source = {name: t for file in (tmp_path / "source").glob("*.safetensors") for name, t in load_file(file).items()}
    assert back.keys() == source.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in source.items())
    ids = [5, 6, 7, 8]
    logits = [k2lite.load(tmp_path / name, backend="reference").logits(ids) for name in ("source", "back")]
    assert torch.equal(*logits)


def test_kv_b_proj_is_joined_in_blocks_of_whole_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 heads of 48 rows in blocks of 384 rows, the fewest that both heads and FP8's blocks fill."""
    values = foreign(tmp_path / "source", tmp_path / "m.gguf", types=("Q8_0", "F16"), heads=16)
    monkeypatch.setattr(conversion, "READ_BYTES", 1)
    matrix = next(m for m in gguf_plan(tmp_path / "m.gguf").matrices if m.module.endswith("1.self_attn.kv_b_proj"))
    assert [block.rows.shape[0] for block in conversion.read_blocks(matrix, Method())] == [384, 384]
    assert_same(read_back(tmp_path / "m.gguf", tmp_path / "back"), values, heads=16)


@pytest.mark.parametrize("method", [Method(), Method("mse")])
def test_codes_of_q4_0_are_taken_over_block_by_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Method
) -> None:
    """Whatever the rule for scales is: there is none to find. What it costs is the cast of scales from F16 to BF16."""
    stacks = foreign(tmp_path / "source", tmp_path / "m.gguf", types=("Q4_0", "F16"))
    monkeypatch.setattr(conversion, "READ_BYTES", 1)
    experts = [
        m for m in gguf_plan(tmp_path / "m.gguf").matrices if m.source_format.name == "q4_0" and ".3." in m.module
    ]
    matrix = next(m for m in experts if m.kind == "experts")
    assert matrix.target.name == "int4_g32"
    values = stacks[gguf_name(matrix.module.replace(".3.", ".") + ".weight")][3]
    blocks = [conversion.convert_block(block) for block in conversion.read_blocks(matrix, method)]
    assert [block.rows for block in blocks] == [128, 128]
    words = torch.cat([part for block in blocks for part in block.parts["weight_packed"]]).numpy().view(np.uint8)
    scales = torch.cat([part for block in blocks for part in block.parts["weight_scale"]]).float().numpy()
    codes = np.stack((words & 15, words >> 4), axis=-1).reshape(256, 8, 32).astype(np.int64) - 8
    f16 = values.reshape(256, 8, 32) / np.where(codes, codes, 1)  # the file's scale, wherever a code is not 0
    known = (codes != 0) & (f16 != 0)
    assert np.array_equal(np.broadcast_to(scales[:, :, None], codes.shape)[known], as_bf16(f16[known]))
    assert not values.reshape(codes.shape)[codes == 0].any()
    made, damage = codes * scales[:, :, None].astype(np.float64), conversion.Damage()
    for block in blocks:
        damage.add(block.sums)
    error = ((made.reshape(256, 256) - values) ** 2).sum() / (values.astype(np.float64) ** 2).sum()
    assert damage.relative_mse == pytest.approx(error, rel=1e-6, abs=1e-12)
    assert 0 < error < 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("blk.1.attn_k_b.weight"), r"blk.1.attn_k_b.weight and blk.1.attn_v_b.weight .* missing"),
        (lambda t: t.pop("blk.2.ffn_up_exps.weight"), r"tensor blk.2.ffn_up_exps.weight \[4, 256, 256\] is missing"),
        (lambda t: t.pop("output.weight"), r"tensor output.weight is missing \(tied embeddings are not supported\)"),
        (lambda t: t.update({"blk.0.odd.weight": np.zeros(4)}), "tensor blk.0.odd.weight is not part of this model"),
        (
            lambda t: t.update({"blk.1.attn_norm.weight": np.zeros(128, np.float32)}),
            r"blk.1.attn_norm.weight has shape \[128\], expected \[256\]",
        ),
        (
            lambda t: t.update({"blk.1.attn_v_b.weight": np.zeros((4, 16, 256), np.float32)}),
            r"blk.1.attn_v_b.weight has shape \[4, 16, 256\], expected \[4, 32, 128\]",
        ),
        (
            lambda t: t.update({"blk.1.ffn_down_exps.weight": np.zeros((3, 256, 256), np.float32)}),
            r"blk.1.ffn_down_exps.weight has shape \[3, 256, 256\], expected \[4, 256, 256\]",
        ),
    ],
)  # fmt: skip
def test_what_is_missing_misshapen_or_unknown_is_named(tmp_path: Path, change: Change, message: str) -> None:
    foreign(tmp_path / "source", tmp_path / "m.gguf", change=change)
    with pytest.raises(CheckpointError, match=message):
        open_gguf(tmp_path / "m.gguf").checkpoint.raise_for_problems()


def test_a_file_of_another_architecture_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConfigError, match="general.architecture is 'llama'; supported: 'deepseek2'"):
        open_gguf(tmp_path / "m.gguf")
    with pytest.raises(K2LiteError, match="can't be read: No such file"):
        open_gguf(tmp_path / "none.gguf")
