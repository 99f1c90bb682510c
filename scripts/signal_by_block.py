"""Where in a model a random perturbation learns most for the harm it does, block by block and layer by layer.

    python scripts/signal_by_block.py recipes/addition_smollm2.toml [--problems 40] [--noise 0.0043 0.0087]

Samples answers to training problems at temperature 1 and takes the gradient of each answer's log-probability. For the
weights of each block, g is the policy gradient (advantages as in the recipe), F the Fisher information of an answer:

    signal = |g|^2 = g_1 . g_2, g_1 and g_2 from halves of the problems, so that the noise of few answers drops out
    harm   = tr F: random noise of variance s^2 moves the distribution of answers by s^2 tr(F) / 2 nats

A step along random directions of these weights gains in proportion to the root of signal / harm. With `--noise` it also
says how many held-out problems are solved, greedily, after random noise of that size on all of these weights.
"""

import argparse
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from eggroll_llm.config.recipe import load_recipe
from eggroll_llm.models.targets import block_of, trained_parameters
from eggroll_llm.tasks.prompts import ProblemSet
from eggroll_llm.tasks.task import Answer
from eggroll_llm.training.prepare import Prepared, prepare

BATCH = 16


class Answers:
    """Answers of the model to the problems of a run."""

    def __init__(self, prepared: Prepared) -> None:
        self.prepared = prepared
        self.tokenizer: Any = AutoTokenizer.from_pretrained(prepared.model_dir)
        self.model: Any = AutoModelForCausalLM.from_pretrained(prepared.model_dir, dtype=torch.float32).eval()
        self.weights: dict[str, Tensor] = dict(self.model.named_parameters())

    def sampled(self, problems: ProblemSet, count: int, **how: Any) -> Iterator[tuple[int, tuple[int, ...], Any]]:
        """Yield (problem, tokens, score) of answers, cut after the stop text."""
        pad = self.tokenizer.eos_token_id
        for start in range(0, count, BATCH):
            prompts = problems.prompts[start : min(start + BATCH, count)]
            width = max(map(len, prompts))
            ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts])
            mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
            length = self.prepared.config.sampling.max_tokens
            out = self.model.generate(ids, attention_mask=mask, pad_token_id=pad, max_new_tokens=length, **how)
            for row, tokens in enumerate(out[:, width:].tolist()):
                i = start + row // (len(out) // len(prompts))
                kept, text = self.cut(tokens)
                yield i, kept, self.prepared.task.score(Answer(text=text, problem=problems.problems[i]))

    def cut(self, tokens: list[int]) -> tuple[tuple[int, ...], str]:
        """Return the tokens of an answer, its end included, and its text before that."""
        stops = self.prepared.task.stop
        for n in range(1, len(tokens) + 1):
            text = self.tokenizer.decode(tokens[:n], skip_special_tokens=True)
            found = [text.index(stop) for stop in stops if stop in text]
            if found or tokens[n - 1] == self.tokenizer.eos_token_id:
                return tuple(tokens[:n]), text[: min(found)] if found else text
        return tuple(tokens), self.tokenizer.decode(tokens)

    def gradient(self, prompt: tuple[int, ...], answer: tuple[int, ...]) -> None:
        """Leave the gradient of the answer's log-probability in the weights."""
        logits = self.model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        self.model.zero_grad()
        logits.log_softmax(-1)[range(len(answer)), answer].sum().backward()


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--problems", type=int, default=40)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--noise", type=float, nargs="*", default=[])
    given = parser.parse_args()
    torch.manual_seed(0)
    prepared = prepare(load_recipe(given.recipe), given.recipe.parent)
    answers = Answers(prepared)
    names = sorted((name for name, _, _ in trained_parameters(prepared.model_dir)), key=block_of)
    for name, weight in answers.weights.items():
        weight.requires_grad_(name in names)
    print_signal(answers, names, given.problems, given.samples)
    for size in (0.0, *given.noise):
        before = {name: answers.weights[name].detach().clone() for name in names}
        with torch.no_grad():
            for name in names:
                answers.weights[name].add_(size * torch.randn_like(before[name]))
            held_out = prepared.held_out
            solved = [score.correct for *_, score in answers.sampled(held_out, len(held_out.prompts), do_sample=False)]
            for name in names:
                answers.weights[name].copy_(before[name])
        print(f"noise {size:g}: {100 * sum(solved) / len(solved):.1f} % of {len(solved)}")


def print_signal(answers: Answers, names: list[str], problems: int, samples: int) -> None:
    """Print signal and harm by block and by layer."""
    rewards: dict[int, Counter[tuple[int, ...]]] = defaultdict(Counter)
    counts: dict[int, Counter[tuple[int, ...]]] = defaultdict(Counter)
    drawn = answers.sampled(answers.prepared.train, problems, do_sample=True, top_k=0, num_return_sequences=samples)
    for i, tokens, score in drawn:
        rewards[i][tokens] = score.reward
        counts[i][tokens] += 1
    halves = [{name: torch.zeros_like(answers.weights[name]) for name in names} for _ in range(2)]
    harm: Counter[str] = Counter()
    for i, distinct in counts.items():
        mean = sum(rewards[i][tokens] * count for tokens, count in distinct.items()) / samples
        for tokens, count in distinct.items():
            answers.gradient(answers.prepared.train.prompts[i], tokens)
            for name in names:
                gradient = answers.weights[name].grad
                assert gradient is not None
                harm[name] += count * float(gradient.square().sum())
                halves[i % 2][name].add_(gradient, alpha=count * (rewards[i][tokens] - mean))
    of_group: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    answered = problems * samples
    for name in names:
        signal = float((halves[0][name] * halves[1][name]).sum()) / (answered / 2) ** 2
        for group in ("all", f"block {block_of(name)}", name.split(".")[-2]):
            of_group[group][0] += signal
            of_group[group][1] += harm[name] / answered
    print("| weights | signal | harm | signal / harm |\n|---|---|---|---|")
    for group, (signal, fisher) in of_group.items():
        print(f"| {group} | {signal:.3g} | {fisher:.4g} | {signal / fisher:.5f} |")


if __name__ == "__main__":
    main()
