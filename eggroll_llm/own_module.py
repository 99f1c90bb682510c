"""How a module of ours is run in a process of its own, whatever the user's folder holds."""

import sys
from pathlib import Path

_ROOT = Path(__file__).parents[1]
# The folder of our packages comes last: it may be that of all packages, which must not go before the standard library.
_RUN = """
import runpy, sys
sys.path.append(sys.argv.pop(1))
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


def command(module: str, *arguments: str) -> list[str]:
    """Return the command for `python -m MODULE`, but with nothing imported from the current directory.

    The user's random.py there, or rewards.py, would take the place of the standard library's or ours.
    """
    return [sys.executable, "-P", "-c", _RUN, str(_ROOT), module, *arguments]
