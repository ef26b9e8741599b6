"""The PEFT tuner: a thin layer that lets PEFT drive `hf_sparse.patches`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from hf_sparse._compat import register_with_peft
from hf_sparse.methods import registered_methods
from hf_sparse.methods.base import SparseMethod
from hf_sparse.patches.attach import attach, detach, targets
from hf_sparse.patches.heads import choose_modules_to_save


class SparseModel(BaseTuner):
    """What `peft.get_peft_model` makes of a model and a method's configuration; `TUNERS` has one class per method."""

    tuner_layer_cls = SparseMethod

    def __init__(self, model: Any, peft_config: Any, adapter_name: str, *args: Any, **options: Any) -> None:
        self.in_peft_model = isinstance(peft_config, dict)  # transformers passes the configuration alone
        super().__init__(model, peft_config, adapter_name, *args, **options)

    def inject_adapter(
        self,
        model: Any,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        config: Any = self.peft_config[adapter_name]
        # The configuration and the model say which modules; the keys of a state dict could only disagree. PEFT
        # matches these names by suffix and shortens a long list to what is still unambiguous.
        new = config.base_shape is None
        config.target_modules = [name for name, _ in targets(model, config)]
        choose_modules_to_save(model, config, new=new)
        if config.modules_to_save and not self.in_peft_model:
            raise ValueError(
                f"modules_to_save={config.modules_to_save} is for a PeftModel (peft.get_peft_model, "
                "PeftModel.from_pretrained, hf_sparse.from_pretrained): transformers' own add_adapter and load_adapter "
                "do not load such modules in every version, and switch them off and not on again"
            )
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        attach(target, self.model, adapter_name, peft_config)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Where PEFT asks a tuner for an adapter per row; it drops the names for tuners that do not answer."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                f"all rows of a batch have the adapter in use, {', '.join(self.active_adapters)!r}, and adapter_names "
                "asks for one per row: choose one with set_adapter, and run the rows of each adapter by themselves"
            )
        yield

    def unload(self) -> nn.Module:
        """Take sparse attention off and return the base model, with the trained modules of `modules_to_save`."""
        detach(self.model)
        # Not PEFT's own: it looks for a `weight` on whatever it takes the wrapper off.
        for name, module in list(self.model.named_modules()):
            if isinstance(module, ModulesToSaveWrapper):
                parent, _, child = name.rpartition(".")
                trained = module.unload_and_optionally_merge_module(merge=False, safe_merge=False, adapter_names=None)
                setattr(self.model.get_submodule(parent), child, trained)
        return self.model

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        raise ValueError(
            "sparse attention selects keys, and there are no weights to merge that into; unload() gives the base model"
        )


#: The tuner of each method by the method's name in PEFT: PEFT reads the prefix of the learned parameters off the class.
TUNERS: dict[str, type[SparseModel]] = {
    name: type(f"{method.attention.label}Model", (SparseModel,), {"prefix": method.prefix, "__module__": __name__})
    for name, method in registered_methods().items()
}
globals().update({tuner.__name__: tuner for tuner in TUNERS.values()})  # pickle looks for a class by its name


def register() -> None:
    """Make the methods known to PEFT."""
    for name, method in registered_methods().items():
        register_with_peft(name, config=method.config, tuner=TUNERS[name], prefix=method.prefix)
