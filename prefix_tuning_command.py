"""The command prefix-tuning: outside of the package, whose import takes seconds in which Ctrl-C is to be one line as well."""

import sys


def main() -> int:
    """Runs prefix_tuning.cli.main and returns its exit status; 130 where that was not even imported."""
    try:
        from prefix_tuning.cli import main as run
    except KeyboardInterrupt:
        print("\nprefix-tuning: interrupted", file=sys.stderr)
        return 130
    return run()
