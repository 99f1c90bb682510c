"""One optimizer step of ours through TRL: against the formula in plain torch, and against TRL's own trainer.

The rollouts are those of the stand-in engine, of different lengths, so that padding that counted would show.
"""

import contextlib
import dataclasses
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from grpo_stub import Recorder, StubEngine, token_logprobs, write_recipe
from kinds import KINDS, MIXTURES
from scored import written
from torch import Tensor
from transformers import AutoModelForCausalLM
from trl.kernels import chunked_logprob
from without_vllm import adapted_layers

from eggroll_llm.config.recipe import load_recipe
from eggroll_llm.config.schema import RunConfig
from eggroll_llm.engine.interface import Completion, Request
from eggroll_llm.models.targets import trained_parameters
from eggroll_llm.records.journal import Journal, JournalHeader
from eggroll_llm.records.run_dir import RunDir
from eggroll_llm.training import recorder, scorer
from eggroll_llm.training.grpo import GrpoTrainer
from eggroll_llm.training.grpo_trl import trainer
from eggroll_llm.training.grpo_trl.passes import add_product, side_by_side
from eggroll_llm.training.grpo_trl.rollouts import checkpoint_tensors
from eggroll_llm.training.grpo_trl.trainer import GRPOConfig, arguments, load_model
from eggroll_llm.training.harness import Harness, Run
from eggroll_llm.training.prepare import Prepared, prepare
from eggroll_llm.training.scorer import Scorer

GRPO: dict[str, Any] = {"max_grad_norm": 0.5, "adam_eps": 1e-2, "weight_decay": 0.1}
"""An epsilon with which AdamW's step is smooth in the gradient, so that rounding errors stay what they are."""


@dataclasses.dataclass
class Step:
    """A trainer with the stand-in engine, before its first step."""

    trainer: GrpoTrainer
    engine: StubEngine
    prepared: Prepared

    def make(self) -> dict[str, Tensor]:
        self.trainer.run()
        return checkpoint_tensors(self.trainer.trl.model)

    @property
    def rollouts(self) -> tuple[tuple[Request, ...], list[Completion]]:
        (asked,) = [(r, a) for (r, d), a in zip(self.engine.asked, self.engine.answers, strict=True) if d.logprobs]
        return asked

    def rewards(self) -> Tensor:
        """In the order of the completions, by the task itself."""
        requests, completions = self.rollouts
        prompts = list(self.prepared.train.prompts)
        scores = [
            self.prepared.task.score(written(c.text, self.prepared.train.problems[prompts.index(r.prompt_ids)])).reward
            for r, c in zip(requests, completions, strict=True)
        ]
        return torch.tensor(scores)


@pytest.fixture
def step_of(
    tmp_path: Path, tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Step]]:
    opened = contextlib.ExitStack()
    monkeypatch.setattr(scorer, "sandboxed", lambda task: None)  # a process takes half a second to start

    def make(kind: str = "qwen2", sampling: dict[str, Any] | None = None, **grpo: Any) -> Step:
        config = load_recipe(write_recipe(tmp_path, tiny_model(kind)), [("steps", "1"), ("checkpoint.best", "false")])
        config = dataclasses.replace(
            config,
            grpo=dataclasses.replace(config.grpo, **{**GRPO, **grpo}),
            sampling=dataclasses.replace(config.sampling, **(sampling or {})),
        )
        prepared = prepare(config, tmp_path)
        engine = StubEngine(tiny_model(kind))
        run = opened.enter_context(RunDir.create(Path(tempfile.mkdtemp(dir=tmp_path)) / "run", ""))
        header = JournalHeader(frozen_hash="a" * 64, base_model="0" * 16)
        journal = opened.enter_context(Journal.open(run.journal, header))
        grader = opened.enter_context(Scorer(prepared.task))
        written = recorder.Recorder(prepared.config, run, journal)
        parts = Run(prepared=prepared, engine=engine, scorer=grader, recorder=written, display=Recorder())
        return Step(GrpoTrainer(Harness(parts)), engine, prepared)

    with opened:
        yield make


