// Vectors of BYTES bytes, included by the loops that instruction_sets.h includes.

template <class T>
struct Vector {
  typedef T type __attribute__((vector_size(BYTES), aligned(sizeof(T)), may_alias));
};

// exp for x <= 0, relative error below 3e-7; 0 below -87.
inline __attribute__((always_inline)) typename Vector<float>::type exp_pack(typename Vector<float>::type x) {
  typedef typename Vector<float>::type Pack;
  typedef int32_t Ints __attribute__((vector_size(BYTES)));
  const Pack least = Pack{} - 87.0f, bounded = x < least ? least : x;
  const Ints n = __builtin_convertvector(bounded * 1.44269504f - 0.5f, Ints); // towards 0: the nearest, for x <= 0
  const Pack whole = __builtin_convertvector(n, Pack);
  const Pack r = (bounded - whole * 0.693359375f) + whole * 2.12194440e-4f; // |r| <= ln 2 / 2
  Pack y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  const Ints power = (n + 127) << 23;
  return x < least ? Pack{} : y * reinterpret_cast<const Pack&>(power);
}
