// What the parts of the CPU's code have in common. Every phase works on pieces of fixed size, whatever the number of
// threads, and every sum is taken in the order of the pixels: the results' bits do not depend on the threads.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "lattice.h"

namespace bilateralfilter {

constexpr int64_t STEP = 256; // pixels or vertices that a thread takes at once

// The lattice of a batch, in the order in which `build` returns its parts.
template <class T>
struct Lattice {
  const int32_t* vertex;      // (images, pixels, V)
  const T* weight;            // (images, pixels, V)
  const int32_t* start;       // (vertices + 1): where a vertex's entries begin
  const int32_t* pixel;       // of an entry, counted over all images
  const T* pixel_weight;      // of an entry
  const int32_t* image_start; // (images + 1): where an image's vertices begin
  const int32_t* image_piece; // (images + 1): where an image's pieces of STEP vertices begin
  const int32_t* chain_start; // (V, pieces) + 1: where the chains begin whose heads lie in a piece
  const int32_t* chain;       // vertices that follow each other in one direction; the last of each chain as ~vertex
  int64_t images, pixels, V;

  explicit Lattice(at::TensorList parts)
      : vertex(parts[0].const_data_ptr<int32_t>()), weight(parts[1].const_data_ptr<T>()),
        start(parts[2].const_data_ptr<int32_t>()), pixel(parts[3].const_data_ptr<int32_t>()),
        pixel_weight(parts[4].const_data_ptr<T>()), image_start(parts[5].const_data_ptr<int32_t>()),
        image_piece(parts[6].const_data_ptr<int32_t>()), chain_start(parts[7].const_data_ptr<int32_t>()),
        chain(parts[8].const_data_ptr<int32_t>()), images(parts[0].size(0)), pixels(parts[0].size(1)),
        V(parts[0].size(2)) {}

  static constexpr int PARTS = 9;

  // The image of the lattice that image n of the values uses: one lattice may serve all.
  int64_t image_of(int64_t n) const { return images == 1 ? 0 : n; }
  int64_t vertices(int64_t image) const { return image_start[image + 1] - image_start[image]; }
};

inline int64_t pieces(int64_t count, int64_t size) { return (count + size - 1) / size; }

// body(0), ..., body(count - 1). Every thread takes its own share first, the same in every phase, so that it finds in its
// processor's cache what it wrote before; then what is left of the others'.
template <class F>
void parallel(int64_t count, const F& body) {
  struct alignas(64) Share { // a line of memory each
    std::atomic<int64_t> next;
    int64_t end;
  };
  const int64_t threads = std::min<int64_t>(count, at::get_num_threads());
  std::vector<Share> shares(threads);
  for (int64_t t = 0; t < threads; ++t) {
    shares[t].next = t * count / threads;
    shares[t].end = (t + 1) * count / threads;
  }
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t other = 0; other < threads; ++other) {
        Share& share = shares[(t + other) % threads];
        for (int64_t i; (i = share.next++) < share.end;) body(i);
      }
    }
  });
}

// body(begin, end) for the pieces of 0 .. count - 1.
template <class F>
void parallel_pieces(int64_t count, const F& body) {
  parallel(pieces(count, STEP), [&](int64_t i) { body(i * STEP, std::min((i + 1) * STEP, count)); });
}

} // namespace bilateralfilter
