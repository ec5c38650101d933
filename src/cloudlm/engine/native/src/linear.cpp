// Matrix products with packed weights: y[t][n] = sum over k of x[t][k] * W[n][k].
//
// Packing. 32 outputs make a panel, and a panel is one stretch of memory, read once from front to
// back. It is a row of steps; a step has two tiles (outputs 0-15 and 16-31, or 16 gates and their
// 16 ups) in the layout that both AMX and the dot product instructions want: 16 rows of 64 bytes,
// row r holding, output by output, the inputs 2r and 2r+1 (bf16) or 4r .. 4r+3 (int8). A step has
// 32 inputs in bf16, 64 in int8. In int4 a tile has 8 rows of 64 bytes: the low halves of the
// bytes are the int8 tile's rows 0-7, the high halves its rows 8-15; values are 0 to 15.
//
// The inputs x become tiles too: strips of two tiles of 16 rows, a step's two tiles side by side.
// For integer weights x is quantised token by token, to 8 bits (one plane) or to 16 bits as two
// planes, x = scale * (254 * high + low) with both in [-127, 127]. Then the second tile of a strip
// holds the low planes of the tokens whose high planes are in the first. Integer sums are exact, so
// that every path gives the same answer whatever the number of tokens is; in bf16 the paths differ
// in the order of additions, and each alone does not depend on the number of tokens.
#include "kernels.h"
#include "simd.h"

