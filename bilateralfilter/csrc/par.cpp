// Pixel-Adaptive Refinement on the CPU, image by image, so that an image's affinities stay close to the processor.

#include "par.h"

#include "cpu.h"

namespace bilateralfilter {
namespace {

#define INNER_LOOPS "par_loops.h"
#include "instruction_sets.h"

// An image by rows of all channels, with room beside them for the neighbours beyond the edges.
template <class T>
struct Rows {
  int64_t channels, width, room, stride; // stride: between channels; channels * stride: between rows
  at::Tensor memory;
  T* data;

  Rows(const at::Tensor& images, int64_t n, const Neighbours& at)
      : channels(images.size(1)), width(at.width),
        room(*std::max_element(at.dilations, at.dilations + at.count / RING)), stride(width + 2 * room),
        memory(at::empty({at.height, channels, stride}, images.options())), data(memory.mutable_data_ptr<T>()) {
    const T* const image = images.const_data_ptr<T>() + n * channels * at.height * width;
    parallel(at.height, [&](int64_t y) {
      for (int64_t c = 0; c < channels; ++c) std::copy_n(image + (c * at.height + y) * width, width, row(y) + c * stride);
      repeat_edges(y);
    });
  }

  T* row(int64_t y) const { return data + y * channels * stride + room; }

  void repeat_edges(int64_t y) const {
    for (int64_t c = 0; c < channels; ++c) {
      T* const first = row(y) + c * stride;
      std::fill(first - room, first, first[0]);
      std::fill(first + width, first + width + room, first[width - 1]);
    }
  }
};

// body(n) for every image: side by side where they fill the threads evenly, else each on all threads.
template <class F>
void for_images(int64_t count, const F& body) {
  if (count % at::get_num_threads() == 0) return parallel(count, body);
  for (int64_t n = 0; n < count; ++n) body(n);
}

// body(y, steps) for every row, with the steps from its pixels to their neighbours in `rows`.
template <class T, class F>
void for_rows(const Neighbours& at, const Rows<T>& rows, const F& body) {
  parallel(at.height, [&](int64_t y) {
    int64_t steps[MOST_NEIGHBOURS];
    for (int k = 0; k < at.count; ++k) {
      steps[k] = (Neighbours::inside(y + at.down(k), at.height) - y) * rows.channels * rows.stride + at.right(k);
    }
    body(y, steps);
  });
}

struct Cpu {
  template <class T>
  static void affinity(const at::Tensor& images, const at::Tensor& position, const Neighbours& at, T width, at::Tensor& out) {
    const auto row = have_wide() ? wide::affinity_row<T> : baseline::affinity_row<T>;
    const int64_t channels = images.size(1), plane = at.height * at.width;
    for_images(images.size(0), [&](int64_t n) {
      const Rows<T> rows(images, n, at);
      T* const to = out.mutable_data_ptr<T>() + n * at.count * plane;
      for_rows(at, rows, [&](int64_t y, const int64_t* steps) {
        row(rows.row(y), channels, rows.stride, at.width, at.count, steps, position.const_data_ptr<T>(), width,
            to + y * at.width, plane);
      });
    });
  }

  template <class T>
  static void refine(const at::Tensor& maps, const at::Tensor& weights, const Neighbours& at, int64_t iterations,
                     at::Tensor& out) {
    const auto row = have_wide() ? wide::refine_row<T> : baseline::refine_row<T>;
    const int64_t channels = maps.size(1), plane = at.height * at.width;
    for_images(maps.size(0), [&](int64_t n) {
      Rows<T> now(maps, n, at), next(maps, n, at);
      const T* const affinity = weights.const_data_ptr<T>() + n * at.count * plane;
      T* const to = out.mutable_data_ptr<T>() + n * channels * plane;
      for (int64_t left = iterations; left-- > 0; std::swap(now.data, next.data)) {
        for_rows(at, now, [&](int64_t y, const int64_t* steps) {
          row(now.row(y), channels, now.stride, at.width, at.count, steps, affinity + y * at.width, plane,
              left ? next.row(y) : to + y * at.width, left ? next.stride : plane);
          if (left) next.repeat_edges(y);
        });
      }
    });
  }
};

} // namespace

TORCH_LIBRARY_IMPL(bilateralfilter, CPU, library) {
  library.impl("par_affinity", &par_affinity<Cpu>);
  library.impl("par_refine", &par_refine<Cpu>);
}

} // namespace bilateralfilter
