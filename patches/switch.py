"""Hold what a patched model has once for all its layers, and stand in front of what the model would do wrongly."""

import functools
import threading
import weakref
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_masks_for_generate

from hf_sparse.core.generation import Generation, announced
from hf_sparse.ops.triton import is_on_gpu
from hf_sparse.patches.attached import CHILD, sparse_layers
from hf_sparse.patches.backbone_class import backbone_class, own_forward
from hf_sparse.patches.compiled_layers import compiled_layers
from hf_sparse.patches.derived_class import restore_class, set_derived_class
from hf_sparse.patches.interface import NAME
from hf_sparse.patches.recorded_prompts import RecordedPrompts, unrecorded
from hf_sparse.patches.recorded_steps import RecordedSteps, may_record, played_last
from hf_sparse.patches.saving import is_in_peft_model, names_in_model, save_patched_model
from hf_sparse.patches.step_masks import step_masks


class ModelSwitch:
    """Hold what a patched model has once for all its layers.

    Called, it sets the attention implementation of the model's config: ours while the method is on, the base's while
    off. It stands in front of the model's `save_pretrained` and `push_to_hub`, which know nothing of the method, until
    `remove`; and of what `generate` asks whether and how to compile its steps: it may record them instead, and where
    they are to be compiled, compile one layer for all. It stands in front of what reads the prompt there too, of what
    makes the masks of a step, and of what makes its inputs: those of a recorded step are made while the device works on
    the one before. The backbone calls it (`backbone_class`) for a text of several tokens, which may be a recorded one.

    Args:
        model: a model of transformers that is about to be patched.
        backbone: the module of it that a head calls with tokens, which may be the model.
    """

    _BEFORE = (
        "save_pretrained",
        "load_state_dict",
        "push_to_hub",
        "_valid_auto_compile_criteria",
        "get_compiled_call",
        "_prefill",
    )
    _MASKS = "create_masks_for_generate"  # of models that make others
    _INPUTS = ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation")

    def __init__(self, model: PreTrainedModel, backbone: nn.Module) -> None:
        config = model.config
        if config._attn_implementation == NAME:
            raise ValueError(
                "the model's config is shared with another patched model, and the two could not be switched apart, or "
                "was copied from one: give each model a config of its own (copy.deepcopy), and in a copy set "
                "config._attn_implementation to what the base model uses, such as 'sdpa'"
            )
        self.model = weakref.ref(model)  # which holds this one: without a cycle it goes when its last user does
        self.config = config
        text = config.get_text_config()  # of a model that reads images too it is a part of the other
        names = ["", *(name for name in config.sub_configs if getattr(config, name, None) is text)]
        self.base = {name: (text if name else config)._attn_implementation for name in names}
        self._modules: list[weakref.ref[nn.Module]] = []
        self._told: set[tuple[Any, ...]] = set()  # calls of `generate` for which the layers have prepared
        self.prompts = RecordedPrompts()
        self._answer = threading.local()  # `records`, `compiles`: what the `generate` of a thread was told last
        names = [name for name in self._BEFORE if hasattr(model, name)]
        if isinstance(model, GenerationMixin) and not hasattr(model, self._MASKS):
            names.append(self._MASKS)
        if self._are_ordinary(model) and not vars(model).keys() & set(self._INPUTS):
            names += self._INPUTS
        # What others have set in the model under these names.
        self._covered = {name: vars(model)[name] for name in names if name in vars(model)}
        for name in names:
            setattr(model, name, getattr(self, name))
        self.backbone = weakref.ref(backbone)
        if set_derived_class(backbone, backbone_class):
            vars(backbone)["model_switch"] = self

    def __call__(self, enabled: bool) -> None:
        self.config._attn_implementation = dict.fromkeys(self.base, NAME) if enabled else self.base

    def modules(self) -> list[nn.Module]:
        """List the patched attention modules; they are looked for once."""
        modules = [module for reference in self._modules if (module := reference()) and CHILD in module._modules]
        if not modules or len(modules) < len(self._modules):
            model: Any = self.model() or self.backbone()  # the head may be gone
            modules = [module for module in model.modules() if CHILD in module._modules]
            self._modules = [weakref.ref(module) for module in modules]
        return modules

    def remove(self) -> None:
        """Leave the model as it was, and what others have set in it since."""
        self(False)
        self.prompts.clear()
        backbone, model = self.backbone(), self.model()
        if backbone is not None and vars(backbone).pop("model_switch", None) is not None:
            restore_class(backbone)
        own = {} if model is None else vars(model)
        for name in (*self._BEFORE, self._MASKS, *self._INPUTS):
            if own.get(name) == getattr(self, name):
                del own[name]
                if name in self._covered:
                    own[name] = self._covered[name]

    def save_pretrained(
        self, save_directory: Any, is_main_process: bool = True, state_dict: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Save the model as a full model, which `hf_sparse.from_pretrained` loads, and a `Trainer` goes on from.

        Raises:
            ValueError: the model lies in a `PeftModel`, which saves the adapter; or it shall be pushed.
        """
        model: Any = self.model()
        if self._needs_no_adapter(model):
            return type(model).save_pretrained(model, save_directory, is_main_process, state_dict, *args, **kwargs)
        if model is None or is_in_peft_model(model):
            place = "that no name holds" if model is None else "in a PeftModel"
            raise ValueError(
                f"save_pretrained of a model with sparse attention {place} would write a checkpoint that loads as a "
                f"dense model: {'give it a name first; ' if model is None else ''}to keep the adapter, save the "
                "PeftModel (its save_pretrained, or hf_sparse.push_to_hub); to keep the base model, take sparse "
                "attention off first (unload of the PeftModel, or hf_sparse.unpatch)"
            )
        if args or kwargs.get("push_to_hub"):  # the next argument by position
            return self.push_to_hub()
        return save_patched_model(model, save_directory, is_main_process, state_dict=state_dict, **kwargs)

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """Load tensors by their names in the model, or by those in what `save_pretrained` wrote."""
        model: Any = self.model()
        return type(model).load_state_dict(model, names_in_model(model, state_dict), *args, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse to push, without a card that says what it is, unless there is nothing but the base model."""
        model: Any = self.model()
        if self._needs_no_adapter(model):
            return type(model).push_to_hub(model, *args, **kwargs)
        raise ValueError(
            "push_to_hub of a model with sparse attention would publish a checkpoint that loads as a dense model, and "
            "no card that says so: to publish the adapter, save the PeftModel or push it (hf_sparse.push_to_hub, "
            "form='full' with the base model); to publish the base model, take sparse attention off first (unload of "
            "the PeftModel, or hf_sparse.unpatch)"
        )

    def _valid_auto_compile_criteria(self, model_kwargs: dict[str, Any], generation_config: Any) -> bool:
        """Answer `generate` whether it shall ask for a call that is compiled, or one that records its steps."""
        model: Any = self.model()
        compiles = type(model)._valid_auto_compile_criteria(model, model_kwargs, generation_config)
        records = self.config._attn_implementation == NAME and may_record(model, generation_config)
        self._answer.records, self._answer.compiles = records, compiles
        return compiles or records

    def get_compiled_call(self, compile_config: Any) -> Any:
        """Return what `generate` calls for a step."""
        model: Any = self.model()
        records, compiles = (vars(self._answer).pop(name, False) for name in ("records", "compiles"))
        layers = compiled_layers(model) if records and compiles else None
        if not records or (compiles and layers is None):
            return type(model).get_compiled_call(model, compile_config)
        return RecordedSteps(model, layers)

    def _are_ordinary(self, model: Any) -> bool:
        """Tell whether the class of the model makes the inputs of its steps as transformers does."""
        return all(getattr(type(model), name, None) is getattr(GenerationMixin, name) for name in self._INPUTS)

    def _makes_inputs(self, model: Any) -> bool:
        """Tell whether inputs are made here and nowhere else: what was set in the model since may change them."""
        return self._are_ordinary(model) and all(vars(model).get(name) == getattr(self, name) for name in self._INPUTS)

    @functools.wraps(GenerationMixin._update_model_kwargs_for_generation)
    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Return the arguments of `generate` after a step; if it was played, make the inputs of the next one."""
        model: Any = self.model()
        given = dict(model_kwargs)
        arguments = type(model)._update_model_kwargs_for_generation(model, outputs, model_kwargs, *args, **kwargs)
        steps = played_last()
        if steps is not None and outputs is steps.output and self._makes_inputs(model):
            prepare = functools.partial(GenerationMixin.prepare_inputs_for_generation, model)
            steps.expect(prepare, arguments | {"next_sequence_length": 1}, given)
        return arguments

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)  # `generate` reads which arguments it takes
    def prepare_inputs_for_generation(self, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the inputs of a forward of the model; those of an expected step were made before."""
        model: Any = self.model()
        steps = played_last()
        inputs = None if steps is None or args else steps.expected_inputs(input_ids, kwargs)
        if inputs is not None:
            return inputs
        return type(model).prepare_inputs_for_generation(model, input_ids, *args, **kwargs)

    def create_masks_for_generate(self, **arguments: Any) -> Any:
        """Make the masks of a step, or of a prompt, for `generate`."""
        masks = step_masks(arguments) if self.config._attn_implementation == NAME else NotImplemented
        return create_masks_for_generate(**arguments) if masks is NotImplemented else masks

    def _prefill(
        self, input_ids: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Read a prompt for `generate`."""
        with announced(self._generation(input_ids, generation_config, model_kwargs)):
            return self._read_prompt(input_ids, generation_config, model_kwargs, *args, **kwargs)

    def _generation(self, input_ids: Any, generation_config: Any, model_kwargs: dict[str, Any]) -> Generation | None:
        """Return what the layers can prepare for; `None` if they have been told, or prepare nothing as on the CPU."""
        if not is_on_gpu(input_ids) or self.config._attn_implementation != NAME:
            return None
        layers: list[Any] = [module.sparse_attention for module in self.modules()]
        most = generation_config.max_length
        has_steps = most is None or most - input_ids.shape[1] > 1
        is_masked = model_kwargs.get("attention_mask") is not None
        told = (len(input_ids), has_steps, is_masked, *layers[0].active_adapters)
        if told in self._told:
            return None
        self._told.add(told)
        return Generation(layers, has_steps, is_masked)

    def _read_prompt(self, input_ids: Any, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        """Read a prompt for `generate`, which may play a recorded one unless it was told otherwise."""
        model: Any = self.model()
        is_whole = generation_config.prefill_chunk_size is None and not generation_config.is_assistant
        with nullcontext() if is_whole and may_record(model, generation_config) else unrecorded():
            return type(model)._prefill(model, input_ids, generation_config, *args, **kwargs)

    def read(self, backbone: nn.Module, inputs: dict[str, Any]) -> Any:
        """Return what the forward of the backbone returns for several tokens of each text; see `RecordedPrompts`."""
        if backbone is not self.backbone() or self.config._attn_implementation != NAME:  # a replica, or switched off
            return own_forward(backbone, inputs)
        return self.prompts.read(backbone, self.modules, inputs)

    def forget_modules(self) -> None:
        """Look for the patched modules anew, for one was added."""
        self._modules = []
        self._told.clear()

    def _needs_no_adapter(self, model: Any) -> bool:
        """Tell whether transformers saves the model as it is.

        It writes the adapters that it manages, and no base model; after the last one was deleted there is but the base.
        A model that was but a value in the expression that called this is gone already, and is `None` here.
        """
        return self.is_managed() or (model is not None and not any(layer.configs for layer in sparse_layers(model)))

    @torch.compiler.assume_constant_result  # torch 2.11 cannot trace the weak reference
    def is_managed(self) -> bool:
        """Tell whether transformers manages the adapters of the model.

        A compiled forward keeps the answer it was traced with. It changes only with the modules of the model, as
        adapters come and go, and a compiled forward is traced anew for those.
        """
        return getattr(self.model(), "_hf_peft_config_loaded", False)

    def __getstate__(self) -> dict[str, Any]:
        state = vars(self) | {"model": self.model(), "backbone": self.backbone(), "_modules": [], "_told": set()}
        del state["prompts"], state["_answer"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        held = {name: weakref.ref(state[name]) for name in ("model", "backbone")}
        vars(self).update(state | held | {"prompts": RecordedPrompts(), "_answer": threading.local()})
