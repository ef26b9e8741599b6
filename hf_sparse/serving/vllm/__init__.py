"""Register patched models with vLLM, as its plugin `hf_sparse`."""

from hf_sparse.serving.adapter import SERVED

PREFIX = "HfSparse"


def architecture(model_class: str) -> str:
    """Return what vLLM calls a class of transformers with sparse attention, such as `HfSparseLlamaForCausalLM`."""
    return PREFIX + model_class


def register() -> None:
    """Make the models known to vLLM; it calls this in each of its processes.

    Nothing changes for other models. vLLM imports the models themselves when one is asked for.
    """
    from vllm import ModelRegistry

    from hf_sparse.serving.vllm import compat

    compat.check_version()
    for model_class in SERVED.values():
        name = architecture(model_class)
        ModelRegistry.register_model(name, f"hf_sparse.serving.vllm.models:{name}")
        compat.register_settings(name)
    compat.register_operator("hf_sparse::attend_rows")
