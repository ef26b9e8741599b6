"""Damaged adapters, many of them: each is refused with an error of ours, or is nothing but another sound adapter."""

import copy
import json
import os
import random
import warnings
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import load, save

import hf_sparse
from hf_sparse.adapters.saving import save_adapter
from hf_sparse.errors import HfSparseError

COUNT = int(os.environ.get("HF_SPARSE_FUZZ", "120"))
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TOKENS = torch.arange(1, 13)[None]

CONFIGS = {
    "sparsek": lambda: hf_sparse.SparseKConfig(k=2, window=2, sinks=1, layer_shares=[0.5, 1.5], layers=[0, 1]),
    "sparsek-lora": lambda: hf_sparse.SparseKConfig(
        k=2, window=2, sinks=1, scorer="mlp", scorer_hidden_size=3, lora_rank=2
    ),
    "sparsefinder": lambda: hf_sparse.SparsefinderConfig(tile=4, clusters=4, rank=2, head_budgets=True),
    "sparsefinder-full": lambda: hf_sparse.SparsefinderConfig(predictor="full", learn_alpha=True, lora_rank=2),
}

VALUES = [
    *(None, True, False, 0, 1, 2, 3, -1, 7, 2**24, 2**24 + 1, 2**40, 2**63, 2**64, 10**18, 10**30, 10**400, -(10**30)),
    *(0.0, 0.5, 1.0, 1.5, -0.5, 1e-320, 1e9, 1e10, 1e30, 1e308, float("nan"), float("inf"), float("-inf")),
    *("", "x", "linear", "full", "clustering", "1", "LORA", "HF_SPARSE_SPARSEK", "HF_SPARSE_SPARSEFINDER", "CAUSAL_LM"),
    *("SEQ_2_SEQ_LM", "FEATURE_EXTRACTION", "\0", "a" * 100_000, "../../x", "\ud800"),
    *(
        [],
        [0],
        [1, 0],
        [-1],
        [2**40],
        ["x"],
        [None],
        [[]],
        [1.0, 1.0],
        [10**400],
        [True, False],
        {},
        {"x": 1},
        {"0": []},
    ),
]
DTYPES = [torch.int8, torch.uint8, torch.int64, torch.bool, torch.float64, torch.float8_e5m2, torch.complex64]


def damaged_bytes(data: bytes, chance: random.Random, least: int = 0) -> bytes:
    at = chance.randrange(least, len(data))
    kind = chance.choice(["flip", "set", "cut", "drop", "double", "insert", "zero"])
    size = chance.choice([1, 1, 2, 8, 64])
    if kind == "flip":
        return data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]
    if kind == "set":
        return data[:at] + chance.randbytes(1) + data[at + 1 :]
    if kind == "cut":
        return data[:at]
    if kind == "drop":
        return data[:at] + data[at + size :]
    if kind == "double":
        return data[:at] + data[at : at + size] + data[at:]
    if kind == "insert":
        return data[:at] + chance.randbytes(size) + data[at:]
    return data[:at] + bytes(size) + data[at + size :]


def damaged_config(data: bytes, chance: random.Random) -> bytes:
    if chance.random() < 0.3:
        return damaged_bytes(data, chance)
    content = json.loads(data)
    for _ in range(chance.choice([1, 1, 2])):
        key = chance.choice(sorted(content))
        kind = chance.random()
        if kind < 0.8:
            content[key] = chance.choice(VALUES)
        elif kind < 0.9:
            content[key + chance.choice(["_", "s", "x"])] = content.pop(key)
        else:
            content[chance.choice(["cls", "self", "runtime_config", "new_in_2030", ""])] = chance.choice(VALUES)
    return json.dumps(content).encode()


