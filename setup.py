"""Builds the optional native kernels; everything else about the package is in pyproject.toml.

The environment variable TORCHPROBE_BUILD decides what happens:

* unset: build the kernels if that is possible, otherwise install pure Python and say why in one line;
* ``0``: do not build them;
* ``1``: a kernel that cannot be built is an error.

The modules use PyTorch's stable ABI and Python's limited API: one wheel serves every torch >= 2.10 and every
CPython >= 3.10. A build without kernels makes a pure wheel instead. The reason is kept in torchprobe/_build.json,
for ``torchprobe doctor``.
"""

import glob
import json
import os
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

BUILD = os.environ.get("TORCHPROBE_BUILD", "")
BuildExtension, CppExtension, TORCH_ERROR = build_ext, Extension, None
try:
    if BUILD != "0":
        from torch.utils.cpp_extension import BuildExtension, CppExtension
except Exception as error:  # a broken torch raises more than ImportError
    TORCH_ERROR = str(error).partition("\n")[0]

DEVICES = {"torchprobe._C": "cpu"}
LIMITED_API = not sysconfig.get_config_var("Py_GIL_DISABLED")  # free-threaded CPython has none
MINIMUM_TORCH = "0x020a000000000000"  # 2.10: the oldest stable ABI the kernels may use

if sys.platform == "win32":
    FLAGS = ["/O2", "/W3"]
else:
    # No contraction: the kernels say themselves where a multiplication and an addition are one operation.
    FLAGS = ["-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-Wall", "-Wextra"]


def modules():
    """One extension module for each kind of device, so that one may be absent without the others."""
    cpu = CppExtension(
        "torchprobe._C",
        sorted(glob.glob("csrc/*.cpp") + glob.glob("csrc/cpu/*.cpp")),
        depends=glob.glob("csrc/**/*.h", recursive=True),
        include_dirs=[os.path.abspath("csrc")],
        define_macros=[("TORCH_TARGET_VERSION", MINIMUM_TORCH)],
        extra_compile_args=FLAGS,
        language="c++",
        py_limited_api=LIMITED_API,
    )
    return [cpu]


def obstacle():
    """Why building need not even be tried, or None."""
    if BUILD == "0":
        return "TORCHPROBE_BUILD=0 was set"
    if TORCH_ERROR:
        return f"torch could not be imported during the build ({TORCH_ERROR})"
    compiler = shlex.split(os.environ.get("CXX") or "c++")[0]
    if sys.platform != "win32" and not shutil.which(compiler):
        return f"no C++ compiler ({compiler} was not found)"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python's headers are not installed (on Debian and Ubuntu: apt install python3-dev)"
    return None


class BuildKernels(BuildExtension):
    """Builds what can be built; what cannot is dropped from the distribution, and the reason written down."""

    def run(self):
        self.reasons = {}
        inplace = self.inplace
        reason = obstacle()
        if reason is None:
            try:
                super().run()
            except Exception as error:  # trouble before the first module, such as a compiler that does not start
                reason = f"the build failed ({describe(error)})"
                self.inplace = inplace  # setuptools clears it while it builds
        if reason is not None:
            self.reasons = {extension.name: reason for extension in self.extensions}
        if self.reasons and BUILD == "1":
            raise SystemExit(f"torchprobe: TORCHPROBE_BUILD=1, but {'; '.join(sorted(set(self.reasons.values())))}")
        for extension in [extension for extension in self.extensions if extension.name in self.reasons]:
            self.drop(extension)
        self.record()

    def build_extension(self, ext):
        ext.optional = True  # copying into the source tree then tolerates its absence
        try:
            super().build_extension(ext)
        except Exception as error:
            self.reasons[ext.name] = f"compilation failed ({describe(error)}; TORCHPROBE_BUILD=1 with pip install -v shows all)"

    def drop(self, ext):
        print(f"torchprobe: {DEVICES[ext.name]} kernels not built: {self.reasons[ext.name]}", file=sys.stderr)
        stale = self.target() / self.get_ext_filename(self.get_ext_fullname(ext.name))
        stale.unlink(missing_ok=True)  # never install the product of an earlier build
        self.extensions = [other for other in self.extensions if other is not ext]
        self.distribution.ext_modules = self.extensions
        wheel = self.distribution.get_command_obj("bdist_wheel", create=False)
        if wheel and not self.extensions:
            wheel.root_is_pure, wheel.py_limited_api = True, False

    def target(self):
        return Path("" if self.inplace else self.build_lib)

    def record(self):
        path = self.target() / "torchprobe" / "_build.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({DEVICES[name]: reason for name, reason in self.reasons.items()}) + "\n")


def describe(error):
    return f"{type(error).__name__}: {error}".partition("\n")[0]


setup(
    ext_modules=modules(),
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if LIMITED_API else {},
)
