// The bilateral filter in five dimensions (x, y, r, g, b) on the permutohedral lattice, formulated plainly, as MoRe's
// release runs it: one thread, one image after the other, and one map after the other on the image's lattice.
// tools/benchmark.py compares bilateralfilter with it; tests take it for an oracle.
//
// A. Adams, J. Baek, M. A. Davis: Fast High-Dimensional Filtering Using the Permutohedral Lattice, Eurographics 2010.
// Section numbers below are the paper's. Splat: every pixel spreads its values over the 6 vertices of the simplex its
// feature lies in. Blur: [1/2 1 1/2] along each of the 6 lattice directions. Slice: every pixel gathers them again.

#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

constexpr int D = 5;         // dimensions of the features
constexpr int V = D + 1;     // vertices of a simplex, and directions of the blur
constexpr int KEY_BITS = 21; // of one vertex coordinate; five fit into a Key
constexpr int KEY_LIMIT = 1 << (KEY_BITS - 1);

// A lattice vertex has six coordinates that sum to 0: five say it all.
struct Key {
  uint64_t low, high;

  explicit Key(const std::array<int, V>& c) {
    auto part = [&](int i) { return static_cast<uint64_t>(c[i] + KEY_LIMIT); };
    low = part(0) | part(1) << KEY_BITS | part(2) << (2 * KEY_BITS);
    high = part(3) | part(4) << KEY_BITS;
  }
  bool operator==(const Key& other) const { return low == other.low && high == other.high; }
  size_t hash() const {
    uint64_t h = low * 0x9E3779B97F4A7C15ull ^ (high + 0x7F4A7C15ull) * 0xC2B2AE3D27D4EB4Full;
    return (h ^ h >> 29) * 0x9E3779B97F4A7C15ull >> 20;
  }
};

// Numbers the vertices in the order they come in. Open addressing, never more than half full.
class VertexTable {
 public:
  VertexTable() : slots_(1 << 12, -1) {}

  int count() const { return static_cast<int>(coordinates_.size()); }
  const std::array<int, V>& coordinates(int vertex) const { return coordinates_[vertex]; }

  int find(const std::array<int, V>& c) const { return slots_[slot(Key(c))]; } // -1: not there

  int find_or_add(const std::array<int, V>& c) {
    const Key key(c);
    size_t s = slot(key);
    if (slots_[s] >= 0) return slots_[s];
    if (2 * keys_.size() >= slots_.size()) {
      grow();
      s = slot(key);
    }
    keys_.push_back(key);
    coordinates_.push_back(c);
    return slots_[s] = count() - 1;
  }

 private:
  // Where the key is, or the free slot where it belongs.
  size_t slot(const Key& key) const {
    const size_t mask = slots_.size() - 1;
    size_t s = key.hash() & mask;
    while (slots_[s] >= 0 && !(keys_[slots_[s]] == key)) s = (s + 1) & mask;
    return s;
  }

  void grow() {
    slots_.assign(2 * slots_.size(), -1);
    for (int i = 0; i < count(); ++i) slots_[slot(keys_[i])] = i;
  }

  std::vector<int> slots_;
  std::vector<Key> keys_;
  std::vector<std::array<int, V>> coordinates_;
};

// The simplex around a feature: its vertices' coordinates and barycentric weights (section 3.2).
struct Simplex {
  std::array<std::array<int, V>, V> vertices;
  std::array<float, V> weights;

  explicit Simplex(const std::array<float, D>& feature) {
    // Onto the hyperplane where coordinates sum to 0. The scale makes splat, blur and slice together have variance 1.
    static const std::array<float, D> scale = [] {
      std::array<float, D> s;
      const float deviation = std::sqrt(2.0 / 3.0) * V;
      for (int i = 0; i < D; ++i) s[i] = 1.0 / std::sqrt((i + 2.0) * (i + 1.0)) * deviation;
      return s;
    }();
    std::array<float, V> elevated;
    float sum = 0;
    for (int i = D; i > 0; --i) {
      const float c = feature[i - 1] * scale[i - 1];
      elevated[i] = sum - i * c;
      sum += c;
    }
    elevated[0] = sum;
    for (const float e : elevated) {
      TORCH_CHECK_VALUE(
          std::abs(e) < KEY_LIMIT - 2 * V, "plain_filter: sigma_rgb or sigma_xy is too small for this image");
    }

    // The nearest vertex whose coordinates are all multiples of V; made to sum to 0 below.
    std::array<int, V> nearest, rank{};
    std::array<float, V> rest;
    int excess = 0;
    for (int i = 0; i < V; ++i) {
      const int rounded = static_cast<int>(std::round(elevated[i] * (1.0f / V)));
      nearest[i] = rounded * V;
      rest[i] = elevated[i] - nearest[i];
      excess += rounded;
    }
    for (int i = 0; i < D; ++i) {
      for (int j = i + 1; j < V; ++j) ++rank[rest[i] < rest[j] ? i : j];
    }
    for (int i = 0; i < V; ++i) {
      rank[i] += excess;
      const int shift = rank[i] < 0 ? V : rank[i] > D ? -V : 0;
      rank[i] += shift;
      nearest[i] += shift;
    }

    std::array<float, V + 1> b{};
    for (int i = 0; i < V; ++i) {
      const float v = (elevated[i] - nearest[i]) * (1.0f / V);
      b[D - rank[i]] += v;
      b[D - rank[i] + 1] -= v;
    }
    b[0] += 1.0f + b[V];
    for (int k = 0; k < V; ++k) {
      weights[k] = b[k];
      for (int i = 0; i < V; ++i) vertices[k][i] = nearest[i] + (rank[i] <= D - k ? k : k - V);
    }
  }
};