def by_the_formula(step: Step, config: RunConfig) -> dict[str, Tensor]:
    """The step as `grpo`'s docstring says it, completion by completion, with torch's AdamW."""
    grpo, group = config.grpo, config.sampling.samples_per_prompt
    requests, completions = step.rollouts
    model = AutoModelForCausalLM.from_pretrained(step.prepared.model_dir, dtype=torch.float32)

    rewards_PS = step.rewards().view(-1, group)
    scale = {
        "group": rewards_PS.std(dim=1, keepdim=True),
        "batch": rewards_PS.std(),
        "none": torch.tensor(1 - 1e-4),
    }[grpo.scale_rewards]
    advantages = ((rewards_PS - rewards_PS.mean(dim=1, keepdim=True)) / (scale + 1e-4)).flatten()

    def logprobs() -> list[Tensor]:
        return [
            token_logprobs(model, r.prompt_ids, c.token_ids, config.sampling.temperature)
            for r, c in zip(requests, completions, strict=True)
        ]

    with torch.no_grad():
        old, base = logprobs(), logprobs()
    decay = [p for name, p in model.named_parameters() if not ("norm" in name or name.endswith("bias"))]
    rest = [p for name, p in model.named_parameters() if "norm" in name or name.endswith("bias")]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": grpo.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=grpo.learning_rate,
        betas=(grpo.adam_beta1, grpo.adam_beta2),
        eps=grpo.adam_eps,
    )
    for _ in range(grpo.num_iterations):
        losses = []
        kept = [not (completion.truncated and grpo.mask_truncated_completions) for completion in completions]
        for now, before, reference, advantage, completion in zip(
            logprobs(), old, base, advantages, completions, strict=True
        ):
            ratio = (now - before).exp()
            clipped = ratio.clamp(1 - grpo.epsilon, 1 + (grpo.epsilon_high or grpo.epsilon))
            loss_T = -torch.minimum(ratio * advantage, clipped * advantage)
            if grpo.importance_sampling:
                weight = (before - torch.tensor(completion.logprobs)).sum().exp()
                loss_T = loss_T * (weight if weight <= 3 else 0)
            difference = reference - now
            losses.append(loss_T + grpo.beta * ratio * (difference.exp() - difference - 1))
        if grpo.loss_type == "dapo":
            loss = torch.cat([loss_T for loss_T, keep in zip(losses, kept, strict=True) if keep]).mean()
        elif grpo.loss_type == "grpo":
            loss = torch.stack([keep * loss_T.mean() for loss_T, keep in zip(losses, kept, strict=True)]).mean()
        else:  # dr_grpo
            loss = torch.cat(losses).sum() / (len(losses) * config.sampling.max_tokens)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), grpo.max_grad_norm)
        optimizer.step()
    return checkpoint_tensors(model)


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).detach().abs().max()) for name in one)


def some_noise(request: Request) -> float:
    """The engine disagrees a little on most completions; on some so much that they are left out."""
    return random.Random(f"noise {request.seed}").choice([0.0, 0.02, -0.05, 0.01, -2.0])


@pytest.mark.parametrize(
    "grpo",
    [
        {},
        {"loss_type": "grpo"},
        {"loss_type": "dr_grpo"},
        {"scale_rewards": "batch"},
        {"scale_rewards": "none"},
        {"beta": 0.1, "num_iterations": 2},
        {"num_iterations": 3, "epsilon": 0.02, "epsilon_high": 0.03, "learning_rate": 0.05},
        {"importance_sampling": False},
        {"mask_truncated_completions": True},
        {"mask_truncated_completions": True, "loss_type": "grpo", "num_iterations": 2},
        {"micro_batch": 12},
        {"micro_batch": 1},
        {"gradient_checkpointing": True},
        {"num_iterations": 3, "adam_beta1": 0.5, "adam_beta2": 0.7, "learning_rate": 0.05},
    ],
    ids=str,
)
def test_a_step_is_that_of_the_formula(step_of: Callable[..., Step], grpo: dict[str, Any]) -> None:
    step = step_of(**grpo)
    step.engine.added_logprob = some_noise
    ours = step.make()
    base = checkpoint_tensors(AutoModelForCausalLM.from_pretrained(step.prepared.model_dir, dtype=torch.float32))
    assert largest_difference(ours, base) > 1e-3
    assert largest_difference(ours, by_the_formula(step, step.trainer.config)) < 1e-6
    row = step.trainer.recorder.directory.read_metrics()[1]
    if grpo.get("importance_sampling", True):  # the case is not an empty one: some were left out, some kept
        assert row["sampling/importance_sampling_ratio/min"] == 0
        assert 0.3 < row["sampling/importance_sampling_ratio/mean"] < 1
    if grpo.get("mask_truncated_completions"):
        assert 0 < sum(completion.truncated for completion in step.rollouts[1]) < len(step.rollouts[1])
    if grpo.get("epsilon"):
        assert row["clip_ratio/region_mean"] > 0
    if grpo.get("beta"):
        assert row["kl"] > 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_completions_of_a_problem_share_the_pass_over_its_prompt(
    step_of: Callable[..., Step], *, checkpointing: bool
) -> None:
    """Every token goes through the embeddings; transformers keeps no keys and values where it computes them twice.

    Two of the three prompts here are the same but for the last token, which goes with the completion.
    """
    step = step_of(micro_batch=12, importance_sampling=False, gradient_checkpointing=checkpointing)
    model, tokens = step.trainer.trl.model, []
    model.get_input_embeddings().register_forward_pre_hook(lambda module, inputs: tokens.append(inputs[0].numel()))
    step.make()
    assert model.is_gradient_checkpointing == checkpointing
    requests, completions = step.rollouts
    different = {request.prompt_ids[:-1] for request in requests}
    assert len(different) == 2
    longest = max(len(request.prompt_ids) for request in requests), max(len(c.token_ids) for c in completions)
    if checkpointing:
        assert tokens == [12 * sum(longest)]
    else:
        assert tokens == [len(different) * (longest[0] - 1), 12 * (1 + longest[1])]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_of_the_head_are_added_up_in_float32(dtype: torch.dtype) -> None:
    assert chunked_logprob._addmm_fp32 is add_product
    torch.manual_seed(0)
    a, b, total = (torch.randn(shape) for shape in ((200, 3000), (3000, 128), (200, 128)))
    a, b = a.to(dtype), b.to(dtype)
    exact = total.double() + a.double() @ b.double()
    before = torch.get_float32_matmul_precision()
    add_product(total, a, b)
    assert torch.get_float32_matmul_precision() == before
    assert (total - exact).abs().max() < 1e-5 * exact.abs().max()


