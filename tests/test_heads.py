"""Heads that are trained and saved with an adapter (`modules_to_save`), for both methods and every kind of head."""

import copy
import json
import runpy
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import HfApi, ModelCard, hf_hub_download
from peft import AutoPeftModelForSequenceClassification, PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import nn

import hf_sparse
from hf_sparse import SparsefinderConfig, SparseKConfig
from hf_sparse.errors import AdapterMismatchError, HubError
from hf_sparse.finetune import FinetuneConfig, finetune
from hf_sparse.patches import sparse_layers
from hf_sparse.patches.heads import initialised

pytestmark = pytest.mark.versions

FAMILIES = runpy.run_path(str(Path(__file__).with_name("families.py")))["FAMILIES"]

IDS = torch.randint(5, 64, (2, 40), generator=torch.Generator().manual_seed(0))
LABELS = {0: "bad", 1: "so-so", 2: "good"}
NAMED = {"id2label": LABELS, "label2id": {name: number for number, name in LABELS.items()}}

METHODS = {
    "sparsek": lambda **settings: SparseKConfig(**{"k": 4, "window": 4, "sinks": 1, **settings}),
    "sparsefinder": lambda **settings: SparsefinderConfig(
        **{"tile": 8, "window": 8, "predictor": "bound", "length": 64, **settings}
    ),
}

#: PEFT's task type, or what is named instead; and what is saved, of a base whose checkpoint is a language model's.
HEADS = {
    "BertForSequenceClassification": ("SEQ_CLS", ["bert.pooler", "classifier"]),
    "BertForTokenClassification": ("TOKEN_CLS", ["classifier"]),
    "BertForQuestionAnswering": ("QUESTION_ANS", ["qa_outputs"]),
    "BertForMultipleChoice": (["classifier", "pooler"], ["bert.pooler", "classifier"]),
    "BertForNextSentencePrediction": (["cls", "pooler"], ["bert.pooler", "cls"]),
    "BertForMaskedLM": (["cls"], ["cls"]),
    "RobertaForSequenceClassification": ("SEQ_CLS", ["classifier"]),
    "RobertaForTokenClassification": ("TOKEN_CLS", ["classifier"]),
    "RobertaForQuestionAnswering": ("QUESTION_ANS", ["qa_outputs"]),
    "RobertaForMultipleChoice": (["classifier", "pooler"], ["classifier", "roberta.pooler"]),
    "RobertaForMaskedLM": (["lm_head"], ["lm_head"]),
    "ModernBertForSequenceClassification": ("SEQ_CLS", ["classifier", "head"]),
    "ModernBertForTokenClassification": ("TOKEN_CLS", ["classifier", "head"]),
    "ModernBertForQuestionAnswering": ("QUESTION_ANS", ["classifier", "head"]),
    "ModernBertForMultipleChoice": (["classifier"], ["classifier"]),
    "ModernBertForMaskedLM": (["head"], ["head"]),
    "LlamaForSequenceClassification": ("SEQ_CLS", ["score"]),
    "LlamaForTokenClassification": ("TOKEN_CLS", ["score"]),
    "GPT2ForSequenceClassification": ("SEQ_CLS", ["score"]),
    "GPT2ForTokenClassification": ("TOKEN_CLS", ["classifier"]),
    "GPT2ForQuestionAnswering": ("QUESTION_ANS", ["qa_outputs"]),
    "Qwen2ForSequenceClassification": ("SEQ_CLS", ["score"]),
}
#: Heads of other families than BERT run by default where they are built in another way than BERT's.
OTHERS = {"RobertaForSequenceClassification", "ModernBertForSequenceClassification", "ModernBertForMaskedLM"}
OTHERS |= {"LlamaForSequenceClassification", "GPT2ForTokenClassification"}


def family_of(kind):
    return next(name for name in ("modernbert", "roberta", "bert", "llama", "gpt2", "qwen2") if name in kind.lower())


@pytest.fixture
def checkpoint(tmp_path):
    """Saves the language model of a family; its folder."""

    def save(family="bert"):
        folder = tmp_path / f"base-{family}"
        FAMILIES[family].make().save_pretrained(folder)
        return folder

    return save


