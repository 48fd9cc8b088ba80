// The inner loops of par.cpp, included by instruction_sets.h: rows of pixels, vectors of them first, then single ones.

#include "cpu_vectors.h"

inline __attribute__((always_inline)) Vector<float>::type exponential(Vector<float>::type x) { return exp_pack(x); }
inline __attribute__((always_inline)) Vector<double>::type exponential(Vector<double>::type x) {
  for (size_t i = 0; i < BYTES / sizeof(double); ++i) x[i] = std::exp(x[i]);
  return x;
}
template <class Pack>
inline __attribute__((always_inline)) Pack root(Pack x) {
  for (size_t i = 0; i < sizeof(x) / sizeof(x[0]); ++i) x[i] = std::sqrt(x[i]);
  return x;
}

#include "par_bodies.h"

template <class T, class F>
inline __attribute__((always_inline)) void along_row(int64_t width, const F& body) {
  typedef typename Vector<T>::type Pack;
  constexpr int64_t LANES = BYTES / sizeof(T);
  int64_t x = 0;
  for (; x + LANES <= width; x += LANES) body(Pack{}, x);
  for (; x < width; ++x) body(T{}, x);
}

// row: of the padded image; steps: to the n neighbours; to: the row of the first affinity, `plane` before the next.
template <class T>
void affinity_row(const T* row, int64_t channels, int64_t channel_stride, int64_t width, int n, const int64_t* steps,
                  const T* position, T colour_width, T* to, int64_t plane) {
  const auto offset = [=](int k) { return steps[k]; };
  along_row<T>(width, [=](auto pack, int64_t x) {
    constexpr int64_t LANES = sizeof(pack) / sizeof(T);
    T work[MOST_NEIGHBOURS * LANES];
    affinities<decltype(pack)>(row + x, channels, channel_stride, n, offset, position, colour_width, work, LANES, to + x,
                               plane);
  });
}

template <class T>
void refine_row(const T* row, int64_t channels, int64_t channel_stride, int64_t width, int n, const int64_t* steps,
                const T* affinity, int64_t plane, T* to, int64_t to_stride) {
  const auto offset = [=](int k) { return steps[k]; };
  groups(channels, [=](auto C, int64_t c) {
    along_row<T>(width, [=](auto pack, int64_t x) {
      refined<C.value, decltype(pack)>(affinity + x, plane, n, offset, row + c * channel_stride + x, channel_stride,
                                       to + c * to_stride + x, to_stride);
    });
  });
}
