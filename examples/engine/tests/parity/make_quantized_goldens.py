#!/usr/bin/env python3
"""Makes small random checkpoints in four and eight bits with the tools that publish such checkpoints, and what the
reference implementation computes with them.

Beside what make_goldens.py needs (whose form of golden.safetensors this one has), on a CPU:

    pip install --no-deps compressed-tensors==0.20.0 loguru accelerate psutil logbar
    pip download --no-deps --no-build-isolation autoawq==0.2.9 gptqmodel==2.2.0    # and unpack both
    python make_quantized_goldens.py autoawq-0.2.9 gptqmodel-2.2.0 [VARIANT ...]

Words are packed and dequantised by autoawq's WQLinear_GEMM and gptqmodel's TorchQuantLinear. FP8 is dequantised by
transformers and by compressed-tensors. Arithmetic is in f32 from what the stored numbers are worth.
"""

import json
import math
import os
import shutil
import sys
import types

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from make_goldens import COMMON, GENERATED, HERE, MARGIN, PROMPT, VOCAB, golden, randomise, reference, rope

E4M3_MAX = 448.0
SIZES = dict(hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2,
             num_hidden_layers=1, tie_word_embeddings=True)


def open_tools(awq, gptq):
    """Imports the two modules that are needed, without the packages around them."""
    sys.path[:0] = [awq, gptq]
    for name in ["awq", "awq.modules", "awq.modules.linear", "awq.utils", "gptqmodel", "gptqmodel.utils",
                 "gptqmodel.models", "gptqmodel.nn_modules"]:
        package = types.ModuleType(name)
        package.__path__ = [os.path.join(awq if name.startswith("awq") else gptq, *name.split("."))]
        sys.modules[name] = package
    from gptqmodel.utils.backend import BACKEND
    sys.modules["gptqmodel.utils"].BACKEND = BACKEND


def grouped(weight, group):
    """[out, in] as [out, groups, group]."""
    return weight.reshape(weight.shape[0], -1, group)


def four_bits(weight, group, symmetric):
    """A scale in f16's numbers and a zero point for each group: [out, groups] each. Changes a few weights."""
    parts = grouped(weight, group)
    if symmetric:
        scale = parts.abs().amax(-1) / 7.5
        zero = torch.full_like(scale, 8)
    else:
        # Outputs without a weight below zero, and without one above: zero points at both ends.
        parts[3::16], parts[10::16] = parts[3::16].abs(), -parts[10::16].abs()
        low, high = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
        scale = (high - low) / 15
        zero = (-low / scale.half().float()).round().clamp(0, 15)
    return scale.half().float(), zero


def inside(weight, scale, zero, group):
    """The nearest numbers that have a place in four bits: the tools' packers do not clamp."""
    s, z = scale[..., None], zero[..., None]
    return (((grouped(weight, group) / s + z).round().clamp(0, 15) - z) * s).reshape(weight.shape)


def awq(linear, group, symmetric):
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    scale, zero = four_bits(linear.weight.data, group, symmetric)
    linear.weight.data = inside(linear.weight.data, scale, zero, group)
    packed = WQLinear_GEMM.from_linear(linear, 4, group, scales=scale.t().contiguous(), zeros=zero.t().contiguous())
    tensors = dict(qweight=packed.qweight, qzeros=packed.qzeros, scales=packed.scales)
    return tensors, dequantize_gemm(packed.qweight, packed.qzeros, packed.scales.float(), 4, group).t()


def gptq(linear, group, symmetric, version):
    from gptqmodel.nn_modules.qlinear.torch import TorchQuantLinear
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    width = linear.in_features
    every = width if group == -1 else group
    scale, zero = four_bits(linear.weight.data, every, symmetric)
    linear.weight.data = inside(linear.weight.data, scale, zero, every)
    packed = TorchQuantLinear(4, group, symmetric, False, width, linear.out_features, bias=False)
    packed.optimized = True
    packed.pack(linear, scale, zero, packed.g_idx)
    packed.post_init()
    stored_scales, packed.scales = packed.scales, packed.scales.float()
    worth = packed.dequantize_weight().t()
    if version == 1:
        # Takes one from every zero point, by whole words: what is below 0 borrows from its neighbour.
        convert_gptq_v2_to_v1_format_module(packed, types.SimpleNamespace(bits=4))
    return dict(qweight=packed.qweight, qzeros=packed.qzeros, scales=stored_scales, g_idx=packed.g_idx), worth