def load(kind, folder, **options):
    labelled = NAMED if "Sequence" in kind or "Token" in kind else {}
    labelled = {} if "NextSentence" in kind else labelled
    return getattr(transformers, kind).from_pretrained(folder, **{**labelled, **options})


def adapt(kind, folder, method="sparsek", **settings):
    """A model with an adapter whose weights, of the head too, differ from what they were made with."""
    asked = HEADS[kind][0]
    named = {"task_type": asked} if isinstance(asked, str) else {"modules_to_save": asked}
    model = get_peft_model(load(kind, folder), METHODS[method](**named, **settings)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return model


@torch.no_grad()
def outputs(model):
    tokens = IDS[:, None].repeat(1, 2, 1) if "MultipleChoice" in type(_base(model)).__name__ else IDS
    found = model(input_ids=tokens, return_dict=True)
    return torch.cat([found[name].flatten() for name in ("logits", "start_logits", "end_logits") if name in found])


def _base(model):
    return model.get_base_model() if isinstance(model, PeftModel) else model


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad and "sparse_attention" not in name}


@pytest.mark.cross("values")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[pytest.mark.full] * (kind[:4] != "Bert" and kind not in OTHERS)) for kind in HEADS],
)
def test_every_head_is_trained_saved_and_loaded(kind, method, checkpoint, tmp_path):
    base, modules = checkpoint(family_of(kind)), HEADS[kind][1]
    model = adapt(kind, base, method)
    expected = outputs(model)
    inside = {name.split(".modules_to_save.default")[0].removeprefix("base_model.model.") for name in trained(model)}
    assert inside == set(modules)
    with model.disable_adapter():
        assert not torch.equal(outputs(model), expected)

    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    held = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    head = {key for key in held if "sparse_attention" not in key}
    assert {key.removeprefix("base_model.model.") for key in head} == {
        name
        for name, _ in _base(load(kind, base)).named_parameters(remove_duplicate=False)
        if name.startswith(tuple(f"{module}." for module in modules))
    }
    assert torch.equal(outputs(hf_sparse.from_pretrained(tmp_path / "adapter")), expected)
    for options in ({"low_cpu_mem_usage": True}, {"is_trainable": True}):
        loaded = PeftModel.from_pretrained(load(kind, base), tmp_path / "adapter", **options).eval()
        assert torch.equal(outputs(loaded), expected)
        assert bool(trained(loaded)) == ("is_trainable" in options)
        assert not any(parameter.is_meta for parameter in loaded.parameters())
    # Saved again, it is the same.
    loaded.save_pretrained(tmp_path / "again", save_embedding_layers=False)
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert again.keys() == held.keys() and all(torch.equal(again[key], held[key]) for key in held)


def test_labels_load_with_the_head(checkpoint, tmp_path):
    base = checkpoint()
    kind = "BertForSequenceClassification"
    model = get_peft_model(
        load(kind, base, problem_type="multi_label_classification"), METHODS["sparsek"](task_type="SEQ_CLS")
    )
    model.save_pretrained(tmp_path / "adapter")
    config = hf_sparse.from_pretrained(tmp_path / "adapter").config
    assert config.id2label == LABELS and config.label2id == NAMED["label2id"]
    assert config.problem_type == "multi_label_classification"
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=3)
    assert torch.equal(outputs(loaded.eval()), outputs(model.eval()))


@pytest.mark.parametrize(
    ("labels", "told"),
    [({"num_labels": 4}, "has 4"), ({"id2label": {0: "good", 1: "so-so", 2: "bad"}}, r"has 3 \(good, so-so, bad\)")],
)
def test_a_base_with_other_labels_is_refused(labels, told, checkpoint, tmp_path):
    base, kind = checkpoint(), "BertForTokenClassification"
    adapt(kind, base).save_pretrained(tmp_path / "adapter")
    other = getattr(transformers, kind).from_pretrained(base, **labels)
    wanted = rf"trained for 3 labels \(bad, so-so, good\), and the base model {told}"
    with pytest.raises(AdapterMismatchError, match=wanted):
        hf_sparse.from_pretrained(tmp_path / "adapter", base_model=other)
    with pytest.raises(AdapterMismatchError, match=wanted):
        PeftModel.from_pretrained(other, tmp_path / "adapter")
    assert sparse_layers(other) == [] and not any("original_module" in name for name, _ in other.named_modules())


