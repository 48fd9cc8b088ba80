// gpu.h and par_gpu.h on threads of the CPU, with atomics that threads can race for: their algorithms are tested where
// there is no GPU.

#include <ATen/Parallel.h>
#include <torch/library.h>

#include "par_gpu.h"

namespace {

using namespace bilateralfilter::gpu;

struct Threads {
  template <class Body>
  void run(int64_t n, const Body& body) const {
    at::parallel_for(0, n, 16, [&](int64_t begin, int64_t end) {
      while (end-- > begin) body(end); // backwards: no result may depend on the order
    });
  }
  template <class Body>
  void run(Count n, const Body& body) const { run((*n.end - *n.begin) * n.factor, body); }

  static int32_t compare_and_swap(int32_t* at, int32_t expected, int32_t desired) {
    __atomic_compare_exchange_n(at, &expected, desired, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    return expected;
  }
  static void smaller(int32_t* at, int32_t value) {
    int32_t held = __atomic_load_n(at, __ATOMIC_RELAXED);
    while (held > value && !__atomic_compare_exchange_n(at, &held, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
  }
};

at::Tensor apply(const at::Tensor& values, at::TensorList lattice, bool transposed) {
  at::Tensor out = at::empty_like(values);
  add_<Threads>(out, values, lattice, transposed, false);
  return out;
}

void add(at::Tensor& out, const at::Tensor& values, at::TensorList lattice) {
  add_<Threads>(out, values, lattice, false, true);
}

} // namespace

TORCH_LIBRARY(gpu_on_cpu, library) {
  library.def("build(Tensor features, Tensor? valid=None) -> Tensor[]", &build<Threads>);
  library.def("apply(Tensor values, Tensor[] lattice, bool transposed) -> Tensor", &apply);
  library.def("add_(Tensor(a!) out, Tensor values, Tensor[] lattice) -> ()", &add);
  library.def("par_affinity(Tensor images, Tensor position, int[] dilations, float width) -> Tensor",
              &bilateralfilter::par_affinity<Par<Threads>>);
  library.def("par_refine(Tensor maps, Tensor affinity, int[] dilations, int iterations) -> Tensor",
              &bilateralfilter::par_refine<Par<Threads>>);
}
