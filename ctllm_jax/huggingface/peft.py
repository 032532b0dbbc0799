"""Adapters in PEFT's format: adapter_model.safetensors and adapter_config.json, without PyTorch.

Our half-split RoPE is Hugging Face's, so that this is names, slices and transposes: A is [R, in] there, B [out, R].
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ctllm_jax.config.lora import LoraConfig
from ctllm_jax.huggingface.layout import MODULES
from ctllm_jax.huggingface.shards import write_tensors

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def to_peft(adapters: dict[str, dict[str, Any]]) -> dict[str, np.ndarray]:
    """Adapters `{query: {a: [L, in …, R], b: [L, R, out …]}, …}` under PEFT's names, a layer each, in their dtype."""
    tensors = {}
    for name, adapter in adapters.items():
        a, b = np.asarray(adapter["a"]), np.asarray(adapter["b"])
        for layer in range(a.shape[0]):
            module = f"base_model.model.model.layers.{layer}.{MODULES[name]}"
            tensors[f"{module}.lora_A.weight"] = np.ascontiguousarray(a[layer].reshape(-1, a.shape[-1]).T)
            tensors[f"{module}.lora_B.weight"] = np.ascontiguousarray(b[layer].reshape(b.shape[1], -1).T)
    return tensors


def peft_config(lora: LoraConfig, *, projections: list[str], base_model: str) -> dict[str, Any]:
    """adapter_config.json: which modules are adapted, and with what scale."""
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model, "bias": "none",
        "target_modules": [MODULES[name].rpartition(".")[2] for name in projections], "r": lora.rank,
        "lora_alpha": lora.alpha, "use_rslora": lora.rslora, "lora_dropout": 0.0, "fan_in_fan_out": False,
        "inference_mode": True, "init_lora_weights": True, "modules_to_save": None,
    }


def write_peft(directory: Path, adapters: dict[str, dict[str, Any]], lora: LoraConfig, *, base_model: str) -> None:
    """Write both files into a folder, which is made."""
    directory.mkdir(parents=True, exist_ok=True)
    write_tensors(directory / WEIGHTS, to_peft(adapters))
    config = peft_config(lora, projections=list(adapters), base_model=base_model)
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