namespace {

constexpr int TILE = 1024, STEP = 2 * TILE, STRIP = 32;
constexpr float PLANE = 254.0f;
constexpr int AHEAD = 4096;  // bytes that weights are prefetched ahead

INLINE int ceil_div(int a, int b) { return (a + b - 1) / b; }
INLINE int step_inputs(int kind) { return kind == BF16 ? 32 : 64; }
INLINE int steps_of(const Linear& w) { return w.k / step_inputs(w.kind); }
INLINE size_t panel_bytes(const Linear& w) {
  return size_t(steps_of(w)) * (w.kind == INT4 ? STEP / 2 : STEP);
}
INLINE int planes_of(const Linear& w) { return w.kind == BF16 ? 1 : w.planes; }
INLINE int tokens_per_strip(const Linear& w) { return STRIP / planes_of(w); }

// ---- inputs ---------------------------------------------------------------------------------

struct Prepared {
  char* tiles;         // [strips][steps][2][16][64 bytes]
  float* scale;        // [tokens]
  int32_t* plane_sum;  // [tokens][2]: sum of each plane over all inputs
  float* group_sum;    // [tokens][groups]: sum of the quantised inputs of each group
};

size_t prepared_bytes(const Linear& w, int tokens, Prepared* into, char* memory) {
  size_t tiles = size_t(ceil_div(tokens, tokens_per_strip(w))) * steps_of(w) * STEP;
  size_t rows = size_t(ceil_div(tokens, STRIP)) * STRIP;
  size_t groups = w.kind == INT4 ? w.k / w.group : 0;
  if (into) {
    into->tiles = memory;
    into->scale = (float*)(memory + tiles);
    into->plane_sum = (int32_t*)(into->scale + rows);
    into->group_sum = (float*)(into->plane_sum + 2 * rows);
  }
  return tiles + rows * (sizeof(float) + 2 * sizeof(int32_t)) + rows * groups * sizeof(float);
}

INLINE f32x16 lanes(const Input& in, int token, int k, int end) {
  size_t at = size_t(token) * in.stride + k;
  if (k + LANES <= end)
    return in.type == TYPE_F32 ? load<f32x16>((const float*)in.rows + at)
                               : widen(load<u16x16>((const bf16*)in.rows + at));
  f32x16 v = {};
  for (int i = 0; k + i < end; i++)
    v[i] = in.type == TYPE_F32 ? ((const float*)in.rows)[at + i] : widen(((const bf16*)in.rows)[at + i]);
  return v;
}

// One token's inputs as float32, normed if asked for, zeros up to k.
void fetch(const Input& in, int token, int k_in, int k, float* to) {
  f32x16 squares = {};
  for (int i = 0; i < k; i += LANES) {
    f32x16 v = i < k_in ? lanes(in, token, i, k_in) : f32x16{};
    squares += v * v;
    store(to + i, v);
  }
  if (!in.norm) return;
  float factor = 1.0f / __builtin_sqrtf(sum(squares) / float(k_in) + in.eps);
  const Input norm = {in.norm, TYPE_F32, 0, nullptr, 0};
  for (int i = 0; i < k_in; i += LANES)
    store(to + i, load<f32x16>(to + i) * factor * lanes(norm, 0, i, k_in));
}

void quantize(const Linear& w, const Prepared& p, int token, const float* x) {
  f32x16 most = {}, poison = {};
  for (int i = 0; i < w.k; i += LANES) {
    f32x16 v = load<f32x16>(x + i);
    most = larger(most, magnitude(v));
    poison += v * 0.0f;  // NaN and infinities must not turn into numbers
  }
  const float levels = w.planes == 2 ? 127 * PLANE + 127 : 127;
  const float top = largest(most);
  p.scale[token] = top / levels + sum(poison);
  const float inverse = top > 0 && top < 3e38f ? levels / top : 0;
  const int steps = steps_of(w), strip = token / tokens_per_strip(w), row = token % tokens_per_strip(w);
  int8_t* to = (int8_t*)p.tiles + size_t(strip) * steps * STEP + row / 16 * TILE + row % 16 * 64;
  i32x16 sum_high = {}, sum_low = {};
  f32x16 group_sum = {};
  for (int i = 0; i < w.k; i += LANES) {
    i32x16 q = to_int(load<f32x16>(x + i) * inverse), low = {};
    int8_t* at = to + size_t(i / 64) * STEP + i % 64;
    if (w.planes == 2) {
      i32x16 high = to_int(to_float(q) * (1 / PLANE));
      low = q - high * int(PLANE);
      store(at, __builtin_convertvector(high, i8x16));
      store(at + TILE, __builtin_convertvector(low, i8x16));
      sum_high += high;
      sum_low += low;
    } else {
      store(at, __builtin_convertvector(q, i8x16));
      sum_high += q;
    }
    if (w.kind == INT4) {
      group_sum += to_float(q);
      if ((i + LANES) % w.group == 0) {
        p.group_sum[size_t(token) * (w.k / w.group) + i / w.group] = sum(group_sum);
        group_sum = f32x16{};
      }
    }
  }
  int32_t high = 0, low = 0;
  for (int i = 0; i < LANES; i++) high += sum_high[i], low += sum_low[i];
  p.plane_sum[2 * token] = high;
  p.plane_sum[2 * token + 1] = low;
}

void prepare(const Linear& w, const Input& in, const Prepared& p, int token, float* x) {
  fetch(in, token, w.k_in, w.k, x);
  if (w.kind != BF16) return quantize(w, p, token, x);
  char* to = p.tiles + size_t(token / STRIP) * steps_of(w) * STEP + token % STRIP * 64;
  for (int i = 0; i < w.k; i += LANES)
    store(to + size_t(i / 32) * STEP + i % 32 * 2, narrow(load<f32x16>(x + i)));
}

// ---- sums of products: C[row][32] of a few tokens and one panel, before the scales -----------

template <int T>
void dots_bf16(const char* x, const char* w, int steps, float* c) {
  f32x16 sums[T][2][2] = {};  // by token, tile, parity of the row: more sums under way at a time
  for (int step = 0; step < steps; step++, x += STEP, w += STEP) {
#pragma GCC unroll 16
    for (int r = 0; r < 16; r++) {
      prefetch(w + AHEAD + r * 64);
      prefetch(w + AHEAD + TILE + r * 64);
      for (int t = 0; t < T; t++) {
        uint32_t pair = load<uint32_t>(x + t * 64 + r * 4);
        sums[t][0][r % 2] = dot2(sums[t][0][r % 2], w + r * 64, pair);
        sums[t][1][r % 2] = dot2(sums[t][1][r % 2], w + TILE + r * 64, pair);
      }
    }
  }
  for (int t = 0; t < T; t++)
    for (int half = 0; half < 2; half++)
      store(c + t * 32 + half * 16, sums[t][half][0] + sums[t][half][1]);
}

template <int PLANES>
INLINE f32x16 join(const i32x16* planes) {
  return PLANES == 1 ? to_float(planes[0]) : to_float(planes[0]) * PLANE + to_float(planes[1]);
}

template <int T, int PLANES>
void dots_int8(const char* x, const char* w, int steps, const int32_t* plane_sum, float* c) {
  i32x16 sums[T][2][PLANES];
  for (int t = 0; t < T; t++)
    for (int p = 0; p < PLANES; p++)
      sums[t][0][p] = sums[t][1][p] = splat(-SIGNED_OFFSET * plane_sum[2 * t + p]);
  for (int step = 0; step < steps; step++, x += STEP, w += STEP) {
#pragma GCC unroll 4
    for (int r = 0; r < 16; r++) {
      prefetch(w + AHEAD + r * 64);
      prefetch(w + AHEAD + TILE + r * 64);
      u8x64 w0 = load<u8x64>(w + r * 64), w1 = load<u8x64>(w + TILE + r * 64);
      for (int t = 0; t < T; t++)
        for (int p = 0; p < PLANES; p++) {
          int32_t four = load<int32_t>(x + p * TILE + t * 64 + r * 4);
          sums[t][0][p] = dot4_signed(sums[t][0][p], w0, four);
          sums[t][1][p] = dot4_signed(sums[t][1][p], w1, four);
        }
    }
  }
  for (int t = 0; t < T; t++)
    for (int half = 0; half < 2; half++) store(c + t * 32 + half * 16, join<PLANES>(sums[t][half]));
}

INLINE f32x16 zeros_of(const uint8_t* zero, int at) {
  if (!zero) return splat(8.0f);
  typedef uint8_t u8x16 __attribute__((vector_size(16)));
  return __builtin_convertvector(load<u8x16>(zero + at), f32x16);
}
// What a group adds to an output: its scale * (sum of products - zero point * sum of inputs).
INLINE f32x16 add_group(f32x16 c, f32x16 products, f32x16 scale, f32x16 zero, float inputs) {
  return c + scale * (products - zero * inputs);
}

// GROUP is 32, or 64 for groups of any multiple of 64.
template <int T, int PLANES, int GROUP>
void dots_int4(const char* x, const char* w, const Linear& l, const uint16_t* scale,
               const uint8_t* zero, const float* group_sum, float* c) {
  constexpr int SETS = GROUP == 32 ? 2 : 1;  // the halves of the bytes are groups of their own
  const int steps = l.k / 64, groups = l.k / l.group, per_group = l.group / 64;
  const u8x64 mask = u8x64{} + 15;
  i32x16 sums[SETS][T][2][PLANES] = {};
  f32x16 out[T][2] = {};
  for (int step = 0, left = per_group, g = 0; step < steps; step++, x += STEP, w += STEP / 2) {
#pragma GCC unroll 2
    for (int r = 0; r < 8; r++) {
      prefetch(w + AHEAD + r * 64);
      prefetch(w + AHEAD + TILE / 2 + r * 64);
      for (int half = 0; half < 2; half++) {
        u8x64 both = load<u8x64>(w + half * (TILE / 2) + r * 64);
        u8x64 low = both & mask, high = (both >> 4) & mask;
        for (int t = 0; t < T; t++)
          for (int p = 0; p < PLANES; p++) {
            const char* at = x + p * TILE + t * 64 + r * 4;
            i32x16& first = sums[0][t][half][p];
            first = dot4_unsigned(first, low, load<int32_t>(at));
            i32x16& second = sums[SETS - 1][t][half][p];
            second = dot4_unsigned(second, high, load<int32_t>(at + 32));
          }
      }
    }
    if (GROUP != 32 && --left) continue;
    left = per_group;
    for (int set = 0; set < SETS; set++, g++)
      for (int half = 0; half < 2; half++) {
        f32x16 s = half_to_float(scale + g * 32 + half * 16), z = zeros_of(zero, g * 32 + half * 16);
        for (int t = 0; t < T; t++) {
          i32x16* planes = sums[set][t][half];
          out[t][half] = add_group(out[t][half], join<PLANES>(planes), s, z, group_sum[t * groups + g]);
          for (int p = 0; p < PLANES; p++) planes[p] = i32x16{};
        }
      }
  }
  for (int t = 0; t < T; t++)
    for (int half = 0; half < 2; half++) store(c + t * 32 + half * 16, out[t][half]);
}

#ifdef __AMX_TILE__
constexpr bool HAS_TILES = true;

// The four sums of a strip and a panel: tiles 0 1 (first 16 rows), 2 3 (second 16 rows).
#define MULTIPLY(op, ROWS, x, w, a_at, b_at, prefetching)                      \
  TILE_LOAD(6, (w) + (b_at), 64);                                              \
  TILE_LOAD(4, (x) + (a_at), 64);                                              \
  if (prefetching)                                                             \
    for (int r = 0; r < 16; r++) prefetch((w) + AHEAD + r * 64);               \
  TILE_LOAD(7, (w) + (b_at) + TILE, 64);                                       \
  TILE_DOT(op, 0, 4, 6);                                                       \
  if (prefetching)                                                             \
    for (int r = 0; r < 16; r++) prefetch((w) + AHEAD + TILE + r * 64);        \
  TILE_DOT(op, 1, 4, 7);                                                       \
  if (ROWS > 16) {                                                             \
    TILE_LOAD(5, (x) + TILE + (a_at), 64);                                     \
    TILE_DOT(op, 2, 5, 6);                                                     \
    TILE_DOT(op, 3, 5, 7);                                                     \
  }
#define ZERO_SUMS() TILE_ZERO(0); TILE_ZERO(1); TILE_ZERO(2); TILE_ZERO(3)

template <int ROWS>
INLINE void store_sums(void* c) {  // [32][32] values of 4 bytes
  char* to = (char*)c;
  TILE_STORE(0, to, 128);
  TILE_STORE(1, to + 64, 128);
  if (ROWS > 16) {
    TILE_STORE(2, to + 16 * 128, 128);
    TILE_STORE(3, to + 16 * 128 + 64, 128);
  }
}

template <int ROWS>
INLINE void load_sums(const void* c) {
  const char* from = (const char*)c;
  TILE_LOAD(0, from, 128);
  TILE_LOAD(1, from + 64, 128);
  if (ROWS > 16) {
    TILE_LOAD(2, from + 16 * 128, 128);
    TILE_LOAD(3, from + 16 * 128 + 64, 128);
  }
}

// Some steps of a strip and a panel, added to `c` unless they are the first. `fresh`: the weights
// come from memory.
template <int KIND, int ROWS>
void tiles_plain(const char* x, const char* w, int steps, bool first, bool fresh, void* c) {
  if (first) { ZERO_SUMS(); } else load_sums<ROWS>(c);
#define STEPS(op, fetching)                              \
  for (int i = 0; i < steps; i++, x += STEP, w += STEP) { \
    MULTIPLY(op, ROWS, x, w, 0, 0, fetching)              \
  }
  if (KIND == BF16) {
    if (fresh) { STEPS("tdpbf16ps", true) } else { STEPS("tdpbf16ps", false) }
  } else {
    if (fresh) { STEPS("tdpbssd", true) } else { STEPS("tdpbssd", false) }
  }
#undef STEPS
  store_sums<ROWS>(c);
}

// What the two planes of 16 tokens sum up to, in the place of the first.
INLINE void join_planes(float* c) {
  for (int at = 0; at < 16 * 32; at += 16) {
    i32x16 both[2] = {load<i32x16>(c + at), load<i32x16>(c + 16 * 32 + at)};
    store(c + at, join<2>(both));
  }
}

INLINE void unpack_int4(const char* w, int steps, char* to) {
  const u8x64 mask = u8x64{} + 15;
  for (int tile = 0; tile < 2 * steps; tile++, w += TILE / 2, to += TILE)
#pragma GCC unroll 8
    for (int r = 0; r < 8; r++) {
      prefetch(w + AHEAD + r * 64);
      u8x64 both = load<u8x64>(w + r * 64);
      store(to + r * 64, both & mask);
      store(to + (r + 8) * 64, (both >> 4) & mask);
    }
}

// Groups [begin, end) of a panel, added to `c` unless they are the first. w: where the panel lies
// unpacked to bytes; `packed`: null if it does already. Unpacking goes one turn ahead of the
// products, so that memory is read while they are computed; a group's sums are scaled while the
// next group is multiplied. Tiles must be configured for 32 or 64 bytes of depth.
template <int ROWS, int PLANES>
void tiles_int4(const char* x, char* w, const char* packed, const Linear& l, int begin, int end,
                const uint16_t* scale, const uint8_t* zero, const float* group_sum, int tokens,
                float* c) {
  alignas(64) int32_t room[2][32 * 32];
  const int groups = l.k / l.group, per_group = l.group / 64, steps = l.k / 64;
  const int turn = per_group ? per_group : 1;
  auto scaled = [&](int g) {
    const int32_t* sums = room[g % 2];
    for (int half = 0; half < 32; half += 16) {
      f32x16 s = half_to_float(scale + g * 32 + half), z = zeros_of(zero, g * 32 + half);
      for (int t = 0; t < tokens; t++) {
        const int at = t * 32 + half;
        i32x16 planes[2] = {load<i32x16>(sums + at), i32x16{}};
        if (PLANES == 2) planes[1] = load<i32x16>(sums + 16 * 32 + at);
        f32x16 old = g ? load<f32x16>(c + at) : f32x16{};
        store(c + at, add_group(old, join<PLANES>(planes), s, z, group_sum[t * groups + g]));
      }
    }
  };
  if (packed) unpack_int4(packed, turn, w);
  for (int g = begin; g < end; g++) {
    ZERO_SUMS();
    if (l.group == 32) {
      const size_t at = size_t(g / 2) * STEP;
      MULTIPLY("tdpbsud", ROWS, x + at, w + at, g % 2 * 32, g % 2 * 512, false)
    } else {
      for (int i = 0; i < per_group; i++) {
        const size_t at = (size_t(g) * per_group + i) * STEP;
        MULTIPLY("tdpbsud", ROWS, x + at, w + at, 0, 0, false)
      }
    }
    store_sums<ROWS>(room[g % 2]);
    const int next = l.group == 32 ? g / 2 + 1 : (g + 1) * turn;
    if (packed && next < steps && (l.group != 32 || g % 2 == 0))
      unpack_int4(packed + size_t(next) * STEP / 2, turn, w + size_t(next) * STEP);
    if (g > begin) scaled(g - 1);
  }
  scaled(end - 1);
}
#else
constexpr bool HAS_TILES = false;
#endif

// ---- one panel for some tokens ----------------------------------------------------------------

// One row of a panel's outputs: all of it, or only the first `live` of the last panel.
template <int TYPE>
INLINE void write_row(void* rows, size_t place, const f32x16* y, int live, int width) {
  if (live == width) {
    for (int i = 0; i < width / 16; i++) {
      if (TYPE == TYPE_BF16) { store((bf16*)rows + place + i * 16, narrow(y[i])); continue; }
      float* to = (float*)rows + place + i * 16;
      store(to, TYPE == TYPE_ADD_F32 ? load<f32x16>(to) + y[i] : y[i]);
    }
    return;
  }
  for (int n = 0; n < live; n++) {
    const float v = y[n / 16][n % 16];
    if (TYPE == TYPE_BF16) ((bf16*)rows)[place + n] = narrow(v);
    else if (TYPE == TYPE_ADD_F32) ((float*)rows)[place + n] += v;
    else ((float*)rows)[place + n] = v;
  }
}

// c: [count][32] sums, int32 if WHOLE.
template <int TYPE, bool GATED, bool WHOLE>
void finish_rows(const Linear& w, const float* token_scale, const Output& out, int panel, int token,
                 int count, const void* c) {
  constexpr int WIDTH = GATED ? 16 : 32;
  const int first = panel * WIDTH, live = w.n_out - first < WIDTH ? w.n_out - first : WIDTH;
  f32x16 scale[2], bias[2] = {};
  for (int half = 0; half < 2; half++) {
    const int at = panel * 32 + half * 16;
    scale[half] = w.kind == BF16 ? splat(1.0f) : load<f32x16>(w.scale + at);
    if (w.bias) bias[half] = load<f32x16>(w.bias + at);
  }
  for (int t = 0; t < count; t++) {
    const float factor = w.kind == BF16 ? 1.0f : token_scale[token + t];
    f32x16 y[2];
    for (int half = 0; half < 2; half++) {
      const char* at = (const char*)c + (t * 32 + half * 16) * 4;
      y[half] = WHOLE ? to_float(load<i32x16>(at)) : load<f32x16>(at);
      y[half] = y[half] * (scale[half] * factor) + bias[half];
    }
    if (GATED) y[0] = silu(y[0]) * y[1];
    write_row<TYPE>(out.rows, size_t(token + t) * out.stride + first, y, live, WIDTH);
  }
}

template <bool WHOLE = false>
void finish(const Linear& w, const Prepared& p, const Output& out, int panel, int token, int count,
            const void* c) {
  auto run = finish_rows<TYPE_BF16, false, WHOLE>;
  if (out.type == TYPE_BF16 && w.gated) run = finish_rows<TYPE_BF16, true, WHOLE>;
  if (out.type == TYPE_F32) run = w.gated ? finish_rows<TYPE_F32, true, WHOLE> : finish_rows<TYPE_F32, false, WHOLE>;
  if (out.type == TYPE_ADD_F32) run = w.gated ? finish_rows<TYPE_ADD_F32, true, WHOLE> : finish_rows<TYPE_ADD_F32, false, WHOLE>;
  run(w, p.scale, out, panel, token, count, c);
}

// Tokens [token, token + T) lie in one tile of a strip.
template <int T>
void by_dots(const Linear& w, const Prepared& p, int panel, int token, float* c) {
  const int steps = steps_of(w), strip = token / tokens_per_strip(w), row = token % tokens_per_strip(w);
  const char* x = p.tiles + size_t(strip) * steps * STEP + row / 16 * TILE + row % 16 * 64;
  const char* data = w.data + panel * panel_bytes(w);
  const int32_t* plane_sum = p.plane_sum + 2 * token;
  if (w.kind == BF16) return dots_bf16<T>(x, data, steps, c);
  if (w.kind == INT8)
    return w.planes == 2 ? dots_int8<T, 2>(x, data, steps, plane_sum, c)
                         : dots_int8<T, 1>(x, data, steps, plane_sum, c);
  const size_t groups = w.k / w.group, at = panel * groups * 32;
  const uint8_t* zero = w.zero ? w.zero + at : nullptr;
  auto run = w.planes == 2 ? (w.group == 32 ? dots_int4<T, 2, 32> : dots_int4<T, 2, 64>)
                           : (w.group == 32 ? dots_int4<T, 1, 32> : dots_int4<T, 1, 64>);
  run(x, data, w, w.group_scale + at, zero, p.group_sum + token * groups, c);
}

void panel_by_dots(const Linear& w, const Prepared& p, const Output& out, int panel, int begin, int end) {
  alignas(64) float c[4 * 32];
  for (int token = begin; token < end;) {
    const int left = end - token;
    int n = 1;
    if (left >= 4 && token % 4 == 0) by_dots<4>(w, p, panel, token, c), n = 4;
    else if (left >= 2 && token % 2 == 0) by_dots<2>(w, p, panel, token, c), n = 2;
    else by_dots<1>(w, p, panel, token, c);
    finish(w, p, out, panel, token, n, c);
    token += n;
  }
}

#ifdef __AMX_TILE__
constexpr int BLOCK = 8;  // steps at a time where the depth is cut

// Whole groups only.
INLINE int block_of(const Linear& w) {
  return w.kind == INT4 && w.group > 64 ? ceil_div(BLOCK, w.group / 64) * (w.group / 64) : BLOCK;
}

// The sums of one strip and one panel over the steps [from, to), added to `c` unless from is 0.
// `fresh`: the panel is seen for the first time and comes from memory. `packed`: int4 weights that
// are still to be unpacked, all of them.
void strip_by_tiles(const Linear& w, const Prepared& p, int panel, int strip, int tokens, int from,
                    int to, bool fresh, const char* packed, char* unpacked, float* c) {
  const int token = strip * tokens_per_strip(w), steps = steps_of(w);
  const int live = tokens - token < tokens_per_strip(w) ? tokens - token : tokens_per_strip(w);
  const bool all = live > 16 || planes_of(w) == 2;  // or the strip's second tile is empty
  const char* x = p.tiles + (size_t(strip) * steps + from) * STEP;
  if (w.kind == INT4) {
    const size_t groups = w.k / w.group, at = panel * groups * 32;
    auto run = w.planes == 2 ? tiles_int4<32, 2> : all ? tiles_int4<32, 1> : tiles_int4<16, 1>;
    return run(p.tiles + size_t(strip) * steps * STEP, unpacked, packed, w, from * 64 / w.group,
               to * 64 / w.group, w.group_scale + at, w.zero ? w.zero + at : nullptr,
               p.group_sum + token * groups, live, c);
  }
  const char* data = w.data + panel * panel_bytes(w) + size_t(from) * STEP;
  auto run = w.kind == BF16 ? (all ? tiles_plain<BF16, 32> : tiles_plain<BF16, 16>)
                            : (all ? tiles_plain<INT8, 32> : tiles_plain<INT8, 16>);
  run(x, data, to - from, from == 0, fresh, c);
}

void finish_strip(const Linear& w, const Prepared& p, const Output& out, int panel, int strip,
                  int tokens, float* c) {
  const int token = strip * tokens_per_strip(w);
  const int live = tokens - token < tokens_per_strip(w) ? tokens - token : tokens_per_strip(w);
  if (w.kind == INT8 && w.planes == 1) return finish<true>(w, p, out, panel, token, live, c);
  if (w.kind == INT8) join_planes(c);
  finish(w, p, out, panel, token, live, c);
}

// Panels [first, last) for the strips [begin, end), each over the whole depth.
void panels_by_tiles(const Linear& w, const Prepared& p, const Output& out, int first, int last,
                     int begin, int end, int tokens, char* unpacked) {
  alignas(64) float c[32 * 32];
  const int steps = steps_of(w);
  const size_t bytes = size_t(steps) * STEP;
  const size_t share = bytes / 64 / (last - first) + 1;  // lines of the next strip for each panel
  for (int strip = begin; strip < end; strip++) {
    const char* next = p.tiles + size_t(strip + 1) * bytes;
    for (int panel = first; panel < last; panel++) {
      if (strip + 1 < end)
        for (size_t i = 0; i < share; i++, next += 64) _mm_prefetch(next, _MM_HINT_T1);
      const bool fresh = strip == begin;
      strip_by_tiles(w, p, panel, strip, tokens, 0, steps, fresh,
                     fresh ? w.data + panel * panel_bytes(w) : nullptr,
                     unpacked + (panel - first) * bytes, c);
      finish_strip(w, p, out, panel, strip, tokens, c);
    }
  }
}

// Panels [first, last) for the strips [begin, end), block by block of the depth with all sums kept:
// for weights so deep that few panels would fit into the second-level cache.
void square_by_tiles(const Linear& w, const Prepared& p, const Output& out, int first, int last,
                     int begin, int end, int tokens, char* unpacked, float* sums) {
  const int steps = steps_of(w), block = block_of(w);
  for (int from = 0; from < steps; from += block) {
    const int to = from + block < steps ? from + block : steps;
    for (int panel = first; panel < last; panel++) {
      if (w.kind == INT4)
        unpack_int4(w.data + panel * panel_bytes(w) + size_t(from) * STEP / 2, to - from,
                    unpacked + size_t(from) * STEP);
      float* c = sums + size_t(panel - first) * (end - begin) * 32 * 32;
      for (int strip = begin; strip < end; strip++, c += 32 * 32)
        strip_by_tiles(w, p, panel, strip, tokens, from, to, strip == begin, nullptr, unpacked, c);
    }
  }
  for (int panel = first; panel < last; panel++)
    for (int strip = begin; strip < end; strip++, sums += 32 * 32)
      finish_strip(w, p, out, panel, strip, tokens, sums);
}
#else
void panels_by_tiles(const Linear&, const Prepared&, const Output&, int, int, int, int, int, char*) {}
void square_by_tiles(const Linear&, const Prepared&, const Output&, int, int, int, int, int, char*, float*) {}
#endif

}  // namespace

