"""Models for the tests: tiny random ones of each tested architecture, the real embedded one. Offline."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, and inherited by child processes
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # or the tokenizer warns in every child process
# Tiny models gain nothing from a second thread. Where there are two, they sleep while they wait for each other: beside
# other work, spinning takes ten times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from eggroll_llm.system.hardware import serves_on_cpu

if serves_on_cpu():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported: kernels of a GPU run in its interpreter

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings
from kinds import KINDS
from process_tree import ProcessTree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

settings.register_profile("everyday", max_examples=25, deadline=None)
settings.register_profile("nightly", max_examples=1000, deadline=None)
settings.load_profile("everyday")
# No test switches the machine off, and the disk would take a third of the time of runs with the stand-in engine.
os.fsync = lambda file: os.fstat(file if isinstance(file, int) else file.fileno()) and None

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TRAINING_TEXT = [
    "Make 9 from 4 and 5: 4+5=9",
    "Question: how many are left? Answer: 42 #### 42",
    "Using the numbers 3, 7 and 11 the result is (11-7)*3 = 12.",
]
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # the smallest that vLLM's CPU attention serves
    "max_position_embeddings": 512,
}


SLOW_FIRST = (
    "engine/test_engine.py",
    "training/test_resume.py",
    "training/test_grpo.py",
    "test_demo.py",
    "eval/test_lm_eval.py",
    "engine/test_replicas.py",
    "engine/test_blocks.py",
    "training/test_signals.py",
    "engine/test_pool.py",
    "bench/test_run.py",
    "training/test_es.py",
    "engine/test_tensor_parallel.py",
    "eval/test_evaluation.py",
    "models/test_gguf.py",
    "rewards/test_properties.py",
    "training/test_grpo_step.py",
    "tasks/test_process.py",
    "engine/test_batch.py",
    "cli/test_sweep.py",
    "kernels/test_ways.py",
    "engine/test_ten_steps.py",
    "training/test_same_update.py",
    "engine/test_quantization.py",
    "engine/test_memory.py",
    "engine/test_start.py",
    "cli/test_doctor.py",
    "kernels/test_compile.py",
    "module/test_es.py",
)
"""Files that take long: a process of pytest-xdist that gets one last works on while the other has nothing to do."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the slow files; the order within a file stays."""
    places = {file: at for at, file in enumerate(SLOW_FIRST)}
    tests = Path(__file__).parent
    items.sort(key=lambda item: places.get(str(item.path.relative_to(tests)), len(places)))


def tiny_tokenizer() -> "PreTrainedTokenizerFast":
    """Byte-level BPE, so that any text has tokens and comes back unchanged."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=CHAT_TEMPLATE,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=SHAPE["max_position_embeddings"],
    )


def save_tiny_model(directory: Path, kind: str, **changes: Any) -> None:
    """A random bfloat16 model of the kind, with all in it that sets its architecture apart."""
    import torch
    import transformers

    tokenizer = tiny_tokenizer()
    name, particular = KINDS[kind]
    config = getattr(transformers, name)(
        **{"tie_word_embeddings": False, **SHAPE, **particular, **changes},
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        # Large enough that logits differ from token to token by more than bfloat16 can blur.
        initializer_range=0.1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        # What initialisation sets to 0 or 1 would hide a bias or a norm that is dropped on the way.
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.5)
            elif "norm" in name:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


@pytest.fixture(scope="session", autouse=True)
def thawed_at_the_end() -> Iterator[None]:
    yield
    gc.unfreeze()


@pytest.fixture(scope="module", autouse=True)
def frozen() -> None:
    """Leave what is imported out of garbage collections, which were half of the time of a short run of GRPO."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[ProcessTree]:
    """Processes that a test starts, and theirs; what is left of them ends with the test."""
    found = ProcessTree(tmp_path)
    yield found
    found.kill()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_model(kind, **config)`, one of KINDS -> Hugging Face directory, made once a session. Read only."""
    made: dict[str, Path] = {}

    def get(kind: str, **changes: Any) -> Path:
        name = f"{kind} {changes}"
        if name not in made:
            made[name] = tmp_path_factory.mktemp(f"tiny-{kind}")
            save_tiny_model(made[name], kind, **changes)
        return made[name]

    return get


@pytest.fixture(scope="session")
def embedded_model() -> Path:
    """The directory of the embedded model, converted on first use. Tests that take it are marked `model`."""
    from eggroll_llm.models.resolve import resolve_model

    return resolve_model("smollm2-135m-instruct")
