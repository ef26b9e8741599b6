"""Session set-up: every test talks to the loopback Hub, never to the network.

huggingface_hub reads its endpoint, token and cache folder when it is imported, so the server starts and the environment
is set here, at import. Under pytest-xdist each worker imports this file and gets a server of its own.
"""

import gc
import importlib.util
import os
import shutil
import struct
import sys
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from itertools import count
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import yaml

gc.disable()  # until the tests are collected: libraries leave nothing to free while they are imported

assert "huggingface_hub" not in sys.modules, "huggingface_hub was imported before the loopback Hub set its environment"


def _load(path: Path) -> ModuleType:
    """Imports a file by path: the tests are no package, so that they also run against an installed wheel."""
    spec = importlib.util.spec_from_file_location(f"hf_sparse_tests_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


_TIERS, _GOLDENS = (_load(Path(__file__).parent / name) for name in ("tiers.py", "goldens.py"))
pytest_collection_modifyitems = _TIERS.pytest_collection_modifyitems
golden = _GOLDENS.golden


def pytest_addoption(parser: pytest.Parser) -> None:
    for plugin in (_TIERS, _GOLDENS):
        plugin.pytest_addoption(parser)


_LOOPBACK, _XET = (_load(Path(__file__).parent / "hub" / name) for name in ("loopback.py", "loopback_xet.py"))
_HUB = _LOOPBACK.LoopbackHub(parse_yaml=yaml.safe_load, xet=_XET.XetStore())
_HF_HOME = tempfile.mkdtemp(prefix="hf-sparse-tests-")
_HUB_ENVIRONMENT = {
    "HF_ENDPOINT": _HUB.endpoint,
    "HF_TOKEN": _HUB.token,
    "HF_HOME": _HF_HOME,
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_XET": "1",
    "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "1",  # where a test turns Xet on
    "HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "NO_PROXY": "127.0.0.1,localhost",
    "no_proxy": "127.0.0.1,localhost",
}
for _name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
    os.environ.pop(_name, None)
os.environ.update(_HUB_ENVIRONMENT)

if "PYTEST_XDIST_WORKER" in os.environ:
    import torch  # not at the top: the process that hands out the tests starts two seconds earlier without

    torch.set_num_threads(1)  # the workers already occupy the cores


def pytest_collection_finish() -> None:
    """Leave what was imported out of all collections of garbage to come: going through it takes a third of a second."""
    gc.freeze()
    gc.enable()


def pytest_report_header() -> str:
    names = ("torch", "transformers", "peft", "huggingface_hub")
    return "versions: " + ", ".join(f"{name} {version(name)}" for name in names)


def pytest_unconfigure() -> None:
    _HUB.close()
    shutil.rmtree(_HF_HOME, ignore_errors=True)


@pytest.fixture(scope="session")
def hub():
    """The loopback Hub: `endpoint`, `token`, `user`, `requests`, `count`, `fail_next`. Its repositories stay."""
    return _HUB


@pytest.fixture(scope="session", autouse=True)
def _cards_are_validated_here():
    """`ModelCard.validate` of huggingface_hub 1.x asks huggingface.co, whatever the endpoint is."""
    from huggingface_hub import repocard

    original = repocard.get_session

    class Session:
        def post(self, url: str, **kwargs):
            return original().post(url.replace("https://huggingface.co", _HUB.endpoint), **kwargs)

    repocard.get_session = Session
    yield
    repocard.get_session = original


@pytest.fixture
def hub_env(tmp_path: Path) -> dict[str, str]:
    """A whole environment for a fresh process (`subprocess.run(..., env=hub_env)`): this Hub, and an empty cache."""
    return {**os.environ, **_HUB_ENVIRONMENT, "HF_HOME": str(tmp_path / "hf_home")}


@pytest.fixture(autouse=True)
def _fresh_hub_trace():
    """The request trace and the injected failures belong to one test."""
    _HUB.reset_trace()
    yield
    _HUB.reset_trace()


@pytest.fixture
def blank_pictures() -> Iterator[None]:
    """Save every figure as the same picture of one pixel and 20 kB: laying out and drawing take most of a report."""
    with _blank_pictures():
        yield


@pytest.fixture(scope="module")
def blank_pictures_in_module() -> Iterator[None]:
    """Do what `blank_pictures` does in all of a module, its fixtures included."""
    with _blank_pictures():
        yield


@contextmanager
def _blank_pictures() -> Iterator[None]:
    from matplotlib.figure import Figure

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
    content = header + chunk(b"tEXt", b"Comment\0" + 20_000 * b".") + chunk(b"IDAT", zlib.compress(b"\0\0"))
    picture = b"\x89PNG\r\n\x1a\n" + content + chunk(b"IEND", b"")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Figure, "savefig", lambda self, path, **options: Path(path).write_bytes(picture))
        yield


