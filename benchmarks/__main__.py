"""`python -m benchmarks {kernels,layers,models} --out FILE`: run a suite and append its lines to FILE."""

import argparse
import time
from pathlib import Path

import torch

from benchmarks.measure import Limits
from benchmarks.records import Recorder, environment

SUITES = ("kernels", "layers", "models")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines; appended to, flushed line by line")
    parser.add_argument("--only", action="append", metavar="GLOB", help='over "case/provider", may be repeated')
    parser.add_argument(
        "--deadline", type=float, default=float("inf"), metavar="SECONDS", help="skip what is left then"
    )
    parser.add_argument("--case-seconds", type=float, default=60.0, help="time for one case of kernels and layers")
    parser.add_argument("--attention", default="native", help="diffusers' attention backend, for every provider")
    parser.add_argument("--commit", help="what to record where the checkout has no git directory")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    args = parser.parse_args(arguments)

    limits = Limits(args.only or ("*",), args.case_seconds, time.monotonic() + args.deadline)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("a") as file:
        recorder = Recorder(file, environment(args.device, args.commit))
        run(args.suite, args.device, recorder, limits, args.attention)


def run(suite: str, device: str, recorder: Recorder, limits: Limits, attention: str) -> None:
    """Run a suite; only its own modules are imported."""
    if suite == "models":
        from benchmarks import models

        models.run_suite(device, recorder, limits, attention)
        return
    from benchmarks import kernels, layers, measure

    cases = (kernels if suite == "kernels" else layers).cases(device)
    measure.run_suite(suite, cases, device, recorder, limits)


if __name__ == "__main__":
    main()
