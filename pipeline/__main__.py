"""The command `pipeline`, also as `python -m pipeline`."""

import gc
import signal


def start() -> None:
    """Run the command.

    Ctrl-C kills the process until a run handles it: raised during an import, `KeyboardInterrupt` may leave a lock held.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from pipeline.cli.main import main
    from pipeline.core import cpu_affinity

    cpu_affinity.pin()
    try:
        main(prog_name="pipeline")
    finally:
        # Otherwise Python searches everything loaded for cycles when it exits: a fifth of the time of a short run.
        gc.freeze()


if __name__ == "__main__":
    start()
