"""python -m minkernels: what is active on this machine and why. python -m minkernels build: builds the C++ library.
python -m minkernels kernels-layout DIR: our layers for Hugging Face's kernels package."""

import argparse
import importlib.util
import pathlib
import sys

import minkernels
from minkernels import _build


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m minkernels", description="Without a command: what is active here, and why.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    build = commands.add_parser("build", help="build the C++ library, in place, with g++ and ninja; with pybind11 also minkernels._host")
    build.add_argument("-v", "--verbose", action="store_true", help="print the compiler's command lines")
    layout = commands.add_parser("kernels-layout", help="write the folder from which Hugging Face's kernels package takes our layers")
    layout.add_argument("dir", type=pathlib.Path, help="for kernels.LocalLayerRepository(DIR, layer_name=...); made if it is not there")
    args = parser.parse_args()
    if args.command == "build":
        try:
            print("built", _build.build(verbose=args.verbose))
            if importlib.util.find_spec("pybind11"):
                print("built", _build.build_host(verbose=args.verbose))
            else:
                print("not built: minkernels._host, which average precision needs: pip install pybind11, then build again")
        except RuntimeError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    elif args.command == "kernels-layout":
        from minkernels.swap import layers

        try:
            folders = layers.write(args.dir)
        except OSError as error:
            print(f"error: cannot write {args.dir}: {error.strerror}", file=sys.stderr)
            return 1
        for folder in folders:
            print("written", folder)
    else:
        try:
            print(minkernels.info())
        except RuntimeError as error:  # of MINKERNELS_CPU_LEVEL
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
