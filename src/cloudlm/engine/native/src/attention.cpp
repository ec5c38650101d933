// Attention over the paged cache, for one token or many, alone or sharing keys with others: every
// case is a list of pieces (see kernels.h and plan.py), each some query rows against a stretch of
// keys, computed chunk by chunk with a running maximum (Dao et al., "FlashAttention", 2022).
// A piece's rows are its tokens times the query heads of one key head, so that keys are read once
// for all of them. Scores and answers are sums in float32; shares (P) are rounded to bf16.
#include "kernels.h"
#include "simd.h"

namespace {

constexpr int CHUNK = 256;  // keys at a time
constexpr int STRIP = 32;   // query rows at a time

INLINE int ceil_div(int a, int b) { return (a + b - 1) / b; }

// One thread's working memory, for up to `rows` query rows (a multiple of STRIP).
struct Room {
  bf16* q;        // [strips][dim / 32][2][16][32]: rows of A
  float* sums;    // [rows][dim]
  float *top, *weight;  // [rows]
  float* scores;  // [STRIP][CHUNK]
  bf16* shares;   // [STRIP][CHUNK]
  // Where each 16 keys and 32 values begin; keys also of the 32 behind the chunk.
  const bf16 *key[CHUNK / 16 + 2], *value[CHUNK / 32];

