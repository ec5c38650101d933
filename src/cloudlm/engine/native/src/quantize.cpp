// Weights become 4-bit codes: for each group of inputs the scale, of a few, that loses least. The
// same as packing.quantize_int4, to the bit: what is compared are whole numbers, summed exactly.
#include "kernels.h"
#include "simd.h"

namespace {

typedef uint8_t u8x16 __attribute__((vector_size(16)));

// A group's scales, in 64ths of the one that the value of largest magnitude asks for, and how fine a
// code is divided to compare them: those of packing.py.
constexpr int SHARES[] = {64, 67, 61, 58, 55, 52, 49};
constexpr float PARTS = 256;
constexpr int MOST_GROUP = 4096;

INLINE i32x16 clamp(i32x16 v, int low, int high) {
  v = v < low ? splat(low) : v;
  return v > high ? splat(high) : v;
}
// The codes of what is `parts` 256ths of a code away from code 8.
INLINE i32x16 codes_of(i32x16 parts) { return clamp((parts + (8 * 256 + 128)) >> 8, 0, 15); }

// x: a group, padded with zeros. The answer is its scale; `inverse` is what makes parts of a value.
float best_scale(const float* x, int count, float* inverse) {
  f32x16 low = {}, high = {}, poison = {};
  for (int i = 0; i < count; i += LANES) {
    const f32x16 v = load<f32x16>(x + i);
    high = larger(high, v);
    low = larger(low, -v);
    poison += v * 0.0f;  // NaN and infinities must not turn into numbers
  }
  const float bottom = largest(low), top = largest(high);
  const float most = (bottom > top ? -bottom : top) + sum(poison);
  float best = 0, least = 0;
  for (const int share : SHARES) {
    const float scale = to_half_and_back(most * (float(share) / -512));
    const float factor = PARTS / (scale != 0 ? scale : 1.0f);
    i32x16 total = {};
    for (int i = 0; i < count; i += LANES) {
      const i32x16 parts = nearest(load<f32x16>(x + i) * factor);
      const i32x16 miss = parts + 8 * 256 - (codes_of(parts) << 8);
      total += miss * miss;
    }
    int64_t whole = 0;
    for (int i = 0; i < LANES; i++) whole += total[i];
    const float lost = float(whole) * scale * scale;
    if (share == SHARES[0] || lost < least) {
      least = lost;
      best = scale;
      *inverse = factor;
    }
  }
  return best;
}

}  // namespace

bool can_quantize_int4(int group) { return group > 0 && group <= MOST_GROUP && group % LANES == 0; }

void quantize_int4(Team& team, const uint16_t* weights, int rows, int columns, int group,
                   uint8_t* codes, float* scales) {
  const int groups = (columns + group - 1) / group;
  alignas(64) float x[MOST_GROUP];
  for (int row; (row = team.claim()) < rows;)
    for (int g = 0; g < groups; g++) {
      const int begin = g * group, left = columns - begin < group ? columns - begin : group;
      const size_t at = size_t(row) * columns + begin;
      for (int i = 0; i < group; i += LANES) {
        u16x16 v = {};
        if (i < left) memcpy(&v, weights + at + i, (left - i < LANES ? left - i : LANES) * 2);
        store(x + i, widen(v));
      }
      float inverse;
      scales[size_t(row) * groups + g] = best_scale(x, group, &inverse);
      for (int i = 0; i < left; i += LANES) {
        const i32x16 parts = nearest(load<f32x16>(x + i) * inverse);
        const u8x16 found = __builtin_convertvector(codes_of(parts), u8x16);
        memcpy(codes + at + i, &found, left - i < LANES ? left - i : LANES);
      }
    }
  team.meet();
}
