"""pip install ./bilateralfilter: the operators are compiled on their first use, as in a checkout.

pip install --no-build-isolation ./bilateralfilter compiles them at once, with the torch that is installed, and with
CUDA where nvcc is, for the GPUs there or those that TORCH_CUDA_ARCH_LIST names: for machines that have no compiler when
they run, such as those of a cluster.
"""

import importlib.util
import os
from pathlib import Path

from setuptools import setup

FOLDER = Path(__file__).resolve().parent


def compiled() -> dict:
    """What setup needs to compile ahead; nothing where torch is not there (pip's isolated builds)."""
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        return {}
    spec = importlib.util.spec_from_file_location("_extension", FOLDER / "_extension.py")
    extension = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extension)
    for_whom = "TORCH_CUDA_ARCH_LIST" in os.environ or torch.cuda.is_available()
    cuda = for_whom and extension.cuda_compiler() is not None
    kind = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    module = kind(
        f"_bilateralfilter_{extension.source_hash()}",  # so that a checkout never loads one made from other sources
        [str(path.relative_to(FOLDER)) for path in extension.sources(cuda)],
        extra_compile_args={"cxx": extension.FLAGS, "nvcc": extension.NVCC_FLAGS},
        extra_link_args=["-fopenmp"],
    )
    build = cpp_extension.BuildExtension.with_options(use_ninja=False)
    return {"ext_modules": [module], "cmdclass": {"build_ext": build}}


setup(
    name="bilateralfilter",
    version="0.2",
    packages=["bilateralfilter"],
    package_dir={"bilateralfilter": "."},
    package_data={"bilateralfilter": ["csrc/*"]},
    install_requires=["torch"],
    **compiled(),
)