def test_an_adapter_of_a_model_that_generates_is_refused_on_one_that_does_not(checkpoint, tmp_path):
    """PEFT's class for the task would ask the base model for what it does not have."""
    config = hf_sparse.SparseKConfig(k=4, window=4, sinks=1, task_type="CAUSAL_LM")
    get_peft_model(load("LlamaForCausalLM", checkpoint("llama")), config).save_pretrained(tmp_path / "adapter")
    message = "is for models that generate, such as a LlamaForCausalLM, got a LlamaModel"
    with pytest.raises(AdapterMismatchError, match=message):
        hf_sparse.from_pretrained(tmp_path / "adapter", base_model=load("LlamaModel", checkpoint("llama")))


def test_a_head_for_another_task_is_refused_where_names_and_shapes_agree(checkpoint, tmp_path):
    base = checkpoint("llama")
    adapt("LlamaForSequenceClassification", base).save_pretrained(tmp_path / "adapter")
    message = r"it brings \['score'\] of a LlamaForSequenceClassification, got a LlamaForTokenClassification"
    with pytest.raises(AdapterMismatchError, match=message):
        hf_sparse.from_pretrained(tmp_path / "adapter", base_model=load("LlamaForTokenClassification", base))
    own = load("LlamaForSequenceClassification", base)
    own.__class__ = type("Mine", (type(own),), {})
    assert sparse_layers(hf_sparse.from_pretrained(tmp_path / "adapter", base_model=own))


