"""The command `pipeline`, also as `python -m pipeline`."""

import gc
import signal


def start() -> None:
    """Run the command. Until a run heeds it, Ctrl-C kills: raised amid an import it may leave a lock that stays."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from pipeline.cli.main import main
    from pipeline.core import cpu_affinity

    cpu_affinity.pin()
    try:
        main(prog_name="pipeline")
    finally:
        gc.freeze()  # else Python looks once more for cycles in all that was loaded: a fifth of the time of a short run


if __name__ == "__main__":
    start()