def damaged_weights(data: bytes, chance: random.Random) -> bytes:
    kind = chance.random()
    if kind < 0.4:
        return damaged_bytes(data, chance)
    if kind < 0.5:  # in the header
        return (
            damaged_bytes(data[: 8 + int.from_bytes(data[:8], "little")], chance)
            + data[8 + int.from_bytes(data[:8], "little") :]
        )
    state = load(data)
    key = chance.choice(sorted(state))
    tensor = state[key]
    kind = chance.choice(["dtype", "value", "shape", "drop", "rename", "add", "half"])
    if kind == "dtype":
        state[key] = tensor.nan_to_num().to(chance.choice(DTYPES))
    elif kind == "value":
        tensor.view(-1)[chance.randrange(tensor.numel())] = chance.choice([torch.nan, torch.inf, -torch.inf])
    elif kind == "shape":
        state[key] = chance.choice(
            [tensor[:1], tensor.flatten(), tensor[None], tensor[..., :0], tensor.repeat(2, *[1] * (tensor.ndim - 1))]
        )
    elif kind == "drop":
        del state[key]
    elif kind == "rename":
        state[chance.choice([key + "x", key.replace("0", "1"), key.replace("layers", "layer"), key[1:]])] = state.pop(
            key
        )
    elif kind == "add":
        name = chance.choice(["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight", "x"])
        state["base_model.model." + name] = torch.zeros(chance.choice([16, 64]), 16)
    else:
        state[key] = tensor.to(chance.choice([torch.bfloat16, torch.float16]))
    return save({name: x.contiguous() for name, x in state.items()}, {"format": "pt"})


def check_sound(model, folder: Path) -> None:
    """What was loaded is what the files say, and can be used."""
    config = model.active_peft_config
    content = json.loads((folder / CONFIG).read_bytes())
    filled = {"inference_mode", "target_modules", "base_shape", "peft_type", "auto_mapping", "peft_version"}
    for name in {field.name for field in fields(config)} & content.keys() - filled:
        value = getattr(config, name)
        said = sorted(set(content[name])) if name == "layers" and content[name] else content[name]
        assert value == said and type(value) in (type(said), type(config.task_type)), name
    with safe_open(folder / WEIGHTS, "pt") as file:
        held = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    state = {key.replace(".default.", "."): x for key, x in model.state_dict().items()}
    for key, tensor in held.items():
        assert tensor.dtype in (torch.float32, torch.bfloat16, torch.float16)
        assert torch.equal(state[key].nan_to_num(7.0), tensor.float().nan_to_num(7.0))
        assert tensor.isfinite().all() or (tensor.isnan().all() and "sparsefinder_parameters" in key)
    learned = {key for key in state if "sparse_attention" in key}
    assert learned == {key for key in held if "sparse_attention" in key}


@pytest.mark.fuzz
@pytest.mark.parametrize("method", sorted(CONFIGS))
def test_damaged_adapters(tiny_llama, tmp_path, method):
    chance = random.Random(f"adapters {method}")
    dense = tiny_llama(hidden_size=16, intermediate_size=16, num_key_value_heads=2)
    save_adapter(get_peft_model(copy.deepcopy(dense), CONFIGS[method]()), tmp_path)
    sound = {name: (tmp_path / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    refused = 0
    for number in range(-(-COUNT // len(CONFIGS))):
        name = chance.choice([CONFIG, WEIGHTS])
        damage = damaged_config if name == CONFIG else damaged_weights
        changed = damage(sound[name], chance)
        for other, data in sound.items():
            (tmp_path / other).write_bytes(changed if other == name else data)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # PEFT's, of keys that it does not know
                model = hf_sparse.from_pretrained(tmp_path, base_model=copy.deepcopy(dense))
        except HfSparseError as error:
            assert "\n" not in str(error) and len(str(error)) < 2000
            refused += 1
        except Exception as error:
            pytest.fail(f"case {number} of {method}, {name}: {type(error).__name__}: {error}")
        else:
            check_sound(model, tmp_path)
    assert refused > COUNT / len(CONFIGS) / 2
