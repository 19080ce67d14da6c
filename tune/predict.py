"""python tune/predict.py results/demo IMAGE_OR_FOLDER... --out answers.csv

Show images to a study's ensemble: class, name and confidence of each, and "not sure" where answers of so
little confidence are wrong too often. With --export the ensemble leaves the study (ONNX, safetensors, model
card). With --serve a local page takes an image that is dropped on it, and shows which parts of it support
the answer.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while imports last ends it without a traceback

import argparse
import sys
from pathlib import Path

from tune.cli.entry import start
from tune.cli.options import Parser, check_address_space, out_file

ACCURACY = 0.95  # default share of right answers
PORT = 8771


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = Parser(__doc__)
    add = p.add_argument
    add("study", metavar="STUDY_DIR", type=Path, help="a folder under results/")
    add("images", metavar="IMAGES", type=Path, nargs="*", help="images and folders of images")
    add("--out", type=Path, metavar="CSV", help="write the answers with all probabilities to this file")
    add(
        "--not-sure",
        type=float,
        default=ACCURACY,
        metavar="P",
        help=f"share of the answers that must be right; others are not given ({ACCURACY}; 0: give all)",
    )
    add("--student", action="store_true", help="answer with the student of tune/distil.py")
    add("--export", type=Path, metavar="DIR", help="write ONNX, safetensors and a model card to this folder")
    add("--serve", action="store_true", help="show a page to drop images on, until Ctrl-C")
    add("--port", type=int, metavar="N", help=f"port of that page ({PORT}; 0: any)")
    return p


def run(options: argparse.Namespace) -> int:
    """Check the options, then import the command, which takes seconds, and run it."""
    check(options)
    from tune.commands import run_predict
    from tune.monitor.terminal import Screen

    with Screen() as screen:
        return run_predict.run(options, screen, PORT if options.port is None else options.port)


def check(options: argparse.Namespace) -> None:
    """Raises ValueError for a wrong combination of options."""
    if not (options.images or options.export or options.serve):
        raise ValueError("there is nothing to do: give images or folders, --export DIR or --serve")
    if options.out and not options.images:
        raise ValueError(f"--out {options.out} is for answers; give images or folders, too")
    out_file(options)
    check_address_space()
    if options.port is not None and not options.serve:
        raise ValueError(f"--port {options.port} is for --serve; add that or leave it out")


if __name__ == "__main__":
    sys.exit(start(parser, run))
