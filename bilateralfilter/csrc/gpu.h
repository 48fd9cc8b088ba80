// The lattice on a GPU, written for any Device that runs a body for many indices at once. cuda.cu gives it a GPU; a test
// gives it CPU threads, so that all of this is run where there is no GPU.
//
// A Device has
//   run(n, body): body(i) for i = 0 .. n - 1 in any order; n a number, or the product of a number and a count that lies
//     on the device, where only it is known: nothing here waits for the device
//   static compare_and_swap(address, expected, desired) -> what was there; static smaller(address, value): min, in place
//
// The numbers of the vertices, their entries and every sum follow the order of the pixels, so that results do not
// depend on the order in which bodies run.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "lattice.h"

#ifdef __CUDACC__
#define BODY __device__
#else
#define BODY
#endif

namespace bilateralfilter::gpu {

constexpr int32_t NONE = -1;

constexpr int64_t SEGMENT = 256;            // entries that a thread adds up at most, before it adds up such sums
constexpr int64_t BUFFER = int64_t(1) << 25; // bytes of a filter's buffers, each of two: bounds how much is done at once

// How far a loop goes: (*end - *begin) * factor, with numbers that lie on the device.
struct Count {
  const int32_t *begin, *end;
  int64_t factor;
};

// The hash table of all images' keys. A slot holds one of the entries that have its key, or NONE.
template <int D>
struct Slots {
  int32_t* slots;
  uint64_t mask;
  const Key<D>* keys;    // of the entries
  int64_t image_entries; // an image's

