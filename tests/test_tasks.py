"""What a checkpoint is for follows from the name of its class."""

import pytest
import torch
from peft import get_peft_model
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
)
from transformers.models.electra import ElectraConfig

import hf_sparse
from hf_sparse.model_kinds import (
    attends_both_ways,
    final_states,
    kind_of,
    task_of,
    task_of_class,
    transformers_model,
)


@pytest.mark.parametrize(
    ("config", "architectures", "wanted", "auto", "kind"),
    [
        (LlamaConfig, ["LlamaForCausalLM"], None, AutoModelForCausalLM, "causal"),
        (LlamaConfig, None, None, AutoModelForCausalLM, "causal"),
        (LlamaConfig, ["LlamaModel"], None, AutoModel, "features"),
        (GPT2Config, ["GPT2LMHeadModel"], None, AutoModelForCausalLM, "causal"),
        (BertConfig, ["BertForMaskedLM"], None, AutoModelForMaskedLM, "masked"),
        (BertConfig, ["BertLMHeadModel"], None, AutoModelForCausalLM, "causal"),
        (BertConfig, ["BertForPreTraining"], None, AutoModelForMaskedLM, "masked"),
        (ElectraConfig, ["ElectraForPreTraining"], None, AutoModelForPreTraining, "features"),
        (ElectraConfig, ["ElectraForMaskedLM"], None, AutoModelForMaskedLM, "masked"),
        (BertConfig, ["BertModel"], None, AutoModel, "features"),
        (BertConfig, None, None, AutoModel, "features"),
        (BertConfig, ["SomethingOfMine"], None, AutoModel, "features"),
        (BertConfig, ["BertForSequenceClassification"], None, AutoModelForSequenceClassification, "features"),
        (BertConfig, ["BertForTokenClassification"], None, AutoModelForTokenClassification, "features"),
        # An adapter that was made on a head of its own.
        (BertConfig, ["BertForMaskedLM"], "BertForTokenClassification", AutoModelForTokenClassification, "features"),
        (BertConfig, ["BertForMaskedLM"], "SomethingOfMine", AutoModelForMaskedLM, "masked"),
    ],
)
def test_task_of_a_checkpoint(config, architectures, wanted, auto, kind):
    task = task_of(config(architectures=architectures), wanted)
    assert task.auto is auto and task.kind == kind


def test_kind_of_a_model(tiny_bert, tiny_llama):
    assert kind_of(tiny_llama()) == "causal"
    assert kind_of(tiny_bert("BertForMaskedLM")) == "masked"
    assert kind_of(tiny_bert("BertForSequenceClassification")) == kind_of(tiny_bert("BertModel")) == "features"
    assert kind_of(tiny_bert("BertForPreTraining")) == "features"  # its output has no `logits`
    for wrapped in (torch.compile(tiny_llama()), torch.nn.Sequential(tiny_llama())):
        with pytest.raises(TypeError, match=f"PeftModel of one, got {type(wrapped).__name__}: give the model that is"):
            kind_of(wrapped)


def test_the_model_in_what_wraps_it(tiny_llama):
    model = tiny_llama()
    assert transformers_model(model) is model
    wrapped = torch.nn.Sequential(get_peft_model(model, hf_sparse.SparseKConfig(k=4, window=4, sinks=1)))
    assert transformers_model(wrapped) is model
    with pytest.raises(ValueError, match="expected a transformers PreTrainedModel or what wraps one, got Linear"):
        transformers_model(torch.nn.Linear(2, 2))


def test_next_tokens_from_both_directions_are_refused(tiny_bert):
    model = hf_sparse.patch(tiny_bert("BertLMHeadModel"), hf_sparse.SparseKConfig(k=4, window=4, sinks=1))
    with pytest.raises(ValueError, match="sees the tokens that it predicts: load it with is_decoder=True"):
        kind_of(model)

    adapted = get_peft_model(tiny_bert("BertForMaskedLM"), hf_sparse.SparseKConfig())
    adapted.get_base_model().__class__ = type("Mine", (type(adapted.get_base_model()),), {})
    assert kind_of(adapted) == "masked"


def test_direction():
    assert attends_both_ways("bert", task_of_class("BertModel"))
    assert attends_both_ways("bert", task_of_class("BertForMaskedLM"))
    assert not attends_both_ways("bert", task_of_class("BertLMHeadModel"))
    assert not attends_both_ways("llama", task_of_class("LlamaModel"))
    assert not attends_both_ways(None, task_of_class(None))


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BertForSequenceClassification", "BertModel"])
def test_final_states_are_those_of_the_encoder(tiny_bert, kind):
    tokens = torch.randint(5, 64, (2, 40))
    model = tiny_bert(kind)
    with torch.no_grad():
        expected = model.base_model(input_ids=tokens).last_hidden_state
        assert torch.equal(final_states(model, tokens), expected)
