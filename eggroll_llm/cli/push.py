"""`push`: upload a model to the Hugging Face hub."""

import argparse
from pathlib import Path

from eggroll_llm.cli.arguments import Settings, add_at
from eggroll_llm.models.push import PushError, plan_push, push
from eggroll_llm.system.terminal import inert


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    parser.add_argument(
        "model", type=Path, metavar="RUN_OR_DIR", help="directory of a run (or RUN@STEP), a model or an adapter"
    )
    parser.add_argument("repo_id", metavar="OWNER/NAME", help="repository on the hub")
    add_at(parser)
    visible = parser.add_mutually_exclusive_group()
    visible.add_argument("--private", action="store_true", help="make the repository private")
    visible.add_argument("--public", action="store_true", help="publish settings that look like secrets, too")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to upload to; default: main")
    parser.add_argument("--dry-run", action="store_true", help="list what would be uploaded, without network")


def run(options: argparse.Namespace, settings: Settings) -> int:
    """Print what would be uploaded, and upload it."""
    plan = plan_push(options.model, options.repo_id, at=options.at, private=options.private, revision=options.revision)
    print(*plan.lines(), sep="\n")
    if options.dry_run:
        return 0
    if plan.secrets and not (plan.private or options.public):
        raise PushError(
            f"nothing was sent: {', '.join(map(inert, plan.secrets))} would be published. Use --private, push a copy "
            "of the run without it, or use --public if it is no secret"
        )
    print(push(plan))
    return 0
