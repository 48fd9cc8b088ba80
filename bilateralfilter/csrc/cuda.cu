// The operators for CUDA: gpu.h and par_gpu.h on a GPU.

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "par_gpu.h"

namespace bilateralfilter::gpu {
namespace {

constexpr int THREADS = 256;
constexpr int64_t BLOCKS = 8192; // at most: threads go on in steps of the whole grid

template <class Body>
__global__ void run_all(int64_t n, Body body) {
  for (int64_t i = blockIdx.x * int64_t(THREADS) + threadIdx.x; i < n; i += gridDim.x * int64_t(THREADS)) body(i);
}

template <class Body>
__global__ void run_counted(Count n, Body body) {
  const int64_t end = (*n.end - *n.begin) * n.factor;
  for (int64_t i = blockIdx.x * int64_t(THREADS) + threadIdx.x; i < end; i += gridDim.x * int64_t(THREADS)) body(i);
}

struct Cuda {
  cudaStream_t stream = c10::cuda::getCurrentCUDAStream();

  template <class Body>
  void run(int64_t n, const Body& body) const {
    run_all<<<std::min((n + THREADS - 1) / THREADS, BLOCKS), THREADS, 0, stream>>>(n, body);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

  template <class Body>
  void run(Count n, const Body& body) const {
    run_counted<<<BLOCKS, THREADS, 0, stream>>>(n, body);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

  static __device__ int32_t compare_and_swap(int32_t* at, int32_t expected, int32_t desired) {
    return atomicCAS(at, expected, desired);
  }
  static __device__ void smaller(int32_t* at, int32_t value) { atomicMin(at, value); }
};

std::vector<at::Tensor> build_cuda(const at::Tensor& features, const std::optional<at::Tensor>& valid) {
  const c10::cuda::CUDAGuard guard(features.device());
  return build<Cuda>(features, valid);
}

at::Tensor apply_cuda(const at::Tensor& values, at::TensorList lattice, bool transposed) {
  const c10::cuda::CUDAGuard guard(values.device());
  at::Tensor out = at::empty_like(values);
  add_<Cuda>(out, values, lattice, transposed, false);
  return out;
}

void add_cuda(at::Tensor& out, const at::Tensor& values, at::TensorList lattice) {
  const c10::cuda::CUDAGuard guard(values.device());
  add_<Cuda>(out, values, lattice, false, true);
}

at::Tensor par_affinity_cuda(const at::Tensor& images, const at::Tensor& position, at::IntArrayRef dilations,
                             double width) {
  const c10::cuda::CUDAGuard guard(images.device());
  return par_affinity<Par<Cuda>>(images, position, dilations, width);
}

at::Tensor par_refine_cuda(const at::Tensor& maps, const at::Tensor& affinity, at::IntArrayRef dilations,
                           int64_t iterations) {
  const c10::cuda::CUDAGuard guard(maps.device());
  return par_refine<Par<Cuda>>(maps, affinity, dilations, iterations);
}

} // namespace

TORCH_LIBRARY_IMPL(bilateralfilter, CUDA, library) {
  library.impl("build", &build_cuda);
  library.impl("apply", &apply_cuda);
  library.impl("add_", &add_cuda);
  library.impl("par_affinity", &par_affinity_cuda);
  library.impl("par_refine", &par_refine_cuda);
}

} // namespace bilateralfilter::gpu
