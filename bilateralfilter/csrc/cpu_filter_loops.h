// The inner loops of cpu_filter.cpp, included by instruction_sets.h. Rows hold `width` channels, a multiple of WIDTH.

#include "cpu_vectors.h"

// C channels of a row, as many as stay in registers.
template <class T, int C>
struct Segment {
  typedef typename Vector<T>::type Pack;
  static constexpr int N = C * sizeof(T) / BYTES;
  static Pack* at(T* row) { return reinterpret_cast<Pack*>(row); }
  static const Pack* at(const T* row) { return reinterpret_cast<const Pack*>(row); }

  // to = scale * the sum of weight[i] * row(i), i = begin .. end - 1; add: added to what is there.
  template <class F>
  static void gather(int64_t begin, int64_t end, const T* weight, const F& row, T scale, bool add, T* to) {
    Pack sum[N] = {};
    for (int64_t i = begin; i < end; ++i) {
      const Pack* x = at(row(i));
      for (int k = 0; k < N; ++k) sum[k] += weight[i] * x[k];
    }
    for (int k = 0; k < N; ++k) at(to)[k] = add ? at(to)[k] + scale * sum[k] : scale * sum[k];
  }

  // Two neighbours at once, which share most of their windows: to0, to1 = the sums over a window of side * side pixels,
  // whose first pixel of the first neighbour is `corner`; `step` lies between pixels, `stride` between rows of them.
  static void sum_windows(const T* weight0, const T* weight1, int64_t side, const T* corner, int64_t step,
                          int64_t stride, T* to0, T* to1) {
    Pack sum0[N] = {}, sum1[N] = {};
    for (int64_t y = 0; y < side; ++y, weight0 += side, weight1 += side, corner += stride) {
      for (int k = 0; k < N; ++k) sum0[k] += weight0[0] * at(corner)[k];
      for (int64_t x = 1; x < side; ++x) {
        const Pack* values = at(corner + x * step);
        for (int k = 0; k < N; ++k) {
          const Pack value = values[k];
          sum0[k] += weight0[x] * value;
          sum1[k] += weight1[x - 1] * value;
        }
      }
      for (int k = 0; k < N; ++k) sum1[k] += weight1[side - 1] * at(corner + side * step)[k];
    }
    for (int k = 0; k < N; ++k) at(to0)[k] = sum0[k];
    for (int k = 0; k < N; ++k) at(to1)[k] = sum1[k];
  }

  // One chain, in place: what a vertex was is kept until the next one has used it.
  template <class F>
  static void blur(const int32_t* chain, const F& row) {
    Pack before[N] = {}, here[N], next[N];
    for (int k = 0; k < N; ++k) here[k] = at(row(chain[0]))[k];
    for (;; ++chain) {
      Pack* to = at(row(chain[0]));
      if (chain[0] < 0) { // the last
        for (int k = 0; k < N; ++k) to[k] = here[k] + T(0.5) * before[k];
        return;
      }
      for (int k = 0; k < N; ++k) next[k] = at(row(chain[1]))[k];
      for (int k = 0; k < N; ++k) {
        to[k] = here[k] + T(0.5) * (before[k] + next[k]);
        before[k] = here[k];
        here[k] = next[k];
      }
    }
  }
};

// Asks for all of a row, to read or to write it.
template <int WRITE, class T>
inline __attribute__((always_inline)) void fetch(const T* row, int64_t width) {
  for (int64_t k = 0; k < width; k += 64 / sizeof(T)) __builtin_prefetch(row + k, WRITE);
}

// body(segment, first channel) for segments that make up `width` channels.
template <class T, class F>
inline __attribute__((always_inline)) void segments(int64_t width, const F& body) {
  int64_t k = 0;
  for (; k + 32 <= width; k += 32) body(Segment<T, 32>(), k);
  if (width - k == 24) body(Segment<T, 24>(), k);
  if (width - k == 16) body(Segment<T, 16>(), k);
  if (width - k == 8) body(Segment<T, 8>(), k);
}

// Vertices [begin, end) of an image gather from their pixels. in: the image's first pixel; `stride`: to the next.
template <class T>
void splat(const Lattice<T>& lattice, int64_t image, int64_t begin, int64_t end, int64_t width, const T* in,
           int64_t stride, T* rows) {
  const int32_t *start = lattice.start + lattice.image_start[image], *pixel = lattice.pixel;
  const int64_t first = image * lattice.pixels, last = int64_t(start[end]) - 1;
  const bool far = lattice.pixels * stride > FAR;
  for (int64_t v = begin; v < end; ++v) {
    for (int64_t i = start[v]; i < start[v + 1] && far; ++i) {
      fetch<0>(in + (pixel[std::min(i + AHEAD, last)] - first) * stride, width);
    }
    segments<T>(width, [&](auto segment, int64_t k) {
      auto row = [=](int64_t i) { return in + (pixel[i] - first) * stride + k; };
      segment.gather(start[v], start[v + 1], lattice.pixel_weight, row, T(1), false, rows + v * width + k);
    });
  }
}

