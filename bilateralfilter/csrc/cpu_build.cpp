// Building the lattice on the CPU.

#include "cpu.h"

#include <array>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

namespace bilateralfilter {
namespace {

#define INNER_LOOPS "cpu_build_loops.h"
#include "instruction_sets.h"

constexpr int64_t CHUNK = 4096; // pixels whose keys are numbered together first
constexpr int PARTS = 64;       // of an image's hash table, by the upper bits of the hash
constexpr int AHEAD = 8;        // vertices whose neighbours' slots are fetched before the first is looked at

// Memory that nothing has written yet: the threads that fill it are the first to touch it.
template <class T>
std::unique_ptr<T[]> uninitialised(int64_t count) {
  return std::unique_ptr<T[]>(new T[count]);
}

// values[i] becomes the sum of values[0 .. i-1]; returns the sum of all.
int32_t exclusive_sum(int32_t* values, int64_t count) {
  int32_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += std::exchange(values[i], sum);
  return sum;
}

int part_of(uint64_t hash) { return static_cast<int>(hash >> 58); }

// Numbers the keys of one chunk in the order they come in. Small, so that all of it stays close to the processor.
template <int D>
class ChunkTable {
 public:
  std::vector<Key<D>> keys; // by number

  int32_t find_or_add(const Key<D>& key, uint64_t hash) {
    size_t s = hash & (slots_.size() - 1);
    while (slots_[s] != 0) {
      if (keys[slots_[s] - 1] == key) return slots_[s] - 1;
      s = (s + 1) & (slots_.size() - 1);
    }
    keys.push_back(key);
    slots_[s] = static_cast<uint16_t>(keys.size());
    if (8 * keys.size() > slots_.size()) grow();
    return static_cast<int32_t>(keys.size()) - 1;
  }

  void clear() {
    keys.clear();
    std::fill(slots_.begin(), slots_.end(), 0);
  }

 private:
  void grow() {
    slots_.assign(2 * slots_.size(), 0);
    for (size_t number = 0; number < keys.size(); ++number) {
      size_t s = keys[number].hash() & (slots_.size() - 1);
      while (slots_[s] != 0) s = (s + 1) & (slots_.size() - 1);
      slots_[s] = static_cast<uint16_t>(number + 1);
    }
  }

  std::vector<uint16_t> slots_ = std::vector<uint16_t>(8192, 0);
};

// Numbers keys in the order they come in. Open addressing, never more than half full.
template <int D>
class Table {
 public:
  std::vector<Key<D>> keys; // by number

  // The key's number, or -1.
  int32_t find(const Key<D>& key, uint64_t hash) const { return static_cast<int32_t>(slots_[slot(key, hash)]) - 1; }

  void prefetch(uint64_t hash) const { __builtin_prefetch(&slots_[hash & (slots_.size() - 1)]); }

  int32_t find_or_add(const Key<D>& key, uint64_t hash) {
    const size_t s = slot(key, hash);
    if (slots_[s] != 0) return static_cast<int32_t>(slots_[s]) - 1;
    keys.push_back(key);
    slots_[s] = tag(hash) | keys.size();
    if (2 * keys.size() > slots_.size()) grow();
    return static_cast<int32_t>(keys.size()) - 1;
  }

 private:
  // A slot: 0 where free, else the hash's upper half and the number + 1.
  static uint64_t tag(uint64_t hash) { return hash & 0xFFFFFFFF00000000ull; }

  // Where the key is, or the free slot where it belongs.
  size_t slot(const Key<D>& key, uint64_t hash) const {
    const size_t mask = slots_.size() - 1;
    size_t s = hash & mask;
    for (uint64_t slot; (slot = slots_[s]) != 0; s = (s + 1) & mask) {
      if (tag(slot) == tag(hash) && keys[static_cast<uint32_t>(slot) - 1] == key) break;
    }
    return s;
  }

  void grow() {
    slots_.assign(2 * slots_.size(), 0);
    const size_t mask = slots_.size() - 1;
    for (size_t number = 0; number < keys.size(); ++number) {
      const uint64_t hash = keys[number].hash();
      size_t s = hash & mask;
      while (slots_[s] != 0) s = (s + 1) & mask;
      slots_[s] = tag(hash) | (number + 1);
    }
  }

  std::vector<uint64_t> slots_ = std::vector<uint64_t>(64, 0);
};

// The lattice of a batch, built phase by phase. Pixels are counted over all images; an entry is one of a pixel's V
// vertices. Keys are numbered in chunks of pixels, each by one thread, before the chunks' keys are brought together.
template <class T, int D>
class Builder {
 public:
  explicit Builder(const at::Tensor& features)
      : options_(features.options()), images_(features.size(0)), pixels_(features.size(1)),
        image_chunks_(pieces(pixels_, CHUNK)), chunks_(images_ * image_chunks_), parts_(images_ * PARTS),
        vertex_of_(ints({images_, pixels_, V})), weight_of_(at::empty({images_, pixels_, V}, options_)),
        vertex_(vertex_of_.mutable_data_ptr<int32_t>()), weight_(weight_of_.mutable_data_ptr<T>()) {
    number_in_chunks(features.const_data_ptr<T>());
    sort_into_parts();
    number_in_parts();
    number_vertices();
    list_entries();
    find_neighbours();
    link_chains();
  }

