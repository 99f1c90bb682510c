"""`eval`: accuracy of a model or a run on a task's test split."""

import argparse
from pathlib import Path

from eggroll_llm.cli.arguments import GO_ON, Settings, add_at, not_negative, positive, positives
from eggroll_llm.errors import ConfigError
from eggroll_llm.system.files import check_output_file
from eggroll_llm.tasks.paths import absolute_task


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    parser.add_argument(
        "model", metavar="MODEL_OR_RUN", help="run directory (or RUN@STEP), or a model as in `model`, adapters included"
    )
    parser.add_argument(
        "--task",
        help="gsm8k, gsm8k_cot, countdown, dataset, verifiers or file.py:NAME; default: the recipe's or run's task",
    )
    parser.add_argument(
        "--recipe", type=Path, metavar="RECIPE.toml", help="task, prompts and limits of a recipe, for any model"
    )
    add_at(parser)
    parser.add_argument(
        "--protocol",
        choices=("lm-eval", "task"),
        help="prompts of lm-evaluation-harness (default for gsm8k, gsm8k_cot) or of training",
    )
    parser.add_argument("--num-fewshot", type=not_negative, metavar="N", help="worked examples in lm-eval's prompts")
    parser.add_argument(
        "--apply-chat-template", action="store_true", help="apply the chat template to lm-eval's prompts"
    )
    parser.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="of gsm8k, gsm8k_cot: folder with train.jsonl and test.jsonl"
    )
    parser.add_argument("--limit", type=positive, default=0, metavar="N", help="only the first N problems")
    parser.add_argument(
        "--max-tokens",
        type=positive,
        default=0,
        metavar="N",
        help="length limit of an answer (default: the run's or recipe's own; of a task 320; lm-eval's 256)",
    )
    parser.add_argument("--samples", type=positive, default=1, metavar="N", help="completions per problem")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="sampling temperature; 0 (default) is greedy"
    )
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="probability mass of nucleus sampling")
    parser.add_argument(
        "--top-k", type=not_negative, default=0, metavar="K", help="most probable tokens to sample from"
    )
    parser.add_argument(
        "--min-p", type=float, default=0.0, metavar="P", help="least probability, relative to the most probable token's"
    )
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        metavar="F",
        help="factor against repeated tokens; default: the recipe's or run's, or 1",
    )
    parser.add_argument(
        "--stop",
        action="append",
        metavar="TEXT",
        help="one more text at which answers end (may be repeated); default: the recipe's or run's",
    )
    parser.add_argument(
        "--thinking-token-budget",
        type=not_negative,
        metavar="N",
        help="tokens in thoughts before </think> is forced; default: the recipe's or run's, or no limit (0)",
    )
    parser.add_argument("--seed", type=not_negative, default=0, metavar="N", help="seed of sampling")
    parser.add_argument(
        "--k", type=positives, metavar="K,K", help="values of k for pass@k and maj@k; default: the number of samples"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE.json",
        help="write the result, and every answer to FILE.samples.jsonl, from which an interrupted evaluation continues",
    )
    parser.add_argument(
        "--on-existing",
        choices=("resume", "overwrite"),
        default="resume",
        help="what to do about existing answers; default: %(default)s",
    )


def run(options: argparse.Namespace, settings: Settings) -> int:
    """Evaluate a model or a run, print the table and write the files."""
    from eggroll_llm.cli.display import ConsoleDisplay
    from eggroll_llm.training.prepare import load_absolute
    from eval.evaluation import evaluate_subject, settings_for
    from eval.subject import find_subject
    from eval.summary import summarize, table, write_summary

    samples_file = _samples_file(options.out) if options.out else None
    recipe = load_absolute(options.recipe) if options.recipe else None
    if options.data_dir:
        if options.task not in (None, "gsm8k", "gsm8k_cot"):
            raise ConfigError(
                f"--data-dir is of gsm8k and gsm8k_cot, not of {options.task}: name its data by --task_options.KEY"
            )
        settings = [*settings, ("task_options.data_dir", str(options.data_dir.resolve()))]
    how = settings_for(
        find_subject(options.model, options.at),
        settings,
        task=absolute_task(options.task, Path.cwd()) if options.task else None,
        recipe=recipe,
        protocol=options.protocol,
        shots=options.num_fewshot,
        apply_chat_template=options.apply_chat_template,
        limit=options.limit,
        max_tokens=options.max_tokens,
        samples=options.samples,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        stop=tuple(options.stop) if options.stop else None,
        thinking_token_budget=options.thinking_token_budget,
        seed=options.seed,
    )
    ks = [k for k in (options.k or [options.samples]) if k > 1]
    if max(ks, default=0) > options.samples:
        raise ConfigError(f"--k {max(ks)}: there are only {options.samples} completions per problem: raise --samples")
    options.again = GO_ON if options.out else ""
    with ConsoleDisplay() as display:
        results = evaluate_subject(
            how,
            Path.cwd(),
            samples_file,
            overwrite=options.on_existing == "overwrite",
            on_progress=lambda done, total: display.sampling("eval", done, total),
            say=display.message,
        )
    summary = summarize(results, ks)
    if options.out:
        write_summary(options.out, summary)
    print(table(summary))
    return 0


def _samples_file(out: Path) -> Path:
    """Return FILE.samples.jsonl beside FILE.json. Raises ConfigError for what cannot be a file."""
    check_output_file(out, "eval.json")
    return out.with_name(f"{out.name.removesuffix('.json')}.samples.jsonl")