constexpr int SQUARE = 16;  // panels and strips whose sums a thread keeps while it goes through the depth
constexpr int CACHED = 1 << 20;  // bytes of weights that a thread keeps close
constexpr int PRIVATE_LIMIT = 16384;  // inputs that each member prepares for itself: no waiting

namespace {

// How the work on tiles is cut: chunks of panels times spans of strips.
struct Cut {
  bool square;
  int chunk, chunks, spans, span, panel_cost;
};

Cut cut(const Linear& w, int tokens, int members) {
  Cut c;
  const int strips = ceil_div(tokens, tokens_per_strip(w));
  c.panel_cost = steps_of(w) * STEP;
  const int fitting = CACHED / c.panel_cost;
  c.square = strips >= SQUARE && fitting < SQUARE / 2;
  // A chunk of panels stays in the second-level cache while strips of inputs pass by.
  const int even = ceil_div(w.panels, members);
  const int most = c.square ? SQUARE : strips <= 2 || fitting < 1 ? 1 : fitting;
  c.chunk = most < even ? most : even;
  c.chunks = ceil_div(w.panels, c.chunk);
  c.spans = ceil_div(strips, c.square ? SQUARE : 32);
  c.span = ceil_div(strips, c.spans);
  return c;
}

// The next piece of `total` in a row for a member: half of a fair share of what is left, so that
// most of it is read in long stretches (what is prefetched beyond an end is read by nobody) while
// the last pieces, whose ends everybody waits for, are short. False: all is dealt out.
bool deal(Team& team, int total, int& first, int& last) {
  const int twice = 2 * team.size();
  int left = total;
  for (int i = team.claim(); left > 0; i--) {
    const int size = ceil_div(left, twice);
    if (!i) {
      first = total - left;
      last = first + size;
      return true;
    }
    left -= size;
  }
  return false;
}

bool prepare_alone(const Linear& w, int tokens, int members) {
  return size_t(tokens) * w.k <= PRIVATE_LIMIT || members == 1;
}

}  // namespace

