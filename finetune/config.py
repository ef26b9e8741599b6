"""Define the settings of a training run: those of every method, and how those of one method join them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any, Literal, get_args

from hf_sparse.core.settings import check_choice, check_integer, check_number, values_of

Precision = Literal["no", "bf16", "fp8"]

#: The largest seed: generators are seeded with products of it, which must fit into 64 bits.
MOST_SEED = 2**24

# Settings that cannot change the result: where it is written, what is shown, what it takes.
_WITHOUT_INFLUENCE = ("output_dir", "checkpoint_every", "resume", "progress", "gradient_checkpointing", "tracker")

# Settings that came later, and are recorded where they are not at their defaults: a checkpoint from before is one of
# the same run.
_LATER = ("teacher_window",)


@dataclass(frozen=True)
class SharedSettings:
    """Hold the settings of a training run that every method has; `FinetuneConfig` says what each of them means.

    The `metadata` of a field has `"help"`, a sentence for the command line; `"cli": False` where there is no option for
    it; `"needs_lora": True` where it has no effect on an adapter without LoRA.
    """

    objective: str = field(
        default="distill",
        metadata={"help": "distill: stay close to dense attention. lm: predict tokens. A method may have others."},
    )
    lm_weight: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the next-token cross-entropy that is added to `distill` of a causal language model; by "
            "default what the method does best with."
        },
    )
    hidden_weight: float = field(
        default=0.0, metadata={"help": "Weight of the distance of hidden states that is added to `distill`."}
    )
    steps: int = field(default=300, metadata={"help": "Optimiser steps of the objective."})
    batch_size: int = field(default=2, metadata={"help": "Chunks per step and process."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Batches per optimiser step."})
    learning_rate: float = field(default=2e-2, metadata={"help": "Peak of the schedule."})
    lora_learning_rate: float = field(
        default=2e-4, metadata={"help": "Peak for LoRA, if the adapter has it.", "needs_lora": True}
    )
    warmup_steps: int = field(default=10, metadata={"help": "Steps of linear warm-up, in each stage."})
    weight_decay: float = field(default=0.0, metadata={"help": "Weight decay of AdamW."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are clipped to this norm."})
    seed: int = field(default=0, metadata={"help": "Seed of the order of the chunks and of the hidden tokens."})
    mixed_precision: Precision = field(default="no", metadata={"help": "Mixed precision of accelerate."})
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Run layers again in the backward: less memory, more time."}
    )
    cpu: bool = field(default=False, metadata={"help": "Stay on the CPU.", "cli": False})
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder for checkpoints and finetune.json.", "cli": False}
    )
    checkpoint_every: int = field(default=0, metadata={"help": "Steps between checkpoints; 0: none.", "metavar": "N"})
    resume: bool = field(default=False, metadata={"help": "Continue from the last checkpoint in DIR."})
    progress: bool = field(default=True, metadata={"help": "Show a progress bar.", "cli": False})
    tracker: str | None = field(
        default=None, metadata={"help": "Tracker of accelerate that shows the run: tensorboard, trackio, wandb, ..."}
    )
    teacher_window: int = field(
        default=0,
        metadata={
            "help": "The teacher of `distill` attends to so many tokens before each, up to twice as many, and to the "
            "first ones: linear in the length, for long texts. 0: to all.",
            "metavar": "N",
        },
    )

    def __post_init__(self) -> None:
        check_choice("mixed_precision", self.mixed_precision, get_args(Precision))
        for name in ("steps", "batch_size", "gradient_accumulation_steps"):
            check_integer(name, getattr(self, name), least=1)
        for name in ("warmup_steps", "checkpoint_every", "teacher_window"):
            check_integer(name, getattr(self, name), least=0)
        check_integer("seed", self.seed, least=0, most=MOST_SEED)
        # Beyond the largest value nothing was ever learned.
        for name, most in (("learning_rate", 1.0), ("lora_learning_rate", 1.0), ("max_grad_norm", 1e9)):
            check_number(name, getattr(self, name), most)
        for name, most in (("weight_decay", 1e3), ("lm_weight", 1e6), ("hidden_weight", 1e6)):
            if (value := getattr(self, name)) is not None:
                check_number(name, value, most, or_zero=True)
        if (self.lm_weight or self.hidden_weight) and self.objective != "distill":
            raise ValueError(f"lm_weight and hidden_weight belong to 'distill', the objective is {self.objective!r}")
        if self.teacher_window and self.objective != "distill":
            raise ValueError(
                f"teacher_window belongs to 'distill'; the objective {self.objective!r} has no teacher of whole texts"
            )
        if self.output_dir is None and (self.checkpoint_every or self.resume):
            raise ValueError("checkpoint_every and resume need an output_dir")


# The constructor takes any keyword, because the names of a method's settings stand in the method's folder alone, and
# all settings of a run are written in one place: FinetuneConfig(steps=300, seed=1, setting_of_the_method=2). One class
# per method would make people import another name for each method, and whoever does not know the method, such as a
# command line, could make none. The price: a type checker knows the fields, but not the keywords, so these are checked
# as soon as the object is made.
@dataclass(frozen=True, init=False)
class FinetuneConfig(SharedSettings):
    """Hold the settings of `finetune`. The defaults are the recipe that was measured (model_cards/).

    The fields are for every method. Each method has settings and objectives besides, which its folder lists with their
    meaning (`hf_sparse.methods.NAME.training_settings`); such a setting is given as a keyword like any other.
    `finetune` refuses a setting of another method than the model has, unless it is at its default.

    Attributes:
        objective: `"distill"`: KL from the same model with sparse attention off (of a masked language model, at the
            hidden tokens); of a model without a language modelling head, 1 - cosine between their last hidden states
            and between the means of these. `"lm"`: the loss of the language modelling head. A method may have others.
        lm_weight: of the next-token cross-entropy that is added to `"distill"` of a causal language model; by default
            what the method does best with (`hf_sparse.finetune.stages.Training.lm_weight`), which finetune.json tells.
        hidden_weight: of the distance of the layers' hidden states from the dense model's that is added to
            `"distill"` of a causal language model; 0 for a layer that repeats them, about 1 for one that has nothing to
            do with them.
        steps: optimiser steps of the objective.
        batch_size: chunks per step and process.
        gradient_accumulation_steps: batches per optimiser step.
        learning_rate: AdamW's peak, at most 1; linear warm-up over `warmup_steps`, then linear decay to 0, in each
            stage.
        lora_learning_rate: the peak for LoRA, where the adapter has a `lora_rank`. It is trained with `"distill"` and
            `"lm"`, in the same optimiser, beside what the method learns.
        warmup_steps: see `learning_rate`.
        weight_decay: weight decay of AdamW.
        max_grad_norm: gradients are clipped to this norm, those of LoRA apart.
        seed: order of the chunks (and, from the command line, which tokens are hidden from a masked language model).
            Nothing else is random; on CUDA, sums in another order still differ in the last bits
            unless `torch.use_deterministic_algorithms(True)` is set.
        mixed_precision: accelerate's `"bf16"`, its `"fp8"` with torchao (the base model's linear layers multiply in
            fp8, the rest is that of `"bf16"`), or `"no"`: the dtype in which the model was loaded. What a method
            computes for itself, such as scores, is float32 in any case.
        gradient_checkpointing: keep the inputs of layers only, and run them again in the backward: less memory, more
            time, the same result.
        cpu: stay on the CPU although there is an accelerator.
        output_dir: folder for `checkpoints/` and `finetune.json`; nothing is written for `None`. Where it holds an
            adapter, finetune.json is left to whoever writes the new weights (`hf_sparse.hub.write_repo`). No other run
            may use it meanwhile.
        checkpoint_every: optimiser steps between checkpoints; 0 writes none.
        resume: continue from the last checkpoint in `output_dir`, if there is one.
        progress: show a progress bar.
        tracker: one of accelerate's trackers, such as `"tensorboard"`, `"trackio"` or `"wandb"`, which must be
            installed. The steps are in `finetune.jsonl` in `output_dir` in any case.
        teacher_window: with more than 0, each token of the teacher of `"distill"` attends to at least so many tokens
            before it, to fewer than twice as many, and to the first ones of the text, so that its time is linear in
            the length; of a causal language model. What lies further back it hardly knows, and does not teach. Texts of
            up to twice as many tokens have the dense teacher.
        method_settings: the settings of single methods that differ from their defaults, by name.

    Raises:
        TypeError: neither the fields nor a method have a setting of such a name.
        ValueError: a value is out of range, or no method has such an objective.
    """

    # A mapping cannot be hashed; equal configurations have equal shared fields too, whose hash is enough.
    method_settings: Mapping[str, Any] = field(default_factory=dict, hash=False, metadata={"cli": False})

    def __init__(self, *shared: Any, method_settings: Mapping[str, Any] | None = None, **settings: Any) -> None:
        names = {shared_field.name for shared_field in fields(SharedSettings)}
        of_methods = {name: value for name, value in settings.items() if name not in names}
        super().__init__(*shared, **{name: value for name, value in settings.items() if name in names})
        of_methods = {**(method_settings or {}), **of_methods}
        object.__setattr__(self, "method_settings", _check_method_settings(of_methods, self.objective))

    def settings(self) -> dict[str, object]:
        """Return the fields that determine the result: not where it is written, what is shown and what it takes."""
        influence = {f: getattr(self, f.name) for f in fields(SharedSettings) if f.name not in _WITHOUT_INFLUENCE}
        return {f.name: value for f, value in influence.items() if f.name not in _LATER or value != f.default}


def _check_method_settings(given: Mapping[str, Any], objective: str) -> dict[str, Any]:
    """Check objective and settings as far as that is possible before the model, and so the method, is known.

    Two methods may have settings of one name: a value is refused here if none of them takes it.

    Returns:
        Those that differ from their default, in the order of the methods' fields.
    """
    # Late, for it imports torch: the command line reads the fields above without.
    from hf_sparse.core.registry import registered_methods

    trainings = [method.training() for method in registered_methods().values()]
    check_choice("objective", objective, list(dict.fromkeys(name for t in trainings for name in t.objectives)))
    defaults = [(training.settings_type, values_of(training.settings_type())) for training in trainings]
    known = {name: None for _, settings in defaults for name in settings}
    for name in given:
        if name not in known:
            raise TypeError(_unknown_setting(name, [*(f.name for f in fields(SharedSettings)), *known]))
    accepted: set[str] = set()
    refused: list[tuple[set[str], ValueError]] = []
    for settings_type, default in defaults:
        of_method = {name: given[name] for name in default if name in given}
        try:
            settings_type(**of_method).check_objective(objective)
            accepted |= of_method.keys()
        except ValueError as error:
            refused.append((set(of_method), error))
    for names, refusal in refused:
        if not names <= accepted:
            raise refusal
    return {
        name: given[name]
        for name in known
        if name in given and any(name in default and default[name] != given[name] for _, default in defaults)
    }


def _unknown_setting(name: str, known: Iterable[str]) -> str:
    """Make the error for a keyword that is no setting."""
    close = get_close_matches(name, list(known), n=1)
    expected = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(known)}"
    return f"FinetuneConfig has no setting {name!r}; {expected}"
