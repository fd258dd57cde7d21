"""One voice: what is said reaches the console of one rank and, while a run's folder is open, its train.log.

    log.info("resumed at step 20")          # said once, by rank 0
    node_log.warning("waiting for a shard")  # said once on every machine
"""

from __future__ import annotations

import logging

from tqdm import tqdm

from runtime import dist

log = logging.getLogger("pico")
node_log = logging.getLogger("pico.node")


def speaks(record: logging.LogRecord) -> bool:
    """Whether it is for this rank to say."""
    return (dist.local_rank() if record.name == node_log.name else dist.rank()) == 0


def printable(text: str) -> str:
    """Text fit for a terminal: names of files and keys may be a stranger's, and hold sequences that it obeys."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def line_of(record: logging.LogRecord) -> str:
    message = printable(record.getMessage())
    return message if record.levelno == logging.INFO else f"{record.levelname.lower()}: {message}"


class Console(logging.Handler):
    """Standard output, above the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(line_of(record))


def start_logging(level: str = "INFO") -> None:
    """Show what is said from `level` on; once is enough."""
    log.setLevel(level)
    log.propagate = False
    if not any(isinstance(handler, Console) for handler in log.handlers):
        console = Console()
        console.addFilter(speaks)
        log.addHandler(console)
