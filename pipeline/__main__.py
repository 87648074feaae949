"""The command `pipeline`, also as `python -m pipeline`."""

import signal


def start() -> None:
    """Run the command. Until a run heeds it, Ctrl-C kills: raised amid an import it may leave a lock that stays."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from pipeline.cli import main

    main(prog_name="pipeline")


if __name__ == "__main__":
    start()
