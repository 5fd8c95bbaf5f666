"""Builds the optional native kernels; everything else about the package is in pyproject.toml.

The environment variable TORCHPROBE_BUILD has three settings:

* unset: build the kernels if possible. Otherwise install without them and print the reason in one line.
* ``0``: do not build them.
* ``1``: fail if kernels cannot be built. CUDA kernels may be absent if PyTorch has no CUDA or there is no nvcc.

The CPU kernels and the CUDA kernels are separate extension modules. Both use PyTorch's stable ABI and Python's limited API, and the CUDA
module contains the CUDA runtime. So one wheel works with every torch >= 2.10, with or without CUDA, and every CPython >= 3.10. A build
without kernels makes a pure wheel. torchprobe/_build.json keeps the reasons for absent kernels; ``torchprobe doctor`` prints them.

CUDA_HOME selects another CUDA toolkit than the nvcc in PATH. TORCH_CUDA_ARCH_LIST selects the architectures, and NVCC_THREADS the number of
architectures that are compiled at a time.
"""

import copy
import glob
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

BUILD = os.environ.get("TORCHPROBE_BUILD", "")
DEVICES = {"torchprobe._C": "cpu", "torchprobe._C_cuda": "cuda"}
LIMITED_API = not sysconfig.get_config_var("Py_GIL_DISABLED")  # free-threaded CPython has no limited API
KERNELS_FROM = (2, 10)  # the oldest torch with the stable ABI that the kernels use; an older one runs the reference
MINIMUM_TORCH = f"0x{KERNELS_FROM[0]:02x}{KERNELS_FROM[1]:02x}000000000000"
ARCHITECTURES = "7.5 8.0 8.6 8.9 9.0 10.0 12.0+PTX"  # machine code for each, and PTX for later ones

if sys.platform == "win32":
    FLAGS = ["/O2", "/W3"]
else:
    # No contraction: the kernels themselves decide where a multiplication and an addition become one operation.
    FLAGS = ["-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-Wall", "-Wextra"]
    FLAGS += ["-falign-functions=64", "-falign-loops=32"]  # otherwise the speed of a loop depends on the code before it
    FLAGS += [f"-fmacro-prefix-map={os.getcwd()}/="]  # no path of this machine in error messages
NVCC_FLAGS = [
    "-O3",
    "-std=c++17",
    f"--threads={os.environ.get('NVCC_THREADS', '2')}",
    "-Xcompiler=-fvisibility=hidden,-fvisibility-inlines-hidden,-Wall,-Wextra",
    "-Xfatbin=-compress-all",
    "-Xptxas=-warn-spills,-warn-lmem-usage",
    "--display-error-number",
]


