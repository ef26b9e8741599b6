import copy
import math
import pickle
from dataclasses import asdict, dataclass, fields, replace

import pytest

from hf_sparse.core import registry
from hf_sparse.core.registry import registered_methods
from hf_sparse.core.settings import TrainingSettings
from hf_sparse.finetune import FinetuneConfig

OF_METHODS = [method.training().settings_type for method in registered_methods().values()]
FIELDS = [field for settings in (FinetuneConfig, *OF_METHODS) for field in fields(settings)]
NUMBERS = [field.name for field in FIELDS if type(field.default) is float]
INTEGERS = [field.name for field in FIELDS if type(field.default) is int]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "magic"}, "objective must be one of distill, lm, graph, attention, got 'magic'"),
        ({"mixed_precision": "fp16"}, "mixed_precision must be one of no, bf16, fp8, got 'fp16'"),
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
        ({"objective": "attention", "lora_steps": 4}, "lora_steps must be 0 for the objective 'attention'"),
        ({"seed": 2**24 + 1}, "seed must be at most 16,777,216, got 16777217"),
        ({"steps": 10**7 + 1}, "steps must be at most 10,000,000, got 10000001"),
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


def test_an_unknown_setting_is_refused_at_once():
    with pytest.raises(TypeError, match=r"no setting 'warmstart_steps'; did you mean 'warm_start_steps'\?$"):
        FinetuneConfig(warmstart_steps=3)
    with pytest.raises(TypeError, match=r"no setting 'stesp'; did you mean 'steps'\?$"):
        FinetuneConfig(stesp=3)
    with pytest.raises(TypeError, match=r"no setting 'x'; expected one of objective, .*, graph_steps, .*lora_steps$"):
        FinetuneConfig(x=3)
    with pytest.raises(TypeError, match="no setting 'x'"):
        replace(FinetuneConfig(), x=3)


def test_settings_of_methods_are_those_that_differ_from_their_defaults():
    config = FinetuneConfig("lm", warm_start_steps=3, graph_steps=100, steps=2)
    assert (config.objective, config.steps, dict(config.method_settings)) == ("lm", 2, {"warm_start_steps": 3})
    assert FinetuneConfig(warm_start_steps=40, alpha_start=None) == FinetuneConfig()
    assert FinetuneConfig(warm_start_steps=3) != FinetuneConfig()


def test_copies_keep_the_settings_of_methods():
    config = FinetuneConfig(steps=2, warm_start_steps=3)
    moved = replace(config, output_dir="run", seed=1)
    assert (moved.output_dir, moved.seed, moved.steps) == ("run", 1, 2)
    assert moved.method_settings == {"warm_start_steps": 3}
    both = replace(config, final_scale=2.0)
    assert both.method_settings == {"final_scale": 2.0, "warm_start_steps": 3}
    assert replace(both, warm_start_steps=40).method_settings == {"final_scale": 2.0}
    for same in (
        replace(config),
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
        FinetuneConfig(**asdict(config)),
    ):
        assert same == config and hash(same) == hash(config)


def test_a_value_is_refused_if_no_method_takes_it(monkeypatch):
    """Two methods may have settings of one name and other ideas of it; here a third has `graph_rows`, even 0."""

    @dataclass(frozen=True)
    class Settings(TrainingSettings):
        graph_rows: int = 0

    class Other:
        objectives, settings_type = ("guess",), Settings

    known = registered_methods()
    method = replace(next(iter(known.values())), peft_type="OTHER", training=lambda: Other)
    monkeypatch.setattr(registry, "_METHODS", known | {"OTHER": method})
    assert FinetuneConfig(objective="guess", graph_rows=0).method_settings == {"graph_rows": 0}
    with pytest.raises(ValueError, match="graph_steps must be an integer of at least 0, got -1"):
        FinetuneConfig(graph_steps=-1, graph_rows=8)


def test_settings_leave_out_what_cannot_change_the_result(tmp_path):
    plain, placed = FinetuneConfig(), FinetuneConfig(output_dir=str(tmp_path), checkpoint_every=3, progress=False)
    assert FinetuneConfig(gradient_checkpointing=True).settings() == plain.settings()
    assert plain.settings() == placed.settings()
    assert plain.settings() != FinetuneConfig(seed=1).settings()


def test_every_setting_has_a_sentence_for_the_command_line():
    assert [field.name for field in FIELDS if field.metadata.get("cli", True) and not field.metadata.get("help")] == []