  SHARED uint64_t home(const Key<D>& key, int64_t image) const {
    return ((key.hash() >> 20) ^ static_cast<uint64_t>(image) * 0x9E3779B97F4A7C15ull) & mask;
  }
  SHARED bool holds(int32_t entry, const Key<D>& key, int64_t image) const {
    return keys[entry] == key && entry / image_entries == image;
  }
};

// Parts: vertex (N, P, V), weight (N, P, V); start (E + 1), pixel (E), pixel_weight (E): every vertex's entries;
// neighbours (V, 2, E): the vertices before and after; image_start (N + 1): where an image's vertices begin, of which
// E = N * P * V is the most, then for every SEGMENT of entries whether all are of one vertex.
// taking_part: (N, P), or nullptr; other pixels have no entries, and vertex NONE.
template <class Device, class T, int D>
std::vector<at::Tensor> build(const Device& device, const at::Tensor& features, const bool* taking_part) {
  constexpr int V = D + 1;
  const int64_t images = features.size(0), pixels = features.size(1), entries = images * pixels * V;
  const auto ints = features.options().dtype(at::kInt);
  at::Tensor vertex_of = at::empty({images, pixels, V}, ints), weight_of = at::empty({images, pixels, V}, features.options());
  at::Tensor start_of = at::zeros({entries + 1}, ints), pixel_of = at::empty({entries}, ints);
  at::Tensor pixel_weight_of = at::empty({entries}, features.options());
  at::Tensor neighbours_of = at::full({V, 2, entries}, NONE, ints);
  at::Tensor image_start_of = at::zeros({images + 1 + entries / SEGMENT}, ints);
  if (entries == 0) return {vertex_of, weight_of, start_of, pixel_of, pixel_weight_of, neighbours_of, image_start_of};
  int32_t* vertex = vertex_of.mutable_data_ptr<int32_t>();
  T* weight = weight_of.mutable_data_ptr<T>();

  // 1. Every pixel's simplex. Where a feature does not fit, NaN weights tell everything it touches.
  static_assert(sizeof(Key<D>) == 2 * sizeof(int64_t));
  at::Tensor keys_of = at::empty({entries, 2}, features.options().dtype(at::kLong));
  auto* keys = reinterpret_cast<Key<D>*>(keys_of.mutable_data_ptr<int64_t>());
  const T* feature = features.const_data_ptr<T>();
  const Frame<T, D> frame;
  device.run(images * pixels, [=] BODY(int64_t p) {
    if (simplices<T, D, 1>(feature + p * D, frame, keys + p * V, weight + p * V)) return;
    for (int k = 0; k < V; ++k) weight[p * V + k] = static_cast<T>(NAN);
  });

  // 2. Every entry finds its slot in the table; `first` of a slot: the first of its entries.
  int64_t size = 64;
  while (size < std::min(2 * entries, int64_t(1) << 31)) size *= 2; // slots have 31 bits, too
  at::Tensor slots_of = at::full({size}, NONE, ints), first_of = at::full({size}, INT32_MAX, ints);
  int32_t* first = first_of.mutable_data_ptr<int32_t>();
  const Slots<D> table{slots_of.mutable_data_ptr<int32_t>(), static_cast<uint64_t>(size) - 1, keys, pixels * V};
  device.run(entries, [=] BODY(int64_t e) {
    vertex[e] = NONE;
    if (taking_part != nullptr && !taking_part[e / V]) return;
    const Key<D> key = keys[e];
    const int64_t image = e / table.image_entries;
    for (uint64_t s = table.home(key, image);; s = (s + 1) & table.mask) {
      int32_t held = table.slots[s];
      if (held == NONE) held = Device::compare_and_swap(table.slots + s, NONE, static_cast<int32_t>(e));
      if (held != NONE && !table.holds(held, key, image)) continue;
      if (first[s] > e) Device::smaller(first + s, static_cast<int32_t>(e));
      vertex[e] = static_cast<int32_t>(s);
      return;
    }
  });

  // 3. Vertices are numbered by first appearance; `first` of a slot becomes its vertex.
  at::Tensor is_first = at::empty({entries}, ints);
  int32_t* flags = is_first.mutable_data_ptr<int32_t>();
  device.run(entries, [=] BODY(int64_t e) { flags[e] = vertex[e] != NONE && first[vertex[e]] == e; });
  at::Tensor number_of = at::cumsum(is_first, 0, at::kInt);
  const int32_t* number = number_of.const_data_ptr<int32_t>();
  at::Tensor example_of = at::empty({entries}, ints); // of every vertex: its first entry
  int32_t *example = example_of.mutable_data_ptr<int32_t>(), *image_start = image_start_of.mutable_data_ptr<int32_t>();
  device.run(entries, [=] BODY(int64_t e) {
    if (flags[e]) example[number[e] - 1] = static_cast<int32_t>(e);
    if ((e + 1) % table.image_entries == 0) image_start[(e + 1) / table.image_entries] = number[e];
  });
  device.run(Count{image_start, image_start + images, 1}, [=] BODY(int64_t v) {
    // the slot of vertex v; its `first` is no longer needed as an entry
    first[vertex[example[v]]] = static_cast<int32_t>(v);
  });
  device.run(entries, [=] BODY(int64_t e) {
    if (vertex[e] != NONE) vertex[e] = first[vertex[e]];
  });

  // 4. Every vertex's entries in the order of the pixels.
  const auto [sorted_of, order_of] = at::sort(vertex_of.flatten(), /*stable=*/true, /*dim=*/0, /*descending=*/false);
  const int32_t* sorted = sorted_of.template const_data_ptr<int32_t>();
  const int64_t* order = order_of.template const_data_ptr<int64_t>();
  int32_t *start = start_of.mutable_data_ptr<int32_t>(), *pixel = pixel_of.mutable_data_ptr<int32_t>();
  T* pixel_weight = pixel_weight_of.mutable_data_ptr<T>();
  int32_t* whole = image_start + images + 1;
  device.run(entries, [=] BODY(int64_t i) {
    pixel[i] = static_cast<int32_t>(order[i] / V);
    pixel_weight[i] = weight[order[i]];
    if ((i + 1) % SEGMENT == 0) whole[i / SEGMENT] = sorted[i] == sorted[i + 1 - SEGMENT];
    if (sorted[i] == NONE) return;
    if (i == 0 || sorted[i] != sorted[i - 1]) start[sorted[i]] = static_cast<int32_t>(i);
    if (i == entries - 1) start[sorted[i] + 1] = static_cast<int32_t>(entries);
  });

  // 5. Neighbours. Each pair is found once, from the vertex before.
  int32_t* neighbours = neighbours_of.mutable_data_ptr<int32_t>();
  device.run(Count{image_start, image_start + images, V}, [=] BODY(int64_t i) {
    const int64_t v = i / V, axis = i % V, image = example[v] / table.image_entries;
    const Key<D> key = keys[example[v]].after(static_cast<int>(axis));
    for (uint64_t s = table.home(key, image); table.slots[s] != NONE; s = (s + 1) & table.mask) {
      if (!table.holds(table.slots[s], key, image)) continue;
      neighbours[(2 * axis + 1) * entries + v] = first[s];
      neighbours[2 * axis * entries + first[s]] = static_cast<int32_t>(v);
      return;
    }
  });
  return {vertex_of, weight_of, start_of, pixel_of, pixel_weight_of, neighbours_of, image_start_of};
}

// The sum of a channel over entries [begin, end).
template <class T>
struct Entries {
  const int32_t* pixel;
  const T *weight, *in;
  int64_t channels;