@pytest.fixture(scope="session", autouse=True)
def _speed_is_measured_briefly() -> Iterator[None]:
    """Decode a few tokens once where a user gets the median of three times 64: no test is of how fast a machine is."""
    from hf_sparse.evaluation import speed

    decode = speed._decode
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(speed, "_REPEATS", 1)
        monkeypatch.setattr(speed, "_decode", lambda model, chunk, tokens: decode(model, chunk, min(tokens, 4)))
        yield


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_llama():
    """Makes small random Llamas on the CPU, in float32 and eval mode; the same weights for the same arguments.

    The weights are larger than a fresh model's: with those every key has about the same weight, and no test would
    notice which keys are attended.
    """

    def make(**changes):
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        settings = {
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "initializer_range": 0.2,
            "bos_token_id": 1,
            "eos_token_id": None,
            "pad_token_id": 0,
        }
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()

    return make


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """List, for every step of `generate` that is played, the number of its recording.

    A recording on the CPU is imitated: it notes the call, and playing it calls again.
    """
    import torch
    from transformers.modeling_outputs import CausalLMOutputWithPast

    from hf_sparse.patches import recorded_steps, switch

    played: list[int] = []
    numbers = count()
    record, is_on_gpu, may_record = recorded_steps.record, recorded_steps.is_on_gpu, switch.may_record

    def imitate(call, device):
        output = CausalLMOutputWithPast(logits=torch.zeros(()))

        def replay():
            for name, value in call().items():
                output[name] = value

        return output, replay

    def note(call, device):
        output, replay = imitate(call, device) if device.type == "cpu" else record(call, device)
        number = next(numbers)
        return output, lambda: (played.append(number), replay())

    def may_imitate(model, config):
        return not config.disable_compile if model.device.type == "cpu" else may_record(model, config)

    monkeypatch.setattr(recorded_steps, "record", note)
    monkeypatch.setattr(recorded_steps, "is_on_gpu", lambda tensor: not tensor.is_cuda or is_on_gpu(tensor))
    monkeypatch.setattr(switch, "may_record", may_imitate)
    return played


@pytest.fixture
def played_prompts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """List the length of the recording for every prompt of `generate` that is played, not those compared; steps run.

    Replays count as faster than prompts that run. A recording on the CPU is imitated: it notes all operations of the
    call, and playing it repeats them on the same tensors, without the Python around them.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from transformers import modeling_utils

    from hf_sparse.patches import prompt_inputs, prompt_recording, recorded_prompts, switch

    played: list[int] = []
    record, is_on_gpu, may_record = prompt_recording.record, prompt_inputs.is_on_gpu, switch.may_record

    class Timing:
        """Takes long for a prompt that runs, and no time for one that is played."""

        def __init__(self):
            self.before = len(played)

        def stop(self):
            self.milliseconds = 0.0 if len(played) > self.before else 1e9

        def ms(self):
            return self.milliseconds

    class Tape(TorchDispatchMode):
        """Notes operations, and refuses those that wait for a value, as a stream that is captured does."""

        def __init__(self):
            super().__init__()
            self.calls = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._local_scalar_dense.default:
                raise RuntimeError("a recording waits for no value")
            result = func(*args, **(kwargs or {}))
            if "empty" not in str(func):
                self.calls.append((func, args, kwargs or {}, tree_leaves(result)))
            return result

        @torch.inference_mode()  # which may write to what was made there
        def play(self):
            for func, args, kwargs, results in self.calls:
                for old, new in zip(results, tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)

    def imitate(call, device, pool):
        with Tape() as tape, pytest.MonkeyPatch.context() as capturing:
            capturing.setattr(modeling_utils, "is_tracing", lambda *_: True)  # what transformers asks there
            return call(), tape.play

    def record_or_imitate(call, device, pool):
        return (imitate if device.type == "cpu" else record)(call, device, pool)

    def note_finish(prompts, recording, *args):
        played.append(recording.length)
        return finish(prompts, recording, *args)

    def may_imitate(model, config):
        devices = getattr(model, "hf_device_map", {})
        return may_record(SimpleNamespace(device=torch.device("cuda"), hf_device_map=devices), config)

    monkeypatch.setattr(recorded_prompts, "Timing", Timing)
    compare, finish = recorded_prompts.RecordedPrompts._compare, recorded_prompts.RecordedPrompts._finish

    def compare_unnoted(*args):
        before = len(played)
        compare(*args)
        del played[before:]

    monkeypatch.setattr(prompt_recording, "record", record_or_imitate)
    monkeypatch.setattr(recorded_prompts.RecordedPrompts, "_compare", compare_unnoted)
    monkeypatch.setattr(recorded_prompts.RecordedPrompts, "_finish", note_finish)
    monkeypatch.setattr(prompt_inputs, "is_on_gpu", lambda tensor: not tensor.is_cuda or is_on_gpu(tensor))
    monkeypatch.setattr(switch, "may_record", may_imitate)
    return played


@pytest.fixture
def tiny_bert():
    """The same for BERT, of any class that transformers has for it."""

    def make(kind="BertForMaskedLM", **changes):
        import torch
        import transformers

        settings = {
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "initializer_range": 0.2,
            "pad_token_id": 0,
        }
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return getattr(transformers, kind)(transformers.BertConfig(**{**settings, **changes})).eval()

    return make


@pytest.fixture
def word_tokenizer():
    """Makes tokenizers of a decoder with words w4 to w63 that are one token each, which put texts into a template."""

    def make(template="<bos> $A", **named):
        from tokenizers import Tokenizer, models, pre_tokenizers
        from tokenizers.processors import TemplateProcessing
        from transformers import PreTrainedTokenizerFast

        special = ["<pad>", "<bos>", "<eos>", "<unk>"]
        words = [*special, *(f"w{i}" for i in range(len(special), 64))]
        tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        added = [(name, special.index(name)) for name in ("<bos>", "<eos>") if name in template]
        if added:
            tokenizer.post_processor = TemplateProcessing(template, special_tokens=added)
        roles = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>", **named}
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)

    return make


@pytest.fixture
def bert_tokenizer():
    """A tokenizer with BERT's special tokens, and words w5 to w63 that are one token each."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*special, *(f"w{i}" for i in range(len(special), 64))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    named = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