def fp8(linear, rows, cols, name, scale_dtype=torch.float32):
    """Blocks of [rows, cols] with a scale each, which `scale_dtype` has; None is all of them."""
    weight = linear.weight.data
    rows, cols = rows or weight.shape[0], cols or weight.shape[1]
    down, across = math.ceil(weight.shape[0] / rows), math.ceil(weight.shape[1] / cols)
    scale = torch.empty(down, across)
    elements = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for i in range(down):
        for j in range(across):
            block = (slice(i * rows, (i + 1) * rows), slice(j * cols, (j + 1) * cols))
            scale[i, j] = (weight[block].abs().max() / E4M3_MAX).to(scale_dtype)
            elements[block] = (weight[block] / scale[i, j]).to(torch.float8_e4m3fn)
    return {"weight": elements, name: scale}


def compressed(strategy, dynamic):
    """quantization_config of compressed-tensors, as llm-compressor writes it."""
    weights = dict(num_bits=8, type="float", strategy=strategy, symmetric=True, dynamic=False, observer="minmax")
    inputs = dict(num_bits=8, type="float", strategy="token" if dynamic else "tensor", symmetric=True, dynamic=dynamic)
    group = dict(targets=["Linear"], weights=weights, input_activations=inputs, output_activations=None)
    return dict(quant_method="compressed-tensors", format="float-quantized", quantization_status="compressed",
                config_groups=dict(group_0=group), ignore=["lm_head"], kv_cache_scheme=None)


VARIANTS = {
    # name: (config class, fields, dtype of the other tensors, what a matrix becomes, quantization_config)
    "llama-awq": (
        "Llama", dict(**rope("default")), "float16", lambda linear: awq(linear, 32, False),
        dict(quant_method="awq", version="gemm", bits=4, group_size=32, zero_point=True),
    ),
    "qwen2-awq-128": (
        "Qwen2", dict(**SIZES, **rope("default")), "float16", lambda linear: awq(linear, 128, False),
        dict(quant_method="awq", version="gemm", bits=4, group_size=128, zero_point=True,
             modules_to_not_convert=None),
    ),
    "llama-gptq": (
        "Llama", dict(**rope("default")), "float16", lambda linear: gptq(linear, 32, True, 1),
        dict(quant_method="gptq", bits=4, group_size=32, sym=True, desc_act=False, checkpoint_format="gptq"),
    ),
    "qwen2-gptq-asymmetric": (
        "Qwen2", dict(**SIZES, **rope("default")), "float16", lambda linear: gptq(linear, 128, False, 1),
        dict(quant_method="gptq", bits=4, group_size=128, sym=False, desc_act=False),
    ),
    "llama-gptq-v2": (
        "Llama", dict(**rope("default")), "float16", lambda linear: gptq(linear, 32, False, 2),
        dict(quant_method="gptq", bits=4, group_size=32, sym=False, desc_act=False, checkpoint_format="gptq_v2"),
    ),
    "qwen3-gptq-rows": (
        "Qwen3", dict(head_dim=32, tie_word_embeddings=True, **rope("default")), "float16",
        lambda linear: gptq(linear, -1, True, 2),
        dict(quant_method="gptq", bits=4, group_size=-1, sym=True, desc_act=False, checkpoint_format="gptq_v2"),
    ),
    "qwen3-fp8-blocks": (
        "Qwen3", dict(**(SIZES | dict(num_attention_heads=2, num_key_value_heads=1)), head_dim=16, **rope("default")),
        "bfloat16", lambda linear: fp8(linear, 128, 128, "weight_scale_inv"),
        dict(quant_method="fp8", fmt="e4m3", activation_scheme="dynamic", weight_block_size=[128, 128]),
    ),
    "mistral-fp8-tensor": (
        "Mistral", dict(sliding_window=16, **rope("default")), "bfloat16",
        lambda linear: fp8(linear, None, None, "weight_scale_inv"),
        dict(quant_method="fp8", activation_scheme="static", weight_block_size=None),
    ),
    "llama-fp8-channels": (
        "Llama", dict(**rope("default")), "bfloat16",
        lambda linear: fp8(linear, 1, None, "weight_scale", torch.bfloat16),
        compressed("channel", True),
    ),
    "qwen2-fp8-tensor": (
        "Qwen2", dict(tie_word_embeddings=True, **rope("default")), "bfloat16",
        lambda linear: fp8(linear, None, None, "weight_scale", torch.bfloat16), compressed("tensor", False),
    ),
}


