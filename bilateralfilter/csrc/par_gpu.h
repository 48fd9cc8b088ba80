// Pixel-Adaptive Refinement on a GPU, for any Device of gpu.h: one body for each pixel.
#pragma once

#include "gpu.h"
#include "par.h"

namespace bilateralfilter::gpu {

#include "par_bodies.h"

template <class Device>
struct Par {
  template <class T>
  static void affinity(const at::Tensor& images, const at::Tensor& position_of, const Neighbours at, T width,
                       at::Tensor& out) {
    const int64_t channels = images.size(1), plane = at.height * at.width;
    const T *image = images.const_data_ptr<T>(), *position = position_of.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    Device().run(images.size(0) * plane, [=] BODY(int64_t i) {
      const int64_t n = i / plane, p = i % plane;
      T* here = to + n * at.count * plane + p;
      affinities<T>(image + n * channels * plane + p, channels, plane, at.count, at.from(p), position, width, here, plane,
                    here, plane);
    });
  }

  template <class T>
  static void refine(const at::Tensor& maps, const at::Tensor& weights, const Neighbours at, int64_t iterations,
                     at::Tensor& out) {
    at::Tensor now = maps, other = at::empty_like(maps);
    for (int64_t left = iterations; left-- > 0;) {
      at::Tensor next = left % 2 ? other : out;
      groups(maps.size(1), [&](auto C, int64_t c) { refine_group<T, decltype(C)::value>(now, c, weights, at, next); });
      now = next;
    }
  }

  template <class T, int C>
  static void refine_group(const at::Tensor& now, int64_t c, const at::Tensor& weights, const Neighbours at,
                           at::Tensor& next) {
    const int64_t channels = now.size(1), plane = at.height * at.width;
    const T *from = now.const_data_ptr<T>() + c * plane, *affinity = weights.const_data_ptr<T>();
    T* to = next.mutable_data_ptr<T>() + c * plane;
    Device().run(now.size(0) * plane, [=] BODY(int64_t i) {
      const int64_t n = i / plane, p = i % plane, first = n * channels * plane + p;
      refined<C, T>(affinity + n * at.count * plane + p, plane, at.count, at.from(p), from + first, plane, to + first, plane);
    });
  }
};

} // namespace bilateralfilter::gpu