def test_a_head_of_another_size_is_replaced_by_the_adapters(checkpoint, tmp_path):
    """A base that was trained for two labels, and an adapter for three."""
    base, kind = tmp_path / "two", "BertForSequenceClassification"
    getattr(transformers, kind).from_pretrained(checkpoint(), num_labels=2).save_pretrained(base)
    model = get_peft_model(load(kind, base, ignore_mismatched_sizes=True), METHODS["sparsek"](task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path / "adapter")
    assert model.active_peft_config.modules_to_save == ["classifier"]  # the pooler is the checkpoint's
    assert torch.equal(outputs(hf_sparse.from_pretrained(tmp_path / "adapter")), outputs(model.eval()))


# A head that nobody brings.


@pytest.mark.parametrize("kind", ["BertForSequenceClassification", "RobertaForTokenClassification"])
def test_a_new_head_without_the_adapter_is_refused_when_it_is_made(kind, checkpoint):
    model = load(kind, checkpoint(family_of(kind)))
    with pytest.raises(ValueError, match=r"classifier of this .* just got random weights.* add modules_to_save=\["):
        get_peft_model(model, METHODS["sparsek"]())
    assert sparse_layers(model) == []


@pytest.mark.parametrize("modules", [["classifier"], []])
def test_a_random_head_is_refused_on_loading(modules, checkpoint, tmp_path):
    """The adapter was made on a base with this head, and is loaded on the language model that it came from."""
    kind, base, whole = "BertForSequenceClassification", checkpoint(), tmp_path / "whole"
    load(kind, base).save_pretrained(whole)
    model = get_peft_model(load(kind, whole), METHODS["sparsek"](modules_to_save=modules)).eval()
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(outputs(hf_sparse.from_pretrained(tmp_path / "adapter")), outputs(model))
    for attempt in (
        lambda: hf_sparse.from_pretrained(tmp_path / "adapter", base_model=base),
        lambda: hf_sparse.from_pretrained(tmp_path / "adapter", base_model=load(kind, base)),
        lambda: PeftModel.from_pretrained(load(kind, base), tmp_path / "adapter"),
    ):
        with pytest.raises(AdapterMismatchError, match=r"no weights for bert.pooler.*load a base model that has them"):
            attempt()


def test_a_checkpoint_that_fits_nothing_is_refused(checkpoint, tmp_path):
    """transformers calls the decoder of this class otherwise, and loads nothing."""
    base, whole = checkpoint("llama"), tmp_path / "whole"
    transformers.LlamaForQuestionAnswering.from_pretrained(base).save_pretrained(whole)
    model = get_peft_model(
        transformers.LlamaForQuestionAnswering.from_pretrained(whole), METHODS["sparsek"](task_type="QUESTION_ANS")
    ).eval()
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(outputs(hf_sparse.from_pretrained(tmp_path / "adapter")), outputs(model))
    with pytest.raises(AdapterMismatchError, match="no weights for transformer"):
        hf_sparse.from_pretrained(tmp_path / "adapter", base_model=base)


def test_transformers_marks_what_it_loads(checkpoint):
    """The mark is not promised: without it nobody would miss a head."""
    for kind in ("BertForSequenceClassification", "LlamaForSequenceClassification"):
        model, info = getattr(transformers, kind).from_pretrained(checkpoint(family_of(kind)), output_loading_info=True)
        assert set(initialised(model)) == set(info["missing_keys"]) != set()
        assert set(initialised(model.to(torch.bfloat16))) == set(info["missing_keys"])
    assert initialised(transformers.AutoModel.from_pretrained(checkpoint())) == []  # nothing follows its pooler


def test_a_bare_encoder_needs_no_pooler(checkpoint, tmp_path):
    base = checkpoint()
    model = get_peft_model(transformers.AutoModel.from_pretrained(base), METHODS["sparsek"]())
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected, found = (
            m.eval()(input_ids=IDS).last_hidden_state for m in (model, hf_sparse.from_pretrained(tmp_path / "adapter"))
        )
    assert torch.equal(found, expected)


def test_an_adapter_from_before_heads_were_saved(checkpoint, tmp_path):
    """Its file names a task type, and holds scorers alone: it loads on a base whose checkpoint has the head."""
    kind, whole = "BertForSequenceClassification", tmp_path / "whole"
    load(kind, checkpoint()).save_pretrained(whole)
    model = get_peft_model(load(kind, whole), METHODS["sparsek"]()).eval()
    model.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text()) | {"task_type": "SEQ_CLS"}
    del config["modules_to_save"]
    path.write_text(json.dumps(config))
    assert torch.equal(outputs(hf_sparse.from_pretrained(tmp_path / "adapter")), outputs(model))
    assert torch.equal(
        outputs(PeftModel.from_pretrained(load(kind, whole), tmp_path / "adapter").eval()), outputs(model)
    )


@pytest.mark.parametrize("kind", ["BertForSequenceClassification", "BertForTokenClassification"])
def test_one_configuration_for_two_models(kind, checkpoint):
    config = METHODS["sparsek"](task_type=HEADS[kind][0])
    first, second = (get_peft_model(load(kind, checkpoint()), config) for _ in range(2))
    assert trained(first) == trained(second) != set()


# Names.


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ("classifier", "must be None or a list of names of modules, got 'classifier'"),
        ([""], r"must be None or a list of names of modules, got \[''\]"),
        (3, "must be None or a list of names of modules, got 3"),
        (["clasifier"], "must name modules of the model, got 'clasifier'; the head of this .* is 'classifier'"),
        (["encoder"], "must name modules beside the attention that becomes sparse, got 'bert.encoder'"),
        (["query"], "must name modules beside the attention that becomes sparse, got 'bert.encoder.layer.0"),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_names_that_cannot_be(modules, message, method, tiny_bert):
    with pytest.raises(ValueError, match=message):
        get_peft_model(tiny_bert("BertForTokenClassification"), METHODS[method](modules_to_save=modules))


@pytest.mark.parametrize("method", METHODS)
def test_a_task_type_with_labels_for_a_language_model(method, tiny_llama):
    """PEFT would train and save a copy of its language modelling head."""
    model = tiny_llama()
    before = list(model.state_dict())
    message = (
        "task_type is 'SEQ_CLS', which trains and saves a head of labels, and LlamaForCausalLM is a language model"
    )
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, METHODS[method](task_type="SEQ_CLS"))
    assert list(model.state_dict()) == before