bool linear_room(Team& team, const Linear& w, int tokens) {
  const Cut c = cut(w, tokens, team.size());
  const size_t prepared = prepared_bytes(w, tokens, nullptr, nullptr);
  const bool alone = prepare_alone(w, tokens, team.size());
  return team.reserve_own(0, w.k * sizeof(float)) &&
         (alone ? team.reserve_own(1, prepared) : team.reserve_shared(0, prepared)) &&
         team.reserve_own(2, w.kind == INT4 ? size_t(c.square ? 1 : c.chunk) * c.panel_cost : 0) &&
         team.reserve_own(4, c.square ? size_t(SQUARE) * SQUARE * 32 * 32 * sizeof(float) : 0);
}

void linear(Team& team, int me, const Linear& w, const Input& in, const Output& out, int tokens,
            int path) {
  Prepared p;
  float* x = (float*)team.own(me, 0);
  if (prepare_alone(w, tokens, team.size())) {
    prepared_bytes(w, tokens, &p, (char*)team.own(me, 1));
    for (int token = 0; token < tokens; token++) prepare(w, in, p, token, x);
  } else {
    prepared_bytes(w, tokens, &p, (char*)team.shared(0));
    const int portion = tokens > 64 ? 16 : 2;
    for (int i; (i = team.claim() * portion) < tokens;)
      for (int token = i; token < tokens && token < i + portion; token++) prepare(w, in, p, token, x);
    team.meet();
  }
  const bool tiles = HAS_TILES && (path == PATH_TILES || (path == PATH_AUTO && (w.kind == BF16 || tokens > 4)));
  if (!tiles) {
    for (int first, last; deal(team, w.panels, first, last);)
      for (int panel = first; panel < last; panel++) panel_by_dots(w, p, out, panel, 0, tokens);
    return team.meet();
  }
  configure_tiles(w.kind == INT4 && w.group == 32 ? 32 : 64);
  const int strips = ceil_div(tokens, tokens_per_strip(w));
  const Cut c = cut(w, tokens, team.size());
  char* room = (char*)team.own(me, 2);
  float* sums = (float*)team.own(me, 4);
  for (int from, to; deal(team, c.chunks * c.spans, from, to);)
    for (int i = from; i < to; i++) {
      const int first = i / c.spans * c.chunk, last = first + c.chunk < w.panels ? first + c.chunk : w.panels;
      const int begin = i % c.spans * c.span, end = begin + c.span < strips ? begin + c.span : strips;
      if (c.square) square_by_tiles(w, p, out, first, last, begin, end, tokens, room, sums);
      else panels_by_tiles(w, p, out, first, last, begin, end, tokens, room);
    }
  release_tiles();
  team.meet();
}

