// Pixel-Adaptive Refinement (AFA, CVPR 2022, section 3.3): the neighbours of a pixel.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>

#include <algorithm>
#include <type_traits>

#include "lattice.h"

namespace bilateralfilter {

constexpr int RING = 8; // neighbours for each dilation, in reading order
constexpr int MOST_NEIGHBOURS = 16 * RING; // Python lets no more through

struct Neighbours {
  int64_t dilations[MOST_NEIGHBOURS / RING];
  int64_t height, width; // of the image, whose edges repeat beyond it
  int count;

  Neighbours(at::IntArrayRef given, int64_t height, int64_t width)
      : height(height), width(width), count(RING * static_cast<int>(given.size())) {
    std::copy(given.begin(), given.end(), dilations);
  }

  SHARED int64_t down(int k) const { return (place(k) / 3 - 1) * dilations[k / RING]; }
  SHARED int64_t right(int k) const { return (place(k) % 3 - 1) * dilations[k / RING]; }

  // From pixel p of a plane to its neighbour k.
  struct Offset {
    const Neighbours& at;
    int64_t y, x;
    SHARED int64_t operator()(int k) const {
      return (inside(y + at.down(k), at.height) - y) * at.width + inside(x + at.right(k), at.width) - x;
    }
  };
  SHARED Offset from(int64_t p) const { return {*this, p / width, p % width}; }

  SHARED static int place(int k) { return k % RING + (k % RING >= RING / 2); }
  SHARED static int64_t inside(int64_t i, int64_t size) { return i < 0 ? 0 : i < size ? i : size - 1; }
};

// The operators, by Impl of the CPU or a GPU.
template <class Impl>
at::Tensor par_affinity(const at::Tensor& images, const at::Tensor& position, at::IntArrayRef dilations, double width) {
  const Neighbours at(dilations, images.size(2), images.size(3));
  at::Tensor out = at::empty({images.size(0), at.count, at.height, at.width}, images.options());
  if (out.numel() == 0) return out;
  AT_DISPATCH_FLOATING_TYPES(images.scalar_type(), "par_affinity", [&] {
    Impl::template affinity<scalar_t>(images.contiguous(), position.contiguous(), at, static_cast<scalar_t>(width), out);
  });
  return out;
}

template <class Impl>
at::Tensor par_refine(const at::Tensor& maps, const at::Tensor& weights, at::IntArrayRef dilations, int64_t iterations) {
  if (maps.numel() == 0 || iterations == 0) return maps.clone(at::MemoryFormat::Contiguous);
  const Neighbours at(dilations, maps.size(2), maps.size(3));
  at::Tensor out = at::empty(maps.sizes(), maps.options());
  AT_DISPATCH_FLOATING_TYPES(maps.scalar_type(), "par_refine", [&] {
    Impl::template refine<scalar_t>(maps.contiguous(), weights.contiguous(), at, iterations, out);
  });
  return out;
}

} // namespace bilateralfilter