def test_patch_without_peft_refuses_modules_to_save(tiny_bert):
    model = tiny_bert("BertForTokenClassification")
    with pytest.raises(ValueError, match=r"modules_to_save=\['classifier'\] is for PEFT"):
        hf_sparse.patch(model, METHODS["sparsek"](modules_to_save=["classifier"]))
    assert sparse_layers(model) == []


@pytest.mark.parametrize("fault", ["missing", "unexpected"])
def test_files_that_do_not_hold_the_head(fault, checkpoint, tmp_path):
    adapt("BertForTokenClassification", checkpoint()).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    state = load_file(path)
    if fault == "missing":
        del state["base_model.model.classifier.bias"]
    else:
        state["base_model.model.classifier.scale"] = torch.zeros(3)
    save_file(state, path, {"format": "pt"})
    with pytest.raises(HubError, match=f"{fault}: base_model.model.classifier"):
        hf_sparse.from_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize("head", [3, {"labels": "bad"}, {"labels": []}, {"labels": ["a"], "problem_type": 1}])
def test_damaged_notes_of_a_head(head, checkpoint, tmp_path):
    adapt("BertForTokenClassification", checkpoint()).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_shape"]["head"] = head
    path.write_text(json.dumps(config))
    with pytest.raises(HubError, match=r"adapter_config.json of .* is damaged"):
        hf_sparse.from_pretrained(tmp_path / "adapter")


# What can be done with such a model.


@pytest.mark.parametrize("method", METHODS)
def test_life_of_a_model(method, checkpoint):
    kind, base = "RobertaForSequenceClassification", checkpoint("roberta")
    model = adapt(kind, base, method, lora_rank=2)
    expected = outputs(model)
    assert torch.equal(outputs(copy.deepcopy(model)), expected)
    original = model.get_base_model().classifier.original_module
    dense = load(kind, base).eval()
    dense.classifier.load_state_dict(original.state_dict())
    with model.disable_adapter():
        assert torch.equal(outputs(model), outputs(dense))
    assert torch.equal(outputs(model), expected) and trained(model)

    model.add_adapter("second", METHODS[method](task_type="SEQ_CLS"))
    assert torch.equal(outputs(model), expected)
    model.set_adapter("second")
    assert not torch.equal(outputs(model), expected)
    assert all(".second." in name for name in trained(model)) and trained(model)
    model.set_adapter("default")
    assert torch.equal(outputs(model), expected)
    model.delete_adapter("second")
    assert torch.equal(outputs(model), expected)

    head = copy.deepcopy(model.get_base_model().classifier.modules_to_save["default"])
    model.eval()
    plain = model.unload()
    dense.classifier = head
    assert sparse_layers(plain) == [] and isinstance(plain.classifier, type(head))
    assert torch.equal(outputs(plain), outputs(dense))


def test_two_saved_adapters_in_one_model(checkpoint, tmp_path):
    kind, base = "BertForTokenClassification", checkpoint()
    first, second = adapt(kind, base), adapt(kind, base, k=2)
    with torch.no_grad():
        second.get_base_model().classifier.weight.mul_(-2)
    first.save_pretrained(tmp_path / "first")
    second.save_pretrained(tmp_path / "second")
    both = hf_sparse.from_pretrained(tmp_path / "first", base_model=load(kind, base))
    both.load_adapter(tmp_path / "second", "second")
    assert torch.equal(outputs(both.eval()), outputs(first))
    both.set_adapter("second")
    assert torch.equal(outputs(both), outputs(second))


def test_bfloat16(checkpoint, tmp_path):
    kind, base = "BertForSequenceClassification", checkpoint()
    model = get_peft_model(load(kind, base, dtype=torch.bfloat16), METHODS["sparsek"](task_type="SEQ_CLS")).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = hf_sparse.from_pretrained(tmp_path / "adapter", dtype=torch.bfloat16)
    assert outputs(model).dtype == torch.bfloat16 and torch.equal(outputs(loaded), outputs(model))


