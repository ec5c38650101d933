// Sixteen lanes at a time, on every machine: vector types of the compiler (GCC and Clang), which
// become one 512-bit or two 256-bit registers, and the few instructions that have no such spelling.
// The instruction set is the one this file is compiled for; the loader picks the library by CPU.
#pragma once
#include <immintrin.h>
#include <cstdint>
#include <cstring>

#define INLINE inline __attribute__((always_inline))

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef int8_t i8x16 __attribute__((vector_size(16)));
typedef uint8_t u8x64 __attribute__((vector_size(64)));

typedef uint16_t bf16;  // the upper half of a float32

constexpr int LANES = 16;

template <class V> INLINE V load(const void* from) { V v; memcpy(&v, from, sizeof v); return v; }
template <class V> INLINE void store(void* to, V v) { memcpy(to, &v, sizeof v); }
INLINE f32x16 splat(float x) { return f32x16{} + x; }
INLINE i32x16 splat(int32_t x) { return i32x16{} + x; }

INLINE f32x16 as_float(u32x16 v) { return (f32x16)v; }
INLINE f32x16 larger(f32x16 a, f32x16 b) {  // b if either is not a number
#ifdef __AVX512F__
  return (f32x16)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}
INLINE f32x16 to_float(i32x16 v) { return __builtin_convertvector(v, f32x16); }
// Rounds to the nearest, ties to even; |v| < 2^22.
INLINE i32x16 to_int(f32x16 v) {
  const f32x16 magic = splat(12582912.0f);
  return (i32x16)(v + magic) - (i32x16)magic;
}

// To the nearest, ties to even, of what `v` is as it stands: never fused with what made it.
INLINE i32x16 nearest(f32x16 v) {
#ifdef __AVX512F__
  return (i32x16)_mm512_cvtps_epi32((__m512)v);
#else
  __m256 from[2]; memcpy(from, &v, 64);
  const __m256i to[2] = {_mm256_cvtps_epi32(from[0]), _mm256_cvtps_epi32(from[1])};
  i32x16 whole; memcpy(&whole, to, 64);
  return whole;
#endif
}

INLINE float widen(bf16 v) {
  uint32_t bits = uint32_t(v) << 16; float x; memcpy(&x, &bits, 4); return x;
}
INLINE f32x16 widen(u16x16 v) { return as_float(__builtin_convertvector(v, u32x16) << 16); }
INLINE u16x16 narrow(f32x16 v) {  // to the nearest, ties to even; NaN stays NaN
#ifdef __AVX512BF16__
  return (u16x16)_mm512_cvtneps_pbh((__m512)v);
#else
  u32x16 bits = (u32x16)v;
  u32x16 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  i32x16 nan = (i32x16)(v != v);
  rounded = (rounded & ~(u32x16)nan) | ((u32x16)nan & 0x7fc0u);
  return __builtin_convertvector(rounded, u16x16);
#endif
}
INLINE bf16 narrow(float x) {
  uint32_t bits; memcpy(&bits, &x, 4);
  return x != x ? 0x7fc0 : bf16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
INLINE f32x16 half_to_float(const uint16_t* from) {
#ifdef __AVX512F__
  return (f32x16)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#else
  f32x16 v;
  __m256 low = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
  __m256 high = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from + 1));
  memcpy(&v, &low, 32); memcpy((char*)&v + 32, &high, 32);
  return v;
#endif
}