class Toolkit:
    """The CUDA toolkit, as its own nvcc describes it: the nvcc in PATH may be a link or a script in another place."""

    def __init__(self):
        home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        folders = os.path.join(home, "bin") if home else os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
        self.nvcc = shutil.which("nvcc", path=folders)
        steps = self.run("--dryrun", "-E", "-x", "cu", os.devnull)
        if self.nvcc and "TOP=" not in steps:  # called by a link, nvcc does not find its own folder
            self.nvcc = os.path.realpath(self.nvcc)
            steps = self.run("--dryrun", "-E", "-x", "cu", os.devnull)
        self.include_dirs = re.findall(r'"-I(.+?)"', steps)
        self.library_dirs = re.findall(r'"-L(.+?)"', steps)
        version = re.search(r"release (\d+\.\d+)", self.run("--version"))
        self.version = version[1] if version else None
        top = re.search(r"^#\$ TOP=(.+)$", steps, re.MULTILINE)
        if top and Path(top[1], "bin", "nvcc").exists():
            self.library_dirs.append(os.path.join(top[1], "lib"))  # nvcc as a package of Python has no lib64
            os.environ["CUDA_HOME"] = os.path.realpath(top[1])  # where torch.utils.cpp_extension looks for it

    def run(self, *arguments):
        """What nvcc prints, or an empty text if it does not run."""
        try:
            result = subprocess.run([self.nvcc or "", *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True)
        except OSError:
            return ""
        return result.stdout + result.stderr


TOOLKIT = Toolkit()
BuildExtension, CppExtension, TORCH_ERROR = build_ext, Extension, None
try:
    if BUILD != "0":
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
except Exception as error:  # a broken torch raises more than ImportError
    TORCH_ERROR = str(error).partition("\n")[0]


def module(name, folder, flags, **options):
    """One extension module. The C++ standard library is linked before PyTorch's libraries, which export parts of it without a version."""
    options["libraries"] = ["stdc++"] * (sys.platform == "linux") + options.get("libraries", [])
    return CppExtension(
        name,
        sorted(glob.glob(f"{folder}/*.cpp") + glob.glob(f"{folder}/*.cu")),
        depends=glob.glob("csrc/**/*.h", recursive=True) + glob.glob("csrc/**/*.cuh", recursive=True),
        define_macros=[("TORCH_TARGET_VERSION", MINIMUM_TORCH)],
        extra_compile_args=flags,
        language="c++",
        py_limited_api=LIMITED_API,
        **options,
    )


def modules():
    """One extension module for each kind of device, so that each may be absent without the other."""
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES
    os.environ["TORCH_CUDA_ARCH_LIST"] = architectures  # torch turns it into flags for nvcc
    host_flags = ["-DUSE_CUDA", f'-DTORCHPROBE_CUDA_ARCHITECTURES="{" ".join(re.split("[; ]+", architectures))}"']
    cpu = module("torchprobe._C", "csrc/cpu", FLAGS, include_dirs=[os.path.abspath("csrc")])
    # CUDAExtension would link the CUDA runtime dynamically and so bind the module to one major version of CUDA.
    cuda = module(
        "torchprobe._C_cuda",
        "csrc/cuda",
        {"cxx": FLAGS + host_flags, "nvcc": NVCC_FLAGS},
        include_dirs=[os.path.abspath("csrc"), *TOOLKIT.include_dirs],
        library_dirs=TOOLKIT.library_dirs,
        libraries=["cudart_static", "dl", "rt", "pthread", "torch_cuda"],
        extra_link_args=["-Wl,--exclude-libs,ALL"],
    )
    return [cpu, cuda]


def obstacle():
    """The reason not to try a build, or None."""
    if BUILD == "0":
        return "TORCHPROBE_BUILD=0 was set"
    if TORCH_ERROR:
        return f"torch could not be imported during the build ({TORCH_ERROR})"
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < KERNELS_FROM:
        return f"torch {torch.__version__} is older than {'.'.join(map(str, KERNELS_FROM))}, and has no stable interface for them"
    compiler = shlex.split(os.environ.get("CXX") or "c++")[0]
    if sys.platform != "win32" and not shutil.which(compiler):
        return f"no C++ compiler ({compiler} was not found)"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python's headers are not installed (on Debian and Ubuntu: apt install python3-dev)"
    return None


def cuda_absence():
    """The reason why there is nothing to build for CUDA on this machine, or None."""
    if sys.platform != "linux":
        return f"there are no CUDA kernels for {sys.platform}"
    if torch.version.hip:
        return f"torch {torch.__version__} is built for ROCm, and there are no kernels for it"
    if not torch.version.cuda:
        return f"torch {torch.__version__} is a build without CUDA"
    if not TOOLKIT.nvcc:
        return "no CUDA compiler (nvcc was not found; set CUDA_HOME to the CUDA toolkit)"
    return None


def cuda_obstacle():
    """The reason not to try a CUDA build although there is a compiler, or None."""
    if not TOOLKIT.version:
        return f"{TOOLKIT.nvcc} does not run"
    if TOOLKIT.version.partition(".")[0] != torch.version.cuda.partition(".")[0]:
        return (
            f"{TOOLKIT.nvcc} is from CUDA {TOOLKIT.version}, but torch {torch.__version__} needs CUDA {torch.version.cuda} (set CUDA_HOME)"
        )
    return None


class BuildKernels(BuildExtension):
    """Builds each module if possible. Otherwise drops it from the distribution and writes down the reason."""

    def run(self):
        self.reasons, absence, inplace = {}, None, self.inplace
        reason = obstacle()
        if reason is None:
            absence = cuda_absence()
            if cuda_reason := absence or cuda_obstacle():
                self.reasons["torchprobe._C_cuda"] = cuda_reason
            try:
                super().run()
            except Exception as error:  # an error before the first module
                reason = f"the build failed ({describe(error)})"
                self.inplace = inplace  # setuptools clears it while it builds
        if reason is not None:
            self.reasons = {extension.name: reason for extension in self.extensions}
        if BUILD == "1" and (failures := set(self.reasons.values()) - {absence}):
            raise SystemExit(f"torchprobe: TORCHPROBE_BUILD=1, but {'; '.join(sorted(failures))}")
        for extension in [extension for extension in self.extensions if extension.name in self.reasons]:
            self.drop(extension)
        for reason in sorted(set(self.reasons.values())):
            devices = " and ".join(DEVICES[name] for name in self.reasons if self.reasons[name] == reason)
            print(f"torchprobe: {devices} kernels not built: {reason}", file=sys.stderr)
        self.record()

    def build_extensions(self):
        """One by one, so that an error in one module does not stop the other: for example, a compiler that nvcc does not accept."""
        everything, compiler = self.extensions, self.compiler
        for extension in everything:
            extension.optional = True  # setuptools then copies the others into the source tree
            if extension.name not in self.reasons:
                self.extensions, self.compiler = [extension], copy.copy(compiler)  # BuildExtension changes the compiler
                try:
                    super().build_extensions()
                except Exception as error:
                    self.fail(extension, error)
        self.extensions, self.compiler = everything, compiler

    def build_extension(self, ext):
        try:
            super().build_extension(ext)
        except Exception as error:  # setuptools would ignore it, since the module is optional
            self.fail(ext, error)

    def fail(self, ext, error):
        self.reasons[ext.name] = f"compilation failed ({describe(error)}; for all messages use TORCHPROBE_BUILD=1 and pip install -v)"

    def drop(self, ext):
        stale = self.target() / self.get_ext_filename(self.get_ext_fullname(ext.name))
        stale.unlink(missing_ok=True)  # never install the module of an earlier build
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


def long_description():
    """The README for pages outside the repository: its relative links and pictures become absolute."""
    address = "https://github.com/torchprobe/torchprobe"
    text = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    text = re.sub(r"(!\[[^]]*\]\()(?!https?:|#)([^)]+\))", rf"\g<1>{address}/raw/main/\g<2>", text)
    text = re.sub(r"(<img[^>]+src=\")(?!https?:)", rf"\g<1>{address}/raw/main/", text)
    return re.sub(r"(?<=\]\()(?!https?:|#)([^)]+\))", rf"{address}/blob/main/\g<1>", text)


def describe(error):
    return f"{type(error).__name__}: {error}".partition("\n")[0]


setup(
    long_description=long_description(),
    long_description_content_type="text/markdown",
    ext_modules=modules(),
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if LIMITED_API else {},
)