def test_bfloat16_is_that_of_the_arithmetic_and_not_of_the_weights(step_of: Callable[..., Step]) -> None:
    rounded = step_of(dtype="bfloat16").make()
    exact = step_of().make()
    base = checkpoint_tensors(AutoModelForCausalLM.from_pretrained(step_of().prepared.model_dir, dtype=torch.float32))
    assert all(tensor.dtype == torch.float32 for tensor in rounded.values())
    assert 1e-5 < largest_difference(rounded, exact) < 0.5 * largest_difference(exact, base)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_other_models(step_of: Callable[..., Step], kind: str) -> None:
    step = step_of(kind)
    ours = step.make()
    assert largest_difference(ours, by_the_formula(step, step.trainer.config)) < 1e-6


@pytest.mark.parametrize("grpo", [{}, {"loss_type": "bnpo"}, {"num_iterations": 2, "learning_rate": 0.05}], ids=str)
def test_a_step_is_that_of_trl(
    step_of: Callable[..., Step], grpo: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL's `GRPOTrainer` as it is, with the rollouts that ours had handed to it, and its own `AdamW` and loop."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    step = step_of(importance_sampling=False, **grpo)
    ours = step.make()
    requests, completions = step.rollouts
    config, rewards = step.trainer.config, step.rewards().tolist()
    group = config.sampling.samples_per_prompt

    def rollouts(prompts: list[str], trainer: Any) -> dict[str, Any]:
        assert prompts == [str(i // group) for i in range(len(requests))]
        return {
            "prompt_ids": [list(r.prompt_ids) for r in requests],
            "completion_ids": [list(c.token_ids) for c in completions],
            "logprobs": None,
        }

    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(step.prepared.model_dir, dtype=torch.float32),
        reward_funcs=[lambda prompts, completions, **_: rewards],
        args=GRPOConfig(
            output_dir=str(tmp_path / "trl"),
            use_cpu=True,
            bf16=False,
            max_steps=config.grpo.num_iterations,
            num_iterations=config.grpo.num_iterations,
            per_device_train_batch_size=config.grpo.micro_batch,
            gradient_accumulation_steps=len(requests) // config.grpo.micro_batch,
            num_generations=group,
            max_completion_length=config.sampling.max_tokens,
            temperature=config.sampling.temperature,
            learning_rate=config.grpo.learning_rate,
            lr_scheduler_type="constant",
            loss_type=config.grpo.loss_type,
            weight_decay=config.grpo.weight_decay,
            adam_epsilon=config.grpo.adam_eps,
            max_grad_norm=config.grpo.max_grad_norm,
            gradient_checkpointing=False,
            shuffle_dataset=False,
            dataloader_pin_memory=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"prompt": [str(i) for i in range(config.sampling.prompts_per_step)]}),
        processing_class=AutoTokenizer.from_pretrained(step.prepared.model_dir),
        rollout_func=rollouts,
    )
    # What the micro batches of "bnpo" are depends on the shuffle, whose seed is ours.
    from eggroll_llm.engine.sampling import sampling_seed

    shuffle = trainer._calculate_rewards

    def seeded(*arguments: Any) -> Any:
        torch.manual_seed(sampling_seed(config.seed, 1, len(requests), 0))
        return shuffle(*arguments)

    trainer._calculate_rewards = seeded
    trainer.train()
    assert largest_difference(ours, checkpoint_tensors(trainer.model)) < 1e-6


def test_what_comes_after_the_end_is_masked_and_what_ends_it_is_not(step_of: Callable[..., Step]) -> None:
    step = step_of()
    seen: list[dict[str, Any]] = []
    score = step.trainer.trl._generate_and_score_completions

    def remember(*arguments: Any) -> Any:
        seen.append(score(*arguments))
        return seen[-1]

    step.trainer.trl._generate_and_score_completions = remember
    step.make()
    (batch,) = seen
    requests, completions = step.rollouts
    lengths = [len(c.token_ids) for c in completions]
    assert len(set(lengths)) > 3
    eos = step.engine.tokenizer.eos_token_id
    for row, (request, completion) in enumerate(zip(requests, completions, strict=True)):
        mask = batch["completion_mask"][row].bool()
        assert batch["completion_ids"][row][mask].tolist() == list(completion.token_ids)
        assert not mask[len(completion.token_ids) :].any()
        assert (batch["completion_ids"][row][mask][-1] == eos) == (not completion.truncated)
        assert batch["prompt_ids"][row][batch["prompt_mask"][row].bool()].tolist() == list(request.prompt_ids)
        assert batch["sampling_per_token_logps"][row][mask].tolist() == pytest.approx(completion.logprobs, abs=1e-6)


def test_a_step_whose_completions_are_all_cut_off_changes_nothing(step_of: Callable[..., Step]) -> None:
    step = step_of(sampling={"max_tokens": 1}, mask_truncated_completions=True, weight_decay=0.0)
    ours = step.make()
    assert all(completion.truncated for completion in step.rollouts[1])
    base = checkpoint_tensors(AutoModelForCausalLM.from_pretrained(step.prepared.model_dir, dtype=torch.float32))
    assert largest_difference(ours, base) == 0


@pytest.mark.parametrize(("schedule", "rates"), [("constant", [1.0] * 4), ("linear", [1.0, 0.7, 0.4, 0.1])])
def test_the_learning_rate_follows_the_schedule_of_es(
    step_of: Callable[..., Step], schedule: str, rates: list[float]
) -> None:
    """Warm-up of two steps, and the schedule of `update.schedule`; with two optimizer steps to a step."""
    step = step_of(learning_rate=0.3, num_iterations=2, learning_rate_schedule=schedule, warmup_steps=2)
    trl = step.trainer.trl
    trl._run_config = dataclasses.replace(trl._run_config, steps=4)
    weight = torch.nn.Parameter(torch.zeros(1))
    scheduler = trl.create_scheduler(8, torch.optim.SGD([weight], lr=0.3))
    found = []
    for _ in range(8):
        found.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    warm = [1 / 3, 2 / 3, 1.0, 1.0]
    assert found == pytest.approx([0.3 * w * r for w, r in zip(warm, rates, strict=True) for _ in range(2)])


def test_adapters_are_merged_into_copies(step_of: Callable[..., Step]) -> None:
    """As peft merges them; the base weights stay, to the bit, and nothing else moves."""
    step = step_of(lora_rank=4, lora_alpha=8, adam_eps=1e-8)
    merged = step.make()
    base = checkpoint_tensors(AutoModelForCausalLM.from_pretrained(step.prepared.model_dir, dtype=torch.float32))
    moved = {name for name in base if not torch.equal(base[name], merged[name])}
    assert moved == {name for name in base if name.endswith("_proj.weight")}
    model = step.trainer.trl.model
    for name, tensor in model.get_base_model().state_dict().items():
        if name.endswith("base_layer.weight"):
            assert torch.equal(tensor, base[name.replace(".base_layer.", ".")])
    assert largest_difference(merged, dict(model.merge_and_unload().state_dict())) < 1e-6
    # And that is what the engine was handed last.
    assert largest_difference(dict(step.engine.model.state_dict()), merged) == 0


def test_weights_beneath_adapters_are_narrow_where_that_changes_no_bit(
    step_of: Callable[..., Step], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of mixed precision moves the adapters as it does over float32 weights."""

    def load(directory: Path) -> tuple[Any, Any]:
        model, tokenizer = load_model(directory)
        for name, weight in model.named_parameters():
            weight.data = weight.data.bfloat16().float() + (1e-5 if "layers.0.mlp.up_proj" in name else 0)
        return model, tokenizer

    def adapters() -> dict[str, Tensor]:
        step = step_of(lora_rank=4, adam_eps=1e-8, dtype="bfloat16")
        step.make()
        tensors: dict[str, Tensor] = step.trainer.trl.model.state_dict()
        kinds.append({name: weight.dtype for name, weight in tensors.items()})
        return {name: weight for name, weight in tensors.items() if ".lora_" in name}

    kinds: list[dict[str, torch.dtype]] = []
    monkeypatch.setattr(trainer, "load_model", load)
    narrow = adapters()
    monkeypatch.setattr(trainer, "narrow_beneath_adapters", lambda model: None)
    assert largest_difference(narrow, adapters()) == 0
    assert set(kinds[1].values()) == {torch.float32}
    assert {name for name, kind in kinds[0].items() if kind == torch.bfloat16} == {
        name for name in kinds[0] if ".base_layer." in name and "layers.0.mlp.up_proj" not in name
    }


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in MIXTURES])
def test_adapters_are_on_the_layers_that_es_perturbs(
    tiny_model: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    """Also where q, k, v or gate, up are one layer."""
    config = load_recipe(write_recipe(tmp_path, tiny_model(kind)), [("grpo.lora_rank", "2")])
    perturbed = {name.removesuffix(".weight") for name, _, _ in trained_parameters(tiny_model(kind))}
    assert adapted_layers(tiny_model(kind), config) == perturbed


def test_no_pass_is_over_columns_of_padding_alone(step_of: Callable[..., Step]) -> None:
    """A micro batch is as wide as its own longest prompt and completion, whatever the step's are."""
    step = step_of(micro_batch=1)
    inner = step.trainer.trl.model.base_model
    padded: list[int] = []
    inner.register_forward_pre_hook(
        lambda _, args, passed: padded.append(int((~passed["attention_mask"].bool().any(dim=0)).sum())),
        with_kwargs=True,
    )
    step.make()
    _, completions = step.rollouts
    assert len({len(completion.token_ids) for completion in completions}) > 1
    assert set(padded) == {0}


def test_prompts_of_one_token_share_nothing_and_are_scored(step_of: Callable[..., Step]) -> None:
    """As a micro batch beside others with longer ones."""
    step = step_of(micro_batch=2)
    trl, generator = step.trainer.trl, torch.Generator().manual_seed(0)
    ids = torch.randint(3, 300, (4, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[:2, :4] = 0  # five columns of prompts, of which two rows have one
    with torch.no_grad():
        found, _, _ = trl._get_per_token_logps_and_entropies(trl.model, ids, mask, 4, batch_size=2)
        logits = trl.model(input_ids=ids, attention_mask=mask).logits[:, 4:-1] / trl.temperature
        expected = logits.log_softmax(-1).gather(2, ids[:, 5:, None])[..., 0]
    assert torch.allclose(found.float(), expected.float(), atol=1e-4)


def test_the_trainer_takes_one_gpu_of_several(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The others are the engines'. A stand-in for four."""
    monkeypatch.setattr(GRPOConfig, "n_gpu", property(lambda self: 4))
    recipe = load_recipe(write_recipe(tmp_path, tmp_path))
    assert arguments(recipe, tmp_path, use_cpu=True)._n_gpu == 1


def test_completions_of_a_prompt_stand_side_by_side_short_before_long() -> None:
    batch = {
        "prompt_ids": torch.tensor([[1, 2], [0, 3], [1, 2], [0, 3]]),
        "completion_mask": torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]]),
        "advantages": torch.tensor([0.0, 1.0, 2.0, 3.0]),
        "num_items_in_batch": torch.tensor(9),
    }
    ordered = side_by_side(batch)
    assert ordered["advantages"].tolist() == [1.0, 3.0, 2.0, 0.0]
    assert ordered["prompt_ids"].tolist() == [[0, 3], [0, 3], [1, 2], [1, 2]]
    assert ordered["num_items_in_batch"] == 9
