// Includes INNER_LOOPS once for every instruction set: namespace baseline for all processors, namespace wide for those
// that have_wide(). BYTES: the size of a vector there.

namespace baseline {
constexpr int BYTES = 16;
#include INNER_LOOPS
} // namespace baseline

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace wide {
constexpr int BYTES = 32;
#include INNER_LOOPS
} // namespace wide
#pragma GCC pop_options
inline bool have_wide() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#else
namespace wide = baseline;
inline bool have_wide() { return false; }
#endif
