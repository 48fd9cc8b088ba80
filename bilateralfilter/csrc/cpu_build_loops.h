// The inner loop of cpu_build.cpp, included by instruction_sets.h.

// The simplices of `count` features in a row: keys and weights of D + 1 vertices for each. False: one does not fit.
template <class T, int D>
bool all_simplices(const T* features, int64_t count, const Frame<T, D>& frame, Key<D>* keys, T* weights) {
  constexpr int V = D + 1, W = 8;
  bool fit = true;
  int64_t p = 0;
  for (; p + W <= count; p += W) fit &= simplices<T, D, W>(features + p * D, frame, keys + p * V, weights + p * V);
  if (p < count) {
    T padded[W * D] = {}, more[W * V];
    Key<D> some[W * V];
    std::copy_n(features + p * D, (count - p) * D, padded);
    fit &= simplices<T, D, W>(padded, frame, some, more);
    std::copy_n(some, (count - p) * V, keys + p * V);
    std::copy_n(more, (count - p) * V, weights + p * V);
  }
  return fit;
}
