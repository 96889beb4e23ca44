"""What routing has shown in earlier runs, kept in a file: the cache begins warm. Changes speed, never tokens."""

from __future__ import annotations

from pathlib import Path

from k2lite.offload.routing_trace import TracedModel
from k2lite.offload.saved_statistics import load_statistics, save_statistics
from k2lite.offload.source import ExpertSource
from k2lite.quant.errors import RequestError

from .config import ModelConfig


def recall_file(experts: ExpertSource, config: ModelConfig, path: Path) -> bool:
    """Begin with what the file holds; False if there is none yet. Raises RequestError for another model's."""
    if not path.exists():
        return False
    try:
        experts.recall(load_statistics(path, traced_model(config)))
    except ValueError as error:
        raise RequestError(f"{path}: {error}; remove it and begin anew") from error
    return True


def keep_in_file(experts: ExpertSource, config: ModelConfig, path: Path) -> None:
    """Write what routing has shown, over what the file held. Raises RequestError."""
    save_statistics(path, traced_model(config), experts.learned())


def traced_model(config: ModelConfig) -> TracedModel:
    return TracedModel(
        config.source.parent.resolve().name, config.model_type, config.moe_layers, config.n_routed_experts
    )