def store(model, directory, dtype, pack, quantization):
    """Writes the checkpoint; what the tools dequantised goes into the model."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    tensors = {}
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        packed = pack(module)
        if isinstance(packed, tuple):
            packed, module.weight.data = packed[0], packed[1].contiguous()
        if quantization.get("activation_scheme") == "static":
            packed["activation_scale"] = torch.tensor(0.05)
            packed["weight_scale_inv"] = packed["weight_scale_inv"].reshape(())
        if quantization["quant_method"] == "compressed-tensors":
            packed["weight_scale"] = packed["weight_scale"].reshape(-1, 1)
            if packed["weight_scale"].numel() == 1:
                packed["weight_scale"] = packed["weight_scale"].reshape(1)
                packed["input_scale"] = torch.tensor([0.05])
        tensors |= {f"{name}.{part}": tensor.contiguous() for part, tensor in packed.items()}
    tied = model.config.tie_word_embeddings
    for name, parameter in model.state_dict().items():
        quantised = name.removesuffix(".weight") + (".qweight" if f"{name[:-7]}.qweight" in tensors else ".weight")
        if quantised in tensors or (tied and name == "lm_head.weight"):
            continue
        stored = parameter.to(getattr(torch, dtype))
        parameter.copy_(stored.float())
        tensors[name] = stored.contiguous()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | dict(architectures=[type(model).__name__], dtype=dtype)
    config["quantization_config"] = quantization
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def reread(directory, quantization):
    """FP8 as the reference reads it from the files, in f32; what it would do to activations is left out."""
    kinds = {"fp8": transformers.FineGrainedFP8Config, "compressed-tensors": transformers.CompressedTensorsConfig}
    kind = kinds.get(quantization["quant_method"])
    if kind is None:
        return None
    how = dict(quantization, dequantize=True)
    if kind is transformers.FineGrainedFP8Config:
        how = {key: how[key] for key in ["activation_scheme", "weight_block_size", "dequantize"]}
    else:
        how.pop("quant_method")
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager",
                                                quantization_config=kind(**how)).float()


def narrow_scales(directory):
    """Stores compressed-tensors' scales in the bf16 that their numbers have. Its own dequantisation rounds weights to
    the type of the scales, so the reference reads them in f32."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if name.endswith((".weight_scale", ".input_scale")):
            tensors[name] = tensor.bfloat16()
    save_file(tensors, path, metadata={"format": "pt"})


def make(name):
    kind, fields, dtype, pack, quantization = VARIANTS[name]
    directory = HERE / name
    for seed in range(1000):
        config = getattr(transformers, f"{kind}Config")(**{**COMMON, **fields}, attn_implementation="eager")
        model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
        generator = torch.Generator().manual_seed(seed)
        randomise(model, generator)
        model.tie_weights()
        store(model, directory, dtype, pack, quantization)
        prompt = torch.randint(4, VOCAB, (PROMPT,), generator=generator).tolist()
        found = reference(reread(directory, quantization) or model, prompt)
        if found:
            narrow_scales(directory)
            return golden(name, seed, prompt, *found)
    sys.exit(f"{name}: no seed below 1000 leaves a margin of {MARGIN}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    open_tools(*sys.argv[1:3])
    for variant in sys.argv[3:] or VARIANTS:
        make(variant)