  static size_t bytes(int rows, int dim) {
    return size_t(rows) * (dim * (sizeof(bf16) + sizeof(float)) + 2 * sizeof(float)) +
           STRIP * CHUNK * (sizeof(float) + sizeof(bf16));
  }
  Room(void* memory, int rows, int dim) {
    scores = (float*)memory;
    sums = scores + STRIP * CHUNK;
    shares = (bf16*)(sums + size_t(rows) * dim);
    q = shares + STRIP * CHUNK;
    top = (float*)(q + size_t(rows) * dim);
    weight = top + rows;
  }
};

#ifdef __AMX_TILE__
template <int ROWS>
void score_tiles(const Room& room, const bf16* q, int dim, int keys, bool fresh) {
  for (int n = 0; n < keys / 16; n += 2) {
    TILE_ZERO(0); TILE_ZERO(1); TILE_ZERO(2); TILE_ZERO(3);
    const bf16 *k0 = room.key[n], *k1 = room.key[n + 1];
    for (int d = 0; d < dim; d += 32) {
      if (fresh)  // the next keys, and the values of these: all of them will be needed soon
        for (int r = 0; r < 16; r++) {
          prefetch(room.key[n + 2] + d * 16 + r * 32);
          prefetch(room.key[n + 3] + d * 16 + r * 32);
          _mm_prefetch((const char*)(room.value[n / 2] + d * 32 + r * 64), _MM_HINT_T1);
          _mm_prefetch((const char*)(room.value[n / 2] + d * 32 + r * 64 + 32), _MM_HINT_T1);
        }
      TILE_LOAD(4, q + d * 32, 64);
      TILE_LOAD(6, k0 + d * 16, 64);
      TILE_DOT("tdpbf16ps", 0, 4, 6);
      TILE_LOAD(7, k1 + d * 16, 64);
      TILE_DOT("tdpbf16ps", 1, 4, 7);
      if (ROWS > 16) {
        TILE_LOAD(5, q + d * 32 + 512, 64);
        TILE_DOT("tdpbf16ps", 2, 5, 6);
        TILE_DOT("tdpbf16ps", 3, 5, 7);
      }
    }
    float* to = room.scores + n * 16;
    TILE_STORE(0, to, CHUNK * 4);
    TILE_STORE(1, to + 16, CHUNK * 4);
    if (ROWS > 16) {
      TILE_STORE(2, to + 16 * CHUNK, CHUNK * 4);
      TILE_STORE(3, to + 16 * CHUNK + 16, CHUNK * 4);
    }
  }
}

template <int ROWS>
void add_values_tiles(const Room& room, float* sums, int dim, int keys) {
  for (int d = 0; d < dim; d += 32) {
    float* to = sums + d;
    TILE_LOAD(0, to, dim * 4);
    TILE_LOAD(1, to + 16, dim * 4);
    if (ROWS > 16) {
      TILE_LOAD(2, to + 16 * dim, dim * 4);
      TILE_LOAD(3, to + 16 * dim + 16, dim * 4);
    }
    for (int k = 0; k < keys / 32; k++) {
      const bf16* v = room.value[k] + d * 2;
      TILE_LOAD(4, room.shares + k * 32, CHUNK * 2);
      TILE_LOAD(6, v, dim * 4);
      TILE_DOT("tdpbf16ps", 0, 4, 6);
      TILE_LOAD(7, v + 32, dim * 4);
      TILE_DOT("tdpbf16ps", 1, 4, 7);
      if (ROWS > 16) {
        TILE_LOAD(5, room.shares + 16 * CHUNK + k * 32, CHUNK * 2);
        TILE_DOT("tdpbf16ps", 2, 5, 6);
        TILE_DOT("tdpbf16ps", 3, 5, 7);
      }
    }
    TILE_STORE(0, to, dim * 4);
    TILE_STORE(1, to + 16, dim * 4);
    if (ROWS > 16) {
      TILE_STORE(2, to + 16 * dim, dim * 4);
      TILE_STORE(3, to + 16 * dim + 16, dim * 4);
    }
  }
}
void score(const Room& room, const bf16* q, int rows, int dim, int keys, bool fresh) {
  (rows > 16 ? score_tiles<32> : score_tiles<16>)(room, q, dim, keys, fresh);
}
void add_values(const Room& room, float* sums, int rows, int dim, int keys) {
  (rows > 16 ? add_values_tiles<32> : add_values_tiles<16>)(room, sums, dim, keys);
}
#else
template <int ROWS>
void score_rows(const Room& room, const bf16* q, int row, int dim, int keys) {
  for (int n = 0; n < keys / 16; n++) {
    f32x16 sums[ROWS][2] = {};
    for (int d = 0; d < dim; d += 2) {
      const bf16* at = q + d / 32 * 1024 + row * 32 + d % 32;  // rows of A: see Room
      for (int r = 0; r < ROWS; r++)
        sums[r][d / 2 % 2] = dot2(sums[r][d / 2 % 2], room.key[n] + d * 16, load<uint32_t>(at + r * 32));
    }
    for (int r = 0; r < ROWS; r++)
      store(room.scores + (row + r) * CHUNK + n * 16, sums[r][0] + sums[r][1]);
  }
}
template <int ROWS>
void add_values_rows(const Room& room, float* sums, int row, int dim, int keys) {
  for (int d = 0; d < dim; d += 32) {
    f32x16 out[ROWS][2];
    for (int r = 0; r < ROWS; r++)
      for (int i = 0; i < 2; i++) out[r][i] = load<f32x16>(sums + (row + r) * dim + d + i * 16);
    for (int k = 0; k < keys; k += 2) {
      const bf16* v = room.value[k / 32] + size_t(k % 32) * dim + d * 2;
      for (int r = 0; r < ROWS; r++) {
        uint32_t pair = load<uint32_t>(room.shares + (row + r) * CHUNK + k);
        out[r][0] = dot2(out[r][0], v, pair);
        out[r][1] = dot2(out[r][1], v + 32, pair);
      }
    }
    for (int r = 0; r < ROWS; r++)
      for (int i = 0; i < 2; i++) store(sums + (row + r) * dim + d + i * 16, out[r][i]);
  }
}
void score(const Room& room, const bf16* q, int rows, int dim, int keys, bool) {
  int row = 0;
  for (; row + 2 <= rows; row += 2) score_rows<2>(room, q, row, dim, keys);
  if (row < rows) score_rows<1>(room, q, row, dim, keys);
}
void add_values(const Room& room, float* sums, int rows, int dim, int keys) {
  int row = 0;
  for (; row + 2 <= rows; row += 2) add_values_rows<2>(room, sums, row, dim, keys);
  if (row < rows) add_values_rows<1>(room, sums, row, dim, keys);
}
#endif

// Scores of one row become shares of what the row has seen so far: keys [low, high) of the chunk
// are visible. `factor` is the scale times log2(e).
void weigh(const Room& room, int r, int dim, int keys, int low, int high, float factor, float* sums,
           float* top, float* weight) {
  float* scores = room.scores + r * CHUNK;
  bf16* shares = room.shares + r * CHUNK;
  const i32x16 count = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const f32x16 nothing = splat(-__builtin_inff());
  f32x16 most = nothing;
  if (low < 0) low = 0;
  for (int k = 0; k < keys; k += LANES) {
    f32x16 v = load<f32x16>(scores + k);
    if (k < low || k + LANES > high) {
      i32x16 at = count + k;
      store(scores + k, v = ((at >= low) & (at < high)) ? v : nothing);
    }
    most = larger(most, v);
  }
  const float chunk_top = largest(most) * factor;
  if (chunk_top == -__builtin_inff()) {  // sees nothing of this chunk
    memset(shares, 0, keys * sizeof(bf16));
    return;
  }
  if (chunk_top > *top) {
    const float shrink = exp2(splat(*top - chunk_top))[0];
    *weight *= shrink;
    *top = chunk_top;
    for (int d = 0; d < dim; d += LANES) store(sums + d, load<f32x16>(sums + d) * shrink);
  }
  f32x16 total = {};
  for (int k = 0; k < keys; k += LANES) {
    f32x16 share = exp2<true>(load<f32x16>(scores + k) * factor - *top);
    total += share;
    store(shares + k, narrow(share));
  }
  *weight += sum(total);
}

// Piece `p` for one key head.
void attend(const Attention& a, const Piece& p, int kv_head, const Room& room, float* parts) {
  const int group = a.heads / a.kv_heads, rows = p.count * group, dim = a.dim;
  const size_t head_size = size_t(a.block_size) * dim;
  for (int i = 0; i < rows; i++) {
    const bf16* from = a.q + size_t(a.rows[p.first + i / group]) * a.q_stride + (kv_head * group + i % group) * dim;
    bf16* to = room.q + size_t(i / STRIP) * STRIP * dim + i % STRIP * 32;
    for (int d = 0; d < dim; d += 32) memcpy(to + d * 32, from + d, 64);
    room.top[i] = -__builtin_inff();
    room.weight[i] = 0;
  }
  memset(room.sums, 0, sizeof(float) * ceil_div(rows, STRIP) * STRIP * dim);
  Room here = room;
  for (int begin = p.begin; begin < p.end; begin += CHUNK) {
    const int keys = ceil_div(p.end - begin < CHUNK ? p.end - begin : CHUNK, 32) * 32;
    for (int k = 0; k < keys + 32; k += 16) {
      const int at = begin + k < p.end ? begin + k : begin, block = a.tables[p.table + at / a.block_size];
      const size_t place = (size_t(block) * a.kv_heads + kv_head) * head_size + size_t(at % a.block_size) * dim;
      here.key[k / 16] = a.keys + place;
      if (k % 32 == 0 && k < CHUNK) here.value[k / 32] = a.values + place;
    }
    for (int strip = 0; strip < rows; strip += STRIP) {
      const int live = rows - strip < STRIP ? rows - strip : STRIP;
      float* sums = room.sums + size_t(strip) * dim;
      score(here, room.q + size_t(strip) * dim, live, dim, keys, strip == 0);
      for (int r = 0; r < live; r++) {
        const int i = strip + r, limit = a.limits[a.rows[p.first + i / group]];
        const int high = (limit < p.end ? limit : p.end) - begin;
        const int low = a.window ? limit - a.window - begin : 0;
        weigh(here, r, dim, keys, low, high, a.scale * LOG2E, sums + size_t(r) * dim, room.top + i, room.weight + i);
      }
      add_values(here, sums, live, dim, keys);
    }
  }
  for (int i = 0; i < rows; i++) {
    const float* sums = room.sums + size_t(i) * dim;
    const int head = kv_head * group + i % group;
    if (p.part < 0) {
      bf16* to = a.out + size_t(a.rows[p.first + i / group]) * a.out_stride + head * dim;
      for (int d = 0; d < dim; d += LANES) store(to + d, narrow(load<f32x16>(sums + d) / room.weight[i]));
    } else {
      float* to = parts + (size_t(p.part + i / group) * a.heads + head) * (dim + 16);
      memcpy(to, sums, dim * sizeof(float));
      to[dim] = room.top[i];
      to[dim + 1] = room.weight[i];
    }
  }
}

void merge(const Attention& a, int token, const float* parts) {
  const int first = a.merge_first[token], last = a.merge_first[token + 1], dim = a.dim;
  if (first == last) return;
  for (int head = 0; head < a.heads; head++) {
    auto part = [&](int i) { return parts + (size_t(a.merge_parts[i]) * a.heads + head) * (dim + 16); };
    float top = -__builtin_inff(), weight = 0;
    float sums[MAX_HEAD_DIM] = {};
    for (int i = first; i < last; i++) top = part(i)[dim] > top ? part(i)[dim] : top;
    for (int i = first; i < last; i++) {
      const float factor = exp2(splat(part(i)[dim] - top))[0];
      weight += part(i)[dim + 1] * factor;
      for (int d = 0; d < dim; d += LANES)
        store(sums + d, load<f32x16>(sums + d) + load<f32x16>(part(i) + d) * factor);
    }
    bf16* to = a.out + size_t(token) * a.out_stride + head * dim;
    for (int d = 0; d < dim; d += LANES) store(to + d, narrow(load<f32x16>(sums + d) / weight));
  }
}

}  // namespace

static int most_rows(const Attention& a) {
  int most = 0;
  for (int i = 0; i < a.n_pieces; i++) most = a.pieces[i].count > most ? a.pieces[i].count : most;
  return ceil_div(most * (a.heads / a.kv_heads), STRIP) * STRIP;
}

bool attention_room(Team& team, const Attention& a) {
  const size_t parts = size_t(a.n_parts) * a.heads * (a.dim + 16) * sizeof(float);
  return team.reserve_own(3, Room::bytes(most_rows(a), a.dim)) && team.reserve_shared(1, parts);
}

void attention(Team& team, int me, const Attention& a) {
  const int rows = most_rows(a);
  const Room room(team.own(me, 3), rows, a.dim);
  float* parts = (float*)team.shared(1);
  configure_tiles();
  // All pieces of one key head, then the next head: a prompt's keys stay in the cache meanwhile.
  for (int i; (i = team.claim()) < a.n_pieces * a.kv_heads;)
    attend(a, a.pieces[i % a.n_pieces], i / a.n_pieces, room, parts);
  release_tiles();
  team.meet();
  if (!a.n_parts) return;
  for (int token; (token = team.claim()) < a.tokens;) merge(a, token, parts);
  team.meet();
}
