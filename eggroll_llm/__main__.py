"""`python -m eggroll_llm`: the command line, where the installed program is not on PATH."""

from eggroll_llm.system.invocation import leave_working_directory

if __name__ == "__main__":
    leave_working_directory()

    from eggroll_llm.cli.main import run

    run()
