"""Checkpoint files in: headers, names, layouts, quantisation, LoRA."""

from mlx_vlm_pipes.weights.checkpoint import (
    SafetensorWeights,
    TensorHandle,
    WeightData,
    Weights,
    WeightsAdapter,
    cast_floats,
    load_state_dict,
)
from mlx_vlm_pipes.weights.files import find_weight_files, load_weights, read_header
from mlx_vlm_pipes.weights.gguf import GGUFWeights
from mlx_vlm_pipes.weights.install import install_weights, parameter_shapes
from mlx_vlm_pipes.weights.layout import (
    ConvToChannelsLast,
    ConvToMatrix,
    Layout,
    Prefix,
    Reshape,
    adapt,
    decoder,
    detect_layout,
    map_names,
)
from mlx_vlm_pipes.weights.lora import (
    LoRAAdapter,
    LoRAPair,
    check_against_base,
    dora_factor,
    linear_shapes,
    merge_into,
    read_adapter,
    split_lora_path,
)
from mlx_vlm_pipes.weights.quantized import (
    ScaledFormat,
    canonical_overrides,
    parse_quantization,
    quantize_modules,
)
from mlx_vlm_pipes.weights.repack import drop_dummy_biases
from mlx_vlm_pipes.weights.safetensors import Header, TensorInfo
from mlx_vlm_pipes.weights.scaled import record_scales, unpack_checkpoint

__all__ = [
    "ConvToChannelsLast",
    "ConvToMatrix",
    "GGUFWeights",
    "Header",
    "Layout",
    "LoRAAdapter",
    "LoRAPair",
    "Prefix",
    "Reshape",
    "SafetensorWeights",
    "ScaledFormat",
    "TensorInfo",
    "WeightData",
    "Weights",
    "TensorHandle",
    "WeightsAdapter",
    "adapt",
    "canonical_overrides",
    "cast_floats",
    "check_against_base",
    "decoder",
    "detect_layout",
    "dora_factor",
    "drop_dummy_biases",
    "find_weight_files",
    "install_weights",
    "linear_shapes",
    "load_state_dict",
    "load_weights",
    "map_names",
    "merge_into",
    "parameter_shapes",
    "parse_quantization",
    "quantize_modules",
    "read_adapter",
    "read_header",
    "record_scales",
    "split_lora_path",
    "unpack_checkpoint",
]
