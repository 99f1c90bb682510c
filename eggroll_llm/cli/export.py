"""`export`: a model for other programs, as a LoRA adapter or a GGUF file."""

import argparse
from dataclasses import dataclass
from pathlib import Path, PurePath

from eggroll_llm.cli.arguments import Settings, add_at, positive
from eggroll_llm.cli.display import ConsoleDisplay
from eggroll_llm.config.recipe import load_recipe
from eggroll_llm.errors import ConfigError
from eggroll_llm.models.adapter.card import adapter_card
from eggroll_llm.models.adapter.kept import Kept
from eggroll_llm.models.adapter.write import write_adapter
from eggroll_llm.models.called import short_name
from eggroll_llm.models.files import check_model, model_identity
from eggroll_llm.models.llama_cpp import TYPES, find_converter, write_gguf
from eggroll_llm.models.resolve import is_hub_id, resolve_model, settled_name
from eggroll_llm.models.targets import trained_parameters
from eggroll_llm.records.weights import named_run, recorded_origin, weights_at, write_provenance
from eggroll_llm.system.files import describe_failure, replace_directory, write_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    parser.add_argument("model", metavar="RUN_OR_MODEL", help="run directory, or a model as in `model`")
    parser.add_argument("out", type=Path, metavar="OUT", help="new directory of the adapter, or new file NAME.gguf")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--adapter", type=positive, metavar="RANK", help="write a LoRA adapter of this rank, for PEFT")
    kind.add_argument("--gguf", choices=TYPES, help="write a GGUF file, by llama.cpp's converter")
    add_at(parser)
    parser.add_argument("--base", metavar="MODEL", help="model that was trained from; default: that of the run")
    parser.add_argument(
        "--converter", type=Path, metavar="PATH", help="llama.cpp or its convert_hf_to_gguf.py; default: $LLAMA_CPP_DIR"
    )


def run(options: argparse.Namespace, settings: Settings) -> int:
    """Write the adapter or the file, and say what it keeps."""
    out = options.out
    if out.exists():
        raise ConfigError(f"{out}: exists already: name a new {'file' if options.gguf else 'directory'}")
    if not out.parent.is_dir():
        raise ConfigError(f"{out}: the folder {out.parent} does not exist: create it")
    if options.gguf and options.base is not None:
        raise ConfigError(f"--base {options.base}: a GGUF file is made of the model alone: leave it out")
    if options.adapter and options.converter:
        raise ConfigError(f"--converter {options.converter}: an adapter is made without llama.cpp: leave it out")
    if options.gguf:
        if out.suffix != ".gguf":
            raise ConfigError(f"{out}: name a file that ends in .gguf")
        converter = find_converter(options.converter)
    source = _source(options)
    try:
        if options.gguf:
            write_gguf(source.directory, out, options.gguf, converter)
            print(f"{out}: {out.stat().st_size:,} bytes, {options.gguf}, of {source.directory}")
        else:
            print(*_export_adapter(source, options.base, options.adapter, out), sep="\n")
    except OSError as error:
        raise ConfigError(describe_failure(out, error, "it")) from error
    return 0


@dataclass(frozen=True, kw_only=True)
class _Source:
    directory: Path
    trained: str
    """What was trained, for the card."""
    base: str
    """The model that it was trained from, as its run names it; empty where that is not known."""


def _source(options: argparse.Namespace) -> _Source:
    if run := named_run(options.model, options.at):
        directory, step = weights_at(*run)
        check_model(directory)
        config = load_recipe(run[0].config)
        trained = f"step {step} of the run {run[0].path.resolve().name}, {config.method}, {PurePath(config.task).name}"
        return _Source(directory=directory.resolve(), trained=trained, base=config.model)
    if options.at != "final":
        raise ConfigError(
            f"--at {options.at}: {options.model} is not a run directory, so it has no steps: leave it out"
        )
    return _Source(directory=resolve_model(options.model), trained=short_name(settled_name(options.model)), base="")


def _export_adapter(source: _Source, named: str | None, rank: int, out: Path) -> list[str]:
    """Write the adapter; return what to say."""
    base = settled_name(named) if named else source.base
    if not base:
        raise ConfigError(f"{source.directory} is of no run: name the model that it was trained from with --base MODEL")
    base_dir = resolve_model(base)
    identity = model_identity(base_dir)
    step, trained_on = recorded_origin(source.directory)
    if trained_on and trained_on != identity:
        raise ConfigError(
            f"{source.directory} was trained from base model {trained_on}, but {base_dir} is {identity}: name the "
            "right one with --base MODEL"
        )
    if rank > (most := max(min(out, inside) for _, out, inside in trained_parameters(base_dir))):
        raise ConfigError(f"--adapter {rank}: an adapter of rank {most} keeps all of these weights: use that or less")
    kept: Kept | None = None

    def write(directory: Path) -> None:
        nonlocal kept
        name = base if is_hub_id(base) else str(base_dir)
        with ConsoleDisplay() as display:
            kept = write_adapter(
                base_dir,
                source.directory,
                directory,
                rank=rank,
                base_name=name,
                on_layer=lambda done, total: display.sampling("layers", done, total),
            )
        write_provenance(directory, step=step or 0, base_model=identity)
        write_text(
            directory / "README.md", adapter_card(kept, base_model=base, identity=identity, trained=source.trained)
        )

    replace_directory(out, write)
    assert kept is not None
    size = sum(path.stat().st_size for path in out.iterdir())
    return [f"{out}: adapter of rank {rank}, {size:,} bytes, of base model {base}", *kept.lines()]