@pytest.mark.parametrize("task", [{"task_type": "TOKEN_CLS"}, {"modules_to_save": ["classifier"]}])
def test_peft_inside_of_a_model_is_refused(task, checkpoint, tmp_path):
    """As transformers' own `add_adapter` and `load_adapter` do it: some versions leave the head random."""
    kind, base = "BertForTokenClassification", checkpoint()
    adapt(kind, base).save_pretrained(tmp_path / "adapter")
    model = load(kind, base)
    for config in (METHODS["sparsek"](**task), PeftConfig.from_pretrained(str(tmp_path / "adapter"))):
        with pytest.raises(ValueError, match=r"modules_to_save=\['classifier'\] is for a PeftModel"):
            inject_adapter_in_model(config, model)
        assert sparse_layers(model) == []


# Training.


@pytest.mark.cross("values")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["BertForTokenClassification", "ModernBertForSequenceClassification"])
def test_the_trainer_trains_scorers_and_head(kind, method, checkpoint, tmp_path):
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    base = checkpoint(family_of(kind))
    model = get_peft_model(load(kind, base), METHODS[method](task_type=HEADS[kind][0]))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = torch.randint(5, 64, (8, 40))
    labels = (rows % 3).tolist() if "Token" in kind else (rows[:, 3] % 3).tolist()
    arguments = TrainingArguments(
        output_dir=tmp_path / "run",
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=Dataset.from_dict({"input_ids": rows.tolist(), "labels": labels}))
    trainer.train()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("classifier.modules_to_save" in name for name in changed)
    assert any("sparse_attention" in name for name in changed)
    trainer.save_model(tmp_path / "adapter")
    expected = outputs(model.eval())
    assert torch.equal(outputs(hf_sparse.from_pretrained(tmp_path / "adapter")), expected)
    assert torch.equal(outputs(PeftModel.from_pretrained(load(kind, base), tmp_path / "adapter").eval()), expected)


def test_finetune_leaves_the_head_and_says_so(checkpoint):
    model = get_peft_model(
        load("BertForTokenClassification", checkpoint()), METHODS["sparsek"](modules_to_save=["classifier"])
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    settings = FinetuneConfig(steps=2, warm_start_steps=0, learning_rate=1e-2, progress=False)
    with pytest.warns(UserWarning, match=r"classifier of the adapter has the random weights .* transformers\.Trainer"):
        metrics = finetune(model, IDS, settings)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all("sparsek_scorer" in name for name in changed)
    assert trained(model) == {f"base_model.model.classifier.modules_to_save.default.{p}" for p in ("weight", "bias")}
    assert metrics["head_parameters"] == 3 * 32 + 3
    assert metrics["trainable_parameters"] == sum(
        p.numel() for name, p in model.named_parameters() if "sparsek_scorer" in name
    )
    with torch.no_grad():
        nn.init.normal_(model.get_base_model().classifier.weight)
    finetune(model, IDS, settings)  # pytest makes an error of a warning that nobody expects


# The Hub.


@pytest.mark.parametrize("method", METHODS)
def test_pushed_with_its_head(method, checkpoint, tmp_path, hub):
    base, name = checkpoint(), f"{hub.user}/bert-{method}"
    HfApi().create_repo(name)
    HfApi().upload_folder(folder_path=base, repo_id=name)
    model = adapt("BertForSequenceClassification", name, method, lora_rank=2)
    repo = f"{hub.user}/rated-{method}"
    hf_sparse.push_to_hub(model, repo)
    loaded = hf_sparse.from_pretrained(repo)
    assert torch.equal(outputs(loaded), outputs(model)) and loaded.config.id2label == LABELS
    card = ModelCard.load(hf_hub_download(repo, "README.md"))
    assert card.data.pipeline_tag == "text-classification"
    head = sum(p.numel() for name, p in model.named_parameters() if name in trained(model))
    learned = sum(p.numel() for name, p in model.named_parameters() if p.requires_grad) - head
    assert head == 32 * 32 + 32 + 3 * 32 + 3
    assert f"an adapter of {learned:,} parameters" in card.text
    assert f"also brings {head:,} parameters of the head" in card.text and "id2label" in card.text