  std::vector<at::Tensor> result() {
    at::Tensor image_start = ints({images_ + 1}), image_piece = ints({images_ + 1});
    std::copy(image_start_.begin(), image_start_.end(), image_start.mutable_data_ptr<int32_t>());
    std::copy(image_piece_.begin(), image_piece_.end(), image_piece.mutable_data_ptr<int32_t>());
    return {vertex_of_, weight_of_, start_of_, pixel_of_, pixel_weight_of_, image_start, image_piece, chain_start_of_,
            chain_of_};
  }

 private:
  static constexpr int V = D + 1;

  struct Chunk {
    std::vector<Key<D>> keys;   // the different ones, by first appearance
    std::vector<int32_t> count; // entries of each
  };
  struct Item { // a key of a chunk
    Key<D> key;
    int32_t at, count; // at: counted over all chunks
  };
  struct Piece { // vertices of one image that a thread takes at once
    int64_t image, begin, end;
  };

  at::Tensor ints(at::IntArrayRef size) const { return at::empty(size, options_.dtype(at::kInt)); }

  // The pixels of a chunk, which belongs to one image.
  std::array<int64_t, 2> pixels_of(int64_t chunk) const {
    const int64_t image = chunk / image_chunks_, begin = image * pixels_ + chunk % image_chunks_ * CHUNK;
    return {begin, std::min(begin + CHUNK, (image + 1) * pixels_)};
  }

  // Every pixel's simplex; `vertex_` holds numbers within chunks.
  void number_in_chunks(const T* features) {
    chunk_.resize(chunks_);
    std::atomic<bool> fit{true};
    const Frame<T, D> frame;
    const auto find_simplices = have_wide() ? wide::all_simplices<T, D> : baseline::all_simplices<T, D>;
    parallel(chunks_, [&](int64_t c) {
      thread_local ChunkTable<D> of_thread;
      thread_local std::vector<Key<D>> keys_of_thread(CHUNK * V);
      ChunkTable<D>& table = of_thread;
      Key<D>* const keys = keys_of_thread.data();
      table.clear();
      const auto [begin, end] = pixels_of(c);
      if (!find_simplices(features + begin * D, end - begin, frame, keys, weight_ + begin * V)) fit = false;
      int32_t* const number = vertex_ + begin * V;
      const int64_t entries = (end - begin) * V;
      for (int64_t e = 0; e < entries; ++e) number[e] = table.find_or_add(keys[e], keys[e].hash());
      std::vector<int32_t> count(table.keys.size(), 0);
      for (int64_t e = 0; e < entries; ++e) ++count[number[e]];
      chunk_[c] = {table.keys, std::move(count)};
    });
    TORCH_CHECK_VALUE(fit, "bilateralfilter: features are not finite, or too large: sigmas too small for this image");
  }

  // All chunks' keys in the order (image, part of the table, chunk).
  void sort_into_parts() {
    chunk_start_.resize(chunks_ + 1, 0);
    for (int64_t c = 0; c < chunks_; ++c) chunk_start_[c] = chunk_[c].keys.size();
    const int32_t total = exclusive_sum(chunk_start_.data(), chunks_ + 1);
    std::vector<int32_t> place(chunks_ * PARTS, 0);
    parallel(chunks_, [&](int64_t c) {
      for (const Key<D>& key : chunk_[c].keys) ++place[c * PARTS + part_of(key.hash())];
    });
    part_start_.resize(parts_ + 1);
    int32_t sum = 0;
    for (int64_t q = 0; q < parts_; ++q) {
      part_start_[q] = sum;
      for (int64_t c = q / PARTS * image_chunks_; c < (q / PARTS + 1) * image_chunks_; ++c) {
        sum += std::exchange(place[c * PARTS + q % PARTS], sum);
      }
    }
    part_start_[parts_] = sum;
    items_ = uninitialised<Item>(total);
    parallel(chunks_, [&](int64_t c) {
      const Chunk& chunk = chunk_[c];
      for (size_t i = 0; i < chunk.keys.size(); ++i) {
        Item& item = items_[place[c * PARTS + part_of(chunk.keys[i].hash())]++];
        item = {chunk.keys[i], static_cast<int32_t>(chunk_start_[c] + i), chunk.count[i]};
      }
    });
  }

