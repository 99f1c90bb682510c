"""`watch`: a run in the browser while it goes on."""

import argparse
import subprocess
import sys
from pathlib import Path

from eggroll_llm.cli.arguments import Settings, not_negative
from eggroll_llm.system.local_page import LocalPage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory, or where a run is about to be")
    parser.add_argument("--port", type=not_negative, default=0, metavar="N", help="port; default: a free one")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")


def run(options: argparse.Namespace, settings: Settings) -> int:
    """Serve the page until Ctrl-C, which is how it ends and no failure."""
    from eval.live import POLICY, LivePage

    with LocalPage(LivePage(options.run), POLICY, options.port) as server:
        print(f"{options.run}: {server.url} (on this machine only; Ctrl-C ends it)", flush=True)
        if options.open:
            _open_browser(server.url)
        try:
            server.serve_forever()
        except KeyboardInterrupt as error:
            if getattr(error, "status", 130) != 130:
                raise
    return 0


def _open_browser(url: str) -> None:
    """Start the browser from a process that ends at once: it is then no child of ours, which Ctrl-C would end."""
    words, none = [sys.executable, "-m", "webbrowser", url], subprocess.DEVNULL
    subprocess.Popen(words, stdin=none, stdout=none, stderr=none)
