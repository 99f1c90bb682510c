"""The end of everything that a process has started (Linux only: elsewhere nothing is found)."""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections import defaultdict
from pathlib import Path


def end_with_parent() -> None:
    """Let this process end within a second of its parent, wherever its main thread is by then.

    The kernel's own signal (PR_SET_PDEATHSIG) would come with the end of the thread that made this process.
    """
    parent = multiprocessing.parent_process()
    pid = os.getppid() if parent is None else parent.pid

    def watch() -> None:
        while os.getppid() == pid:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, name="end with parent", daemon=True).start()


def kill_descendants(root: int) -> None:
    """Kill all that descends from the process `root`, but for this process, with the process groups made there."""
    groups = {os.getpgrp()}  # of which there are others
    with contextlib.suppress(OSError):  # it has ended
        groups.add(os.getpgid(root))
    for pid, group in _descendants(root):
        if pid == os.getpid():
            continue
        with contextlib.suppress(OSError):  # it has just ended
            if group in groups:
                os.kill(pid, signal.SIGKILL)
            else:
                os.killpg(group, signal.SIGKILL)


def _descendants(root: int) -> list[tuple[int, int]]:
    """Process and process group of each.

    One whose parent has ended is known by its session, as all of a session descend from the process that made it; one
    that left for a session whose maker has ended as well (a daemon) is not found.
    """
    processes: dict[int, tuple[int, int, int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            parent, group, session = map(int, stat.read_text(errors="replace").rpartition(")")[2].split()[1:4])
            processes[int(stat.parent.name)] = parent, group, session
    belonging: defaultdict[int, list[int]] = defaultdict(list)  # to a parent or a session
    for pid, (parent, _, session) in processes.items():
        for known in {parent, session}:
            belonging[known].append(pid)
    found, seen = [root], {root}
    for known in found:  # grows meanwhile
        new = [pid for pid in belonging[known] if pid not in seen]
        found += new
        seen.update(new)
    return [(pid, processes[pid][1]) for pid in found[1:]]