// The lattice of one image: it depends on the features alone and filters any number of maps.
class Lattice {
 public:
  // image: (3, height, width) contiguous, 0..255.
  Lattice(const float* image, int height, int width, float sigma_rgb, float sigma_xy)
      : pixels_(static_cast<size_t>(height) * width), vertex_(pixels_ * V), weight_(pixels_ * V) {
    VertexTable table;
    for (size_t p = 0; p < pixels_; ++p) {
      const Simplex simplex({(p % width) / sigma_xy, (p / width) / sigma_xy, image[p] / sigma_rgb,
                             image[p + pixels_] / sigma_rgb, image[p + 2 * pixels_] / sigma_rgb});
      for (int k = 0; k < V; ++k) {
        vertex_[p * V + k] = table.find_or_add(simplex.vertices[k]);
        weight_[p * V + k] = simplex.weights[k];
      }
    }
    vertices_ = table.count();
    neighbours_.resize(static_cast<size_t>(vertices_) * V);
    for (int axis = 0; axis < V; ++axis) {
      for (int v = 0; v < vertices_; ++v) {
        auto before = table.coordinates(v), after = before;
        for (int i = 0; i < V; ++i) {
          before[i] -= i == axis ? -D : 1;
          after[i] += i == axis ? -D : 1;
        }
        neighbours_[static_cast<size_t>(axis) * vertices_ + v] = {table.find(before), table.find(after)};
      }
    }
  }

  // in, out: one value for each pixel.
  void filter(const float* in, float* out) const {
    // The value after the last vertex stays 0: it stands for every neighbour that does not exist.
    std::vector<float> values(vertices_ + 1), blurred(values.size());
    auto place = [this](int vertex) { return vertex < 0 ? vertices_ : vertex; };
    for (size_t p = 0; p < pixels_; ++p) {
      for (size_t s = p * V; s < (p + 1) * V; ++s) values[vertex_[s]] += weight_[s] * in[p];
    }
    for (int axis = 0; axis < V; ++axis) {
      for (int v = 0; v < vertices_; ++v) {
        const auto [before, after] = neighbours_[static_cast<size_t>(axis) * vertices_ + v];
        blurred[v] = values[v] + 0.5f * (values[place(before)] + values[place(after)]);
      }
      values.swap(blurred);
    }
    constexpr float alpha = 1.0f / (1.0f + 1.0f / (1 << D)); // what the blur gives too much at a vertex's own place
    for (size_t p = 0; p < pixels_; ++p) {
      out[p] = 0;
      for (size_t s = p * V; s < (p + 1) * V; ++s) out[p] += values[vertex_[s]] * weight_[s] * alpha;
    }
  }

 private:
  struct Neighbours {
    int before, after;
  };

  size_t pixels_;
  int vertices_ = 0;
  std::vector<int> vertex_;            // (pixels, V)
  std::vector<float> weight_;          // (pixels, V)
  std::vector<Neighbours> neighbours_; // (V, vertices)
};

// images (N, 3, H, W), maps (N, K, H, W), both float32 -> (N, K, H, W) float32.
at::Tensor filter_cpu(const at::Tensor& images, const at::Tensor& maps, double sigma_rgb, double sigma_xy) {
  const int64_t count = maps.size(0), channels = maps.size(1), height = maps.size(2), width = maps.size(3);
  TORCH_CHECK_VALUE(images.sizes() == at::IntArrayRef({count, 3, height, width}), "plain_filter: the sizes differ");
  const at::Tensor colours = images.contiguous(), planes = maps.contiguous();
  const int64_t pixels = height * width;
  at::Tensor out = at::empty_like(planes);
  for (int64_t n = 0; n < count; ++n) {
    const Lattice lattice(colours.const_data_ptr<float>() + n * 3 * pixels, height, width, sigma_rgb, sigma_xy);
    for (int64_t map = n * channels; map < (n + 1) * channels; ++map) {
      lattice.filter(planes.const_data_ptr<float>() + map * pixels, out.mutable_data_ptr<float>() + map * pixels);
    }
  }
  return out;
}

} // namespace

TORCH_LIBRARY(plain_filter, library) {
  library.def("filter(Tensor images, Tensor maps, float sigma_rgb, float sigma_xy) -> Tensor");
}

TORCH_LIBRARY_IMPL(plain_filter, CPU, library) {
  library.impl("filter", &filter_cpu);
}
