"""The C++ library, built where there is torch, minkernels._host, built where there is pybind11 too, and csrc, carried along for where
they are not; the rest is in pyproject.toml."""

import importlib.util
import shutil
import sys
from pathlib import Path

from setuptools import Extension, __version__, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

if int(__version__.partition(".")[0]) < 77:  # a new environment of Python 3.11 has 65, and without build isolation pip does not look
    sys.exit(f"minkernels needs setuptools 77 or newer, this is {__version__}: pip install --upgrade setuptools")

from setuptools.command.bdist_wheel import bdist_wheel  # which older ones do not have

HERE = Path(__file__).parent
HOST = "minkernels._host"
HOW = "To build it: pip install ninja, then `python -m minkernels build` in the environment that has torch."


class BuildExt(build_ext):
    """A failed build leaves an install whose Triton and reference roads work; `import minkernels` then says what is missing."""

    def finalize_options(self):
        super().finalize_options()
        self.parallel = self.parallel or True  # both at a time: ninja has no work for every core all the time

    def build_extension(self, ext):
        spec = importlib.util.spec_from_file_location("_build", HERE / "kernels/minkernels/_build.py")
        build = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(build)
        try:
            out = Path(self.get_ext_fullpath(ext.name))
            out.parent.mkdir(parents=True, exist_ok=True)
            (build.build_host if ext.name == HOST else build.build)(out)
        except RuntimeError as error:
            what = HOST if ext.name == HOST else "its C++ library"
            print(f"\nwarning: minkernels is installed without {what}: {error}\n{HOW}\n", file=sys.stderr)

    def get_ext_filename(self, fullname):
        if HOST.endswith(fullname):  # setuptools asks for the last part too
            return super().get_ext_filename(fullname)  # for this Python alone; another one says how to build its own
        return str(Path(*fullname.split("."))) + ".so"  # one library for every Python

    def get_outputs(self):
        return [path for path in super().get_outputs() if Path(path).exists()]

    def copy_extensions_to_source(self):
        built = [ext for ext in self.extensions if Path(self.build_lib, self.get_ext_filename(ext.name)).exists()]
        self.extensions = built
        super().copy_extensions_to_source()


class BuildPy(build_py):
    """The package carries csrc, so that the library can be built after the install."""

    def run(self):
        super().run()
        if not self.editable_mode:
            shutil.copytree(HERE / "csrc", Path(self.build_lib, "minkernels/csrc"), dirs_exist_ok=True)


class Wheel(bdist_wheel):
    def get_tag(self):
        tag = super().get_tag()
        return ("py3", "none", tag[2])


def extensions():
    if importlib.util.find_spec("torch") is None:
        print(f"\nwarning: no torch in this build environment: minkernels is installed without its C++ library. {HOW}\n", file=sys.stderr)
        return []
    names = ["minkernels._ops"] + [HOST] * bool(importlib.util.find_spec("pybind11"))
    return [Extension(name, sources=[]) for name in names]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExt, "build_py": BuildPy, "bdist_wheel": Wheel})