template <class T>
void blur(const Lattice<T>& lattice, int64_t image, const int32_t* chain, const int32_t* end, int64_t width, T* rows) {
  const int64_t first = lattice.image_start[image];
  const bool far = lattice.vertices(image) * width > FAR;
  while (chain < end) {
    segments<T>(width, [&](auto segment, int64_t k) {
      segment.blur(chain, [=](int32_t v) { return rows + ((v < 0 ? ~v : v) - first) * width + k; });
    });
    while (*chain++ >= 0) {
      if (far && chain + AHEAD < end) {
        const int32_t v = chain[AHEAD];
        fetch<1>(rows + ((v < 0 ? ~v : v) - first) * width, width);
      }
    }
  }
}

// out = or += what pixel p of the image gathers from its vertices.
template <class T>
inline __attribute__((always_inline)) void slice_pixel(const Lattice<T>& lattice, int64_t image, int64_t p,
                                                       int64_t width, const T* rows, T* out, bool add) {
  const int64_t V = lattice.V, first = lattice.image_start[image], entry = (image * lattice.pixels + p) * V;
  const T scale = alpha<T>(V);
  if (p + 4 < lattice.pixels && lattice.vertices(image) * width > FAR) {
    for (int64_t e = entry + 4 * V; e < entry + 5 * V; ++e) {
      fetch<0>(rows + (lattice.vertex[e] - first) * width, width);
    }
  }
  segments<T>(width, [&](auto segment, int64_t k) {
    auto row = [=, &lattice](int64_t e) { return rows + (lattice.vertex[e] - first) * width + k; };
    segment.gather(entry, entry + V, lattice.weight, row, scale, add, out + k);
  });
}

template <class T>
void slice(const Lattice<T>& lattice, int64_t image, int64_t begin, int64_t end, int64_t width, const T* rows, T* out,
           int64_t stride, bool add) {
  for (int64_t p = begin; p < end; ++p) slice_pixel(lattice, image, p, width, rows, out + p * stride, add);
}

// to = what the stencil gives pixels [begin, end) of an image.
inline void apply_stencil(const MeanField& field, int64_t begin, int64_t end, const float* q, float* to) {
  const int64_t width = field.width, side = field.side, reach = side / 2, window = side * side;
  const int64_t farthest = reach * field.image_width + reach;
  for (int64_t p = begin; p < end; ++p) {
    const float *weight = field.stencil + p * window, *here = q + p * width;
    float* row = to + p * width;
    if (p >= farthest && p + 1 < end && p + 1 + farthest < field.pixels) {
      segments<float>(width, [&](auto segment, int64_t k) {
        segment.sum_windows(weight, weight + window, side, here - farthest * width + k, width,
                            field.image_width * width, row + k, row + width + k);
      });
      ++p;
      continue;
    }
    segments<float>(width, [&](auto segment, int64_t k) { // pixels that are not there have weight 0: any other will do
      segment.gather(0, window, weight, [&](int64_t i) {
        const int64_t other = p + (i / side - reach) * field.image_width + i % side - reach;
        return q + std::clamp<int64_t>(other, 0, field.pixels - 1) * width + k;
      }, 1.0f, false, row + k);
    });
  }
}

// One mean-field update of pixels [begin, end) of an image: to = softmax(u + what the lattices' rows and the stencil make
// of q); first: of u alone. u, q, to: of the image's first pixel.
inline void update(const MeanField& field, int64_t image, bool first, int64_t begin, int64_t end, const float* u,
                   const float* q, float* to) {
  typedef typename Vector<float>::type Pack;
  constexpr int64_t LANES = BYTES / sizeof(float);
  const int64_t width = field.width, packs = width / LANES;
  if (field.side > 0 && !first) {
    apply_stencil(field, begin, end, q, to);
  } else {
    std::fill(to + begin * width, to + end * width, 0.0f);
  }
  for (int64_t p = begin; p < end; ++p) {
    float* row = to + p * width;
    for (size_t l = 0; l < field.lattices.size() && !first; ++l) {
      const Lattice<float>& lattice = field.lattices[l];
      slice_pixel(lattice, lattice.image_of(image), p, width, field.rows[l], row, true);
    }
    Pack *pack = reinterpret_cast<Pack*>(row), sums = {};
    const Pack* own = reinterpret_cast<const Pack*>(u + p * width);
    for (int64_t i = 0; i < packs; ++i) sums += pack[i];
    Pack most = pack[0] + own[0];
    for (int64_t i = 0; i < packs; ++i) {
      pack[i] += own[i];
      most = pack[i] > most ? pack[i] : most;
    }
    float top = most[0], given = sums[0];
    for (int64_t k = 1; k < LANES; ++k) {
      top = std::max(top, most[k]);
      given += sums[k];
    }
    float last = 0; // of the class that has no channel
    if (field.total != nullptr) {
      last = field.last_u[p] + (first ? 0.0f : (field.total[p] - given) / field.copies);
      top = std::max(top, last);
      last = std::exp(last - top);
    }
    sums = Pack{};
    for (int64_t i = 0; i < packs; ++i) sums += pack[i] = exp_pack(pack[i] - top);
    float sum = field.total != nullptr ? field.copies * last : (field.copies - 1) * row[field.classes - 1];
    for (int64_t k = 0; k < LANES; ++k) sum += sums[k];
    const float scale = 1 / sum;
    for (int64_t i = 0; i < packs; ++i) pack[i] *= scale;
    if (field.total != nullptr) field.last_q[p] = last * scale;
  }
}
