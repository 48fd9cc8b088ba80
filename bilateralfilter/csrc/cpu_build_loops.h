// The inner loop of cpu_build.cpp, included by instruction_sets.h.

// The simplices of `count` features in a row: keys and weights of D + 1 vertices for each. False: one does not fit.
template <class T, int D>
bool all_simplices(const T* features, int64_t count, const Frame<T, D>& frame, Key<D>* keys, T* weights) {
  constexpr int V = D + 1, W = 8;
  bool fit = true;
  Key<D> some[V][W];
  T padded[W * D] = {}, more[W * V];
  for (int64_t p = 0; p < count; p += W) {
    const int64_t here = std::min<int64_t>(W, count - p);
    if (here == W) {
      fit &= simplices<T, D, W>(features + p * D, frame, some, weights + p * V);
    } else {
      std::copy_n(features + p * D, here * D, padded);
      fit &= simplices<T, D, W>(padded, frame, some, more);
      std::copy_n(more, here * V, weights + p * V);
    }
    for (int64_t w = 0; w < here; ++w) {
      for (int k = 0; k < V; ++k) keys[(p + w) * V + k] = some[k][w];
    }
  }
  return fit;
}