  // Each part numbers its keys; `number_` holds the part's numbers of the chunks' keys.
  void number_in_parts() {
    tables_.resize(parts_);
    part_count_.resize(parts_);
    part_number_.resize(parts_);
    number_ = uninitialised<int32_t>(chunk_start_[chunks_]);
    is_first_.resize(chunk_start_[chunks_], 0);
    parallel(parts_, [&](int64_t q) {
      for (int32_t i = part_start_[q]; i < part_start_[q + 1]; ++i) {
        const Item& item = items_[i];
        const int32_t number = tables_[q].find_or_add(item.key, item.key.hash());
        if (tables_[q].keys.size() > part_count_[q].size()) {
          part_count_[q].push_back(0);
          part_number_[q].push_back(item.at);
          is_first_[item.at] = 1;
        }
        part_count_[q][number] += item.count;
        number_[item.at] = number;
      }
    });
  }

  // Over all parts vertices are numbered by first appearance: those that pixels touch together lie together.
  void number_vertices() {
    std::vector<int32_t> firsts(chunks_ + 1, 0);
    parallel(chunks_, [&](int64_t c) {
      firsts[c] = std::count(is_first_.begin() + chunk_start_[c], is_first_.begin() + chunk_start_[c + 1], 1);
    });
    vertices_ = exclusive_sum(firsts.data(), chunks_ + 1);
    for (int64_t n = 0; n <= images_; ++n) image_start_.push_back(firsts[n * image_chunks_]);
    key_ = uninitialised<Key<D>>(vertices_);
    const auto vertex_of_first = uninitialised<int32_t>(chunk_start_[chunks_]);
    parallel(chunks_, [&](int64_t c) {
      int32_t vertex = firsts[c];
      for (int32_t i = chunk_start_[c]; i < chunk_start_[c + 1]; ++i) {
        if (!is_first_[i]) continue;
        key_[vertex] = chunk_[c].keys[i - chunk_start_[c]];
        vertex_of_first[i] = vertex++;
      }
    });
    start_of_ = at::zeros({vertices_ + 1}, options_.dtype(at::kInt));
    int32_t* start = start_of_.mutable_data_ptr<int32_t>();
    parallel(parts_, [&](int64_t q) {
      for (size_t i = 0; i < part_number_[q].size(); ++i) {
        part_number_[q][i] = vertex_of_first[part_number_[q][i]];
        start[part_number_[q][i]] = part_count_[q][i];
      }
    });
    exclusive_sum(start, vertices_ + 1);
  }

  // Every vertex's entries in the order of the pixels: where those of each chunk begin, then the entries.
  void list_entries() {
    const int32_t* start = start_of_.const_data_ptr<int32_t>();
    const auto next = uninitialised<int32_t>(chunk_start_[chunks_]);
    parallel(parts_, [&](int64_t q) {
      for (size_t i = 0; i < part_number_[q].size(); ++i) part_count_[q][i] = start[part_number_[q][i]];
      for (int32_t i = part_start_[q]; i < part_start_[q + 1]; ++i) {
        int32_t& number = number_[items_[i].at];
        next[items_[i].at] = part_count_[q][number];
        part_count_[q][number] += items_[i].count;
        number = part_number_[q][number];
      }
    });
    pixel_of_ = ints({images_ * pixels_ * V});
    pixel_weight_of_ = at::empty({images_ * pixels_ * V}, options_);
    int32_t* pixel = pixel_of_.mutable_data_ptr<int32_t>();
    T* pixel_weight = pixel_weight_of_.mutable_data_ptr<T>();
    parallel(chunks_, [&](int64_t c) {
      const auto [begin, end] = pixels_of(c);
      int32_t *const place = next.get() + chunk_start_[c], *const of_pixel = vertex_;
      const int32_t* const number = number_.get() + chunk_start_[c];
      const T* const weight = weight_;
      for (int64_t p = begin; p < end; ++p) {
        for (int64_t e = p * V; e < (p + 1) * V; ++e) {
          const int32_t key = of_pixel[e], at = place[key]++;
          pixel[at] = static_cast<int32_t>(p);
          pixel_weight[at] = weight[e];
          of_pixel[e] = number[key];
        }
      }
    });
    items_.reset();
    number_.reset();
    chunk_.clear();
  }

