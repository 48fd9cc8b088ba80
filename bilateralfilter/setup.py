"""pip install ./bilateralfilter: the operators are compiled on their first use, as in a checkout.

pip install --no-build-isolation ./bilateralfilter compiles them at once, with the torch that is installed, and with
CUDA where nvcc is, for the GPUs there or those that TORCH_CUDA_ARCH_LIST names: for machines that have no compiler when
they run, such as those of a cluster.
"""

import re
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup

FOLDER = Path(__file__).resolve().parent


def compiled() -> dict:
    """What setup needs to compile ahead; nothing where torch is not there (pip's isolated builds)."""
    try:
        from torch.utils import cpp_extension
    except ImportError:
        return {}
    package = sys.modules["bilateralfilter"] = ModuleType("bilateralfilter")  # without what its __init__ imports
    package.__path__ = [str(FOLDER)]
    from bilateralfilter import _cuda_toolkit, _extension

    def module(kind: str, toolkit: _cuda_toolkit.Toolkit | None) -> Extension:
        return (cpp_extension.CUDAExtension if toolkit else cpp_extension.CppExtension)(
            _extension.name_of(kind, toolkit),  # so that a checkout never loads one made from other sources
            [str(path.relative_to(FOLDER)) for path in _extension.sources(toolkit is not None)],
            extra_compile_args={
                "cxx": _extension.FLAGS,
                "nvcc": _extension.NVCC_FLAGS + (toolkit.flags() if toolkit else []),
            },
            extra_link_args=["-fopenmp"],
            library_dirs=_cuda_toolkit.runtime_folder(FOLDER / "build") if toolkit else [],
        )

    modules = [module("cpu", None)]
    cards = {int(re.match(r"\d+", name)[0]) for name in _cuda_toolkit.listed()} or _cuda_toolkit.cards()
    try:
        toolkit = _cuda_toolkit.find(cards)
        cpp_extension.CUDA_HOME = str(toolkit.home)
        modules.append(module("cuda", toolkit))
    except LookupError as error:
        print(f"bilateralfilter is compiled without CUDA: {error}", file=sys.stderr)
    build = cpp_extension.BuildExtension.with_options(use_ninja=False)
    return {"ext_modules": modules, "cmdclass": {"build_ext": build}}


setup(
    name="bilateralfilter",
    version="0.2",
    packages=["bilateralfilter"],
    package_dir={"bilateralfilter": "."},
    package_data={"bilateralfilter": ["csrc/*"]},
    install_requires=["torch"],
    **compiled(),
)
