// The permutohedral lattice: what the CPU and the GPU share.
//
// A. Adams, J. Baek, M. A. Davis: Fast High-Dimensional Filtering Using the Permutohedral Lattice, Eurographics 2010.
// Section numbers are the paper's. D features a pixel are lifted to D + 1 coordinates that sum to 0. Splat: a pixel
// spreads its values over the D + 1 vertices of the simplex it lies in. Blur: [1/2 1 1/2] along each of the D + 1
// lattice directions. Slice: every pixel gathers them again.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define SHARED __host__ __device__ __forceinline__
#else
#define SHARED [[gnu::always_inline]] inline // into code for other instruction sets too
#endif

namespace bilateralfilter {

constexpr int MAX_DIMENSIONS = 8;

// A vertex of the lattice. Of its D + 1 coordinates, which sum to 0, the first D are packed into two words, so that
// steps on the lattice are additions of packed steps.
template <int D>
struct Key {
  static constexpr int HALF = (D + 1) / 2; // coordinates in the first word
  static constexpr int BITS = 64 / HALF < 31 ? 64 / HALF : 31;
  static constexpr int LIMIT = 1 << (BITS - 1); // of a coordinate's absolute value

  uint64_t a, b;

  // `step` in coordinate i alone; in the last, which is not packed, nothing.
  SHARED static Key unit(int i, int64_t step) {
    const uint64_t word = i < D ? static_cast<uint64_t>(step) << (BITS * (i % HALF)) : 0;
    return i < HALF ? Key{word, 0} : Key{0, word};
  }
  // The same step in all coordinates.
  SHARED static Key all(int64_t step) {
    Key key{0, 0};
    for (int i = 0; i < D; ++i) key = key + unit(i, step);
    return key;
  }
  SHARED static Key origin() { return all(LIMIT); }

  // The next vertex in direction `axis`: D in that coordinate, -1 in all others.
  SHARED Key after(int axis) const { return *this + all(-1) + unit(axis, D + 1); }

  SHARED Key operator+(const Key& step) const { return {a + step.a, b + step.b}; }
  SHARED bool operator==(const Key& other) const { return a == other.a && b == other.b; }

  SHARED uint64_t hash() const {
    uint64_t h = a * 0x9E3779B97F4A7C15ull ^ (b + 0x7F4A7C15ull) * 0xC2B2AE3D27D4EB4Full;
    h ^= h >> 32;
    return h * 0x9E3779B97F4A7C15ull;
  }
};

// What the geometry of all simplices has in common.
template <class T, int D>
struct Frame {
  T scale[D];          // of the features: with them splat, blur and slice together have variance 1 (section 3.1)
  Key<D> step[D + 1];  // from one vertex of a simplex to the next: 1 in all coordinates, 1 - V in one

  Frame() {
    const double deviation = std::sqrt(2.0 / 3.0) * (D + 1);
    for (int i = 0; i < D; ++i) scale[i] = static_cast<T>(deviation / std::sqrt((i + 1.0) * (i + 2.0)));
    for (int i = 0; i <= D; ++i) step[i] = Key<D>::all(1) + Key<D>::unit(i, -(D + 1));
  }
};

// What the blur gives too much at a vertex's own place, V = D + 1 blurs together.
template <class T>
SHARED T alpha(int64_t v) { return T(1) / (T(1) + T(2) / (T(1) * (int64_t(1) << v))); }

// The D + 1 vertices around each of W features and their barycentric weights, which sum to 1 (section 3.2).
// features: W times D values; keys, weights: W times D + 1.
// False where a feature is not finite or too large to be numbered: it counts as 0 then.
template <class T, int D, int W>
SHARED bool simplices(const T* features, const Frame<T, D>& frame, Key<D>* keys, T* weights) {
  constexpr int V = D + 1;
  T lifted[V][W], rest[V][W];
  int nearest[V][W], rank[V][W], excess[W];
  bool fits = true;
  for (int w = 0; w < W; ++w) {
    T sum = 0;
    for (int i = D; i > 0; --i) {
      const T c = features[w * D + i - 1] * frame.scale[i - 1];
      lifted[i][w] = sum - i * c;
      sum += c;
    }
    lifted[0][w] = sum;
    excess[w] = 0;
  }
  // Numbers that Key can hold, and of which T still tells fractions well.
  constexpr T most = static_cast<T>(sizeof(T) == 4 && Key<D>::LIMIT > (1 << 20) ? 1 << 20 : Key<D>::LIMIT - 3 * V);
  T fit[W];
  for (int w = 0; w < W; ++w) fit[w] = 1;
  for (int i = 0; i < V; ++i) {
    for (int w = 0; w < W; ++w) fit[w] = lifted[i][w] < most && lifted[i][w] > -most ? fit[w] : T(0);
  }
  for (int w = 0; w < W; ++w) fits &= fit[w] == 1;
  for (int i = 0; i < V; ++i) {
    for (int w = 0; w < W; ++w) lifted[i][w] = fit[w] == 1 ? lifted[i][w] : T(0);
  }

  // The nearest point whose coordinates are all multiples of V; moved, by rank of the rests, until they sum to 0.
  for (int i = 0; i < V; ++i) {
    for (int w = 0; w < W; ++w) {
      const T up = lifted[i][w] * (T(1) / V);
      const int rounded = static_cast<int>(up + (up < 0 ? T(-0.5) : T(0.5)));
      nearest[i][w] = rounded * V;
      rest[i][w] = lifted[i][w] - nearest[i][w];
      excess[w] += rounded;
      rank[i][w] = 0;
    }
  }
  for (int i = 0; i < D; ++i) {
    for (int j = i + 1; j < V; ++j) {
      for (int w = 0; w < W; ++w) {
        const int less = rest[i][w] < rest[j][w];
        rank[i][w] += less;
        rank[j][w] += 1 - less;
      }
    }
  }
  for (int i = 0; i < V; ++i) {
    for (int w = 0; w < W; ++w) {
      int r = rank[i][w] + excess[w];
      const int shift = r < 0 ? V : r > D ? -V : 0;
      rank[i][w] = r + shift;
      nearest[i][w] += shift;
      rest[i][w] = (lifted[i][w] - nearest[i][w]) * (T(1) / V);
    }
  }

  // In the order of the ranks, weights are differences of neighbours, and vertex k is one step from vertex k - 1.
  for (int w = 0; w < W; ++w) {
    int at[V];
    for (int i = 0; i < V; ++i) at[rank[i][w]] = i;
    Key<D> key = Key<D>::origin();
    for (int i = 0; i < D; ++i) key = key + Key<D>::unit(i, nearest[i][w]);
    keys[w * V] = key;
    weights[w * V] = T(1) + rest[at[D]][w] - rest[at[0]][w];
    for (int k = 1; k < V; ++k) {
      key = key + frame.step[at[V - k]];
      keys[w * V + k] = key;
      weights[w * V + k] = rest[at[D - k]][w] - rest[at[V - k]][w];
    }
  }
  return fits;
}

} // namespace bilateralfilter