  // The next vertex of each in every direction, or -1.
  void find_neighbours() {
    for (int64_t n = 0; n < images_; ++n) {
      image_piece_.push_back(static_cast<int32_t>(pieces_.size()));
      for (int64_t v = image_start_[n]; v < image_start_[n + 1]; v += STEP) {
        pieces_.push_back({n, v, std::min<int64_t>(v + STEP, image_start_[n + 1])});
      }
    }
    image_piece_.push_back(static_cast<int32_t>(pieces_.size()));
    after_ = uninitialised<int32_t>(V * vertices_);
    has_before_.resize(V * vertices_, 0);
    parallel(pieces_.size(), [&](int64_t i) {
      const auto [image, begin, end] = pieces_[i];
      Key<D> keys[AHEAD * V];
      uint64_t hashes[AHEAD * V];
      for (int64_t v = begin; v < end; v += AHEAD) {
        const int count = static_cast<int>(std::min<int64_t>(AHEAD, end - v)) * V;
        for (int j = 0; j < count; ++j) {
          keys[j] = key_[v + j / V].after(j % V);
          hashes[j] = keys[j].hash();
          tables_[image * PARTS + part_of(hashes[j])].prefetch(hashes[j]);
        }
        for (int j = 0; j < count; ++j) {
          const int64_t q = image * PARTS + part_of(hashes[j]);
          const int32_t number = tables_[q].find(keys[j], hashes[j]);
          const int32_t next = number < 0 ? -1 : part_number_[q][number];
          after_[j % V * vertices_ + v + j / V] = next;
          if (next >= 0) has_before_[j % V * vertices_ + next] = 1;
        }
      }
    });
  }

  // Neighbours are kept as chains: the runs of two or more vertices in each direction, the last one as ~vertex. Vertices
  // alone in their row stand in none; the blur leaves them as they are.
  void link_chains() {
    const int64_t count = pieces_.size();
    std::vector<std::vector<int32_t>> chains(V * count); // by direction and by the piece of the chain's head
    parallel(V * count, [&](int64_t i) {
      const int64_t first = i / count * vertices_;
      for (int64_t v = pieces_[i % count].begin; v < pieces_[i % count].end; ++v) {
        if (has_before_[first + v] || after_[first + v] < 0) continue;
        for (int32_t u = static_cast<int32_t>(v); u >= 0; u = after_[first + u]) {
          chains[i].push_back(after_[first + u] < 0 ? ~u : u);
        }
      }
    });
    chain_start_of_ = at::zeros({V * count + 1}, options_.dtype(at::kInt));
    int32_t* start = chain_start_of_.mutable_data_ptr<int32_t>();
    for (int64_t i = 0; i < V * count; ++i) start[i] = static_cast<int32_t>(chains[i].size());
    chain_of_ = ints({exclusive_sum(start, V * count + 1)});
    int32_t* chain = chain_of_.mutable_data_ptr<int32_t>();
    parallel(V * count, [&](int64_t i) { std::copy(chains[i].begin(), chains[i].end(), chain + start[i]); });
  }

  const at::TensorOptions options_;
  const int64_t images_, pixels_, image_chunks_, chunks_, parts_;
  int64_t vertices_ = 0;

  // the result
  at::Tensor vertex_of_, weight_of_, start_of_, pixel_of_, pixel_weight_of_, chain_start_of_, chain_of_;
  std::vector<int32_t> image_start_, image_piece_;
  int32_t* const vertex_;
  T* const weight_;

  // on the way there
  std::vector<Chunk> chunk_;
  std::vector<int32_t> chunk_start_; // of a chunk's keys among those of all chunks
  std::unique_ptr<Item[]> items_;    // all chunks' keys, by part
  std::vector<int32_t> part_start_;  // of a part among the items
  std::vector<Table<D>> tables_;     // of every part
  std::vector<std::vector<int32_t>> part_count_, part_number_; // of a part's keys: entries; the key's place, then vertex
  std::unique_ptr<int32_t[]> number_; // of the chunks' keys: in their part, then the vertex
  std::vector<uint8_t> is_first_;     // of the chunks' keys: whether no earlier chunk has the key
  std::unique_ptr<Key<D>[]> key_;     // of every vertex
  std::vector<Piece> pieces_;
  std::unique_ptr<int32_t[]> after_;  // (V, vertices)
  std::vector<uint8_t> has_before_;   // (V, vertices)
};

template <class T>
std::vector<at::Tensor> build_of(const at::Tensor& features) {
  switch (features.size(2)) {
    case 1: return Builder<T, 1>(features).result();
    case 2: return Builder<T, 2>(features).result();
    case 3: return Builder<T, 3>(features).result();
    case 4: return Builder<T, 4>(features).result();
    case 5: return Builder<T, 5>(features).result();
    case 6: return Builder<T, 6>(features).result();
    case 7: return Builder<T, 7>(features).result();
    default: return Builder<T, 8>(features).result();
  }
}

std::vector<at::Tensor> build(const at::Tensor& features, const std::optional<at::Tensor>& /*valid: for GPUs*/) {
  const at::Tensor dense = features.contiguous();
  return dense.scalar_type() == at::kDouble ? build_of<double>(dense) : build_of<float>(dense);
}

} // namespace

TORCH_LIBRARY_IMPL(bilateralfilter, CPU, library) { library.impl("build", &build); }

} // namespace bilateralfilter