// ---- packing ----------------------------------------------------------------------------------

// weights: [rows][columns] of bf16, int8 or (one byte each, 0 to 15) int4.
void pack(Team& team, int me, int kind, const void* weights, int rows, int columns, int k,
          int gated, char* packed) {
  (void)me;
  const int half = gated ? rows / 2 : 0;
  const int panels = gated ? ceil_div(half, 16) : ceil_div(rows, 32);
  const int inputs = step_inputs(kind), steps = k / inputs, size = kind == BF16 ? 2 : 1;
  const size_t tile = kind == INT4 ? TILE / 2 : TILE;
  for (int panel; (panel = team.claim()) < panels;) {
    char* to = packed + size_t(panel) * steps * 2 * tile;
    memset(to, 0, size_t(steps) * 2 * tile);
    for (int step = 0; step * inputs < columns; step++, to += 2 * tile) {
      const int count = columns - step * inputs < inputs ? columns - step * inputs : inputs;
      for (int n = 0; n < 32; n++) {  // a step's tiles stay in the first-level cache meanwhile
        const int row = gated ? n / 16 * half + panel * 16 + n % 16 : panel * 32 + n;
        if (gated ? panel * 16 + n % 16 >= half : row >= rows) continue;
        uint32_t four[16] = {};
        memcpy(four, (const char*)weights + (size_t(row) * columns + size_t(step) * inputs) * size,
               size_t(count) * size);
        char* column = to + n / 16 * tile + n % 16 * 4;
        if (kind == INT4)
          for (int r = 0; r < 8; r++)
            store(column + r * 64, (four[r] & 0x0f0f0f0fu) | (four[r + 8] & 0x0f0f0f0fu) << 4);
        else
          for (int r = 0; r < 16; r++) store(column + r * 64, four[r]);
      }
    }
  }
  team.meet();
}
