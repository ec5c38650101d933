// What the library offers, in terms of plain structures that Python fills in. All functions here
// are run by every member of a team at once and end when all members have finished.
#pragma once
#include <cstdint>

#include "team.h"

constexpr int MAX_HEAD_DIM = 512;  // as cache.py, whose callers see to it

enum Kind : int32_t { BF16 = 0, INT8 = 1, INT4 = 2 };
enum Type : int32_t { TYPE_BF16 = 0, TYPE_F32 = 1, TYPE_ADD_F32 = 2 };  // the last: added to f32
enum Path : int32_t { PATH_AUTO = 0, PATH_VECTOR = 1, PATH_TILES = 2 };

// A matrix [n_out, k_in] packed into panels of 32 outputs: see linear.cpp.
struct Linear {
  int32_t kind, n_out, k_in, k;  // k: inputs with padding, a multiple of 64 (and of the group)
  int32_t panels, gated;         // gated: n_out = half of the rows; output silu(gate) * up
  int32_t group, planes;         // int4: inputs per scale; int8, int4: 1 = 8-bit inputs, 2 = 16-bit
  const char* data;
  const float* scale;            // int8, int4: [panels * 32]
  const uint16_t* group_scale;   // int4: float16 [panels][k / group][32]
  const uint8_t* zero;           // int4: [panels][k / group][32], null means 8 everywhere
  const float* bias;             // [panels * 32] or null
};

struct Input {
  const void* rows;
  int32_t type, stride;          // stride: elements from row to row
  const float* norm;             // RMS norm's weight, applied on the fly, or null
  float eps;
};
struct Output {
  void* rows;
  int32_t type, stride;
};

void linear(Team& team, int me, const Linear& w, const Input& in, const Output& out, int tokens,
            int path);
// Makes the members' memory large enough for `linear`, to be called outside of `run`; false if the
// system has no more. The same goes for `attention_room`, whose shared memory holds partial answers.
bool linear_room(Team& team, const Linear& w, int tokens);
void pack(Team& team, int me, int kind, const void* weights, int rows, int columns, int k,
          int gated, char* packed);

// 4-bit codes (one a byte) and scales [rows][groups] of bf16 weights [rows][columns]; only for groups
// that `can_quantize_int4` takes.
bool can_quantize_int4(int group);
void quantize_int4(Team& team, const uint16_t* weights, int rows, int columns, int group,
                   uint8_t* codes, float* scales);

void rms_norm(Team& team, int me, const Input& in, float* residual,
              const Output& out, int tokens, int size);
// gate_up: 16 gates and their 16 ups in turn, as a gated matrix's panels have them.
void silu_mul(Team& team, int me, const Input& gate_up, const Output& out, int tokens, int size);

// Rotary embedding of q and k (each half-split), after an optional norm of every head, and the
// writing of k and v into the cache's slots. qkv: bf16 rows of [q | k | v].
struct Rope {
  uint16_t* qkv;                 // q is changed in place
  int32_t stride, heads, kv_heads, dim;  // dim: up to MAX_HEAD_DIM
  const float *cos, *sin;        // [tokens][dim / 2]
  const float *q_norm, *k_norm;  // [dim] or null
  float eps;
  int32_t block_size;
  const int64_t* slots;          // [tokens]; negative: not stored
  uint16_t *keys, *values;       // one layer's cache
};
void rope_store(Team& team, int me, const Rope& rope, int tokens);

// One piece of attention: query tokens rows[first .. first + count) (indices into q) look at the
// keys [begin, end) of one block table. begin is a multiple of 32.
struct Piece {
  int32_t first, count;
  int32_t table, begin, end;     // table: offset into tables
  int32_t part;                  // where the partial answers go; -1: straight to the output
};
struct Attention {
  const uint16_t* q;             // [tokens][q_stride], heads one behind the other
  uint16_t* out;                 // [tokens][out_stride]
  int32_t q_stride, out_stride, heads, kv_heads, dim, block_size, tokens, window;
  const uint16_t *keys, *values;
  const int32_t *rows, *tables;
  const int32_t* limits;         // [tokens]: keys that a token may see, from position 0
  const Piece* pieces;
  int32_t n_pieces, n_parts;
  const int32_t *merge_first, *merge_parts;  // [tokens + 1] and the parts of each token
  float scale;
};
void attention(Team& team, int me, const Attention& a);
bool attention_room(Team& team, const Attention& a);

// A whole stack of layers in one go: h += attention(norm(h)); h += mlp(norm(h)).
struct Layer {
  Linear qkv, out, gate_up, down;
  const float *input_norm, *post_norm, *q_norm, *k_norm;
  uint16_t *keys, *values;
  int32_t plan, reserved;        // which of Stack.plans
};
struct Stack {
  float* hidden;                 // [tokens][size], contiguous
  int32_t tokens, size, path;
  float eps;
  const float* norm;             // of what comes out, or null
  uint16_t *qkv, *seen, *inner;  // bf16 room: [tokens][(heads + 2 kv_heads) * dim], [heads * dim], [mlp]
  Rope rope;                     // all but qkv, norms and cache
  const Attention* plans;        // all but q, out and cache
};
void run_stack(Team& team, int me, const Layer* layers, int count, const Stack& stack);
