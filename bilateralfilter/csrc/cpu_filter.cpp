// Applying the lattice on the CPU.

#include "cpu.h"

#include <sys/mman.h>

#include <algorithm>
#include <limits>
#include <vector>

namespace bilateralfilter {
namespace {

constexpr int64_t WIDTH = 8;   // channels are handled in multiples of this ...
constexpr int64_t WIDEST = 96; // ... and at most this many at once, which bounds the memory
constexpr int64_t AHEAD = 12;  // rows that are fetched before they are needed ...
constexpr int64_t FAR = 1 << 21; // ... where all rows together have more values than stay close to the processor

// What a mean-field update needs besides the values.
struct MeanField {
  std::vector<Lattice<float>> lattices;
  std::vector<float*> rows; // of every lattice
  const float* stencil;     // (pixels, side, side): weights of the pixels around, 0 where there is none
  int64_t side, image_width, pixels, width, classes;
  float copies;
  // Where one class more than a multiple of WIDTH would cost another WIDTH channels, the last has none: probabilities
  // sum to 1, so what it gets is the rest of `total`, what pixels get of a value that is 1 everywhere; else nullptr.
  const float *total, *last_u;
  float* last_q;
};

#define INNER_LOOPS "cpu_filter_loops.h"
#include "instruction_sets.h"

int64_t padded(int64_t channels) { return pieces(channels, WIDTH) * WIDTH; }

// rows (vertices of the image, width) = the blurred splat. in: the image's first pixel, `stride` before the next.
template <class T>
void splat_and_blur(const Lattice<T>& lattice, int64_t image, bool transposed, int64_t width, const T* in,
                    int64_t stride, T* rows) {
  const auto splat = have_wide() ? wide::splat<T> : baseline::splat<T>;
  const auto blur = have_wide() ? wide::blur<T> : baseline::blur<T>;
  parallel_pieces(lattice.vertices(image), [&](int64_t begin, int64_t end) {
    splat(lattice, image, begin, end, width, in, stride, rows);
  });
  const int64_t first = lattice.image_piece[image], all = lattice.image_piece[lattice.images];
  for (int64_t i = 0; i < lattice.V; ++i) {
    const int32_t* start = lattice.chain_start + (transposed ? lattice.V - 1 - i : i) * all + first;
    parallel(lattice.image_piece[image + 1] - first, [&](int64_t c) {
      blur(lattice, image, lattice.chain + start[c], lattice.chain + start[c + 1], width, rows);
    });
  }
}

// Fresh memory of many pages costs more time in page faults than in use; larger pages make fewer of them.
at::Tensor large(at::Tensor tensor) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t PAGE = 1 << 21;
  const auto begin = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
  const uintptr_t first = (begin + PAGE - 1) / PAGE * PAGE, last = (begin + tensor.nbytes()) / PAGE * PAGE;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return tensor;
}

// (pixels, channels) of any strides -> rows of `width` values, `filler` after the channels. In squares, so that of planes
// every line of memory is read at once.
template <class T>
void pack(const T* from, int64_t pixel_stride, int64_t channel_stride, int64_t pixels, int64_t channels, int64_t width,
          T filler, T* rows) {
  parallel_pieces(pixels, [&](int64_t begin, int64_t end) {
    for (int64_t k = 0; k < width; k += WIDTH) {
      const int64_t count = std::min(WIDTH, channels - k);
      const T* const first = from + k * channel_stride;
      int64_t p = begin;
      for (; p + WIDTH <= end && count == WIDTH && pixel_stride == 1; p += WIDTH) {
        T square[WIDTH][WIDTH];
        for (int64_t j = 0; j < WIDTH; ++j) std::copy_n(first + j * channel_stride + p, WIDTH, square[j]);
        for (int64_t x = 0; x < WIDTH; ++x) {
          for (int64_t j = 0; j < WIDTH; ++j) rows[(p + x) * width + k + j] = square[j][x];
        }
      }
      for (; p < end; ++p) {
        for (int64_t j = 0; j < WIDTH; ++j) {
          rows[p * width + k + j] = j < count ? first[p * pixel_stride + j * channel_stride] : filler;
        }
      }
    }
  });
}

// The way back, in squares that stay in registers.
template <class T>
void unpack(const T* rows, int64_t width, int64_t pixels, int64_t channels, T* to, int64_t pixel_stride,
            int64_t channel_stride) {
  parallel_pieces(pixels, [&](int64_t begin, int64_t end) {
    for (int64_t k = 0; k < channels; k += WIDTH) {
      int64_t p = begin;
      for (; p + WIDTH <= end && k + WIDTH <= channels && pixel_stride == 1; p += WIDTH) {
        T square[WIDTH][WIDTH];
        for (int64_t x = 0; x < WIDTH; ++x) {
          for (int64_t j = 0; j < WIDTH; ++j) square[j][x] = rows[(p + x) * width + k + j];
        }
        for (int64_t j = 0; j < WIDTH; ++j) std::copy_n(square[j], WIDTH, to + (k + j) * channel_stride + p);
      }
      for (; p < end; ++p) {
        for (int64_t j = k; j < std::min(k + WIDTH, channels); ++j) {
          to[p * pixel_stride + j * channel_stride] = rows[p * width + j];
        }
      }
    }
  });
}

// Rows of channels that can be read and written where they lie.
bool is_rows(const at::Tensor& x) { return x.is_contiguous() && x.size(2) % WIDTH == 0; }

template <class T>
int64_t most_vertices(const Lattice<T>& lattice) {
  int64_t most = 0;
  for (int64_t n = 0; n < lattice.images; ++n) most = std::max(most, lattice.vertices(n));
  return most;
}

// out (images, pixels, channels) = the lattice's filter of `values`; add: added to what is there (rows only).
template <class T>
void filter(const at::Tensor& values, at::TensorList parts, bool transposed, at::Tensor& out, bool add) {
  const Lattice<T> lattice(parts);
  const auto slice = have_wide() ? wide::slice<T> : baseline::slice<T>;
  const int64_t pixels = lattice.pixels, channels = values.size(2), widest = std::min(padded(channels), WIDEST);
  at::Tensor vertex_rows = at::empty({most_vertices(lattice), widest}, values.options());
  T* rows = vertex_rows.mutable_data_ptr<T>();
  const bool in_place = is_rows(values) && is_rows(out);
  at::Tensor pixel_rows = large(at::empty({in_place ? 0 : pixels, widest}, values.options()));
  T* buffer = pixel_rows.mutable_data_ptr<T>();
  for (int64_t n = 0; n < values.size(0); ++n) {
    const int64_t image = lattice.image_of(n);
    for (int64_t k = 0; k < channels; k += widest) {
      const int64_t some = std::min(widest, channels - k), width = padded(some);
      const T* in = values.const_data_ptr<T>() + n * values.stride(0) + k * values.stride(2);
      T* to = out.mutable_data_ptr<T>() + n * out.stride(0) + k * out.stride(2);
      if (!in_place) pack(in, values.stride(1), values.stride(2), pixels, some, width, T(0), buffer);
      splat_and_blur(lattice, image, transposed, width, in_place ? in : buffer, in_place ? channels : width, rows);
      parallel_pieces(pixels, [&](int64_t begin, int64_t end) {
        slice(lattice, image, begin, end, width, rows, in_place ? to : buffer, in_place ? channels : width, add);
      });
      if (!in_place) unpack(buffer, width, pixels, some, to, out.stride(1), out.stride(2));
    }
  }
}

void filter_any(const at::Tensor& values, at::TensorList lattice, bool transposed, at::Tensor& out, bool add) {
  TORCH_CHECK_VALUE(
      values.dim() == 3 && out.sizes() == values.sizes() && values.size(1) == lattice[0].size(1) &&
          (lattice[0].size(0) == 1 || lattice[0].size(0) == values.size(0)),
      "bilateralfilter: values ", values.sizes(), " and out ", out.sizes(), " do not fit the lattice ", lattice[0].sizes());
  TORCH_CHECK_VALUE(
      values.scalar_type() == lattice[1].scalar_type() && out.scalar_type() == values.scalar_type(),
      "bilateralfilter: values, out and lattice must have one type");
  if (values.numel() == 0) return;
  if (values.scalar_type() == at::kDouble) {
    filter<double>(values, lattice, transposed, out, add);
  } else {
    filter<float>(values, lattice, transposed, out, add);
  }
}

at::Tensor apply(const at::Tensor& values, at::TensorList lattice, bool transposed) {
  at::Tensor out = large(at::empty_like(values));
  filter_any(values, lattice, transposed, out, false);
  return out;
}

void add_(at::Tensor& out, const at::Tensor& values, at::TensorList lattice) {
  TORCH_CHECK_VALUE(is_rows(values) && is_rows(out),
                    "bilateralfilter: add_ takes contiguous tensors with channels a multiple of ", WIDTH);
  filter_any(values, lattice, false, out, true);
}

// What the pixels of image n get of a value that is 1 everywhere.
at::Tensor filter_of_ones(at::TensorList parts, int64_t n) {
  at::Tensor ones = at::ones({parts[0].size(0), parts[0].size(1), 1}, parts[1].options());
  return apply(ones, parts, false)[parts[0].size(0) == 1 ? 0 : n].select(1, 0);
}

// q = softmax(u) with u = log(prob), prob at least `least` and at most 1; then `iterations` times q <- softmax(u + sum of
// the lattices' and the stencil's filters of q). prob -> q: float32 (images, channels, pixels); the last channel stands
// for `copies` equal ones. stencil: (pixels, side, side), weights of the pixels around; side 0: none.
at::Tensor mean_field(const at::Tensor& prob, double least, at::TensorList parts, const at::Tensor& stencil,
                      int64_t image_width, double copies, int64_t iterations) {
  TORCH_CHECK_VALUE(
      prob.dim() == 3 && prob.scalar_type() == at::kFloat && prob.size(1) > 0 && parts.size() % Lattice<float>::PARTS == 0 &&
          stencil.is_contiguous() && stencil.scalar_type() == at::kFloat && stencil.size(0) == prob.size(2) &&
          stencil.size(1) == stencil.size(2) && (stencil.size(1) == 0 || stencil.size(1) % 2 == 1),
      "bilateralfilter: mean_field does not take these tensors");
  const bool rest = prob.size(1) % WIDTH == 1 && prob.size(1) > 1; // the last class has no channel
  const int64_t classes = prob.size(1), pixels = prob.size(2), channels = classes - rest, width = padded(channels);
  at::Tensor total = at::empty({pixels}, prob.options()), last_u = at::empty_like(total);
  MeanField field{{}, {}, stencil.const_data_ptr<float>(), stencil.size(1), image_width, pixels, width, channels,
                  static_cast<float>(copies), rest ? total.const_data_ptr<float>() : nullptr,
                  last_u.const_data_ptr<float>(), nullptr};
  std::vector<at::Tensor> buffers;
  auto buffer = [&](int64_t rows) {
    buffers.push_back(large(at::empty({rows, width}, prob.options())));
    return buffers.back().mutable_data_ptr<float>();
  };
  for (size_t i = 0; i < parts.size(); i += Lattice<float>::PARTS) {
    TORCH_CHECK_VALUE(parts[i].size(1) == pixels && (parts[i].size(0) == 1 || parts[i].size(0) == prob.size(0)),
                      "bilateralfilter: prob ", prob.sizes(), " does not fit the lattice ", parts[i].sizes());
    field.lattices.emplace_back(parts.slice(i, Lattice<float>::PARTS));
    field.rows.push_back(buffer(most_vertices(field.lattices.back())));
  }
  const auto update = have_wide() ? wide::update : baseline::update;
  at::Tensor q = large(at::empty(prob.sizes(), prob.options())), u = large(at::empty({pixels, width}, prob.options()));
  float *start = u.mutable_data_ptr<float>(), *now = buffer(pixels), *next = buffer(pixels);
  for (int64_t n = 0; n < q.size(0); ++n) {
    pack(prob.const_data_ptr<float>() + n * prob.stride(0), prob.stride(2), prob.stride(1), pixels,
         channels, width, 1.0f, start);
    u.clamp_(least, 1).log_();
    u.slice(1, channels).fill_(-std::numeric_limits<float>::infinity());
    if (rest) {
      at::clamp_out(last_u, prob[n][channels], least, 1).log_();
      at::sum_out(total, stencil, {1, 2});
      for (size_t i = 0; i < parts.size(); i += Lattice<float>::PARTS) {
        total += filter_of_ones(parts.slice(i, Lattice<float>::PARTS), n);
      }
      field.last_q = q[n][channels].mutable_data_ptr<float>();
    }
    for (int64_t i = 0; i <= iterations; ++i) {
      for (size_t l = 0; l < field.lattices.size() && i > 0; ++l) {
        splat_and_blur(field.lattices[l], field.lattices[l].image_of(n), false, width, now, width, field.rows[l]);
      }
      parallel_pieces(pixels, [&](int64_t begin, int64_t end) { update(field, n, i == 0, begin, end, start, now, next); });
      std::swap(now, next);
    }
    unpack(now, width, pixels, channels, q.mutable_data_ptr<float>() + n * q.stride(0), q.stride(2), q.stride(1));
  }
  return q;
}

} // namespace

TORCH_LIBRARY_IMPL(bilateralfilter, CPU, library) {
  library.impl("apply", &apply);
  library.impl("add_", &add_);
  library.impl("mean_field", &mean_field);
}

} // namespace bilateralfilter