  SHARED T operator()(int64_t begin, int64_t end, int64_t c) const {
    T sum = 0;
    for (int64_t e = begin; e < end; ++e) sum += weight[e] * in[pixel[e] * channels + c];
    return sum;
  }
};

// values (N, P, K) contiguous; out += or = their filter. As many images and channels at once as BUFFER holds.
template <class Device, class T>
void filter(const Device& device, const at::Tensor& values, at::TensorList lattice, bool transposed, at::Tensor& out,
            bool add) {
  const int64_t images = values.size(0), pixels = values.size(1), channels = values.size(2), V = lattice[0].size(2);
  const int32_t* vertex = lattice[0].const_data_ptr<int32_t>();
  const T* weight = lattice[1].const_data_ptr<T>();
  const int32_t *start = lattice[2].const_data_ptr<int32_t>(), *pixel = lattice[3].const_data_ptr<int32_t>();
  const T* pixel_weight = lattice[4].const_data_ptr<T>();
  const int32_t *neighbours = lattice[5].const_data_ptr<int32_t>(), *image_start = lattice[6].const_data_ptr<int32_t>();
  const int32_t* whole = image_start + images + 1;
  const int64_t bound = pixels * V, entries = images * bound; // of an image's vertices, of all images'
  const int64_t bytes = bound * static_cast<int64_t>(sizeof(T)), narrowest = 8;
  const int64_t widest = std::min(channels, std::clamp<int64_t>(BUFFER / bytes, narrowest, 32));
  const int64_t at_once = std::clamp<int64_t>(BUFFER / (bytes * widest), 1, images);
  at::Tensor rows_of = at::empty({at_once * bound, widest}, values.options()), blurred_of = at::empty_like(rows_of);
  at::Tensor sums_of = at::empty({at_once * bound / SEGMENT + 2, widest}, values.options());
  T* sums = sums_of.mutable_data_ptr<T>();
  const T* in = values.const_data_ptr<T>();
  T* to = out.mutable_data_ptr<T>();
  const T scale = alpha<T>(V);
  for (int64_t n = 0; n < images; n += at_once) {
    const int64_t last = std::min(n + at_once, images);
    const int32_t* first = image_start + n; // of the vertices; rows are those of the vertices from there on
    for (int64_t k = 0; k < channels; k += widest) {
      const int64_t width = std::min(widest, channels - k);
      const Count all{first, image_start + last, width};
      T *rows = rows_of.mutable_data_ptr<T>(), *blurred = blurred_of.mutable_data_ptr<T>();
      const Entries<T> sum_of{pixel, pixel_weight, in + k, channels};
      device.run((at_once * bound / SEGMENT + 2) * width, [=] BODY(int64_t i) {
        const int64_t segment = start[*first] / SEGMENT + i / width;
        if (segment >= entries / SEGMENT || !whole[segment]) return;
        sums[i] = sum_of(segment * SEGMENT, (segment + 1) * SEGMENT, i % width);
      });
      device.run(all, [=] BODY(int64_t i) {
        const int64_t v = *first + i / width, c = i % width, begin = start[v], end = start[v + 1];
        const int64_t from = (begin + SEGMENT - 1) / SEGMENT, until = end / SEGMENT;
        T sum = sum_of(begin, from < until ? from * SEGMENT : end, c);
        for (int64_t s = from; s < until; ++s) sum += sums[(s - start[*first] / SEGMENT) * width + c];
        rows[i] = from < until ? sum + sum_of(until * SEGMENT, end, c) : sum;
      });
      for (int64_t axis = 0; axis < V; ++axis) {
        const int32_t* before = neighbours + 2 * (transposed ? V - 1 - axis : axis) * entries;
        const int32_t* after = before + entries;
        device.run(all, [=] BODY(int64_t i) {
          const int64_t v = *first + i / width, c = i % width;
          const T left = before[v] == NONE ? T(0) : rows[(before[v] - *first) * width + c];
          const T right = after[v] == NONE ? T(0) : rows[(after[v] - *first) * width + c];
          blurred[i] = rows[i] + T(0.5) * (left + right);
        });
        std::swap(rows, blurred);
      }
      device.run((last - n) * pixels * width, [=] BODY(int64_t i) {
        const int64_t p = n * pixels + i / width, c = i % width;
        T sum = 0;
        for (int64_t e = p * V; e < (p + 1) * V && vertex[e] != NONE; ++e) {
          sum += weight[e] * rows[(vertex[e] - *first) * width + c];
        }
        T& place = to[p * channels + k + c];
        place = add ? place + scale * sum : scale * sum;
      });
    }
  }
}

template <class Device>
std::vector<at::Tensor> build(const at::Tensor& features, const std::optional<at::Tensor>& valid) {
  const at::Tensor dense = features.contiguous(), some = valid ? valid->contiguous() : at::Tensor();
  const bool* taking_part = valid ? some.const_data_ptr<bool>() : nullptr;
  const Device device;
#define CASE(D) \
  case D: return dense.scalar_type() == at::kDouble ? build<Device, double, D>(device, dense, taking_part) \
                                                    : build<Device, float, D>(device, dense, taking_part);
  switch (features.size(2)) {
    CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7)
    default: CASE(8)
  }
#undef CASE
}

template <class Device>
void add_(at::Tensor& out, const at::Tensor& values, at::TensorList lattice, bool transposed, bool add) {
  if (values.numel() == 0) return;
  const int64_t images = values.size(0), pixels = values.size(1), channels = values.size(2);
  if (lattice[0].size(0) == 1 && images > 1) { // one lattice for all: images become channels
    at::Tensor together = values.permute({1, 0, 2}).reshape({1, pixels, images * channels});
    at::Tensor filtered = at::empty_like(together);
    add_<Device>(filtered, together, lattice, transposed, false);
    filtered = filtered.view({pixels, images, channels}).permute({1, 0, 2});
    add ? out.add_(filtered) : out.copy_(filtered);
    return;
  }
  const Device device;
  const at::Tensor in = values.contiguous();
  at::Tensor dense = add || out.is_contiguous() ? out.contiguous() : at::empty_like(in);
  if (values.scalar_type() == at::kDouble) {
    filter<Device, double>(device, in, lattice, transposed, dense, add);
  } else {
    filter<Device, float>(device, in, lattice, transposed, dense, add);
  }
  if (!out.is_contiguous()) out.copy_(dense);
}

} // namespace bilateralfilter::gpu
