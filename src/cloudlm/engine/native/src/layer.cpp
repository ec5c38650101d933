// The small operations between the products. Rows are dealt out in order; each is computed by one
// thread in one order of additions.
#include "kernels.h"
#include "simd.h"

namespace {

INLINE f32x16 read(const Input& in, int row, int at) {
  const size_t place = size_t(row) * in.stride + at;
  return in.type == TYPE_F32 ? load<f32x16>((const float*)in.rows + place)
                             : widen(load<u16x16>((const bf16*)in.rows + place));
}
INLINE float read_one(const Input& in, int row, int at) {
  const size_t place = size_t(row) * in.stride + at;
  return in.type == TYPE_F32 ? ((const float*)in.rows)[place] : widen(((const bf16*)in.rows)[place]);
}
INLINE void write(const Output& out, int row, int at, f32x16 v) {
  const size_t place = size_t(row) * out.stride + at;
  if (out.type == TYPE_BF16) store((bf16*)out.rows + place, narrow(v));
  else store((float*)out.rows + place, v);
}
INLINE void write_one(const Output& out, int row, int at, float v) {
  const size_t place = size_t(row) * out.stride + at;
  if (out.type == TYPE_BF16) ((bf16*)out.rows)[place] = narrow(v);
  else ((float*)out.rows)[place] = v;
}

template <class F>
void for_rows(Team& team, int rows, F&& work) {
  const int portion = rows > 64 ? 8 : 1;
  for (int i; (i = team.claim() * portion) < rows;)
    for (int row = i; row < rows && row < i + portion; row++) work(row);
  team.meet();
}

INLINE f32x16 finite(f32x16 v) { return magnitude(v) < __builtin_inff() ? v : f32x16{}; }

// A head of `dim` numbers: normed if there is a norm, turned if there are angles.
void turn_head(const bf16* head, int dim, const float* norm, float eps, const float* cos,
               const float* sin, float* to) {
  f32x16 squares = {};
  for (int i = 0; i < dim; i += LANES) {
    f32x16 v = widen(load<u16x16>(head + i));
    squares += v * v;
    store(to + i, v);
  }
  if (norm) {
    const float factor = 1.0f / __builtin_sqrtf(sum(squares) / float(dim) + eps);
    for (int i = 0; i < dim; i += LANES)
      store(to + i, load<f32x16>(to + i) * factor * load<f32x16>(norm + i));
  }
  const int half = dim / 2;
  for (int i = 0; i < half; i += LANES) {
    f32x16 left = load<f32x16>(to + i), right = load<f32x16>(to + half + i);
    f32x16 c = load<f32x16>(cos + i), s = load<f32x16>(sin + i);
    store(to + i, left * c - right * s);
    store(to + half + i, right * c + left * s);
  }
}

}  // namespace

void rms_norm(Team& team, int, const Input& in, float* residual, const Output& out, int tokens,
              int size) {
  const int whole = size / LANES * LANES;
  for_rows(team, tokens, [&](int t) {
    float* kept = residual ? residual + size_t(t) * size : nullptr;
    f32x16 squares = {};
    for (int i = 0; i < whole; i += LANES) {
      f32x16 v = read(in, t, i);
      if (kept) store(kept + i, v += load<f32x16>(kept + i));
      squares += v * v;
    }
    float total = sum(squares);
    for (int i = whole; i < size; i++) {
      float v = read_one(in, t, i);
      if (kept) v = kept[i] += v;
      total += v * v;
    }
    const float factor = 1.0f / __builtin_sqrtf(total / float(size) + in.eps);
    for (int i = 0; i < whole; i += LANES)
      write(out, t, i, (kept ? load<f32x16>(kept + i) : read(in, t, i)) * factor * load<f32x16>(in.norm + i));
    for (int i = whole; i < size; i++)
      write_one(out, t, i, (kept ? kept[i] : read_one(in, t, i)) * factor * in.norm[i]);
  });
}

void silu_mul(Team& team, int, const Input& gate_up, const Output& out, int tokens, int size) {
  for_rows(team, tokens, [&](int t) {
    for (int i = 0; i < size; i += LANES) {
      const f32x16 v = silu(read(gate_up, t, 2 * i)) * read(gate_up, t, 2 * i + LANES);
      if (i + LANES <= size) write(out, t, i, v);
      else for (int j = 0; i + j < size; j++) write_one(out, t, i + j, v[j]);
    }
  });
}

// Keys lie as [slot / 16][dim / 2][slot % 16][2], values as [slot / 2][dim][2], by block and head:
// the layout of weights, so that attention multiplies with them as they are.
void rope_store(Team& team, int, const Rope& r, int tokens) {
  const int dim = r.dim;
  for_rows(team, tokens, [&](int t) {
    float head[MAX_HEAD_DIM];
    const float *cos = r.cos + size_t(t) * dim / 2, *sin = r.sin + size_t(t) * dim / 2;
    bf16* row = r.qkv + size_t(t) * r.stride;
    for (int h = 0; h < r.heads; h++) {
      bf16* q = row + h * dim;
      turn_head(q, dim, r.q_norm, r.eps, cos, sin, head);
      for (int i = 0; i < dim; i += LANES) store(q + i, narrow(load<f32x16>(head + i)));
    }
    const int64_t slot = r.slots[t];
    if (slot < 0) return;
    const int s = int(slot % r.block_size);
    for (int h = 0; h < r.kv_heads; h++) {
      const size_t base = size_t(slot / r.block_size * r.kv_heads + h) * r.block_size * dim;
      turn_head(row + (r.heads + h) * dim, dim, r.k_norm, r.eps, cos, sin, head);
      uint32_t* key = (uint32_t*)(r.keys + base + size_t(s / 16) * 16 * dim) + s % 16;
      for (int i = 0; i < dim; i += LANES) {
        bf16 pairs[LANES];
        store(pairs, narrow(finite(load<f32x16>(head + i))));
        for (int j = 0; j < LANES; j += 2) memcpy(key + (i + j) / 2 * 16, pairs + j, 4);
      }
      const bf16* value = row + (r.heads + r.kv_heads + h) * dim;
      bf16* to = r.values + base + size_t(s / 2) * 2 * dim + s % 2;
      for (int i = 0; i < dim; i++) to[2 * i] = (value[i] & 0x7f80) == 0x7f80 ? 0 : value[i];
    }
  });
}