// What a float16 keeps of it, to the nearest.
INLINE float to_half_and_back(float v) {
  return _cvtsh_ss(_cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

INLINE float sum(f32x16 v) {
#ifdef __AVX512F__
  return _mm512_reduce_add_ps((__m512)v);
#else
  float x[16]; store(x, v);
  for (int step = 8; step; step /= 2) for (int i = 0; i < step; i++) x[i] += x[i + step];
  return x[0];
#endif
}
INLINE float largest(f32x16 v) {
#ifdef __AVX512F__
  return _mm512_reduce_max_ps((__m512)v);
#else
  float x[16]; store(x, v);
  for (int step = 8; step; step /= 2)
    for (int i = 0; i < step; i++) x[i] = x[i] > x[i + step] ? x[i] : x[i + step];
  return x[0];
#endif
}
INLINE f32x16 magnitude(f32x16 v) { return as_float((u32x16)v & 0x7fffffffu); }

// 2^v for v <= 126; below -126 the answer is 0 or as good as that. The polynomial on [-0.5, 0.5] is
// that of Cephes' exp2f, relative error below 2e-7; ROUGH, for what will be rounded to bf16, is a
// least-squares fit of degree 4 with 3e-6.
template <bool ROUGH = false>
INLINE f32x16 exp2(f32x16 v) {
#ifdef __AVX512F__
  f32x16 f = (f32x16)_mm512_reduce_ps((__m512)v, 0), whole = v - f;
#else
  i32x16 dead = (i32x16)(v < -126.0f);
  v = v < -126.0f ? splat(-126.0f) : v;
  i32x16 exponent = to_int(v);
  f32x16 f = v - to_float(exponent);
#endif
  f32x16 p;
  if (ROUGH) {
    p = f * 9.5701e-3f + 5.591786e-2f;
    p = p * f + 2.4024745e-1f;
    p = p * f + 6.9312181e-1f;
  } else {
    p = f * 1.535336188319500e-4f + 1.339887440266574e-3f;
    p = p * f + 9.618437357674640e-3f;
    p = p * f + 5.550332471162809e-2f;
    p = p * f + 2.402264791363012e-1f;
    p = p * f + 6.931472028550421e-1f;
  }
  p = p * f + 1.0f;
#ifdef __AVX512F__
  return (f32x16)_mm512_scalef_ps((__m512)p, (__m512)whole);
#else
  return as_float((u32x16)(((i32x16)p + (exponent << 23)) & ~dead)) + (f - f);  // NaN stays NaN
#endif
}
constexpr float LOG2E = 1.44269504088896f;
INLINE f32x16 silu(f32x16 v) {
  f32x16 power = v * -LOG2E;
  const f32x16 below = exp2(power < 126.0f ? power : splat(126.0f)) + 1.0f;
#ifdef __AVX512F__
  // A division takes as long as everything else here; the guess of 14 bits is doubled once.
  const f32x16 guess = (f32x16)_mm512_rcp14_ps((__m512)below);
  return v * (guess * (2.0f - below * guess));
#else
  return v / below;
#endif
}

// acc[n] += w[n][0] * x[0] + w[n][1] * x[1], pairs of bf16; x is broadcast.
INLINE f32x16 dot2(f32x16 acc, const void* w, uint32_t x) {
#if defined(__AVX512BF16__) && defined(__clang__)
  // Clang 16 crashes over the intrinsic's type of vectors.
  const u32x16 weights = load<u32x16>(w), inputs = u32x16{} + x;
  __asm__("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(weights), "v"(inputs));
  return acc;
#elif defined(__AVX512BF16__)
  return (f32x16)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_loadu_si512(w),
                                  (__m512bh)_mm512_set1_epi32(int(x)));
#else
  u32x16 pair = load<u32x16>(w);
  float even, odd; uint32_t low = x << 16, high = x & 0xffff0000u;
  memcpy(&even, &low, 4); memcpy(&odd, &high, 4);
  acc += as_float(pair << 16) * even;
  return acc + as_float(pair & 0xffff0000u) * odd;
#endif
}

// acc[n] += w[n][0..3] . x[0..3]; weights unsigned bytes below 128, or any with VNNI.
INLINE i32x16 dot4_unsigned(i32x16 acc, u8x64 w, int32_t x) {
#ifdef __AVX512VNNI__
  return (i32x16)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, _mm512_set1_epi32(x));
#else
  __m256i part[2], sums[2]; memcpy(part, &w, 64); memcpy(sums, &acc, 64);
  for (int i = 0; i < 2; i++) {
    __m256i pairs = _mm256_maddubs_epi16(part[i], _mm256_set1_epi32(x));
    sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  memcpy(&acc, sums, 64);
  return acc;
#endif
}
// The same for signed weights. With VNNI the weights are taken with 128 added, so
// that acc must begin at -128 times the sum of all x (SIGNED_OFFSET).
#ifdef __AVX512VNNI__
constexpr int SIGNED_OFFSET = 128;
INLINE i32x16 dot4_signed(i32x16 acc, u8x64 w, int32_t x) {
  return dot4_unsigned(acc, w ^ 0x80, x);
}
#else
constexpr int SIGNED_OFFSET = 0;
INLINE i32x16 dot4_signed(i32x16 acc, u8x64 w, int32_t x) {
  __m256i part[2], sums[2]; memcpy(part, &w, 64); memcpy(sums, &acc, 64);
  for (int i = 0; i < 2; i++) {
    __m256i turned = _mm256_sign_epi8(_mm256_set1_epi32(x), part[i]);
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(part[i]), turned);
    sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  memcpy(&acc, sums, 64);
  return acc;
}
#endif

INLINE void prefetch(const void* at) { _mm_prefetch((const char*)at, _MM_HINT_T0); }

#ifdef __AMX_TILE__
// Tiles by hand: GCC 12's intrinsics tell the compiler neither that all 64 bytes of a
// configuration are read nor that a tile load reads memory, so that stores before them get lost.
#define TILE_LOAD(tile, from, stride)                                                  \
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile                                  \
                   :: "r"((const void*)(from)), "r"((long)(stride)) : "memory")
#define TILE_STORE(tile, to, stride)                                                   \
  __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)"                              \
                   :: "r"((void*)(to)), "r"((long)(stride)) : "memory")
#define TILE_ZERO(tile) __asm__ volatile("tilezero %%tmm" #tile ::: "memory")
#define TILE_DOT(op, c, a, b)                                                          \
  __asm__ volatile(op " %%tmm" #b ", %%tmm" #a ", %%tmm" #c ::: "memory")

struct alignas(64) TileShape {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileShape) == 64);
// Tiles 0-3 are sums, 4-5 rows of A, 6-7 rows of B. depth_bytes: bytes of a row of A (64 or 32).
INLINE void configure_tiles(int depth_bytes = 64) {
  TileShape shape;
  for (int i = 0; i < 8; i++) { shape.rows[i] = 16; shape.row_bytes[i] = 64; }
  for (int i = 4; i < 6; i++) shape.row_bytes[i] = uint16_t(depth_bytes);
  for (int i = 6; i < 8; i++) shape.rows[i] = uint8_t(depth_bytes / 4);
  __asm__ volatile("ldtilecfg %0" :: "m"(shape) : "memory");
}
INLINE void release_tiles() { __asm__ volatile("tilerelease" ::: "memory"); }
#else
INLINE void configure_tiles(int = 64) {}
INLINE void release_tiles() {}
#endif
