"""The vendor's operations that k2lite calls, as torch_npu declares them: facts, with source and version.

Source: torch_npu/csrc/aten/npu_native_functions_by_codegen.yaml in the wheels of the versions named, all of which
declare these alike (read 2026-11-24). A wheel whose declarations differ is not used: `differences` says where.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

VERSIONS = ("2.11.0", "2.12.0", "2.13.0", "2.14.0")

SCHEMAS = {
    "npu_grouped_matmul": """(Tensor[] x, Tensor[] weight, *, Tensor[]? bias=None, Tensor[]? scale=None,
        Tensor[]? offset=None, Tensor[]? antiquant_scale=None, Tensor[]? antiquant_offset=None,
        Tensor[]? per_token_scale=None, Tensor? group_list=None, Tensor[]? activation_input=None,
        Tensor[]? activation_quant_scale=None, Tensor[]? activation_quant_offset=None, int? split_item=0,
        int? group_type=None, int? group_list_type=0, int? act_type=0, int[]? tuning_config=None,
        int? output_dtype=None, int? x_dtype=None, int? weight_dtype=None, int? scale_dtype=None,
        int? per_token_scale_dtype=None) -> Tensor[]""",
    "npu_weight_quant_batchmatmul": """(Tensor x, Tensor weight, Tensor antiquant_scale,
        Tensor? antiquant_offset=None, Tensor? quant_scale=None, Tensor? quant_offset=None, Tensor? bias=None,
        int antiquant_group_size=0, int inner_precise=0, int? weight_dtype=None) -> Tensor""",
    "npu_moe_init_routing_v2": """(Tensor x, Tensor expert_idx, *, Tensor? scale=None, Tensor? offset=None,
        int active_num=-1, int expert_capacity=-1, int expert_num=-1, int drop_pad_mode=0,
        int expert_tokens_num_type=0, bool expert_tokens_num_flag=False, int quant_mode=-1,
        int[2] active_expert_range=[], int row_idx_type=0, int? x_dtype=None) -> (Tensor, Tensor, Tensor, Tensor)""",
    "npu_swiglu": "(Tensor self, int dim=-1) -> Tensor",
    "npu_moe_token_unpermute": """(Tensor permuted_tokens, Tensor sorted_indices, Tensor? probs=None,
        bool padded_mode=False, int[]? restore_shape=None) -> Tensor""",
    "npu_fused_infer_attention_score_v2": """(Tensor query, Tensor key, Tensor value, *, Tensor? query_rope=None,
        Tensor? key_rope=None, Tensor? pse_shift=None, Tensor? atten_mask=None, SymInt[]? actual_seq_qlen=None,
        SymInt[]? actual_seq_kvlen=None, Tensor? block_table=None, Tensor? dequant_scale_query=None,
        Tensor? dequant_scale_key=None, Tensor? dequant_offset_key=None, Tensor? dequant_scale_value=None,
        Tensor? dequant_offset_value=None, Tensor? dequant_scale_key_rope=None, Tensor? quant_scale_out=None,
        Tensor? quant_offset_out=None, Tensor? quant_scale_p=None, Tensor? learnable_sink=None,
        int num_query_heads=1, int num_key_value_heads=0, float softmax_scale=1.0, int pre_tokens=2147483647,
        int next_tokens=2147483647, str input_layout="BSH", int sparse_mode=0, int block_size=0,
        int query_quant_mode=0, int key_quant_mode=0, int value_quant_mode=0, int inner_precise=0,
        bool return_softmax_lse=False, int? query_dtype=None, int? key_dtype=None, int? value_dtype=None,
        int? query_rope_dtype=None, int? key_rope_dtype=None, int? key_shared_prefix_dtype=None,
        int? value_shared_prefix_dtype=None, int? dequant_scale_query_dtype=None,
        int? dequant_scale_key_dtype=None, int? dequant_scale_value_dtype=None,
        int? dequant_scale_key_rope_dtype=None, int? out_dtype=None) -> (Tensor, Tensor)""",
}


def declaration(operation: str) -> str:
    """One line, as Library.define takes it."""
    return operation + " ".join(SCHEMAS[operation].split())


def differences(found: Mapping[str, Any]) -> list[str]:
    """What stands in the way of calling operations declared as in `found` (parsed schemas by name) as k2lite does: one
    that is missing, an argument that is missing, elsewhere, of another type or default. Arguments that newer versions
    add behind are none."""
    wrong = []
    for operation in SCHEMAS:
        if operation not in found:
            wrong.append(f"{operation} is missing")
            continue
        ours = torch._C.parse_schema(f"npu::{declaration(operation)}")
        theirs = {argument.name: (at, argument) for at, argument in enumerate(found[operation].arguments)}
        for at, argument in enumerate(ours.arguments):
            if argument.name not in theirs:
                wrong.append(f"{operation} has no {argument.name}")
                continue
            place, other = theirs[argument.name]
            if _facts(argument) != _facts(other) or (not argument.kwarg_only and place != at):
                wrong.append(f"{operation} declares {argument.name} otherwise: {other}")
    return wrong


def installed() -> dict[str, Any]:
    """The operations of SCHEMAS that this process has, by name."""
    found = {}
    for operation in SCHEMAS:
        packet = getattr(torch.ops.npu, operation, None)
        if packet is not None:
            found[operation] = packet.default._schema
    return found


def _facts(argument: Any) -> tuple[object, ...]:
    default = argument.default_value if argument.has_default_value() else "none"
    return str(argument.type), argument.kwarg_only, str(default)
