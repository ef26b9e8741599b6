import math
from dataclasses import fields

import pytest

from hf_sparse.finetune import FinetuneConfig

NUMBERS = [f.name for f in fields(FinetuneConfig) if type(f.default) is float]
INTEGERS = [f.name for f in fields(FinetuneConfig) if type(f.default) is int]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "magic"}, "objective must be one of distill, attention, lm, graph, got 'magic'"),
        ({"mixed_precision": "fp8"}, "mixed_precision must be one of"),
        ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
        ({"warm_start_steps": -1}, "warm_start_steps must be"),
        ({"batch_size": 1.5}, "batch_size must be an integer"),
        ({"steps": True}, "steps must be an integer of at least 1, got True"),
        ({"learning_rate": 0.0}, "^learning_rate must be a number above 0, got 0.0"),
        ({"learning_rate": "1e-3"}, "^learning_rate must be a number above 0, got '1e-3'"),
        ({"graph_learning_rate": float("nan")}, "graph_learning_rate must be a number above 0, got nan"),
        ({"graph_loss": "magic"}, "graph_loss must be one of .*, got 'magic'"),
        ({"graph_steps": -1}, "graph_steps must be an integer of at least 0, got -1"),
        ({"graph_rows": 0}, "graph_rows must be an integer of at least 1, got 0"),
        ({"alpha_start": 1.0}, "alpha_start must be None or above 1 and below 2, got 1.0"),
        ({"lm_weight": -1.0}, "lm_weight must be a number at least 0, got -1.0"),
        ({"hidden_weight": float("nan")}, "hidden_weight must be a number at least 0, got nan"),
        ({"objective": "lm", "hidden_weight": 1.0}, "belong to 'distill', the objective is 'lm'"),
        ({"final_scale": 0.0}, "final_scale must be a number above 0, got 0.0"),
        ({"objective": "attention", "final_scale": 4.0}, "which has no gates; got 4.0"),
        *(
            ({name: value}, f"^{name} must be ")
            for name in NUMBERS
            for value in (math.nan, math.inf, 1e30, -1.0, True, "1")
        ),
        *(
            ({name: value}, f"^{name} must be ")
            for name in INTEGERS
            for value in (math.nan, 10**30, -1, True, 2.0, "1")
        ),
        ({"alpha_start": "1.5"}, "alpha_start must be None or above 1 and below 2, got '1.5'"),
        ({"checkpoint_every": 5}, "need an output_dir"),
        ({"resume": True}, "need an output_dir"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        FinetuneConfig(**changes)


def test_settings_leave_out_what_cannot_change_the_result(tmp_path):
    plain, placed = FinetuneConfig(), FinetuneConfig(output_dir=str(tmp_path), checkpoint_every=3, progress=False)
    assert FinetuneConfig(gradient_checkpointing=True).settings() == plain.settings()
    assert plain.settings() == placed.settings()
    assert plain.settings() != FinetuneConfig(seed=1).settings()
    assert plain.settings().keys() - plain.settings({"seed", "steps"}).keys() == {"seed", "steps"}
