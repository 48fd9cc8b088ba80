// Pixel-Adaptive Refinement: what CPU and GPU share, included in their namespaces. A Pack is one pixel on a GPU, a
// vector of pixels of a row on the CPU; `offset(k)` leads from a pixel to its neighbour k.

SHARED float exponential(float x) { return std::exp(x); }
SHARED double exponential(double x) { return std::exp(x); }
SHARED float root(float x) { return std::sqrt(x); }
SHARED double root(double x) { return std::sqrt(x); }

template <class Pack, class T>
SHARED Pack load(const T* from) { return *reinterpret_cast<const Pack*>(from); }
template <class Pack, class T>
SHARED void store(T* to, Pack pack) { *reinterpret_cast<Pack*>(to) = pack; }

// The affinities of the pixels at `here` (channels, channel_stride between them) with n neighbours, which come in rings:
// softmax(-((neighbour - pixel) / deviation / width)^2, mean over channels) + position. To `to`, `stride` between them;
// work: room for n Packs, `work_stride` between them, which may be `to`.
template <class Pack, class T, class F>
SHARED void affinities(const T* here, int64_t channels, int64_t channel_stride, int n, const F& offset,
                       const T* position, T width, T* work, int64_t work_stride, T* to, int64_t stride) {
  for (int64_t c = 0; c < channels; ++c, here += channel_stride) {
    const Pack own = load<Pack>(here);
    Pack mean = {}, square = {};
    for (int k = 0; k < n; k += RING) {
      Pack sum = {};
      for (int j = k; j < k + RING; ++j) sum += load<Pack>(here + offset(j)) - own;
      mean += sum;
    }
    mean = mean / T(n);
    for (int k = 0; k < n; k += RING) {
      Pack sum = {};
      for (int j = k; j < k + RING; ++j) {
        const Pack apart = load<Pack>(here + offset(j)) - own - mean;
        sum += apart * apart;
      }
      square += sum;
    }
    const Pack sharpness = T(1) / (root(square / T(n - 1)) + T(1e-8)) / width;
    for (int k = 0; k < n; ++k) {
      const Pack apart = (load<Pack>(here + offset(k)) - own) * sharpness;
      const Pack sum = c == 0 ? apart * apart : load<Pack>(work + k * work_stride) + apart * apart;
      store(work + k * work_stride, c + 1 == channels ? sum / T(channels) : sum);
    }
  }
  Pack least = load<Pack>(work), sum = {};
  for (int k = 1; k < n; ++k) {
    const Pack other = load<Pack>(work + k * work_stride);
    least = other < least ? other : least;
  }
  for (int k = 0; k < n; ++k) {
    const Pack weight = exponential(least - load<Pack>(work + k * work_stride));
    store(work + k * work_stride, weight);
    sum += weight;
  }
  const Pack scale = T(1) / sum;
  for (int k = 0; k < n; ++k) store(to + k * stride, load<Pack>(work + k * work_stride) * scale + position[k]);
}

// to = the sum of n neighbours of the pixels at `from`, weighted by their affinities, ring by ring; C channels.
template <int C, class Pack, class T, class F>
SHARED void refined(const T* affinity, int64_t plane, int n, const F& offset, const T* from, int64_t from_stride, T* to,
                    int64_t to_stride) {
  Pack sum[C] = {};
  for (int k = 0; k < n; k += RING) {
    Pack ring[C] = {};
    for (int j = k; j < k + RING; ++j) {
      const Pack weight = load<Pack>(affinity + j * plane);
      const T* neighbour = from + offset(j);
      for (int c = 0; c < C; ++c) ring[c] += load<Pack>(neighbour + c * from_stride) * weight;
    }
    for (int c = 0; c < C; ++c) sum[c] += ring[c];
  }
  for (int c = 0; c < C; ++c) store(to + c * to_stride, sum[c]);
}

// body(C, first channel) for groups of as many channels as stay in registers.
template <class F>
inline __attribute__((always_inline)) void groups(int64_t channels, const F& body) {
  int64_t c = 0;
  for (; c + 8 <= channels; c += 8) body(std::integral_constant<int, 8>(), c);
  for (; c + 6 <= channels; c += 6) body(std::integral_constant<int, 6>(), c);
  for (; c + 4 <= channels; c += 4) body(std::integral_constant<int, 4>(), c);
  for (; c + 1 <= channels; c += 1) body(std::integral_constant<int, 1>(), c);
}
